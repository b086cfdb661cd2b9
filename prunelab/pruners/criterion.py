"""The scores that pruning libraries offer beside magnitude: one class, one name for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from prunelab.masks import MaskError, Masks
from prunelab.pruners.base import Context, Pruner, Ranking, Reads, Step
from prunelab.pruners.scores import SCORES, scored
from prunelab.pruners.select import Granularity, Scope
from prunelab.pruners.units import COUPLED, Combine, remove_lowest
from prunelab.settings import settings

Name = Literal[
    "movement", "magnitude_increase", "moved_magnitude", "snip", "taylor", "wanda", "batchnorm", "lamp", "fpgm", "obd",
    "signal", "fisher", "grasp", "synflow",
]  # fmt: skip


@settings
class Criterion(Ranking):
    """Weights, or units of any kind, by one of the scores of the field; higher = keep.

    - ``movement``: |w - w0|; ``magnitude_increase``: |w| - |w0|; ``moved_magnitude``: |w (w - w0)|, with w0 the weights
      at the start (fasterai's criteria of these names; Zhou et al., "Deconstructing Lottery Tickets", NeurIPS 2019,
      section 3).
    - ``snip``: |w dL/dw| (Lee et al., ICLR 2019, eq. 5), of a network before training as published.
    - ``taylor``: (w dL/dw) squared; for units the square of the sum over the unit (Molchanov et al., CVPR 2019, eq. 8).
    - ``obd``: w^2 h / 2, h the diagonal of the Hessian of the loss (LeCun, Denker and Solla, "Optimal brain damage",
      NIPS 1989, eq. 5), which is estimated by products with random signs; ``fisher``: likewise, with the diagonal of
      the empirical Fisher information.
    - ``grasp``: w (H g), g the gradient (Wang, Zhang and Grosse, "Picking winning tickets before training by preserving
      gradient flow", ICLR 2020, eq. 8: there with the other sign, and the highest go). Its published code divides the
      logits by 200 first, which ``loss=`` can do.
    - ``synflow``: |w dR/dw|, R the outputs for ones as inputs with all weights |w| (Tanaka et al., NeurIPS 2020,
      algorithm 1), measured 100 times on the way to the amount; it needs no data but the shape of the inputs.
    - ``lamp``: w^2 over the sum of all w^2 of the layer that are at least as large (Lee et al., "Layer-adaptive
      sparsity for the magnitude-based pruning", ICLR 2021, section 2); of units likewise, with sums over each unit.
    - ``fpgm``: the sum of the distances of a unit's weights to those of the other units of its layer (He et al., CVPR
      2019, eq. 8).
    - ``wanda``: |w| times the norm of its input over the data, compared within each output unit (Sun et al., ICLR 2024,
      eq. 1).
    - ``batchnorm``: |scale| of the BatchNorm behind a filter (Liu et al., "Network Slimming", ICCV 2017).

    - ``signal``: the share of the signal of its unit that a connection carries over the data (Dekhovich et al., "Neural
      network relief", 2024, eq. 2 and 4); of a channel, summed over all that read it.

    A unit's score is the sum over its incoming weights, divided by the mean over the units that its layer still has, as
    for ``Magnitude``; that of ``batchnorm``, ``synflow`` and ``lamp`` is taken as it is, since these compete in the
    papers.

    Attributes:
        score: which.
        granularity: what goes.
        scope: whether all compete, or those of each layer; ``wanda`` compares within each unit whatever is said here.
        allow_empty: whether a layer may lose all.
        combine: of coupled channels, how what each layer says of a channel is combined.
        steps: how many times the scores are measured on the way to an amount; None: once, ``synflow`` 100 times.
    """

    score: Name = "taylor"
    granularity: Granularity = "weight"
    scope: Scope = "global"
    allow_empty: bool = False
    combine: Combine = "mean"
    steps: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        """Refuse scores of things that have none, and make ``wanda`` compare in each layer."""
        only = SCORES[self.score].only
        if only == "channel" and self.granularity not in COUPLED:
            raise ValueError(f"score {self.score!r} is one of all that reads a channel: choose granularity 'channel'")
        if only == "unit" and self.granularity == "weight":
            raise ValueError(
                f"score {self.score!r} is one of whole units: choose granularity 'filter', 'neuron' or 'unit'"
            )
        if only == "weight" and self.granularity != "weight":
            raise ValueError(f"score {self.score!r} compares the weights of one unit: choose granularity 'weight'")

    @property
    def compares_with_start(self) -> bool:
        """Whether it needs the weights from before the training."""
        return SCORES[self.score].since_start

    @property
    def reads(self) -> Reads:
        """What it looks at."""
        return SCORES[self.score].reads

    @property
    def measured(self) -> int:
        """How many times it is measured on the way to an amount."""
        return self.steps or SCORES[self.score].measured

    def check(self, model: nn.Module, masks: Masks) -> None:
        """Refuse a model without BatchNorm where that is what the score is one of."""
        if SCORES[self.score].scales and self.granularity not in COUPLED:  # those are known once it has run
            self.scores(Context(model, masks))

    def scores(self, now: Context) -> dict[str, Tensor]:
        """Per parameter, or per layer (or space) one score per unit."""
        return scored(now, SCORES[self.score], self.granularity, self.combine)

    def select(self, now: Context, scores: Mapping[str, Tensor], amount: float) -> Masks:
        """What is left when the lowest scores are gone."""
        scope = "layer" if SCORES[self.score].only == "weight" else self.scope  # ranks in a unit: each loses its share
        options = {"granularity": self.granularity, "scope": scope, "allow_empty": self.allow_empty}
        return remove_lowest(now, scores, amount, **options)


@settings
class NofM(Pruner):
    """Of every M weights along the inputs of a unit the N largest stay: 2:4, as GPUs multiply it fast.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, section 3. Layers whose inputs are no
    multiple of M stay whole (our own rule); the ``amount`` of a round is not read, since N and M decide.

    Attributes:
        n: weights that stay,
        m: of so many.
    """

    reads_amount = False

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        """Refuse patterns that mean nothing."""
        if not 1 <= self.n < self.m:
            raise ValueError(f"n = {self.n}, m = {self.m}: should be 1 or more, and fewer than m")

    def prune(self, now: Context, amount: float) -> Step:
        """Needs no data; weights that are gone already count as the smallest."""
        found = {}
        for name, mask in now.masks.items():
            weight = now.model.get_parameter(name).detach().abs() * mask
            if weight.dim() < 2 or weight.shape[1] % self.m:
                continue
            groups = weight.movedim(1, -1).reshape(-1, self.m)  # neighbours along the inputs
            best = groups.topk(self.n, dim=1).indices
            keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
            found[name] = keep.view(weight.movedim(1, -1).shape).movedim(-1, 1)
        if not found:
            raise MaskError(f"no layer has inputs in multiples of {self.m}, so {self.n}:{self.m} fits none of them")
        return Step(now.masks & Masks(found))
