"""Masks: values, files, tables, and that what is pruned never comes back."""

import copy
import html.parser
import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import prune as torch_prune

from prunelab.errors import PrunelabWarning
from prunelab.masks import MaskError, Masks, prunable


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    first, second, last = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)
    return nn.Sequential(OrderedDict(first=first, relu=nn.ReLU(), second=second, relu_2=nn.ReLU(), last=last))


def half(model: nn.Module, seed: int = 1) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    return Masks({n: torch.rand(m.shape, generator=generator) < 0.5 for n, m in Masks.ones(model).items()})


def revived(model: nn.Module, masks: Masks) -> int:
    return sum(int(torch.count_nonzero(model.get_parameter(name)[~mask])) for name, mask in masks.items())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x, y = torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
}


# ---------------------------------------------------------------------------------------------------------- values


def test_counts_of_four_numbers_are_as_counted_by_hand():
    masks = Masks({"a.weight": torch.tensor([[True, False], [False, False]]), "b.weight": torch.ones(2, 2)})
    assert (masks.kept, masks.total, masks.density, masks.sparsity) == (5, 8, 0.625, 0.375)
    assert masks.by_layer()[0] == {
        "parameter": "a.weight",
        "shape": (2, 2),
        "total": 4,
        "kept": 1,
        "density": 0.25,
    }
    assert Masks({}).density == 1


def test_and_keeps_what_both_keep_and_passes_on_what_only_one_has():
    both = Masks({"a": torch.tensor([1, 1, 0, 0]), "b": torch.tensor([0])}) & Masks({"a": torch.tensor([1, 0, 1, 0])})
    assert both == Masks({"a": torch.tensor([True, False, False, False]), "b": torch.tensor([False])})
    assert Masks({}) & both == both
    with pytest.raises(MaskError, match="a: masks of shapes 4 and 2 x 2 do not go together"):
        both & Masks({"a": torch.ones(2, 2)})


def test_masks_are_copies_and_cannot_be_assigned():
    given = torch.ones(3, dtype=torch.bool)
    masks = Masks({"a": given})
    given[0] = False
    assert masks.kept == 3
    with pytest.raises(TypeError):
        masks["a"] = given


