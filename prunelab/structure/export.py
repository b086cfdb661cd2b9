"""Models that leave: files without pickle, ONNX, sparse weights, and the masks of ``torch.nn.utils.prune``."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from prunelab import digest, folding
from prunelab.architecture import build, describe
from prunelab.errors import PrunelabError
from prunelab.gates import Gate
from prunelab.masks import Masks
from prunelab.paths import replacing

_FORMAT = "prunelab model 2"


class ExportError(PrunelabError):
    """A model or a file that cannot be brought into the form that was asked for."""


def save(path: str | Path, model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> Path:
    """Write a model, shrunk or not, as one safetensors file; at no moment is there half a file under that name.

    The file describes, as JSON, a chain of common layers, and the graph of any model that can be traced and is made of
    common layers and operations (``architecture``; torchvision's networks are). Any other model has to be given to
    ``load`` in its dense form, which is then cut to the sizes in the file.

    Args:
        path: of the file.
        model: what is written: parameters and buffers.
        masks: kept beside them; None: none.

    Raises:
        ExportError: the place cannot be written.
    """
    path = Path(path)
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    tied = {name: first[id(own)] for name, own in state.items() if first.setdefault(id(own), name) != name}
    modules = model.named_modules(remove_duplicate=False)
    groups = {name: layer.groups for name, layer in modules if isinstance(layer, nn.Conv2d)}
    tensors = {f"model/{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    tensors |= {f"mask/{name}": mask.cpu().contiguous() for name, mask in (masks or {}).items()}
    facts = {"architecture": describe(model), "tied": tied, "groups": groups}
    metadata = {"format": _FORMAT, **{name: json.dumps(fact) for name, fact in facts.items()}, **digest.IN_TENSORS}
    try:
        with digest.sealing(path) as part:
            save_file(tensors, part, metadata=metadata)
    except (OSError, safetensors.SafetensorError) as error:
        why = "the folder does not exist" if not path.parent.is_dir() else " ".join(str(error).split())
        raise ExportError(f"{path}: the model cannot be written there ({why}): choose another place") from None
    return path


def load(path: str | Path, into: nn.Module | None = None) -> tuple[nn.Module, Masks]:
    """Read what ``save`` wrote: the model, in evaluation mode, and its masks. Nothing is unpickled.

    Args:
        path: of the file.
        into: a model of the same structure, of any width, with its BatchNorms or without, for models that the file does
            not describe, or to get the class back: what the file describes as a graph is a ``torch.fx.GraphModule``. It
            is not changed.

    Raises:
        ExportError: no such file, not one of ours, or a model that does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path}: there is no such file; export.save writes one")
    try:
        data = path.read_bytes()
        sealed, metadata, tensors = digest.check(data), digest.metadata(data), safetensors.torch.load(data)
        if metadata.get("format") == _FORMAT and not sealed:
            raise ValueError("its digest is gone")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ExportError(f"{path}: not a safetensors file ({' '.join(str(error).split())}): save it again") from None
    if metadata.get("format") not in (_FORMAT, "prunelab model 1"):  # files of format 1 have no digest
        raise ExportError(f"{path}: no model of prunelab: its format is {metadata.get('format')!r}, not {_FORMAT!r}")
    try:
        described, tied, groups = (json.loads(metadata.get(n, "{}")) for n in ("architecture", "tied", "groups"))
    except ValueError as error:
        raise ExportError(f"{path}: its description of the model cannot be read ({error}): save it again") from None
    if into is None and described is None:
        raise ExportError(f"{path}: the file does not describe its model: give one, load(path, into=YOUR_MODEL)")
    try:
        model = copy.deepcopy(into) if into is not None else build(described)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise ExportError(f"{path}: its description of the model cannot be read ({why}): save it again") from None
    own = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
    _leave_out(model, own)
    _fill(model, own, tied, path)
    _size(model, groups)
    return model.eval(), Masks({n.removeprefix("mask/"): t for n, t in tensors.items() if n.startswith("mask/")})


