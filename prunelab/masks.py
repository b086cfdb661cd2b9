"""Masks: which weights of a model are kept. They stand apart from the model, which stays a plain ``nn.Module``.

Pruned weights are set to 0; nothing in the model is renamed or wrapped, and no module gets a hook. So it deep-copies,
goes through ``torch.func``, exports, and saves as an ordinary state_dict of the dense size.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import html
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from prunelab.errors import PrunelabError, PrunelabWarning, nearest
from prunelab.gates import Gate
from prunelab.tensor_file import TensorFile

_KINDS = (
    nn.Linear, _ConvNd, nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention,
)  # fmt: skip
_ROWS_SHOWN = 48  # of a table on the screen; one line says how many more there are


class MaskError(PrunelabError):
    """Masks that do not fit the model, or that would leave nothing of it."""


# Files of others (no format), and those of versions that wrote no digest, are read without one.
_FILE = TensorFile("prunelab masks 2", "masks", "Masks.save", MaskError, older=("", "prunelab masks"))


class Masks(Mapping[str, Tensor]):
    """Immutable mapping from parameter name (``"hidden_1.weight"``), or that of a ``Gate``, to its mask.

    A mask is bool, True = keep, and has the shape of its parameter. A parameter without a mask is kept whole.
    ``a & b`` keeps what both keep. The tensors are copies of what was given, and are not to be written into.

    Args:
        masks: Bool tensors, or numbers that are all 0 or 1.
        unmasked: Shapes of the parameters that have no mask, where the model is known: what ``model_sparsity`` counts.

    Raises:
        MaskError: a mask holds something else; the message names its parameter.
    """

    def __init__(self, masks: Mapping[str, Tensor], unmasked: Mapping[str, Sequence[int]] | None = None) -> None:
        if not isinstance(masks, Mapping):
            what = "masks should be parameter name -> mask, as of Masks.ones(model) or prune"
            raise MaskError(f"{what}, not {type(masks).__name__}")
        self._masks = {name: _boolean(name, mask) for name, mask in masks.items()}
        self.unmasked = None if unmasked is None else {n: tuple(s) for n, s in unmasked.items() if n not in masks}

    @classmethod
    def ones(cls, model: nn.Module, layers: Iterable[str] = ()) -> Masks:
        """Keep everything: masks of the weights of ``layers``, as ``prunable`` names them; biases get none."""
        names = prunable(model, layers)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        masked = {id(parameters[name]) for name in names}
        others = {n: () if is_lazy(p) else p.shape for n, p in model.named_parameters() if id(p) not in masked}
        return cls({name: torch.ones_like(parameters[name], dtype=torch.bool) for name in names}, others)

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
        known = [masks.unmasked for masks in (self, other) if masks.unmasked is not None]
        common = {n: s for n, s in known[0].items() if n in known[-1]} if known else None
        return Masks(both, common)

    def to(self, device: torch.device | str) -> Masks:
        """The same masks on another device."""
        return Masks({name: mask.to(device) for name, mask in self.items()}, self.unmasked)

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
    def model_sparsity(self) -> float | None:
        """Zeros / parameters of the whole model, those without a mask among them; None where the model is not known.

        Masks from ``prune`` and ``ones`` know their model, and so do those that are made from them with ``&``.
        """
        if self.unmasked is None:
            return None
        whole = self.total + sum(map(math.prod, self.unmasked.values()))
        return (self.total - self.kept) / whole if whole else 0.0

    @property
    def left_out(self) -> dict[str, tuple[int, ...]]:
        """Weights (parameters of two or more dimensions) of the model that have no mask, and their shapes."""
        return {name: shape for name, shape in (self.unmasked or {}).items() if len(shape) > 1}

    @property
    def weights(self) -> Masks:
        """The masks of weights alone, without those of biases, which come with structured pruning."""
        biases = {name: mask.shape for name, mask in self.items() if mask.ndim <= 1}
        known = None if self.unmasked is None else {**self.unmasked, **biases}
        return Masks({name: mask for name, mask in self.items() if mask.ndim > 1}, known)

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
        self.check(model)
        parameters = maskable(model)
        for name, mask in self.items():
            _Zeros(mask)(parameters[name])

    def hold(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Hold:
        """Keep pruned weights pruned in a training loop of your own.

        Now, and after each ``optimizer.step()``, the pruned weights and the optimiser's state at their places
        (momentum, Adam's moments: whatever has the parameter's shape) are set to zero, whatever they are, NaN and
        infinity among it, so that neither momentum nor weight decay brings them back. Gradients are left as they are,
        but for those of pruned weights that are NaN or infinite, as that of a norm at 0 is: they become 0 at the end of
        the backward pass, before clipping and ``GradScaler`` see them.

        ``copy.deepcopy((model, optimizer))`` is held as well. What else becomes of a copy is not: a copy of the model
        alone with a new optimiser, and what ``torch.load`` gives, where pickling the optimiser warns. There, and after
        ``model.load_state_dict(..., assign=True)``, which leaves the optimiser with parameters that the model no longer
        has (the next step warns, and prunes the new ones), build an optimiser and call ``hold`` again. A dense
        state_dict that is loaded meanwhile is pruned by the next step, or at once by ``apply_``.

        Args:
            model: The model; its modules get no hooks.
            optimizer: The optimiser of its parameters.

        Returns:
            A handle: ``handle.remove()`` ends it, as does leaving ``with masks.hold(model, optimizer):``.

        Raises:
            MaskError: the masks do not fit, or the optimiser does not train a masked parameter. Where optimisers share
                a model, each holds the masks of its own parameters: ``Masks({name: masks[name] for name in own})``.
        """
        if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
            given = f"hold({type(model).__name__}, {type(optimizer).__name__})"
            raise MaskError(f"{given}: the model comes first, then the optimiser")
        self.check(model)
        named = maskable(model)
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name in self:
            if named[name].requires_grad and id(named[name]) not in trained:
                what = "build it from the parameters of this very model; or, where another optimiser trains that one"
                raise MaskError(f"the optimiser does not hold {name}: {what}, hold with each the masks of its own")
        places = [_Held(n, model.get_submodule(layer_of(n)), named[n], _Zeros(mask)) for n, mask in self.items()]
        return Hold(places, optimizer)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, one byte per entry; at no moment is there half a file under that name.

        Raises:
            MaskError: the folder does not exist or cannot be written.
        """
        _FILE.save(path, self, unmasked=json.dumps(self.unmasked))

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read what ``save`` wrote, on the CPU.

        Raises:
            MaskError: the file is absent, is no safetensors file, is damaged, or holds something that is no mask.
        """
        tensors, facts = _FILE.load(path)
        try:
            return cls(tensors, _shapes(facts.get("unmasked", "null")))
        except MaskError as error:
            raise MaskError(f"{path}: {error}") from None

    def _table(self) -> tuple[str, list[list[str]]]:
        """Caption and rows of the table that is shown: the header first, the total last."""
        rows = [[_short(n), _shape(mask), *_share(self.counts[n], mask.numel())] for n, mask in self.items()]
        if (hidden := len(rows) - _ROWS_SHOWN) > 0:
            rows[_ROWS_SHOWN // 2 : -_ROWS_SHOWN // 2] = [[f"... {hidden} more", "", "", "", "", ""]]
        header = ["parameter", "shape", "kept", "total", "density", ""]
        caption = f"Masks of {len(self)} parameter{'s' * (len(self) != 1)}, sparsity {self.sparsity:.4f}"
        if self.model_sparsity is not None:
            whole = self.total + sum(map(math.prod, self.unmasked.values()))
            caption += f", {self.model_sparsity:.4f} of all {whole:,} parameters of the model"
        return caption, [header, *rows, ["total", "", *_share(self.kept, self.total)]]

    def _note(self) -> str:
        """What was left out, the largest first; empty where that is nothing, or not known."""
        sizes = sorted(((math.prod(s), n) for n, s in self.left_out.items()), key=lambda pair: (-pair[0], pair[1]))
        if not sizes:
            return ""
        named = ", ".join(f"{_short(name)} ({size:,})" for size, name in sizes[:4]) + ", ..." * (len(sizes) > 4)
        return f"left out, {sum(size for size, _ in sizes):,} weights: {named}"

    def __repr__(self) -> str:
        caption, rows = self._table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        pads = [str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust]
        lines = ["  ".join(pad(*cell) for pad, *cell in zip(pads, row, widths, strict=True)).rstrip() for row in rows]
        rule = "─" * max(map(len, lines))
        notes = [note] if (note := self._note()) else []
        return "\n".join([caption, rule, lines[0], rule, *lines[1:-1], rule, lines[-1], *notes])

    def _repr_html_(self) -> str:
        caption, (header, *rows, total) = self._table()

        def line(cells: Sequence[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        body = "".join(line(row, "td") for row in rows)
        note = f"<tr><td>{html.escape(self._note())}</td></tr>" if self._note() else ""
        foot = f"<tfoot>{line(total, 'th')}{note}</tfoot>"
        caption = f"<caption>{html.escape(caption)}</caption>"
        return f"<table>{caption}<thead>{line(header, 'th')}</thead><tbody>{body}</tbody>{foot}</table>"


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Zeros:
    """Sets the pruned entries of tensors to 0, in place, whatever they are; a product would leave NaN and infinity NaN.

    Bits are cleared, as fast as a product; to fill by a mask takes ten times as long.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._bits: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, tensor: Tensor) -> None:
        whole = _INTEGERS.get(tensor.element_size())
        if whole is None:
            tensor.masked_fill_(~self.mask.to(tensor.device), 0)
            return
        bits = self._bits.get((tensor.device, whole))
        if bits is None:
            bits = self._bits[tensor.device, whole] = self.mask.to(tensor.device, whole).neg_()  # all, of what is kept
        tensor.view(whole).bitwise_and_(bits)


