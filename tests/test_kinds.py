"""Every method on networks of other layers than Linear and Conv2d: it prunes, or says in one line why it does not."""

import copy

import pytest
import torch
from torch import nn

from prunelab.errors import PrunelabError
from prunelab.pruners import prune
from prunelab.pruners.registry import METHODS


class Conv1D(nn.Module):
    """As that of transformers: a Linear whose weight is [inputs, outputs]."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


class Tagger(nn.Module):
    """Embedding, LSTM, attention."""

    def __init__(self):
        super().__init__()
        self.words, self.follow = nn.Embedding(9, 6), nn.LSTM(6, 8, batch_first=True)
        self.mix, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        x = self.follow(self.words(x))[0]
        return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))


def network(kind):
    torch.manual_seed(0)
    if kind == "tagger":
        return Tagger(), torch.randint(9, (12, 7))
    if kind == "transposed":
        first, second = nn.ConvTranspose2d(2, 8, 2), nn.ConvTranspose2d(8, 6, 2)
        return nn.Sequential(
            first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(150, 4)
        ), torch.randn(12, 2, 3, 3)
    if kind == "1-D":
        first, second = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 6, 3)
        return nn.Sequential(
            first, nn.BatchNorm1d(8), nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(30, 4)
        ), torch.randn(12, 3, 9)
    if kind == "3-D":
        first, second = nn.Conv3d(1, 4, 2), nn.Conv3d(4, 6, 2)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)), torch.randn(
            12, 1, 4, 4, 4
        )
    return nn.Sequential(Conv1D(8, 5), nn.ReLU(), Conv1D(6, 8), nn.ReLU(), Conv1D(4, 6)), torch.randn(12, 5)


ALWAYS = ("magnitude", "random", "taylor", "snip", "movement")


@pytest.mark.parametrize("kind", ["1-D", "3-D", "transposed", "turned", "tagger"])
@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if not entry.pruner.while_training])
def test_a_method_prunes_or_says_in_one_line_why_not(method, kind):
    model, x = network(kind)
    start = {name: 0.9 * parameter.detach() for name, parameter in model.named_parameters()}
    try:
        masks = prune(model, method, 0.3, batches=[(x, torch.arange(12) % 4)], start=start)
    except PrunelabError as error:
        said = str(error)
        assert "\n" not in said
        assert method not in ALWAYS, said
        return
    assert method == "none" or 0 < masks.sparsity < 1
    assert masks.model_sparsity <= masks.sparsity
    pruned = copy.deepcopy(model).eval()
    masks.apply_(pruned)
    assert pruned(x).isfinite().all()
    units = [n for n in masks if masks[n].dim() == 1 and n.endswith("bias") and n.replace("bias", "weight") in masks]
    for name in units:  # a unit that is gone gives nothing
        seen = []
        layer = pruned.get_submodule(name.removesuffix(".bias"))
        handle = layer.register_forward_hook(lambda *given, seen=seen: seen.append(given[-1]))
        pruned(x)
        handle.remove()
        if seen and not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            axis = -1 if kind in ("turned", "tagger") or isinstance(layer, nn.Linear) else 1
            assert not seen[0].movedim(axis, 0)[~masks[name]].any()
