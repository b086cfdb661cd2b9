"""A trained network, its masks, how good it is and what it costs at any pruning rate, with nothing shown.

What can be known before a rate is asked for is computed once: scores, bins of the weights, multiply-accumulates. A rate
then costs a selection, the masks, and one evaluation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunelab import pruners
from prunelab.errors import PrunelabError
from prunelab.lab.live.offer import offered
from prunelab.lab.live.sample import Evaluate, Part, Sample, function_values, training_batches
from prunelab.masks import Masks, layer_of
from prunelab.pruners import Context, Ranking
from prunelab.pruners.measures import Measure
from prunelab.pruners.select import units_of
from prunelab.settings import Prune
from prunelab.structure import cost
from prunelab.structure.forward import copied, copies, looking, rows, unwrapped
from prunelab.structure.report import latencies
from prunelab.structure.shrink import remove_dead

TRAINING = 1000  # samples that scores look at, where no batches are given
BINS, KEPT = 64, 128  # of a histogram of weights; what is added to the bin of one that is kept
PIECE = 1 << 16  # weights that are compared at a time
INFINITE = np.float32(np.inf).view(np.uint32)  # more than the bits of any number
TIMED = 32  # samples in a batch that is timed
SCORES = 4  # of so many methods the scores are kept, so that two of them can be held beside each other
LARGE = 2 * 10**10  # multiply-accumulates of a sample for which a smaller network pays
WORTHWHILE = 0.8  # ... where no more of them than this are left
EVERYTHING = ""  # stands for all layers together


@dataclass(frozen=True)
class Position:
    """What the controls say: all that decides the masks of a network.

    Attributes:
        method: name of the score.
        granularity: what goes.
        scope: who competes.
        seed: of random scores, and of lots among equal ones.
        own: layers that do not compete, each with a pruning rate of its own.
        rate: fraction of all that may go that is gone.
    """

    method: str
    granularity: str
    scope: str
    seed: int
    own: tuple[tuple[str, float], ...]
    rate: float

    @property
    def setting(self) -> tuple[Any, ...]:
        """All but the rate: positions of one setting lie on one curve."""
        return dataclasses.astuple(self)[:-1]


@dataclass(frozen=True, eq=False)
class Base:
    """The network that is pruned: as it was given, or as a fine-tuning left it.

    Attributes:
        number: 0 for the one that was given, another one for each that was fine-tuned.
        epochs: of fine-tuning that led to it.
        weights: parameter and buffer name -> tensor, as the network was trained.
        masks: what was kept through it; less than that goes only.
        scores: what was computed of them, of the last method asked for.
        bins: likewise, of the last histogram.
    """

    number: int
    epochs: int
    weights: Mapping[str, Tensor]
    masks: Masks
    scores: dict[tuple[str, str, int], tuple[dict[str, Tensor], Tensor]] = field(default_factory=dict)
    bins: dict[str, tuple[float, np.ndarray, list[np.ndarray]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Histogram:
    """How many weights there are of each size, and how many of them are kept.

    Attributes:
        edge: the bins divide [-edge, edge] evenly.
        there: weights that were there before this pruning, int per bin.
        kept: those that are left.
        threshold: the size below which all go and above which all stay; None where no size parts them.
    """

    edge: float
    there: list[int]
    kept: list[int]
    threshold: float | None


class Subject:
    """A model and a sample to measure it on.

    Args:
        model: Any module. A copy of it is used.
        data: Whatever holds samples; see ``Sample``.
        evaluate: Size of the sample, at most; or a function that measures a model.
        batches: Inputs and targets for scores; None: 1,000 of the training part, if there is one.
        part: Of a data set.
        measure: In place of the usual one.
        higher: Whether more is better, of what a function gives.
        loss: For scores that follow its gradient; None: cross entropy for labels, mean squared error for floats.

    Attributes:
        base: the network that is pruned now.
        dense: masks that keep everything.
        sample: what is measured on, in words.
        samples: how many there are.
        measure: what is measured: its name, and whether more is better.
        loss: what scores that follow a gradient follow; None: cross entropy.
        offered: score -> granularities that it has for this model.
        beside: what a function of one's own gave beside the first number, last.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        evaluate: int | Evaluate,
        batches: Iterable[Any] | None,
        part: Part = "validation",
        measure: Measure | None = None,
        higher: bool = True,
        loss: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise PrunelabError(f"model is a {type(model).__name__}: give a torch.nn.Module")
        # Convolutions are twice as fast with images in this order of memory; weights in theirs are masked faster.
        self._model = copied(unwrapped(model)).eval()
        self.device = next((each.device for each in self._model.parameters()), torch.device("cpu"))
        self.dense = Masks.ones(self._model)
        self._batches = copies(batches) if batches is not None else training_batches(data, self.device, TRAINING)
        self._evaluate = evaluate if callable(evaluate) else None
        self.beside: dict[str, float] = {}
        self._sample = None if data is None else Sample(data, 2000 if self._evaluate else evaluate, self.device, part)
        if self._evaluate is not None:
            first, *_ = function_values(self._evaluate, self.network())
            self.measure, self.sample, self.samples = Measure(first, _nothing, _nothing, higher), "", 1
        elif self._sample is not None:
            self._sample.suit(self._model, measure)
            self.measure, self.sample, self.samples = self._sample.measure, self._sample.what, len(self._sample)
        else:
            raise PrunelabError("data is None: give samples to measure on, or evaluate=, a function of a model")
        self.loss = loss or (nn.functional.mse_loss if self.measure.name == "RMSE" else None)
        self._chain = _chain(self._model)
        self.offered = offered(self._model, self.dense, self._batches is not None)
        self._work = None
        if self._sample is not None:
            try:
                self._work = cost.work(self._model, rows(self._sample.x, slice(0, 1)))
                self._sample.take_fewer(self._work.macs)
            except PrunelabError:  # a model whose work depends on what is in its input has no one number
                pass
        # Copies: loading other weights writes into the ones that are there.
        own = {name: value.clone() for name, value in self._model.state_dict().items() if isinstance(value, Tensor)}
        self.base = Base(0, 0, own, self.dense)

    @property
    def labels(self) -> Tensor | None:
        """The right label of each sample; None where the task is no classification."""
        sample = self._sample
        return sample.y if sample is not None and sample.labelled and self._evaluate is None else None

    @property
    def inputs(self) -> Any:
        """The samples as the model takes them; None where there are none."""
        return None if self._sample is None else self._sample.x

    def answered(self) -> np.ndarray | None:
        """The label that the last measured network gave to each sample; None where the task is no classification."""
        if self.labels is None or self._sample is None or not self._sample.given:
            return None
        return torch.cat(self._sample.given).to(torch.int32).cpu().numpy()

    def class_name(self, label: int) -> str:
        """The name of a class, or its number."""
        names = None if self._sample is None else self._sample.classes
        return names[label] if names is not None and label < len(names) else str(label)

    @property
    def module(self) -> nn.Module:
        """The network itself, for those who only look."""
        return self._model

    @property
    def batches(self) -> Any:
        """Those that scores look at; None where there are none."""
        return self._batches

    def reads_data(self, position: Position) -> bool:
        """Whether the score looks at batches."""
        return position.method in self.offered and position.method not in offered(self._model, self.dense, False)

    @property
    def bytes_each(self) -> int:
        """Of one weight."""
        return next(self._model.parameters()).element_size()

    def network(self, masks: Masks | None = None) -> nn.Module:
        """A copy of the network as it is now, its pruned weights zero where there are masks."""
        found = copied(self._model).eval()
        if masks is not None:
            masks.apply_(found)
        return found

    def go_on_from(self, base: Base) -> None:
        """Prune another network from now on: one that was fine-tuned, or, to undo that, one from before."""
        if base is not self.base:
            self._model.load_state_dict(base.weights, strict=False)
            self.base = base

    def masks(self, position: Position) -> Masks:
        """What ``prunelab.prune`` gives, its scores kept from the move before.

        After a fine-tuning nothing comes back: the rate counts from the whole network, and where more than that is gone
        already, nothing goes. With the scope ``layer``, and for layers with a rate of their own, it holds in each.
        """
        pruner = _build(position)
        now = Context(
            self._model,
            self.base.masks,
            torch.Generator().manual_seed(position.seed),
            lambda: copies(self._batches or ()),
            loss=self.loss,
        )
        key = position.method, position.granularity, position.seed
        if key not in self.base.scores:
            with looking(self._model):
                found = pruner.scores(now)
            if len(self.base.scores) >= SCORES:
                del self.base.scores[next(iter(self.base.scores))]
            self.base.scores[key] = found, now.generator.get_state()
        scores, state = self.base.scores[key]
        now.generator.set_state(state)
        masks = self.base.masks
        for names, rate in _groups(scores, position, whole=masks is self.dense):
            own = {name: scores[name] for name in names}
            amount = rate if masks is self.dense else self._of_the_rest(own, rate)
            masks = pruner.select(now.having(masks), own, amount)
        return masks

    def competing(self, position: Position) -> set[str]:
        """Layers of which something can go."""
        scores, _ = self.base.scores[position.method, position.granularity, position.seed]
        return {layer_of(name) if name in self.dense else name for name in scores}

    def _of_the_rest(self, scores: Mapping[str, Tensor], rate: float) -> float:
        """The fraction of what is left that has to go, so that ``rate`` of the whole network is gone."""
        left = 0
        for name, score in scores.items():
            if name in self.dense and score.shape == self.dense[name].shape:
                left += self.base.masks.counts[name]
            else:
                weight = f"{name}.weight" if name else "weight"
                left += int(units_of(self._model, self.base.masks, [weight])[name].sum())
        total = sum(score.numel() for score in scores.values())
        return max(0.0, 1 - (1 - rate) * total / left) if left else 0.0

    def answers(self, masks: Masks) -> Iterator[tuple[float, int]]:
        """The measure and the samples seen so far, with the weights masked, part by part; see ``Sample.answers``."""
        if self._evaluate is not None:
            values = function_values(self._evaluate, self.network(masks))
            if self.measure.name not in values:
                raise PrunelabError(
                    f"evaluate: it gave {', '.join(values)}, and {self.measure.name} before: name the same"
                )
            self.beside = {name: value for name, value in values.items() if name != self.measure.name}
            return iter([(values[self.measure.name], 1)])
        small = self._smaller(masks)
        return self._sample.answers(self._model, masks) if small is None else self._sample.answers(small, {})

    def _smaller(self, masks: Masks) -> nn.Module | None:
        """The network without the units that are gone whole, where that saves more time than it takes; None elsewhere.

        Its outputs are those of the masked network, up to rounding.
        """
        structured = len(masks) > len(self.dense)  # their biases go with them
        if self._work is None or not structured or self._work.macs * self.samples < LARGE:
            return None
        left, total = self.work(masks)
        if left > WORTHWHILE * total:
            return None
        try:
            return self.small(masks)
        except PrunelabError:  # a network that cannot be traced, or a layer that has no unit left
            return None

    def small(self, masks: Masks) -> nn.Module:
        """The network without what is gone.

        Raises:
            PrunelabError: it cannot be made smaller.
        """
        if self._sample is None:
            raise PrunelabError("a smaller network is made by running it: give data too, samples of its inputs")
        return remove_dead(self._model, masks, rows(self._sample.x, slice(0, 1))).model

    def shrunk(self, masks: Masks) -> dict[str, tuple[float, float]]:
        """What the network without what is gone costs, and the whole one: parameters, macs, bytes, latency (seconds).

        Latency is that of ``TIMED`` samples, the median of seven turns.

        Raises:
            PrunelabError: it cannot be made smaller.
        """
        small, some = self.small(masks), rows(self.inputs, slice(0, TIMED))
        times = latencies({"small": small, "dense": self._model}, some, 7)
        sides = {"small": small, "dense": self._model}
        prices = {name: cost.summarise(net, rows(some, slice(0, 1))) for name, net in sides.items()}
        found = {
            name: (price.parameters, price.macs, price.bytes, median(times[name])) for name, price in prices.items()
        }
        names = ("parameters", "macs", "bytes", "latency")
        return dict(zip(names, zip(found["small"], found["dense"], strict=True), strict=True))

    def value(self, masks: Masks) -> float:
        """The measure on the whole sample."""
        *_, (value, _) = self.answers(masks)
        return value

    def weights(self, masks: Masks) -> int:
        """How many are left; structured masks have entries of biases too."""
        return sum(masks.counts[name] for name in self.dense)

    def sparsity(self, masks: Masks) -> float:
        """Of the weights."""
        return 1 - self.weights(masks) / self.dense.total

    def work(self, masks: Masks) -> tuple[int, int] | None:
        """Multiply-accumulates of one sample whose weight is kept, and all; None where they cannot be counted."""
        return None if self._work is None else (self._work.effective(masks, masks.counts), self._work.macs)

    def histogram(self, position: Position, masks: Masks, layer: str = EVERYTHING) -> Histogram:
        """The weights of one layer, or of all, before and after the pruning."""
        names = [name for name in self.dense if layer in (EVERYTHING, layer_of(name))]
        if layer not in self.base.bins:
            self.base.bins.clear()
            self.base.bins[layer] = self._bins(names)
        edge, there, bins = self.base.bins[layer]
        keys = (
            own + _array(masks[name]).view(np.uint8) * np.uint8(KEPT) for name, own in zip(names, bins, strict=True)
        )
        kept = sum(_counts(key)[KEPT : KEPT + BINS] for key in keys)
        parted = position.granularity == "weight" and self._threshold(names, masks, edge, there, kept)
        return Histogram(edge, there.tolist(), kept.tolist(), parted or None)

    def chain(self, masks: Masks) -> dict[str, np.ndarray] | None:
        """Weight -> its values, 0 where pruned, from input to output; None where layers do not follow one by one."""
        if self._chain is None:
            return None
        weights = {name: self._model.get_parameter(name).detach().cpu().numpy() for name in self._chain}
        return {name: weight * masks[name].cpu().numpy() for name, weight in weights.items()}

    def units(self, masks: Masks) -> dict[str, np.ndarray]:
        """Weight -> for each of its neurons or filters the share of incoming weights that is kept, float [units]."""
        shares = {}
        for name in self.dense:
            rows = _array(masks[name]).reshape(len(masks[name]), -1)
            shares[name] = np.add.reduce(rows, axis=1, dtype=np.int32) / rows.shape[1]
        return shares

    def _bins(self, names: list[str]) -> tuple[float, np.ndarray, list[np.ndarray]]:
        """The largest size, how many are in each bin, and the bin of each weight; those that are gone are in none."""
        weights = [_array(self._model.get_parameter(name).detach()) for name in names]
        edge = max(float(np.abs(weight).max()) for weight in weights) or 1.0
        bins = []
        for name, weight in zip(names, weights, strict=True):
            places = ((weight / edge + 1) * (BINS / 2)).clip(0, BINS - 1).astype(np.uint8)
            places[~_array(self.base.masks[name])] = BINS
            bins.append(places)
        return edge, sum(_counts(own)[:BINS] for own in bins), bins

    def _threshold(
        self, names: list[str], masks: Masks, edge: float, there: np.ndarray, kept: np.ndarray
    ) -> float | None:
        """A size below which all go and above which all stay; None where there is none."""
        there, kept = (own[BINS // 2 :] + own[BINS // 2 - 1 :: -1] for own in (there, kept))
        gone, stay = np.flatnonzero(there > kept), np.flatnonzero(kept)
        if not len(gone) or not len(stay) or gone[-1] > stay[0]:
            return None
        if gone[-1] < stay[0]:
            return edge * stay[0] / (BINS / 2)
        sizes = [_parted(self._model.get_parameter(name).detach(), masks[name]) for name in names]
        largest, smallest = max(gone for gone, _ in sizes), min(left for _, left in sizes)
        return (largest + smallest) / 2 if largest <= smallest else None


def _chain(model: nn.Module) -> list[str] | None:
    """Weights of the layers of a plain chain, in order; what stands between them changes no picture."""
    if type(model) is not nn.Sequential or any(len(list(module.children())) for module in model):
        return None
    layers = {name: module for name, module in model.named_children() if isinstance(module, nn.Linear | nn.Conv2d)}
    if any(getattr(module, "groups", 1) > 1 for module in layers.values()):
        return None
    pairs = itertools.pairwise(module.weight.shape for module in layers.values())
    return [f"{name}.weight" for name in layers] if all(b[1] % a[0] == 0 for a, b in pairs) else None


def _build(position: Position) -> Ranking:
    pruner, preset, *_ = pruners.METHODS[position.method]
    options: dict[str, Any] = {"scope": position.scope, "allow_empty": True}
    if "granularity" in {each.name for each in dataclasses.fields(pruner)} - set(preset):  # type: ignore[arg-type]
        options["granularity"] = position.granularity
    return pruners.build(Prune(method=position.method, options=options))  # type: ignore[return-value]


def _groups(scores: Mapping[str, Tensor], position: Position, whole: bool) -> Iterator[tuple[list[str], float]]:
    """Names that compete with each other, and the share of them that goes."""
    own = dict(position.own)
    rest = [name for name in scores if layer_of(name) not in own and name not in own]
    # In a whole network the fraction is the same in each layer, and the method itself goes layer by layer.
    yield from [([name], position.rate) for name in rest] if position.scope == "layer" and not whole else []
    if rest and (position.scope == "global" or whole):
        yield rest, position.rate
    for name in scores:
        if name not in rest:
            yield [name], own[name] if name in own else own[layer_of(name)]


def _array(tensor: Tensor) -> np.ndarray:
    """A tensor as one row. For counts NumPy does as well, and waits for no other thread on a busy machine."""
    return tensor.cpu().numpy().reshape(-1)


def _counts(bins: np.ndarray) -> np.ndarray:
    """How many there are in each bin. Two neighbours are counted as one number, which takes half the time."""
    even = bins[: len(bins) // 2 * 2].view(np.uint16)
    pairs = np.bincount(even, minlength=1 << 16).reshape(256, 256)
    counts = pairs.sum(0) + pairs.sum(1)
    if len(bins) % 2:
        counts[bins[-1]] += 1
    return counts


def _parted(weight: Tensor, mask: Tensor) -> tuple[float, float]:
    """The largest size of those that go, and the smallest of those that stay; 0 and infinity where none do.

    The bits of a float without its sign, read as a whole number, are in the order of its size. So they need no
    comparison with a mask, a piece stays in the processor's cache, and it takes a fifth of the time.
    """
    bits, keep = _array(weight.float()).view(np.uint32), _array(mask).view(np.uint8)
    largest, smallest = np.uint32(0), INFINITE
    for start in range(0, len(bits), PIECE):
        size = bits[start : start + PIECE] & np.uint32(0x7FFFFFFF)
        gone = keep[start : start + PIECE].astype(np.uint32) - np.uint32(1)  # all bits where it goes, none elsewhere
        largest = max(largest, (size & gone).max())
        smallest = min(smallest, (size | gone).min())
    return tuple(np.array([largest, smallest], np.uint32).view(np.float32).tolist())


def _nothing(*_: Any) -> Any:
    """Of a measure that a function of one's own takes."""
    raise NotImplementedError