def test_weights_leaves_the_biases_out():
    assert list(Masks({"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2)}).weights) == ["a.weight"]


@pytest.mark.parametrize("mask", [torch.tensor([0.5, 1.0]), torch.tensor([torch.nan]), torch.tensor([2, 0]), [True]])
def test_what_is_no_mask_is_refused_by_name(mask):
    with pytest.raises(MaskError, match=r"^hidden.weight: a mask should"):
        Masks({"hidden.weight": mask})


def test_masks_copy_and_pickle_like_values():
    masks = half(mlp())
    assert copy.deepcopy(masks) == masks == pickle.loads(pickle.dumps(masks))
    assert masks != Masks.ones(mlp())
    assert masks.to("cpu") == masks


@pytest.mark.parametrize("masks", [None, 5, [torch.ones(2)], "masks"])
def test_what_is_no_mapping_is_refused(masks):
    with pytest.raises(MaskError, match=r"masks should be parameter name -> mask, as of Masks.ones"):
        Masks(masks)
    with pytest.raises(MaskError, match="3: a mask should be under the name of its parameter"):
        Masks({3: torch.ones(2)})


# -------------------------------------------------------------------------------------------------- what is pruned


def test_prunable_are_the_weights_of_linear_and_conv_in_module_order():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    assert prunable(model) == ["0.weight", "4.weight"]
    assert prunable(model, ["4", "0"]) == ["0.weight", "4.weight"]
    assert prunable(model, "4") == ["4.weight"]
    assert prunable(nn.Linear(2, 2)) == ["weight"]


class Table(nn.Module):
    """Of a class of the user's own: a table, its scale, a stack of matrices."""

    def __init__(self):
        super().__init__()
        self.table, self.scale = nn.Parameter(torch.randn(7, 3)), nn.Parameter(torch.ones(3))
        self.stack = nn.Parameter(torch.randn(2, 3, 3))


def test_prunable_are_weights_of_every_kind_and_others_by_name():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv1d(2, 4, 3),
            "up": nn.ConvTranspose2d(4, 2, 2),
            "deep": nn.Conv3d(1, 2, 2),
            "words": nn.Embedding(5, 3),
            "bag": nn.EmbeddingBag(4, 2),
            "both": nn.Bilinear(2, 3, 4),
            "lstm": nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
            "gru": nn.GRU(3, 4),
            "cell": nn.RNNCell(2, 3),
            "mix": nn.MultiheadAttention(4, 2, kdim=3, vdim=3),
            "same": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "own": Table(),
            "norm": nn.LayerNorm((2, 3)),
        }
    )
    lstm = [f"lstm.weight_{w}_l{n}{back}" for n in (0, 1) for back in ("", "_reverse") for w in ("ih", "hh", "hr")]
    known = [f"{name}.weight" for name in ("conv", "up", "deep", "words", "bag", "both")]
    known += [*lstm, "gru.weight_ih_l0", "gru.weight_hh_l0", "cell.weight_ih", "cell.weight_hh"]
    known += [f"mix.{n}" for n in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")]
    known += ["same.in_proj_weight", "same.out_proj.weight"]
    assert prunable(model) == known
    assert prunable(model, ["own", "gru.weight_hh_l0"]) == ["gru.weight_hh_l0", "own.table", "own.stack"]
    assert prunable(model, "own.stack") == ["own.stack"]
    assert Masks.ones(model).left_out == {
        "own.table": (7, 3),
        "own.stack": (2, 3, 3),
        "norm.weight": (2, 3),
        "norm.bias": (2, 3),
        "same.bias_k": (1, 1, 4),
        "same.bias_v": (1, 1, 4),
    }


def test_the_sparsity_of_the_whole_model_stands_beside_that_of_its_masks(tmp_path):
    model = nn.Sequential(nn.Linear(4, 5), Table(), nn.Linear(5, 2, bias=False))  # 20 + 10 masked, 5 + 21 + 3 + 18 not
    masks = Masks.ones(model) & Masks({"0.weight": torch.arange(20).view(5, 4) >= 15})
    assert (masks.sparsity, masks.model_sparsity) == (0.5, pytest.approx(15 / 77))
    head, *_, note = repr(masks).splitlines()
    assert head == "Masks of 2 parameters, sparsity 0.5000, 0.1948 of all 77 parameters of the model"
    assert note == "left out, 39 weights: 1.table (21), 1.stack (18)"
    assert note in masks._repr_html_()
    with_bias = masks & Masks({"0.bias": torch.tensor([1, 1, 1, 1, 0])})
    assert with_bias.model_sparsity == pytest.approx(16 / 77)
    assert with_bias.weights.model_sparsity == pytest.approx(15 / 77)
    masks.save(tmp_path / "masks")
    for again in (
        masks.to("cpu"),
        copy.deepcopy(masks),
        Masks.load(tmp_path / "masks"),
        Masks.ones(model, ["0"]) & Masks.ones(model, ["2"]) & masks,
    ):
        assert repr(again) == repr(masks)
    assert Masks(dict(masks)).model_sparsity is None


def test_a_shared_weight_is_pruned_once():
    model = mlp()
    model.add_module("again", nn.Linear(6, 8))
    model.again.weight = model.first.weight
    assert prunable(model) == ["first.weight", "second.weight", "last.weight"]
    assert Masks.ones(model, ["again"]).total == 48


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (["sceond"], "no layer 'sceond': did you mean 'second'?"),
        (
            ["relu"],
            "layer 'relu' is a ReLU, which has no weight of two or more dimensions itself: known: first, last, second",
        ),
        ([""], "layer '' is a Sequential"),
        (5, "layers: int is no name"),
        ([("first",)], "layers: tuple is no name: give names as in model.named_modules()"),
    ],
)
def test_a_layer_that_cannot_be_pruned_is_refused_by_name(layers, words):
    with pytest.raises(MaskError) as error:
        prunable(mlp(), layers)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_models_without_plain_weights_are_refused():
    computed = r"the weight of layer '0' is computed, .* make it a plain parameter first, or prune the others by name"
    parametrised = [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.spectral_norm,
    ]
    for change in parametrised:
        model = nn.Sequential(change(nn.Linear(3, 3)), nn.Linear(3, 2))
        with pytest.raises(MaskError, match=computed):
            prunable(model)
        assert prunable(model, ["1"]) == ["1.weight"]
    with pytest.raises(MaskError, match=r"0.weight is on the device meta and has no values: load"):
        prunable(nn.Sequential(nn.Linear(3, 3, device="meta")))
    whole = nn.Linear(3, 3)
    whole.weight = nn.Parameter(whole.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(MaskError, match=r"0.weight is int8, as quantised weights are: prune before you quantise"):
        prunable(nn.Sequential(whole))
    with pytest.raises(
        MaskError, match=r"ReLU has no Linear, convolution or other known layer of weights: name layers"
    ):
        prunable(nn.ReLU())
    with pytest.raises(MaskError, match=r"'first' is computed, as by torch.nn.utils.prune"):
        prunable(nn.Sequential(OrderedDict(first=torch_prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5))))
    with pytest.raises(MaskError, match="'0' is lazy"):
        prunable(nn.Sequential(nn.LazyLinear(3)))


