"""Related methods on numbers by hand: Pruning at a Glance, zero-keep, one-cycle and the schedules beside it."""

import pytest
import torch
from torch import nn

from prunelab import models
from prunelab.errors import PrunelabError
from prunelab.masks import MaskError, Masks
from prunelab.pruners import build, prune
from prunelab.pruners.base import Progress
from prunelab.pruners.scheduled import Scheduled
from prunelab.pruners.schedules import Ramp
from prunelab.pruners.zero_keep import zero_skipped_macs
from prunelab.runs import Store
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.structure.cost import layer_macs
from prunelab.structure.shrink import joined_layers
from prunelab.training.experiment import run_all


def test_one_cycle_is_what_its_author_logged():
    logged = [2.53, 9.48, 29.46, 61.34, 83.69, 91.94, 94.24, 94.82, 94.96, 95.00]
    ramp = Ramp("one_cycle", 0.95)
    assert [round(100 * ramp.at(epoch / 10), 2) for epoch in range(1, 11)] == logged


def test_other_values_of_beta_are_those_of_the_specification():
    shares = [0.25, 1.0, 3.9, 14.2, 40.1, 73.1, 91.7, 97.8, 99.5, 99.9, 100]
    ramp = Ramp("one_cycle", 0.5, beta=6)
    assert [200 * ramp.at(i / 10) for i in range(11)] == pytest.approx(shares, abs=0.06)


def test_the_schedules_beside_it_by_hand():
    assert Ramp("one_shot", 0.8).at(0.39) == 0
    assert Ramp("one_shot", 0.8).at(0.4) == 0.8
    agp = Ramp("agp", 0.8)
    assert (agp.at(0.1), agp.at(0.6), agp.at(1)) == (0, pytest.approx(0.8 * (1 - 0.5**3)), pytest.approx(0.8))
    steps = Ramp("iterative", 0.9, start=0.0)
    assert [steps.at(t) for t in (0.0, 0.1, 0.34, 0.5, 0.67, 1.0)] == pytest.approx([0, 0.3, 0.6, 0.6, 0.9, 0.9])
    assert Ramp("linear", 0.5).at(0.5) == 0.25
    assert Ramp("cosine", 0.5).at(0.5) == pytest.approx(0.25)
    for kind in ("one_cycle", "agp", "iterative", "one_shot", "linear", "cosine"):
        curve = [value for _, value in Ramp(kind, 0.7).curve()]
        assert curve == sorted(curve)
        assert curve[-1] == pytest.approx(0.7)


@pytest.mark.parametrize("bad", [{"kind": "onecycle"}, {"final": 1.0}, {"start": 1.0}, {"steps": 0}])
def test_what_is_no_schedule_is_refused(bad):
    with pytest.raises(PrunelabError):
        Ramp(**bad)


def test_a_training_ends_at_the_sparsity_of_its_schedule(tmp_path):
    data, net, train = Data("digits", train_size=200), Model("mlp", (16, 12)), Train(epochs=6, batch_size=32)
    methods = {"one_cycle": {}, "gradual": {}, "scheduled": {"schedule": "one_shot", "scope": "global"}}
    runs = [Run(data, net, train, Prune(name, options={"sparsity": 0.8, **more})) for name, more in methods.items()]
    last = run_all(runs, store=Store(tmp_path), jobs=1, progress=False).last.set_index("method")
    total = 64 * 16 + 16 * 12 + 12 * 10
    for name in methods:
        assert last.loc[name, "weights"] == pytest.approx(0.2 * total, abs=2)
        assert last.loc[name, "requested_sparsity"] == pytest.approx(0.8, abs=2e-3)
    assert last.loc["scheduled", "round"] == 1


def test_a_schedule_acts_only_when_it_rises():
    pruner = Scheduled("one_shot")
    due = [pruner.due(Progress([1.0] * n, [], 10, None)) for n in range(1, 10)]
    assert due == [False, False, *[True] * 7]
    assert not pruner.due(Progress([1.0] * 5, [], 10, last=2))


