"""VGG and ResNet for small images: the parameter counts of NNrelief's code, inputs, and shrinking."""

import pytest
import torch

from prunelab import models
from prunelab.errors import PrunelabError
from prunelab.pruners import prune
from prunelab.settings import Model
from prunelab.structure import shrink

pytestmark = pytest.mark.filterwarnings("ignore::prunelab.structure.NotRemoved")
COUNTS = {
    ("vgg_like", 10): 14_990_922, ("vgg13", 10): 9_941_322, ("vgg16", 10): 15_253_578, ("vgg19", 10): 20_565_834,
    ("vgg_like", 100): 15_037_092, ("vgg13", 100): 9_987_492, ("vgg16", 100): 15_299_748, ("vgg19", 100): 20_612_004,
    ("resnet20", 10): 269_722, ("resnet32", 10): 464_154, ("resnet56", 10): 853_018,
    ("resnet20", 100): 275_572, ("resnet32", 100): 470_004, ("resnet56", 100): 858_868,
}  # fmt: skip


@pytest.mark.parametrize(("name", "classes"), COUNTS)
def test_parameters_are_those_of_the_published_code(name, classes):
    model = models.build(Model(name), (3, 32, 32), classes, 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name, classes]


@pytest.mark.parametrize("name", ["vgg_like", "vgg11", "resnet20", "resnet44", "resnet110"])
@pytest.mark.parametrize("side", [32, 64])
def test_both_sizes_of_images_are_taken(name, side):
    hidden = (4, 4, 8, 8, 8, 16) if name.startswith("vgg") else (4, 8, 8)
    model = models.build(Model(name, hidden), (3, side, side), 200, 0)
    assert model(torch.randn(2, 3, side, side)).shape == (2, 200)


def test_depths_count_the_layers():
    for depth in (20, 56):
        model = models.build(Model(f"resnet{depth}", (2, 2, 2)), (3, 32, 32), 10, 0)
        weighted = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
        assert len(weighted) == depth


@pytest.mark.parametrize("name", ["vgg_like", "resnet20"])
def test_they_shrink(name):
    hidden = (8, 8, 8, 16, 16, 16) if name == "vgg_like" else (8, 8, 16)
    model, x = models.build(Model(name, hidden), (3, 32, 32), 10, 0).eval(), torch.randn(2, 3, 32, 32)
    masks = prune(model, "l1_filter", 0.5, scope="layer")
    small = shrink(model, masks, x)
    assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(p.numel() for p in model.parameters())


def test_what_cannot_be_built_is_refused():
    with pytest.raises(PrunelabError, match=r"needs images \(C, H, W\)"):
        models.build(Model("vgg16"), (28,), 10, 0)
    with pytest.raises(PrunelabError, match="no fewer filters than the one before"):
        models.build(Model("resnet20", (8, 4, 4)), (3, 32, 32), 10, 0)