def test_masks_of_another_model_are_refused_by_the_first_parameter_that_does_not_fit():
    masks = Masks.ones(mlp())
    with pytest.raises(MaskError, match=r"no parameter 'first.weight' for this mask: did you mean 'thirst.weight'\?"):
        masks.apply_(nn.Sequential(OrderedDict(thirst=nn.Linear(6, 8))))
    model = mlp()
    model.second = nn.Linear(8, 4)
    with pytest.raises(MaskError, match=r"second.weight: the parameter has shape 4 x 8, its mask 5 x 8"):
        masks.check(model)


def test_apply_zeroes_what_is_pruned_and_leaves_the_rest_bit_for_bit():
    model, dense = mlp(), mlp()
    masks = half(model)
    masks.apply_(model)
    for name, parameter in model.named_parameters():
        before, mask = dense.get_parameter(name), masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[mask], before[mask])
        assert not parameter[~mask].any()
    Masks({}).apply_(model)


@pytest.mark.parametrize("odd", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_pruned_is_0_even_if_it_was_no_number(odd, dtype):
    model = mlp().to(dtype)
    masks = half(model)
    for name, mask in masks.items():
        model.get_parameter(name).data[~mask] = odd
    held = copy.deepcopy(model)
    masks.apply_(model)
    masks.hold(held, torch.optim.SGD(held.parameters(), lr=0.1))
    for network in (model, held):
        assert revived(network, masks) == 0
        for name, mask in masks.items():
            assert torch.equal(network.get_parameter(name)[mask], mlp().to(dtype).get_parameter(name)[mask])


# ----------------------------------------------------------------------------------------- nothing ever comes back


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS.keys())
def test_held_weights_stay_pruned_and_so_does_the_state_of_the_optimiser(make):
    model = mlp()
    masks = half(model)
    optimizer = make(model.parameters())
    train(model, optimizer)  # moments exist before anything is pruned
    masks.hold(model, optimizer)
    assert revived(model, masks) == 0
    before = copy.deepcopy(model)
    for _ in range(3):
        train(model, optimizer, steps=1)
        assert revived(model, masks) == 0
        for name, mask in masks.items():
            states = [
                s for s in optimizer.state[model.get_parameter(name)].values() if getattr(s, "shape", 0) == mask.shape
            ]
            assert states
            assert not any(state[~mask].any() for state in states)
    assert all((model.get_parameter(n)[m] != before.get_parameter(n)[m]).any() for n, m in masks.items())


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS.keys())
def test_without_hold_the_same_loop_brings_weights_back(make):
    model = mlp()
    masks = half(model)
    optimizer = make(model.parameters())
    train(model, optimizer)
    masks.apply_(model)
    train(model, optimizer)
    assert revived(model, masks) > 0


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_holding_is_the_same_as_training_with_masked_gradients(name):
    held, oracle = mlp(), mlp()
    masks = half(held)
    optimizer = OPTIMISERS[name](held.parameters())
    masks.hold(held, optimizer)
    train(held, optimizer)
    masks.apply_(oracle)
    for parameter, mask in masks.items():
        oracle.get_parameter(parameter).register_hook(lambda gradient, mask=mask: gradient * mask)
    train(oracle, OPTIMISERS[name](oracle.parameters()))
    for parameter, value in held.named_parameters():
        torch.testing.assert_close(value, oracle.get_parameter(parameter), rtol=0, atol=1e-7)


def test_loading_dense_weights_or_a_dense_optimiser_does_not_bring_weights_back():
    model = mlp()
    masks = half(model)
    optimizer = OPTIMISERS["sgd"](model.parameters())
    train(model, optimizer)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    masks.hold(model, optimizer)
    optimizer.load_state_dict(state)
    train(model, optimizer, steps=1)
    assert revived(model, masks) == 0
    model.load_state_dict(weights)
    assert revived(model, masks) > 0
    train(model, optimizer, steps=1)
    assert revived(model, masks) == 0


def test_saved_and_loaded_weights_stay_pruned_and_have_the_dense_size(tmp_path):
    model, dense = mlp(), mlp(seed=3)
    masks = half(model)
    masks.hold(model, optimizer := OPTIMISERS["adam"](model.parameters()))
    train(model, optimizer)
    save_file(model.state_dict(), tmp_path / "masked")
    save_file(dense.state_dict(), tmp_path / "dense")
    assert (tmp_path / "masked").stat().st_size == (tmp_path / "dense").stat().st_size
    masks.save(tmp_path / "masks.safetensors")
    dense.load_state_dict(load_file(tmp_path / "masked"))
    again = Masks.load(tmp_path / "masks.safetensors")
    assert again == masks
    again.hold(dense, optimizer := OPTIMISERS["sgd"](dense.parameters()))
    train(dense, optimizer)
    assert revived(dense, masks) == 0