@dataclass
class _Held:
    """A parameter that is held: its name, the module that has it (None: not known), itself, and what zeroes it."""

    name: str
    module: nn.Module | None
    tensor: Tensor
    zero: _Zeros

    @torch.no_grad()
    def clear_gradient(self, parameter: Tensor) -> None:
        """Hook on a gradient that has been added up: what is no number at a pruned weight becomes 0.

        All others are left: on CPUs Adam's square root of many zeros takes longer than holding masks takes altogether.
        """
        gradient = parameter.grad
        if gradient is None or gradient.layout != torch.strided or gradient.requires_grad:
            return
        if not gradient.is_cpu or not math.isfinite(gradient.sum()):  # other devices would have to wait for the answer
            gradient.masked_fill_(~(gradient.isfinite() | self.zero.mask.to(gradient.device)), 0)

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """The parameter, and the state that the optimiser has of it."""
        self.zero(self.tensor)
        for state in optimizer.state.get(self.tensor, {}).values():
            if isinstance(state, Tensor) and state.shape == self.tensor.shape:
                self.zero(state)

    def follow(self) -> bool:
        """Whether the module has another parameter now, which is held instead as far as its shape allows."""
        own = self.name.rpartition(".")[2]
        now = None if self.module is None else self.module._parameters.get(own, self.module._buffers.get(own))
        if now is None or now is self.tensor:
            return False
        if now.shape == self.tensor.shape:
            self.tensor = now
        else:
            self.module = None
        return True


