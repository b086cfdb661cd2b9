"""What holds for every registered method on every model that it accepts."""

import copy
import dataclasses
import functools

import pytest
import torch

from prunelab import models
from prunelab.errors import PrunelabError
from prunelab.masks import layer_of
from prunelab.pruners import METHODS, build, first_masks, prune
from prunelab.pruners.select import scored_names, units_of
from prunelab.settings import Model, Prune
from prunelab.structure.cost import prunable_weights

SHAPE, CLASSES = (3, 12, 12), 4
MODELS = {
    "mlp": Model("mlp", (14, 9)),
    "dropnet_b": Model("dropnet_b", (6, 8)),
    "vgg_like": Model("vgg_like", (4, 4, 6, 6, 8, 10)),
    "resnet20": Model("resnet20", (4, 6, 8)),
}
WHOLE = [name for name, entry in METHODS.items() if not entry.pruner.while_training and name != "none"]
OWN_AMOUNT = {"nnrelief", "dropneuron", "retraining_free", "n_of_m"}  # their rule decides how much goes
OTHER_COUNT = {"dropnet_oracle": "one unit at a time", "coreset": "of each layer, and what it samples twice"}
NO_NEURONS, NO_FILTERS = ("dropnet_b", "resnet20"), ("mlp",)  # hidden Linear layers, Conv2d layers
REFUSED = {
    **dict.fromkeys(("coreset", "l1_neuron", "l2_neuron", "random_neuron"), NO_NEURONS),
    **dict.fromkeys(("l1_filter", "l2_filter", "random_filter"), NO_FILTERS),
    "slimming": ("mlp", "dropnet_b"),  # no BatchNorm
    "fpgm": ("mlp",),
}
PAIRS = [(method, model) for method in WHOLE for model in MODELS if model not in REFUSED.get(method, ())]

FEW = [p for p in PAIRS if p[0] != "dropnet_oracle" or p[1] in ("mlp", "dropnet_b")]  # it tries every single unit
# of a residual network "glance" counts sets of layers that share a skip: test_related.py
EXACT = [p for p in PAIRS if p[0] not in OWN_AMOUNT | OTHER_COUNT.keys() and p != ("glance", "resnet20")]


@functools.cache
def network(name):
    torch.manual_seed(0)
    shape = SHAPE if name != "vgg_like" else (3, 32, 32)
    model = models.build(MODELS[name], shape, CLASSES, 0).eval()
    x = torch.rand(12, *shape, generator=torch.Generator().manual_seed(1))
    return model, [(x, torch.arange(12) % CLASSES)]


def pruned(method, name, amount=0.4, seed=0, current=None):
    model, batches = network(name)
    options = {"allow_empty": True} if "allow_empty" in fields(method) else {}
    how = {"batches": batches, "seed": seed, "current": current, "start": before_training(name)}
    return prune(model, method, amount, **how, **options)


@functools.cache
def before_training(name):
    draw = torch.Generator().manual_seed(5)
    model, _ = network(name)
    return {key: value + 0.1 * torch.randn(value.shape, generator=draw) for key, value in model.named_parameters()}


def fields(method):
    return {field.name for field in dataclasses.fields(METHODS[method].pruner)} - set(METHODS[method].preset)


@pytest.mark.parametrize(("method", "name"), [(method, name) for method, names in REFUSED.items() for name in names])
def test_a_model_on_which_a_method_can_do_nothing_is_refused_in_one_line(method, name):
    with pytest.raises(PrunelabError, match=r"^[^\n]+$"):
        pruned(method, name)


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_masks_only_shrink_and_fit_the_model(method, name):
    model, _ = network(name)
    first = pruned(method, name)
    first.check(model)
    second = pruned(method, name, current=first)
    for key, mask in first.items():
        assert mask.dtype == torch.bool
        assert not (second[key] & ~mask).any()


@pytest.mark.parametrize(("method", "name"), FEW)
def test_the_model_and_its_mode_are_left_as_they_were(method, name):
    model, _ = network(name)
    before = copy.deepcopy(model.state_dict())
    model.train()
    try:
        pruned(method, name)
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("method", "name"), FEW)
def test_the_same_seed_gives_the_same_masks_whatever_torch_drew_before(method, name):
    one = pruned(method, name, seed=7)
    torch.rand(5)
    two = pruned(method, name, seed=7)
    assert all(torch.equal(mask, two[key]) for key, mask in one.items())


@pytest.mark.parametrize("amount", [0.25, 0.6])
@pytest.mark.parametrize(("method", "name"), EXACT)
def test_the_requested_amount_goes_exactly(method, name, amount):
    model, _ = network(name)
    masks = pruned(method, name, amount)
    pruner = build(Prune(method))
    granularity = pruner.granularity
    whole = first_masks(model, pruner)
    if granularity == "channel":  # test_channels_chosen.py
        return
    names = scored_names(model, whole, granularity)
    if method == "wanda":  # ranks within units, so that the amount holds in each layer
        for key in names:
            assert whole.counts[key] - masks.counts[key] == round(amount * whole.counts[key])
        return
    if granularity == "weight":
        total, left = whole.weights.total, masks.weights.kept
    else:
        total = sum(len(units) for units in units_of(model, whole, names).values())
        left = sum(int(units.sum()) for units in units_of(model, masks, names).values())
    gone = total - left
    if method in ("dropnet", "apoz"):  # DropNet's code rounds down, and removes one unit at least
        assert gone == max(int(amount * total), 1)
    elif method == "zero_keep":  # a filter that lost all of its weights to zeroing is gone as well
        assert gone >= round(amount * total)
    else:
        assert gone == round(amount * total)


@pytest.mark.parametrize(("method", "name"), FEW)
def test_no_layer_is_emptied_unasked(method, name):
    model, batches = network(name)
    masks = None
    for _ in range(3):
        try:
            masks = prune(model, method, 0.7, batches=batches, current=masks, start=before_training(name))
        except PrunelabError:
            return  # refused, with the name of the layer: test_pruners.py
        for key in prunable_weights(model):
            if key in masks:
                assert masks[key].any(), layer_of(key)


@pytest.mark.parametrize(("method", "name"), FEW)
def test_nothing_becomes_nan(method, name):
    model, batches = network(name)
    masks = pruned(method, name)
    copied = copy.deepcopy(model)
    masks.apply_(copied)
    with torch.no_grad():
        assert copied(batches[0][0]).isfinite().all()


def test_methods_that_prune_while_training_say_so():
    model, _ = network("mlp")
    for method in METHODS.keys() - set(WHOLE) - {"none"}:
        with pytest.raises(PrunelabError, match="does not prune finished models"):
            prune(model, method, 0.5)
