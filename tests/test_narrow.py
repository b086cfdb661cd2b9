"""Training without what is masked changes no number, in models that are no chains, too."""

import copy

import pytest
import torch
from torch import nn

from prunelab import models
from prunelab.data import load
from prunelab.gates import Gate
from prunelab.masks import Masks
from prunelab.pruners.units import unit_masks
from prunelab.settings import Data, Model, Train
from prunelab.training import train
from prunelab.training.narrow import Narrow, narrow
from prunelab.training.train import Member, Population, generator

NETWORKS = {
    "resnet20": (6, 8, 12),
    "dropnet_resnet18": (6, 8, 10, 12),
    "dropnet_vgg19": (6, 6, 8, 8, 10, 12),
    "vgg11": (6, 8, 8, 10, 10, 12),
}
SGD = Train(epochs=2, batch_size=20, optimiser="sgd", lr=0.02, momentum=0.9)
DECAYING = [
    Train(epochs=2, batch_size=20, optimiser="sgd", lr=0.02, weight_decay=0.05),
    Train(epochs=2, batch_size=20, optimiser="sgd", lr=0.02, momentum=0.9, weight_decay=0.05),
    Train(epochs=2, batch_size=20, optimiser="adam", lr=0.002, weight_decay=0.05),
    Train(epochs=2, batch_size=20, optimiser="adamw", lr=0.002, weight_decay=0.05),
]


@pytest.fixture(scope="module")
def digits():
    return load(Data("digits", train_size=80))


def net(name, seed=0):
    return models.build(Model(name, NETWORKS[name]), (1, 8, 8), 10, seed)


