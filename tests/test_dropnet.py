"""DropNet: importance by hand, the published counts, the paper's and the code's way of choosing, the oracle."""

import dataclasses

import numpy as np
import pytest
import torch
from acting import looked_at
from torch import nn

import prunelab
from prunelab import models, pruners
from prunelab.errors import PrunelabError
from prunelab.masks import MaskError
from prunelab.pruners.activations import pieces, unit_sums
from prunelab.pruners.dropnet import DropNet, drop_units
from prunelab.pruners.oracle import Oracle, losses_without
from prunelab.pruners.units import unit_masks
from prunelab.runs import Store
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.training.experiment import run_all


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def all_units(*sizes):
    return {f"hidden_{n}": torch.ones(size, dtype=torch.bool) for n, size in enumerate(sizes, 1)}


def identity() -> nn.Sequential:
    """Two inputs go through two hidden units as they are."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
    return model


# ------------------------------------------------------------------------------------------------------ importance


@pytest.mark.parametrize(
    ("metric", "expected"), [("minimum", [2.5, 1.0]), ("maximum", [-2.5, -1.0]), ("apoz", [1.0, 0.25])]
)
def test_the_importance_of_a_neuron_is_the_mean_of_its_activations(metric, expected):
    x = torch.tensor([[1.0, -5.0], [2.0, 4.0], [3.0, 0.0], [4.0, -1.0]])
    for variant in ("faithful", "corrected"):
        pruner = DropNet(metric, variant=variant)
        assert pruner.scores(looked_at(identity(), [(x, None)]))["0"].tolist() == expected


@pytest.mark.parametrize(
    ("variant", "minimum", "apoz"),
    [("faithful", [2.0, 0.25], [0.5, 0.5]), ("corrected", [3.0, 0.25], [1.0, 0.25])],
)
def test_maps_with_both_signs_are_where_text_and_code_differ(variant, minimum, apoz):
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Identity(), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2).view(2, 2, 1, 1))
        model[0].bias.zero_()
    # The maps of filter 0 have means 4 and 0, and four positions of sizes 3, 5, 2, 2; those of filter 1: 0, 1 | 0, 0.
    x = torch.tensor([[[3.0, 5.0], [0.0, 1.0]], [[2.0, -2.0], [0.0, 0.0]]]).view(2, 2, 1, 2)
    for metric, expected in (("minimum", minimum), ("apoz", apoz)):
        scores = DropNet(metric, variant=variant).scores(looked_at(model, [x]))
        assert scores["0"].tolist() == expected


@pytest.mark.parametrize("name", ["dropnet_a", "dropnet_b"])
def test_importance_does_not_depend_on_how_the_data_are_cut(name):
    model = models.build(Model(name, (5, 7)), (1, 8, 8), 3, 0).train()
    x = torch.rand(100, 1, 8, 8)
    whole, small, odd = (DropNet().scores(looked_at(model, cut)) for cut in ([(x, x)], x.split(7), x.split(64)))
    for layer, score in whole.items():
        torch.testing.assert_close(small[layer], score)
        torch.testing.assert_close(odd[layer], score)
    assert model.training
    assert list(whole) == list(DropNet("random").scores(looked_at(model)))


def test_pieces_are_of_the_size_that_is_asked_for():
    x = torch.arange(23)
    for cut in (1, 5, 7, 23):
        got = list(pieces(x.split(cut), 6))
        assert [len(piece) for piece in got] == [6, 6, 6, 5]
        assert torch.equal(torch.cat(got), x)


def test_activations_of_functions_and_of_a_module_that_works_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.relu = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.c(self.relu(self.b(self.relu(self.a(x)))))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(50, 2)
    sums, samples = unit_sums(model, ["a", "b"], [x], lambda a, at: a.sum(0))
    first = model.a(x).relu()
    assert samples == 50
    torch.testing.assert_close(sums["a"].float(), first.sum(0).detach())
    torch.testing.assert_close(sums["b"].float(), model.b(first).relu().sum(0).detach())


def test_without_data_there_is_no_importance():
    for method in ("dropnet", "apoz", "dropnet_oracle"):
        with pytest.raises(PrunelabError, match="batches="):
            prunelab.prune(identity(), method, 0.5)
    assert prunelab.prune(identity(), "dropnet", 0.5, metric="random")["0.bias"].sum() == 1


# ---------------------------------------------------------------------------------------------------------- counts


def path(sizes, scope, amount=0.2, faithful=False, rounds=30):
    """Units left round by round, until there are none."""
    units, source, found = all_units(*sizes), draw(), [sum(sizes)]
    scores = {layer: torch.rand(len(keep), generator=source) for layer, keep in units.items()}
    while found[-1] and len(found) < rounds:
        units = drop_units(scores, units, amount, source, scope=scope, faithful=faithful)
        found.append(sum(int(keep.sum()) for keep in units.values()))
    return found


@pytest.mark.parametrize("faithful", [False, True])
def test_the_counts_are_those_of_the_paper(faithful):
    nodes = [80, 64, 52, 42, 34, 28, 23, 19, 16, 13, 11, 9, 8, 7, 6, 5, 4]
    assert path((40, 40), "global", faithful=faithful)[:17] == nodes
    filters = [384, 308, 247, 198, 159, 128, 103, 83, 67, 54, 44, 36]
    assert path((64, 64, 128, 128), "global", faithful=faithful)[:12] == filters
    layers = [40, 32, 26, 21, 17, 14, 12, 10, 8, 7, 6, 5, 4, 3, 2]
    assert path((40, 40), "layer", faithful=faithful)[:15] == [2 * n for n in layers]
    cached = [384, 310, 250, 202, 164, 134, 110, 90, 74, 62, 50, 42, 36]
    assert path((64, 64, 128, 128), "layer", faithful=faithful)[:13] == cached


def test_at_least_one_goes_and_none_for_amount_0():
    assert path((3, 1), "global", 0.01) == [4, 3, 2, 1, 0]
    assert path((3, 1), "layer", 0.01) == [4, 2, 1, 0]
    assert path((3, 1), "global", 0.0, rounds=3) == [4, 4, 4]


def test_with_layer_scope_the_small_layer_is_empty_first():
    units, scores = all_units(2, 4), {"hidden_1": torch.rand(2), "hidden_2": torch.rand(4)}
    for _ in range(2):
        units = drop_units(scores, units, 0.2, draw(), scope="layer", faithful=True)
    assert [int(keep.sum()) for keep in units.values()] == [0, 2]


# ------------------------------------------------------------------------------------------------- who is chosen


def test_corrected_removes_the_k_lowest_whoever_has_them():
    scores = {"hidden_1": torch.tensor([5.0, 1.0, 9.0]), "hidden_2": torch.tensor([2.0, 8.0, 3.0, 7.0])}
    after = drop_units(scores, all_units(3, 4), 0.45, draw())  # int(3.15) = 3
    assert after["hidden_1"].tolist() == [True, False, True]
    assert after["hidden_2"].tolist() == [False, True, False, True]


def test_corrected_breaks_ties_at_random_among_all_layers():
    scores = {"hidden_1": torch.zeros(2), "hidden_2": torch.zeros(2)}
    gone = torch.zeros(4)
    for seed in range(400):
        after = drop_units(scores, all_units(2, 2), 0.25, draw(seed))
        gone += ~torch.cat([*after.values()])
    assert gone.sum() == 400
    assert gone.min() > 60


def test_faithful_spares_one_of_the_k_plus_1_lowest_in_the_last_layer_that_has_any():
    scores = {"hidden_1": torch.tensor([5.0, 1.0, 9.0]), "hidden_2": torch.tensor([2.0, 8.0, 3.0, 7.0])}
    seen = set()
    for seed in range(50):  # k = 2: candidates 1 | 2, 3; the first layer gives its own, one of the two others goes
        after = drop_units(scores, all_units(3, 4), 0.3, draw(seed), faithful=True)
        assert after["hidden_1"].tolist() == [True, False, True]
        seen.add(tuple(after["hidden_2"].tolist()))
    assert seen == {(False, True, True, True), (True, True, False, True)}


def test_faithful_by_layer_takes_any_k_of_the_lowest_k_plus_1():
    scores = {"hidden_1": torch.tensor([4.0, 1.0, 2.0, 3.0, 5.0])}
    gone = torch.zeros(5)
    for seed in range(300):
        gone += ~drop_units(scores, all_units(5), 0.4, draw(seed), scope="layer", faithful=True)["hidden_1"]
    assert gone.sum() == 600
    assert gone[[0, 4]].tolist() == [0, 0]
    assert gone[1:4].min() > 150


def test_faithful_with_ties_empties_the_layers_next_to_the_input():
    scores = {"hidden_1": torch.ones(4), "hidden_2": torch.ones(4)}  # as APoZ behind BatchNorm
    after = drop_units(scores, all_units(4, 4), 0.5, draw(), faithful=True)
    assert [int(keep.sum()) for keep in after.values()] == [0, 4]


@pytest.mark.parametrize("seed", range(5))
def test_one_at_a_time_the_code_takes_exactly_the_lowest_and_the_first_of_equals(seed):
    scores = {"hidden_1": torch.tensor([5.0, 2.0, 9.0]), "hidden_2": torch.tensor([2.0, 8.0])}
    after = drop_units(scores, all_units(3, 2), 0, draw(seed), faithful=True, one=True)
    assert after["hidden_1"].tolist() == [True, False, True]
    assert after["hidden_2"].all()
    after = drop_units(scores, after, 0, draw(seed), faithful=True, one=True)
    assert after["hidden_2"].tolist() == [False, True]


def test_random_of_the_oracle_figures_takes_the_first_unit_of_each_layer():
    model = models.build(Model("dropnet_a", (4, 4)), (1, 2, 2), 3, 0)
    pruner = DropNet("random", "layer", "faithful", one=True, allow_empty=True)
    masks = pruners.first_masks(model, pruner, ("hidden_1", "hidden_2"))
    for left in (3, 2, 1, 0):
        masks = pruner.prune(looked_at(model, masks=masks, generator=draw(left)), 0.0).masks
        for layer in ("hidden_1", "hidden_2"):
            assert masks[f"{layer}.bias"].tolist() == [False] * (4 - left) + [True] * left
    corrected = DropNet("random", "layer", one=True)
    gone = {
        tuple(corrected.prune(looked_at(model, generator=draw(s)), 0.0).masks["hidden_1.bias"].tolist())
        for s in range(40)
    }
    assert len(gone) == 4


@pytest.mark.parametrize("variant", ["faithful", "corrected"])
def test_random_takes_every_unit_equally_often_whatever_its_layer(variant):
    model = models.build(Model("dropnet_a", (2, 2)), (1, 2, 2), 3, 0)
    pruner, gone = DropNet("random", variant=variant), torch.zeros(4)
    for seed in range(400):
        masks = pruner.prune(looked_at(model, generator=draw(seed)), 0.25).masks
        gone += torch.cat([~masks[f"hidden_{n}.bias"] for n in (1, 2)])
    assert gone.sum() == 400
    assert gone.min() > 70


def test_maximum_removes_the_mirror_image():
    x = torch.tensor([[1.0, 3.0]])
    assert prunelab.prune(identity(), "dropnet", 0.5, batches=[x])["0.bias"].tolist() == [False, True]
    assert prunelab.prune(identity(), "dropnet", 0.5, batches=[x], metric="maximum")["0.bias"].tolist() == [True, False]


def test_the_output_layer_never_competes_and_empty_layers_have_to_be_asked_for():
    model, x = identity(), torch.rand(4, 2)
    masks = prunelab.prune(model, "dropnet", 0.9, batches=[x])
    assert set(masks) == {"0.weight", "0.bias", "2.weight"}
    with pytest.raises(MaskError, match="last layer"):
        prunelab.prune(model, "dropnet", 0.5, batches=[x], layers=["2"])
    with pytest.raises(MaskError, match="would lose all"):
        prunelab.prune(model, "dropnet", 0.5, batches=[x], current=masks)
    empty = prunelab.prune(model, "dropnet", 0.5, batches=[x], current=masks, allow_empty=True)
    assert empty["0.weight"].sum() == 0


def test_the_options_are_checked():
    with pytest.raises(PrunelabError, match="metric"):
        pruners.build(Prune("dropnet", options={"metric": "min"}))
    with pytest.raises(PrunelabError, match="'apoz' itself sets"):
        pruners.build(Prune("apoz", options={"metric": "random"}))


# --------------------------------------------------------------------------------------------------------- the oracle

CHAINS = {
    "dropnet_a": ((6, 5), ()),
    "dropnet_b": ((4, 5), ("conv_1", "conv_2")),
    "dropnet_c": ((3, 4, 5, 4), ("conv_1", "conv_2", "conv_3", "conv_4")),
    "mlp": ((6, 5, 4), ("hidden_2",)),
}


def trained(name, hidden, layers):
    """A small net some of whose units are gone, and data."""
    model = models.build(Model(name, hidden), (1, 16, 16), 5, 0)
    source = draw()
    x, y = torch.rand(70, 1, 16, 16, generator=source), torch.randint(5, (70,), generator=source)
    pruner = Oracle()
    masks = pruners.first_masks(model, pruner, layers)
    units = {layer: torch.ones(size, dtype=torch.bool) for layer, size in models.layer_widths(model, layers)}
    next(iter(units.values()))[2] = False
    masks &= unit_masks(model, units)
    masks.apply_(model)
    return model, masks, units, x, y


@pytest.mark.parametrize("name", CHAINS)
def test_all_candidates_at_once_have_the_losses_of_one_after_the_other(name):
    model, _, units, x, y = trained(name, *CHAINS[name])
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    together, apart = (losses_without(model, units, batches, batched=how) for how in (True, False))
    for layer, keep in units.items():
        assert torch.equal(together[layer].isfinite(), keep)
        torch.testing.assert_close(together[layer], apart[layer], rtol=1e-6, atol=1e-6)


def test_the_loss_without_a_unit_is_that_of_the_model_with_its_mask():
    model, masks, units, x, y = trained("dropnet_b", *CHAINS["dropnet_b"])
    losses = losses_without(model, units, [(x, y)])
    for layer, unit in (("conv_1", 1), ("conv_2", 4)):
        less = {**units, layer: units[layer].clone()}
        less[layer][unit] = False
        other = models.build(Model("dropnet_b", (4, 5)), (1, 16, 16), 5, 0)
        (masks & unit_masks(model, less)).apply_(other)
        loss = nn.functional.cross_entropy(other(x), y).item()
        assert losses[layer][unit].item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("variant", ["faithful", "corrected"])
def test_the_oracle_removes_the_unit_whose_absence_costs_least(variant):
    model, masks, units, x, y = trained("dropnet_a", *CHAINS["dropnet_a"])
    losses = losses_without(model, units, [(x, y)])
    after = Oracle(variant=variant).prune(looked_at(model, [(x, y)], masks), 0.0).masks
    layer = min(losses, key=lambda name: losses[name].min())
    gone = units[layer] & ~after[f"{layer}.bias"]
    assert gone.nonzero().flatten().tolist() == [int(losses[layer].argmin())]
    assert masks.weights.kept - after.weights.kept in (256, 6)


def test_of_equal_losses_the_faithful_oracle_takes_the_first():
    model, masks, _, x, y = trained("dropnet_a", *CHAINS["dropnet_a"])
    with torch.no_grad():
        model.output.weight.zero_()  # no unit matters
    after = Oracle(variant="faithful").prune(looked_at(model, [(x, y)], masks), 0.0).masks
    assert after["hidden_1.bias"].tolist() == [False, True, False, True, True, True]
    chosen = set()
    for seed in range(30):
        after = Oracle().prune(looked_at(model, [(x, y)], masks, draw(seed)), 0.0).masks
        chosen.add(tuple(after["hidden_1.bias"].tolist()))
    assert len(chosen) > 3


def test_the_oracle_takes_models_that_are_no_chains_and_layers_without_units():
    model = models.build(Model("dropnet_resnet18", (2, 3, 4, 5)), (1, 16, 16), 3, 0)
    x, y = torch.rand(6, 1, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    masks = Oracle().prune(looked_at(model, [(x, y)], pruners.first_masks(model, Oracle())), 0.0).masks
    assert sum(int((~mask).sum()) for name, mask in masks.items() if name.endswith("bias")) == 1
    model, _, units, x, y = trained("dropnet_a", *CHAINS["dropnet_a"])
    units["hidden_2"][:] = False
    unit_masks(model, units).apply_(model)
    losses = losses_without(model, units, [(x, y)])
    assert losses["hidden_2"].isinf().all()
    assert len(losses["hidden_1"][units["hidden_1"]].unique()) == 1


# ------------------------------------------------------------------------------------------------- rounds of a run


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scope": "global"}, [12, 10, 8, 7]),
        ({"scope": "layer"}, [12, 10, 8, 6]),
        ({"metric": "random", "scope": "layer", "one": True}, [12, 10, 8, 6]),
        ({"metric": "apoz"}, [12, 10, 8, 7]),
    ],
)
def test_a_run_loses_the_units_of_the_schedule_and_another_draw_can_take_its_masks(tmp_path, options, expected):
    options = {**options, "variant": "faithful", "allow_empty": True}
    data, train = Data("digits", train_size=64, test_size=64), Train(epochs=1, batch_size=32, optimiser="sgd", lr=0.1)
    first = Run(data, Model("dropnet_a", (8, 4)), train, Prune("dropnet", 0.2, 3, recover="rewind", options=options))
    other = dataclasses.replace(first, seed=20, prune=dataclasses.replace(first.prune, masks_of=first.id))
    store = Store(tmp_path)
    results = run_all([first, other], store=store, jobs=1, progress=False)
    assert not results.failed
    removals = [store.removals(run.id) for run in (first, other)]
    for name in removals[0]:
        if name.startswith("round/hidden"):
            assert (removals[0][name] == removals[1][name]).all()
    at = np.concatenate([removals[0][f"round/hidden_{n}.bias"] for n in (1, 2)])
    assert [int(((at == -1) | (at > r)).sum()) for r in range(4)] == expected
    assert (removals[0]["round/output.weight"] == -1).all()
