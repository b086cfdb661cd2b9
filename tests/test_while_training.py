"""Pruning filters while training: the schedule by hand, exact counts, the same function, moments, and what it costs."""

import copy

import pandas as pd
import pytest
import torch
from acting import acted
from torch import nn

from prunelab import models
from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.papers.related import while_training
from prunelab.pruners import first_masks
from prunelab.pruners.base import Context, Progress
from prunelab.pruners.while_training import WhileTraining, planned_saving, target_pruned, training_cost
from prunelab.runs import Store
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.structure.chains import cut
from prunelab.training.experiment import run_all


def convnet(*, norm: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    between = [nn.BatchNorm2d(8)] if norm else []
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), *between, nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40, 6), nn.ReLU(), nn.Linear(6, 3)),
    )


X = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def moment(model, epochs_done=10, epochs=10, masks=None, state=None, moments=None, last=None, seed=0):
    masks = (
        Masks({n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()})
        if masks is None
        else masks
    )
    progress = Progress([1.0] * epochs_done, [], epochs, last)
    draw = torch.Generator().manual_seed(seed)
    batches = lambda: [(X[:20], torch.zeros(20)), (X[20:], torch.zeros(12))]  # noqa: E731
    return Context(model, masks, draw, batches, progress=progress, moments=moments or {}, state=state or {})


@pytest.mark.parametrize(
    ("filters", "fraction", "by_epoch"),
    [
        (10, 0.5, [0, 0, 0, 1, 2, 3, 4, 5, 5, 5]),  # begins at epoch 2, is over at 8: 0.83, 1.67, 2.5, 3.33, 4.17, 5
        (4, 0.5, [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]),
        (2, 0.9, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]),
        (1, 0.9, [0] * 10),  # the last filter stays
        (100, 0.29, [0, 0, 4, 9, 14, 19, 24, 29, 29, 29]),  # 0.29 * 100 is less than 29 in floating point
    ],
)
def test_the_schedule_by_hand(filters, fraction, by_epoch):
    assert [target_pruned(filters, fraction, e, 2, 8) for e in range(10)] == by_epoch


def test_it_acts_only_while_the_schedule_rises():
    pruner = WhileTraining(start=0.2, stop=0.8)
    last, acted = None, []
    for epoch in range(10):
        if pruner.due(Progress([1.0] * (epoch + 1), [], 10, last)):
            acted.append(epoch)
            last = epoch
    assert acted == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("score", ["l1", "activation", "random"])
@pytest.mark.parametrize("granularity", ["filter", "unit", "neuron"])
def test_the_network_without_the_units_equals_the_masked_one(score, granularity):
    model = convnet()
    before = copy.deepcopy(model.state_dict())
    change = acted(WhileTraining(score, 0.5, granularity=granularity), moment(model))
    masked = copy.deepcopy(model)
    change.masks_before_removal.apply_(masked)
    torch.testing.assert_close(change.model(X), masked(X), rtol=1e-5, atol=1e-6)
    left = [m.weight.shape[0] for m in change.model if isinstance(m, nn.Conv2d | nn.Linear)]
    assert left == {"filter": [4, 5, 6, 3], "unit": [4, 5, 3, 3], "neuron": [8, 10, 3, 3]}[granularity]
    change.masks.check(change.model)
    assert change.masks.kept == change.masks.total
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_lowest_filters_go_by_their_own_score():
    model = convnet()
    with torch.no_grad():
        sizes = torch.tensor([5.0, 1, 6, 2, 7, 3, 8, 4])
        model[0].weight.copy_(sizes.view(8, 1, 1, 1).expand(8, 1, 3, 3) * torch.tensor([1.0, -1, 1]))
    change = acted(WhileTraining("l1", 0.5), moment(model))
    assert change.index["0.weight"][0].tolist() == [0, 2, 4, 6]
    torch.testing.assert_close(change.scores["0"], 9 * sizes)
    change = acted(WhileTraining("activation", 0.5), moment(model))
    with torch.no_grad():
        means = model[0](X).relu().mean((0, 2, 3))
    torch.testing.assert_close(change.scores["0"], means)
    assert change.index["0.weight"][0].tolist() == sorted(means.topk(4).indices.tolist())


def test_the_optimisers_moments_of_the_others_are_carried():
    model = convnet()
    draw = torch.Generator().manual_seed(1)
    own = {n: torch.randn(p.shape, generator=draw) for n, p in model.named_parameters()}
    change = acted(WhileTraining("random", 0.5), moment(model, moments={"momentum_buffer": own}))
    for name, parameter in change.model.named_parameters():
        torch.testing.assert_close(change.moments["momentum_buffer"][name], cut(own[name], change.index[name]))
        torch.testing.assert_close(parameter, cut(model.get_parameter(name), change.index[name]))


