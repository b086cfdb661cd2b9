"""The registry, ``prune`` on a model of one's own, and the plain methods."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from acting import looked_at
from torch import nn
from torch.nn.utils import prune as torch_prune

import prunelab
from prunelab import PrunelabError, pruners
from prunelab.masks import MaskError, Masks
from prunelab.pruners.magnitude import Magnitude
from prunelab.pruners.random import Random
from prunelab.pruners.scores import input_norms
from prunelab.settings import Prune


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 10))


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 10))


WHOLE = [name for name, method in pruners.METHODS.items() if not method.pruner.while_training]


FILTERS = [name for name in WHOLE if pruners.build(Prune(name)).granularity == "filter"]


def fitting(method: str) -> nn.Module:
    if method == "slimming":  # asks for BatchNorm
        return nn.Sequential(*convnet()[:1], nn.BatchNorm2d(8), *convnet()[1:])
    return convnet() if method in FILTERS else mlp()


def start(method: str) -> dict[str, torch.Tensor]:
    """For methods that compare with the weights before training."""
    draw = torch.Generator().manual_seed(3)
    return {name: p + torch.randn(p.shape, generator=draw) for name, p in fitting(method).named_parameters()}


def data(method: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For methods that look at data."""
    source = torch.Generator().manual_seed(0)
    shape = (1, 5, 5) if method in FILTERS else (20,)
    return [(torch.randn(12, *shape, generator=source), torch.arange(12) % 10)]


# -------------------------------------------------------------------------------------------------- every method


@pytest.mark.parametrize("method", WHOLE)
def test_pruning_leaves_the_model_as_it_was(method):
    model = fitting(method).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    masks = prunelab.prune(model, method, 0.5, batches=data(method), start=start(method))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    masks.check(model)


@pytest.mark.parametrize("method", WHOLE)
def test_the_same_seed_gives_the_same_masks(method):
    options = {"batches": data(method), "start": start(method), "seed": 5}
    one, same = (prunelab.prune(fitting(method), method, 0.3, **options) for _ in range(2))
    assert one == same


@pytest.mark.parametrize("method", WHOLE)
def test_rounds_only_ever_remove(method):
    model = fitting(method)
    options = {"batches": data(method), "start": start(method)}
    masks = prunelab.prune(model, method, 0.3, **options)
    for seed in range(3):
        fewer = prunelab.prune(model, method, 0.3, current=masks, seed=seed, **options)
        assert fewer & masks == fewer
        masks = fewer


@pytest.mark.parametrize("method", list(pruners.METHODS))
def test_methods_are_frozen_and_build_from_their_name_alone(method):
    pruner = pruners.build(Prune(method=method))
    with pytest.raises(dataclasses.FrozenInstanceError):
        pruner.granularity = "weight"


def test_every_ranking_is_what_its_masks_say():
    for method in WHOLE:
        pruner, model = pruners.build(Prune(method=method)), fitting(method)
        if isinstance(pruner, pruners.Ranking) and pruner.measured == 1:
            current = pruners.first_masks(model, pruner)
            first = functools.partial(start, method)
            one, other = (looked_at(model, data(method), current, start=first) for _ in range(2))
            scores = pruner.scores(one)
            assert pruner.select(one, scores, 0.4) == pruner.prune(other, 0.4).masks


# ----------------------------------------------------------------------------------------------- what they remove


@pytest.mark.parametrize("amount", [0, 0.1, 0.5, 0.83, 0.95])
def test_magnitude_keeps_the_weights_that_torch_keeps(amount):
    ours, theirs = mlp(), mlp()
    masks = prunelab.prune(ours, "magnitude", amount, allow_empty=True)
    layers = [(layer, "weight") for layer in theirs if isinstance(layer, nn.Linear)]
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=amount)
    assert all(torch.equal(mask, theirs.get_buffer(f"{name}_mask").bool()) for name, mask in masks.items())


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_amount_is_a_fraction_of_what_remains_and_exact(method):
    model, masks = mlp(), None
    for kept in (
        900,
        450,
        225,
        113,
        57,
    ):  # 1800 weights, half of the remaining ones each time; 112.5 and 56.5 round to even
        masks = prunelab.prune(model, method, 0.5, current=masks, allow_empty=True)
        assert masks.kept == kept


