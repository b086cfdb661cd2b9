"""Learn & drop: the rule by hand, the stored prefix, what the trainer does with it, and what is counted."""

import copy
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from acting import acted
from torch import nn

from prunelab import models
from prunelab.data import load
from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.papers.related import learn_and_drop
from prunelab.pruners.base import Context, Progress
from prunelab.pruners.learn_and_drop import LearnAndDrop, settled, units
from prunelab.pruners.while_training import training_cost
from prunelab.runs import Store
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.structure.frozen import learning_macs, parts, stored, tail
from prunelab.training import run as running
from prunelab.training.experiment import run_all
from prunelab.training.train import Member, Population, generator

DIGITS = Data("digits", train_size=300)
SGD = {"optimiser": "sgd", "lr": 0.05, "momentum": 0.9, "batch_size": 32}


def chain(*sizes):
    """Linear layers with a ReLU behind each but the last, called a, b, c, ..."""
    model = nn.Sequential()
    for name, (inputs, outputs) in zip("abcdefg", itertools.pairwise(sizes), strict=False):
        model.add_module(name, nn.Linear(inputs, outputs))
        model.add_module(f"relu_{name}", nn.ReLU())
    return model[:-1]


def network(name, hidden, shape=(1, 8, 8)):
    return models.build(Model(name, hidden), shape, 10, 0)


# -- the rule


def test_a_unit_settles_when_it_changes_little_or_always_as_much():
    falling = torch.tensor([8.0, 4.0, 2.2, 1.0, 0.5])
    steady = torch.tensor([1.0, 2.0, 1.9, 1.95, 1.9])
    rising = torch.tensor([1.0, 1.2, 1.5, 1.9, 2.6])
    changes = torch.stack([falling, steady, rising], 1)
    assert settled(changes[:3], 0.3, 0.05) == [True, False, False]  # 2.2 / 8 < 0.3
    assert settled(changes[:2], 0.3, 0.05) == [False, False, False]
    # of the steady one the last three trends are 0.05, -0.026 and 0.026; one that changes ever more is not settled
    assert settled(changes, 0.3, 0.05001) == [True, True, False]
    assert settled(changes, 0.3, 0.04) == [True, False, False]
    assert settled(changes, 0.3, 0.06, lag=2, patience=3) == [True, False, False]
    assert settled(changes, 0.3, 0.06, lag=2, patience=1) == [True, True, False]


def test_what_dropped_out_counts_as_nothing():
    changes = torch.tensor([[1.0, 1.0], [1.0, 0.1]])
    changes[1, 0] = torch.nan
    assert settled(changes, 0.3, 0.05) == [False, True]


def moment(model, state, epoch, lr=1.0):
    losses = [1.0] * (epoch + 1)
    progress = Progress(losses, losses, 50, None, (), lr)
    return Context(model, Masks.ones(model), torch.Generator(), progress=progress, state=state)


def test_the_change_is_the_mean_absolute_one_over_the_learning_rate():
    pruner, model = LearnAndDrop(), chain(2, 2, 2, 2)
    state = pruner.begin(model)
    with torch.no_grad():
        model.a.weight += torch.tensor([[0.3, -0.3], [0.0, 0.6]])
        model.a.bias -= 0.3
    found = acted(pruner, moment(model, state, 0, lr=0.5)).state["changes"]
    torch.testing.assert_close(found, torch.tensor([[1.8 / 6 / 0.5, 0.0, 0.0]], dtype=torch.float64))


def test_only_a_settled_prefix_drops_and_the_end_never_does():
    pruner, model = LearnAndDrop(warmup=1, keep=2), chain(2, 2, 2, 2, 2)
    first = pruner.begin(model)
    change = acted(pruner, moment(model, first, 0))
    assert change.frozen == 0
    assert change.note == "4 of 4 layers learn"

    def moved(state, sizes):
        """An epoch in which the layers a, b, c, d change by so much."""
        after = copy.deepcopy(model)
        for layer, size in zip("abcd", sizes, strict=True):
            for p in after.get_submodule(layer).parameters():
                p.data += size
        return after, {**state, **first, "changes": torch.ones(1, 4, dtype=torch.float64)}

    after, state = moved(change.state, [1.0, 0.1, 0.1, 0.1])  # the first still learns
    assert acted(pruner, moment(after, state, 1)).frozen == 0
    after, state = moved(change.state, [0.1, 1.0, 0.1, 0.1])
    change = acted(pruner, moment(after, state, 1))
    assert change.frozen == 2  # a and its ReLU
    assert change.note == "learns no more: a"
    assert change.model is after
    assert change.masks == Masks.ones(model)
    assert not any(name.startswith("was/a.") for name in change.state)
    assert acted(pruner, moment(after, state, 0)).frozen == 0  # while it warms up
    after, state = moved(change.state, [0.1] * 4)
    assert acted(pruner, moment(after, state, 1)).frozen == 4  # c and d never drop


