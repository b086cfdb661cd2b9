"""Whatever looks at a user's model and data leaves both as they were."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunelab.errors import PrunelabError
from prunelab.pruners import prune
from prunelab.pruners.sensitivity import sensitivity
from prunelab.structure import cost
from prunelab.structure.forward import call, copied, looking
from prunelab.structure.report import report


class Restless(nn.Module):
    """Its forward changes everything that a forward can change."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.seen, self.features, self.mean = [], None, torch.zeros(16)

    def forward(self, x):
        x.sub_(0.5).mul_(4)
        self.calls += 1
        self.a.weight.data.clamp_(-0.3, 0.3)
        self.mean.add_(1)
        self.features = F.relu(self.norm(self.a(x)))
        self.seen.append(random.random() + np.random.rand())
        self.train()
        return self.b(F.dropout(self.features, 0.1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Restless().train()


def state(model):
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "seen": list(model.seen),
        "features": model.features,
        "mean": model.mean.clone(),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        all(torch.equal(value, b[key][name]) for name, value in a[key].items())
        if key == "weights"
        else torch.equal(a[key], b[key])
        if key == "mean"
        else a[key] is b[key]
        if key == "features"
        else a[key] == b[key]
        for key in a
    )


LOOKS = {
    "prune": lambda net, x, y: prune(net, "magnitude", 0.5),
    "prune units": lambda net, x, y: prune(net, "l1_neuron", 0.5),
    "prune by gradients": lambda net, x, y: prune(net, "taylor", 0.5, batches=[(x, y)]),
    "prune by inputs": lambda net, x, y: prune(net, "wanda", 0.5, batches=[(x, y)]),
    "prune by activations": lambda net, x, y: prune(net, "apoz", 0.5, batches=[(x, y)], allow_empty=True),
    "sensitivity": lambda net, x, y: sensitivity(net, (x, y), "taylor", amounts=(0.5,), batches=[(x, y)], jobs=2),
    "report": lambda net, x, y: report(net, copied(net), x, repeats=3),
    "cost": lambda net, x, y: cost.summarise(net, (8,)),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_look_leaves_model_data_and_random_numbers_as_they_were(net, look):
    x, y = torch.rand(12, 8), torch.arange(12) % 3
    given, before = x.clone(), state(net)
    look(net, x, y)
    assert torch.equal(x, given)
    assert same(state(net), before)


def test_a_look_that_fails_leaves_it_too(net):
    before = state(net)
    with pytest.raises(PrunelabError, match="does not take inputs of shape"), looking(net):
        call(net, torch.rand(4, 7))
    assert same(state(net), before)


def test_a_model_is_the_same_each_time_although_it_draws_numbers(net):
    def answers():
        with looking(net), torch.no_grad():
            return call(net, torch.ones(4, 8))

    assert torch.equal(answers(), answers())


def test_a_model_that_kept_results_of_a_call_can_be_copied(net):
    net(torch.rand(4, 8))
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(net)
    assert torch.equal(copied(net).features, net.features)
    net.lock = (each for each in ())
    with pytest.raises(PrunelabError, match="Restless cannot be copied: cannot pickle 'generator'"):
        copied(net)


def test_several_inputs_are_a_tuple_or_a_dict():
    class Two(nn.Module):
        def forward(self, a, b):
            return a.sub_(b)

    a, b = torch.ones(2), torch.ones(2)
    assert call(Two(), (a, b)).tolist() == call(Two(), {"b": b, "a": a}).tolist() == [0, 0]
    assert a.tolist() == [1, 1]


def test_a_layer_without_inputs_has_nothing_to_lose():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)
            self.extra = nn.Linear(1, 16)
            self.extra.weight = nn.Parameter(torch.empty(16, 0))

        def forward(self, x):
            return self.b(F.relu(self.a(x) + self.extra(x[:, :0])))

    assert prune(Net(), "magnitude", 0.5).kept == 88