def test_zeros_of_a_masked_model_do_not_use_up_the_amount():
    model = mlp()
    first = prunelab.prune(model, "magnitude", 0.5)
    first.apply_(model)
    assert prunelab.prune(model, "magnitude", 0.5, current=first).kept == 450


def test_layer_scope_removes_the_same_fraction_everywhere():
    masks = prunelab.prune(mlp(), "magnitude", 0.4, scope="layer")
    assert [row["density"] for row in masks.by_layer()] == pytest.approx([0.6, 0.6, 0.6])


def test_biases_go_only_with_their_units():
    assert set(prunelab.prune(mlp(), "magnitude", 0.5)) == {"0.weight", "2.weight", "4.weight"}
    masks = prunelab.prune(mlp(), "l1_neuron", 0.5)
    for layer in "02":
        assert torch.equal(masks[f"{layer}.weight"].any(1), masks[f"{layer}.bias"])
        assert torch.equal(masks[f"{layer}.weight"].all(1), masks[f"{layer}.bias"])
    assert sum(int(masks[f"{layer}.bias"].sum()) for layer in "02") == 30
    assert masks["4.weight"].all()


def test_filters_with_the_smallest_norm_go():
    model = convnet()
    for norm, method in ((1, "l1_filter"), (2, "l2_filter")):
        masks = prunelab.prune(model, method, 0.5, scope="layer")
        for layer in (0, 2):
            lengths = torch.linalg.vector_norm(model[layer].weight.detach(), norm, dim=(1, 2, 3))
            kept = masks[f"{layer}.bias"]
            assert int(kept.sum()) == len(kept) // 2
            assert lengths[kept].min() > lengths[~kept].max()


def test_over_all_layers_units_compete_by_their_length_relative_to_their_own_layer():
    model = convnet()  # the norms of the second layer are longer, since it has eight times as many inputs
    lengths = {layer: model[layer].weight.detach().abs().sum((1, 2, 3)) for layer in (0, 2)}
    assert lengths[0].max() < lengths[2].min()
    relative = torch.cat([length / length.mean() for length in lengths.values()])
    masks = prunelab.prune(model, "l1_filter", 0.5)
    kept = torch.cat([masks["0.bias"], masks["2.bias"]])
    assert int(kept.sum()) == 12
    assert relative[kept].min() > relative[~kept].max()
    model[0].weight.data *= 100
    assert prunelab.prune(model, "l1_filter", 0.5) == masks


def test_a_layer_of_zeros_still_has_scores():
    model = convnet()
    model[0].weight.data.zero_()
    assert prunelab.prune(model, "l2_filter", 0.25).counts["0.bias"] == 2


def test_a_pruned_neuron_gives_nothing():
    model = mlp()
    masks = prunelab.prune(model, "random_neuron", 0.5)
    masks.apply_(model)
    hidden = model[:2](torch.randn(5, 20))
    assert not hidden[:, ~masks["0.bias"]].any()
    assert hidden[:, masks["0.bias"]].any()


def test_random_pruning_is_random_and_ignores_the_weights():
    model, other = mlp(), copy.deepcopy(mlp()).apply(lambda m: m.weight.data.zero_() if hasattr(m, "weight") else None)
    assert prunelab.prune(model, "random", 0.5, seed=3) == prunelab.prune(other, "random", 0.5, seed=3)
    assert prunelab.prune(model, "random", 0.5, seed=3) != prunelab.prune(model, "random", 0.5, seed=4)


def test_none_prunes_nothing():
    assert prunelab.prune(mlp(), "none", 0.9) == Masks.ones(mlp())


# ------------------------------------------------------------------------------------------------------- selection


def test_only_the_chosen_layers_are_pruned_and_the_others_stay_as_they_were():
    model = mlp()
    assert set(prunelab.prune(model, "magnitude", 0.5, layers=["2"])) == {"2.weight"}
    first = prunelab.prune(model, "magnitude", 0.5)
    second = prunelab.prune(model, "magnitude", 0.5, layers=["2"], current=first)
    assert second["0.weight"].equal(first["0.weight"])
    assert second.counts["2.weight"] == round(first.counts["2.weight"] / 2)