def test_units_are_layers_with_what_follows_them_and_whole_blocks():
    net = network("lenet_5_same", (4, 6, 8))
    assert [(unit.name, unit.first) for unit in units(net)] == [
        ("conv_1", 0),
        ("conv_2", 3),
        ("dense", 7),
        ("output", 9),
    ]
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    assert [(unit.name, unit.first) for unit in units(flat)] == [("1", 0), ("4", 4)]
    assert units(flat)[0].parameters == ["1.weight", "1.bias", "2.weight", "2.bias"]
    residual = units(network("resnet20", (4, 8, 8), (3, 8, 8)))
    assert [unit.name for unit in residual[:3]] == ["conv", "stage_1.block_1", "stage_1.block_2"]
    assert len(residual) == 1 + 9 + 1
    assert "norm.weight" in residual[0].parameters


# -- the stored prefix


@pytest.mark.parametrize(
    ("name", "hidden", "shape"),
    [
        ("lenet_5_same", (4, 6, 8), (1, 8, 8)),
        ("vgg11", (4, 4, 8, 8, 8, 8), (3, 8, 8)),
        ("resnet20", (4, 8, 8), (3, 8, 8)),
    ],
)
def test_the_tail_on_stored_features_answers_as_the_whole_network(name, hidden, shape, tmp_path):
    net, x = network(name, hidden, shape), torch.rand(300, *shape)
    net(x)  # running statistics that are not those of the start
    net.eval()
    modules = [module for _, module in parts(net)]
    for unit in units(net)[1:]:
        features = stored(modules[: unit.first], [x[:170], x[170:]], len(x), tmp_path)
        assert features.dtype == torch.float16
        rest = tail(net, unit.first)
        assert dict(rest.named_parameters()).keys() <= dict(net.named_parameters()).keys()
        torch.testing.assert_close(rest(features.float()), net(x), rtol=1e-2, atol=5e-3)
    assert list(tmp_path.iterdir()) == []  # the files have no names


def test_the_tail_is_made_of_the_model_s_own_parameters():
    net = network("resnet20", (4, 8, 8), (3, 8, 8))
    first = units(net)[5].first
    own = dict(net.named_parameters())
    rest = dict(tail(net, first).named_parameters())
    assert rest
    assert all(rest[name] is own[name] for name in rest)
    assert [n for n, _ in parts(tail(net, first))] == [n for n, _ in parts(net)][first:]
    assert [n for n, _ in parts(tail(net, 0))] == [n for n, _ in parts(net)]


def test_features_in_two_steps_are_those_in_one():
    net, x = chain(4, 6, 5, 3), torch.rand(20, 4)
    modules = [module for _, module in parts(net)]
    once = stored(modules[:4], [x], 20)
    twice = stored(modules[2:4], [stored(modules[:2], [x], 20)], 20)
    torch.testing.assert_close(once, twice, rtol=1e-2, atol=1e-3)


def test_a_value_beyond_float16_is_refused():
    with pytest.raises(PrunelabError, match="too large for float16"):
        stored([nn.Identity()], [torch.full((2, 3), 1e5)], 2)


def test_what_is_no_chain_has_no_prefix():
    with pytest.raises(PrunelabError, match=r"Bilinear is no nn\.Sequential"):
        LearnAndDrop().check(nn.Bilinear(2, 2, 2), Masks({}))
    with pytest.raises(PrunelabError, match="has 2 layers and keep = 2"):
        LearnAndDrop().check(chain(2, 3, 2), Masks({}))


# -- the trainer


def member(net, epochs=1, **more):
    return Member(net, Train(epochs=epochs, **{**SGD, **more}), Masks.ones(net), generator(0, "order"))


def frozen(net, first, data, **more):
    one = member(net, **more)
    one.freeze(first, one.outputs(first, data))
    return one


def reference(net, first, data, order, lr, momentum, size):
    """The same by torch's own loop: the prefix in evaluation mode, without a gradient, rounded to float16."""
    modules = [module for _, module in parts(net)]
    head, rest = nn.Sequential(*modules[:first]).eval(), nn.Sequential(*modules[first:]).train()
    with torch.no_grad():
        features = head(data.scale(data.train.x)).half().float()
    optimiser = torch.optim.SGD(rest.parameters(), lr=lr, momentum=momentum)
    rows = torch.randperm(len(features), generator=order)
    for batch in rows.split(size):
        optimiser.zero_grad()
        F.cross_entropy(rest(features[batch]), data.train.y[batch]).backward()
        optimiser.step()