def smooth(model):
    """The model without kinks: two float32 roundings on either side of a ReLU's 0 are two trainings soon."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            model.set_submodule(name, nn.SiLU())
        elif isinstance(module, nn.MaxPool2d):
            model.set_submodule(name, nn.AvgPool2d(module.kernel_size, module.stride))
    return model


def half(model, seed=0, closed=()):
    """Every other filter or so of each hidden layer, by the seed; of every fifth layer one; gates closed at random."""
    draw = torch.Generator().manual_seed(seed)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    kept = {}
    for number, layer in enumerate(layers):
        rows = len(model.get_submodule(layer).weight)
        kept[layer] = torch.rand(rows, generator=draw) < 0.5
        if number % 5 == 4:
            kept[layer] = torch.arange(rows) == number % rows
    gates = {f"{n}.open": torch.rand(m.channels, generator=draw) < 0.5 for n, m in model.named_modules() if n in closed}
    return Masks({**unit_masks(model, kept), **gates})


def trained(model, masks, settings, data, epochs=2):
    member = Member(model, settings, masks, generator(0, "order"))
    population = Population(data)
    for _ in range(epochs):
        population.epoch([member])
    return member, population.evaluate([member], data.test)[0]


@pytest.mark.parametrize(
    ("name", "settings"), [*((name, SGD) for name in NETWORKS), *(("resnet20", settings) for settings in DECAYING)]
)
def test_the_narrowed_network_learns_what_the_whole_one_does(digits, name, settings, monkeypatch):
    start = smooth(net(name))
    gates = [n for n, m in start.named_modules() if isinstance(m, Gate)]
    masks = half(start, closed=gates[::2])
    masks.apply_(start)
    part = narrow(start, masks, digits.scale(digits.train.x[:1]))
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(part.model) < 0.8 * count(start)
    small, its = trained(copy.deepcopy(start), masks, settings, digits)
    monkeypatch.setattr(train, "narrow", lambda model, masks, example: Narrow(model, masks, {}))
    whole, wholes = trained(start, masks, settings, digits)
    assert its.loss == pytest.approx(wholes.loss, rel=1e-3)
    for key, value in whole.model.named_parameters():
        torch.testing.assert_close(small.model.get_parameter(key), value, rtol=1e-3, atol=2e-4)
        for kind in whole.moments:
            moment, other = whole.moments[kind][key], small.moments[kind][key]
            torch.testing.assert_close(other, moment, rtol=1e-2, atol=1e-3)
    x = digits.scale(digits.test.x[:30])
    small.model.eval()
    whole.model.eval()
    torch.testing.assert_close(small.model(x), whole.model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [*DECAYING, SGD], ids=lambda s: f"{s.optimiser} {s.momentum:g} {s.weight_decay:g}")
@pytest.mark.parametrize("name", ["mlp", "dropnet_b"])
def test_weights_that_read_a_unit_left_out_decay_and_move_as_if_it_were_there(digits, name, settings, monkeypatch):
    """Also the moments that they had before the unit went go on."""

    def run():
        start = models.build(Model(name, (6, 5)), (1, 8, 8), 10, 0)
        member = Member(start, settings, Masks.ones(start), generator(0, "order"))
        population = Population(digits)
        population.epoch([member])
        layer = next(iter(dict(start.named_parameters()))).partition(".")[0]
        masks = unit_masks(start, {layer: torch.arange(6) > 1})
        member.change(member.model, masks, member.moments)
        assert bool(member.part(digits).index) == (train.narrow is narrow)
        for _ in range(2):
            population.epoch([member])
        return member

    small = run()
    monkeypatch.setattr(train, "narrow", lambda model, masks, example: Narrow(model, masks, {}))
    whole = run()
    key = [name for name, parameter in whole.model.named_parameters() if parameter.dim() > 1][1]
    read = len(whole.model.get_parameter(key)[0]) // 6 * 2  # of both units, flattened maps too
    for parts in [lambda m: dict(m.model.named_parameters()), *(lambda m, k=k: m.moments[k] for k in whole.moments)]:
        assert torch.equal(parts(small)[key][:, :read], parts(whole)[key][:, :read])
        assert parts(whole)[key][:, :read].any()
        for name, value in parts(whole).items():
            torch.testing.assert_close(parts(small)[name], value, rtol=1e-3, atol=1e-4)


def test_a_network_with_a_penalty_stays_whole(digits):
    start = models.build(Model("mlp", (6, 5)), (1, 8, 8), 10, 0)
    masks = unit_masks(start, {"hidden_1": torch.arange(6) > 1})
    member = Member(start, SGD, masks, generator(0, "order"), penalty=lambda model: {})
    assert member.part(digits).model is start


def gradients(model, logits):
    keys, leaves = zip(*model.named_parameters(), strict=True)
    return dict(zip(keys, torch.autograd.grad(logits.square().sum(), leaves), strict=True))


def test_what_the_narrowed_network_computes_is_exact(digits):
    for name in NETWORKS:
        start = net(name, seed=3).double()
        masks = half(start, seed=3)
        masks.apply_(start)
        x = digits.scale(digits.train.x[:7]).double()
        part = narrow(start, masks, x[:1])
        for training in (True, False):
            start.train(training)
            part.model.train(training)
            logits, expected = part.model(x), start(x)
            torch.testing.assert_close(logits, expected)
            whole = gradients(start, expected)
            for key, gradient in gradients(part.model, logits).items():
                mask = masks.get(key, torch.ones_like(whole[key]))
                torch.testing.assert_close(gradient * part.cut(key, mask), part.cut(key, whole[key] * mask))


def test_a_unit_whose_bias_learns_or_that_a_skip_keeps_alive_stays():
    start = net("dropnet_resnet18")
    rows = torch.arange(6) < 4
    everywhere = dict.fromkeys(("conv", "stage_1.block_1.conv_2", "stage_1.block_2.conv_2"), rows)
    example = torch.zeros(1, 1, 8, 8)

    def left(masks):
        own = copy.deepcopy(start)
        masks.apply_(own)
        return narrow(own, masks, example).model.conv.out_channels

    assert left(unit_masks(start, everywhere)) == 4
    assert left(unit_masks(start, {"conv": rows})) == 6
    biased = {name: mask for name, mask in unit_masks(start, everywhere).items() if name != "conv.bias"}
    assert left(Masks(biased)) == 6


def test_a_layer_that_is_empty_keeps_a_unit_and_learns_nothing(digits):
    start = net("resnet20")
    masks = unit_masks(start, {"stage_2.block_1.conv_1": torch.zeros(8, dtype=torch.bool)})
    member, measured = trained(start, masks, SGD, digits)
    assert not start.get_parameter("stage_2.block_1.conv_1.weight").any()
    assert member.failure is None
    assert measured.loss > 0


def test_with_dropout_a_network_that_is_no_chain_stays_whole():
    start = models.build(Model("vgg_like", (4, 4, 6, 6, 6, 8)), (3, 32, 32), 10, 0)
    masks = half(start)
    assert narrow(start, masks, torch.zeros(1, 3, 32, 32)).model is start
