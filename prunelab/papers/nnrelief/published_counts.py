"""FLOPs and parameters as NNrelief's code counts them, mistakes included, beside counts that are right.

Source: the code of Dekhovich et al. (Machine Learning 113, 2024): only structure counts, that is, filters with any
kernel left and inputs of fully connected layers with any weight left. One multiplication and one addition are two.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab import models
from prunelab.data import load
from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.models.resnet import Block
from prunelab.papers.reported import BEST_TEST_EPOCH
from prunelab.runs import Store
from prunelab.training.load import masks_at

PUBLISHED_CLASSES = 10  # of the last layer, whatever it has
VGG_SIDES = (32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2)  # sides of VGG-16's maps, taken for every depth


@dataclass(frozen=True)
class _Layer:
    """One weighted layer: what of it is alive, and the side of its square map (0: fully connected)."""

    inputs: int
    outputs: int
    kernel: int
    side: int


def counted_parameters(model: nn.Module, masks: Mapping[str, Tensor] | None = None, *, faithful: bool = True) -> int:
    """Ones in the masks as the published code counts them: weights and biases of Conv2d and Linear layers.

    BatchNorm is not counted, and of a ResNet the first convolution is not either (section "compression" of the code's
    evaluation); so the compression of a network is this count of the dense one over this count.

    Args:
        model: The network in its dense shape.
        masks: Parameter name -> keep; a parameter without one is whole.
        faithful: False: the first convolution of a ResNet counts too.
    """
    first = {"conv.weight", "conv.bias"} if faithful and _residual(model) else set()
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for own, parameter in module.named_parameters(prefix=name, recurse=False):
                if own not in first:
                    mask = (masks or {}).get(own)
                    total += parameter.numel() if mask is None else int(mask.count_nonzero())
    return total


def flops(
    model: nn.Module, input_shape: tuple[int, int, int], masks: Masks | None = None, *, faithful: bool = False
) -> int:
    """FLOPs of one sample: two for each multiply-accumulate that the live structure needs.

    ``faithful`` gives the numbers of the published code: ``2 h^2 (C_in k^2 + 1) C_out`` of a convolution and
    ``(2 in - 1) out`` of a fully connected layer in LeNets and VGGs, ``(2 h^2 C_in k^2 - 1) C_out`` and one addition
    per position of a shortcut in ResNets; the last layer has 10 classes, VGGs of every depth have the maps of VGG-16,
    and the second convolution of a block has the block's input width. The terms of ResNets are derived: they give the
    numbers that the code was seen to print.

    Args:
        model: A LeNet, a VGG or a ResNet of ``models``, in its dense shape.
        input_shape: Of one sample, channels first.
        masks: Parameter name -> keep; None: nothing is pruned.
        faithful: As the published code counts.

    Raises:
        PrunelabError: another architecture, or, where it is faithful, VGG-19, on which the published code fails too.
    """
    whole = Masks.ones(model) if masks is None else Masks.ones(model) & masks
    if _residual(model):
        return _resnet(model, whole, input_shape, faithful)
    layers = list(_chain(model, whole, input_shape))
    if not faithful:
        return sum(2 * (k.side**2 if k.side else 1) * k.inputs * k.kernel**2 * k.outputs for k in layers)
    convs = [layer for layer in layers if layer.side]
    dense = [layer for layer in layers if not layer.side]
    sides = [layer.side for layer in convs]
    if len(convs) > 4:  # a VGG
        if len(convs) > len(VGG_SIDES):
            raise PrunelabError("the published count has no maps beyond VGG-16 and fails: leave faithful out")
        sides = list(VGG_SIDES[: len(convs)])
    total = sum(2 * side**2 * (k.inputs * k.kernel**2 + 1) * k.outputs for side, k in zip(sides, convs, strict=True))
    outputs = [layer.inputs for layer in dense[1:]] + [PUBLISHED_CLASSES]
    return total + sum((2 * layer.inputs - 1) * out for layer, out in zip(dense, outputs, strict=True))


def by_round(model: nn.Module, input_shape: tuple[int, int, int], masks: Mapping[int, Masks]) -> pd.DataFrame:
    """Both counts of a network in every round.

    Args:
        model: The network in its dense shape.
        input_shape: Of one sample.
        masks: Round -> what was left.

    Returns:
        Two rows per round: round, count (``as published`` or ``structure that is left``), flops, counted_ratio (the
        compression by the published count of parameters).
    """
    dense, rows = counted_parameters(model), []
    for number, left in masks.items():
        ratio = dense / max(counted_parameters(model, left), 1)
        for count, faithful in {"as published": True, "structure that is left": False}.items():
            needed = flops(model, input_shape, left, faithful=faithful)
            rows.append({"round": number, "count": count, "flops": needed, "counted_ratio": ratio})
    return pd.DataFrame(rows)


def published_rows(store: Store, rounds: pd.DataFrame) -> pd.DataFrame:
    """The rounds of runs in the columns of the csv that the published code writes, one row per run and round.

    Args:
        store: Where the runs lie.
        rounds: Rows of finished runs of a LeNet, a VGG or a ResNet, as the store gives them; ``strategy`` becomes a
            column in front where there are several, and so does the best test epoch behind, where it was measured
            (``reported_curves.best_test_epochs``).

    Returns:
        seed; iter, the round, 0 = dense; acc_pruned, after the pruning with the weights as they were trained, before
        recovery (NaN in round 0, and of runs that did not measure it); acc_retrained, of the last epoch; both in [0, 1]
        and of the test part; cr, counted parameters of the dense network over those that are left; remained_percentage,
        100 / cr; architecture, units of each hidden layer as ``300-100``, those that are alive, where the published
        code counts those that are there, dead ones among them; FLOPs. Runs of variant ``faithful`` are counted as
        published, all others rightly.
    """
    ahead = ["strategy"] if "strategy" in rounds and rounds["strategy"].nunique() > 1 else []
    behind = [BEST_TEST_EPOCH] if BEST_TEST_EPOCH in rounds and rounds[BEST_TEST_EPOCH].notna().any() else []
    found = []
    for run_id, own in rounds.groupby("id", sort=False):
        run = store.settings(run_id)
        data, faithful = load(run.data), run.prune.options.get("variant") == "faithful"
        model = models.build(run.model, data.shape, len(data.classes), run.seed)
        removals, dense = store.removals(run_id), counted_parameters(model, faithful=faithful)
        for row in own.to_dict("records"):
            masks = masks_at(removals, row["round"])
            left = max(counted_parameters(model, masks, faithful=faithful), 1)
            part = {
                "seed": row["seed"],
                "iter": row["round"],
                "acc_pruned": row["pruned_test_accuracy"],
                "acc_retrained": row["test_accuracy"],
                "cr": dense / left,
                "remained_percentage": 100 * left / dense,
                "architecture": "-".join(map(str, json.loads(row["units_by_layer"]))),
                "FLOPs": flops(model, data.shape, masks, faithful=faithful),
            }
            found.append({name: row[name] for name in ahead} | part | {name: row[name] for name in behind})
    return pd.DataFrame(found)


def _chain(model: nn.Module, masks: Masks, shape: tuple[int, int, int]) -> Iterator[_Layer]:
    """Layers of a chain with what is alive in each."""
    sides = _sides(model, shape)
    before = shape[0] if len(shape) == 3 else 0
    weighted = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for (name, module), later in itertools.zip_longest(weighted, weighted[1:]):
        mask = masks[f"{name}.weight"]
        if isinstance(module, nn.Conv2d):
            outputs = int(mask.flatten(1).any(1).sum())
            yield _Layer(before, outputs, module.kernel_size[0], sides[name])
            before = outputs
        else:
            inputs = int(mask.any(0).sum())
            read = int(masks[f"{later[0]}.weight"].any(0).sum()) if later else int(mask.any(1).sum())
            yield _Layer(inputs, read, 1, 0)


def _resnet(model: nn.Module, masks: Masks, shape: tuple[int, int, int], faithful: bool) -> int:
    """Of a residual network; what comes into a block is what any of the layers before left alive in that place."""
    sides = _sides(model, shape)
    less = 1 if faithful else 0

    def conv(name: str, inputs: int) -> tuple[int, Tensor]:
        filters = masks[f"{name}.weight"].flatten(1).any(1)
        kernel, side = model.get_submodule(name).kernel_size[0], sides[name]
        return (2 * side**2 * inputs * kernel**2 - less) * int(filters.sum()), filters

    total, alive = conv("conv", shape[0])
    for name, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        width = int(alive.sum())
        one, inner = conv(f"{name}.conv_1", width)
        two, own = conv(f"{name}.conv_2", width if faithful else int(inner.sum()))
        total += one + two
        if faithful:
            total += sides[f"{name}.conv_2"] ** 2 * int(own.sum())
        brought = F.pad(alive, block.padding[4:]) & masks.get(f"{name}.shortcut.open", torch.tensor(True))
        alive = own | brought  # a channel lives while the shortcut brings something
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    inputs, classes = int(masks[f"{last}.weight"].any(0).sum()), model.get_submodule(last).out_features
    return total + ((2 * inputs - 1) * PUBLISHED_CLASSES if faithful else 2 * inputs * classes)


def _residual(model: nn.Module) -> bool:
    return any(isinstance(module, Block) for module in model.modules())


def _sides(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """Layer -> side of its map; nothing is computed."""
    found: dict[str, int] = {}
    empty = copy.deepcopy(model).to("meta").eval()
    for name, module in empty.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, output, name=name: found.update({name: output.shape[-1]}))
    empty(torch.empty(1, *shape, device="meta"))
    return found
