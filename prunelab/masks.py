"""Masks: which weights of a model are kept. They stand apart from the model, which stays a plain ``nn.Module``.

Masks are multiplied into the weights; nothing in the model is renamed, wrapped or hooked. So it deep-copies, goes
through ``torch.func``, exports, and saves as an ordinary state_dict of the dense size.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunelab import digest
from prunelab.errors import PrunelabError, nearest
from prunelab.gates import Gate

_FORMAT = "prunelab masks 2"  # of files; those without a number have no digest
_ROWS_SHOWN = 48  # of a table on the screen; one line says how many more there are


class MaskError(PrunelabError):
    """Masks that do not fit the model, or that would leave nothing of it."""


class Masks(Mapping[str, Tensor]):
    """Immutable mapping from parameter name (``"hidden_1.weight"``), or that of a ``Gate``, to its mask.

    A mask is bool, True = keep, and has the shape of its parameter. A parameter without a mask is kept whole.
    ``a & b`` keeps what both keep. The tensors are copies of what was given, and are not to be written into.

    Args:
        masks: Bool tensors, or numbers that are all 0 or 1.

    Raises:
        MaskError: a mask holds something else; the message names its parameter.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = {name: _boolean(name, mask) for name, mask in masks.items()}

    @classmethod
    def ones(cls, model: nn.Module, layers: Iterable[str] = ()) -> Masks:
        """Keep everything: masks of the weights of ``layers``, as ``prunable`` names them; biases get none."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return cls({name: torch.ones_like(parameters[name], dtype=torch.bool) for name in prunable(model, layers)})

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(torch.equal(mask, other[name]) for name, mask in self.items())

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Masks) -> Masks:
        if not isinstance(other, Masks):
            return NotImplemented
        both = {**self, **other}
        for name in self.keys() & other.keys():
            mine, theirs = self[name], other[name]
            if mine.shape != theirs.shape:
                raise MaskError(f"{name}: masks of shapes {_shape(mine)} and {_shape(theirs)} do not go together")
            both[name] = mine & theirs.to(mine.device)
        return Masks(both)

    def to(self, device: torch.device | str) -> Masks:
        """The same masks on another device."""
        return Masks({name: mask.to(device) for name, mask in self.items()})

    @functools.cached_property
    def counts(self) -> Mapping[str, int]:
        """Entries kept, per parameter."""
        return {name: int(torch.count_nonzero(mask)) for name, mask in self.items()}

    @property
    def kept(self) -> int:
        """Entries kept, over all parameters."""
        return sum(self.counts.values())

    @property
    def total(self) -> int:
        """Entries, kept or not, over all parameters."""
        return sum(mask.numel() for mask in self.values())

    @property
    def density(self) -> float:
        """``kept / total``; 1 when there is nothing to prune."""
        return _density(self.kept, self.total)

    @property
    def sparsity(self) -> float:
        """``1 - density``: zeros / entries, of the parameters that have a mask."""
        return 1.0 - self.density

    @property
    def weights(self) -> Masks:
        """The masks of weights alone, without those of biases, which come with structured pruning."""
        return Masks({name: mask for name, mask in self.items() if mask.ndim > 1})

    def by_layer(self) -> list[dict[str, Any]]:
        """One row per parameter: ``parameter``, ``shape``, ``total``, ``kept``, ``density``."""
        rows = []
        for name, mask in self.items():
            kept, total = self.counts[name], mask.numel()
            share = {"total": total, "kept": kept, "density": _density(kept, total)}
            rows.append({"parameter": name, "shape": tuple(mask.shape), **share})
        return rows

    def check(self, model: nn.Module) -> None:
        """Refuse a model that the masks do not fit.

        Raises:
            MaskError: names the first parameter that is absent or of another shape.
        """
        parameters = maskable(model)
        for name, mask in self.items():
            if name not in parameters:
                raise MaskError(f"the model has no parameter {name!r} for this mask: {nearest(name, parameters)}")
            own, given = _shape(parameters[name]), _shape(mask)
            if own != given:
                raise MaskError(f"{name}: the parameter has shape {own}, its mask {given}; make masks for this model")

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set the pruned weights of ``model`` to zero, in place, whatever they were."""
        if not self:
            return
        parameters, factors = self._bind(model)
        torch._foreach_mul_(parameters, factors)
        for parameter, mask in zip(parameters, self.values(), strict=True):
            if not parameter.sum().isfinite():  # infinity times 0 is NaN; to fill in all of them takes far longer
                parameter.masked_fill_(~mask.to(parameter.device), 0)

    def hold(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Keep pruned weights pruned in a training loop of your own.

        Now, and after each ``optimizer.step()``, the pruned weights and the optimiser's state at their places
        (momentum, Adam's moments: whatever has the parameter's shape) are set to zero, so that neither momentum nor
        weight decay brings them back. Gradients are left as they are. A dense state_dict that is loaded meanwhile is
        pruned by the next step, or at once by ``apply_``.

        Args:
            model: The model; it gets no hooks.
            optimizer: The optimiser of its parameters.

        Returns:
            A handle: ``handle.remove()`` ends it, as does leaving ``with masks.hold(model, optimizer):``.

        Raises:
            MaskError: the masks do not fit, or the optimiser does not train a masked parameter. Where optimisers share
                a model, each holds the masks of its own parameters: ``Masks({name: masks[name] for name in own})``.
        """
        if isinstance(model, torch.optim.Optimizer) or isinstance(optimizer, nn.Module):
            given = f"hold({type(model).__name__}, {type(optimizer).__name__})"
            raise MaskError(f"{given}: the model comes first, then the optimiser")
        parameters, factors = self._bind(model)
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in zip(self, parameters, strict=True):
            if parameter.requires_grad and id(parameter) not in trained:
                what = "build it from the parameters of this very model; or, where another optimiser trains that one"
                raise MaskError(f"the optimiser does not hold {name}: {what}, hold with each the masks of its own")

        @torch.no_grad()
        def again(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            tensors, by = list(parameters), list(factors)
            for parameter, factor in zip(parameters, factors, strict=True):
                for state in optimizer.state.get(parameter, {}).values():
                    if isinstance(state, Tensor) and state.shape == parameter.shape:
                        tensors.append(state)
                        by.append(factor)
            torch._foreach_mul_(tensors, by)

        if self:
            self.apply_(model)
            again(optimizer)
        return optimizer.register_step_post_hook(again if self else lambda *_: None)

    def _bind(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """The masked parameters, and their masks as factors of the same device and dtype: bools multiply slower."""
        self.check(model)
        named = maskable(model)
        return [named[n] for n in self], [mask.to(named[n].device, named[n].dtype) for n, mask in self.items()]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, one byte per entry; at no moment is there half a file under that name.

        Raises:
            MaskError: the folder does not exist or cannot be written.
        """
        path = Path(path)
        tensors = {name: mask.cpu().contiguous() for name, mask in self.items()}
        try:
            with digest.sealing(path) as part:
                safetensors.torch.save_file(tensors, part, metadata={"format": _FORMAT, **digest.IN_TENSORS})
        except (OSError, SafetensorError) as error:
            why = "the folder does not exist" if not path.parent.is_dir() else _line(error)
            raise MaskError(f"{path}: masks cannot be written there ({why}): choose another place") from None

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read what ``save`` wrote, on the CPU.

        Raises:
            MaskError: the file is absent, is no safetensors file, or holds something that is no mask.
        """
        if not Path(path).is_file():
            raise MaskError(f"{path}: there is no such file; Masks.save writes one")
        try:
            data = Path(path).read_bytes()
            if not digest.check(data) and digest.metadata(data).get("format") == _FORMAT:  # older files have none
                raise ValueError("its digest is gone")
            masks = safetensors.torch.load(data)
        except (OSError, ValueError, SafetensorError) as error:
            raise MaskError(f"{path}: not a file of masks ({_line(error)}): write it again with Masks.save") from None
        try:
            return cls(masks)
        except MaskError as error:
            raise MaskError(f"{path}: {error}") from None

    def _table(self) -> tuple[str, list[list[str]]]:
        """Caption and rows of the table that is shown: the header first, the total last."""
        rows = [[_short(n), _shape(mask), *_share(self.counts[n], mask.numel())] for n, mask in self.items()]
        if (hidden := len(rows) - _ROWS_SHOWN) > 0:
            rows[_ROWS_SHOWN // 2 : -_ROWS_SHOWN // 2] = [[f"... {hidden} more", "", "", "", "", ""]]
        header = ["parameter", "shape", "kept", "total", "density", ""]
        caption = f"Masks of {len(self)} parameter{'s' * (len(self) != 1)}, sparsity {self.sparsity:.4f}"
        return caption, [header, *rows, ["total", "", *_share(self.kept, self.total)]]

    def __repr__(self) -> str:
        caption, rows = self._table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        pads = [str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust]
        lines = ["  ".join(pad(*cell) for pad, *cell in zip(pads, row, widths, strict=True)).rstrip() for row in rows]
        rule = "─" * max(map(len, lines))
        return "\n".join([caption, rule, lines[0], rule, *lines[1:-1], rule, lines[-1]])

    def _repr_html_(self) -> str:
        caption, (header, *rows, total) = self._table()

        def line(cells: Sequence[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        body = "".join(line(row, "td") for row in rows)
        foot = f"<tfoot>{line(total, 'th')}</tfoot>"
        caption = f"<caption>{html.escape(caption)}</caption>"
        return f"<table>{caption}<thead>{line(header, 'th')}</thead><tbody>{body}</tbody>{foot}</table>"


def prunable(model: nn.Module, layers: Iterable[str] = ()) -> list[str]:
    """Names of the parameters that may be pruned: the weights of Linear and Conv2d layers, in the order of the modules.

    Biases are not among them: they are few, and go only together with their whole unit. A weight that two layers
    share is named once.

    Args:
        model: Any module.
        layers: Names of layers, as in ``model.named_modules()``; ``()``: all of them.

    Raises:
        MaskError: a layer that does not exist, is of another kind, or whose weight is not a plain parameter.
    """
    modules = dict(model.named_modules())
    fit = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)}
    wanted = [layers] if isinstance(layers, str) else list(layers)
    for name in wanted:
        if name not in modules:
            raise MaskError(f"the model has no layer {name!r}: {nearest(name, fit)}")
        if name not in fit:
            kind = type(modules[name]).__name__
            raise MaskError(f"layer {name!r} is a {kind}; only Linear and Conv2d can be pruned: {nearest(name, fit)}")
    if not fit:
        raise MaskError(f"{type(model).__name__} has no Linear or Conv2d layer, so there is nothing to prune")
    names: dict[int, str] = {}
    for name, module in fit.items():
        if wanted and name not in wanted:
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            why = "computed, as by torch.nn.utils.prune or a parametrisation: make it a plain parameter first"
            raise MaskError(f"the weight of layer {name!r} is {why}, or prune the others by name, with layers=")
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise MaskError(
                f"layer {name!r} is lazy and has no shape yet: run one batch through the model first, or prune the "
                "others by name, with layers="
            )
        names.setdefault(id(weight), f"{name}.weight" if name else "weight")
    return list(names.values())


def maskable(model: nn.Module) -> dict[str, Tensor]:
    """All that a mask can be for, by name: the parameters, and what the gates let through."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    gates = ((name, module) for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Gate))
    return found | {f"{name}.open" if name else "open": gate.open for name, gate in gates}


def layer_of(parameter: str) -> str:
    """``"hidden_1"`` for ``"hidden_1.weight"``; ``""`` for a parameter of the model itself."""
    return parameter.rpartition(".")[0]


def _boolean(name: str, mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise MaskError(f"{name}: a mask should be a tensor of True and False, not {type(mask).__name__}")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise MaskError(f"{name}: a mask should hold only True and False, or only 1 and 0")
    return mask.detach().to(torch.bool, copy=True)


def _density(kept: int, total: int) -> float:
    return kept / total if total else 1.0


def _share(kept: int, total: int) -> list[str]:
    """Cells: kept, total, density, and the density as a bar of up to ten blocks, each of eight steps."""
    steps = max(round(_density(kept, total) * 80), int(kept > 0))
    return [
        f"{kept:,}",
        f"{total:,}",
        f"{_density(kept, total):.4f}",
        "█" * (steps // 8) + " ▏▎▍▌▋▊▉"[steps % 8].strip(),
    ]


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:28]}...{name[-28:]}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
