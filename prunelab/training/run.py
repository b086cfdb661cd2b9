"""One run while it trains: its member of a population, the end of its rounds, its rows, and its place in the store."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunelab import models, pruners
from prunelab.data import Dataset
from prunelab.errors import PrunelabError, first_line
from prunelab.masks import Masks
from prunelab.models import layer_widths
from prunelab.pruners import Context, Step
from prunelab.pruners.base import Progress
from prunelab.pruners.units import by_layer, keep_as_many
from prunelab.runs import Checkpoint, Store, provenance
from prunelab.runs.records import Damaged
from prunelab.settings import Run
from prunelab.structure import cost
from prunelab.structure.chains import ShrinkError, live_units
from prunelab.structure.frozen import learning_macs
from prunelab.training.history import Ledger
from prunelab.training.load import masks_at, reshaped
from prunelab.training.observe import Seen, Watch, most_epochs, pruned_after
from prunelab.training.train import EVALUATION_BATCH, Epoch, Evaluation, Member, Population, generator
from prunelab.training.versions import versions

log = logging.getLogger(__name__)

# How a round begins with other weights than the trained ones, and what is added to the seed of their draw; the 20 is
# that of DropNet's code.
_NEW_WEIGHTS = {"rewind": 0, "reinit": 20}


class Running:
    """A run while it trains: its member of the population, its rounds so far, and the claim on its folder."""

    def __init__(
        self, run: Run, writer: Any, data: Dataset, where: str, claim: contextlib.ExitStack, store: Store
    ) -> None:
        self.run, self.writer, self.data, self.where, self.claim = run, writer, data, where, claim
        self.store = store
        self.pruner = pruners.build(run.prune)
        self.during = self.pruner.while_training
        dense = models.build(run.model, data.shape, len(data.classes), run.seed)
        self.widths = dict(layer_widths(dense))
        self.choice = generator(run.seed, "pruning")
        self.rounds: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.losses_of_batches: list[float] = []
        self.accuracies: list[float] = []
        self.last: int | None = None
        self.pruned_accuracy = math.nan  # of the test part, after the pruning of this round and before its training
        self.state: dict[str, Tensor] = {}
        self.over = False
        self._counted: tuple[int, dict[str, int]] = -1, {}
        self.validation: Evaluation | None = None
        self.test: Evaluation | None = None
        dense_masks = pruners.first_masks(dense, self.pruner, run.prune.layers)
        self.weights_total = dense_masks.weights.total
        self.ledger = Ledger(dense, dense_masks)
        self.member = Member(dense, run.train, dense_masks, generator(run.seed, "order"))  # the ledger has shapes only
        self.state = dict(self.pruner.begin(self.member.model))
        checkpoint = writer.checkpoint
        frozen = () if checkpoint is None else tuple(checkpoint.state.get("frozen", ()))
        if checkpoint is not None:
            self._resume(checkpoint)
        if not self.round and not self.pruner.penalises:
            self.member.beginning = run.model, run.train, run.seed  # whatever prunes it later
        self.member.model.to(where)
        self.member.masks = self.member.masks.to(where)
        self.member.moments = {k: {n: t.to(where) for n, t in own.items()} for k, own in self.member.moments.items()}
        for modules in () if self.over else frozen:
            self.member.freeze(modules, self._outputs(modules))
        self._penalise()

    @property
    def round(self) -> int:
        """Prunings that are behind it."""
        return self.ledger.round

    # -- one epoch ----------------------------------------------------------------------------------------------------

    @property
    def wants_validation(self) -> bool:
        """Whether the validation part is to be measured after the epoch just trained."""
        always = self.member.train.validate_every_epoch or self.during
        return always or self.member.done or len(self.epochs) + 1 in self.run.prune.also_after

    def observe(self, epoch: Epoch, validation: Evaluation | None) -> None:
        """Take in what the epoch brought, and see whether it ends the round."""
        self.trained, self.validation, self.test = epoch, validation, None
        if validation is not None:
            self.losses.append(validation.loss)
            self.losses_of_batches.append(validation.loss_of_batches)
            self.accuracies.append(validation.accuracy)
            self.member.observe(validation.loss)
        self.acts, self.signal = False, float("nan")
        if self.during:
            self.signal = self.pruner.signal(self._progress())
            self.acts = not self.member.done and self.pruner.due(self._progress())
        if len(self.epochs) + 1 in self.run.prune.also_after and self._can_prune:
            self.acts = True

    @property
    def _can_prune(self) -> bool:
        return not self.member.done and (self.during or self.round < self.run.prune.rounds)

    @property
    def round_ends(self) -> bool:
        """Whether the epoch that was observed was the last one of its round."""
        return self.acts or self.member.done

    @property
    def wants_test(self) -> bool:
        """Whether the test part is to be measured now."""
        return (
            self.test is None and self.member.failure is None and (self.run.train.test_every_epoch or self.round_ends)
        )

    def restore_best(self) -> bool:
        """Whether the weights were put back to those of the best epoch, so that they have to be measured again."""
        if self.member.done and self.member.best is not None and self.member.stale:
            self.member.restore_best()
            return True
        return False

    def close_epoch(self, population: Population) -> None:
        """Write the epoch down; at the end of a round prune, save, and go on or finish."""
        if self.member.failure is not None:
            self._fail(self.member.failure)
            return
        row = self._epoch_row()
        self.epochs.append(row)
        if self.round_ends:
            self._end_round(row, population)

    def _end_round(self, row: dict[str, Any], population: Population) -> None:
        if self.during:
            self._during(row)
        else:
            self._rounds(population)

    @property
    def reached(self) -> int:
        """Epochs of ``most_epochs`` that are behind it; a round that ended early counts whole."""
        if self.over:
            return most_epochs(self.run)
        if self.during or not self.round:
            return len(self.epochs)
        later = (self.run.retrain or self.run.train).epochs
        return self.run.train.epochs + (self.round - 1) * later + self.member.epoch

    # -- somebody watches ---------------------------------------------------------------------------------------------

    def seen(self) -> Seen:
        """How things stand."""
        trained = bool(self.epochs) and self.epochs[-1]["round"] == self.round
        kept, can = self.member.masks.weights.kept, trained and not self.over and self._can_prune
        state = (self.run, self.epochs, self.rounds, most_epochs(self.run), self.member.model, self.member.masks)
        return Seen(*state, self.widths, kept, self.weights_total, can, self.over)

    def heed(self, watch: Watch, population: Population) -> None:
        """Do what the watcher wishes, until it wishes nothing but to go on."""
        while (wish := watch(self.seen())) != "go on" and not self.over:
            self._save()
            if wish == "stop":
                self._leave()
            elif wish == "prune" and self.seen().may_prune:
                self._prune_early(population)

    def pause(self) -> None:
        """Save, and train no more for now."""
        self._save()
        self._leave()

    def _prune_early(self, population: Population) -> None:
        """Prune after the epoch that was just written down: from now on it is the run whose settings say so.

        The run that it was until now stays in the store as it is, and can go on without this pruning.
        """
        row = self.epochs[-1]
        run, other = pruned_after(self.run, row["epoch"]), contextlib.ExitStack()
        if (status := self.store.status(run)) != "missing":
            raise PrunelabError(f"run {run.id} is {status} in the store already: go on with that one, or discard it")
        writer = other.enter_context(self.store.claim(run, wait=False, versions=versions(run)))
        self.claim.close()
        self.claim.push(other)
        self.run, self.writer, self.acts = run, writer, True
        if self.validation is None:
            self.validation = population.evaluate([self.member], self.data.validation)[0]
        if self.wants_test:
            self.test = population.evaluate([self.member], self.data.test)[0]
        row.update(self._measured())
        self._end_round(row, population)

    def _epoch_row(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "epoch": len(self.epochs) + 1,
            "train_loss": self.trained.loss,
            "train_accuracy": self.trained.accuracy,
            **self._measured(),
            "seconds": self.trained.seconds,
            "lockstep": self.trained.lockstep,
            "alike": self.trained.alike,
            "weights": self.member.masks.weights.kept,
            "units": sum(self._units().values()),
            "pruned": False,
            "rate": float("nan"),
            "trigger": self.signal,
        }

    def _measured(self) -> dict[str, float]:
        """Loss and accuracy of the parts that were measured after this epoch, NaN for the others."""
        found = {}
        for part, measured in (("validation", self.validation), ("test", self.test)):
            found[f"{part}_loss"] = math.nan if measured is None else measured.loss
            found[f"{part}_accuracy"] = math.nan if measured is None else measured.accuracy
        return found

    # -- the end of a round -------------------------------------------------------------------------------------------

    def _during(self, row: dict[str, Any]) -> None:
        """A method that prunes while training: it acts, or the budget is spent."""
        if not self.acts:
            self._write_round(0.0)
            self._finish()
            return
        begin = time.perf_counter()
        self.member.detach()
        with self.member.few_threads():
            step = self.pruner.prune(self._now(), self.run.prune.amount)
        more = step.frozen > sum(self.member.frozen[-1:])
        features = self._outputs(step.frozen) if more else None
        seconds = time.perf_counter() - begin
        self.last = len(self.losses) - 1
        if step.failure is not None:
            self._write_round(seconds, step.failure)
            self._fail(step.failure)
            return
        self._write_round(seconds, step.note)
        row["pruned"], row["rate"] = not step.note, step.rate
        self.state = dict(step.state)
        moments = None if step.fresh else self.member.moments
        if moments is not None and step.cut is not None:
            moments = {kind: {n: step.cut.cut(n, t) for n, t in own.items()} for kind, own in moments.items()}
        self._take(step, moments)
        if features is not None:
            self.member.freeze(step.frozen, features)
        self._penalise()
        self._save()

    def _outputs(self, modules: int) -> Tensor:
        """What the first modules give for every training sample, in a file in the folder of the run."""
        folder = self.store.place(self.run.id).partial
        folder.mkdir(parents=True, exist_ok=True)
        return self.member.outputs(modules, self.data, folder)

    def _penalise(self) -> None:
        """The penalty of the method, if it has one, for the network as it is now."""
        self.member.penalty = self.pruner.penalty(self.member.model, self.state)

    def _take(self, step: Step, moments: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        """Write down what a method did, and make it the network that trains from now on."""
        masks = self.ledger.take(self.member.masks, step, self.run.prune.amount)
        pruners.put_weights(self.member.model, step.weights)
        self.member.change(self.member.model if step.cut is None else step.cut.model, masks, moments)

    def _progress(self) -> Progress:
        epochs, lr = self.member.train.epochs, self.member.lr_of(self.member.epoch - 1)
        return Progress(self.losses, self.losses_of_batches, epochs, self.last, self.accuracies, lr)

    def _now(self) -> Context:
        """What a method may look at when it prunes now; the loss is the one that is trained on."""
        member, run = self.member, self.run
        return Context(
            member.model,
            member.masks,
            self.choice,
            self._batches,
            lambda: dict(self._fresh(run.seed).named_parameters()),
            None if self.data.labelled else F.mse_loss,
            progress=self._progress(),
            moments=member.moments,
            state=self.state,
        )

    def _rounds(self, population: Population) -> None:
        """A method of whole rounds: train, prune, recover."""
        prune = self.run.prune
        self._write_round(0.0)
        while True:
            density = 1 - self._removed_units() if prune.stop is not None else 1.0
            if self.round >= prune.rounds or (prune.stop is not None and density <= prune.stop):
                self._finish()
                return
            begin = time.perf_counter()
            self.member.detach()
            try:
                with self.member.few_threads():
                    step = self._pruned(self._now())
            except PrunelabError as error:
                self._fail(str(error))
                return
            seconds = time.perf_counter() - begin
            self.member.restart(self.run.retrain or self.run.train)
            self._take(step)
            self.test = population.evaluate([self.member], self.data.test)[0]
            self.pruned_accuracy = self.test.accuracy
            if prune.recover in _NEW_WEIGHTS:
                self.member.change(self._fresh(self.run.seed + _NEW_WEIGHTS[prune.recover]), self.member.masks)
            self._penalise()
            self.losses, self.losses_of_batches, self.accuracies, self.last = [], [], [], None
            if prune.recover != "none":
                self._save()
                return
            self.validation = population.evaluate([self.member], self.data.validation)[0]
            self._write_round(seconds)
            self._save()

    def _pruned(self, now: Context) -> Step:
        """What the method makes of the network, or what it made of the one that this run follows."""
        prune, pruner = self.run.prune, self.pruner
        if not prune.masks_of:
            return pruner.prune(now, prune.amount)
        if prune.follow == "masks":
            return Step(now.masks & self._followed())
        scores = pruner.scores(now)
        masks = keep_as_many(now, scores, self._followed(), pruner.granularity)
        return Step(masks, by_layer(now, scores, pruner.granularity))

    def _followed(self) -> Masks:
        """What the run that this one follows kept in the round that begins now."""
        removals = self.store.removals(self.run.prune.masks_of)
        return masks_at(removals, self.round + 1).to(self.where)

    def _fresh(self, seed: int) -> nn.Module:
        return models.build(self.run.model, self.data.shape, len(self.data.classes), seed).to(self.where)

    def _batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The training part in its own order, scaled, for scores that look at data; about 2 million numbers a batch.

        A method that judges networks by data that they have not learnt gets the validation part.
        """
        split = self.data.validation if self.pruner.reads == "held_out" else self.data.train
        size = max(1, min(EVALUATION_BATCH, 2**21 // math.prod(self.data.shape)))
        for start in range(0, len(split.y), size):
            yield self.data.scale(split.x[start : start + size]), self.data.target(split.y[start : start + size])

    def _units(self) -> dict[str, int]:
        """Live units by layer; they change only with the masks, and every epoch asks for them."""
        if self._counted[0] != self.member.version:
            self._counted = self.member.version, self._count_units()
        return self._counted[1]

    def _count_units(self) -> dict[str, int]:
        try:
            return live_units(self.member.model, self.member.masks)
        except ShrinkError:  # not a chain: a unit is alive while it has an input
            return {
                name: int(self.member.masks[f"{name}.weight"].flatten(1).any(1).sum())
                if f"{name}.weight" in self.member.masks
                else width
                for name, width in self.widths.items()
            }

    def _removed_units(self) -> float:
        return 1 - sum(self._units().values()) / sum(self.widths.values())

    def _write_round(self, prune_seconds: float, note: str = "") -> None:
        """The row of the round that has just ended: the network as it was trained and measured."""
        done = [row for row in self.epochs if row["round"] == self.round]
        masks, units = self.member.masks, self._units()
        kept = masks.weights.kept  # biases that go with their unit are not among the weights
        price = cost.summarise(self.member.model, self.data.shape, masks)
        self.rounds.append(
            {
                "round": self.round,
                "source": self.data.source,
                "requested_sparsity": self.ledger.requested,
                "sparsity": 1 - kept / self.weights_total,
                "density": kept / self.weights_total,
                "compression_ratio": self.weights_total / kept if kept else float("inf"),
                "weights": kept,
                "weights_total": self.weights_total,
                "parameters": price.nonzero,
                "units": sum(units.values()),
                "units_total": sum(self.widths.values()),
                "units_by_layer": list(units.values()),
                "train_loss": self.trained.loss,
                "train_accuracy": self.trained.accuracy,
                "validation_loss": self.validation.loss,
                "validation_accuracy": self.validation.accuracy,
                "test_loss": self.test.loss,
                "test_accuracy": self.test.accuracy,
                "test_f1_macro": self.test.f1_macro,
                "pruned_test_accuracy": self.pruned_accuracy,
                "epochs": len(done),
                "epoch": len(self.epochs),
                "seconds": sum(row["seconds"] for row in done),
                "seconds_spent": sum(row["seconds"] / row.get("alike", 1) for row in done),
                "prune_seconds": prune_seconds,
                "macs": price.macs,
                "effective_macs": price.effective_macs,
                **self._learning_macs(),
                "note": note,
                "precision": str(self.member.precision(torch.device(self.where))).removeprefix("torch."),
                **provenance.row(*_machine(self.where)),
            }
        )

    def _learning_macs(self) -> dict[str, int]:
        """Those of a sample in the part of the network that trained, where layers may drop out of the training."""
        if not self.pruner.stores_features:
            return {}
        return {"learning_macs": learning_macs(self.member.model, self.data.shape, sum(self.member.frozen[-1:]))}

    # -- the record ---------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        self.member.detach()
        self._save(final=True)
        self._seal()

    def _seal(self) -> None:
        """Move the run into the store; also what is left to do when it was killed just before."""
        index = {f"index.{name}.{axis}": i for name, axes in self.ledger.index.items() for axis, i in enumerate(axes)}
        self.writer.finish(
            weights=_arrays(self.member.model.state_dict()),
            masks=_arrays(self.member.masks),
            removals=_arrays({**self.ledger.removals.tensors(), **index}),
            provenance=provenance.collect(*_machine(self.where)),
        )
        self._leave()

    def _fail(self, reason: str) -> None:
        log.warning("run %s failed: %s", self.run.id, reason)
        self._save()
        self.writer.fail(reason)
        self._leave()

    def _leave(self) -> None:
        self.over = True
        self.claim.close()

    def _save(self, final: bool = False) -> None:
        """Everything from which the run goes on with the same bits."""
        member = self.member
        tensors = {
            **{f"model/{n}": t for n, t in member.model.state_dict().items()},
            **{f"mask/{n}": t for n, t in member.masks.items()},
            **{f"moment/{kind}/{n}": t for kind, own in member.moments.items() for n, t in own.items()},
            **{f"state/{n}": t for n, t in self.state.items()},
            **{f"best/{n}": t for n, t in (member.best or {}).items()},
            **self.ledger.tensors(),
            "generator/order": member.order.get_state(),
            "generator/choice": self.choice.get_state(),
        }
        state = {
            "final": final,
            "round": self.round,
            "epoch": member.epoch,
            "steps": member.steps,
            "requested": self.ledger.requested,
            "pruned_accuracy": None if math.isnan(self.pruned_accuracy) else self.pruned_accuracy,
            "last": self.last,
            "losses": self.losses,
            "losses_of_batches": self.losses_of_batches,
            "accuracies": self.accuracies,
            "best_loss": member.best_loss,
            "stale": member.stale,
            "frozen": list(member.frozen),
        }
        self.writer.save(Checkpoint(_arrays(tensors), state, self.rounds, self.epochs))

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; one that does not fit the settings is as good as damaged.

        Raises:
            Damaged: it does not fit.
        """
        try:
            self._take_over(checkpoint)
        except (LookupError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise Damaged(f"the checkpoint of {self.run.id} does not fit its settings ({first_line(error)})") from None
        if checkpoint.state["final"]:
            self._seal()

    def _take_over(self, checkpoint: Checkpoint) -> None:
        tensors = {name: torch.from_numpy(array.copy()) for name, array in checkpoint.tensors.items()}
        state = checkpoint.state

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix + "/"): t for n, t in tensors.items() if n.startswith(prefix + "/")}

        self.rounds, self.epochs = list(checkpoint.rounds), list(checkpoint.epochs)
        self.ledger.resume(tensors, state["round"], state["requested"])
        self.last = state["last"]
        self.losses, self.losses_of_batches = list(state["losses"]), list(state["losses_of_batches"])
        self.accuracies = list(state.get("accuracies", ()))
        self.pruned_accuracy = math.nan if state.get("pruned_accuracy") is None else state["pruned_accuracy"]
        self.state = part("state")
        self.choice.set_state(tensors["generator/choice"])
        member = self.member
        member.order.set_state(tensors["generator/order"])
        member.model = reshaped(member.model, self.ledger.index)
        member.model.load_state_dict(part("model"))
        member.masks = Masks(part("mask"))
        for name, tensor in part("moment").items():
            kind, _, parameter = name.partition("/")
            member.moments.setdefault(kind, {})[parameter] = tensor
        member.epoch, member.steps = state["epoch"], state["steps"]
        member.best_loss, member.stale, member.best = state["best_loss"], state["stale"], part("best") or None
        if self.round and not self.during:
            member.train = self.run.retrain or self.run.train
        member.masks.check(member.model)


def _machine(where: str) -> tuple[str, int]:
    """What trains, in words, and with how many threads."""
    name = torch.cuda.get_device_name(where) if where.startswith("cuda") else provenance.hardware()
    return name, torch.get_num_threads()


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
