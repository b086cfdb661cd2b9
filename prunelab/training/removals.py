"""The record of what went: for each weight of the original model the round of its removal, and the score it had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prunelab.masks import MaskError, Masks, layer_of

if TYPE_CHECKING:
    import pandas as pd

_LAST = torch.iinfo(torch.int16).max


class Removals:
    """What went when; ``add`` gives the record with one more round, ``Removals.start`` the first one.

    Attributes:
        rounds: Parameter name -> int16, shape of the parameter: the round in which an entry went, -1 = still there.
        scores: Parameter name -> float32, likewise: the score with which it went, NaN = there was none, or still there.
    """

    def __init__(self, rounds: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> None:
        if odd := sorted(rounds.keys() ^ scores.keys()):
            raise MaskError(f"a record of removals has only a round or only a score of {odd[0]!r}: it should have both")
        self.rounds, self.scores = dict(rounds), dict(scores)

    @classmethod
    def start(cls, what: nn.Module | Masks) -> Removals:
        """A record without removals of a model, or of masks; what these have lost already counts as gone in round 0."""
        masks = Masks.ones(what) if isinstance(what, nn.Module) else what
        rounds = {name: _still(mask).masked_fill_(~mask.cpu(), 0) for name, mask in masks.items()}
        return cls(rounds, {name: _none(mask) for name, mask in masks.items()})

    def add(self, round: int, before: Masks, after: Masks, scores: Mapping[str, Tensor] | None = None) -> Removals:
        """The record with what ``before`` keeps and ``after`` does not.

        Args:
            round: Number of the round, 0 to 32767.
            before: The masks before the removal, in the shapes of the original model; what has no mask is whole.
            after: The masks after it.
            scores: The scores that decided: per entry by parameter name, or per unit (1-D) by layer name.

        Raises:
            MaskError: something came back, went twice, or has another shape than in the record.
        """
        if not 0 <= round <= _LAST:
            raise MaskError(f"round = {round}: should be a whole number from 0 to {_LAST}")
        for name in before.keys() - after.keys():
            if before.counts[name] < before[name].numel():
                raise MaskError(f"{name}: pruned entries came back, since it has no mask after the removal")
        rounds, recorded = dict(self.rounds), dict(self.scores)
        for name, mask in after.items():
            gone = self._gone(name, before.get(name), mask.cpu())
            rounds[name] = rounds.get(name, _still(mask)).masked_fill(gone, round)
            recorded[name] = recorded.get(name, _none(mask))
            score = None if scores is None else scores.get(name, scores.get(layer_of(name)))
            if score is not None:
                score = score.detach().to("cpu", torch.float32)
                if score.shape not in (gone.shape, gone.shape[:1]):
                    raise MaskError(f"{name}: scores of shape {tuple(score.shape)} for a mask {tuple(gone.shape)}")
                if score.shape != gone.shape:  # one per unit
                    score = score.view(-1, *[1] * (gone.ndim - 1)).expand(gone.shape)
                recorded[name] = torch.where(gone, score, recorded[name])
        return Removals(rounds, recorded)

    def restored(self, masks: Masks) -> Removals:
        """The record after a roll-back: what ``masks`` keeps never went.

        Args:
            masks: In the shapes of the original model.
        """
        rounds, scores = dict(self.rounds), dict(self.scores)
        for name in masks.keys() & rounds.keys():
            rounds[name] = rounds[name].masked_fill(masks[name].cpu(), -1)
            scores[name] = scores[name].masked_fill(masks[name].cpu(), torch.nan)
        return Removals(rounds, scores)

    def kept(self, round: int) -> Masks:
        """What was still there in a round: the masks with which it was trained; round 0 is the dense network."""
        return Masks({name: (gone == -1) | (gone > round) for name, gone in self.rounds.items()})

    def tensors(self) -> dict[str, Tensor]:
        """The whole record as tensors named ``round/<parameter>`` and ``score/<parameter>``, for safetensors."""
        parts = (("round", self.rounds), ("score", self.scores))
        return {f"{part}/{name}": tensor for part, tensors in parts for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Removals:
        """The inverse of ``tensors``; names that are not of a record are passed over."""
        parts: dict[str, dict[str, Tensor]] = {"round": {}, "score": {}}
        for name, tensor in tensors.items():
            part, _, parameter = name.partition("/")
            if part in parts:
                parts[part][parameter] = tensor
        return cls(parts["round"], parts["score"])

    def frame(self, whole_units: bool = False) -> pd.DataFrame:
        """One row per removal, in the order of the rounds: ``parameter``, ``unit``, ``round``, ``score``.

        Args:
            whole_units: False: every entry; ``unit`` is its index in the flattened parameter of the original model.
                True: only neurons and filters that lost all incoming weights; ``unit`` is their index in the layer,
                round and score are those of the last weight that went (of several, the highest score).
        """
        import pandas as pd

        parts = []
        for code, (name, rounds) in enumerate(self.rounds.items()):
            scores = self.scores[name]
            if whole_units:
                if rounds.ndim < 2:
                    continue
                rounds, scores = _last_of_rows(rounds.flatten(1), scores.flatten(1))
            units = (rounds.flatten() >= 0).nonzero().squeeze(1)
            part = {"unit": units, "round": rounds.flatten()[units], "score": scores.flatten()[units]}
            names = pd.Categorical.from_codes([code] * len(units), categories=list(self.rounds))
            parts.append(pd.DataFrame({"parameter": names, **{key: values.numpy() for key, values in part.items()}}))
        if not parts:
            return pd.DataFrame({"parameter": [], "unit": [], "round": [], "score": []})
        return pd.concat(parts, ignore_index=True).sort_values("round", kind="stable", ignore_index=True)

    def _gone(self, name: str, before: Tensor | None, stays: Tensor) -> Tensor:
        """Which entries of a parameter go now; refused where that does not fit the record."""
        was = torch.ones_like(stays) if before is None else before.cpu()
        known = self.rounds[name] if name in self.rounds else _still(stays)
        if not stays.shape == was.shape == known.shape:
            raise MaskError(f"{name}: mask {tuple(stays.shape)}, record {tuple(known.shape)}; give the original shapes")
        if bool((stays & (~was | (known >= 0))).any()):
            raise MaskError(f"{name}: a pruned entry came back; what is on record as gone stays gone")
        gone = was & ~stays
        if bool((gone & (known >= 0)).any()):
            raise MaskError(f"{name}: an entry on record as gone went again; before should be what the last round left")
        return gone


def _still(mask: Tensor) -> Tensor:
    return torch.full(mask.shape, -1, dtype=torch.int16)


def _none(mask: Tensor) -> Tensor:
    return torch.full(mask.shape, torch.nan, dtype=torch.float32)


def _last_of_rows(rounds: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Round and score of the last entry that went from each row; round -1 where an entry is still there."""
    last = rounds.amax(1)
    score = scores.masked_fill(rounds != last[:, None], -torch.inf).amax(1)
    return last.masked_fill((rounds < 0).any(1), -1), score
