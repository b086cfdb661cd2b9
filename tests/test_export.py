"""Models that leave and come back: same outputs, no pickle, nothing half-written, one line for every mistake."""

import copy
import json
import math

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune as torch_prune

from prunelab import models
from prunelab.architecture import ArchitectureError, build, describe
from prunelab.masks import Masks
from prunelab.pruners import prune
from prunelab.settings import Model
from prunelab.shrink import shrink
from prunelab.structure.export import (
    ExportError,
    SparseLinear,
    break_even,
    csr_speed,
    from_torch_prune,
    load,
    save,
    sparse,
    to_onnx,
    to_torch_prune,
)


def small_net():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.LeakyReLU(0.2)), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


X = torch.randn(5, 1, 8, 8)


@pytest.mark.parametrize("name", ["lenet_5", "dropnet_b", "mlp"])
def test_a_chain_comes_back_from_its_file_alone(tmp_path, name):
    x = torch.randn(3, 1, 28, 28)
    model = models.build(Model(name, () if name == "lenet_5" else (6, 5)), (1, 28, 28), 10, 0)
    masks = prune(model, "l1_filter" if name != "mlp" else "l1_neuron", 0.5)
    small = shrink(model, masks).eval()
    again, kept = load(save(tmp_path / "net.safetensors", small, masks))
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
    assert kept == masks
    assert list(tmp_path.iterdir()) == [tmp_path / "net.safetensors"]


def test_nested_chains_with_normalisation_and_groups_come_back(tmp_path):
    model = small_net().eval()
    again, kept = load(save(tmp_path / "net", model))
    with torch.no_grad():
        assert torch.equal(again(X), model(X))
    assert len(kept) == 0


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, dilation=2), nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.GELU(approximate="tanh"), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False),
        nn.Conv2d(3, 3, 3, padding="same", groups=3, padding_mode="reflect"), nn.Hardtanh(-0.1, 0.3), nn.Sigmoid(),
        nn.LayerNorm((9, 9), bias=False), nn.LayerNorm(9, elementwise_affine=False), nn.GroupNorm(3, 3),
        nn.GroupNorm(1, 3, affine=False), nn.PReLU(3), nn.Upsample(scale_factor=2), nn.ConstantPad2d(1, 2.0),
        nn.ZeroPad2d((1, 0, 2, 0)), nn.Flatten(2), nn.Softmax(1), nn.Identity(), nn.ELU(0.5),
        nn.AdaptiveMaxPool2d((2, 3)),
    ],
    ids=str,
)  # fmt: skip
def test_a_layer_comes_back_with_all_that_it_was_built_from(tmp_path, layer):
    model, x = nn.Sequential(layer).eval(), torch.randn(2, 3, 9, 9)
    again, _ = load(save(tmp_path / "net", model))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("name", ["resnet20", "dropnet_resnet18"])
def test_a_network_with_skips_comes_back_from_its_file_alone(tmp_path, name):
    model, x = models.build(Model(name), (3, 32, 32), 10, 0).eval(), torch.randn(2, 3, 32, 32)
    small = shrink(model, prune(model, "l1_filter", 0.5, scope="layer"), x)
    again, _ = load(save(tmp_path / "net", small))
    with torch.no_grad():
        torch.testing.assert_close(again(x), small(x))
    assert sorted(again.state_dict()) == sorted(model.state_dict())
    assert shrink(again, None, x) is again


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11_bn", "mobilenet_v3_small", "densenet121", "convnext_tiny", "shufflenet_v2_x0_5"]
)
def test_the_networks_of_torchvision_are_described_whole(name):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    described = json.loads(json.dumps(describe(model)))
    with torch.device("meta"):
        again = build(described)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert describe(again) == describe(model)


def test_a_shrunk_torchvision_network_comes_back_from_its_file_alone(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    model, x = torchvision.models.mobilenet_v2(num_classes=5).eval(), torch.randn(2, 3, 32, 32)
    small = shrink(model, prune(model, "l1_filter", 0.5, scope="layer"), x)
    again, _ = load(save(tmp_path / "net", small))
    with torch.no_grad():
        torch.testing.assert_close(again(x), small(x))


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (["call_function", "x", "posix.system", {"tuple": ["true"]}, {"dict": {}}], "calls 'posix.system'"),
        (["call_method", "x", "__reduce__", {"tuple": []}, {"dict": {}}], "calls the method '__reduce__'"),
        (["exec", "x", "print", {"tuple": []}, {"dict": {}}], "an operation 'exec'"),
    ],
)
def test_a_description_calls_only_what_is_on_the_list(node, why):
    with pytest.raises(ArchitectureError, match=why):
        build({"Graph": {"layers": {}, "values": {}, "nodes": [node]}})
    with pytest.raises(ArchitectureError, match="a layer 'Bilinear' that this version does not know"):
        build({"Bilinear": {}})


