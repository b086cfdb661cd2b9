"""A slider on a model that is in memory: what pruning does to it, seen while the slider moves.

The one module above both sides: it computes with torch and shows with widgets. The model itself is never changed.
"""

from __future__ import annotations

import copy
import dataclasses
import html
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call

from prunelab import live_view, pruners
from prunelab.collapse import dead_layers
from prunelab.data import Dataset
from prunelab.errors import PrunelabError, nearest
from prunelab.live_view import per_cent
from prunelab.masks import Masks
from prunelab.pruners.select import check_amount
from prunelab.settings import Prune

try:
    import ipywidgets as widgets
except ImportError:
    raise ImportError("prunelab.live needs ipywidgets: install it with pip install 'prunelab[lab]'") from None

STEPS = (*(per_cent / 100 for per_cent in range(100)), 0.995, 0.999)  # positions of the slider
STANDARD = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # those that a sweep visits
SCOPES = {"all layers compete": "global", "each layer by itself": "layer"}
BATCH = 500  # samples at a time; more fall out of the processor's cache
LAST_SEED = 2**31 - 1
TRAINING = 1000  # samples that scores look at, where no batches are given
NEEDED = {"granularity", "scope", "allow_empty"}  # options of a method that can be moved by these controls


class PruningExplorer(widgets.VBox):
    """Controls, one sentence, a curve that fills in as rates are visited, and the kept weights of each layer.

    The masks are those of ``prunelab.prune`` with the same method, scope, seed and ``allow_empty=True``, for the
    scores, which are computed once, go through the method's own selection. While the kernel is busy the browser holds
    back all positions but the latest, so nothing queues up. ``rate``, ``score``, ``scope`` and ``seed`` are the
    controls; ``sample`` says what is measured on, such as ``"2,000 test images"``. An error is shown in red in the
    widget and raised; ``check`` raises it again, for runs that nobody watches.

    Args:
        model: Any module whose output are logits [N, classes]. What is explored is a copy, in evaluation mode.
        data: A data set, of whose test part a sample is drawn; or inputs, as the model takes them, and labels [N].
        method: What ranks the weights: a name in ``offered()``.
        scope: ``"global"`` or ``"layer"``.
        rate: Where the slider stands at first, in [0, 1): the fraction of the weights that goes.
        evaluate: Size of the sample; all where there are fewer. It is drawn once, by a seed of its own, and lies in
            memory as float32.
        batches: Inputs and targets, for methods that look at data; None: 1,000 of the training part, if there is one.
        seed: Of the pruning: random scores, and lots among equal ones.

    Raises:
        PrunelabError: one line, before anything is computed.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset | tuple[Tensor, Tensor],
        *,
        method: str = "magnitude",
        scope: str = "global",
        rate: float = 0.9,
        evaluate: int = 2000,
        batches: Iterable[Any] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise PrunelabError(f"model is a {type(model).__name__}: give a torch.nn.Module")
        self._offered = offered(batches is not None or isinstance(data, Dataset))
        for what, value, known in (("method", method, self._offered), ("scope", scope, SCOPES.values())):
            if value not in known:
                raise PrunelabError(f"PruningExplorer: {what} = {value!r}: {nearest(value, known)}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LAST_SEED:
            raise PrunelabError(f"seed = {seed!r}: should be a whole number from 0 to {LAST_SEED}")
        check_amount(rate)
        # Convolutions are twice as fast in this order of memory; layers without channels keep theirs.
        self._model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)
        where = next(self._model.parameters()).device
        self._dense = Masks.ones(self._model)
        self._batches = batches if batches is not None else _training(data, where)
        self._x, self._y, self.sample = _sample(data, evaluate, next(self._model.parameters()).device)
        self._masks, self._failure, self._ranked = self._dense, None, None
        self._visited: dict[tuple[str, str, int, float], tuple[float, float]] = {}
        self._dense_accuracy = self._accuracy(self._dense)
        super().__init__(self._controls(method, scope, float(rate), seed))
        self._move()

    @property
    def masks(self) -> Masks:
        """What is kept at the position that is shown."""
        return self._masks

    @property
    def visited(self) -> pd.DataFrame:
        """One row per position: method, scope, seed, rate, sparsity, accuracy (on the sample), in order of visit."""
        rows = [(*position, *found) for position, found in self._visited.items()]
        return pd.DataFrame(rows, columns=["method", "scope", "seed", "rate", "sparsity", "accuracy"])

    def sweep(self, rates: Iterable[float] = STANDARD) -> None:
        """Visit ``rates`` with the other controls as they are; then show the slider's own position again."""
        with self._errors_shown():
            for rate in (*rates, self.rate.value):
                check_amount(rate)
                self._show(float(rate))

    def check(self) -> None:
        """Raise the first error that a callback met, if any did."""
        if self._failure is not None:
            raise self._failure

    def __repr__(self) -> str:
        return self._words

    def _controls(self, method: str, scope: str, rate: float, seed: int) -> list[widgets.Widget]:
        """Everything on the screen, from top to bottom, which is also the order of the keyboard."""

        def layout(width: str) -> dict[str, Any]:
            return {"style": {"description_width": "initial"}, "layout": {"width": width, "max_width": "100%"}}

        rates = [(per_cent(value), value) for value in sorted({*STEPS, rate})]
        self.rate = widgets.SelectionSlider(
            options=rates, value=rate, description="pruning rate", tooltip="weights that go", **layout("44em")
        )
        self.score = widgets.Dropdown(options=self._offered, value=method, description="score", **layout("14em"))
        self.scope = widgets.Dropdown(options=SCOPES.items(), value=scope, description="scope", **layout("17em"))
        self.seed = widgets.BoundedIntText(value=seed, max=LAST_SEED, description="seed", **layout("9em"))
        self.button = widgets.Button(description="sweep", tooltip="visit the standard pruning rates")
        self._sentence, self._panel, self._errors = widgets.HTML(), widgets.HTML(), widgets.Output()
        for control in (self.rate, self.score, self.scope, self.seed):
            control.observe(self._move, "value")
        self.button.on_click(lambda _: self.sweep())
        row = widgets.HBox([self.score, self.scope, self.seed, self.button], layout={"flex_flow": "row wrap"})
        return [self.rate, row, self._sentence, self._panel, self._errors]

    def _move(self, _: Any = None) -> None:
        with self._errors_shown():
            self._show(self.rate.value)

    @contextmanager
    def _errors_shown(self) -> Iterator[None]:
        """An error leaves itself on the screen instead of an old picture."""
        self._errors.outputs = ()
        try:
            yield
        except Exception as error:
            self._failure = self._failure or error
            self._words = self._sentence.value = self._panel.value = ""
            name, trace = type(error).__name__, traceback.format_exception(error)
            self._errors.outputs = ({"output_type": "error", "ename": name, "evalue": str(error), "traceback": trace},)
            raise

    def _show(self, rate: float) -> None:
        """Prune to ``rate``, measure what was not yet measured, and draw."""
        setting = (self.score.value, self.scope.value, self.seed.value)
        masks = self._prune(*setting, rate)
        if (*setting, rate) not in self._visited:
            self._visited[(*setting, rate)] = masks.sparsity, self._accuracy(masks)
        sparsity, accuracy = self._visited[(*setting, rate)]
        points = [(known, found[1]) for (*other, known), found in self._visited.items() if tuple(other) == setting]
        self._masks = masks
        self._words = (
            f"At a pruning rate of {per_cent(rate)} (sparsity {sparsity:.3f}) accuracy on {self.sample} "
            f"is {per_cent(accuracy, 1)}, dense {per_cent(self._dense_accuracy, 1)}."
        )
        if dead := dead_layers(self._model, masks):
            self._words += f" Layer {', '.join(dead)} is cut off: the answers no longer depend on the input."
        about = f"Accuracy against pruning rate, {len(points)} visited. {self._words}"
        self._sentence.value = f'<p role="status" aria-live="polite">{html.escape(self._words)}</p>'
        self._panel.value = live_view.panel(points, (rate, accuracy), self._dense_accuracy, masks.by_layer(), about)

    def _prune(self, method: str, scope: str, seed: int, rate: float) -> Masks:
        """What ``prunelab.prune`` gives, its scores kept from the move before."""
        pruner = pruners.build(Prune(method=method, options={"scope": scope, "allow_empty": True}))
        generator = torch.Generator().manual_seed(seed)
        if self._ranked is None or self._ranked[0] != (method, seed):
            scores = pruner.scores(self._model, self._batches, self._dense, generator)
            self._ranked = (method, seed), scores, generator.get_state()
        _, scores, state = self._ranked
        return pruner.select(self._model, scores, self._dense, rate, generator.set_state(state))

    @torch.inference_mode()
    def _accuracy(self, masks: Masks) -> float:
        weights = {name: self._model.get_parameter(name) * mask for name, mask in masks.items()}
        parts = zip(self._x.split(BATCH), self._y.split(BATCH), strict=True)
        right = (functional_call(self._model, weights, (x,)).argmax(-1) == y for x, y in parts)
        return sum(int(part.sum()) for part in right) / len(self._y)


