"""Torchvision's networks made smaller: same outputs, and as small as another library makes them."""

import copy

import pytest
import torch
from torch import nn

from prunelab.pruners import prune
from prunelab.structure import remove_dead

torchvision = pytest.importorskip("torchvision")
SIZE = 64
# name -> the largest part of the parameters that may be left when half of each layer's filters are masked
QUICK = {"resnet18": 0.45, "mobilenet_v2": 0.25, "densenet121": 0.3}
SLOW = {"resnet50": 0.45, "vgg11_bn": 0.55, "mobilenet_v3_small": 0.4, "resnext50_32x4d": 0.7, "efficientnet_b0": 0.3}


def trained(model):
    """BatchNorms as after a training, so that a dead channel is not 0 behind them unless it is masked."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def check(name, method, most):
    torch.manual_seed(0)
    model, x = trained(getattr(torchvision.models, name)(num_classes=10)), torch.randn(2, 3, SIZE, SIZE)
    masks = prune(model, method, 0.5, scope="layer")
    found = remove_dead(model, masks, x)
    masked = copy.deepcopy(model)
    masks.apply_(masked)
    other = torch.randn(2, 3, SIZE + 32, SIZE + 32)  # not the example that shrink checks itself with
    with torch.no_grad():
        expected = masked(other)
        assert float((found.model(other) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert list(found.model.state_dict()) == list(model.state_dict())
    sizes = [sum(p.numel() for p in net.parameters()) for net in (found.model, model)]
    assert sizes[0] / sizes[1] <= most


@pytest.mark.parametrize("name", QUICK)
def test_half_of_the_filters_gone_gives_the_same_outputs(name):
    check(name, "l1_filter", QUICK[name])


def test_the_neurons_of_convnext_go_and_what_a_layer_norm_mixes_stays():
    check("convnext_tiny", "l1_neuron", 0.65)
    model = torchvision.models.convnext_tiny(num_classes=10).eval()
    masks = prune(model, "l1_filter", 0.5, scope="layer")
    found = remove_dead(model, masks, torch.randn(1, 3, SIZE, SIZE))
    assert "native_layer_norm in 'features.0.1' takes statistics over channels" in found.stayed["features.0.0"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_half_of_the_filters_of_larger_networks_gone_gives_the_same_outputs(name):
    check(name, "l1_filter", SLOW[name])


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_torch_simplify_agrees(name):
    """An oracle: it gives the same outputs, and where no skip joins filters it removes the same ones."""
    simplify = pytest.importorskip("simplify").simplify
    torch.manual_seed(0)
    if name == "vgg16":  # for CIFAR, of an eighth of the width
        layers, inputs = [], 3
        for width in (8, 8, "M", 16, 16, "M", 32, 32, 32, "M", 64, 64, 64, "M", 64, 64, 64, "M"):
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
        model, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10)), torch.randn(2, 3, 32, 32)
    else:
        model, x = torchvision.models.resnet18(num_classes=10), torch.randn(2, 3, SIZE, SIZE)
    trained(model)
    masks = prune(model, "l1_filter", 0.5, scope="layer")
    ours = remove_dead(model, masks, x).model
    theirs = copy.deepcopy(model)
    masks.apply_(theirs)
    with torch.no_grad():
        expected = theirs(x)
        theirs = simplify(theirs, x, fuse_bn=False).eval()
        scale = float(expected.abs().max())
        assert float((theirs(x) - expected).abs().max()) <= 1e-4 * scale
        assert float((ours(x) - expected).abs().max()) <= 1e-5 * scale
    for layer, module in model.named_modules():
        # Filters that a skip joins with live ones stay here, and the skip gets narrower; torch-simplify takes them out
        # and puts zeros back in their places while the network runs (BatchNormExpand), and its skips stay as they are.
        joined = name == "resnet18" and not layer.endswith(".conv1")
        if isinstance(module, nn.Conv2d):
            own, other = ours.get_submodule(layer).weight, theirs.get_submodule(layer).weight
            assert joined or len(own) == len(other), layer
            assert own.shape[1] <= other.shape[1] or joined, layer
