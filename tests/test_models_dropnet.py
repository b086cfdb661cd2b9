"""DropNet's ResNet18 and VGG19: how many filters, where the masks act, what a filter that is gone gives."""

import pytest
import torch
from torch import nn

from prunelab import models
from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.models import layer_widths
from prunelab.pruners import Context
from prunelab.pruners.activations import unit_sums
from prunelab.pruners.dropnet import without_units
from prunelab.pruners.roles import norms_behind
from prunelab.settings import Model

SMALL = {"dropnet_resnet18": (4, 6, 8, 10), "dropnet_vgg19": (3, 4, 5, 6, 7, 8)}


def filters(model):
    """Of the layers that the paper masks."""
    return [units for name, units in layer_widths(model) if name != "dense"]


def test_resnet18_has_20_masked_convolutions_and_4800_filters():
    model = models.build(Model("dropnet_resnet18"), (3, 32, 32), 10, 0)
    assert filters(model) == [64] * 5 + [128] * 5 + [256] * 5 + [512] * 5
    assert sum(filters(model)) == 4800
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert all(m.stride == (1, 1) for m in model.modules() if isinstance(m, nn.Conv2d))


def test_vgg19_has_16_masked_convolutions_and_5504_filters_and_batch_norm_once_per_stage():
    model = models.build(Model("dropnet_vgg19"), (3, 32, 32), 10, 0)
    assert filters(model) == [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    assert sum(filters(model)) == 5504
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model) == 5
    assert model.dense.out_features == 256


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("side", [32, 64])
def test_images_of_both_sizes_give_logits(name, side):
    model = models.build(Model(name, SMALL[name], "glorot_uniform"), (3, side, side), 7, 0)
    assert model(torch.rand(2, 3, side, side)).shape == (2, 7)
    assert filters(model)[0] == SMALL[name][0]


@pytest.mark.parametrize("name", SMALL)
def test_samples_that_are_no_images_are_refused(name):
    with pytest.raises(PrunelabError, match=f"{name}.*images"):
        models.build(Model(name), (784,), 10, 0)


def test_no_relu_follows_the_addition():
    block = models.build(Model("dropnet_resnet18", SMALL["dropnet_resnet18"]), (1, 16, 16), 2, 0).stage_1.block_1
    x = -torch.rand(1, 4, 5, 5)
    nn.init.zeros_(block.conv_2.weight)
    nn.init.zeros_(block.conv_2.bias)
    torch.testing.assert_close(block(x), x)


def test_a_filter_of_vgg19_that_is_gone_gives_0_behind_batch_norm_too():
    model = models.build(Model("dropnet_vgg19", SMALL["dropnet_vgg19"], "glorot_uniform"), (1, 32, 32), 3, 0)
    x = torch.rand(16, 1, 32, 32)
    for _ in range(3):  # so that BatchNorm has seen something
        model(x)
    nn.init.constant_(model.norm_1.bias, 0.5)
    layers = [name for name, _ in layer_widths(model) if name != "dense"]
    assert norms_behind(model, layers) == {"conv_1_2": "norm_1", "conv_2_2": "norm_2", "conv_3_4": "norm_3"} | {
        "conv_4_4": "norm_4",
        "conv_5_4": "norm_5",
    }
    there = {"conv_1_2": torch.ones(3, dtype=torch.bool)}
    gone = {"conv_1_2": torch.tensor([True, False, True])}
    now = Context(model, Masks.ones(model, ["conv_1_2"]))
    masks = without_units(now, there, gone, "filter", allow_empty=False)
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {
        "conv_1_2.weight": 27,
        "conv_1_2.bias": 1,
        "norm_1.weight": 1,
        "norm_1.bias": 1,
    }
    masks.apply_(model)
    for mode in (True, False):
        seen = model.train(mode)[:5](x)
        assert (seen[:, 1] == 0).all()
        assert (seen[:, [0, 2]] != 0).any()


def test_the_activations_are_those_behind_batch_norm_where_the_paper_masks():
    model = models.build(Model("dropnet_vgg19", SMALL["dropnet_vgg19"], "glorot_uniform"), (1, 32, 32), 3, 0)
    nn.init.constant_(model.norm_1.bias, -5.0)
    x = torch.rand(4, 1, 32, 32)
    sums, samples = unit_sums(model, ["conv_1_1", "conv_1_2"], [(x, x)], lambda a, at: a.mean(at).sum(0))
    model.eval()
    torch.testing.assert_close(sums["conv_1_1"] / samples, model[:2](x).mean((0, 2, 3)).double().detach())
    torch.testing.assert_close(sums["conv_1_2"] / samples, model[:5](x).mean((0, 2, 3)).double().detach())
    assert sums["conv_1_2"].max() < 0


def test_the_activations_of_a_block_are_those_before_the_addition():
    model = models.build(Model("dropnet_resnet18", SMALL["dropnet_resnet18"]), (1, 16, 16), 2, 0).eval()
    x = torch.rand(3, 1, 16, 16)
    names = [name for name, _ in layer_widths(model)]
    sums, samples = unit_sums(model, names, [x], lambda a, at: a.mean(at).sum(0))
    assert len(sums) == 20
    assert samples == 3
    block, y = model.stage_1.block_1, model[:3](x)
    expected = block.relu_2(block.conv_2(block.relu_1(block.conv_1(y)))).mean((0, 2, 3))
    torch.testing.assert_close((sums["stage_1.block_1.conv_2"] / 3).float(), expected.detach())
    assert all(value.min() >= 0 for value in sums.values())