def test_any_other_model_is_cut_to_the_sizes_of_the_file(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU()), nn.Linear(8, 3)

        def forward(self, x):
            return torch.erf(self.head(self.body(x)))  # which no file describes

    model = Own().eval()
    small = shrink(model, prune(model, "l1_neuron", 0.5), X)
    place = save(tmp_path / "own", small)
    with pytest.raises(ExportError, match="does not describe its model: give one, load"):
        load(place)
    dense = Own()
    again, _ = load(place, into=dense)
    with torch.no_grad():
        assert torch.equal(again(X), small(X))
    assert dense.head.in_features == 8
    assert again.head.in_features == 4
    with pytest.raises(ExportError, match="it was saved from another model"):
        load(place, into=small_net())


class Tied(nn.Module):
    """Its decoder has the weight of its encoder."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.relu(self.encode(x)))


def used_twice():
    layer, activation = nn.Linear(6, 6), nn.ReLU()
    return nn.Sequential(layer, activation, nn.Linear(6, 6), activation, layer)


@pytest.mark.parametrize(("made", "into"), [(used_twice, False), (Tied, False), (Tied, True)])
def test_what_two_layers_share_they_share_when_they_come_back(tmp_path, made, into):
    model, x = made(), torch.randn(5, 6)
    place = save(tmp_path / "net", model)
    again, _ = load(place, into=made() if into else None)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


def test_a_file_with_two_weights_does_not_go_into_a_model_with_one(tmp_path):
    model = Tied()
    model.decode.weight = nn.Parameter(torch.randn(6, 6))
    with pytest.raises(
        ExportError, match=r"the model shares (en|de)code\.weight with another layer, the file does not"
    ):
        load(save(tmp_path / "net", model), into=Tied())


def test_groups_of_convolutions_come_back_into_a_dense_model(tmp_path):
    def dense():
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(128, 3)).eval()

    model = dense()
    keep = torch.tensor([False, False, True, False, True, True, False, True]).view(8, 1, 1, 1)
    gone = {f"{n}.weight": keep.expand_as(model.get_parameter(f"{n}.weight")) for n in (0, 1)}
    small = shrink(model, gone | {f"{n}.bias": keep.flatten() for n in (0, 1)}, X)
    assert small[1].groups == 3
    again, _ = load(save(tmp_path / "net", small), into=dense())
    with torch.no_grad():
        assert torch.equal(again(X), small(X))


@pytest.mark.parametrize("written", [None, "{", "[]", '{"Sequential": 3}', '{"Linear": {}}', '{"Graph": {}}'])
def test_a_description_that_cannot_be_read_is_refused_in_one_line(tmp_path, written):
    metadata = {"format": "prunelab model 1"} | ({} if written is None else {"architecture": written})
    save_file({"model/0.weight": torch.ones(1)}, tmp_path / "net", metadata=metadata)
    with pytest.raises(ExportError, match="its description of the model cannot be read") as caught:
        load(tmp_path / "net")
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused_in_one_line(tmp_path):
    with pytest.raises(ExportError, match="there is no such file"):
        load(tmp_path / "nothing")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ExportError, match="not a safetensors file"):
        load(tmp_path / "junk")
    Masks({"a": torch.ones(2)}).save(tmp_path / "masks")
    with pytest.raises(ExportError, match="no model of prunelab"):
        load(tmp_path / "masks")
    for folder in ("no", "junk"):
        with pytest.raises(ExportError, match="the folder does not exist"):
            save(tmp_path / folder / "net", small_net())


def test_onnx_gives_the_same_outputs_for_any_batch(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = small_net().eval()
    assert to_onnx(model, tmp_path / "net.onnx", X) < 1e-5
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": X[:2].numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(X[:2]), rtol=1e-4, atol=1e-5)


def test_onnx_with_a_fixed_batch_size_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    exported = torch.onnx.export
    fixed = {"dynamic_shapes": None}  # as torch 2.6 does for some networks, whatever it is asked for
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **options: exported(*a, **{**options, **fixed}))
    with pytest.raises(ExportError, match=f"fixes the batch size at {len(X)}: nothing was written"):
        to_onnx(small_net().eval(), tmp_path / "net.onnx", X)
    assert list(tmp_path.iterdir()) == []


def test_what_onnxruntime_cannot_run_is_refused_in_one_line(tmp_path):
    pytest.importorskip("onnxscript")

    class Named(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x)}

    x, half = torch.randn(2, 4), torch.randn(2, 4, dtype=torch.bfloat16)
    (tmp_path / "file").touch()
    for model, example, place, why in [
        (Named(4, 3), x, "net.onnx", "gives a dict: wrap it in a module that gives one tensor"),
        (nn.Linear(4, 3).bfloat16(), half, "net.onnx", "cannot export the model: .*NOT_IMPLEMENTED"),
        (nn.Linear(4, 3), x, "file/net.onnx", "cannot export the model"),
    ]:
        with pytest.raises(ExportError, match=why) as caught:
            to_onnx(model, tmp_path / place, example)
        assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_shrunk_torchvision_model_runs_in_onnxruntime(tmp_path, name):
    pytest.importorskip("onnxscript")
    torchvision = pytest.importorskip("torchvision")
    model, x = getattr(torchvision.models, name)().eval(), torch.randn(2, 3, 64, 64)
    small = shrink(model, prune(model, "l1_filter", 0.5, scope="layer"), x)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    assert to_onnx(small, tmp_path / "net.onnx", x) < 1e-4


def test_masks_of_torch_come_in_and_go_out():
    model = small_net()
    torch_prune.l1_unstructured(model[6], "weight", amount=0.5)
    torch_prune.ln_structured(model[0], "weight", amount=2, n=1, dim=0)
    expected = {"0.weight": model[0].weight_mask.bool(), "6.weight": model[6].weight_mask.bool()}
    masks = from_torch_prune(model)
    assert masks == Masks(expected)
    assert not [name for name, _ in model.named_parameters() if name.endswith("_orig")]
    assert not model[6].weight[~masks["6.weight"]].any()
    to_torch_prune(model, masks)
    assert torch.equal(model[6].weight_mask.bool(), masks["6.weight"])
    torch_prune.l1_unstructured(model[6], "weight", amount=0.5)
    assert int(from_torch_prune(model)["6.weight"].sum()) == 18
    with pytest.raises(ExportError, match="has pruned nothing"):
        from_torch_prune(model)


def test_sparse_layers_compute_the_same():
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))
    prune(model, "magnitude", 0.95, layers=["0"]).apply_(model)
    whole = copy.deepcopy(model)
    lighter = sparse(model, 0.9)
    assert isinstance(lighter[0], SparseLinear)
    assert isinstance(lighter[2], nn.Linear)
    x = torch.randn(3, 40)
    with torch.no_grad():
        torch.testing.assert_close(lighter(x), whole(x))


def test_csr_breaks_even_where_the_line_between_two_measurements_crosses_one():
    table = pd.DataFrame({"sparsity": [0.5, 0.8, 0.9], "speedup": [0.2, 0.5, 1.5]})
    assert break_even(table) == pytest.approx(0.85)
    assert break_even(table[:2]) == math.inf
    assert break_even(table[2:]) == 0.9
    noisy = pd.DataFrame({"sparsity": [0.5, 0.8, 0.9], "speedup": [1.1, 0.5, 1.5]})
    assert break_even(noisy) == pytest.approx(0.85)


def test_layers_are_sparse_where_that_was_measured_to_be_faster():
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    prune(model, "magnitude", 0.998, layers=["0"]).apply_(model)
    lighter = sparse(model, batch=1)
    assert isinstance(lighter[2], nn.Linear)  # nothing in it is zero
    x = torch.randn(1, 512)
    with torch.no_grad():
        torch.testing.assert_close(lighter(x), model(x))


def test_the_speed_of_sparse_layers_is_measured_at_every_sparsity():
    found = csr_speed(20, 30, 4, (0.5, 0.9), repeats=3)
    assert found["sparsity"].tolist() == [0.5, 0.9]
    assert (found["speedup"] == found["dense"] / found["csr"]).all()
