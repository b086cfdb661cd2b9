"""Dead layers are found by name: those without weights, and those that no path reaches."""

import torch
from torch import nn

from prunelab.masks import Masks
from prunelab.structure.collapse import dead_layers


def test_a_layer_without_weights_is_dead():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert dead_layers(model, Masks.ones(model)) == []
    assert dead_layers(model, Masks({"2.weight": torch.zeros(2, 2)})) == ["2"]


def test_a_path_that_ends_between_two_living_layers_is_dead_where_it_ends():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    only_unit_0 = Masks({"0.weight": torch.tensor([[1, 1], [0, 0]])})
    assert dead_layers(model, only_unit_0 & Masks({"2.weight": torch.tensor([[0, 1], [0, 1]])})) == ["2"]
    assert dead_layers(model, only_unit_0 & Masks({"2.weight": torch.tensor([[0, 1], [1, 1]])})) == []
    two_steps = only_unit_0 & Masks(
        {"2.weight": torch.tensor([[0, 1], [1, 1]]), "4.weight": torch.tensor([[1, 0], [1, 0]])}
    )
    assert dead_layers(model, two_steps) == ["4"]


def test_paths_go_through_pooling_and_flatten():
    features = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(features, nn.Flatten(), nn.Linear(2 * 4, 3))
    filters = torch.stack([torch.ones(1, 3, 3), torch.zeros(1, 3, 3)])
    reads_first = torch.cat([torch.ones(3, 4), torch.zeros(3, 4)], 1)
    assert dead_layers(model, Masks({"0.0.weight": filters, "2.weight": reads_first})) == []
    assert dead_layers(model, Masks({"0.0.weight": filters, "2.weight": 1 - reads_first})) == ["2"]


def test_a_dead_path_is_what_the_outputs_say_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.randn(50, 4)
    found = set()
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        masks = Masks({n: torch.rand(m.shape, generator=generator) < 0.25 for n, m in Masks.ones(model).items()})
        model_of_masks = nn.Sequential(
            *(nn.Linear(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m for m in model)
        )
        masks.apply_(model_of_masks)
        constant = bool((model_of_masks(x).std(0) < 1e-6).all())
        assert constant == bool(dead_layers(model_of_masks, masks))
        found.add(constant)
    assert found == {True, False}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def forward(self, x):
        return x + self.inner(x)


def test_paths_are_not_followed_where_something_else_may_lead_around():
    broken = {"0.weight": torch.tensor([[1, 0], [0, 0]]), "1.weight": torch.tensor([[0, 1], [0, 1]])}
    chain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert dead_layers(chain, Masks(broken)) == ["1"]
    assert dead_layers(Residual(), Masks({f"inner.{name}": mask for name, mask in broken.items()})) == []
    mixing = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    assert dead_layers(mixing, Masks({"0.weight": broken["0.weight"], "2.weight": broken["1.weight"]})) == []


def test_paths_are_followed_only_where_inputs_are_units_in_their_order():
    half = torch.cat([torch.ones(4, 5), torch.zeros(4, 5)])
    tokens = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2))  # reads token by token
    reads = torch.arange(24).expand(2, 24) >= 12  # tokens 1.5 and on, of which the first four units live
    assert dead_layers(tokens, Masks({"0.weight": half, "3.weight": reads})) == []
    plain = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    assert dead_layers(plain, Masks({"0.weight": half, "3.weight": torch.arange(8).expand(2, 8) >= 4})) == ["3"]
    filters = torch.cat([torch.ones(2, 3, 1, 1), torch.zeros(2, 3, 1, 1)])
    places = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Linear(64, 6))  # reads places, of each map
    assert dead_layers(places, Masks({"0.weight": filters, "2.weight": torch.arange(64).expand(6, 64) >= 32})) == []
