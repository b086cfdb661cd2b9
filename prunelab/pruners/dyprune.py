"""DyPrune: prune while training, at a rate scaled to the size of the network, when the validation loss flattens.

Source: Jonker, Poudel, Fajarda, Oliveira, Lopes and Matos, "DyPrune: Dynamic Pruning Rates for Neural Networks", EPIA
2023, LNCS 14115. Only the abstract could be read; rule, rate and defaults are those of the published code.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.pruners.base import Context, Progress, Pruner, Step
from prunelab.pruners.schedules import Trigger, dyprune_rate, relative_gradient
from prunelab.pruners.scores import magnitude, random
from prunelab.pruners.select import amount_to_count, keep_highest
from prunelab.settings import settings
from prunelab.structure.chains import ShrinkError, chain, compact, remove_units

_STALE = "stale"  # stands for the layers that the published code forgets to take off its list


@settings
class DyPrune(Pruner):
    """DyPrune's family of strategies: trigger x rate x score.

    Attributes:
        trigger: ``"dynamic"``: when the loss falls at most ``maximum`` times as fast as at its steepest;
            ``"static"``: every ``every`` epochs.
        rate: fraction of the remaining weights that goes at each pruning; ``"dynamic"``: (ln n - 6) / 10 of the n
            weights left, in [0, 0.9].
        score: ``"l1"``: the smallest magnitudes go, over all layers together; ``"random"``.
        every: epochs between static prunings.
        minimum: the dynamic trigger's window on the relative gradient, lower end.
        maximum: upper end.
        cooldown: epochs without pruning after a dynamic one.
        variant: ``"corrected"``: weights are chosen among the live ones, biases and optimiser moments are kept, units
            that lost all inputs or all outputs are removed with their constants folded into the next layer, and no
            layer is ever emptied. ``"faithful"``: the published code with its quirks: layers of earlier prunings
            still take part in the choice, the first hidden layer keeps units without inputs, removal is one pass
            without folding, and after it all biases are drawn anew and the optimiser starts afresh.
    """

    while_training: ClassVar[bool] = True
    reads_amount: ClassVar[bool] = False

    trigger: Literal["static", "dynamic"] = "dynamic"
    rate: Literal["dynamic"] | float = "dynamic"
    score: Literal["l1", "random"] = "l1"
    every: int = 4
    minimum: float = 0.0
    maximum: float = 0.05
    cooldown: int = 2
    variant: Literal["faithful", "corrected"] = "corrected"

    def __post_init__(self) -> None:
        if not isinstance(self.rate, str) and not 0 <= self.rate <= 0.9:
            raise ValueError(f"rate = {self.rate}: should be 'dynamic' or a fraction between 0 and 0.9")
        if self.every < 1 or self.cooldown < 0:
            raise PrunelabError(
                f"dyprune: every = {self.every}, cooldown = {self.cooldown}: should be at least 1 and at least 0 epochs"
            )

    def check(self, model: nn.Module, masks: Masks) -> None:
        """Refuse a model in which units cannot be removed."""
        links = chain(model)
        if len(links) < 2:
            raise PrunelabError("dyprune: the model has no hidden layer, so there is nothing to remove")
        if self.variant == "faithful" and not all(isinstance(link.layer, nn.Linear) for link in links):
            raise PrunelabError(
                "dyprune: variant 'faithful' knows Linear layers only, as published; use variant='corrected'"
            )

    def due(self, progress: Progress) -> bool:
        """Whether to prune after the newest epoch; the faithful variant looks at the loss as a mean over batches."""
        trigger = Trigger(self.trigger, self.every, self.minimum, self.maximum, self.cooldown)
        return trigger.due(self._losses(progress), progress.epochs, progress.last)

    def signal(self, progress: Progress) -> float:
        """The relative gradient of the newest epoch, by which the dynamic trigger decides; NaN where there is none."""
        return float(relative_gradient(self._losses(progress))[-1])

    def _losses(self, progress: Progress) -> Sequence[float]:
        return progress.losses_of_batches if self.variant == "faithful" else progress.losses

    def prune(self, now: Context, amount: float) -> Step:
        """Remove weights, then the units they leave dead."""
        model, masks, generator = now.model, now.masks, now.generator
        rate = dyprune_rate(masks.kept) if self.rate == "dynamic" else float(self.rate)
        names = list(masks)
        scores = magnitude(model, names) if self.score == "l1" else random(model, names, generator)
        if self.variant == "faithful":
            return self._faithful(now, rate, scores)
        fewer = keep_highest(scores, masks, amount_to_count(rate, masks.kept), generator, allow_empty=True)
        try:
            smaller = compact(model, fewer)
        except ShrinkError as error:
            return Step(masks, rate=rate, note=f"pruning refused: {error}")
        return Step(fewer, scores, cut=smaller, rate=rate)

    def _faithful(self, now: Context, rate: float, scores: Mapping[str, Tensor]) -> Step:
        """As published; quirks 1, 3, 4, 5, 6 and 8 of deep networks, 2 and 7 of those with one hidden layer."""
        model, masks, generator = now.model, now.masks, now.generator
        if len(chain(model)) == 2:
            return self._faithful_one_hidden_layer(now, rate, scores)
        # The list of layers to prune is never emptied, so copies of the layers as they were after earlier prunings
        # compete with the live ones; of those copies nothing matters but the magnitudes of what they still hold.
        where = next(iter(masks.values())).device
        stale = now.state.get(_STALE, torch.empty(0)).to(where)
        pool = {
            **scores,
            _STALE: stale if self.score == "l1" else torch.rand(len(stale), generator=generator).to(where),
        }
        current = Masks({**masks, _STALE: torch.ones(len(stale), dtype=torch.bool, device=where)})
        kept = keep_highest(pool, current, amount_to_count(rate, current.kept), generator, allow_empty=True)
        fewer = Masks({name: kept[name] for name in masks})
        magnitudes = magnitude(model, list(masks))
        left_behind = torch.cat([stale[kept[_STALE]], *(magnitudes[name][fewer[name]] for name in masks)])
        try:
            smaller = remove_units(model, _one_pass(fewer, model))
        except ShrinkError as error:
            return Step(masks, rate=rate, failure=str(error))
        for link in chain(smaller.model):
            bound = link.layer.in_features**-0.5
            drawn = torch.empty(len(link.layer.bias)).uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                link.layer.bias.copy_(drawn)
        return Step(fewer, scores, cut=smaller, rate=rate, fresh=True, state={_STALE: left_behind})

    def _faithful_one_hidden_layer(self, now: Context, rate: float, scores: Mapping[str, Tensor]) -> Step:
        """One hidden layer: nothing is removed nor reset; at the k-th pruning each layer stands k times on the list."""
        masks, generator = now.masks, now.generator
        times = int(now.state.get("events", torch.tensor(0))) + 1
        count = amount_to_count(rate, times * masks.kept)
        if self.score == "l1":  # the copies of a weight tie, and it goes as soon as one of them does
            fewer = keep_highest(scores, masks, -(-count // times), generator, allow_empty=True)
        else:
            copies = Masks({f"{name}/{i}": mask for name, mask in masks.items() for i in range(times)})
            draws = {name: torch.rand(mask.shape, generator=generator) for name, mask in copies.items()}
            kept = keep_highest(draws, copies, count, generator, allow_empty=True)
            fewer = masks
            for i in range(times):
                fewer = fewer & Masks({name: kept[f"{name}/{i}"] for name in masks})
            scores = {name: torch.stack([draws[f"{name}/{i}"] for i in range(times)]).amin(0) for name in masks}
        state = {"events": torch.tensor(times)}
        return Step(fewer, scores, rate=rate, state=state)


def _one_pass(masks: Masks, model: nn.Sequential) -> dict[str, Tensor]:
    """The published removal: from input to output once; the first hidden layer is only asked for its outputs."""
    links = chain(model)
    units: dict[str, Tensor] = {}
    inputs: Tensor | None = None
    for link, following in itertools.pairwise(links):
        reads = masks[f"{link.name}.weight"]
        alive = masks[f"{following.name}.weight"].any(0)
        if inputs is not None:
            alive = alive & reads[:, inputs].any(1)
        inputs = alive.nonzero().flatten()
        units[link.name] = inputs
    return units
