"""Several chains of one architecture as one: the forward and backward pass of all runs, written out by hand.

A chain of small layers spends most of its time between the kernels, in autograd and in the optimiser's passes over
memory. Here the parameters of all runs are stacked along a first axis, so that one product serves every run, and for
plain SGD the update is part of the product that makes the gradient: ``W += (-lr * d).T @ x`` reads and writes the
weights once. Backpropagation is linear in the gradient of the logits, so a run's own learning rate is a factor there.

Axes: R runs, B samples of a batch, F features, C classes. Dense activations are [R, B, F], or [B, F] before the first
product of a batch that all runs share; maps of convolutions are a list, one [B, channels, H, W] per run in
channels_last, because the runs' own convolutions, one after the other, measured faster on a CPU than one grouped
convolution (1.1 to 2.5 times) and need no padding to the widest. Where the precision is bfloat16, maps are, from the
first convolution or pooling to the flattening, while a network learns; weights, gradients and all that is dense stay
float32. A network that is no chain learns under torch's autocast, which takes the dense products, too.

The stacked tensors are the only storage of the weights; the parameters of the plain models are views into them, so
whoever holds a plain model sees its current weights. A run with narrower layers than its slot is padded with zeros: a
padded unit has no input, no bias and no output, hence no gradient.

On a CPU a run gets the same bits in every stack, alone as well. Products of matrices and sums do not depend on how many
there are side by side; what they depend on is kept equal. The shapes: a slot follows from the run alone (``slot``). The
alignment: parts of runs begin at multiples of 64 bytes, and rows of a batch are filled up to a multiple of 16. The last
few elements of a tensor, which torch's activations and optimisers compute in another way than the others: there are
none, or each run has its own. Threads: dense layers have one; convolutions have all, so their number is part of what
decides the bits of a convolutional network.
"""

from __future__ import annotations

import contextlib
import math
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
_EXACT = (nn.ReLU, nn.LeakyReLU, nn.Identity)  # one operation an element: it rounds alike wherever the element stands
_POOLING = (nn.MaxPool2d, nn.AvgPool2d)
_STACKABLE = (nn.Linear, nn.Conv2d, nn.Flatten, *_ELEMENTWISE, *_POOLING)
Maps = list[Tensor]  # of a convolution: one [B, channels, H, W] per run

# Parameters from which sharing a stack gains nothing: the products fill the cores by themselves (our own measurement).
ALONE = 600_000
_ALIGNED = 16  # float32 in 64 bytes, the widest register and the alignment that Intel's library asks for equal bits
_UNROLLED = 32  # elements that torch's vectorised loops take at once; what is left over they compute one by one


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


