"""Models that leave and come back: same outputs, no pickle, nothing half-written, one line for every mistake."""

import copy
import json
import math
import random
import sys

import pandas as pd
import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune as torch_prune

from prunelab import models
from prunelab.masks import MaskError, Masks
from prunelab.pruners import prune
from prunelab.settings import Model
from prunelab.structure import shrink
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
from prunelab.tensor_file import TensorFile

pytestmark = pytest.mark.filterwarnings("ignore::prunelab.structure.NotRemoved")


def small_net():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.LeakyReLU(0.2)), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


X = torch.randn(5, 1, 8, 8)


@pytest.mark.parametrize(
    ("name", "method", "shape"),
    [
        ("lenet_5", "l1_filter", (1, 28, 28)),
        ("mlp", "l1_neuron", (1, 28, 28)),
        ("resnet18", "l1_filter", (3, 32, 32)),
    ],
)
def test_a_shrunk_network_comes_back_into_a_dense_one(tmp_path, name, method, shape):
    def dense(seed):
        if name == "resnet18":
            return torchvision.models.resnet18()
        return models.build(Model(name, (6, 5) if name == "mlp" else ()), shape, 10, seed)

    x, model, fresh = torch.randn(3, *shape), dense(0).eval(), dense(1)
    masks = prune(model, method, 0.5, scope="layer")
    small = shrink(model, masks, x)
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    again, kept = load(save(tmp_path / "net.safetensors", small, masks), fresh)
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
    assert kept == masks
    assert type(again) is type(fresh)
    assert all(torch.equal(t, before[n]) for n, t in fresh.state_dict().items())
    assert list(tmp_path.iterdir()) == [tmp_path / "net.safetensors"]
    assert load_file(tmp_path / "net.safetensors").keys() == {*small.state_dict(), *(f"mask/{n}" for n in masks)}