def _leave_out(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """What the file knows nothing of: BatchNorms that were folded, and gates where it is older than gates.

    The layers that took up a BatchNorm get the biases of the file.
    """
    gates = [name for name, module in model.named_modules() if isinstance(module, Gate)]
    for name in [*folding.batchnorms(model), *gates]:
        if not any(other.startswith(f"{name}.") for other in tensors):
            model.set_submodule(name, nn.Identity())
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is None and f"{name}.bias" in tensors:
            layer.bias = nn.Parameter(tensors[f"{name}.bias"])


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str], path: Path) -> None:
    """Give every parameter and buffer the values of the file; those that several names share stay one."""
    old = model.state_dict(keep_vars=True)
    if odd := sorted(old.keys() ^ tensors.keys()):
        where = "the file" if odd[0] in old else "the model"
        raise ExportError(f"{path}: {where} has no {odd[0]!r}: it was saved from another model")
    old |= {name: old[first] for name, first in tied.items() if first in old}
    new: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if old[name].dim() != tensor.dim():
            raise ExportError(f"{path}: {name} has {tensor.dim()} axes, the model's has {old[name].dim()}")
        learned = isinstance(old[name], nn.Parameter)
        made = nn.Parameter(tensor, requires_grad=old[name].requires_grad) if learned else tensor
        if not torch.equal(new.setdefault(id(old[name]), made), tensor):
            raise ExportError(f"{path}: the model shares {name} with another layer, the file does not: untie it first")
        place, _, what = name.rpartition(".")
        setattr(model.get_submodule(place), what, new[id(old[name])])


def _size(model: nn.Module, groups: Mapping[str, int]) -> None:
    """Tell the layers their sizes, from their weights and, where the file knows them, the groups of convolutions."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, nn.Conv2d):
            depthwise = layer.groups == layer.in_channels == layer.out_channels and layer.weight.shape[1] == 1
            layer.groups = groups.get(name, len(layer.weight) if depthwise else layer.groups)
            layer.out_channels, layer.in_channels = len(layer.weight), layer.weight.shape[1] * layer.groups
        elif isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d) and layer.running_mean is not None:
            layer.num_features = len(layer.running_mean)


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
        ExportError: the extra ``export`` is not installed, torch cannot export the model or fixes its batch size, or
            the outputs differ.
    """
    onnxruntime = _onnxruntime()
    path = Path(path)
    plain = copy.deepcopy(model).eval()
    try:
        with torch.no_grad():
            expected = plain(example)
        if not isinstance(expected, Tensor):
            raise ExportError(
                f"{path}: the model gives a {type(expected).__name__}: wrap it in a module that gives one tensor of it"
            )
        with warnings.catch_warnings():  # of torch's own exporter
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
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    @property
    def source(self) -> nn.Module:
        """The network it was made from."""
        return self._source[0]

    def forward(self, x: Tensor) -> Tensor:
        """float32 [N, ...] -> [N, outputs]."""
        if not isinstance(x, Tensor):  # a tracer's stand-in would take the process down
            raise ExportError(f"{self.path}: takes tensors, not a {type(x).__name__}; trace its source instead")
        (found,) = self._session.run(None, {self._session.get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(found)


def quantise(path: str | Path, to: str | Path, samples: Tensor, batch: int = 32) -> None:
    """Write an ONNX file with weights and activations of 8 bits, by onnxruntime's static quantisation.

    Args:
        path: of the ONNX file.
        to: of the new file.
        samples: inputs from which the ranges of the activations are taken (min and max; onnxruntime's default).
        batch: how many of them go through at a time.

    Raises:
        ExportError: the extra ``export`` is not installed, or the file cannot be quantised.
    """
    _onnxruntime()
    import logging

    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(samples.split(batch))

        def get_next(self) -> dict[str, Any] | None:
            part = next(self.left, None)
            return None if part is None else {"input": part.numpy()}

    before = logging.root.level
    try:
        logging.root.setLevel(logging.ERROR)  # it recommends a preprocessing whose work to_onnx has done
        with replacing(Path(to)) as part:
            quantization.quantize_static(str(path), str(part), Reader(), per_channel=True)
    except Exception as error:  # noqa: BLE001 - likewise
        raise ExportError(f"{path}: onnxruntime cannot quantise it: {' '.join(str(error).split())[:200]}") from None
    finally:
        logging.root.setLevel(before)


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
    masks = {}
    for place, layer in model.named_modules():
        for name in [n.removesuffix("_orig") for n in list(layer._parameters) if n.endswith("_orig")]:
            masks[f"{place}.{name}" if place else name] = layer._buffers[f"{name}_mask"].bool()
            torch_prune.remove(layer, name)
    if not masks:
        raise ExportError("torch.nn.utils.prune has pruned nothing in this model: there is no parameter called *_orig")
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