def test_a_model_that_is_no_plain_chain_is_masked_with_its_batchnorm():
    model = convnet(norm=True)
    change = acted(WhileTraining("l1", 0.5), moment(model))
    assert change.model is model
    gone = ~change.masks["0.bias"]
    assert gone.sum() == 4
    assert not change.masks["1.weight"][gone].any()
    assert not change.masks["1.bias"][gone].any()
    pruned = copy.deepcopy(model)
    change.masks.apply_(pruned)
    pruned.eval()
    assert pruned[:3](X)[:, gone].abs().max() == 0
    assert pruned[:3](X)[:, ~gone].abs().max() > 0


def test_l1_counts_no_inputs_that_went_from_a_masked_model():
    model = convnet(norm=True).eval()
    with torch.no_grad():
        for conv in (model[0], model[4]):
            conv.weight.fill_(0.1)
        model[0].weight[:4] = 0.001  # these four go first
        model[4].weight[0, :4] = 9.0  # large, but on inputs that are gone by then
        model[4].weight[1:, 4:] += torch.arange(9.0).view(9, 1, 1, 1) + 1
    pruner = WhileTraining("l1", 0.5, start=0.0, stop=1.0)
    masks = Masks.ones(model) & Masks({"0.weight": torch.arange(8).ge(4).view(8, 1, 1, 1).expand(8, 1, 3, 3)})
    more = {n: torch.arange(8) >= 4 for n in ("0.bias", "1.weight", "1.bias")}
    masks &= Masks(more)
    masks.apply_(model)
    change = acted(pruner, moment(model, masks=masks, state={"0": torch.tensor(8), "4": torch.tensor(10)}))
    torch.testing.assert_close(change.scores["4"][0], torch.tensor(0.1 * 4 * 9))
    assert not change.masks["4.bias"][0]
    assert change.masks["4.bias"].sum() == 5


def test_nothing_happens_while_a_whole_filter_is_not_due():
    model = convnet()
    change = acted(WhileTraining("l1", 0.1), moment(model, epochs_done=3))
    assert change.model is model
    assert change.note == "not yet a whole filter"


@pytest.mark.parametrize(
    ("values", "what"), [({"start": 0.8, "stop": 0.2}, "start = 0.8"), ({"fraction": 1.0}, "fraction = 1.0")]
)
def test_what_is_no_schedule_is_refused(values, what):
    with pytest.raises(PrunelabError, match=what):
        WhileTraining(**values)


def test_a_model_without_filters_is_refused_before_it_trains():
    with pytest.raises(PrunelabError, match="no masked convolution"):
        first_masks(nn.Sequential(nn.Linear(3, 2)), WhileTraining())


# ----------------------------------------------------------------------------------------------------------- whole runs

SMALL = Data("digits", train_size=200)
TRAIN = Train(epochs=10, batch_size=32, optimiser="sgd", lr=0.05, momentum=0.9)


def run(score="l1", fraction=0.5, seed=0, model="lenet_5_same", hidden=(6, 8, 10), train=TRAIN, **options):
    prune = Prune("while_training", options={"score": score, "fraction": fraction, **options})
    return Run(SMALL, Model(model, hidden), train, prune, seed=seed)


def test_every_layer_ends_at_exactly_its_fraction_and_follows_the_schedule(tmp_path):
    found = run_all([run(fraction=0.7)], store=Store(tmp_path), jobs=1, progress=False)
    assert found.last["units_by_layer"].item() in ("[2, 3, 10]", [2, 3, 10])  # 4 of 6, 5 of 8; the dense layer stays
    filters = found.epochs.set_index("epoch")["units"] - 10
    gone = [target_pruned(6, 0.7, e, 2, 8) + target_pruned(8, 0.7, e, 2, 8) for e in range(10)]
    assert [14 - filters[e + 1] for e in range(10)] == [0, *gone[:-1]]  # what trained in an epoch was pruned before it


def test_a_masked_resnet_ends_at_its_fraction(tmp_path):
    train = Train(epochs=4, batch_size=64, optimiser="sgd", lr=0.05, momentum=0.9)
    asked = run(model="resnet20", hidden=(4, 4, 4), train=train, start=0.0, stop=0.5)
    found = run_all([asked], store=Store(tmp_path), jobs=1, progress=False)
    assert not found.failed
    masks = found.store.masks(asked)
    for name, mask in masks.items():
        if name.endswith("weight") and mask.ndim == 4 and "shortcut" not in name:
            assert mask.reshape(len(mask), -1).any(1).sum() == 2, name


def test_the_same_seed_gives_the_same_run_alone_and_in_company(tmp_path):
    runs = [run(score, seed=seed) for score in ("random", "l1", "activation") for seed in (0, 1)]
    one, other = (run_all(runs, store=Store(tmp_path / n), jobs=1, progress=False).last.set_index("id") for n in "ab")
    assert one["test_loss"].equals(other["test_loss"])
    alone = run_all([runs[0]], store=Store(tmp_path / "c"), jobs=1, progress=False).last.set_index("id")
    assert alone.loc[runs[0].id, "test_loss"] == pytest.approx(one.loc[runs[0].id, "test_loss"], rel=1e-3)
    assert one.loc[runs[0].id, "test_loss"] != one.loc[runs[1].id, "test_loss"]


