"""Networks and masks of finished runs, from the store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunelab import models
from prunelab.data import Dataset
from prunelab.errors import first_line
from prunelab.masks import Masks
from prunelab.runs import Store
from prunelab.runs.records import Damaged
from prunelab.settings import Run
from prunelab.structure.chains import chain, remove_units, whole_index
from prunelab.training.removals import Removals


def trained(store: Store, run: Run, dataset: Dataset) -> nn.Module:
    """The network of a finished run, with its last weights, on the CPU and in evaluation mode.

    Where units were removed physically while it trained, it has the sizes that were left.

    Args:
        store: where the run lies.
        run: its settings.
        dataset: what it was trained on, for the size of a sample and the number of classes.

    Raises:
        StoreError: the run is not complete, damaged, or its tensors are not those of the network in its settings.
    """
    model = models.build(run.model, dataset.shape, len(dataset.classes), run.seed)
    index = {name: list(axes) for name, axes in whole_index(model).items()}
    for key, positions in store.removals(run).items():
        name, _, axis = key.removeprefix("index.").rpartition(".")
        if key.startswith("index.") and name in index and int(axis) < len(index[name]):
            index[name][int(axis)] = torch.from_numpy(positions)
    weights = {name: torch.from_numpy(values) for name, values in store.weights(run).items()}
    try:
        model = reshaped(model, {name: tuple(axes) for name, axes in index.items()})
        model.load_state_dict(weights)
    except (RuntimeError, LookupError, ValueError) as error:
        why = first_line(error)
        raise Damaged(f"the stored tensors of {run.id} are not those of a {run.model.label} ({why})") from None
    return model.eval()


def masks_at(removals: Mapping[str, Any], round: int) -> Masks:
    """The masks that a finished run had in a round, in the shapes of the dense network, from ``Store.removals(id)``."""
    return Removals.from_tensors({name: torch.from_numpy(array) for name, array in removals.items()}).kept(round)


def reshaped(model: nn.Module, index: Mapping[str, tuple[Tensor, ...]]) -> nn.Module:
    """The dense model cut to the positions that are left; where all are left it is the same object.

    Args:
        model: a plain chain, unless nothing is cut.
        index: parameter -> for each axis the positions that are left.
    """
    if all(len(i) == size for n, p in model.named_parameters() for i, size in zip(index[n], p.shape, strict=True)):
        return model
    hidden = [link.name for link in chain(model)[:-1]]
    return remove_units(model, {name: index[f"{name}.weight"][0] for name in hidden}).model
