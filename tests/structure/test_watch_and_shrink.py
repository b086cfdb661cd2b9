"""Models of every kind, watched and made smaller: equal outputs, and the parameters that a hand-made small one has."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunelab.masks import Masks
from prunelab.structure import shrink


class Net(nn.Module):
    """A network whose forward is a function of its parts."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.compute = forward

    def forward(self, *inputs, **options):
        return self.compute(self, *inputs, **options)


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own, as many packages have it."""

    def forward(self, x):
        return F.relu(
            F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        )


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def without(model, layers):
    """Masks without some rows of layers: name -> bool [rows], True = keep; biases and norms likewise."""
    masks = {}
    for name, keep in layers.items():
        for part, tensor in model.get_submodule(name).named_parameters(recurse=False):
            masks[f"{name}.{part}"] = keep.view(-1, *[1] * (tensor.dim() - 1)).expand(tensor.shape)
    return Masks(masks)


def half(size):
    return torch.arange(size) < size // 2


def shuffled(net, x):
    x = net.a(x)
    n, c, h, w = x.size()
    return net.b(F.relu(x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)))


def chunked(net, x):
    u, v = net.a(x).chunk(2, 1)
    return net.b(torch.cat([u, F.relu(net.m(v))], 1))


def squeezed(net, x):
    x = F.relu(net.conv(x))
    b, c, _, _ = x.size()
    y = net.gate(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)
    return net.head(F.relu(net.last(x * y.expand_as(x))).mean((2, 3)))


def attending(net, x):
    n, t, _ = x.shape
    q, k, v = (layer(x).reshape(n, t, net.heads, -1).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return net.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


def points(net, x):
    return net.c(F.relu(net.b(net.A @ F.relu(net.a(x)))).sum(1))


def grouped_norm(net, x):
    return net.b(F.relu(net.n(net.a(x))))


def recurrent(kind):
    return Net(
        lambda net, x: net.b(net.r(F.relu(net.a(x)))[0]), a=nn.Linear(5, 16), r=kind(16, 8, batch_first=True),
        b=nn.Linear(8, 2)
    )  # fmt: skip


def with_graph(net):
    net.register_buffer("A", torch.rand(7, 7))
    return net


every_second_half = torch.arange(16) % 8 < 4
# name -> model, masked rows, example, parameters that are left, counted by hand
CASES = {
    "batch norm of a subclass": lambda: (
        nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), NormAct(16), nn.Conv2d(16, 4, 3)),
        {"0": half(16), "1": half(16)},
        (2, 3, 12, 12),
        8 * 27 + 16 + 4 * (8 * 9 + 1),
    ),
    "a branch on values": lambda: (
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), Branch(), nn.Conv2d(8, 4, 3)),
        {"0": half(16)},
        (2, 3, 12, 12),
        8 * 28 + 8 * 73 + 4 * 73,
    ),
    "channel shuffle": lambda: (
        Net(shuffled, a=nn.Conv2d(3, 16, 1), b=nn.Conv2d(16, 4, 1)),
        {"a": every_second_half},
        (2, 3, 6, 6),
        8 * 4 + 4 * 9,
    ),
    "chunk": lambda: (
        Net(chunked, a=nn.Conv2d(3, 16, 1), m=nn.Conv2d(8, 8, 3, padding=1), b=nn.Conv2d(16, 4, 1)),
        {"a": every_second_half},
        (2, 3, 6, 6),
        8 * 4 + 8 * 37 + 4 * 13,
    ),
    "one axis": lambda: (
        nn.Sequential(nn.Conv1d(1, 16, 5), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 4, 5), nn.AdaptiveAvgPool1d(1)),
        {"0": half(16), "1": half(16)},
        (2, 1, 40),
        8 * 6 + 16 + 4 * 41,
    ),
    "three axes": lambda: (
        nn.Sequential(nn.Conv3d(1, 16, 3), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(16, 4, 2)),
        {"0": half(16)},
        (2, 1, 8, 8, 8),
        8 * 28 + 4 * (8 * 8 + 1),
    ),
    "transposed": lambda: (
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 12, 2, 2), nn.ReLU(), nn.Conv2d(12, 4, 3)),
        {"0": half(16)},
        (2, 3, 8, 8),
        8 * 28 + 8 * 48 + 12 + 4 * (12 * 9 + 1),
    ),
    "a layer's scale": lambda: (
        Net(
            lambda net, x: net.b(net.a(x) * net.g),
            a=nn.Conv2d(3, 16, 3),
            g=nn.Parameter(torch.rand(16, 1, 1)),
            b=nn.Conv2d(16, 4, 3),
        ),
        {"a": half(16)},
        (2, 3, 8, 8),
        8 * 28 + 8 + 4 * 73,
    ),
    "GRU": lambda: (recurrent(nn.GRU), {"a": half(16)}, (2, 7, 5), 8 * 6 + 24 * (8 + 8 + 2) + 18),
    "LSTM": lambda: (recurrent(nn.LSTM), {"a": half(16)}, (2, 7, 5), 8 * 6 + 32 * (8 + 8 + 2) + 18),
    "RNN": lambda: (recurrent(nn.RNN), {"a": half(16)}, (2, 7, 5), 8 * 6 + 8 * (8 + 8 + 2) + 18),
    "pixel shuffle": lambda: (
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(8, 3, 3)),
        {"0": half(32)},
        (2, 3, 8, 8),
        16 * 28 + 3 * 37,
    ),
    "PReLU and instance norm": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.PReLU(16),
            nn.Conv2d(16, 16, 3),
            nn.InstanceNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 4, 3),
        ),
        {"0": half(16), "2": half(16)},
        (2, 3, 12, 12),
        8 * 28 + 8 + 8 * 73 + 4 * 73,
    ),
    "a module twice": lambda: (
        Net(
            lambda net, x: net.f((net.e(x[:, 0]) - net.e(x[:, 1])).abs()),
            e=nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8)),
            f=nn.Linear(8, 1),
        ),
        {"e.0": half(16)},
        (2, 2, 6),
        8 * 7 + 8 * 9 + 9,
    ),
    "sums and a graph": lambda: (
        with_graph(Net(points, a=nn.Linear(5, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 4))),
        {"a": half(16), "b": half(16)},
        (2, 7, 5),
        8 * 6 + 8 * 9 + 4 * 9,
    ),
    "tokens": lambda: (
        Net(
            lambda net, x: net.b(net.a(x).flatten(2).transpose(1, 2)).mean(1),
            a=nn.Conv2d(3, 16, 4, 4),
            b=nn.Linear(16, 4),
        ),
        {"a": half(16)},
        (2, 3, 16, 16),
        8 * 49 + 4 * 9,
    ),
    "squeeze and excitation": lambda: (
        Net(
            squeezed,
            conv=nn.Conv2d(3, 16, 3, padding=1),
            last=nn.Conv2d(16, 8, 3, padding=1),
            head=nn.Linear(8, 5),
            gate=nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Sigmoid()),
        ),
        {"conv": half(16)},
        (2, 3, 8, 8),
        8 * 28 + 4 * 9 + 8 * 5 + 8 * 73 + 45,
    ),
    "values of attention": lambda: (
        Net(attending, heads=2, **{name: nn.Linear(16, 16) for name in ("q", "k", "v", "proj")}),
        {"v": every_second_half},
        (2, 5, 16),
        2 * 272 + 8 * 17 + 8 * 16 + 16,
    ),
    "one head of attention": lambda: (
        Net(attending, heads=2, **{name: nn.Linear(16, 16) for name in ("q", "k", "v", "proj")}),
        {"v": half(16)},
        (2, 5, 16),
        3 * 8 * 17 + 16 * 9,
    ),
    "a feed-forward part": lambda: (
        nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 3)),
        {"1.linear1": half(32)},
        (2, 7, 6),
        7 * 16 + 3 * 16 * 17 + 17 * 16 + 16 * 17 + 17 * 16 + 64 + 17 * 3,
    ),
    "depthwise with two for each": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), nn.Conv2d(16, 4, 1)),
        {"0": half(8), "2": half(16)},
        (2, 3, 8, 8),
        4 * 4 + 8 * 10 + 4 * 9,
    ),
    "an embedding": lambda: (
        Net(
            lambda net, x: net.b(F.relu(net.a(net.e(x)))), e=nn.Embedding(11, 8), a=nn.Linear(8, 16), b=nn.Linear(16, 3)
        ),
        {"a": half(16)},
        None,
        88 + 8 * 9 + 3 * 9,
    ),
    "norms of groups of one": lambda: (
        Net(grouped_norm, a=nn.Conv2d(3, 16, 3), n=nn.GroupNorm(16, 16), b=nn.Conv2d(16, 4, 1)),
        {"a": half(16), "n": half(16)},
        (2, 3, 8, 8),
        8 * 28 + 16 + 36,
    ),
}


def made(name):
    torch.manual_seed(0)
    model, layers, shape, expected = CASES[name]()
    x = torch.randint(11, (2, 5)) if shape is None else torch.randn(shape)
    return model.eval(), without(model, layers), x, expected


def masked(model, masks):
    whole = copy.deepcopy(model)
    masks.apply_(whole)
    return whole


@pytest.mark.parametrize("name", CASES)
def test_what_goes_is_what_a_hand_made_small_model_does_not_have(name):
    model, masks, x, expected = made(name)
    before = copy.deepcopy(model.state_dict())
    small = shrink(model, masks, x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(model, masks)(x), rtol=1e-4, atol=1e-5)
    assert count(small) == expected
    assert type(small) is type(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert list(small.state_dict()) == list(before)