@pytest.mark.parametrize(
    ("name", "hidden", "size"), [("lenet_5_same", (4, 6, 8), 32), ("vgg11", (4, 4, 8, 8, 8, 8), 300)]
)
def test_the_tail_trains_as_in_torch_and_the_prefix_stays(name, hidden, size):
    data = load(DIGITS)
    net = network(name, hidden)
    wanted = copy.deepcopy(net)
    first = units(net)[2].first
    before = {n: t.clone() for n, t in net.state_dict().items()}
    one = frozen(net, first, data, batch_size=size)
    Population(data).epoch([one])
    reference(wanted, first, data, generator(0, "order"), SGD["lr"], SGD["momentum"], size)
    learnt = {n for n, _ in tail(net, first).named_parameters()}
    for n, tensor in net.state_dict().items():
        if n in learnt:
            torch.testing.assert_close(tensor, wanted.state_dict()[n], rtol=1e-3, atol=1e-4)
            assert n.endswith("bias") or not torch.equal(tensor, before[n])
        elif not n.startswith(tuple(n.rpartition(".")[0] for n in learnt)):
            assert torch.equal(tensor, before[n]), n  # BatchNorm's statistics too
    assert one.moments["momentum_buffer"].keys() == learnt


def test_the_prefix_computes_nothing_while_the_tail_trains():
    data, net = load(DIGITS), network("vgg11", (4, 4, 8, 8, 8, 8))
    one = frozen(net, units(net)[2].first, data)
    calls = []
    for layer in ("conv_1_1", "conv_2_1", "conv_3_1"):
        net.get_submodule(layer).register_forward_hook(lambda _, x, __, layer=layer: calls.append((layer, len(x[0]))))
    population = Population(data)
    population.epoch([one])
    batches = [32] * 9 + [12]
    assert calls == [("conv_3_1", size) for size in batches]
    calls.clear()
    whole = population.evaluate([one], data.validation)[0]
    assert {layer for layer, _ in calls} == {"conv_1_1", "conv_2_1", "conv_3_1"}
    with torch.no_grad():
        right = net(data.scale(data.validation.x)).argmax(1) == data.validation.y
    assert whole.accuracy == pytest.approx(right.double().mean().item())


def test_a_frozen_member_does_not_disturb_the_others():
    data = load(DIGITS)
    nets = [network("lenet_5_same", (4, 6, 8)) for _ in range(3)]
    alone, beside = member(nets[0]), member(nets[1])
    Population(data).epoch([alone])
    Population(data).epoch([frozen(nets[2], 3, data), beside])
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_moments_go_on_where_the_tail_goes_on():
    data, net = load(DIGITS), network("lenet_5_same", (4, 6, 8))
    one = member(net, epochs=2)
    population = Population(data)
    population.epoch([one])
    one.detach()
    before = {n: t.clone() for n, t in one.moments["momentum_buffer"].items()}
    one.freeze(3, one.outputs(3, data))
    kept = one.moments["momentum_buffer"]
    assert set(before) - set(kept) == {"conv_1.weight", "conv_1.bias"}
    assert all(torch.equal(before[name], tensor) for name, tensor in kept.items())
    population.epoch([one])
    assert one.epoch == 2


# -- whole runs


def trained(store, method="learn_and_drop", *, epochs=7, model=("lenet_5_same", (4, 6, 8)), **options):
    prune = Prune(method, options={"threshold": 2.0, "warmup": 2, **options} if method == "learn_and_drop" else options)
    run = Run(DIGITS, Model(*model), Train(epochs=epochs, lr_milestones=(5,), **SGD), prune)
    return run, run_all([run], store=store, jobs=1, progress=False)


def test_a_run_counts_what_learns_and_keeps_the_whole_network(tmp_path):
    store = Store(tmp_path)
    run, result = trained(store)
    assert not result.failed
    conv_1, conv_2, dense, output = 4 * 25 * 64, 6 * 4 * 25 * 16, 24 * 8, 80
    whole = conv_1 + conv_2 + dense + output
    assert result.rounds["macs"].tolist() == [whole] * 7
    assert result.rounds["learning_macs"].tolist() == [whole] * 3 + [dense + output] * 4
    assert result.rounds["note"].tolist()[1:3] == ["4 of 4 layers learn", "learns no more: conv_1, conv_2"]
    assert not result.epochs["pruned"].any()
    assert result.rounds["weights"].nunique() == 1
    assert [p.name for p in (tmp_path / run.id).iterdir() if p.suffix == ".tmp"] == []
    assert store.weights(run.id)["conv_1.weight"].shape == (4, 1, 5, 5)


