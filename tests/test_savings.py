"""The forms of one pruned network: what each answers and costs, counted against what is known of it."""

import logging

import numpy as np
import pytest
import torch

from prunelab import data, models
from prunelab.papers.related import savings
from prunelab.pruners import prune
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.structure.export import ExportError, OnnxModel, quantise, to_onnx
from prunelab.structure.graph import GraphError, trace
from prunelab.training.experiment import run_all
from prunelab.training.load import trained


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    dataset = data.load(Data("digits"))
    dense = models.build(Model("resnet20", (8, 8, 16)), dataset.shape, len(dataset.classes), 0)
    both = [models.build(Model("resnet20", (8, 8, 16)), dataset.shape, len(dataset.classes), 0) for _ in range(2)]
    for model, (method, amount) in zip(both, (("magnitude", 0.9), ("l1_filter", 0.5)), strict=True):
        prune(model, method, amount, scope="layer").apply_(model)
    return dataset, savings.forms(dense, *both, dataset, tmp_path_factory.mktemp("onnx"))


def test_a_form_has_the_counts_of_what_it_is(made):
    dataset, forms = made
    rows = savings.table(forms, dataset, repeats=3, samples=100).set_index("form")
    dense, small = rows.loc["dense"], rows.loc["filters, shrunk"]
    assert (rows["samples"] == 100).all()
    assert (rows["test_accuracy"] == rows["correct"] / 100).all()
    assert rows.loc["unstructured", "parameters"] == dense["parameters"] > small["parameters"]
    assert rows.loc["unstructured", "bytes"] < dense["bytes"]
    assert rows.loc["filters, masked", "macs"] == dense["macs"] > small["macs"]
    assert rows.loc["filters, masked", "correct"] == small["correct"] == rows.loc["shrunk, ONNX", "correct"]
    assert rows.loc["shrunk, folded", "correct"] == small["correct"]
    assert rows.loc["shrunk, folded", "parameters"] < small["parameters"]
    assert rows.loc["shrunk, ONNX, int8", "macs"] == small["macs"]
    assert rows.loc["shrunk, ONNX, int8", "bytes"] < rows.loc["shrunk, ONNX", "bytes"]
    assert dense["speedup"] == 1
    assert (rows["latency_low"] <= rows["latency_high"]).all()


def test_the_network_of_a_run_answers_as_the_run_did(tmp_path):
    run = Run(Data("digits"), Model("mlp", (16,)), Train(epochs=2), Prune("magnitude", amount=0.5, rounds=1))
    results = run_all([run], progress=False, jobs=1)
    dataset = data.load(run.data)
    model = trained(results.store, run, dataset)
    rows = savings.table({"dense": model, "again": model}, dataset, repeats=3)
    assert rows["test_accuracy"].tolist() == pytest.approx([results.last["test_accuracy"].item()] * 2)
    assert rows["nonzero"].iloc[0] < rows["parameters"].iloc[0]


def test_a_network_without_batchnorm_has_no_folded_form(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    dataset = data.load(Data("digits"))
    dense = models.build(Model("mlp", (8,)), dataset.shape, len(dataset.classes), 0)
    assert "shrunk, folded" not in savings.forms(dense, dense, dense, dataset, tmp_path)


def test_widths_of_the_rounded_form_are_multiples(made):
    _, forms = made
    widths = [m.out_channels for m in forms["shrunk, widths of 8"].modules() if isinstance(m, torch.nn.Conv2d)]
    assert {width % 8 for width in widths} == {0}


def test_int8_answers_nearly_as_the_network_it_comes_from(tmp_path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    numpy_helper = pytest.importorskip("onnx.numpy_helper")
    torch.manual_seed(0)
    logger = logging.getLogger()
    before = (logger.level, [*logger.handlers], [*logger.filters])
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).eval()
    x = torch.randn(64, 16)
    to_onnx(model, tmp_path / "net.onnx", x)
    quantise(tmp_path / "net.onnx", tmp_path / "int8.onnx", x)
    with torch.no_grad():
        expected, found = model(x), OnnxModel(tmp_path / "int8.onnx", model)(x)
    error = float((found - expected).abs().max() / expected.abs().max())
    assert 0 < error < 0.03
    # Whatever this processor does, one that adds pairs of products in 16 bits gives the same.
    weights = [numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer]
    largest = max(int(np.abs(w.astype(int)).max()) for w in weights if w.dtype == np.int8 and w.ndim > 1)
    assert 2 * 255 * largest <= 2**15 - 1
    assert largest > 60
    assert sorted(file.name for file in tmp_path.iterdir()) == ["int8.onnx", "net.onnx"]
    assert (logger.level, logger.handlers, logger.filters) == before


def test_an_onnx_file_is_not_traced(made):
    _, forms = made
    with pytest.raises(GraphError, match="takes tensors, not a Proxy"):
        trace(forms["shrunk, ONNX"], torch.randn(1, 1, 8, 8))


def test_a_file_that_is_no_onnx_is_refused_in_one_line(tmp_path):
    pytest.importorskip("onnxscript")
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(ExportError, match=r"junk\.onnx: .*cannot") as caught:
        quantise(tmp_path / "junk.onnx", tmp_path / "int8.onnx", torch.randn(2, 3))
    assert "\n" not in str(caught.value)
