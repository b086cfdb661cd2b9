"""FLOPs and parameters as NNrelief's code counts them: the numbers it was seen to print, and right ones by hand."""

import pytest
import torch

from prunelab import models
from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.papers.nnrelief.published_counts import counted_parameters, flops
from prunelab.settings import Model
from prunelab.structure.cost import macs

SMALL, IMAGES = (1, 28, 28), (3, 32, 32)


def build(name, shape, classes=10):
    return models.build(Model(name), shape, classes, 0)


@pytest.mark.parametrize(
    ("name", "shape", "counted", "printed"),
    [
        ("lenet_300_100", SMALL, 266_610, 531_990),
        ("lenet_5", SMALL, 431_080, 4_614_930),
        ("vgg_like", IMAGES, 14_982_474, 627_480_054),
        ("vgg13", IMAGES, 9_935_434, 684_647_414),
        ("vgg16", IMAGES, 15_245_130, 628_003_830),
        ("vgg19", IMAGES, 20_554_826, None),
        ("resnet20", IMAGES, 267_914, 76_468_806),
        ("resnet32", IMAGES, 461_450, 133_148_806),
        ("resnet56", IMAGES, 848_522, 246_508_806),
    ],
)
def test_dense_networks_have_the_numbers_that_the_published_code_prints(name, shape, counted, printed):
    model = build(name, shape)
    assert counted_parameters(model) == counted
    if printed is None:
        with pytest.raises(PrunelabError, match="no maps beyond VGG-16"):
            flops(model, shape, faithful=True)
    else:
        assert flops(model, shape, faithful=True) == printed


@pytest.mark.parametrize(("name", "counted"), [("vgg_like", 15_028_644), ("vgg19", 20_600_996), ("resnet56", 854_372)])
def test_a_hundred_classes_count_among_the_parameters_only(name, counted):
    model = build(name, IMAGES, 100)
    assert counted_parameters(model) == counted
    if name != "vgg19":
        assert flops(model, IMAGES, faithful=True) == flops(build(name, IMAGES), IMAGES, faithful=True)


@pytest.mark.parametrize(
    ("name", "shape"), [("lenet_5", SMALL), ("vgg13", IMAGES), ("vgg19", IMAGES), ("resnet20", IMAGES)]
)
def test_the_right_count_is_twice_the_multiply_accumulates(name, shape):
    assert flops(build(name, shape), shape) == 2 * macs(build(name, shape), shape)


def test_structure_counts_and_sparsity_does_not():
    model = build("lenet_300_100", SMALL)
    masks = dict(Masks.ones(model))
    masks["hidden_1.weight"] = torch.zeros_like(masks["hidden_1.weight"])
    masks["hidden_1.weight"][:, :4] = True  # 4 inputs are read, all 300 units live
    masks["hidden_2.weight"] = masks["hidden_2.weight"].clone()
    masks["hidden_2.weight"][:, 7:] = False  # 7 of the 300 are read
    whole = Masks(masks)
    assert flops(model, SMALL, whole) == 2 * (4 * 7 + 7 * 100 + 100 * 10)
    assert flops(model, SMALL, whole, faithful=True) == 7 * 7 + 13 * 100 + 199 * 10


def test_filters_with_any_kernel_left_count():
    model = build("lenet_5", SMALL)
    masks = {name: mask.clone() for name, mask in Masks.ones(model).items()}
    first, second = (n for n, m in masks.items() if m.dim() == 4)
    masks[first][3:] = False
    masks[second][5:] = False
    dense = [n for n, m in masks.items() if m.dim() == 2]
    masks[dense[0]].view(500, 50, 16)[:, 5:] = False
    conv = 2 * 24**2 * 3 * 25 + 2 * 8**2 * 3 * 25 * 5
    assert flops(model, SMALL, Masks(masks)) == conv + 2 * (80 * 500 + 500 * 10)


def test_a_channel_of_a_residual_network_lives_while_the_shortcut_brings_something():
    model = build("resnet20", IMAGES)
    dense = flops(model, IMAGES)
    masks = {name: mask.clone() for name, mask in Masks.ones(model).items()}
    masks["stage_1.block_1.conv_2.weight"][:8] = False
    assert dense - flops(model, IMAGES, Masks(masks)) == 2 * 32 * 32 * 16 * 9 * 8
