"""Scores of four weights, by hand."""

import torch
from torch import nn

from prunelab.pruners.scores import magnitude, random, reduce_to_units


def two_by_two() -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[-3.0, 4.0], [1.0, -2.0]])
    return layer


def test_magnitudes_and_their_sums_over_units():
    model = two_by_two()
    one, two = magnitude(model, ["weight"]), magnitude(model, ["weight"], norm=2)
    assert one["weight"].tolist() == [[3, 4], [1, 2]]
    assert two["weight"].tolist() == [[9, 16], [1, 4]]
    assert reduce_to_units(nn.Linear(2, 2), one, ["weight"])[""].tolist() == [7, 3]
    assert reduce_to_units(nn.Linear(2, 2), two, ["weight"])[""].tolist() == [25, 5]
    assert not one["weight"].requires_grad
    assert model.weight.tolist() == [[-3, 4], [1, -2]]


def test_filters_sum_over_all_their_inputs_and_positions():
    model = nn.Sequential(nn.Conv2d(2, 3, 2))
    model[0].weight.data = torch.arange(24.0).view(3, 2, 2, 2)
    assert reduce_to_units(model, magnitude(model, ["0.weight"]), ["0.weight"])["0"].tolist() == [28, 92, 156]


def test_random_scores_come_from_the_generator_alone():
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    names = ["0.weight", "1.weight"]
    draw = lambda seed, units=False: random(model, names, torch.Generator().manual_seed(seed), units=units)  # noqa: E731
    torch.manual_seed(1)
    first = draw(0)
    torch.manual_seed(2)
    assert all(torch.equal(first[name], draw(0)[name]) for name in names)
    assert not torch.equal(first["0.weight"], draw(1)["0.weight"])
    assert {name: tuple(score.shape) for name, score in first.items()} == {"0.weight": (20, 30), "1.weight": (10, 20)}
    assert {name: tuple(score.shape) for name, score in draw(0, units=True).items()} == {"0": (20,), "1": (10,)}
    assert 0 <= float(first["0.weight"].min()) < float(first["0.weight"].max()) < 1