class Hold:
    """Masks held in a model while an optimiser trains it; see ``Masks.hold``."""

    def __init__(self, places: list[_Held], optimizer: torch.optim.Optimizer) -> None:
        self._places, self._optimizer, self._silent = places, optimizer, False
        self._hooks = [optimizer.register_step_post_hook(self._after_step)]
        for place in places:
            if place.tensor.requires_grad:
                self._hooks.append(place.tensor.register_post_accumulate_grad_hook(place.clear_gradient))
        holds = vars(optimizer).setdefault(_HOLDS, [])
        if not holds:
            vars(optimizer)["__deepcopy__"] = functools.partial(_copied, optimizer)
            vars(optimizer)["__getstate__"] = functools.partial(_pickled, optimizer)
        holds.append(self)
        self._after_step()

    def remove(self) -> None:
        """End it: pruned weights are trained like all others from now on."""
        for hook in self._hooks:
            hook.remove()
        own = vars(self._optimizer)
        if self in own.get(_HOLDS, ()):
            own[_HOLDS].remove(self)
            for name in () if own[_HOLDS] else (_HOLDS, "__deepcopy__", "__getstate__"):
                del own[name]

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for place in self._places:
            if place.module is not None and place.follow():
                what = (
                    "is another parameter than the one that the optimiser trains, as after load_state_dict(assign=True)"
                )
                self._warn(f"{place.name} {what}: build the optimiser anew, and call masks.hold with it")
            place.clear(self._optimizer)

    def _copy(self, memo: dict[int, Any], optimizer: torch.optim.Optimizer) -> None:
        """Hold the copies of all parameters with a copy of the optimiser."""
        tensors = [copy.deepcopy(place.tensor, memo) for place in self._places]
        modules = [memo.get(id(place.module)) for place in self._places]
        rows = zip(self._places, modules, tensors, strict=True)
        Hold([_Held(place.name, module, tensor, place.zero) for place, module, tensor in rows], optimizer)

    def _warn(self, text: str) -> None:
        """Once for each hold."""
        if not self._silent:
            warnings.warn(text, PrunelabWarning, stacklevel=3)
        self._silent = True