def test_a_copy_of_a_held_model_is_a_plain_model_that_can_be_held_too():
    model = mlp()
    masks = half(model)
    masks.hold(model, optimizer := OPTIMISERS["sgd"](model.parameters()))
    train(model, optimizer)
    twin = copy.deepcopy(model)
    assert revived(twin, masks) == 0
    assert twin.state_dict().keys() == mlp().state_dict().keys()
    masks.hold(twin, optimizer := OPTIMISERS["adamw"](twin.parameters()))
    train(twin, optimizer)
    assert revived(twin, masks) == 0


def test_removing_the_handle_ends_it_and_so_does_leaving_the_block():
    model = mlp()
    masks = half(model)
    optimizer = OPTIMISERS["sgd"](model.parameters())
    with masks.hold(model, optimizer):
        train(model, optimizer, steps=1)
        assert revived(model, masks) == 0
    train(model, optimizer, steps=1)
    assert revived(model, masks) > 0
    handle = Masks({}).hold(model, optimizer)
    train(model, optimizer, steps=1)
    handle.remove()


def test_an_optimiser_of_another_model_is_refused():
    model = mlp()
    with pytest.raises(MaskError, match=r"the optimiser does not hold first.weight"):
        half(model).hold(model, OPTIMISERS["sgd"](copy.deepcopy(model).parameters()))
    model.first.weight.requires_grad_(False)
    half(model).hold(model, OPTIMISERS["sgd"]([p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("odd", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["sgd", "adam fused", "rmsprop"])
def test_no_gradient_brings_a_pruned_weight_back(name, odd):
    model, oracle = mlp(), mlp()
    masks = half(model)
    optimizer, other = OPTIMISERS[name](model.parameters()), OPTIMISERS[name](oracle.parameters())
    masks.hold(model, optimizer)
    masks.hold(oracle, other)
    for step in range(3):
        for network, rule in ((model, optimizer), (oracle, other)):
            rule.zero_grad()
            network(torch.ones(4, 6)).square().mean().backward()
            if step == 0 and network is model:
                network.first.weight.grad[~masks["first.weight"]] = odd
            rule.step()
        assert revived(model, masks) == 0
    for a, b in zip(model.parameters(), oracle.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_gradient_of_a_norm_at_0_does_not_reach_clipping_and_finite_ones_are_left():
    model = mlp()
    masks = half(model) & Masks({"first.weight": (torch.arange(8) > 3)[:, None].expand(8, 6)})
    masks.hold(model, optimizer := OPTIMISERS["sgd"](model.parameters()))
    (model(torch.ones(4, 6)).square().mean() + model.first.weight.square().sum(1).sqrt().sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.second.weight.grad[~masks["second.weight"]].any()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
    optimizer.step()
    assert revived(model, masks) == 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("first", ["model", "optimiser"])
def test_a_copy_of_model_and_optimiser_is_held_too_and_by_itself(first):
    model = mlp()
    masks = half(model)
    optimizer = OPTIMISERS["adamw"](model.parameters())
    parts = [Masks({n: m for n, m in masks.items() if n.startswith("first") is own}) for own in (True, False)]
    handles = [part.hold(model, optimizer) for part in parts]
    train(model, optimizer)
    if first == "model":
        twin, rule = copy.deepcopy((model, optimizer))
    else:
        rule, twin = copy.deepcopy((optimizer, model))
    for handle in handles:
        handle.remove()
    train(twin, rule)
    assert revived(twin, masks) == 0
    train(model, optimizer)
    assert revived(model, masks) > 0
    assert copy.deepcopy(optimizer).state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert not [name for name in vars(optimizer) if "held" in name or name.endswith("copy__")]


def test_a_hold_that_is_lost_says_so_in_one_line(tmp_path):
    model = mlp()
    masks = half(model)
    masks.hold(model, optimizer := OPTIMISERS["sgd"](model.parameters()))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    with pytest.warns(PrunelabWarning, match=r"^masks are held with this optimiser, .* call masks.hold again after"):
        torch.save((model, optimizer), tmp_path / "both")
    again, rule = torch.load(tmp_path / "both", weights_only=False)
    masks.hold(again, rule)
    train(again, rule)
    assert revived(again, masks) == 0
    again.load_state_dict(mlp(seed=4).state_dict(), assign=True)
    with pytest.warns(
        PrunelabWarning, match=r"^first.weight is another parameter than the one that the optimiser trains"
    ):
        train(again, rule, steps=2)  # once, and from then on what the model has now is pruned
    assert revived(again, masks) == 0


# -------------------------------------------------------------------------------------------- it is a plain module


def test_masked_models_go_through_torch_func_like_any_other():
    models = [mlp(seed) for seed in range(3)]
    for seed, model in enumerate(models):
        masks = half(model, seed)
        masks.hold(model, optimizer := OPTIMISERS["sgd"](model.parameters()))
        train(model, optimizer, steps=1)  # a forward pass, after which torch's own pruned models cannot be copied
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])

    def loss(parameters, buffers, x, y):
        return nn.functional.cross_entropy(functional_call(models[0], (parameters, buffers), (x,)), y)

    stacked = vmap(grad(loss), in_dims=(0, 0, None, None))(*stack_module_state(models), x, y)
    for index, model in enumerate(models):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(stacked[name][index], parameter.grad)


def test_a_masked_model_exports():
    model = mlp()
    half(model).apply_(model)
    x = torch.randn(2, 6)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


# ----------------------------------------------------------------------------------------------------------- files


def test_a_file_that_is_no_masks_file_is_one_line_that_names_it(tmp_path):
    absent, broken, other = (tmp_path / name for name in ("absent", "broken", "other"))
    broken.write_bytes(b"\x10" * 40)
    save_file({"first.weight": torch.tensor([0.5])}, other)
    for path, words in ((absent, "no such file"), (broken, "not a file of masks"), (other, "only 1 and 0")):
        with pytest.raises(MaskError) as error:
            Masks.load(path)
        assert str(error.value).startswith(f"{path}: ")
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_a_save_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "masks.safetensors"
    old = half(mlp())
    old.save(path)

    def full(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(MaskError, match="no space left"):
        Masks.ones(mlp()).save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert Masks.load(path) == old
    monkeypatch.undo()
    with pytest.raises(MaskError, match="the folder does not exist"):
        old.save(tmp_path / "absent" / "masks")


# ---------------------------------------------------------------------------------------------------------- tables


def test_the_text_shows_every_layer_and_the_total():
    lines = repr(Masks({"a.weight": torch.tensor([[True, False], [False, False]]), "b.weight": torch.ones(2, 2)}))
    head, _, titles, _, first, second, _, total = lines.splitlines()
    assert head == "Masks of 2 parameters, sparsity 0.3750"
    assert titles.split() == ["parameter", "shape", "kept", "total", "density"]
    assert first.split() == ["a.weight", "2", "x", "2", "1", "4", "0.2500", "██▌"]
    assert second.split() == ["b.weight", "2", "x", "2", "4", "4", "1.0000", "██████████"]
    assert total.split()[:4] == ["total", "5", "8", "0.6250"]
    assert "sparsity 0.0000" in repr(Masks({}))


def test_a_layer_with_hardly_anything_left_does_not_look_empty():
    nearly, empty = torch.zeros(1000), torch.zeros(1000)
    nearly[0] = 1
    rows = repr(Masks({"nearly": nearly, "empty": empty})).splitlines()
    assert rows[4].endswith("▏")
    assert not rows[5].endswith("▏")


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open, self.seen, self.text = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_escaped_well_formed_and_small_even_for_many_layers():
    evil = "<script>alert('x')</script>&.weight"
    names = [evil, *(f"{'deep.' * 30}{i}.weight" for i in range(1000))]
    text = Masks({name: torch.ones(2, 2) for name in names})._repr_html_()
    parser = _Tags()
    parser.feed(text)
    assert parser.seen == {"table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"}
    assert not parser.open
    assert evil in parser.text
    assert "... 953 more" in parser.text
    assert len(text.encode()) < 20_000


def test_optimisers_that_share_a_model_hold_their_own_parts():
    model = mlp()
    masks = half(model)
    parts = [["first"], ["second", "last"]]
    for layers in parts:
        own = [parameter for layer in layers for parameter in model.get_submodule(layer).parameters()]
        optimizer = torch.optim.SGD(own, lr=0.1, momentum=0.9)
        with pytest.raises(MaskError, match="where another optimiser trains that one, hold with each"):
            masks.hold(model, optimizer)
        with Masks({name: mask for name, mask in masks.items() if name.split(".")[0] in layers}).hold(model, optimizer):
            train(model, optimizer)
    assert revived(model, masks) == 0
    with pytest.raises(MaskError, match=r"hold\(SGD, Sequential\): the model comes first"):
        masks.hold(optimizer, model)
