"""Models that leave: files without pickle, ONNX, sparse weights, and the masks of ``torch.nn.utils.prune``."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune as torch_prune

from prunelab.errors import PrunelabError, first_line
from prunelab.gates import Gate
from prunelab.masks import Masks
from prunelab.paths import replacing
from prunelab.tensor_file import TensorFile

_MASK = "mask/"  # before the names of masks, in a file of a model
_ROWS = (tuple, list, torch.Size)


class ExportError(PrunelabError):
    """A model or a file that cannot be brought into the form that was asked for."""


_FILE = TensorFile("prunelab model 2", "a model of this version", "export.save", ExportError)


def save(path: str | Path, model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> Path:
    """Write a model, shrunk or not, as one safetensors file; at no moment is there half a file under that name.

    The file holds the state_dict, under its own names, and beside it which names share a tensor, the masks, the whole
    numbers of each module (``in_features``, ``groups``, ``num_heads``, ...), and a digest of everything. No class, no
    call and no name of a function is in it: ``load`` puts it into a model of yours.

    Args:
        path: of the file.
        model: what is written: parameters and buffers.
        masks: kept beside them; None: none.

    Raises:
        ExportError: the place cannot be written, the state_dict holds what is no tensor, or the model is the trace of
            another, whose sizes are in its code.
    """
    _refuse_no_module(model)
    if isinstance(model, torch.fx.GraphModule):
        what = "the model is a torch.fx.GraphModule, which no class of yours can take"
        raise ExportError(f"{what}: save the network it was made from, with its masks, or write ONNX with to_onnx")
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    tied = {name: first[id(own)] for name, own in state.items() if first.setdefault(id(own), name) != name}
    for name, own in state.items():
        if not isinstance(own, Tensor) or own.is_quantized or is_lazy(own) or own.layout != torch.strided:
            kind = type(own).__name__ if not isinstance(own, Tensor) or is_lazy(own) else "quantised or sparse tensor"
            raise ExportError(f"{name} is a {kind}, which these files cannot hold: save the plain model instead")
    tensors = {**state, **{f"{_MASK}{name}": mask for name, mask in Masks(masks or {}).items()}}
    sizes = {name: _sizes(module) for name, module in model.named_modules(remove_duplicate=False)}
    return _FILE.save(path, tensors, sizes=json.dumps(sizes), tied=json.dumps(tied))


def load(path: str | Path, model: nn.Module) -> tuple[nn.Module, Masks]:
    """Read what ``save`` wrote: a model, in evaluation mode, and its masks. Nothing in the file is run or unpickled.

    Args:
        path: of the file.
        model: of the class that was saved, of any width, with its BatchNorms or without: usually your dense network, as
            it is before training. It is not changed.

    Raises:
        ExportError: no such file, not one of ours, damaged, or of another model.
    """
    _refuse_no_module(model)
    tensors, facts = _FILE.load(path)
    try:
        sizes, tied = (json.loads(facts.get(name, "{}")) for name in ("sizes", "tied"))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: its sizes cannot be read ({first_line(error)}): save it again") from None
    if not all(isinstance(part, dict) for part in (sizes, tied)):
        raise ExportError(f"{path}: its sizes cannot be read: save it again")
    masks = {name.removeprefix(_MASK): tensors.pop(name) for name in list(tensors) if name.startswith(_MASK)}
    made = copy.deepcopy(model)
    _leave_out(made, tensors)
    _fill(made, tensors, tied, path)
    for name, module in made.named_modules():
        _resize(module, sizes.get(name))
    return made.eval(), Masks(masks)


def _refuse_no_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ExportError(f"model is a {type(model).__name__}: give a torch.nn.Module")


def _sizes(module: nn.Module) -> dict[str, int | list[int]]:
    """The whole numbers of a module, and rows of them, by attribute: what its forward may take a width from."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    rows = {name: list(value) for name, value in own.items() if type(value) in _ROWS}
    return {n: v for n, v in own.items() if type(v) is int} | {n: v for n, v in rows.items() if _are_whole(v)}


def _resize(module: nn.Module, sizes: Any) -> None:
    """Give the whole numbers that a module has the values of the file; what else a file names is passed over."""
    for name, value in _sizes(module).items():
        new = sizes.get(name) if isinstance(sizes, dict) else None
        if type(new) is int and type(value) is int:
            setattr(module, name, new)
        elif isinstance(new, list) and isinstance(value, list) and _are_whole(new):
            setattr(module, name, type(vars(module)[name])(new))


