"""Random operations on held masks and optimisers: pruned weights, and the moments at their places, stay 0."""

import collections
import copy
import io
import random

import pytest
import torch
from torch import nn

from prunelab.errors import PrunelabWarning
from prunelab.masks import Masks
from prunelab.pruners import prune

OPTIMISERS = {
    "SGD": {"lr": 0.05},
    "SGD, momentum": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "SGD, Nesterov, fused": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "fused": True},
    "SGD, foreach, maximised": {"lr": 0.01, "momentum": 0.5, "dampening": 0.1, "foreach": True, "maximize": True},
    "Adam": {"weight_decay": 0.01, "amsgrad": True},
    "Adam, foreach": {"weight_decay": 0.01, "foreach": True},
    "Adam, fused": {"weight_decay": 0.01, "fused": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW, fused, amsgrad": {"lr": 0.01, "fused": True, "amsgrad": True},
    "RMSprop": {"momentum": 0.9, "centered": True, "weight_decay": 0.01},
    "RMSprop, foreach": {"foreach": True},
    "Adagrad": {"weight_decay": 0.01},
    "Adadelta": {},
    "Adamax": {"foreach": True},
    "NAdam": {"decoupled_weight_decay": True, "weight_decay": 0.01},
    "RAdam": {},
    "ASGD": {"t0": 2},
    "Rprop": {},
    "Adafactor": {},
}