def slot(size: int, full: int) -> int:
    """The length to which an axis of a pruned layer is padded: ``full``, halves and three quarters of it, and so on.

    It follows from the run alone, and pruned layers of about one size get the same. Our own choice of steps.
    """
    wide = full
    for power in range(full.bit_length()):
        for part in (-(-full // 2**power), -(-3 * full // 2 ** (power + 2))):
            wide = part if size <= part < wide else wide
    return wide


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch's operators on the CPU, for a while; switching takes less than a microsecond."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Stack:
    """R models, seen as one function from batches to logits.

    Args:
        models: plain modules on one device; their parameters become views of the stack. One model is used as it is,
            whatever it is made of; several have to be ``stackable`` and have layers of the same names and types.
        precision: in which maps are computed while learning, float32 or bfloat16; without a gradient all is float32.
        room: parameter name -> shape of a run's slot, at least that of every model; None: that of the largest.

    Attributes:
        parameters: name -> [R, ...], the weights of all.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        precision: torch.dtype = torch.float32,
        room: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.models, self.precision = list(models), precision
        self.chain = stackable(models[0])
        self.parameters: dict[str, Tensor] = {}
        for name, parameter in models[0].named_parameters():
            if not self.chain:
                self.parameters[name] = parameter.detach()[None]
                continue
            own = [model.get_parameter(name) for model in models]
            whole = pile([p.detach() for p in own], None if room is None else room[name])
            for run, p in enumerate(own):
                p.data = corner(whole[run], p.shape)
            self.parameters[name] = whole
        self.layers = _ordered(models[0]) if self.chain else []
        self.own = [dict(model.named_modules()) for model in models] if self.chain else []
        self._wide = self._flattened()
        size = sum(whole[0].numel() for whole in self.parameters.values())
        self.one_thread = self.chain and size <= ALONE
        self._threads = 1

    def __len__(self) -> int:
        return len(self.models)

    def _flattened(self) -> int | None:
        """Features that the first dense layer takes, padding included."""
        dense = [name for name, module in self.layers if isinstance(module, nn.Linear)]
        return self.parameters[f"{dense[0]}.weight"].shape[-1] if dense else None

    def flat(self, whole: Tensor) -> Tensor:
        """A tensor shaped like a parameter of the stack as rows without gaps, [R, ...], for work on every element."""
        return _storage(whole) if self.chain else whole

    def zeros(self, name: str) -> Tensor:
        """Zeros in the shape and the order in memory of a parameter of the stack."""
        like = self.parameters[name]
        return slots(len(self), like.shape[1:], like) if self.chain else torch.zeros_like(like)

    @contextlib.contextmanager
    def _few_threads(self) -> Iterator[None]:
        self._threads = torch.get_num_threads()
        with threads(1 if self.one_thread else self._threads):
            yield

    def _each(self, function: Callable[..., object], *maps: Sequence) -> list:
        """What a function makes of the maps of each run, with all threads."""
        with threads(self._threads):
            return [function(*own) for own in zip(*maps, strict=True)]

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
        with self._few_threads():
            return self._forward(x, shared, None)

    def learn(
        self, x: Tensor, y: Tensor, gradients: dict[str, Tensor] | None, rates: Tensor, shared: bool = False
    ) -> tuple[Tensor, Tensor]:
        """One step of every run: forward, backward, and for plain SGD the update.

        Args:
            x: as for a call.
            y: labels, int64 [R, B] or [B], for the cross entropy; or numbers, float32 [R, B, C] or [B, C], for the mean
                squared error, of which no answer is right.
            gradients: parameter name -> tensor, as ``zeros`` gives it, that receives the gradient of each run's mean
                loss; None: the parameters change by ``-rate`` times it at once.
            rates: float32 [R], the learning rates; read only where ``gradients`` is None.
            shared: whether ``x`` and ``y`` lack the run axis.

        Returns:
            Mean loss of each run, [R]; right answers of each run, int64 [R].
        """
        if not self.chain:
            return self._learn_by_autograd(x if shared else x[0], y if shared else y[0], gradients, rates)
        with torch.no_grad(), self._few_threads():
            tape: list[tuple] = []
            logits = self._forward(x, shared, tape)
            loss, right, d = (_squared_error if y.is_floating_point() else _cross_entropy)(logits, y)
            samples = logits.shape[1]
            d.mul_(1 / samples if gradients is not None else (rates / -samples)[:, None, None])
            self._backward(_filled(d), tape, gradients)
        return loss, right

    def _learn_by_autograd(
        self, x: Tensor, y: Tensor, gradients: dict[str, Tensor] | None, rates: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same for one model of any kind."""
        reduced = torch.autocast(x.device.type, self.precision, self.precision != torch.float32, cache_enabled=False)
        named = dict(self.models[0].named_parameters())
        with torch.enable_grad():
            with reduced:
                logits = self.models[0](_last(x)).float()
            loss = (F.mse_loss if y.is_floating_point() else F.cross_entropy)(logits, y)
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        with torch.no_grad():
            for (name, parameter), gradient in zip(named.items(), found, strict=True):
                if gradients is not None:
                    # Copied: behind channels_last maps a gradient lies in memory in another order than its weight, and
                    # the fused optimisers go by the order in memory.
                    gradients[name][0].copy_(torch.zeros_like(parameter) if gradient is None else gradient)
                elif gradient is not None:
                    parameter.sub_(rates[0] * gradient)
            right = torch.zeros_like(y[:, 0], dtype=torch.long) if y.is_floating_point() else logits.argmax(-1) == y
            return loss.detach()[None], right.sum()[None]

    # -- the chain ----------------------------------------------------------------------------------------------------

    def _forward(self, x: Tensor, shared: bool, tape: list[tuple] | None) -> Tensor:
        """Logits [R, B, C]; what the way back needs is put on the tape: (layer number, input, output or indices)."""
        samples = x.shape[0 if shared else 1]
        precision = torch.float32 if tape is None else self.precision
        if x.dim() == (2 if shared else 3):
            x = _filled(x)
        for number, (name, module) in enumerate(self.layers):
            before: Tensor | Maps = x
            kept: Tensor | list[Tensor] | None = None
            if isinstance(module, nn.Linear):
                x, shared = self._linear(name, x), False
            elif isinstance(module, (nn.Conv2d, *_POOLING)):
                before, shared = self._maps(x, shared, precision), False
                if isinstance(module, nn.Conv2d):
                    x = self._each(lambda own, part: _convolve(own[name], part), self.own, before)  # noqa: B023
                elif isinstance(module, nn.MaxPool2d):
                    window = _window(module)
                    pairs = self._each(lambda part: _aten.max_pool2d_with_indices(part, *window), before)  # noqa: B023
                    x, kept = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
                else:
                    x = self._each(module, before)
            elif isinstance(module, nn.Flatten):
                x = self._rows(x) if isinstance(x, list) else _filled(x.flatten(1 if shared else 2))
            else:
                in_place = isinstance(module, nn.ReLU) and self._owned(number)
                act = torch.relu_ if in_place else torch.relu if isinstance(module, nn.ReLU) else module
                x = kept = act(x) if shared else self._elementwise(module, act, x)
            if tape is not None:
                tape.append((number, before, kept))
        if isinstance(x, list):
            x = self._rows(x)
        return (x.expand(len(self), *x.shape) if shared else x)[:, :samples]

    def _elementwise(self, module: nn.Module, function: Callable[..., Tensor], *parts: Tensor | Maps) -> Tensor | Maps:
        """Of all runs at once where no run has elements left over, else of one after the other."""
        if isinstance(parts[0], list):
            return self._each(function, *parts)
        if isinstance(module, _EXACT) or parts[0][0].numel() % _UNROLLED == 0:
            return function(*parts)
        return torch.stack([function(*own) for own in zip(*parts, strict=True)])

    def _owned(self, number: int) -> bool:
        """Whether the layer before made this one's input and does not need it again: it may be overwritten."""
        return number > 0 and isinstance(self.layers[number - 1][1], (nn.Linear, nn.Conv2d, *_POOLING))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias")
        if x.dim() == 2:
            x = x.expand(len(self), *x.shape)
        if bias is None:
            return torch.bmm(x, weight.transpose(1, 2))
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    def _maps(self, x: Tensor | Maps, shared: bool, precision: torch.dtype) -> Maps:
        if isinstance(x, list):
            return x
        x = x.to(precision)
        return [_last(x)] * len(self) if shared else [_last(part) for part in x]

    def _rows(self, maps: Maps) -> Tensor:
        """Flattened maps, [R, B, F], zeros behind those with fewer channels than their slot has room for."""
        rows = [part.flatten(1).float() for part in maps]
        size = (rows[0].shape[0], self._wide or max(row.shape[1] for row in rows))
        if len(rows) == 1 and rows[0].shape == size:
            return _filled(rows[0][None])
        return _filled(torch.stack(rows) if all(row.shape == size for row in rows) else pile(rows, size).contiguous())

    def _backward(self, d: Tensor | Maps, tape: list[tuple], gradients: Mapping[str, Tensor] | None) -> None:
        """From the gradient of the logits to those of all parameters; nothing is computed for the batch itself."""
        first = next(i for i, (_, module) in enumerate(self.layers) if isinstance(module, nn.Linear | nn.Conv2d))
        for number, x, kept in reversed(tape[first:]):
            name, module = self.layers[number]
            if isinstance(module, nn.Linear):
                d = self._linear_backward(name, d, x, gradients, number > first)
            elif isinstance(module, nn.Conv2d):
                with threads(self._threads):
                    d = [
                        self._convolve_backward(run, name, d[run], x[run], gradients, number > first)
                        for run in range(len(self))
                    ]
            elif isinstance(module, nn.Flatten):
                if isinstance(x, list):
                    d = [
                        _last(part[: len(own), : own[0].numel()].reshape(own.shape).to(own.dtype))
                        for part, own in zip(d.unbind(0), x, strict=True)
                    ]
                else:
                    d = d[:, : x.shape[1]].reshape(x.shape)
            elif isinstance(module, nn.MaxPool2d):
                window = _window(module)
                back = _aten.max_pool2d_with_indices_backward
                d = self._each(lambda part, own, index: back(part, own, *window, index), d, x, kept)  # noqa: B023
            elif isinstance(module, nn.AvgPool2d):
                options = (
                    *_window(module)[:3], module.ceil_mode, module.count_include_pad, module.divisor_override,
                )  # fmt: skip
                d = self._each(lambda part, own: _aten.avg_pool2d_backward(part, own, *options), d, x)  # noqa: B023
            else:
                back = _ELEMENTWISE[type(module)]
                d = self._elementwise(module, lambda *own: back(module, *own), d, x, kept)  # noqa: B023

    def _linear_backward(
        self, name: str, d: Tensor, x: Tensor, gradients: Mapping[str, Tensor] | None, further: bool
    ) -> Tensor | None:
        weight, bias = self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias")
        back = torch.bmm(d, weight) if further else None  # before the weights change
        if x.dim() == 2:
            x = x.expand(len(self), *x.shape)
        if gradients is None:
            weight.baddbmm_(d.transpose(1, 2), x)
        else:
            torch.bmm(d.transpose(1, 2), x, out=gradients[f"{name}.weight"])
        if bias is not None:
            total = d.sum(-2)
            bias.add_(total) if gradients is None else gradients[f"{name}.bias"].copy_(total)
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
                corner(gradients[f"{name}.{parameter}"][run], own.shape).copy_(change)
        return back


def _convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, _as(layer.weight, x), _as(layer.bias, x), *_geometry(layer))


def _filled(x: Tensor) -> Tensor:
    """Rows of samples, [..., B, F], with rows of zeros up to a multiple of 16, and aligned."""
    lacking = -x.shape[-2] % _ALIGNED
    if lacking:
        return F.pad(x, (0, 0, 0, lacking))
    return x.clone() if x.data_ptr() % (4 * _ALIGNED) else x


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


def slots(runs: int, shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros of [runs, *shape], in which the part of each run begins at a multiple of 64 bytes."""
    size = math.prod(shape)
    return like.new_zeros(runs, size + -size % _ALIGNED)[:, :size].view(runs, *shape)


def _storage(whole: Tensor) -> Tensor:
    """What ``slots`` made, with the gaps between the parts, [runs, N]."""
    size = math.prod(whole.shape[1:])
    size += -size % _ALIGNED
    return whole.as_strided((len(whole), size), (size, 1))


def pile(tensors: Sequence[Tensor], shape: Sequence[int] | None = None) -> Tensor:
    """Stack tensors of one rank in ``slots``, each padded with zeros to ``shape``, or to the largest: [R, ...]."""
    shape = shape or [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    whole = slots(len(tensors), shape, tensors[0])
    for run, tensor in enumerate(tensors):
        corner(whole[run], tensor.shape).copy_(tensor)
    return whole


def corner(whole: Tensor, shape: Sequence[int]) -> Tensor:
    """The view of the first entries of ``whole`` along every axis that has the given shape."""
    return whole[tuple(slice(size) for size in shape)]


def release(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that own their storage, for a run that leaves its stack."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
