"""Channels that have to go together are scored together and go together, by every score, in exact numbers."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from acting import looked_at
from torch import nn

from prunelab import pruners
from prunelab.errors import PrunelabError
from prunelab.masks import MaskError
from prunelab.pruners import METHODS, build, prune
from prunelab.pruners.units import competing, there
from prunelab.runs import Store
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.structure import shrink
from prunelab.training.experiment import run_all


class Stream(nn.Module):
    """Two channels that ``first`` and ``back`` make together, and three of ``there`` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.there = nn.Linear(1, 2, bias=False), nn.Linear(2, 3, bias=False)
        self.back, self.out = nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)
        self.first.weight.data = torch.tensor([[1.0], [-2.0]])
        self.there.weight.data = torch.tensor([[1.0, 2.0], [-3.0, 0.0], [1.0, 4.0]])
        self.back.weight.data = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 1.0]])
        self.out.weight.data = torch.tensor([[5.0, 1.0]])

    def forward(self, x):
        x = self.first(x)
        return self.out(x + self.back(F.relu(self.there(x))))


def methods():
    """The scores that can be given to channels."""
    for name, method in METHODS.items():
        free = {field.name for field in dataclasses.fields(method.pruner)} - set(method.preset)
        if issubclass(method.pruner, pruners.Ranking) and "granularity" in free and name != "wanda":
            yield name


def scores(model, x, **options):
    return build(Prune("magnitude", options={"granularity": "channel", **options})).scores(looked_at(model, example=x))


@pytest.mark.parametrize(
    ("combine", "stream", "inner"),
    [
        # of channel 0 in first, there, back, out: 1, 5, 3, 5; of channel 1: 2, 6, 2, 1
        # of the three inner ones in there and back: 3, 2 | 3, 1 | 5, 2
        ("sum", [14, 11], [5, 4, 7]),
        ("mean", [14 / 4, 11 / 4], [5 / 2, 2, 7 / 2]),
        ("max", [5, 6], [3, 3, 5]),
    ],
)
def test_what_each_layer_says_of_a_channel_is_combined(combine, stream, inner):
    model, x = Stream(), torch.ones(1, 1)
    found = scores(model, x, combine=combine)
    assert found["first"].tolist() == pytest.approx([2 * score / sum(stream) for score in stream])
    assert found["there"].tolist() == pytest.approx([3 * score / sum(inner) for score in inner])
    masks = prune(model, "magnitude", 0.5, granularity="channel", scope="layer", combine=combine, example=x)
    gone = min(range(2), key=stream.__getitem__)
    for name in ("first.weight", "back.weight"):
        assert masks[name].any(1).tolist() == [channel != gone for channel in range(2)], name
    assert shrink(model, masks, x).out.weight.tolist() == [[[5.0, 1.0][1 - gone]]]


def test_the_squared_lengths_of_a_channel_are_added_before_the_root():
    found = scores(Stream(), torch.ones(1, 1), norm=2, combine="sum")["first"]
    one, two = 1 + 11**0.5 + 5**0.5 + 5, 2 + 20**0.5 + 2**0.5 + 1
    assert found.tolist() == pytest.approx([2 * one / (one + two), 2 * two / (one + two)])


def test_taylor_of_a_channel_is_the_square_of_the_sum_in_each_layer():
    model, x, y = Stream(), torch.ones(1, 1), torch.zeros(1, 1)
    F.mse_loss(model(x), y).backward()
    products = {name: (p * p.grad).detach() for name, p in model.named_parameters()}
    own = [products["first.weight"].sum(1), products["there.weight"].sum(0)]
    own += [products["back.weight"].sum(1), products["out.weight"].sum(0)]
    expected = torch.stack([total.square() for total in own]).mean(0)
    pruner = build(Prune("taylor", options={"granularity": "channel"}))
    found = pruner.scores(looked_at(model, [(x, y)], loss=F.mse_loss))["first"]
    torch.testing.assert_close(found, expected / expected.mean())


def test_the_share_of_the_signal_is_that_of_what_reads_a_channel():
    model, x = Stream(), torch.ones(1, 1)
    stream = torch.tensor([1.0, -2.0])  # of which the layer there gets 1, 4 | 3, 0 | 1, 8
    after = stream + model.back.weight @ F.relu(model.there.weight @ stream)
    own = (model.out.weight[0] * after).abs()
    expected = (torch.tensor([1 / 5 + 1 + 1 / 9, 4 / 5 + 0 + 8 / 9]) + own / own.sum()) / 2
    found = build(Prune("signal")).scores(looked_at(model, [(x, x)]))["first"]
    torch.testing.assert_close(found.detach(), (expected / expected.mean()).detach())