class Network(nn.Module):
    """Convolution, recurrence, a batch norm and two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6)
        self.follow, self.hidden, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).transpose(1, 2)
        return self.head(torch.relu(self.hidden(self.follow(x)[0][:, -1])))


class Campaign:
    """One network that is trained and mistreated at random."""

    def __init__(self, seed):
        self.draw, self.counts = random.Random(seed), collections.Counter()
        torch.manual_seed(seed)
        self.new()

    def new(self):
        self.model = Network()
        self.masks = prune(self.model, "magnitude", 0.4, seed=self.draw.randrange(99))
        self.build()
        self.hold()

    def build(self):
        self.name = self.draw.choice([n for n in OPTIMISERS if hasattr(torch.optim, n.split(",")[0])])
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = getattr(torch.optim, self.name.split(",")[0])(parameters, **OPTIMISERS[self.name])

    def hold(self):
        self.handle = self.masks.hold(self.model, self.optimizer)
        self.follows = True

    def backward(self, *, times=1, half=False, scale=lambda loss: loss, odd=False):
        for _ in range(times):
            x, y = torch.randn(4, 2, 6), torch.randint(3, (4,))
            kind = next(self.model.parameters()).dtype
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = nn.functional.cross_entropy(self.model(x.to(kind)), y)
            if odd:  # the slope of a norm at 0 is NaN
                parts = [self.parameter(n)[~m].square().sqrt().sum() for n, m in self.masks.items()]
                loss = loss + 0.01 * sum(part for part in parts if part.requires_grad)
            scale(loss).backward()

    def parameter(self, name):
        return self.model.get_parameter(name)

    def pruned(self):
        name = self.draw.choice([n for n, m in self.masks.items() if not m.all()])
        return self.parameter(name), ~self.masks[name]

    # ---- operations; True: a step was made, so everything has to hold

    def plain(self):
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.draw.random() < 0.5)
        return True

    def accumulated(self):
        self.backward(times=3)
        return self.plain()

    def autocast(self):
        self.backward(half=True)
        return self.plain()

    def closure(self):
        def again():
            self.optimizer.zero_grad()
            self.backward(odd=self.draw.random() < 0.5)
            return torch.tensor(0.0)

        self.optimizer.step(again)
        self.optimizer.zero_grad()
        return True

    def norm_at_zero(self):
        self.backward(odd=True)
        return self.plain()

    def clipped(self):
        self.optimizer.zero_grad()
        self.backward(odd=True)
        self.draw.choice([nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])(self.model.parameters(), 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def scaled(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** self.draw.choice([4, 125]))  # the latter overflows
        for _ in range(2):
            self.optimizer.zero_grad()
            self.backward(scale=scaler.scale, odd=True)
            scaler.unscale_(self.optimizer)
            scaler.step(self.optimizer)
            scaler.update(2.0)
        self.optimizer.zero_grad()
        return True

    def odd_gradient(self):
        if self.name == "Adafactor":  # spreads a gradient that was put there by hand over its row
            return self.plain()
        self.optimizer.zero_grad()
        self.backward()
        parameter, gone = self.pruned()
        if parameter.grad is not None:
            parameter.grad[gone] = self.draw.choice([torch.nan, torch.inf, -torch.inf])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def odd_moment(self):
        parameter, gone = self.pruned()
        for state in self.optimizer.state.get(parameter, {}).values():
            if isinstance(state, torch.Tensor) and state.shape == parameter.shape:
                state[gone] = self.draw.choice([torch.nan, torch.inf, 1.0])
        return self.plain()

    def dense_weights(self):
        self.model.load_state_dict(Network().state_dict())
        self.masks.apply_(self.model)
        return True

    def dense_optimiser(self):
        state = copy.deepcopy(self.optimizer.state_dict())
        for own in state["state"].values():
            for value in own.values():
                if isinstance(value, torch.Tensor) and value.ndim:
                    value.add_(1e-3)
        self.optimizer.load_state_dict(state)
        return self.plain()

    def copied(self):
        self.follows &= self.draw.random() < 0.5  # a copy whose optimiser was copied first does not know its modules
        pair = (self.model, self.optimizer) if self.follows else (self.optimizer, self.model)
        old = self.model
        for made in copy.deepcopy(pair):
            if isinstance(made, nn.Module):
                self.model = made
            else:
                self.optimizer = made
        assert all(a is not b for a, b in zip(old.parameters(), self.model.parameters(), strict=True))
        return self.plain()

    def pickled(self):
        place = io.BytesIO()
        with pytest.warns(PrunelabWarning, match=r"call masks.hold again after loading"):
            torch.save((self.model, self.optimizer), place)
        place.seek(0)
        self.model, self.optimizer = torch.load(place, weights_only=False)
        self.hold()
        return True

    def assigned(self):
        self.model.load_state_dict(Network().to(next(self.model.parameters()).dtype).state_dict(), assign=True)
        if self.follows:
            with pytest.warns(PrunelabWarning, match=r"build the optimiser anew, and call masks.hold"):
                self.optimizer.step()
            self.holds()
        self.build()
        self.hold()
        return True

    def other_type(self):
        kind = self.draw.choice([torch.float64, torch.float32, torch.bfloat16])
        self.model.to(kind)
        self.build()
        self.hold()
        return self.plain()

    def pruned_further(self):
        more = prune(self.model, "random", 0.1, scope="layer", current=self.masks, seed=self.draw.randrange(99))
        if self.draw.random() < 0.5:
            self.handle.remove()
        self.masks = more
        self.hold()
        return self.plain()

    def averaged(self):
        average = torch.optim.swa_utils.AveragedModel(self.model)
        self.plain()
        average.update_parameters(self.model)
        assert not any(average.module.get_parameter(n)[~m].any() for n, m in self.masks.items())
        return True

    def frozen(self):
        layer = self.draw.choice(["conv", "follow", "hidden"])
        for parameter in self.model.get_submodule(layer).parameters():
            parameter.requires_grad_(not parameter.requires_grad)
        self.build()
        self.hold()
        return self.plain()

    def other_rate(self):
        for group in self.optimizer.param_groups:
            group["lr"] *= self.draw.choice([0.5, 1.5])
            if "weight_decay" in group:
                group["weight_decay"] = self.draw.choice([0.0, 0.1])
        return self.plain()

    def released(self):
        with self.handle:
            self.plain()
        self.hold()
        return True

    # ----

    def holds(self):
        for name, mask in self.masks.items():
            parameter = self.parameter(name)
            assert not parameter.detach()[~mask].count_nonzero(), name
            for what, state in self.optimizer.state.get(parameter, {}).items():
                if isinstance(state, torch.Tensor) and state.shape == parameter.shape:
                    assert not state[~mask].count_nonzero(), (name, what)

    def run(self, operations):
        own = [
            *(self.plain, self.accumulated, self.autocast, self.closure, self.norm_at_zero, self.clipped, self.scaled),
            *(self.odd_gradient, self.odd_moment, self.dense_weights, self.dense_optimiser, self.copied, self.pickled),
            *(self.assigned, self.other_type, self.pruned_further, self.averaged, self.frozen, self.other_rate),
            self.released,
        ]
        for _ in range(operations):
            act = self.draw.choice(own)
            if self.masks.sparsity > 0.9 or not any(p.requires_grad for p in self.model.parameters()):
                self.new()
            try:
                act()
                self.holds()
            except Exception as error:
                error.add_note(f"{act.__name__}, {self.name}, after {sum(self.counts.values())} operations")
                raise
            self.counts[act.__name__] += 1
            if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
                self.counts["diverged"] += 1
                self.new()


@pytest.mark.parametrize("operations", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_what_is_pruned_stays_0_through_random_operations(operations):
    campaign = Campaign(operations)
    campaign.run(operations)
    assert campaign.counts["diverged"] <= operations // 50
    assert len(campaign.counts.keys() - {"diverged"}) == 20
    assert Masks(campaign.masks).sparsity > 0.3