_HOLDS = "_masks_held"  # attribute of an optimiser: its holds, which no copy and no pickle takes along by itself


def _copied(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """``__deepcopy__`` of an optimiser with which masks are held."""
    own = {name: vars(optimizer).pop(name) for name in (_HOLDS, "__deepcopy__", "__getstate__")}
    try:
        made = copy.deepcopy(optimizer, memo)
    finally:
        vars(optimizer).update(own)
    for hold in own[_HOLDS]:
        hold._copy(memo, made)
    return made


def _pickled(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``__getstate__`` of an optimiser with which masks are held."""
    text = "masks are held with this optimiser, which pickle leaves out: call masks.hold again after loading"
    vars(optimizer)[_HOLDS][0]._warn(text)
    return type(optimizer).__getstate__(optimizer)


def prunable(model: nn.Module, layers: Iterable[str] = ()) -> list[str]:
    """Names of the parameters that may be pruned: weights of two or more dimensions, in the order of the modules.

    Without ``layers`` these are the weights of Linear, of convolutions and transposed convolutions of any dimension, of
    Embedding, Bilinear, recurrent layers and cells (``weight_ih``, ``weight_hh``), of MultiheadAttention
    (``in_proj_weight``; its ``out_proj`` is a Linear), of their subclasses, and of the ``Conv1D`` of transformers.
    Biases are not among them: they are few, and go only together with their whole unit. A weight that two layers share
    is named once.

    Args:
        model: Any module.
        layers: Names of layers, as in ``model.named_modules()``, also of other classes, of which all parameters of two
            or more dimensions are taken; or names of parameters. ``()``: all layers of the classes above.

    Raises:
        MaskError: a layer that does not exist, has no such parameter, or whose weight is no plain floating-point
            parameter with values.
    """
    parameters = {name: tensor for name, tensor in maskable(model).items() if isinstance(tensor, nn.Parameter)}
    wanted, modules = named_layers(layers), dict(model.named_modules())
    known = {
        name: module for name, module in modules.items() if isinstance(module, _KINDS) or _is_turned_linear(module)
    }
    for name in wanted:
        if name not in modules and name not in parameters:
            raise MaskError(f"the model has no layer {name!r}: {nearest(name, known)}")
    if not wanted and not known:
        kind = type(model).__name__
        raise MaskError(f"{kind} has no Linear, convolution or other known layer of weights: name layers with layers=")
    names: dict[int, str] = {}
    for layer, module in modules.items():
        own = {
            f"{layer}.{name}" if layer else name: weight for name, weight in _weights(module, layer in known).items()
        }
        asked = {name: parameters[name] for name in wanted if name in parameters and layer_of(name) == layer}
        if layer in wanted and layer not in known and not own:
            kind = f"layer {layer!r} is a {type(module).__name__}, which has no weight of two or more dimensions itself"
            raise MaskError(f"{kind}: {nearest(layer, known)}")
        for name, weight in (own if layer in wanted or (not wanted and layer in known) else asked).items():
            _refuse(layer, name, weight)
            names.setdefault(id(weight), name)
    return list(names.values())


def _weights(layer: nn.Module, known: bool) -> dict[str, Tensor | None]:
    """The weights of a layer, those that are computed as None; of one whose class is not known all that it might be."""
    own = {n: p for n, p in layer._parameters.items() if p is not None and (is_lazy(p) or p.dim() > 1)}
    if not known:
        return dict(own)
    plain = {name for name, value in vars(layer).items() if isinstance(value, Tensor)}
    computed = {*getattr(layer, "parametrizations", ()), *(n for n in plain if any(o.startswith(f"{n}_") for o in own))}
    weights = {name: weight for name, weight in own.items() if "weight" in name}
    return {n: w for n, w in weights.items() if not any(n.startswith(f"{c}_") for c in computed)} | dict.fromkeys(
        name for name in sorted(computed) if "weight" in name
    )


def _refuse(layer: str, name: str, weight: Tensor | None) -> None:
    """Say in one line why a weight cannot be pruned."""
    others = "or prune the others by name, with layers="
    if weight is None:
        why = "computed, as by torch.nn.utils.prune or a parametrisation: make it a plain parameter first"
        raise MaskError(f"the weight of layer {layer!r} is {why}, {others}")
    if is_lazy(weight):
        raise MaskError(f"layer {layer!r} is lazy and has no shape yet: run one batch through the model, {others}")
    if weight.is_meta:
        raise MaskError(f"{name} is on the device meta and has no values: load the weights of the model first")
    if not (weight.is_floating_point() or weight.is_complex()):
        kind = str(weight.dtype).removeprefix("torch.")
        raise MaskError(f"{name} is {kind}, as quantised weights are: prune before you quantise, {others}")


def named_layers(layers: Iterable[str] | None) -> list[str]:
    """``layers`` as a list: one name, several, or none.

    Raises:
        MaskError: something else.
    """
    names = [layers] if isinstance(layers, str) else layers
    if not isinstance(names, Iterable) or isinstance(names, nn.Module):
        names = () if names is None else (names,)
    names = list(names)
    for name in names:
        if not isinstance(name, str):
            raise MaskError(f"layers: {type(name).__name__} is no name: give names as in model.named_modules()")
    return names


def unit_axis(layer: nn.Module) -> int | None:
    """The axis of a layer's weight along which its neurons or filters lie; None: it has none that go by themselves.

    0 of Linear and convolutions; 1 where the weight is [inputs, outputs, ...], as of transposed convolutions and of the
    ``Conv1D`` of transformers. Other layers, and transposed convolutions with groups, have channels only.
    """
    if isinstance(layer, _ConvTransposeNd):
        return 1 if layer.groups == 1 else None
    return 0 if isinstance(layer, nn.Linear | _ConvNd) else 1 if _is_turned_linear(layer) else None


def _is_turned_linear(layer: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers, a Linear whose weight is [inputs, outputs]."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(layer).__mro__)


def maskable(model: nn.Module) -> dict[str, Tensor]:
    """All that a mask can be for, by name: the parameters, and what the gates let through.

    Raises:
        MaskError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise MaskError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    gates = ((name, module) for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Gate))
    return found | {f"{name}.open" if name else "open": gate.open for name, gate in gates}


def layer_of(parameter: str) -> str:
    """``"hidden_1"`` for ``"hidden_1.weight"``; ``""`` for a parameter of the model itself."""
    return parameter.rpartition(".")[0]


def _boolean(name: str, mask: Tensor) -> Tensor:
    if not isinstance(name, str):
        raise MaskError(f"{name!r}: a mask should be under the name of its parameter, which is a text")
    if not isinstance(mask, Tensor):
        raise MaskError(f"{name}: a mask should be a tensor of True and False, not {type(mask).__name__}")
    if mask.layout != torch.strided or mask.is_meta or mask.is_quantized or mask.is_complex():
        raise MaskError(f"{name}: a mask should be a dense tensor of True and False, of values that are known")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise MaskError(f"{name}: a mask should hold only True and False, or only 1 and 0")
    return mask.detach().to(torch.bool, copy=True)


def _shapes(text: str) -> dict[str, list[int]] | None:
    """Name -> shape from a file; None where it has none."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        rows = found.values() if isinstance(found, dict) else ()
        if found is None or (rows and all(isinstance(r, list) and all(type(n) is int for n in r) for r in rows)):
            return found
    return None


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
