"""Several models of one architecture as one: parameters stacked along a run axis, so that one kernel serves all runs.

Axes: R runs, B samples of a batch, C channels or classes. The stacked tensors are the only storage; the parameters of
    the plain models become
views into them. Whoever holds a plain model therefore always sees its current weights, and nothing is copied back.
Runs whose layers have different widths (some lost units) are padded with zeros to the widest; a padded unit has no
input, no bias and no output, hence no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ELEMENTWISE = (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.GELU, nn.Identity)
_POOLING = (nn.MaxPool2d, nn.AvgPool2d)
_STACKABLE = (nn.Linear, nn.Conv2d, nn.Flatten, *_ELEMENTWISE, *_POOLING)


def stackable(model: nn.Module) -> bool:
    """Whether models like this can share a stack: plain chains of layers this file knows; others train one by one."""
    return type(model) is nn.Sequential and all(type(module) in _STACKABLE for module in model)


def same_architecture(a: nn.Module, b: nn.Module) -> bool:
    """Whether two chains differ in nothing but the widths of their layers."""
    plain = [[(name, type(module)) for name, module in model.named_children()] for model in (a, b)]
    return plain[0] == plain[1]


class Stack:
    """R models, seen as one function from batches to logits.

    Args:
        models: plain modules on one device; their parameters become views of the stack. One model is used as it is,
            whatever it is made of.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = list(models)
        self.parameters: dict[str, Tensor] = {}
        names = [name for name, _ in models[0].named_parameters()]
        if len(models) == 1:
            self.parameters = dict(models[0].named_parameters())
            return
        for name in names:
            own = [model.get_parameter(name) for model in models]
            whole = pile([p.detach() for p in own])
            for run, parameter in enumerate(own):
                parameter.data = corner(whole[run], parameter.shape)
            self.parameters[name] = whole.requires_grad_()

    def __len__(self) -> int:
        return len(self.models)

    def runs(self, whole: Tensor) -> Iterator[Tensor]:
        """The parts of a stacked tensor that belong to each run, padding included; for one run the tensor itself."""
        return iter([whole] if len(self) == 1 else whole.unbind(0))

    def __call__(self, x: Tensor, shared: bool = False) -> Tensor:
        """Logits of every run.

        Args:
            x: float32 [R, B, ...], each run's own batch; or [B, ...] with ``shared``, one batch for all.
            shared: whether ``x`` lacks the run axis.

        Returns:
            float32 [R, B, C].
        """
        if len(self) == 1:
            return self.models[0](x if shared else x[0])[None]
        return self._chain(x, shared)

    def _chain(self, x: Tensor, shared: bool) -> Tensor:
        runs, folded = (
            len(self),
            False,
        )  # folded: [B, R*C, H, W], the form in which grouped convolutions take all runs at once
        for name, module in self.models[0].named_children():
            if isinstance(module, nn.Linear):
                weight, bias = self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias")
                if shared:  # one wide product instead of R narrow ones
                    x = F.linear(x, weight.flatten(0, 1)).unflatten(1, (runs, -1)).transpose(0, 1)
                    x = x if bias is None else x + bias[:, None]
                elif bias is None:
                    x = torch.bmm(x, weight.transpose(1, 2))
                else:
                    x = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
                shared = False
            elif isinstance(module, nn.Conv2d):
                weight, bias = self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias")
                if not shared and not folded:
                    x = x.transpose(0, 1).flatten(1, 2)
                groups = module.groups * (1 if shared else runs)
                x = F.conv2d(
                    x,
                    weight.flatten(0, 1),
                    None if bias is None else bias.flatten(),
                    module.stride,
                    module.padding,
                    module.dilation,
                    groups,
                )
                shared, folded = False, True
            elif isinstance(module, nn.Flatten):
                if folded:
                    x, folded = x.unflatten(1, (runs, -1)).flatten(2).transpose(0, 1), False
                else:
                    x = x.flatten(1 if shared else 2)
            elif isinstance(module, _POOLING) and not folded and not shared:
                x = module(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            else:
                x = module(x)
        return x.expand(runs, *x.shape) if shared else x


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