class Own(nn.Module):
    """Recurrent, attending, convolving over time: every module keeps its widths in attributes of its own."""

    def __init__(self, width=8, heads=4):
        super().__init__()
        self.heads, self.widths = heads, (heads, width // heads)
        self.read = nn.Conv1d(3, width, 3, groups=1)
        self.mix = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm, self.follow = nn.LayerNorm(width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        x = self.read(x).transpose(1, 2)
        x = self.norm(self.mix(x, x, x, need_weights=False)[0].unflatten(-1, self.widths).flatten(-2))
        return self.head(self.follow(x)[0][:, -1])


def test_whole_numbers_in_modules_of_any_class_come_back(tmp_path):
    small, x = Own(4, 2).eval(), torch.randn(2, 3, 9)
    again, _ = load(save(tmp_path / "net", small), Own())
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
    assert (again.widths, again.mix.head_dim, again.norm.normalized_shape) == ((2, 2), 2, (4,))
    with pytest.raises(ExportError, match=r"the file has no '0.weight': it was saved from another model"):
        load(tmp_path / "net", small_net())
    with pytest.raises(ExportError, match=r"model is a type: give a torch.nn.Module"):
        load(tmp_path / "net", Own)


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


@pytest.mark.parametrize("made", [used_twice, Tied])
def test_what_two_layers_share_they_share_when_they_come_back(tmp_path, made):
    model, x = made(), torch.randn(5, 6)
    again, _ = load(save(tmp_path / "net", model), made())
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


def test_a_file_with_two_weights_does_not_go_into_a_model_with_one(tmp_path):
    model = Tied()
    model.decode.weight = nn.Parameter(torch.randn(6, 6))
    with pytest.raises(
        ExportError, match=r"the model shares (en|de)code\.weight with another layer, the file does not"
    ):
        load(save(tmp_path / "net", model), Tied())


def test_groups_of_convolutions_come_back_into_a_dense_model(tmp_path):
    def dense():
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(128, 3)).eval()

    model = dense()
    keep = torch.tensor([False, False, True, False, True, True, False, True]).view(8, 1, 1, 1)
    gone = {f"{n}.weight": keep.expand_as(model.get_parameter(f"{n}.weight")) for n in (0, 1)}
    small = shrink(model, gone | {f"{n}.bias": keep.flatten() for n in (0, 1)}, X)
    assert small[1].groups == 3
    again, _ = load(save(tmp_path / "net", small), dense())
    with torch.no_grad():
        assert torch.equal(again(X), small(X))


# Names and texts from a file that were once put into source code, and more that should never reach any.
EVIL = "x=open(MARK,'w')"
GRAPH = {"Graph": {"layers": {}, "values": {}, "nodes": [["placeholder", "x", EVIL, {"tuple": []}, {"dict": {}}]]}}
SIZES = [
    {"": {EVIL: 1, "forward": 3, "__class__": 4, "training": 1}, EVIL: {"groups": 2}},
    {"0": {"in_channels": EVIL, "groups": [EVIL], "kernel_size": EVIL, "stride": [[3], EVIL]}},
    {"0": [EVIL], "1": EVIL, "5": None, "6": {"in_features": None, "weight": 0, "out_features": 1.5}},
]


@pytest.mark.parametrize(
    ("form", "facts", "why"),
    [
        ("prunelab model 1", {"architecture": json.dumps(GRAPH)}, "its format is 'prunelab model 1'"),
        *(("prunelab model 2", {"sizes": json.dumps(sizes)}, None) for sizes in SIZES),
        ("prunelab model 2", {"sizes": EVIL}, "its sizes cannot be read"),
        ("prunelab model 2", {"sizes": "[" * 10**6}, "its sizes cannot be read"),
        ("prunelab model 2", {"tied": json.dumps([EVIL])}, "its sizes cannot be read"),
        ("prunelab model 2", {"tied": json.dumps({"0.weight": {}, EVIL: EVIL, "6.weight": EVIL})}, None),
    ],
)
def test_no_text_of_a_file_is_compiled_run_or_looked_up(tmp_path, form, facts, why):
    model = small_net().eval()
    facts = {name: text.replace("MARK", json.dumps(str(tmp_path / "mark"))[1:-1]) for name, text in facts.items()}
    place = TensorFile(form, "a model", "a test", ExportError).save(tmp_path / "net", model.state_dict(), **facts)
    attempt(load, place, model)  # what is imported late is imported now
    WATCHED[:] = [True]
    made, said = attempt(load, place, model)
    seen, WATCHED[:] = WATCHED[1:], []
    assert said == "" if why is None else why in said
    if made:
        with torch.no_grad():
            assert torch.equal(made[0](X), model(X))
    assert [event for event in seen if event[0] != "open"] == []
    assert [event for event in seen if event[0] == "open" and "w" in str(event[1][1:])] == []
    assert not (tmp_path / "mark").exists()


WATCHED = []  # [True, event, ...] while a test looks on: a hook for the interpreter's events cannot be taken away


def attempt(act, *given):
    """What a call gives, and the one line with which it refuses."""
    try:
        return act(*given), ""
    except (ExportError, MaskError) as error:
        assert "\n" not in str(error)  # noqa: PT017
        return None, str(error)


def _look_on(event, arguments):
    if WATCHED and event in {"compile", "exec", "open", "import", "os.system", "subprocess.Popen", "pickle.find_class"}:
        WATCHED.append((event, arguments))


sys.addaudithook(_look_on)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut out, doubled, or put elsewhere; half of the time in the header."""
    end = draw.choice([len(content), 8 + int.from_bytes(content[:8], "little")])
    at, length = draw.randrange(end), draw.choice([1, 1, 1, 8, 64])
    part = content[at : at + length]
    new = draw.choice(
        [
            bytes(draw.randrange(256) for _ in part),
            b"",
            part * 2,
            part[::-1],
            bytes([part[0] ^ 1 << draw.randrange(8)]) + part[1:],
        ]
    )
    return content[:at] + new + content[at + length :] if draw.random() < 0.9 else content[:at]


@pytest.mark.parametrize("trials", [150, pytest.param(1400, marks=pytest.mark.slow)])
def test_a_mutated_file_is_refused_in_one_line_or_holds_what_was_written(tmp_path, trials):
    draw, model = random.Random(0), Own(4, 2).eval()
    masks = prune(model, "magnitude", 0.5)
    content = save(tmp_path / "net", model, masks).read_bytes()
    masks.save(tmp_path / "masks")
    sources, tried, refused = [(tmp_path / "masks").read_bytes(), content], 0, 0
    while tried < trials:
        trial = draw.randrange(2)
        odd = mutated(sources[trial], draw)
        tried += odd != sources[trial]
        (tmp_path / "odd").write_bytes(odd)
        if trial:
            found, said = attempt(load, tmp_path / "odd", Own())
        else:
            kept, said = attempt(Masks.load, tmp_path / "odd")
            found = (model, kept)
        refused += bool(said)
        if not said:
            assert found[1] == masks
            assert vars(found[0])["widths"] == (2, 2)
            assert all(torch.equal(t, model.state_dict()[n]) for n, t in found[0].state_dict().items())
    assert refused > 0.95 * trials


def test_files_that_are_none_are_refused_in_one_line(tmp_path):
    with pytest.raises(ExportError, match="there is no such file"):
        load(tmp_path / "nothing", small_net())
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ExportError, match="not a file of a model"):
        load(tmp_path / "junk", small_net())
    Masks({"a": torch.ones(2)}).save(tmp_path / "masks")
    with pytest.raises(ExportError, match="its format is 'prunelab masks 2', not 'prunelab model 2'"):
        load(tmp_path / "masks", small_net())
    for folder in ("no", "junk"):
        with pytest.raises(ExportError, match="the folder does not exist"):
            save(tmp_path / folder / "net", small_net())


def test_a_traced_model_is_refused_since_its_sizes_are_in_its_code(tmp_path):
    with pytest.raises(ExportError, match=r"GraphModule, which no class of yours can take: .* to_onnx"):
        save(tmp_path / "net", torch.fx.symbolic_trace(small_net()))


def test_a_state_that_is_no_tensor_is_refused_before_anything_is_written(tmp_path):
    class More(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

    for model, why in [
        (More(2, 2), "_extra_state is a dict"),
        (nn.LazyLinear(2), "weight is a UninitializedParameter"),
    ]:
        with pytest.raises(ExportError, match=f"{why}, which these files cannot hold"):
            save(tmp_path / "net", model)
    assert list(tmp_path.iterdir()) == []


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

    class Fixed(nn.Linear):
        def forward(self, x):
            return super().forward(x).view(2, 3)

    for model, example, place, why in [
        (Fixed(4, 3), x, "net.onnx", "takes batches of 2 alone, as view"),
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


def test_spectral_norm_is_not_taken_for_the_pruning_of_torch():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(ExportError, match="has pruned nothing"):
        from_torch_prune(model)
    torch_prune.l1_unstructured(model[2], "weight", 0.5)
    assert from_torch_prune(model).counts == {"2.weight": 32}


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