def offered(data: bool = True) -> list[str]:
    """Names of the registered methods that rank the single weights of a finished model, each score once.

    Args:
        data: whether there are inputs and targets for methods that look at them.
    """
    found = []
    for name, (pruner, preset) in pruners.METHODS.items():
        fields = {field.name: field.default for field in dataclasses.fields(pruner)} | dict(preset)  # type: ignore[arg-type]
        another = preset and "score" not in preset  # a name that only sets another method's options
        if another or not hasattr(pruner, "select") or not fields.keys() >= NEEDED or fields["granularity"] != "weight":
            continue
        method = pruner(**preset)
        if not getattr(method, "needs_start", False) and (data or not getattr(method, "needs_data", False)):
            found.append(name)
    return sorted(found)


def _training(data: Dataset | tuple[Tensor, Tensor], device: torch.device) -> list[tuple[Tensor, Tensor]] | None:
    """Some of the training part, for scores that look at data; None where there is none."""
    if not isinstance(data, Dataset):
        return None
    x, y = data.train.x[:TRAINING], data.train.y[:TRAINING]
    return [(data.scale(x).to(device), y.to(device))]


def _sample(data: Dataset | tuple[Tensor, Tensor], count: int, device: torch.device) -> tuple[Tensor, Tensor, str]:
    """Inputs, labels and what they are called; a random choice in stored order, since classes may lie in blocks."""
    x, y = (data.test.x, data.test.y) if isinstance(data, Dataset) else data
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise PrunelabError(f"evaluate = {count!r}: should be a number of samples, at least 1")
    if len(x) != len(y) or not len(y):
        raise PrunelabError(f"data has {len(x)} inputs and {len(y)} labels: give as many, and at least one")
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:count].sort().values.to(y.device)
    x = data.scale(x[rows]) if isinstance(data, Dataset) else x[rows]
    what = f"{len(rows):,} {'test ' * isinstance(data, Dataset)}{'images' if x.ndim == 4 else 'samples'}"
    x = x.to(device, memory_format=torch.channels_last) if x.ndim == 4 else x.to(device)
    return x, y[rows].to(device), what