class Block(nn.Module):
    """A residual block; where it has more filters than inputs, a convolution stands in its shortcut."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.one, self.norm_1 = nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters)
        self.two, self.norm_2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters)
        self.side = nn.Conv2d(channels, filters, 1) if channels != filters else nn.Identity()

    def forward(self, x):
        return F.relu(self.norm_2(self.two(F.relu(self.norm_1(self.one(x))))) + self.side(x))


def residual():
    torch.manual_seed(0)
    blocks = Block(8, 8), Block(8, 8), Block(8, 12), Block(12, 12)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *blocks, *head).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model, torch.rand(12, 3, 9, 9), torch.arange(12) % 4


@pytest.mark.parametrize("method", list(methods()))
def test_every_score_takes_exactly_the_channels_that_are_asked_for_and_they_can_be_removed(method):
    model, x, y = residual()
    before = {name: p + 0.1 for name, p in model.named_parameters()}
    how = {"batches": [(x, y)], "start": before, "granularity": "channel", "scope": "layer"}
    how |= {"steps": 5} if method == "synflow" else {}
    state = copy.deepcopy(model.state_dict())
    groups, masks = competing(looked_at(model, example=x), "channel"), None
    left = {name: space.size for name, space in groups.items()}
    assert list(left.values()) == [8, 8, 8, 12, 12, 12]
    for amount in (0.3, 0.4):
        new = prune(model, method, amount, current=masks, **how)
        assert new == prune(model, method, amount, current=masks, **how)
        assert masks is None or new & masks == new
        masks = new
        count = int if method in ("dropnet", "apoz") else round
        left = {name: size - count(amount * size) for name, size in left.items()}
        assert {name: int(own.sum()) for name, own in there(groups, masks).items()} == left
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    masks.apply_(model)
    small = shrink(model, masks, x[:2])
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert {name: len(small.get_parameter(f"{name}.weight")) for name in groups} == left


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_half_of_an_inverted_bottleneck_is_half_of_it(scope):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(24, 144, 1), nn.BatchNorm2d(144), nn.ReLU6(), nn.Conv2d(144, 144, 3, groups=144), nn.BatchNorm2d(144),
        nn.ReLU6(), nn.Conv2d(144, 24, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3),
    ).eval()  # fmt: skip
    x = torch.randn(2, 24, 8, 8)
    masks = prune(model, "magnitude", 0.5, granularity="channel", scope=scope, layers=["0", "3"], example=x)
    small = shrink(model, masks, x)
    assert small[0].weight.shape == (72, 24, 1, 1)
    assert small[3].weight.shape == (72, 1, 3, 3)
    assert small[6].weight.shape == (24, 72, 1, 1)
    with pytest.raises(MaskError, match="layer '0' makes the same ones, so name it as well"):
        prune(model, "magnitude", 0.5, granularity="channel", layers=["3"], example=x)


def test_half_of_a_residual_network_by_layer_is_a_quarter_of_it():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=10).eval(), torch.randn(2, 3, 64, 64)
    small = shrink(model, prune(model, "magnitude", 0.5, granularity="channel", scope="layer", example=x), x)
    sizes = [sum(p.numel() for p in network.parameters()) for network in (small, model)]
    assert sizes[0] / sizes[1] == pytest.approx(0.251, abs=0.001)
    torch.testing.assert_close(small(x), small(x))


def test_groups_of_a_convolution_lose_as_many_each_or_go_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=4), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(2, 3, 4, 4)
    for granularity, widths in (("channel", [4, 8, 4]), ("head", [4, 8, 2])):
        masks = prune(model, "magnitude", 0.5, granularity=granularity, scope="layer", example=x)
        small = shrink(model, masks, x)
        assert [len(small[0].weight), len(small[2].weight), small[2].groups] == widths


def test_channels_of_layers_of_any_kind_go():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 8, 3),
        nn.ReLU(),
        nn.ConvTranspose1d(8, 6, 3),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    x = torch.randn(2, 2, 9)
    masks = prune(model, "magnitude", 0.5, granularity="channel", scope="layer", example=x)
    small = shrink(model, masks, x)
    assert [small[0].out_channels, small[2].in_channels, small[2].out_channels] == [4, 4, 3]
    again = prune(model, "magnitude", 0.5, granularity="channel", scope="layer", example=x, current=masks)
    assert [shrink(model, again, x)[place].out_channels for place in (0, 2)] == [2, 1]


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.follow, self.out = nn.Embedding(20, 8), nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, x):
        return self.out(self.follow(self.words(x))[0])


def test_hidden_units_of_a_recurrent_layer_go_with_their_four_gates():
    torch.manual_seed(0)
    model, x = Tagger(), torch.arange(14).view(2, 7)
    masks = prune(model, "magnitude", 0.5, granularity="channel", scope="layer", example=x)
    small = shrink(model, masks, x)
    assert [tuple(p.shape) for p in (small.words.weight, small.follow.weight_hh_l0, small.out.weight)] == [
        (20, 4),
        (24, 6),
        (5, 6),
    ]
    masks.apply_(model)
    torch.testing.assert_close(small(x), model(x))


def test_what_has_no_channels_to_lose_is_told_in_one_line():
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.ones(1, 3)
    with pytest.raises(MaskError, match=r"^granularity 'channel': no channel of these layers may go: .* output"):
        prune(model, "magnitude", 0.5, granularity="channel", example=x)
    with pytest.raises(PrunelabError, match=r"^the model has to be seen running: give example="):
        prune(Stream(), "magnitude", 0.5, granularity="channel")
    lookup = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 3))
    with pytest.raises(MaskError, match="whose activations can be seen"):
        prune(lookup, "dropnet", 0.5, granularity="channel", batches=[torch.arange(5)], exact=False)
    with pytest.raises(PrunelabError, match="'signal' is one of all that reads a channel"):
        prune(Stream(), "signal", 0.5, granularity="weight")


@pytest.mark.parametrize("method", ["magnitude", "dropnet", "taylor"])
def test_runs_prune_channels_round_by_round(method, tmp_path):
    data, train = Data("digits", train_size=200, test_size=100), Train(epochs=1)
    prune_ = Prune(method, 0.3, 2, options={"granularity": "channel", "allow_empty": True})
    results = run_all(
        [Run(data, Model("resnet20", (4, 6, 8)), train, prune_)], store=Store(tmp_path), jobs=1, progress=False
    )
    assert not results.failed
    assert (results.rounds["weights"].diff().dropna() < 0).all()
    record = results.store.removals(results.ids[0])
    gone = {name for name, rounds in record.items() if name.startswith("round/") and (rounds >= 0).any()}
    assert any("norm" in name or "bn" in name for name in gone)
