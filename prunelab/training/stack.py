"""Several chains of one architecture as one: the forward and backward pass of all runs, written out by hand.

A chain of small layers spends most of its time between the kernels, in autograd and in the optimiser's passes over
memory. Here the parameters of all runs are stacked along a first axis, so that one product serves every run, and for
plain SGD the update is part of the product that makes the gradient: ``W += (-lr * d).T @ x`` reads and writes the
weights once. Backpropagation is linear in the gradient of the logits, so a run's own learning rate is a factor there.

Axes: R runs, B samples of a batch, F features, C classes. Dense activations are [R, B, F], or [B, F] for one run and
for a batch that all runs share; maps of convolutions are a list, one [B, channels, H, W] per run in channels_last,
because the runs' own convolutions, one after the other, measured faster on a CPU than one grouped convolution
(1.1 to 2.5 times) and need no padding to the widest. Where the precision is bfloat16, maps are, from the first
convolution or pooling to the flattening, while a network learns; weights, gradients and all that is dense stay float32.
A network that is no chain learns under torch's autocast, which takes the dense products, too.

The stacked tensors are the only storage of the weights; the parameters of the plain models are views into them, so
whoever holds a plain model sees its current weights. Runs with narrower layers are padded with zeros: a padded unit has
no input, no bias and no output, hence no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_aten = torch.ops.aten
_ELEMENTWISE: Mapping[type[nn.Module], Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]] = {
    # type -> gradient of the input, from (module, gradient of the output, input, output)
    nn.ReLU: lambda _, d, __, y: _aten.threshold_backward(d, y, 0),
    nn.Sigmoid: lambda _, d, __, y: _aten.sigmoid_backward(d, y),
    nn.Tanh: lambda _, d, __, y: _aten.tanh_backward(d, y),
    nn.LeakyReLU: lambda m, d, x, _: _aten.leaky_relu_backward(d, x, m.negative_slope, False),
    nn.GELU: lambda m, d, x, _: _aten.gelu_backward(d, x, approximate=m.approximate),
    nn.Identity: lambda _, d, __, ___: d,
}
_POOLING = (nn.MaxPool2d, nn.AvgPool2d)
_STACKABLE = (nn.Linear, nn.Conv2d, nn.Flatten, *_ELEMENTWISE, *_POOLING)
Maps = list[Tensor]  # of a convolution: one [B, channels, H, W] per run


def stackable(model: nn.Module) -> bool:
    """Whether models like this can share a stack: plain chains of layers this file knows; others train one by one."""
    if type(model) is not nn.Sequential or not all(type(module) in _STACKABLE for module in model):
        return False
    return all(_plain(module) for module in model)


def _plain(module: nn.Module) -> bool:
    """No option that the backward pass below does not know."""
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if isinstance(module, nn.MaxPool2d):
        return not module.return_indices
    if isinstance(module, nn.Flatten):
        return module.start_dim == 1 and module.end_dim == -1
    return isinstance(module, nn.ReLU) or not getattr(module, "inplace", False)


def same_architecture(a: nn.Module, b: nn.Module) -> bool:
    """Whether two chains differ in nothing but the widths of their layers."""
    plain = [[(name, type(module)) for name, module in model.named_children()] for model in (a, b)]
    return plain[0] == plain[1]


class Stack:
    """R models, seen as one function from batches to logits.

    Args:
        models: plain modules on one device; their parameters become views of the stack. One model is used as it is,
            whatever it is made of; several have to be ``stackable`` and of the ``same_architecture``.
        precision: in which maps are computed while learning, float32 or bfloat16; without a gradient all is float32.
    """

    def __init__(self, models: Sequence[nn.Module], precision: torch.dtype = torch.float32) -> None:
        self.models, self.precision = list(models), precision
        self.chain = stackable(models[0])
        self.parameters: dict[str, Tensor] = {}
        if len(models) == 1:
            self.parameters = dict(models[0].named_parameters())
        else:
            for name, _ in models[0].named_parameters():
                own = [model.get_parameter(name) for model in models]
                whole = pile([p.detach() for p in own])
                for run, parameter in enumerate(own):
                    parameter.data = corner(whole[run], parameter.shape)
                self.parameters[name] = whole
        self.layers = _ordered(models[0]) if self.chain else []
        self.own = [dict(model.named_modules()) for model in models] if self.chain else []

    def __len__(self) -> int:
        return len(self.models)

    def runs(self, whole: Tensor) -> Iterator[Tensor]:
        """The parts of a stacked tensor that belong to each run, padding included; for one run the tensor itself."""
        return iter([whole] if len(self) == 1 else whole.unbind(0))

    @torch.no_grad()
    def __call__(self, x: Tensor, shared: bool = False) -> Tensor:
        """Logits of every run, without a gradient.

        Args:
            x: float32 [R, B, ...], each run's own batch; or [B, ...] with ``shared``, one batch for all.
            shared: whether ``x`` lacks the run axis.

        Returns:
            float32 [R, B, C].
        """
        if not self.chain:
            return self.models[0](_last(x if shared else x[0]))[None]
        return self._forward(x, shared, None)

    def learn(
        self, x: Tensor, y: Tensor, gradients: dict[str, Tensor] | None, rates: Tensor, shared: bool = False
    ) -> tuple[Tensor, Tensor]:
        """One step of every run: forward, backward, and for plain SGD the update.

        Args:
            x: as for a call.
            y: labels, int64 [R, B] or [B], for the cross entropy; or numbers, float32 [R, B, C] or [B, C], for the mean
                squared error, of which no answer is right.
            gradients: parameter name -> tensor of the stacked shape that receives the gradient of each run's mean loss;
                None: the parameters change by ``-rate`` times it at once.
            rates: float32 [R], the learning rates; read only where ``gradients`` is None.
            shared: whether ``x`` and ``y`` lack the run axis.

        Returns:
            Mean loss of each run, [R]; right answers of each run, int64 [R].
        """
        if not self.chain:
            return self._learn_by_autograd(x if shared else x[0], y if shared else y[0], gradients, rates)
        with torch.no_grad():
            tape: list[tuple] = []
            logits = self._forward(x, shared, tape)
            loss, right, d = (_squared_error if y.is_floating_point() else _cross_entropy)(logits, y)
            samples = logits.shape[1]
            d.mul_(1 / samples if gradients is not None else (rates / -samples)[:, None, None])
            self._backward(d[0] if len(self) == 1 else d, tape, gradients)
        return loss, right

    def _learn_by_autograd(
        self, x: Tensor, y: Tensor, gradients: dict[str, Tensor] | None, rates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same for one model of any kind."""
        reduced = torch.autocast(x.device.type, self.precision, self.precision != torch.float32, cache_enabled=False)
        with torch.enable_grad():
            with reduced:
                logits = self.models[0](_last(x)).float()
            loss = (F.mse_loss if y.is_floating_point() else F.cross_entropy)(logits, y)
            found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        with torch.no_grad():
            for (name, parameter), gradient in zip(self.parameters.items(), found, strict=True):
                if gradients is not None:
                    # Copied: behind channels_last maps a gradient lies in memory in another order than its weight, and
                    # the fused optimisers go by the order in memory.
                    gradients[name].copy_(torch.zeros_like(parameter) if gradient is None else gradient)
                elif gradient is not None:
                    parameter.sub_(rates[0] * gradient)
            right = torch.zeros_like(y[:, 0], dtype=torch.long) if y.is_floating_point() else logits.argmax(-1) == y
            return loss.detach()[None], right.sum()[None]

    # -- the chain ----------------------------------------------------------------------------------------------------

    def _forward(self, x: Tensor, shared: bool, tape: list[tuple] | None) -> Tensor:
        """Logits [R, B, C]; what the way back needs is put on the tape: (layer number, input, output or indices)."""
        if len(self) == 1:
            x, shared = (x if shared else x[0]), True
        maps = torch.float32 if tape is None else self.precision
        for number, (name, module) in enumerate(self.layers):
            before: Tensor | Maps = x
            kept: Tensor | list[Tensor] | None = None
            if isinstance(module, nn.Linear):
                x = self._linear(name, x, shared)
                shared = shared and len(self) == 1
            elif isinstance(module, nn.Conv2d):
                before = self._maps(x, shared, maps)
                x = [self._convolve(run, name, part) for run, part in enumerate(before)]
                shared = shared and len(self) == 1
            elif isinstance(module, nn.Flatten):
                x = self._rows(x) if isinstance(x, list) else x.flatten(1 if shared else 2)
            elif isinstance(module, _POOLING):
                before = self._maps(x, shared, maps)
                shared = shared and len(self) == 1
                if isinstance(module, nn.MaxPool2d):
                    pairs = [_aten.max_pool2d_with_indices(part, *_window(module)) for part in before]
                    x, kept = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
                else:
                    x = [module(part) for part in before]
            elif isinstance(module, nn.ReLU) and self._owned(number):
                x = [part.relu_() for part in x] if isinstance(x, list) else x.relu_()
                kept = x
            else:
                act = torch.relu if isinstance(module, nn.ReLU) else module
                x = [act(part) for part in x] if isinstance(x, list) else act(x)
                kept = x
            if tape is not None:
                tape.append((number, before, kept))
        if isinstance(x, list):
            x = self._rows(x)
        return x[None] if len(self) == 1 else x.expand(len(self), *x.shape) if shared else x

    def _owned(self, number: int) -> bool:
        """Whether the layer before made this one's input and does not need it again: it may be overwritten."""
        return number > 0 and isinstance(self.layers[number - 1][1], (nn.Linear, nn.Conv2d, *_POOLING))

    def _linear(self, name: str, x: Tensor, shared: bool) -> Tensor:
        weight, bias = self.parameters[f"{name}.weight"].detach(), self.parameters.get(f"{name}.bias")
        bias = None if bias is None else bias.detach()
        if len(self) == 1:
            return F.linear(x, weight, bias)
        if shared:  # one wide product instead of R narrow ones
            x = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
            return x.unflatten(1, (len(self), -1)).transpose(0, 1)
        if bias is None:
            return torch.bmm(x, weight.transpose(1, 2))
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    def _convolve(self, run: int, name: str, x: Tensor) -> Tensor:
        layer = self.own[run][name]
        return F.conv2d(x, _as(layer.weight, x), _as(layer.bias, x), *_geometry(layer))

    def _maps(self, x: Tensor | Maps, shared: bool, precision: torch.dtype) -> Maps:
        if isinstance(x, list):
            return x
        x = x.to(precision)
        return [_last(x)] * len(self) if shared else [_last(part) for part in x]

    def _rows(self, maps: Maps) -> Tensor:
        """Flattened maps, [B, F] for one run and [R, B, F] for several, zeros behind those with fewer channels."""
        if len(maps) == 1:
            return maps[0].flatten(1).float()
        rows = [part.flatten(1).float() for part in maps]
        if len({row.shape[1] for row in rows}) == 1:
            return torch.stack(rows)
        return pile(rows)

    def _backward(self, d: Tensor | Maps, tape: list[tuple], gradients: Mapping[str, Tensor] | None) -> None:
        """From the gradient of the logits to those of all parameters; nothing is computed for the batch itself."""
        first = next(i for i, (_, module) in enumerate(self.layers) if isinstance(module, nn.Linear | nn.Conv2d))
        for number, x, kept in reversed(tape[first:]):
            name, module = self.layers[number]
            if isinstance(module, nn.Linear):
                d = self._linear_backward(name, d, x, gradients, number > first)
            elif isinstance(module, nn.Conv2d):
                d = [
                    self._convolve_backward(run, name, d[run], x[run], gradients, number > first)
                    for run in range(len(self))
                ]
            elif isinstance(module, nn.Flatten):
                if isinstance(x, list):
                    parts = [d] if len(self) == 1 else d.unbind(0)
                    d = [
                        _last(part[:, : own[0].numel()].reshape(own.shape).to(own.dtype))
                        for part, own in zip(parts, x, strict=True)
                    ]
                else:
                    d = d.reshape(x.shape)
            elif isinstance(module, nn.MaxPool2d):
                d = [
                    _aten.max_pool2d_with_indices_backward(part, own, *_window(module), index)
                    for part, own, index in zip(d, x, kept, strict=True)
                ]
            elif isinstance(module, nn.AvgPool2d):
                options = (module.ceil_mode, module.count_include_pad, module.divisor_override)
                d = [
                    _aten.avg_pool2d_backward(part, own, *_window(module)[:3], *options)
                    for part, own in zip(d, x, strict=True)
                ]
            else:
                back = _ELEMENTWISE[type(module)]
                if isinstance(d, list):
                    d = [back(module, part, own, out) for part, own, out in zip(d, x, kept, strict=True)]
                else:
                    d = back(module, d, x, kept)

    def _linear_backward(
        self, name: str, d: Tensor, x: Tensor, gradients: Mapping[str, Tensor] | None, further: bool
    ) -> Tensor | None:
        weight, bias = self.parameters[f"{name}.weight"].detach(), self.parameters.get(f"{name}.bias")
        single = len(self) == 1
        back = None
        if further:  # before the weights change
            back = d @ weight if single else torch.bmm(d, weight)
        shared = not single and x.dim() == 2
        if shared:  # one product for all runs, as on the way forth
            d_wide = d.transpose(0, 1).reshape(len(x), -1)
        target = weight if gradients is None else gradients[f"{name}.weight"]
        if gradients is None:
            if single:
                target.addmm_(d.t(), x)
            elif shared:
                target.flatten(0, 1).addmm_(d_wide.t(), x)
            else:
                target.baddbmm_(d.transpose(1, 2), x)
        elif single:
            torch.mm(d.t(), x, out=target)
        elif shared:
            torch.mm(d_wide.t(), x, out=target.view(-1, target.shape[-1]))
        else:
            torch.bmm(d.transpose(1, 2), x, out=target)
        if bias is not None:
            total = d.sum(-2)
            bias.detach().add_(total) if gradients is None else gradients[f"{name}.bias"].copy_(total)
        return back

    def _convolve_backward(
        self, run: int, name: str, d: Tensor, x: Tensor, gradients: Mapping[str, Tensor] | None, further: bool
    ) -> Tensor | None:
        layer = self.own[run][name]
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        stride, padding, dilation, groups = _geometry(layer)
        wanted = [further, True, bias is not None]
        back, dw, db = _aten.convolution_backward(
            d,
            x,
            _as(weight, x),
            None if bias is None else list(bias.shape),
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            wanted,
        )
        for parameter, own, change in (("weight", weight, dw), ("bias", bias, db)):
            if own is None:
                continue
            if gradients is None:
                own.add_(change)
            else:
                whole = gradients[f"{name}.{parameter}"]
                (whole if len(self) == 1 else corner(whole[run], own.shape)).copy_(change)
        return back


