"""Seconds per epoch of DyPrune's largest network (784-1000-1000-1000-10) after each pruning: masks only or shrunk.

usage: PRUNELAB_DATA=... python benchmarks/shrinking_training.py [--events 4] [--repeats 5] [--threads 2]

10,000 images of Fashion-MNIST, batch 128, AdamW; two epochs are trained before each pruning of DyPrune (variant
"corrected"). After each, the network is timed twice: in its dense shape with masks, and without its dead units.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import timing
import torch
from torch import Tensor

from prunelab import data, models
from prunelab.masks import Masks
from prunelab.pruners import Context
from prunelab.pruners.dyprune import DyPrune
from prunelab.settings import Data, Model, Train
from prunelab.structure.chains import live_units, spread, then, whole_index
from prunelab.training.train import Member, Population, generator

TRAIN = Train(epochs=10**6, batch_size=128)
Index = Mapping[str, tuple[Tensor, ...]]


def in_dense_shape(member: Member, index: Index, dense: torch.nn.Module) -> Member:
    """The same network, its weights and masks put back into the shape it began with."""
    model = copy.deepcopy(dense)
    masks = {}
    with torch.no_grad():
        for name, own in member.model.named_parameters():
            parameter = model.get_parameter(name)
            parameter.copy_(spread(own.detach(), index[name], parameter.shape))
            if name in member.masks:
                masks[name] = spread(member.masks[name], index[name], parameter.shape)
    return Member(model, TRAIN, Masks(masks), generator(0, "order"))


def main() -> None:
    options = timing.options(__doc__, events=4, repeats=5)
    images = data.load(Data("fashion_mnist", validation=0, train_size=10_000))
    dense = models.build(Model("mlp", (1000, 1000, 1000)), images.shape, len(images.classes), seed=0)

    def timed(member: Member) -> Callable[[], Any]:
        population = Population(images)
        return lambda: population.epoch([member])

    def apart(member: Member) -> Member:
        return Member(copy.deepcopy(member.model), TRAIN, member.masks, generator(0, "order"))

    member = Member(copy.deepcopy(dense), TRAIN, Masks.ones(dense), generator(0, "order"))
    rivals = {"dense": timed(apart(member))}
    events: list[dict[str, Any]] = []
    index: Index = whole_index(dense)
    pruner, draw = DyPrune(), generator(0, "prune")
    for event in range(1, options.events + 1):
        for _ in range(2):
            Population(images).epoch([member])
        step = pruner.prune(Context(member.model, member.masks, draw), 0.0)
        index = then(index, step.cut.index)
        moments = {kind: {n: step.cut.cut(n, t) for n, t in own.items()} for kind, own in member.moments.items()}
        masks = Masks({name: step.cut.cut(name, mask) for name, mask in step.masks.items()})
        member.change(step.cut.model, masks, moments)
        units = live_units(member.model)
        events.append({"event": event, "rate": step.rate, "weights": member.masks.kept, "units": units})
        print(events[-1])
        rivals[f"event {event}, masks only"] = timed(in_dense_shape(member, index, dense))
        rivals[f"event {event}, shrunk"] = timed(apart(member))
    turns: dict[str, list[float]] = {}
    results = timing.compare(rivals, options.repeats, turns=turns)
    print(f"{options.threads} threads\n\n{timing.table(results)}")
    last = f"event {options.events}"
    pairs = zip(turns[f"{last}, masks only"], turns[f"{last}, shrunk"], strict=True)
    text = f"an epoch of 784-1000-1000-1000-10 after {options.events} prunings of DyPrune, shrunk"
    shrunk = f"{last}, shrunk"
    ratio, best = statistics.median(a / b for a, b in pairs), timing.quickest(results, shrunk, f"{last}, masks only")
    claims = [
        timing.claim(f"{text}, against masks only", ratio, "x", at_least=1, quickest=best),
        timing.faster(f"{text}, against dense", results, shrunk, at_least=1),
    ]
    timing.write("shrinking_training", {"data": images.source, "events": events, "claims": claims, "results": results})


if __name__ == "__main__":
    main()
