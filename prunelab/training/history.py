"""What went of a network, round by round, in the shape in which it began, whatever is cut out of it meanwhile."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from prunelab.masks import Masks
from prunelab.pruners.base import Step
from prunelab.structure.chains import spread, then, whole_index
from prunelab.training.removals import Removals


class Ledger:
    """The removals of a run, and how the network of today lies in the first one.

    Args:
        dense: the network as it begins.
        masks: those with which it begins.

    Attributes:
        removals: which weight went when, with which score.
        index: parameter -> for each axis the positions in the first shape of what is left.
        round: how many there were; 0 is the dense network.
        requested: 1 - the product of 1 - rate over all rounds. A rate is a share of what the method counts, weights or
            units, and means nothing where the method goes by something else.
    """

    def __init__(self, dense: nn.Module, masks: Masks) -> None:
        self.shapes = {name: parameter.shape for name, parameter in dense.named_parameters()}
        self.removals, self.index = Removals.start(masks), whole_index(dense)
        self.round, self.requested = 0, 0.0

    def take(self, masks: Masks, step: Step, amount: float) -> Masks:
        """Write down what goes, and begin the next round.

        Args:
            masks: of the network before the step, in its shapes.
            step: what a method did.
            amount: what it was asked for.

        Returns:
            The masks of the network after the step, in its shapes.
        """
        before = self._in_dense(masks)
        scores = None if step.scores is None else self._in_dense(self._per_weight(step.scores, masks))
        chosen = self._in_dense(step.masks if step.chosen is None else step.chosen)
        if step.returns:
            self.removals, before = self.removals.restored(Masks(chosen)), chosen
        self.round += 1
        self.removals = self.removals.add(self.round, Masks(before), Masks(chosen), scores)
        after = step.masks
        if step.cut is not None:
            self.index = then(self.index, step.cut.index)
            after = Masks({name: step.cut.cut(name, mask) for name, mask in after.items()})
        left = Masks(self._in_dense(after))
        self.removals = self.removals.add(self.round, Masks(chosen), left, None)  # went with their unit
        self.requested = 1 - (1 - self.requested) * (1 - (amount if step.rate is None else step.rate))
        return after

    def tensors(self) -> dict[str, Tensor]:
        """Removals and index, for a checkpoint."""
        index = {f"index/{n}/{axis}": i for n, axes in self.index.items() for axis, i in enumerate(axes)}
        return {f"removals/{name}": tensor for name, tensor in self.removals.tensors().items()} | index

    def resume(self, tensors: Mapping[str, Tensor], round: int, requested: float) -> None:
        """Go on from what ``tensors`` gave; names of others are passed over."""
        self.round, self.requested = round, requested
        own = {n.removeprefix("removals/"): tensor for n, tensor in tensors.items() if n.startswith("removals/")}
        self.removals = Removals.from_tensors(own)
        self.index = {
            name: tuple(tensors[f"index/{name}/{axis}"] for axis in range(len(shape)))
            for name, shape in self.shapes.items()
        }

    def _in_dense(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {name: tensor.cpu() for name, tensor in tensors.items()}  # a gate has no index: it is never cut
        return {n: spread(t, self.index[n], self.shapes[n]) if n in self.index else t for n, t in found.items()}

    def _per_weight(self, scores: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
        """Scores of units, given by layer, as scores of their weights and biases."""
        found = {}
        for name, score in scores.items():
            for parameter in [name] if name in self.shapes else [f"{name}.weight", f"{name}.bias"]:
                if parameter in masks:
                    shape = masks[parameter].shape
                    by_row = score.view(-1, *[1] * (len(shape) - score.dim())) if score.shape != shape else score
                    found[parameter] = by_row.expand(shape)
        return found