def _cross_entropy(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss [R], right answers [R], and the gradient of the sum over samples with respect to the logits."""
    y = y.expand(len(logits), -1)[..., None]
    highest, predicted = logits.max(-1, keepdim=True)
    right = (predicted == y).sum((1, 2))
    shifted = logits - highest
    own = shifted.gather(-1, y)
    # In steps, because torch's log_softmax is twice as slow over so short an axis.
    d = shifted.exp_()
    total = d.sum(-1, keepdim=True)
    loss = (total.log() - own).mean((1, 2))
    d.div_(total).scatter_add_(-1, y, d.new_full((), -1.0).expand(y.shape))
    return loss, right, d


def _squared_error(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for numbers: the mean over samples and outputs of the squared error."""
    d = outputs - y
    loss = d.square().mean((1, 2))
    return loss, torch.zeros_like(loss, dtype=torch.long), d.mul_(2 / d.shape[-1])


def _ordered(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers as they are computed: a ReLU before a max-pooling goes behind it, where its maps are smaller.

    The order does not matter to the result, nor to the gradient: the largest of the rectified is the rectified largest.
    """
    layers = list(model.named_children())
    for i in range(len(layers) - 1):
        if isinstance(layers[i][1], nn.ReLU) and isinstance(layers[i + 1][1], nn.MaxPool2d):
            layers[i], layers[i + 1] = layers[i + 1], layers[i]
    return layers


def _last(x: Tensor) -> Tensor:
    """Maps in the memory order in which CPUs convolve and pool faster; anything else as it is.

    Maps of one channel are in both orders at once; unless the strides say otherwise torch goes on in the slow one (12
    times slower for the first layer of DropNet's Model B).
    """
    if x.dim() != 4:
        return x
    x, (_, channels, height, width) = x.contiguous(memory_format=torch.channels_last), x.shape
    return x.as_strided(x.shape, (channels * height * width, 1, width * channels, channels))


def _as(parameter: Tensor | None, maps: Tensor) -> Tensor | None:
    """Its values in the precision of the maps that it meets."""
    return None if parameter is None else parameter.detach().to(maps.dtype)


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _geometry(layer: nn.Conv2d) -> tuple[list[int], list[int], list[int], int]:
    return _pair(layer.stride), _pair(layer.padding), _pair(layer.dilation), layer.groups


def _window(module: nn.MaxPool2d | nn.AvgPool2d) -> tuple:
    """Kernel, stride, padding, and for max-pooling dilation and ceil_mode, as torch's operators take them."""
    kernel, stride, padding = (_pair(value) for value in (module.kernel_size, module.stride, module.padding))
    if isinstance(module, nn.AvgPool2d):
        return kernel, stride, padding
    return kernel, stride, padding, _pair(module.dilation), module.ceil_mode


def pile(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors of one rank along a new first axis, each padded with zeros to the largest: [R, ...]."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    whole = tensors[0].new_zeros(len(tensors), *shape)
    for run, tensor in enumerate(tensors):
        corner(whole[run], tensor.shape).copy_(tensor)
    return whole


def corner(whole: Tensor, shape: Sequence[int]) -> Tensor:
    """The view of the first entries of ``whole`` along every axis that has the given shape."""
    return whole[tuple(slice(size) for size in shape)]


def release(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that own their storage, for a run that leaves its stack."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
