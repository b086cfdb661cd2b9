"""Gates in shortcuts without weights: masks close their channels; training, counting, files and shrinking follow."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from prunelab import models
from prunelab.data import load as dataset
from prunelab.gates import Gate
from prunelab.masks import MaskError, Masks, maskable
from prunelab.models.resnet import Block
from prunelab.papers.nnrelief.published_counts import counted_parameters, flops
from prunelab.pruners import prune
from prunelab.runs import Store
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.structure import cost, shrink
from prunelab.structure.export import load, save, to_onnx, to_torch_prune
from prunelab.training.experiment import run_all
from prunelab.training.load import masks_at, trained

pytestmark = pytest.mark.filterwarnings("ignore::prunelab.structure.NotRemoved")
SIZES = (4, 6, 8)
X = torch.randn(5, 3, 16, 16)


def net():
    torch.manual_seed(0)
    model = models.build(Model("resnet20", SIZES, "kaiming_normal"), (3, 16, 16), 10, 0)
    model(torch.randn(40, 3, 16, 16))  # running statistics of its own
    return model.eval()


def closed(channel, name="stage_1.block_2"):
    keep = torch.ones(4, dtype=torch.bool)
    keep[channel] = False
    return Masks({f"{name}.shortcut.open": keep})


def test_an_open_gate_changes_no_bit_and_is_no_parameter():
    gate, x = Gate(4), torch.randn(2, 4, 3, 3, requires_grad=True)
    assert torch.equal(gate(x), x)
    assert not list(gate.parameters())
    assert gate(x.half()).dtype == torch.float16
    gate(x).sum().backward()
    assert (x.grad == 1).all()


def test_a_mask_closes_a_channel_of_a_shortcut():
    block = Block(4, 4, 1).eval()
    x = torch.randn(2, 4, 5, 5)
    Masks({"shortcut.open": torch.tensor([True, False, True, True])}).apply_(block)
    branch = block.norm_2(block.conv_2(block.relu_1(block.norm_1(block.conv_1(x)))))
    torch.testing.assert_close(block(x)[:, 1], branch[:, 1].relu())
    torch.testing.assert_close(block(x)[:, 0], (branch + x)[:, 0].relu())


def test_masks_of_gates_are_counted_nowhere():
    model = net()
    masks = Masks.ones(model)
    assert not any("shortcut" in name for name in masks)
    both = masks & closed(1)
    assert both.weights == masks
    assert cost.summarise(model, (3, 16, 16), both) == cost.summarise(model, (3, 16, 16), masks)
    assert counted_parameters(model, both) == counted_parameters(model, masks)
    with pytest.raises(MaskError, match=r"stage_1\.block_2\.shortcut\.open: the parameter has shape 4"):
        Masks({"stage_1.block_2.shortcut.open": torch.ones(3)}).check(model)


def test_weights_from_before_there_were_gates_are_loaded_with_all_of_them_open():
    model = net()
    old = {name: value for name, value in model.state_dict().items() if not name.endswith(".open")}
    closed(1).apply_(model)
    model.load_state_dict(old)
    assert len(old) < len(model.state_dict())
    assert all(bool(module.open.all()) for module in model.modules() if isinstance(module, Gate))


def test_a_closed_channel_without_a_filter_is_dead():
    """Nothing is added in that channel, so nobody has to read it: the smaller model gives the same without it."""
    model = net()
    keep = {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in maskable(model).items()}
    for name, mask in keep.items():
        stage = int(name[6]) if name.startswith("stage") else 0  # a wider stage has a channel more in front
        if name.endswith((".conv_2.weight", ".norm_2.weight", ".norm_2.bias", ".open")) or name.startswith(
            ("conv", "norm")
        ):
            mask[max(stage, 1)] = False
    masks = Masks(keep)
    small = shrink(model, masks, X)
    for stage, size in zip((small.stage_1, small.stage_2, small.stage_3), SIZES, strict=True):
        assert stage.block_2.conv_1.in_channels == stage.block_2.shortcut.channels == size - 1
    pruned = copy.deepcopy(model)
    masks.apply_(pruned)
    torch.testing.assert_close(small(X), pruned(X))
    without = Masks({name: mask for name, mask in masks.items() if not name.endswith("open")})
    assert flops(model, (3, 16, 16), masks) == flops(model, (3, 16, 16), without)  # nothing came through anyway


def test_a_closed_shortcut_is_dead_only_behind_it():
    model = net()
    name = "stage_1.block_3"
    filters = torch.ones(4, dtype=torch.bool)
    filters[2] = False
    parts = {
        f"{name}.conv_2.weight": filters.view(4, 1, 1, 1).expand(4, 4, 3, 3),
        f"{name}.norm_2.weight": filters,
        f"{name}.norm_2.bias": filters,
    }
    masks = closed(2, name) & Masks(parts)
    masks.apply_(model)
    seen = {}
    model.stage_1.block_3.register_forward_hook(lambda *given: seen.update(out=given[-1]))
    model.stage_1.block_2.register_forward_hook(lambda *given: seen.update(before=given[-1]))
    model(X)
    assert not seen["out"][:, 2].any()
    assert seen["before"][:, 2].any()
    before = flops(model, (3, 16, 16), Masks(parts))
    assert flops(model, (3, 16, 16), masks) < before  # the next stage reads a channel less


def test_a_file_holds_the_gates(tmp_path):
    model = net()
    masks = prune(model, "nnrelief", 0.0, batches=[X], allow_empty=True)
    assert any(name.endswith("shortcut.open") and not mask.all() for name, mask in masks.items())
    masks.apply_(model)
    again, kept = load(save(tmp_path / "net", model, masks), net())
    torch.testing.assert_close(again(X), model(X))
    assert kept == masks


def test_a_file_of_a_network_without_gates_goes_into_one_that_has_them(tmp_path):
    before = net()
    for name, module in list(before.named_modules()):
        if isinstance(module, Gate):
            before.set_submodule(name, nn.Identity())
    masks = prune(before, "l1_filter", 0.5)
    masks.apply_(before)
    again, _ = load(save(tmp_path / "old", before), net())
    torch.testing.assert_close(again(X), before(X))


def test_torch_gets_closed_gates_as_they_are():
    model = net()
    masks = closed(1) & Masks.ones(model)
    to_torch_prune(model, masks)
    assert model.stage_1.block_2.shortcut.open.tolist() == [1, 0, 1, 1]
    assert torch_prune.is_pruned(model)


def test_gates_stay_closed_through_a_run_and_its_record(tmp_path):
    train = Train(epochs=1, batch_size=50, lr=1e-3, optimiser="adam")
    data = Data("digits", train_size=100, test_size=50)
    options = {"allow_empty": True, "alpha_conv": 0.8, "samples": 50}
    one = Run(data, Model("resnet20", (2, 3, 4)), train, Prune("nnrelief", 0.0, 2, options=options))
    store = Store(tmp_path)
    run_all([one], store=store, jobs=1, progress=False)
    masks, removals, weights = store.masks(one), store.removals(one), store.weights(one)
    names = [name for name in masks if name.endswith("shortcut.open")]
    assert any(not masks[name].all() for name in names)
    for name in names:
        assert (weights[name] == masks[name]).all()
        assert (masks_at(removals, 2)[name].numpy() == masks[name]).all()
        assert masks_at(removals, 0)[name].all()
    assert not trained(store, one, dataset(data)).get_buffer(names[-1]).all()


def test_gates_survive_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = net()
    to_onnx(model, tmp_path / "open.onnx", X)
    closed(1).apply_(model)
    assert to_onnx(model, tmp_path / "closed.onnx", X) < 1e-4