def test_a_pruner_of_ones_own_needs_no_registry():
    @dataclasses.dataclass(frozen=True)
    class First(pruners.Pruner):
        def prune(self, now, amount):
            gone = torch.zeros_like(now.masks["0.weight"])
            gone[0, 0] = True
            return pruners.Step(now.masks & Masks({"0.weight": ~gone}))

    assert prunelab.prune(mlp(), First(), 0.5).kept == 1799
    assert prunelab.prune(mlp(), Magnitude(scope="layer"), 0.5) == prunelab.prune(
        mlp(), "magnitude", 0.5, scope="layer"
    )


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("magnitude", 1.2), {}, "amount = 1.2: should be at least 0 and below 1"),
        (("magnitde", 0.5), {}, "there is no pruning method 'magnitde': did you mean 'magnitude'?"),
        (("magnitude", 0.5), {"nrom": 1}, "method 'magnitude' has no option 'nrom': did you mean 'norm'?"),
        (("magnitude", 0.5), {"norm": 3}, "norm = 3"),
        (("l1_filter", 0.5), {"norm": 2}, "method 'l1_filter' itself sets norm = 1"),
        (("l1_filter", 0.5), {"granularity": "weight"}, "method 'l1_filter' itself sets granularity = 'filter'"),
        (("magnitude", 0.5), {"layers": ["1"]}, "layer '1' is a ReLU"),
        (("magnitude", 0.5), {"layers": ["9"]}, "no layer '9'"),
        (("l1_filter", 0.5), {}, "no masked convolution before the last layer"),
        (("l1_neuron", 0.5), {"layers": ["0", "4"]}, "layer '4' has no neurons that may go"),
        (("magnitude", 0.5), {"seed": -1}, "seed = -1"),
        (("dyprune", 0.5), {}, "'dyprune' does not prune finished models"),
        ((Magnitude(), 0.5), {"norm": 2}, "option 'norm' comes with a pruner that is already built"),
        ((Magnitude, 0.5), {}, "does not prune finished models"),
        (("taylor", 0.5), {"batches": torch.zeros(4, 20)}, "batches is a bare tensor: give batches=[(x, y)]"),
        (("movement", 0.5), {"start": {}}, "give start=, their state_dict, which has no '0.weight'"),
        (
            ("movement", 0.5),
            {"start": dict(convnet().named_parameters())},
            "0.weight has shapes (8, 1, 3, 3) in start=",
        ),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, options, words):
    with pytest.raises(PrunelabError) as error:
        prunelab.prune(mlp(), *arguments, **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_model_is_refused():
    with pytest.raises(PrunelabError, match="model is a dict"):
        prunelab.prune({}, "magnitude", 0.5)


def test_masks_of_another_model_are_refused():
    with pytest.raises(MaskError, match=r"0\.weight: the parameter has shape"):
        prunelab.prune(mlp(), "magnitude", 0.5, current=Masks.ones(convnet(), ["0"]))


def test_a_layer_that_would_die_is_named_unless_that_is_allowed():
    model = mlp()
    model[2].weight.data *= 1e-6
    with pytest.raises(MaskError, match=r"layer '2' would lose all 900 .*allow_empty=True"):
        prunelab.prune(model, "magnitude", 0.6)
    assert prunelab.prune(model, "magnitude", 0.6, allow_empty=True).counts["2.weight"] == 0
    assert prunelab.prune(model, "magnitude", 0.6, scope="layer").counts["2.weight"] == 360


def test_a_path_that_would_end_is_named_although_each_layer_keeps_weights():
    model = mlp()
    for layer in (0, 2):
        model[layer].weight.data.fill_(0.1)
    model[0].weight.data[0, 0] = 5.0
    model[2].weight.data[0, 1] = 5.0
    with pytest.raises(MaskError, match="layer '2' would die, since no kept weight connects it with the inputs"):
        prunelab.prune(model, "magnitude", 1498 / 1500, layers=["0", "2"])
    broken = prunelab.prune(model, "magnitude", 1498 / 1500, layers=["0", "2"], allow_empty=True)
    assert broken.kept == 2
    prunelab.prune(model, "magnitude", 0.5, layers=["4"], current=broken)  # it was dead before: no new damage


def test_random_fields_are_those_of_magnitude_without_the_norm():
    names = [{field.name for field in dataclasses.fields(cls)} for cls in (Magnitude, Random)]
    assert names[0] - names[1] == {"norm", "combine"}


# ------------------------------------------------------------------------------------------- a fraction for each layer


def test_layers_with_amounts_of_their_own_may_not_cut_the_last_path_together():
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(3)])
    model[0].weight.data = torch.tensor([[5.0, 5.0], [1.0, 1.0]])  # the second unit goes
    model[1].weight.data = torch.tensor([[1.0, 5.0], [1.0, 5.0]])  # and all that does not read it
    amounts = {"0": 0.5, "1": 0.5}
    with pytest.raises(MaskError, match="layer '1' would die"):
        prunelab.prune(model, "magnitude", amounts)
    assert prunelab.prune(model, "magnitude", amounts, allow_empty=True).kept == 4
    assert prunelab.prune(model, "magnitude", {"0": 0.5}).kept == 2


