"""Half of every space goes from networks of many kinds, and what is left gives the outputs of the masked network."""

import copy

import pytest
import torch
from networks import NETWORKS

from prunelab.structure import channel_groups, shrink
from prunelab.structure.watch import run


def halved(groups):
    """Masks of every second group of each space, as far as it may go."""
    kept = {}
    for name, space in groups.items():
        if space.pinned is None:
            kept[name] = space.fixed | (torch.arange(space.size) % 2 == 0)
    return groups.masks(kept)


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def difference(one, two, example):
    pairs = zip(run(one, example), run(two, example), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


@pytest.mark.filterwarnings("ignore::prunelab.structure.NotRemoved")  # sizes that are written in a forward stay
@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_every_space_goes_and_the_outputs_are_those_of_the_masked_network(name):
    model, example = NETWORKS[name]()
    before = copy.deepcopy(model.state_dict())
    masks = halved(channel_groups(model, example))
    small = shrink(model, masks, example)
    assert size(small) < size(model)
    masked = copy.deepcopy(model)
    masks.apply_(masked)
    assert difference(masked, small, example) < 1e-5
    assert difference(model, small, example) > 1e-4  # what went was there before
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
