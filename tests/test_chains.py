"""Shrinking keeps the function, reaches its fixed point at once and says what it cannot do."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunelab.masks import MaskError
from prunelab.models import mlp
from prunelab.structure import shrink
from prunelab.structure.chains import (
    ShrinkError,
    chain,
    compact,
    cut,
    live_units,
    remove_units,
    spread,
    then,
    whole_index,
)

pytestmark = pytest.mark.filterwarnings("ignore::prunelab.structure.NotRemoved")


def lenet(padding: int, hidden: int) -> nn.Sequential:
    model = nn.Sequential()
    for name, module in {
        "conv_1": nn.Conv2d(1, 6, 3, padding=padding),
        "relu_1": nn.ReLU(),
        "pool_1": nn.MaxPool2d(2),
        "conv_2": nn.Conv2d(6, 5, 3, padding=padding),
        "relu_2": nn.ReLU(),
        "flatten": nn.Flatten(),
        "dense": nn.LazyLinear(hidden),
        "relu_3": nn.ReLU(),
        "output": nn.Linear(hidden, 3),
    }.items():
        model.add_module(name, module)
    model(torch.zeros(1, 1, 10, 10))
    return model


def random_masks(model: nn.Module, density: float) -> dict[str, torch.Tensor]:
    return {name: torch.rand_like(p) < density for name, p in model.named_parameters() if name.endswith("weight")}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(0.02, 0.6), kind=st.sampled_from(["mlp", "valid", "same"]))
def test_outputs_stay_and_a_second_call_finds_nothing(seed, density, kind):
    torch.manual_seed(seed)
    model = mlp(9, 16, 12, 8, 4) if kind == "mlp" else lenet(int(kind == "same"), 16)
    x = torch.randn(7, 9) if kind == "mlp" else torch.randn(7, 1, 10, 10)
    masks = random_masks(model, density)
    masked = shrink_free_copy(model, masks)
    try:
        small = compact(model, masks)
    except ShrinkError:
        assert torch.allclose(
            masked(x), masked(x)[:1].expand(7, -1), atol=1e-6
        )  # refused only where the input no longer matters
        return
    torch.testing.assert_close(small.model(x), masked(x), rtol=1e-5, atol=1e-5)
    again = compact(small.model, {name: small.cut(name, mask) for name, mask in masks.items()})
    assert (
        {n: len(u) for n, u in again.units.items()}
        == {n: len(u) for n, u in small.units.items()}
        == live_units(model, masks)
    )


def shrink_free_copy(model, masks):
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            masked.get_parameter(name).mul_(mask)
    return masked


def by_hand() -> nn.Sequential:
    """2 - 3 - 2 - 1; unit 1 of the first layer has no input, unit 0 of the second feeds nothing."""
    model = mlp(2, 3, 2, 1)
    with torch.no_grad():
        model.hidden_1.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]))
        model.hidden_1.bias.copy_(torch.tensor([0.0, 5.0, -1.0]))
        model.hidden_2.weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 0.0]]))
        model.hidden_2.bias.copy_(torch.tensor([1.0, -1.0]))
        model.output.weight.copy_(torch.tensor([[0.0, 3.0]]))
        model.output.bias.copy_(torch.tensor([0.5]))
    return model


def test_a_constant_unit_moves_into_the_next_bias_by_hand():
    small = compact(by_hand())
    # Unit 1 emits relu(5) = 5, of which 2 * 5 reaches the second unit of layer 2: -1 + 10 = 9. Unit 2 feeds only the
    # unread unit 0.
    assert small.units["hidden_1"].tolist() == [0]
    assert small.units["hidden_2"].tolist() == [1]
    assert small.model.hidden_2.bias.tolist() == [9.0]
    assert small.model.output.weight.tolist() == [[3.0]]


def test_moments_and_masks_are_cut_to_the_same_places():
    model = by_hand()
    small = compact(model)
    numbered = torch.arange(6.0).view(2, 3)
    assert small.cut("hidden_2.weight", numbered).tolist() == [[3.0]]
    assert small.cut("hidden_1.bias", torch.tensor([7.0, 8.0, 9.0])).tolist() == [7.0]


def test_two_removals_compose_to_the_coordinates_of_the_first_model():
    model = mlp(4, 6, 5, 2)
    first = remove_units(model, {"hidden_1": torch.tensor([1, 3, 4]), "hidden_2": torch.tensor([0, 2, 3, 4])})
    second = remove_units(first.model, {"hidden_1": torch.tensor([0, 2]), "hidden_2": torch.tensor([1, 3])})
    index = then(then(whole_index(model), first.index), second.index)
    assert index["hidden_2.weight"][1].tolist() == [1, 4]
    assert index["hidden_2.weight"][0].tolist() == [2, 4]
    torch.testing.assert_close(
        cut(model.hidden_2.weight.detach(), index["hidden_2.weight"]), second.model.hidden_2.weight.detach()
    )
    back = spread(second.model.hidden_2.weight.detach(), index["hidden_2.weight"], model.hidden_2.weight.shape)
    assert int((back != 0).sum()) == 4
    assert back[4, 1] == model.hidden_2.weight[4, 1]


def test_a_filter_takes_all_its_columns_of_the_flattened_map_along():
    model = lenet(0, 4)
    small = remove_units(model, {"conv_2": torch.tensor([1, 4])})
    assert small.model.dense.in_features == model.dense.in_features // 5 * 2
    assert small.model(torch.zeros(2, 1, 10, 10)).shape == (2, 3)


def test_the_input_model_is_untouched():
    model = by_hand()
    before = {name: p.clone() for name, p in model.named_parameters()}
    compact(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_dead_path_is_refused_by_the_name_of_its_layer():
    model = mlp(3, 4, 4, 2)
    masks = {"hidden_2.weight": torch.zeros(4, 4, dtype=torch.bool)}
    with pytest.raises(ShrinkError, match=r"layer 'hidden_[12]' has no live unit left"):
        shrink(model, masks, torch.randn(2, 3))


def test_an_unknown_module_is_named():
    with pytest.raises(ShrinkError, match=r"module '1' \(Softmax\) is not understood"):
        chain(nn.Sequential(nn.Linear(2, 2), nn.Softmax(1), nn.Linear(2, 2)))
    with pytest.raises(ShrinkError, match=r"not a plain nn\.Sequential"):
        chain(nn.ModuleList([nn.Linear(2, 2)]))


RELU = nn.ReLU()


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(9, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
        nn.Sequential(nn.Linear(9, 6), RELU, nn.Linear(6, 6), RELU, nn.Linear(6, 3)),
        nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.Sigmoid(), nn.Flatten(), nn.Linear(6, 3)),
        nn.Sequential(
            nn.Conv2d(1, 6, 2), nn.Sigmoid(), nn.AvgPool2d(2, divisor_override=1), nn.Flatten(), nn.Linear(6, 3)
        ),
    ],
    ids=["in place", "one activation twice", "flatten of what is flat", "pooling that sums"],
)
def test_outputs_stay_whatever_a_chain_is_made_of(model):
    name = next(name for name, _ in model.named_parameters())
    with torch.no_grad():
        model.get_parameter(name.replace("weight", "bias")).copy_(torch.linspace(-1, 1, 6))
    masks = {name: torch.arange(6).view(-1, *[1] * (model.get_parameter(name).dim() - 1)) % 3 > 0}
    masks[name] = masks[name].expand_as(model.get_parameter(name))  # units 0 and 3 are constant
    x = torch.randn(7, 1, 3, 3) if isinstance(model[0], nn.Conv2d) else torch.randn(7, 9)
    before = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(shrink(model, masks, x)(x), shrink_free_copy(model, masks)(x))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_nothing_of_the_original_is_in_the_smaller_chain():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 2))
    model[0].requires_grad_(False)
    model[3].eval()
    small = shrink(model, {"0.weight": torch.arange(6).view(-1, 1).expand(6, 4) > 2}, torch.randn(2, 4))
    assert [p.requires_grad for p in small.parameters()] == [False, False, True, True]
    assert [module.training for module in small] == [True, True, True, False]
    assert not {id(module) for module in small} & {id(module) for module in model}
    assert (small[0].out_features, small[3].in_features) == (3, 3)


@pytest.mark.parametrize(
    ("masks", "error", "why"),
    [
        ({"zzz.weight": torch.ones(4, 3)}, MaskError, r"no parameter 'zzz\.weight'"),
        ({"hidden_1.weight": torch.ones(2, 2)}, MaskError, "shape 4 x 3, its mask 2 x 2"),
        (torch.ones(4, 3), ShrinkError, "masks should map names to tensors, not be a Tensor"),
    ],
)
def test_masks_of_another_model_are_refused(masks, error, why):
    with pytest.raises(error, match=why):
        shrink(mlp(3, 4, 2), masks, torch.randn(2, 3))
