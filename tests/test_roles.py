"""Which BatchNorm stands behind a layer, and whose units are the outputs: by what is called, not what is declared."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from prunelab import models, prune
from prunelab.masks import Masks
from prunelab.pruners import roles
from prunelab.pruners.roles import norms_behind, outputs
from prunelab.settings import Model
from prunelab.structure import graph

CONV = {"padding": 1, "bias": False}


class Declared(nn.Module):
    """Convolutions first, then their BatchNorms; the head before the body."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, **CONV), nn.Conv2d(4, 4, 3, **CONV)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.head(F.relu(self.bn2(F.max_pool2d(self.conv2(self.bn1(self.conv1(x)).relu()), 2))).mean((2, 3)))


class Branching(Declared):
    """The same, but it cannot be traced."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class PreActivation(nn.Module):
    """Each BatchNorm in front of its convolution; bn1 of the second block normalises a sum, not conv2 of the first."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, **CONV)
        for number in range(blocks):
            self.add_module(f"bn1_{number}", nn.BatchNorm2d(4))
            self.add_module(f"conv1_{number}", nn.Conv2d(4, 4, 3, **CONV))
            self.add_module(f"bn2_{number}", nn.BatchNorm2d(4))
            self.add_module(f"conv2_{number}", nn.Conv2d(4, 4, 3, **CONV))
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x, part = self.stem(x), self.get_submodule
        for n in range(2):
            y = part(f"conv1_{n}")(F.relu(part(f"bn1_{n}")(x)))
            x = x + part(f"conv2_{n}")(F.relu(part(f"bn2_{n}")(y)))
        return self.fc(x.mean((2, 3)))


class Between(nn.Module):
    """A weighted layer of another kind between a layer and the BatchNorm; where it branches, it cannot be traced."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches, self.conv, self.up = branches, nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 4, 2)
        self.norm, self.out = nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        if self.branches:
            x = x if x.sum() > 0 else -x
        return self.out(self.norm(self.up(self.conv(x))))


class Shared(nn.Module):
    """The same convolution and BatchNorm for two inputs; ``mixed``: the BatchNorm for something else as well."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.mixed, self.conv, self.norm = mixed, nn.Conv2d(1, 4, 3, **CONV), nn.BatchNorm2d(4)

    def forward(self, x):
        both = self.norm(self.conv(x)) + self.norm(self.conv(-x))
        return both + self.norm(x.expand(-1, 4, -1, -1)) if self.mixed else both


@pytest.mark.parametrize(
    ("model", "pairs"),
    [
        (Declared(), {"conv1": "bn1", "conv2": "bn2"}),
        (PreActivation(), {"conv1_0": "bn2_0", "conv1_1": "bn2_1"}),
        (Between(branches=False), {}),
        (Between(branches=True), {}),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4)), {}),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), {"0": "2"}),
        (Shared(mixed=False), {"conv": "norm"}),
        (Shared(mixed=True), {}),
    ],
    ids=lambda case: type(case).__name__,
)
def test_the_batch_norm_behind_a_layer_is_the_one_that_alone_reads_it(model, pairs):
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert norms_behind(model, layers) == pairs


def test_filters_of_a_layer_take_their_own_batch_norm_with_them_and_slimming_reads_its_scale():
    torch.manual_seed(0)
    model = Declared()
    masks = prune(model, "l1_filter", 0.5, scope="layer")
    for number in "12":
        assert torch.equal(masks[f"bn{number}.weight"], masks[f"conv{number}.weight"].flatten(1).any(1))
    model.bn1.weight.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    model.bn2.weight.data = torch.tensor([4.0, 3.0, 2.0, 1.0])
    masks = prune(model, "slimming", 0.5)
    assert masks["conv1.weight"].flatten(1).any(1).tolist() == [False, False, True, True]
    assert masks["conv2.weight"].flatten(1).any(1).tolist() == [True, True, False, False]


class Heads(nn.Module):
    """Two answers of one body, and a layer that nothing calls, declared last."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.actor, self.critic = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(8, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return {"policy": F.softmax(self.actor(x), 1), "value": self.critic(x) * 2}


class Twice(nn.Linear):
    """A layer whose forward is its own, which torch.fx goes into."""

    def forward(self, x):
        return 2 * super().forward(x)


class Added(nn.Module):
    """The outputs are a sum, one side of which comes from further in front."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x)
        return x + self.c(F.relu(self.b(x)))


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (Heads(), {"actor", "critic"}),
        (Declared(), {"head"}),
        (Branching(), {"conv2"}),  # as it was declared, since nobody knows better
        (Added(), {"a", "c"}),
        (nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 3), Twice(3, 2))})["net"], {"1"}),
        (nn.Linear(3, 2), {""}),
        (Between(branches=False), {"out"}),
    ],
    ids=lambda case: type(case).__name__,
)
def test_the_outputs_are_the_layers_that_reach_the_end_unmixed(model, found):
    names = {module: name for name, module in model.named_modules()}
    assert {names[layer] for layer in outputs(model)} == found


@pytest.mark.parametrize("model", [Heads(), Declared()])
def test_units_of_every_head_stay(model):
    masks = prune(model, "random_neuron" if isinstance(model, Heads) else "l1_filter", 0.5)
    assert all(masks[f"{layer}.weight"].all() for layer in ("head", "actor", "critic") if f"{layer}.weight" in masks)


def by_declaration(model: nn.Module) -> tuple[dict[str, str], str]:
    """The rule for models whose modules are declared in the order in which they are called, as an oracle."""
    found, layer = {}, ""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            layer = name
        elif isinstance(module, nn.BatchNorm2d) and module.num_features == len(model.get_submodule(layer).weight):
            found.setdefault(layer, name)
    return found, layer


@pytest.mark.parametrize(
    "name",
    [*models.MODELS, "resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5", "googlenet", "vit_b_16"],
)
def test_networks_declared_in_their_order_are_read_as_they_were(name):
    if name in models.MODELS:
        hidden = tuple(min(width, 8) for width in models.MODELS[name].hidden)
        model = models.build(Model(name, hidden), (3, 32, 32), 4, 0)
    else:
        options = {"init_weights": False} if name == "googlenet" else {}
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None, **options)
    norms, last = by_declaration(model)
    assert norms_behind(model, list(dict(model.named_modules()))) == norms
    assert outputs(model) == {model.get_submodule(last)}


def test_tracing_leaves_the_model_as_it_was():
    model = PreActivation().train()
    model.bn1_0.eval()
    prune(model, "l1_filter", 0.5, current=Masks({}))
    assert [module.training for module in model.modules()].count(False) == 1


def test_a_model_is_traced_once_and_again_when_it_has_other_modules(monkeypatch):
    traces = []
    monkeypatch.setattr(roles, "traced", lambda model: traces.append(1) or graph.traced(model))
    model = models.build(Model("resnet20"), (3, 32, 32), 10, 0)
    for _ in range(3):
        prune(model, "l1_filter", 0.5)
    assert len(traces) == 1
    model.norm = nn.BatchNorm2d(16)
    prune(model, "l1_filter", 0.5)
    assert len(traces) == 2
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None  # what is known of a model does not keep it
