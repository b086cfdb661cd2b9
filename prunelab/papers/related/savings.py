"""What pruning buys: the forms that one pruned network can take, and what each of them costs and answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunelab.data import Dataset
from prunelab.structure.export import OnnxModel, quantise, to_onnx
from prunelab.structure.forward import looking
from prunelab.structure.report import report
from prunelab.structure.shrink import batchnorms, shrink


def forms(
    dense: nn.Module,
    unstructured: nn.Module,
    filters: nn.Module,
    dataset: Dataset,
    folder: Path | str,
    *,
    round_to: int = 8,
) -> dict[str, nn.Module]:
    """The forms of a network, by name.

    Args:
        dense: unpruned.
        unstructured: single weights pruned, which are 0.
        filters: whole filters or neurons pruned, which are 0.
        dataset: what they were trained on; the int8 form is calibrated with 256 samples of its training part.
        folder: for the ONNX files.
        round_to: of the rounded form.

    Returns:
        dense, unstructured, filters masked, filters shrunk, shrunk and rounded, shrunk with BatchNorm folded (where
        there is one that can be), shrunk in ONNX, shrunk in int8 (ONNX).

    Raises:
        ShrinkError: a layer of ``filters`` is empty.
        ExportError: the extra ``export`` is not installed, or ONNX gives other outputs.
    """
    some = dataset.scale(dataset.train.x[:256])
    small = shrink(filters, None, some[:2])
    folded = shrink(filters, None, some[:2], fold_batchnorm=True)
    folder = Path(folder)
    to_onnx(small, folder / "shrunk.onnx", some[:4])
    quantise(folder / "shrunk.onnx", folder / "int8.onnx", some)
    return {
        "dense": dense,
        "unstructured": unstructured,
        "filters, masked": filters,
        "filters, shrunk": small,
        f"shrunk, widths of {round_to}": shrink(filters, None, some[:2], round_to=round_to),
        **({"shrunk, folded": folded} if batchnorms(small) - batchnorms(folded) else {}),
        "shrunk, ONNX": OnnxModel(folder / "shrunk.onnx", small),
        "shrunk, ONNX, int8": OnnxModel(folder / "int8.onnx", small),
    }


def table(
    networks: Mapping[str, nn.Module], dataset: Dataset, *, batch: int = 64, repeats: int = 15, samples: int = 10_000
) -> Any:
    """Accuracy and cost of every form, timed in turns.

    Args:
        networks: name -> network, the first one dense.
        dataset: whose test part is answered.
        batch: samples in what is timed.
        repeats: times each is timed.
        samples: of the test part, at most.

    Returns:
        A DataFrame, one row per form: form, test_accuracy, correct and samples (counts), parameters, nonzero, macs,
        effective_macs, bytes (of the file; where zeros are left, stored sparse if that is smaller), latency,
        latency_low, latency_high (seconds), speedup (of the first).
    """
    (first, dense), *others = networks.items()
    x, y = dataset.test.x[:samples], dataset.test.y[:samples]
    measured = report(dense, dict(others), dataset.scale(x[:batch]), repeats=repeats).frame().reset_index(drop=True)
    right = [_correct(model, dataset, x, y) for model in networks.values()]
    rows = measured.assign(form=[first, *(name for name, _ in others)], correct=right, samples=len(y))
    rows["test_accuracy"] = rows["correct"] / rows["samples"]
    rows["bytes"] = rows[["bytes_dense", "bytes_sparse"]].min(axis=1)
    rows["speedup"] = rows["latency"].iloc[0] / rows["latency"]
    columns = [
        "form",
        "test_accuracy",
        "correct",
        "samples",
        "parameters",
        "nonzero",
        "macs",
        "effective_macs",
        "bytes",
    ]
    return rows[[*columns, "latency", "latency_low", "latency_high", "speedup"]]


@torch.no_grad()
def _correct(model: nn.Module, dataset: Dataset, x: Tensor, y: Tensor, piece: int = 500) -> int:
    with looking(model):
        starts = range(0, len(y), piece)
        return sum(int((model(dataset.scale(x[i : i + piece])).argmax(1) == y[i : i + piece]).sum()) for i in starts)
