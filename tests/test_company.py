"""Who trains beside a run changes none of its numbers: the same bits alone, beside others, and after a kill."""

import pytest
import torch
from torch import nn

from prunelab.data import Data, load
from prunelab.masks import Masks
from prunelab.runs import Store
from prunelab.settings import Model, Prune, Run, Train
from prunelab.training.experiment import run_all, train_population
from prunelab.training.stack import slot
from prunelab.training.train import Member, Population, generator

# An unstable training: what differs in the last bit ends up tens of points apart.
UNSTABLE = Train(epochs=2, batch_size=16, optimiser="sgd", lr=0.1, momentum=0.9)
MACHINE = ["seconds", "seconds_spent", "prune_seconds", "lockstep", "alike", "threads", "finished"]


def study(prune, seeds, hidden=(32, 32)):
    return [Run(Data("digits", train_size=300), Model("mlp", hidden), UNSTABLE, prune, seed=s) for s in seeds]


def outcome(store, run):
    """All that is stored of a run but how long it took and who was there."""
    arrays = {**store.weights(run), **{f"mask {name}": mask for name, mask in store.masks(run).items()}}
    tables = [t.drop(columns=[c for c in MACHINE if c in t]) for t in (store.rounds(run), store.epochs(run))]
    rows = [{name: repr(list(column)) for name, column in table.items()} for table in tables]
    return [{name: array.tobytes() for name, array in arrays.items()}, *rows]


def differing(one, other):
    return [name for a, b in zip(one, other, strict=True) for name in a if a[name] != b[name]]


@pytest.mark.parametrize(
    "prune",
    [Prune("dyprune"), Prune("magnitude", amount=0.4, rounds=2, recover="rewind"), Prune("dropnet", 0.3, rounds=2)],
    ids=lambda prune: prune.method,
)
def test_an_unstable_training_is_the_same_alone_and_beside_one_two_and_six_others(prune, tmp_path):
    found = []
    for others, threads in ((0, 1), (1, 2), (2, 1), (6, 1)):
        store, runs = Store(tmp_path / f"{others} {threads}"), study(prune, range(1 + others))
        torch.set_num_threads(threads)
        run_all(runs, store=store, jobs=1, progress=False)
        found.append(outcome(store, runs[0]))
        assert differing(found[0], found[-1]) == [], (others, threads)
    assert torch.isfinite(torch.tensor(store.rounds(runs[0]).test_loss)).all()


def test_a_killed_population_of_eight_goes_on_in_other_company_and_ends_with_the_numbers_of_alone(tmp_path):
    class Killed(Exception):  # noqa: N818
        pass

    prune = Prune("magnitude", amount=0.4, rounds=2, recover="finetune")
    runs, store, alone = study(prune, range(8)), Store(tmp_path / "killed"), Store(tmp_path / "alone")
    run_all(runs[2:3], store=alone, jobs=1, progress=False)
    seen = []

    def watch(one):
        seen.append(one)
        if len(seen) > 8 * 4:  # all are in the middle of their second round
            raise Killed
        return "go on"

    with pytest.raises(Killed):
        train_population(runs, store, watch=watch)
    assert store.status(runs[2]) == "partial"
    train_population(runs[1:4], store)
    assert differing(outcome(alone, runs[2]), outcome(store, runs[2])) == []


ODD = [(33, 31), (17, 13), (6, 5)]  # rows and matrices of lengths that fill no register


@pytest.mark.parametrize("layer", [nn.ReLU, nn.Sigmoid, nn.Tanh, nn.GELU, lambda: nn.GELU("tanh"), nn.LeakyReLU])
@pytest.mark.parametrize(
    "train",
    [
        Train(batch_size=16, optimiser="sgd", lr=0.1),
        Train(batch_size=29, optimiser="sgd", lr=0.1, momentum=0.9, weight_decay=0.01, shuffle=False),
        Train(batch_size=25, optimiser="adam", lr=0.01),
    ],
    ids=lambda train: f"{train.optimiser} {train.momentum:g}",
)
def test_odd_widths_batches_and_activations_are_the_same_in_every_stack(layer, train):
    data = load(Data("digits", train_size=300))

    def members(hidden):
        nets = []
        for seed in range(5):
            torch.manual_seed(seed)
            net = nn.Sequential()
            for i, module in enumerate(
                (nn.Flatten(), nn.Linear(64, hidden[0]), layer(), nn.Linear(*hidden), layer(), nn.Linear(hidden[1], 10))
            ):
                net.add_module(f"layer_{i}", module)
            nets.append(Member(net, train, Masks.ones(net), generator(seed, "order")))
        return nets

    def results(chosen):
        population = Population(data)
        losses = [epoch.loss for _ in range(2) for epoch in population.epoch(chosen)]
        return losses, population.evaluate(chosen, data.test)

    for hidden in ODD:
        alone = [(one, results([one])) for one in members(hidden)]
        for company in ([0, 1], [4, 3, 2], [1, 4, 0, 2, 3]):
            fresh = members(hidden)
            together = [fresh[i] for i in company]
            losses, measured = results(together)
            for place, i in enumerate(company):
                mine, (mine_losses, mine_measured) = alone[i]
                assert losses[place :: len(company)] == mine_losses
                assert measured[place] == mine_measured[0]
                for name, value in mine.model.state_dict().items():
                    assert torch.equal(value, together[place].model.state_dict()[name]), (hidden, company, name)


def test_a_slot_follows_from_the_run_alone_and_has_room():
    for full in (1, 3, 10, 40, 300, 784):
        sizes = {slot(size, full) for size in range(1, full + 1)}
        assert all(size <= slot(size, full) <= max(size + 1, 1.5 * size) for size in range(1, full + 1))
        assert full in sizes
        assert len(sizes) <= 2 * full.bit_length()
        assert all(slot(size, full) == size for size in sizes)
