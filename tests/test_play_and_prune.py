"""Play and Prune on numbers by hand: who goes, how fast, the roll-back, and the orthogonality term."""

import copy
import json

import pandas as pd
import pytest
import torch
from acting import acted
from torch import nn

from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.papers.related import play_and_prune
from prunelab.pruners import first_masks
from prunelab.pruners.base import Context, Progress
from prunelab.pruners.play_and_prune import (
    PlayAndPrune,
    first_threshold,
    orthogonality_gradient,
    penalty_strength,
    with_sizes,
    without_readers,
)
from prunelab.pruners.units import unit_masks
from prunelab.runs import Store
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.structure.chains import remove_units
from prunelab.training.experiment import run_all
from prunelab.training.narrow import narrow
from prunelab.training.removals import Removals

NORMS = [4.0, 1.0, 3.0, 2.0]


def orthogonality(rows):
    """||F F' - I||^2, F the rows divided by their lengths; rows of zeros count as absent."""
    unit, there = nn.functional.normalize(rows), (rows != 0).any(1).to(rows)
    return (unit @ unit.T - torch.diag(there)).square().sum()


def net():
    """Four filters of two weights with |f| = 4, 1, 3, 2, which a second convolution and an output read."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(1, 4, (1, 2)))
    model.add_module("relu", nn.ReLU())
    model.add_module("second", nn.Conv2d(4, 2, 1))
    model.add_module("relu_2", nn.ReLU())
    model.add_module("flatten", nn.Flatten())
    model.add_module("output", nn.Linear(2, 2))
    model.conv.weight.data = torch.tensor([[n / 2, -n / 2] for n in NORMS]).view(4, 1, 1, 2)
    return model


def moment(model, accuracies, masks=None, state=None, epochs=20):
    progress = Progress([1.0] * len(accuracies), [1.0] * len(accuracies), epochs, None, accuracies)
    masks = Masks.ones(model) if masks is None else masks
    return Context(model, masks, torch.Generator().manual_seed(0), progress=progress, state=state or {})


def first(pruner, model, accuracy=0.99, **more):
    return acted(pruner, moment(model, [accuracy], **more))


def then(pruner, change, accuracies, **more):
    return acted(pruner, moment(change.model, accuracies, change.masks, change.state, **more))


def test_the_player_is_as_strong_as_the_distance_to_the_tolerance_in_points():
    assert penalty_strength(98.5 - (99 - 1.0), 5e-4) == pytest.approx(2.5e-4)
    assert penalty_strength(99 - (99 - 2.0), 5e-4) == pytest.approx(1e-3)
    assert penalty_strength(-0.1, 5e-4) == 0


def test_the_first_threshold_takes_its_share_of_the_unimportant():
    assert first_threshold([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert first_threshold([4.0, 1.0, 3.0, 2.0], 0.2) == 1.5
    assert first_threshold([2.0, 1.0], 0.0) == 1.5  # at least one
    assert 3 < first_threshold([3.0], 0.5) < 3.001
    assert first_threshold([], 0.5) == 0


def test_the_lowest_filters_alone_are_penalised_by_their_signs():
    pruner, model = PlayAndPrune(alpha=0.5, strength=0.2, tolerance=0.5), net()
    assert pruner.penalty(model, {}) is None
    change = first(pruner, model)
    assert change.masks == Masks.ones(model)
    assert change.note == "pruning begins at 99.00 %"
    gradients = pruner.penalty(model, change.state)(model)
    assert set(gradients) == {"conv.weight", "second.weight"}
    pull = 0.5 * 0.2  # T lambda
    expected = torch.tensor([[0.0, 0.0], [pull, -pull], [0.0, 0.0], [pull, -pull]]).view(4, 1, 1, 2)
    torch.testing.assert_close(gradients["conv.weight"], expected)


def test_the_penalty_is_the_gradient_of_what_it_is_said_to_be():
    pruner, model = PlayAndPrune(alpha=0.5, strength=0.2, orthogonality=0.3), net()
    model.conv.weight.data += 0.1 * torch.randn(4, 1, 1, 2)
    state = first(pruner, model).state
    total = 0.0
    for layer in (model.conv, model.second):
        norms = layer.weight.detach().abs().flatten(1).sum(1)
        low = norms.argsort()[: len(norms) // 2]
        total = total + 0.2 * layer.weight[low].abs().sum() + 0.3 * orthogonality(layer.weight.flatten(1))
    wanted = torch.autograd.grad(total, [model.conv.weight, model.second.weight])
    found = pruner.penalty(model, state)(model)
    for name, gradient in zip(("conv.weight", "second.weight"), wanted, strict=True):
        torch.testing.assert_close(found[name], gradient)


def test_filters_below_the_threshold_go_with_what_reads_them():
    pruner = PlayAndPrune(alpha=0.5, tolerance=1.0)
    change = then(pruner, first(pruner, net()), [0.99, 0.99])
    # of |f| = 1 and 2 half is below 1.5, and T = 1 leaves the threshold as it is
    assert change.masks["conv.weight"].flatten(1).all(1).tolist() == [True, False, True, True]
    assert change.masks["conv.bias"].tolist() == [True, False, True, True]
    assert change.masks["second.weight"][:, 1].any().item() is False
    assert change.masks_before_removal["second.weight"][:, 1].any().item() is bool(change.masks["second.bias"].any())
    assert change.scores["conv"].tolist() == NORMS
    assert not change.note
    weights_before, weights_after = 8 + 8 + 4, change.masks.weights.kept
    assert change.rate == pytest.approx(1 - weights_after / weights_before)


@pytest.mark.parametrize(("accuracy", "left"), [(0.985, 4), (0.99, 3), (1.0, 2)])
def test_the_threshold_moves_with_the_accuracy(accuracy, left):
    """W_gamma = 1.5 is multiplied by T = 0.5, 1 and 2 points: 0.75, 1.5 and 3.0 against |f| = 1 and 2."""
    pruner = PlayAndPrune(alpha=0.5, tolerance=1.0)
    change = then(pruner, first(pruner, net()), [0.99, accuracy])
    assert int(change.masks["conv.weight"].flatten(1).any(1).sum()) == left
    assert float(change.state["threshold/conv"]) == 1.5


def test_the_threshold_is_found_once():
    pruner, change = PlayAndPrune(alpha=0.5, tolerance=1.0), first(PlayAndPrune(alpha=0.5), net())
    change = then(pruner, change, [0.99, 0.99])
    with torch.no_grad():
        change.model.conv.weight.mul_(10)  # all are above it now, though two of them are the lowest of their layer
    later = then(pruner, change, [0.99, 0.99, 0.99])
    assert later.masks == change.masks
    assert later.note == "no filter below its threshold"


def test_the_last_filter_of_a_layer_stays():
    pruner, model = PlayAndPrune(alpha=0.9, tolerance=1.0, delta=1e6), net()
    change = first(pruner, model, epochs=50)
    for n in range(2, 12):
        change = then(pruner, change, [0.99] * n, epochs=50)
    assert [int(change.masks[f"{layer}.weight"].flatten(1).any(1).sum()) for layer in ("conv", "second")] == [1, 1]
    assert not any((role == 2).any() for name, role in change.state.items() if name.startswith("role/"))


def test_below_the_tolerance_nothing_goes_and_nothing_is_penalised():
    pruner = PlayAndPrune(alpha=0.5, tolerance=1.0, patience=2)
    change = then(pruner, first(pruner, net()), [0.99, 0.979])
    assert change.masks == Masks.ones(change.model)
    assert change.note == "below the tolerance: fine-tuning"
    assert pruner.penalty(change.model, change.state) is None
    back = then(pruner, change, [0.99, 0.979, 0.985])  # within it again: AFP chooses before it removes
    assert back.masks == Masks.ones(change.model)
    assert pruner.penalty(back.model, back.state) is not None
    assert int(back.state["failed"]) == 0


def test_the_limit_itself_is_within_the_tolerance():
    pruner = PlayAndPrune(alpha=0.5, tolerance=1.0)
    change = then(pruner, first(pruner, net(), 0.9996), [0.9996, 0.9896])
    assert int(change.state["failed"]) == 0
    assert abs(float(change.state["strength"])) < 1e-12


def test_out_of_patience_the_last_network_within_the_tolerance_comes_back():
    pruner = PlayAndPrune(alpha=0.5, tolerance=1.0, patience=2)
    whole = first(pruner, net())
    pruned = then(pruner, whole, [0.99, 0.99])
    best = copy.deepcopy(pruned.model.state_dict())
    with torch.no_grad():
        pruned.masks.apply_(pruned.model)
        pruned.model.output.weight.add_(1.0)  # training went on, and badly
    bad = then(pruner, pruned, [0.99, 0.99, 0.5])
    assert bad.masks == pruned.masks
    last = then(pruner, bad, [0.99, 0.99, 0.5, 0.6])
    assert last.returns
    assert "rolled back" in last.note
    assert last.masks == whole.masks
    assert last.moments is None
    for name, tensor in last.model.state_dict().items():
        assert torch.equal(tensor, best[name]), name
    over = then(pruner, last, [0.99, 0.99, 0.5, 0.6, 0.99])
    assert over.note == "pruning is over"
    assert pruner.penalty(over.model, over.state) is None


def test_before_the_last_epoch_nothing_goes_and_a_bad_network_goes_back():
    pruner = PlayAndPrune(alpha=0.5, tolerance=1.0)
    change = first(pruner, net())
    good = then(pruner, change, [0.99, 0.99], epochs=3)
    assert good.masks == change.masks
    assert good.note == "the last epoch only fine-tunes"
    bad = then(pruner, change, [0.99, 0.9], epochs=3)
    assert bad.returns


def test_pruning_begins_behind_its_share_of_the_training():
    due = [PlayAndPrune(start=0.3).due(Progress([1.0] * n, [], 10, None)) for n in range(1, 5)]
    assert due == [False, False, True, True]
    assert PlayAndPrune(start=0.0).due(Progress([1.0], [], 10, None))


def test_orthogonality_by_hand_and_its_gradient():
    rows = torch.tensor([[3.0, 0.0], [5.0, 0.0]])
    assert orthogonality(rows) == pytest.approx(2.0)  # parallel: [[0, 1], [1, 0]]
    assert orthogonality(torch.tensor([[3.0, 0.0], [0.0, -2.0]])) == pytest.approx(0.0)
    assert orthogonality(torch.tensor([[3.0, 0.0], [0.0, 0.0]])) == pytest.approx(0.0)  # a filter that went
    rows = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(orthogonality(rows), rows)
    torch.testing.assert_close(orthogonality_gradient(rows.detach()), wanted)
    gone = torch.cat([rows.detach(), torch.zeros(1, 7, dtype=torch.float64)])
    torch.testing.assert_close(orthogonality_gradient(gone)[:5], wanted)
    assert not orthogonality_gradient(gone)[5].any()


def test_the_penalty_of_the_part_that_trains_is_that_of_the_whole():
    pruner, model = PlayAndPrune(alpha=0.4, orthogonality=0.1, tolerance=1.0), net()
    change = then(pruner, first(pruner, model), [0.99, 0.99])
    change.masks.apply_(change.model)
    part = narrow(change.model, change.masks, torch.zeros(1, 1, 1, 2))
    assert part.model.conv.out_channels == 3
    gradients = pruner.penalty(change.model, change.state)
    whole, small = gradients(change.model), gradients(part.model)
    for name, gradient in small.items():
        torch.testing.assert_close(gradient, part.cut(name, whole[name]))


def test_masked_units_and_their_readers_compute_what_the_smaller_network_does():
    model, x = net(), torch.randn(6, 1, 1, 2)
    kept = {"conv": torch.tensor([True, False, True, False]), "second": torch.tensor([True, False])}
    small = remove_units(model, {layer: keep.nonzero().flatten() for layer, keep in kept.items()}).model
    masks = without_readers(model, Masks.ones(model) & unit_masks(model, kept))
    assert masks.weights.kept == sum(p.numel() for n, p in small.named_parameters() if n.endswith("weight"))
    masks.apply_(model)
    torch.testing.assert_close(model(x), small(x))


def test_readers_behind_a_batchnorm_are_found_and_other_models_are_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    masks = Masks.ones(model) & unit_masks(model, {"0": torch.tensor([False, True])})
    assert without_readers(model, masks)["4.weight"][0].tolist() == [False] * 4 + [True] * 4
    wrapped = nn.Sequential(nn.Sequential(model))
    masks = Masks.ones(wrapped) & unit_masks(wrapped, {"0.0.0": torch.tensor([False, True])})
    assert without_readers(wrapped, masks) == masks


def test_a_record_after_a_roll_back_knows_nothing_of_it():
    before, after = Masks({"w": torch.tensor([True, True])}), Masks({"w": torch.tensor([True, False])})
    record = Removals.start(before).add(3, before, after, {"w": torch.tensor([2.0, 1.0])})
    back = record.restored(before)
    assert back.rounds["w"].tolist() == [-1, -1]
    assert back.scores["w"].isnan().all()
    assert record.restored(after).rounds["w"].tolist() == [-1, 3]


def trained(tmp_path, *, epochs=12, **options):
    run = Run(
        Data("digits", train_size=300),
        Model("lenet_5_same", (6, 8, 12)),
        Train(epochs=epochs, batch_size=32, optimiser="sgd", lr=0.05, momentum=0.9),
        Prune("play_and_prune", options={"alpha": 0.3, "start": 0.5, **options}),
    )
    store = Store(tmp_path)
    result = run_all([run], store=store, jobs=1, progress=False)
    assert not result.failed
    return run, store, result


def test_a_training_ends_with_fewer_filters_and_a_true_record(tmp_path):
    run, store, result = trained(tmp_path, tolerance=20.0, delta=2.0, orthogonality=1e-3)
    last = result.last.iloc[0]
    units = json.loads(last["units_by_layer"])
    assert sum(units[:2]) < 14
    assert units[2] == 12  # the paper prunes filters
    record = store.removals(run.id)
    assert all(((record[f"round/{name}"] == -1) == mask).all() for name, mask in store.masks(run.id).items())
    weights = store.weights(run.id)
    assert all((weights[name][~mask] == 0).all() for name, mask in store.masks(run.id).items())
    assert last["effective_macs"] == with_sizes(result.last, (1, 8, 8), 10)["macs"].iloc[0]
    assert result.epochs["pruned"].sum() == result.rounds["units"].diff().lt(0).sum()


def test_a_training_that_falls_below_the_tolerance_gets_its_filters_back(tmp_path):
    run, store, result = trained(tmp_path, alpha=0.9, delta=1e4, start=0.6, patience=1, epochs=16)
    notes = result.rounds["note"].fillna("").tolist()
    at = notes.index("rolled back to the last network within the tolerance")
    weights = result.rounds["weights"].tolist()
    assert weights[at - 1] > weights[at] < weights[at + 1]
    assert set(notes[at + 1 :]) == {"pruning is over", ""}
    record = store.removals(run.id)
    assert all(((record[f"round/{name}"] == -1) == mask).all() for name, mask in store.masks(run.id).items())
    left = sum(int(mask.sum()) for name, mask in store.masks(run.id).items() if name.endswith("weight"))
    assert left == result.last["weights"].iloc[0] == weights[-1]


def test_sizes_are_those_of_the_network_that_the_units_make():
    rounds = pd.DataFrame(
        {"model.name": ["lenet_5"] * 2, "model.hidden": ["[]"] * 2, "units_by_layer": ["[20, 50, 500]", "[2, 5, 500]"]}
    )
    sizes = with_sizes(rounds, (1, 28, 28), 10)
    dense = 20 * 25 * 576 + 50 * 20 * 25 * 64 + 800 * 500 + 5000
    small = 2 * 25 * 576 + 5 * 2 * 25 * 64 + 80 * 500 + 5000
    assert sizes["macs"].tolist() == [dense, small]
    assert sizes["filters"].tolist() == [70, 7]
    assert sizes["fraction"].tolist() == [1.0, small / dense]


def test_data_without_labels_end_the_run_with_one_line():
    change = first(PlayAndPrune(), net(), float("nan"))
    assert "decides by the accuracy" in change.failure


@pytest.mark.parametrize(
    "options", [{"alpha": 0.0}, {"start": 1.0}, {"tolerance": -1.0}, {"patience": 0}, {"first": 1.0}, {"delta": -0.5}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(PrunelabError):
        PlayAndPrune(**options)


def test_a_model_without_filters_is_refused():
    with pytest.raises(PrunelabError, match="nothing to prune"):
        first_masks(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), PlayAndPrune())
    first_masks(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), PlayAndPrune(granularity="unit"))


def test_the_protocol_gives_all_strategies_the_same_epochs():
    study = play_and_prune(2, epochs=24)
    assert list(study)[:4] == ["unpruned", *(f"Play and Prune, {t}" for t in ("0.5 points", "1 point", "2 points"))]
    budgets = {
        name: run.train.epochs + (run.retrain.epochs if run.retrain else 0)
        for name, runs in study.items()
        for run in runs
    }
    assert set(budgets.values()) == {24}
    assert all([run.seed for run in runs] == [0, 1] for runs in study.values())