def test_training_costs_what_one_reckons_by_hand():
    rounds = pd.DataFrame(
        {
            "strategy": ["a", "a", "b"],
            "seed": 0,
            "id": ["a0", "a0", "b0"],
            "macs": [100, 60, 100],
            "epochs": [2, 3, 5],
            "seconds": [1.0, 2.0, 4.0],
            "prune_seconds": [0.5, 0.0, 0.0],
        }
    )
    cost = training_cost(rounds, samples=10).set_index("strategy")
    assert cost.loc["a", "training_macs"] == 3 * 10 * (2 * 100 + 3 * 60)
    assert cost.loc["b", "training_macs"] == 3 * 10 * 500
    assert cost["training_seconds"].tolist() == [3.5, 4.0]
    with pytest.raises(PrunelabError, match="macs"):
        training_cost(rounds.drop(columns="macs"), samples=10)


def test_a_network_that_shrinks_stores_nothing_beside_one_of_which_layers_drop_out():
    rounds = pd.DataFrame(
        {
            "strategy": ["shrinks", "drops", "drops", "shrinks"],
            "round": [0, 0, 1, 1],
            "macs": [100, 100, 100, 60],
            "epochs": [2, 2, 2, 3],
            "seconds": 1.0,
            "prune_seconds": 0.0,
        }
    )
    alone = training_cost(rounds, 10).set_index("strategy")
    assert alone["forward_macs"].to_dict() == {"shrinks": 10 * 380, "drops": 10 * 400}
    beside = training_cost(rounds.assign(learning_macs=[None, 100.0, 40.0, None]), 10).set_index("strategy")
    assert list(beside.index) == ["shrinks", "drops"]
    assert beside.loc["shrinks"].tolist() == alone.loc["shrinks"].tolist()
    assert beside.loc["drops", "training_macs"] == 10 * (3 * (200 + 80) + 60)


def test_the_planned_saving_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    # of one pixel: 2 and 8 multiply-accumulates; after epoch 0 half of the filters are gone: 1 and 2
    assert planned_saving(net, (1, 1, 1), 0.5, 2, start=0.0, stop=0.5, retrain=0) == pytest.approx(1 - 13 / 20)
    assert planned_saving(net, (1, 1, 1), 0.5, 2, start=0.0, stop=0.5, retrain=1) == pytest.approx(1 - 13 / 23)


@pytest.mark.parametrize(
    ("start", "stop", "saved"),
    [(0.2, 0.8, (41.0, 40.6, 40.5)), (0.0, 1.0, (42.6, 42.2, 42.1)), (0.1, 0.6, (51.6, 51.3, 51.2))],
)
def test_the_planned_saving_of_vgg_16_is_that_of_the_specification(start, stop, saved):
    net = models.build(Model("vgg16"), (3, 32, 32), 10, 0)
    for epochs, share in zip((100, 160, 200), saved, strict=True):  # which reckons without whole filters
        assert 100 * planned_saving(net, (3, 32, 32), 0.5, epochs, start, stop) == pytest.approx(share, abs=0.4)


def test_the_reference_removes_everything_once_the_training_is_over(tmp_path):
    study = while_training(
        1, fractions=(0.5, 0.75), model="lenet_5_same", data="digits", hidden=(4, 6, 8), train_size=100
    )
    assert list(study) == [
        *("unpruned", "train, prune 50%, retrain", "l1, 50%", "l1, 75%", "activation, 75%", "random, 75%")
    ]
    (usual,) = study["train, prune 50%, retrain"]
    assert usual.train.epochs == 17
    found = run_all([usual, study["l1, 50%"][0]], store=Store(tmp_path), jobs=1, progress=False)
    rounds = found.rounds[found.rounds["id"] == usual.id]
    assert rounds["epochs"].tolist() == [16, 1]
    assert rounds["units"].tolist() == [18, 2 + 3 + 8]
    gradual = found.rounds[found.rounds["id"] == study["l1, 50%"][0].id]
    assert gradual["macs"].iloc[-1] == rounds["macs"].iloc[-1]  # the same network in the end
    costs = training_cost(found.rounds, 90, by=["id"]).set_index("id")["training_macs"]
    assert costs[usual.id] == 3 * 90 * (16 * rounds["macs"].iloc[0] + rounds["macs"].iloc[1])
    assert costs[usual.id] > costs[study["l1, 50%"][0].id]
    assert models.layer_widths(models.build(usual.model, (1, 8, 8), 10, 0))[0] == ("conv_1", 4)