def test_random_masks_of_equal_layers_differ_and_batches_last_for_all_of_them():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    masks = prunelab.prune(model, "random", {"0": 0.5, "2": 0.5})
    assert not torch.equal(masks["0.weight"], masks["2.weight"])
    batches = [(torch.randn(8, 16), torch.arange(8))]
    by_layer = [
        prunelab.prune(model, "taylor", {"0": 0.5, "2": 0.3}, batches=each) for each in (batches, iter(batches))
    ]
    assert by_layer[0] == by_layer[1]


def test_other_ways_to_say_the_same():
    model, half = mlp(), np.float32(0.5)
    wanted = prunelab.prune(model, "magnitude", 0.5)
    assert prunelab.prune(model, "magnitude", half, layers=None) == wanted
    again = prunelab.prune(model, "magnitude", {"0": half}, current=dict(wanted))
    assert again == prunelab.prune(model, "magnitude", 0.5, layers=["0"], current=wanted)


@pytest.mark.parametrize("method", ["magnitude", "l1_neuron", "taylor", "random_neuron"])
def test_a_layer_whose_weight_is_computed_is_in_the_way_of_no_other(method):
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[4])
    options = {"layers": ["0"], "batches": data(method)}
    masks = prunelab.prune(model, method, 0.5, **options)
    assert masks == prunelab.prune(mlp(), method, 0.5, **options)
    with pytest.raises(MaskError, match=r"layer '4' is computed.* prune the others by name, with layers="):
        prunelab.prune(model, method, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["l1_neuron", "l2_neuron", "glance"])
def test_scores_of_half_precision_are_summed_in_float32(method, dtype):
    model = nn.Sequential(nn.Linear(4096, 4), nn.ReLU(), nn.Linear(4, 3)).to(dtype)
    model[0].weight.data.fill_(20.0)  # sums of 81,920 in size, where 65,504 is the largest of float16
    model[0].weight.data[:2, :60] += 0.125  # too little for one of 81,920 in bfloat16
    model[0].weight.data[0] *= -1
    for seed in range(4):  # ties would draw lots
        assert prunelab.prune(model, method, 0.5, seed=seed)["0.bias"].tolist() == [True, True, False, False]


@pytest.mark.parametrize("method", ["taylor", "wanda"])
def test_data_of_half_precision_may_add_up_to_more_than_it_can_hold(method):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)), 90 * torch.rand(64, 8)
    batches = [(x.half(), torch.arange(64) % 3)]  # 64 squares of up to 8,100 each
    scores = pruners.build(Prune(method)).scores
    for score in scores(looked_at(model.half(), batches)).values():
        assert score.dtype == torch.float32
        assert score.isfinite().all()
    if method == "wanda":
        norms = input_norms(looked_at(model, batches), ["0"])["0"]
        assert norms.tolist() == pytest.approx(x.norm(dim=0).tolist(), rel=1e-3)


def test_a_lazy_layer_that_is_not_asked_for_stands_in_nobodys_way():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(2))
    assert pruners.prune(model, "l1_neuron", 0.5, layers=["0"]).counts["0.weight"] == 12