def _are_whole(values: list[Any]) -> bool:
    return bool(values) and all(type(value) is int for value in values)


def _leave_out(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Take away the BatchNorms and gates that the file has not: they were folded, or let everything through.

    The layers that took up a BatchNorm get the biases of the file.
    """
    for name, module in list(model.named_modules()):
        absent = not any(other.startswith(f"{name}.") for other in tensors)
        if isinstance(module, _NormBase | Gate) and name and module.state_dict() and absent:
            model.set_submodule(name, nn.Identity())
        elif getattr(module, "bias", 0) is None and "bias" in module._parameters and _join(name, "bias") in tensors:
            module.bias = nn.Parameter(torch.empty_like(tensors[_join(name, "bias")]))


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, Any], path: str | Path) -> None:
    """Give every parameter and buffer the values of the file; those that several names share stay one."""
    old = model.state_dict(keep_vars=True)
    if odd := sorted(old.keys() ^ tensors.keys()):
        where = "the file" if odd[0] in old else "the model"
        raise ExportError(f"{path}: {where} has no {odd[0]!r}: it was saved from another model")
    same = {name: old[first] for name, first in tied.items() if name in old and isinstance(first, str) and first in old}
    new: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        own = same.get(name, old[name])
        if is_lazy(own) or own.dim() != tensor.dim() or own.is_floating_point() != tensor.is_floating_point():
            mine = "no shape yet" if is_lazy(own) else f"{own.dim()} axes of {_dtype(own)}"
            raise ExportError(f"{path}: {name} has {tensor.dim()} axes of {_dtype(tensor)}, the model's has {mine}")
        made = nn.Parameter(tensor, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else tensor
        shared = new.setdefault(id(own), made)
        if shared.dtype != tensor.dtype or not torch.equal(shared.nan_to_num(), tensor.nan_to_num()):
            raise ExportError(f"{path}: the model shares {name} with another layer, the file does not: untie it first")
        place, _, what = name.rpartition(".")
        setattr(model.get_submodule(place), what, shared)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def to_onnx(model: nn.Module, path: str | Path, example: Tensor, *, tolerance: float = 1e-4) -> float:
    """Write a model as ONNX, batch size free, and check it against onnxruntime.

    Args:
        model: in any mode; it is exported in evaluation mode.
        path: of the file.
        example: a batch of inputs, on the CPU.
        tolerance: of the outputs, relative to their largest.

    Returns:
        The largest difference of the outputs, relative to their largest.

    Raises:
        ExportError: the extra ``export`` is not installed, the model takes batches of one size only, torch cannot
            export it or fixes its batch size, or the outputs differ.
    """
    onnxruntime = _onnxruntime()
    _refuse_no_module(model)
    if not isinstance(example, Tensor) or example.dim() < 2 or not len(example):
        what = f"shape {tuple(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
        raise ExportError(f"example is of {what}: should be a batch of inputs, [N, ...]")
    path = Path(path)
    plain = copy.deepcopy(model).eval()
    try:
        with torch.no_grad():
            expected = plain(example)
        if not isinstance(expected, Tensor):
            raise ExportError(
                f"{path}: the model gives a {type(expected).__name__}: wrap it in a module that gives one tensor of it"
            )
        _refuse_fixed_batch(plain, example, expected, path)
        with warnings.catch_warnings(), _quiet_root():  # of torch's own exporter
            warnings.simplefilter("ignore")
            names, free = {"input_names": ["input"], "output_names": ["output"]}, torch.export.Dim("batch", min=1)
            program = torch.onnx.export(
                plain, (example,), dynamo=True, verbose=False, dynamic_shapes=({0: free},), **names
            )
        with replacing(path) as part:
            program.save(part)
            session = onnxruntime.InferenceSession(str(part), providers=["CPUExecutionProvider"])
            if isinstance(batch := session.get_inputs()[0].shape[0], int):
                raise ExportError(
                    f"{path}: torch {torch.__version__} fixes the batch size at {batch}: nothing was written; "
                    "a newer torch leaves it free"
                )
            (found,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
            error = float((torch.from_numpy(found) - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
            if not error <= tolerance:
                raise ExportError(
                    f"{path}: onnxruntime gives other outputs (by {error:.1e} of the largest): nothing was written"
                )
        return error
    except ExportError:
        raise
    except Exception as error:  # noqa: BLE001 - torch's exporter and onnxruntime have errors of many kinds
        raise ExportError(f"{path}: torch cannot export the model: {' '.join(str(error).split())[:200]}") from None


@torch.no_grad()
def _refuse_fixed_batch(model: nn.Module, example: Tensor, expected: Tensor, path: Path) -> None:
    """Refuse a model that has its batch size in its forward, as ``view(32, -1)`` has."""
    try:
        wrong = (
            len(model(torch.cat([example, example]))) != 2 * len(example) if len(expected) == len(example) else False
        )
    except (RuntimeError, ValueError):
        wrong = True
    if wrong:
        what = f"the forward of the model takes batches of {len(example)} alone, as view({len(example)}, ...) does"
        raise ExportError(f"{path}: {what}: write it with x.shape[0] or -1; nothing was written")


@contextlib.contextmanager
def _quiet_root() -> Iterator[None]:
    """Leave the root logger as it was: onnxruntime logs there, which adds a handler where there is none."""

    def others(record: logging.LogRecord) -> bool:
        return "onnx" not in record.pathname or record.levelno >= logging.ERROR

    root, nothing = logging.getLogger(), logging.NullHandler()
    root.addHandler(nothing)
    root.addFilter(others)
    try:
        yield
    finally:
        root.removeFilter(others)
        root.removeHandler(nothing)


class OnnxModel(nn.Module):
    """An ONNX file as a module that onnxruntime runs on the CPU; for inference.

    Args:
        path: of the file, with one input and one output.
        source: the network it was made from, for counts of what it computes.
    """

    def __init__(self, path: str | Path, source: nn.Module) -> None:
        super().__init__()
        onnxruntime = _onnxruntime()
        self.path, self._source = Path(path), (source,)  # in a tuple, so that it is no part of this module
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with _one_line(self.path, "cannot read it"):
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    @property
    def source(self) -> nn.Module:
        """The network it was made from."""
        return self._source[0]

    def forward(self, x: Tensor) -> Tensor:
        """float32 [N, ...] -> [N, outputs]."""
        if not isinstance(x, Tensor):  # a tracer's stand-in would take the process down
            raise ExportError(f"{self.path}: takes tensors, not a {type(x).__name__}; trace its source instead")
        with _one_line(self.path, "cannot run it"):
            (found,) = self._session.run(None, {self._session.get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(found)


@contextlib.contextmanager
def _one_line(path: Path, what: str) -> Iterator[None]:
    """Errors of onnxruntime, which are of many kinds, as one line."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        raise ExportError(f"{path}: onnxruntime {what}: {' '.join(str(error).split())[:200]}") from None


def quantise(path: str | Path, to: str | Path, samples: Tensor, batch: int = 32) -> None:
    """Write an ONNX file with weights of 7 bits and activations of 8, by onnxruntime's static quantisation.

    Weights are int8, in [-64, 64] with a scale for each output (``reduce_range``). Processors with AVX2 or AVX-512 but
    without VNNI add a product of an activation, in [0, 255] inside, and a weight to the next one in 16 bits, which
    saturate. With 8 bits a pair can be 2 * 255 * 128 = 65,280, where 32,767 fit: outputs were off by 17 % of the
    largest on AVX2, by 1 % with VNNI. With 7 bits it is 32,640 at most, so the outputs are the same on either.

    Args:
        path: of the ONNX file.
        to: of the new file.
        samples: inputs from which the ranges of the activations are taken (min and max; onnxruntime's default).
        batch: how many of them go through at a time.

    Raises:
        ExportError: the extra ``export`` is not installed, or the file cannot be quantised.
    """
    _onnxruntime()
    if not isinstance(samples, Tensor) or not len(samples):
        what = "empty" if isinstance(samples, Tensor) else f"a {type(samples).__name__}"
        raise ExportError(f"samples is {what}: should be inputs, [N, ...], from which ranges are taken")
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(samples.split(batch))

        def get_next(self) -> dict[str, Any] | None:
            part = next(self.left, None)
            return None if part is None else {"input": part.numpy()}

    eight = quantization.QuantType.QInt8
    types = {"weight_type": eight, "activation_type": eight, "per_channel": True, "reduce_range": True}
    # It recommends a preprocessing whose work to_onnx has done.
    with _one_line(Path(path), "cannot quantise it"), _quiet_root(), replacing(Path(to)) as part:
        quantization.quantize_static(str(path), str(part), Reader(), **types)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise ExportError(f"ONNX needs {error.name}: install it with pip install 'prunelab[export]'") from None
    return onnxruntime


def from_torch_prune(model: nn.Module) -> Masks:
    """The masks of ``torch.nn.utils.prune``; the model becomes plain again, its pruned weights 0.

    Raises:
        ExportError: nothing in the model is pruned that way.
    """
    _refuse_no_module(model)
    masks = {}
    for place, layer in model.named_modules():
        own = [name.removesuffix("_orig") for name in layer._parameters if name.endswith("_orig")]
        for name in [name for name in own if f"{name}_mask" in layer._buffers]:  # spectral_norm has an _orig, too
            masks[f"{place}.{name}" if place else name] = layer._buffers[f"{name}_mask"].bool()
            torch_prune.remove(layer, name)
    if not masks:
        raise ExportError("torch.nn.utils.prune has pruned nothing in this model: there is no buffer called *_mask")
    return Masks(masks)


def to_torch_prune(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Hand masks over to ``torch.nn.utils.prune``, in place, so that its functions go on from there."""
    Masks(masks).check(model)
    for name, mask in masks.items():
        place, _, what = name.rpartition(".")
        if isinstance(model.get_submodule(place), Gate):  # which torch's functions do not know
            Masks({name: mask}).apply_(model)
            continue
        torch_prune.custom_from_mask(model.get_submodule(place), what, mask)


class SparseLinear(nn.Module):
    """A Linear layer whose weight is stored, and multiplied, as CSR; for inference.

    Args:
        layer: the dense one; what is 0 in it is left out.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():  # torch calls its sparse tensors a beta
            warnings.simplefilter("ignore")
            self.weight = layer.weight.detach().to_sparse_csr()
        self.bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """float32 [N, inputs] -> [N, outputs]."""
        y = (self.weight @ x.t()).t()
        return y if self.bias is None else y + self.bias


def sparse(model: nn.Module, least: float | None = None, batch: int = 1) -> nn.Module:
    """A copy whose Linear layers multiply in CSR where that is faster on this machine.

    Args:
        model: its zeros are what CSR leaves out.
        least: the sparsity from which a layer does; None: it is measured for the size of each layer (``break_even``),
            which takes a second or so for each.
        batch: with which it is measured.
    """
    _refuse_no_module(model)
    made = copy.deepcopy(model)
    found: dict[tuple[int, int], float] = {}
    for place, layer in list(made.named_modules()):
        zeros = float((layer.weight == 0).double().mean()) if isinstance(layer, nn.Linear) else 0.0
        if zeros == 0.0 or (least is not None and zeros < least):
            continue
        if least is None:
            size = tuple(layer.weight.shape)
            if size not in found:
                found[size] = break_even(csr_speed(*size, batch))
            if zeros < found[size]:
                continue
        if not place:
            return SparseLinear(layer)
        parent, _, name = place.rpartition(".")
        setattr(made.get_submodule(parent), name, SparseLinear(layer))
    return made


def break_even(speeds: Any) -> float:
    """The sparsity from which CSR is no slower than dense, by a line between measurements; infinite if it never is.

    Args:
        speeds: of ``csr_speed``.
    """
    rows = speeds.sort_values("sparsity")[["sparsity", "speedup"]].to_numpy().tolist()
    slower = [i for i, (_, speedup) in enumerate(rows) if speedup < 1]
    if not slower:
        return rows[0][0]
    if slower[-1] == len(rows) - 1:
        return math.inf
    (low, below), (high, above) = rows[slower[-1]], rows[slower[-1] + 1]
    return low + (high - low) * (1 - below) / (above - below)


def csr_speed(
    outputs: int,
    inputs: int,
    batch: int,
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98),
    repeats: int = 15,
) -> Any:
    """How much faster CSR multiplies than the dense layer, measured on this machine, in turns.

    Returns:
        A DataFrame: sparsity, dense and csr (median seconds), speedup.
    """
    import pandas as pd

    from prunelab.structure.report import latencies

    draw = torch.Generator().manual_seed(0)
    rows = []
    for sparsity in sparsities:
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight *= torch.rand(outputs, inputs, generator=draw) >= sparsity
        times = latencies({"dense": layer, "csr": SparseLinear(layer)}, torch.randn(batch, inputs), repeats)
        dense, csr = (sorted(times[name])[repeats // 2] for name in ("dense", "csr"))
        rows.append({"sparsity": sparsity, "dense": dense, "csr": csr, "speedup": dense / csr})
    return pd.DataFrame(rows)
