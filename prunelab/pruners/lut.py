"""Pruning of weightless networks: whole look-up tables go, and a bias per class makes up for them.

Susskind et al., "Pruning Weightless Neural Networks", ESANN 2022, pp. 37-42. Of the paper the abstract is known; score,
positions and bias are those of the code that its authors published in that month (FWIW, and later ULEEN). That code
prunes networks that learn by gradient; here it is applied to BTHOWeN, which learns in one pass and has no gradient.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from prunelab.masks import Masks
from prunelab.pruners.select import keep_highest
from prunelab.settings import settings

Scope = Literal["position", "discriminator", "global"]
SCOPES: tuple[Scope, ...] = ("position", "discriminator", "global")
ADAM = {"epochs": 8, "batch": 32, "lr": 1e-3}  # of the bias, FWIW
NEWTON_STEPS, FLAT = 50, 1e-6  # of the bias, our own: it ends where no class has a slope above FLAT


@settings
class Lut:
    """The look-up tables (filters) whose answers say least about the class go, all chosen in the whole network.

    The score of filter f in the discriminator of class c is the covariance of its answer with "the sample is of class
    c", over the training part (see ``scores``). A filter's answers do not depend on the others, so what goes in several
    rounds is what would go at once.

    Attributes:
        scope: what competes. ``"position"``, the published code's default: the same filters go from all
            discriminators, so that their hashes go too; a position counts as much as its best filter.
            ``"discriminator"``: each loses as many as the others, its own lowest. ``"global"``: all filters compete.
        score: ``"correlation"``, or ``"random"`` as a control.
        compensate: whether a bias per class is learnt on the training part after each round.
        share: of the dense network's filters that each round removes, rounded down in sum; our own default.
        variant: ``"faithful"``: score and bias as the published code has them, 8 epochs of Adam; ``"corrected"``: the
            covariance for classes of unequal size too, and the bias at its optimum.
    """

    granularity: ClassVar[Literal["lut"]] = "lut"

    scope: Scope = "discriminator"
    score: Literal["correlation", "random"] = "correlation"
    compensate: bool = True
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    variant: Literal["faithful", "corrected"] = "corrected"

    def scores(self, responses: np.ndarray, y: np.ndarray, generator: Generator) -> Tensor:
        """Score of every filter, higher = keep.

        Args:
            responses: bool [N, classes, filters], of the training part.
            y: int64 [N], labels.
            generator: of random scores.

        Returns:
            float64 [classes, filters].
        """
        if self.score == "random":
            return torch.rand(responses.shape[1:], generator=generator, dtype=torch.float64)
        return torch.from_numpy(scores(responses, y, self.variant))

    def select(self, scores: Tensor, current: Tensor, removed: float, generator: Generator) -> Tensor:
        """What is left when a share ``removed`` of the dense network's filters is gone.

        Args:
            scores: [classes, filters].
            current: bool, the same shape; what is gone stays gone.
            removed: share, in [0, 1), rounded down to whole filters: of the positions, of each class, or of all.
            generator: chooses among equal scores.

        Returns:
            bool [classes, filters].
        """
        if self.scope == "position":
            parts = {"positions": (scores.amax(0), current.any(0))}
        elif self.scope == "discriminator":
            parts = {f"class {c}": pair for c, pair in enumerate(zip(scores, current, strict=True))}
        else:
            parts = {"network": (scores, current)}
        masks = Masks({name: there for name, (_, there) in parts.items()})
        count = {name: _target(removed, m.numel()) - (m.numel() - masks.counts[name]) for name, m in masks.items()}
        after = keep_highest({name: own for name, (own, _) in parts.items()}, masks, count, generator)
        return torch.stack(list(after.values())).expand(len(scores), -1) if self.scope != "global" else after["network"]

    def bias(self, votes: np.ndarray, y: np.ndarray, generator: Generator) -> np.ndarray:
        """The bias of each class that lowers the cross-entropy of the votes: whole numbers, the smallest 0.

        Args:
            votes: int64 [N, classes], of the filters that are left, over the training part.
            y: int64 [N], labels.
            generator: of the batches of the faithful variant.
        """
        learnt = bias_by_adam(votes, y, generator) if self.variant == "faithful" else bias_at_optimum(votes, y)
        rounded = np.rint(learnt).astype(np.int64)
        return rounded - rounded.min()


def scores(responses: np.ndarray, y: np.ndarray, variant: Literal["faithful", "corrected"] = "corrected") -> np.ndarray:
    """What the answer of each filter says about its class.

    faithful: each sample adds C - 1 to the filters of its own class that say yes, and takes 1 from those of the others.
    corrected: N times the covariance of the answer with "the sample is of this class". Where all C classes have as many
    samples, the first is C times the second, so both rank alike.

    Args:
        responses: bool [N, C, filters].
        y: int64 [N], labels.
        variant: which of the two.

    Returns:
        float64 [C, filters].
    """
    classes = responses.shape[1]
    per_class = np.stack([np.count_nonzero(responses[y == c], axis=0) for c in range(classes)])
    own, everywhere = per_class[np.arange(classes), np.arange(classes)], per_class.sum(0)
    if variant == "faithful":
        return (classes * own - everywhere).astype(np.float64)
    frequency = np.bincount(y, minlength=classes) / len(y)
    return own - frequency[:, None] * everywhere


def bias_by_adam(votes: np.ndarray, y: np.ndarray, generator: Generator) -> np.ndarray:
    """As published: Adam with 1e-3 for 8 epochs in batches of 32, from 0; float64 [classes]."""
    x, target = torch.from_numpy(votes).float(), torch.from_numpy(y)
    bias = torch.zeros(x.shape[1], requires_grad=True)
    optimiser = torch.optim.Adam([bias], lr=ADAM["lr"])
    for _ in range(int(ADAM["epochs"])):
        for rows in torch.randperm(len(x), generator=generator).split(int(ADAM["batch"])):
            optimiser.zero_grad()
            F.cross_entropy(x[rows] + bias, target[rows]).backward()
            optimiser.step()
    return bias.detach().double().numpy()


def bias_at_optimum(votes: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the same cross-entropy is lowest: Newton's method, since it is convex in the bias; float64 [classes].

    Adding the same to all classes changes nothing, so the bias of sum 0 is given.
    """
    bias, frequency = np.zeros(votes.shape[1]), np.bincount(y, minlength=votes.shape[1]) / len(y)
    loss, share = _loss(votes, y, bias)
    for _ in range(NEWTON_STEPS):
        slope = share.mean(0) - frequency
        if np.abs(slope).max() < FLAT:
            break
        curvature = np.diag(share.mean(0)) - share.T @ share / len(y)
        step, size = np.linalg.pinv(curvature, rcond=1e-10, hermitian=True) @ slope, 1.0
        while size > FLAT and (trial := _loss(votes, y, bias - size * step))[0] > loss:
            size /= 2
        if size <= FLAT:
            break
        bias, (loss, share) = bias - size * step, trial
    return bias - bias.mean()


def _loss(votes: np.ndarray, y: np.ndarray, bias: np.ndarray) -> tuple[float, np.ndarray]:
    """Cross-entropy, and the softmax of the votes with the bias."""
    logits = votes + bias
    logits -= logits.max(1, keepdims=True)
    share = np.exp(logits)
    total = share.sum(1, keepdims=True)
    return float((np.log(total[:, 0]) - logits[np.arange(len(y)), y]).mean()), share / total


def cross_entropy(votes: np.ndarray, y: np.ndarray) -> float:
    """Mean cross-entropy of the votes, taken as logits."""
    return _loss(votes, y, np.zeros(votes.shape[1]))[0]


def _target(share: float, total: int) -> int:
    return int(share * total + 1e-9)  # 0.7 * 10 is 6.999...
