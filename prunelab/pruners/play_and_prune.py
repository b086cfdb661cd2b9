"""Play and Prune: filters go for as long as the accuracy stays within a tolerance, which also sets how fast.

Source: Singh, Verma, Rai and Namboodiri, "Play and Prune: Adaptive Filter Pruning for Deep Model Compression", IJCAI
2019 (arXiv 1905.04446), and their longer version, IEEE JSTSP 14(4):838-847, 2020. Abstracts, the beginning of the
introduction and the caption of Fig. 1 could be read; the equations are second-hand, and the constants are our own.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunelab import models, settings
from prunelab.masks import Masks
from prunelab.pruners.base import Context, Penalty, Progress, Pruner, Step
from prunelab.pruners.scores import magnitude, reduce_to_units
from prunelab.pruners.select import amount_to_count, keep_highest_units, scored_names, units_of
from prunelab.pruners.units import unit_masks
from prunelab.runs.columns import need
from prunelab.settings import Fraction
from prunelab.structure import cost
from prunelab.structure.chains import ShrinkError, chain

if TYPE_CHECKING:
    import pandas as pd

GONE, IMPORTANT, UNIMPORTANT = 0, 1, 2  # what a filter is in an epoch of the adaptive player
SLACK = 1e-9  # percentage points: what rounding does to a difference of two accuracies


@settings.settings
class PlayAndPrune(Pruner):
    """Two players in turns, an epoch each: AFP takes filters away, PRC says how many may go, from the accuracy.

    With E the validation accuracy of the trained network, C that of the network now (both in per cent), eps the
    tolerance, and |f| the sum of the absolute weights of a filter over the inputs that are left:

    - PRC: T = max(C - (E - eps), 0); lambda_A = T lambda; W_A = delta T W_gamma, a threshold for each layer.
    - AFP: U is the ``alpha`` of each layer's filters with the smallest |f|. One epoch is trained on the loss plus
      lambda_A ||U||_1, then the filters of U with |f| < W_A go, at least one of each layer stays.
    - W_gamma: what takes a share ``first`` of U after the first such epoch (second-hand: "by binary search").
    - Orthogonality (JSTSP): lambda_o sum ||F F' - I||^2 over the layers, F the filters as rows of length 1, is added
      from the first pruning on.

    While C < E - eps nothing goes and there is no L1 penalty. After ``patience`` such epochs the last network within
    the tolerance comes back, with its filters, and pruning is over.

    Our own: the training begins with a share ``start`` that trains the whole network; the accuracy that decides a
    removal is measured right before it, what the removal costs after the next epoch; the last epoch of the training
    only fine-tunes a network that was within the tolerance. Filters that went are masked, with their biases,
    BatchNorms and, in a plain chain, what reads them; training leaves them out. In residual nets a masked filter adds
    nothing to its sum.

    Attributes:
        tolerance: eps, in percentage points; the user's choice, as published.
        start: share of the training before the first pruning.
        alpha: share of a layer's filters that are unimportant. Our own default, like all below.
        strength: lambda.
        first: share of the unimportant filters whose removal defines W_gamma.
        delta: the factor of the threshold; above 1 prunes faster.
        orthogonality: lambda_o; 0, as in the first paper, leaves the term out.
        patience: epochs below the tolerance before the roll-back.
        granularity: ``"filter"``, as published; ``"neuron"`` or ``"unit"`` (both) prune hidden Linear layers as well.
    """

    while_training: ClassVar[bool] = True
    penalises: ClassVar[bool] = True
    reads_amount: ClassVar[bool] = False

    tolerance: float = 1.0
    start: float = 0.5
    alpha: Fraction = 0.1
    strength: float = 5e-4
    first: Fraction = 0.5
    delta: float = 1.0
    orthogonality: float = 0.0
    patience: int = 5
    granularity: Literal["filter", "neuron", "unit"] = "filter"

    def __post_init__(self) -> None:
        """Refuse what is no share, no strength and no number of epochs."""
        if not 0 <= self.start < 1 or self.alpha == 0:
            raise ValueError(f"start = {self.start}, alpha = {self.alpha}: should be shares below 1, alpha above 0")
        for name in ("tolerance", "strength", "delta", "orthogonality"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} = {value}: should be 0 or more")
        if self.patience < 1:
            raise ValueError(f"patience = {self.patience}: should be at least 1 epoch")

    def due(self, progress: Progress) -> bool:
        """After every epoch from the end of the first part of the training on."""
        return len(progress.losses) >= max(1, round(self.start * progress.epochs))

    def prune(self, now: Context, amount: float) -> Step:
        """PRC looks at the accuracy; AFP removes, or chooses what it penalises next; or the roll-back."""
        accuracy = 100 * now.progress.accuracies[-1]
        if math.isnan(accuracy):
            return _as_it_is(
                now, {}, "", failure="play_and_prune decides by the accuracy, which these data do not have"
            )
        state = dict(now.state) or {"dense": torch.tensor(accuracy, dtype=torch.float64), "failed": torch.tensor(0)}
        if "over" in state:
            return _as_it_is(now, state, "pruning is over")
        room = accuracy - (float(state["dense"]) - self.tolerance)
        last = now.progress.epochs - len(now.progress.losses) <= 1
        if room < -SLACK:
            return self._recover(now, state, last)
        state |= {"failed": torch.tensor(0), **_copied(now)}
        names = scored_names(now.model, now.masks, self.granularity)
        norms = reduce_to_units(now.model, magnitude(now.model, names), names)
        there = units_of(now.model, now.masks, names)
        kept = self._left(norms, there, state, max(room, 0.0))
        if last:
            return self._over(now, state, "the last epoch only fine-tunes")
        roles = self._roles(norms, kept, now)
        state |= {"strength": torch.tensor(penalty_strength(room, self.strength), dtype=torch.float64), **roles}
        state["afp"] = torch.tensor(int(room > SLACK))
        if all(bool((kept[layer] == own).all()) for layer, own in there.items()):
            what = "no filter below its threshold" if now.state else f"pruning begins at {accuracy:.2f} %"
            return _as_it_is(now, state, what)
        fewer = now.masks & unit_masks(now.model, kept)
        left = without_readers(now.model, fewer)
        rate = 1 - left.weights.kept / max(now.masks.weights.kept, 1)
        return Step(left, norms, chosen=fewer, rate=rate, state=state)

    def penalty(self, model: nn.Module, state: Mapping[str, Tensor]) -> Penalty | None:
        """The gradient of lambda_A ||U||_1 and of the orthogonality term, in closed form."""
        roles = {name.removeprefix("role/"): role for name, role in state.items() if name.startswith("role/")}
        strength = float(state.get("strength", 0.0))
        if not roles or not (strength or self.orthogonality):
            return None

        @torch.no_grad()
        def gradients(network: nn.Module) -> dict[str, Tensor]:
            found = {}
            for layer, role in roles.items():
                weight = network.get_parameter(f"{layer}.weight")
                own = role.to(weight.device)
                own = own if len(own) == len(weight) else own[own != GONE]  # the part that trains
                hit = (own == UNIMPORTANT).view(-1, *[1] * (weight.dim() - 1))
                found[f"{layer}.weight"] = weight.sign() * hit * strength
                if self.orthogonality:
                    change = orthogonality_gradient(weight.flatten(1)).view_as(weight)
                    found[f"{layer}.weight"] += self.orthogonality * change
            return found

        return gradients

    def _left(
        self, norms: Mapping[str, Tensor], there: Mapping[str, Tensor], state: dict[str, Tensor], room: float
    ) -> dict[str, Tensor]:
        """Which filters stay, bool by layer; after the first epoch of AFP ``state`` gets the thresholds."""
        kept = {layer: own.clone() for layer, own in there.items()}
        for layer, own in kept.items():
            role = state.get(f"role/{layer}")
            if role is None or not int(state["afp"]):  # PRC had the last epoch
                continue
            unimportant = role.to(own.device) == UNIMPORTANT
            known = f"threshold/{layer}"
            if known not in state:
                state[known] = torch.tensor(first_threshold(norms[layer][unimportant].tolist(), self.first))
            small = norms[layer] < self.delta * room * float(state[known])
            gone = unimportant & small
            if int((own & ~gone).sum()):
                own &= ~gone
        return kept

    def _roles(self, norms: Mapping[str, Tensor], kept: Mapping[str, Tensor], now: Context) -> dict[str, Tensor]:
        """The filters that the next epoch penalises: at least one of each layer that has more than one."""
        left = {layer: int(keep.sum()) for layer, keep in kept.items()}
        count = {layer: min(amount_to_count(self.alpha, n, minimum=1), n - 1) for layer, n in left.items()}
        important = keep_highest_units(norms, kept, count, now.generator)
        return {
            f"role/{layer}": (keep.to(torch.int8) * UNIMPORTANT - important[layer].to(torch.int8)).cpu()
            for layer, keep in kept.items()
        }

    def _recover(self, now: Context, state: dict[str, Tensor], last: bool) -> Step:
        """Below the tolerance: fine-tune, or go back to the last network that was within it."""
        failed = int(state["failed"]) + 1
        state |= {"failed": torch.tensor(failed), "strength": torch.tensor(0.0), "afp": torch.tensor(0)}
        if failed < self.patience and not last:
            return _as_it_is(now, state, "below the tolerance: fine-tuning")
        weights = _named(state, "best/weight/")
        best = Masks({name: mask.to(torch.bool) for name, mask in _named(state, "best/mask/").items()})
        best = best.to(next(iter(now.masks.values())).device)
        rate = 1 - best.weights.kept / max(now.masks.weights.kept, 1)
        state = _ended(state)
        note = "rolled back to the last network within the tolerance"
        return Step(best, weights=weights, rate=rate, fresh=True, state=state, note=note, returns=True)

    def _over(self, now: Context, state: dict[str, Tensor], note: str) -> Step:
        return _as_it_is(now, _ended(state), note)


def penalty_strength(room: float, strength: float) -> float:
    """lambda_A = T lambda; 0 where nothing may go.

    Args:
        room: C - (E - eps), in percentage points.
        strength: lambda.
    """
    return max(room, 0.0) * strength


def first_threshold(norms: Sequence[float], share: float) -> float:
    """W_gamma: a share of these filters, at least one, lies below it; in the middle to the next one.

    A binary search ends somewhere in that gap. Where all lie below, it is just above the largest.

    Args:
        norms: |f| of the unimportant filters of a layer.
        share: of them.
    """
    ranked = sorted(norms)
    if not ranked:
        return 0.0
    below = max(1, round(share * len(ranked)))
    if below == len(ranked):
        return math.nextafter(ranked[-1], math.inf) * (1 + 1e-6)
    return (ranked[below - 1] + ranked[below]) / 2


def orthogonality_gradient(rows: Tensor) -> Tensor:
    """Of ||F F' - I||^2, F the rows [filters, inputs] divided by their lengths; that of a row of zeros is zero.

    Rows of zeros count as absent: the entry of I is 0 for them.
    """
    unit, there = _unit_rows(rows)
    pull = 4 * (unit @ unit.T - torch.diag(there)) @ unit
    along = (pull * unit).sum(1, keepdim=True) * unit
    return (pull - along) / rows.norm(dim=1, keepdim=True).where(there[:, None] > 0, torch.ones_like(unit[:, :1]))


def _unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    length = rows.norm(dim=1, keepdim=True)
    there = length > 0
    return rows / length.where(there, torch.ones_like(length)), there.flatten().to(rows)


def without_readers(model: nn.Module, masks: Masks) -> Masks:
    """Masks in which the weights that read a masked unit are masked too; as they are where the model is no chain.

    Args:
        model: BatchNorms may stand between the layers of a chain.
        masks: with whole rows gone.
    """
    try:
        layers = OrderedDict((n, m) for n, m in model.named_children() if not isinstance(m, _BatchNorm))
        links = chain(nn.Sequential(layers) if type(model) is nn.Sequential else model)
    except ShrinkError:
        return masks
    found = {}
    for link, reader in pairwise(links):
        unit, reads = masks.get(f"{link.name}.weight"), masks.get(f"{reader.name}.weight")
        if unit is not None and reads is not None:
            there = unit.flatten(1).any(1)[:, None]
            found[f"{reader.name}.weight"] = (reads.reshape(len(reads), len(there), -1) & there).view_as(reads)
    return masks & Masks(found) if found else masks


def with_sizes(rounds: pd.DataFrame, input_shape: tuple[int, ...], classes: int) -> pd.DataFrame:
    """Rounds with the filters and the multiply-accumulates of the network that its units make, whatever removed them.

    Masks and physical removal become comparable: the network is built anew with so many units in each layer.

    Args:
        rounds: model.name, model.hidden, units_by_layer; of models whose ``hidden`` names every hidden layer.
        input_shape: of one sample.
        classes: outputs.

    Returns:
        With ``filters`` (of the convolutions), ``macs`` (of one sample) and ``fraction`` (macs / those of the dense
        network).
    """
    need(rounds, ["model.name", "model.hidden", "units_by_layer"], "with_sizes")

    def size(name: str, hidden: str) -> tuple[int, int]:
        net = models.build(settings.Model(name, tuple(json.loads(hidden))), input_shape, classes, 0)
        filters = sum(layer.out_channels for layer in net.modules() if isinstance(layer, nn.Conv2d))
        return filters, cost.macs(net, input_shape)

    now = [size(*row) for row in rounds[["model.name", "units_by_layer"]].itertuples(index=False)]
    dense = [size(*row)[1] for row in rounds[["model.name", "model.hidden"]].itertuples(index=False)]
    filters, macs = ([row[i] for row in now] for i in (0, 1))
    fraction = [own / whole for own, whole in zip(macs, dense, strict=True)]
    return rounds.assign(filters=filters, macs=macs, fraction=fraction)


def _as_it_is(now: Context, state: Mapping[str, Tensor], note: str, **more: Any) -> Step:
    return Step(now.masks, rate=0.0, state=state, note=note, **more)


def _copied(now: Context) -> dict[str, Tensor]:
    """The network as it is, to come back to."""
    weights = {f"best/weight/{name}": tensor.detach().clone() for name, tensor in now.model.state_dict().items()}
    return weights | {f"best/mask/{name}": mask for name, mask in now.masks.items()}


def _named(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _ended(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"dense": state["dense"], "over": torch.tensor(1)}