def test_glance_compares_mean_sizes_over_all_layers():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[1.0, -1.0], [0.2, 0.2], [3.0, 0.0]])  # means 1, 0.2, 1.5
    model[2].weight.data = torch.tensor([[0.3, 0.3, 0.3], [0.0, 0.0, -2.7]])  # means 0.3, 0.9
    masks = prune(model, "glance", 0.4)  # 2 of 5
    assert masks["0.weight"].any(1).tolist() == [True, False, True]
    assert masks["2.weight"].any(1).tolist() == [False, True]
    assert masks["0.bias"].tolist() == [True, False, True]
    most = prune(model, "glance", 0.6)  # of every layer one stays
    assert most["0.weight"].any(1).tolist() == [False, False, True]
    assert most["2.weight"].any(1).tolist() == [False, True]


@pytest.mark.parametrize("seed", range(5))
def test_glance_leaves_one_unit_in_each_layer_however_much_should_go(seed):
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))
    masks = prune(model, "glance", 0.9, seed=seed)  # 5 of 6
    assert [int(masks[f"{layer}.bias"].sum()) for layer in "02"] == [1, 1]
    assert prune(model, "glance", 0.9, seed=seed, allow_empty=True)["0.bias"].sum() < 2


def test_glance_gives_layers_of_one_skip_the_same_filters():
    model = models.build(Model("resnet20", (4, 4, 8)), (3, 16, 16), 10, 0)
    groups = joined_layers(model, torch.randn(2, 3, 16, 16))
    assert groups[0][:3] == ["conv", "stage_1.block_1.conv_2", "stage_1.block_2.conv_2"]
    masks = prune(model, "glance", 0.3, batches=[torch.randn(2, 3, 16, 16)])
    for group in groups:
        kept = [masks[f"{layer}.weight"].flatten(1).any(1).tolist() for layer in group]
        assert all(own == kept[0] for own in kept)
    assert masks.kept < masks.total


def test_zero_keep_drops_the_units_with_the_fewest_zeros():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    model[0].weight.data = torch.tensor([[9.0, 9, 9, 9], [9, 0.1, 0.1, 0.1], [9, 9, 0.1, 0.1]])
    model[2].weight.data = torch.tensor([[9.0, 9.0, 0.1]])
    masks = prune(model, "zero_keep", 0.34, zeros=0.4)  # 6 of 15 become zero, then one of three neurons goes
    assert masks["0.weight"].tolist() == [[False] * 4, [True, False, False, False], [True, True, False, False]]
    assert masks["2.weight"].tolist() == [[True, True, False]]
    assert zero_skipped_macs(masks, layer_macs(model, (4,))) == 3 + 2
    with pytest.raises(PrunelabError, match=r"zeros = 1\.5: should be a share"):
        prune(model, "zero_keep", 0.3, zeros=1.5)


def test_zero_keep_refuses_to_zero_a_whole_layer_unasked():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight.data *= 1e-6
    pruner = build(Prune("zero_keep"))
    with pytest.raises(MaskError, match=r"layer '2' would lose all 16 weights that it has left.*: lower zeros"):
        pruner.zeroed(model, Masks.ones(model))
    emptied = build(Prune("zero_keep", options={"allow_empty": True})).zeroed(model, Masks.ones(model))
    assert emptied.counts["2.weight"] == 0


def test_glance_prunes_residual_networks_of_a_run_by_the_groups_of_their_shortcuts(tmp_path):
    data = Data("digits", train_size=64, test_size=64)
    train = Train(epochs=1, batch_size=64)
    one = Run(data, Model("resnet20", (4, 4, 8)), train, Prune("glance", 0.5, 1), seed=0)
    store = Store(tmp_path)
    result = run_all([one], store=store, jobs=1, progress=False)
    assert not result.failed
    masks = store.masks(one.id)
    shared = [masks[f"stage_1.block_{i}.conv_2.weight"].any((1, 2, 3)).tolist() for i in (1, 2, 3)]
    assert shared[0] == shared[1] == shared[2] == masks["conv.weight"].any((1, 2, 3)).tolist()