def test_one_layer_after_the_other_drops_out(tmp_path):
    _, result = trained(Store(tmp_path), epochs=9, model=("mlp", (20, 20, 20)), threshold=0.6, flat=0.0)
    learning = result.rounds["learning_macs"].tolist()
    assert learning[0] == 64 * 20 + 400 + 400 + 200
    assert learning == sorted(learning, reverse=True)
    assert learning[-1] >= 400 + 200


@pytest.mark.parametrize("method", ["learn_and_drop", "play_and_prune"])
def test_an_interrupted_run_ends_with_the_numbers_of_one_that_was_not(tmp_path, method, monkeypatch):
    options = {"alpha": 0.4, "start": 0.3, "tolerance": 30.0, "orthogonality": 0.01}
    options = options if method == "play_and_prune" else {"threshold": 0.9, "flat": 0.0, "warmup": 0}
    one, whole = trained(Store(tmp_path / "whole"), method, **options)
    for stop in (2, 4):
        saves, save = [], running.Running._save

        def killed(self, final=False, *, saves=saves, save=save, stop=stop):
            save(self, final)
            saves.append(final)
            if len(saves) == stop:
                raise KeyboardInterrupt

        store = Store(tmp_path / f"killed_{stop}")
        with monkeypatch.context() as patch:
            patch.setattr(running.Running, "_save", killed)
            with pytest.raises(KeyboardInterrupt):
                trained(store, method, **options)
        assert store.status(one) == "partial"
        _, again = trained(store, method, **options)
        volatile = ["seconds", "seconds_spent", "prune_seconds", "finished"]
        for table in ("rounds", "epochs"):
            pd.testing.assert_frame_equal(
                getattr(again, table).drop(columns=volatile, errors="ignore"),
                getattr(whole, table).drop(columns=volatile, errors="ignore"),
            )
        for name, array in whole.store.weights(one.id).items():
            np.testing.assert_array_equal(store.weights(one.id)[name], array)


def test_augmentation_is_refused_before_anything_trains(tmp_path):
    train = Train(epochs=3, augment="crop_flip")
    run = Run(DIGITS, Model("lenet_5_same", (4, 6, 8)), train, Prune("learn_and_drop"))
    with pytest.raises(PrunelabError, match="'learn_and_drop' stores features, use 'none'"):
        run_all([run], store=Store(tmp_path), jobs=1, progress=False)


# -- what is counted


def test_operations_by_hand():
    net = chain(4, 3, 5, 2)  # 12, 15 and 10 multiply-accumulates
    assert [learning_macs(net, (4,), first) for first in range(6)] == [37, 25, 25, 10, 10, 0]


def test_the_cost_of_a_training_by_hand():
    """Two epochs of the whole (37), one without a (25), one without a and b (10): 37 + 37 + 25 + 10, 12 + 15 stored."""
    rounds = pd.DataFrame(
        {
            "strategy": ["drop"] * 3 + ["full"],
            "seed": [0] * 4,
            "round": [0, 1, 2, 0],
            "macs": [37] * 4,
            "learning_macs": [37, 25, 10, np.nan],
            "epochs": [2, 1, 1, 4],
            "seconds": [1.0, 0.5, 0.2, 2.0],
            "prune_seconds": [0.1, 0.1, 0.0, 0.0],
        }
    )
    found = training_cost(rounds, 100).set_index("strategy")
    assert found.loc["drop", "forward_macs"] == 100 * (37 + 37 + 25 + 10 + 12 + 15)
    assert found.loc["drop", "forward_share"] == pytest.approx(136 / 148)
    assert found.loc["drop", "training_macs"] == 100 * (3 * 109 + 27)
    assert found.loc["drop", "training_seconds"] == pytest.approx(1.9)
    assert found.loc["full", ["forward_macs", "forward_share", "training_macs"]].tolist() == [14800, 1, 44400]


@pytest.mark.parametrize("options", [{"lag": 0}, {"patience": 0}, {"warmup": -1}, {"every": 0}, {"keep": 0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(PrunelabError):
        LearnAndDrop(**options)


def test_the_protocol_has_the_whole_training_beside_the_thresholds():
    study = learn_and_drop(2, thresholds=(0.2, 0.3), epochs=6)
    assert list(study) == ["full training", "learn & drop, 0.2", "learn & drop, 0.3"]
    assert len({run.train for runs in study.values() for run in runs}) == 1
