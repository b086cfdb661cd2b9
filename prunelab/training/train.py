"""The training loop: a population of runs in lockstep. A single run is a population of one; there is no second loop.

Each member has its own weights, masks, batch order, optimiser moments, learning-rate plan and early stopping; members
of about one size share the kernels of one stack. On a CPU the company decides no number: a member has the same bits
alone, beside others, and after it was resumed beside others again. Units that are masked whole are left out while
training (``narrow``). Other masks act on the gradient before the optimiser step: a weight that is zero, with a gradient
that is zero and moments that are zero, stays zero under SGD, momentum, Adam and weight decay alike, so one
multiplication keeps weights and optimiser state pruned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import math
import operator
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from prunelab.data import Dataset, Split
from prunelab.data.augment import augment
from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.settings import Train
from prunelab.structure import frozen as prefix
from prunelab.training.narrow import DROPOUTS, Narrow, narrow
from prunelab.training.stack import ALONE, Stack, corner, release, slot, stackable, threads

EVALUATION_BATCH = 2_000  # samples that are measured at once, at most
# Bytes of the maps of the first convolution, the largest ones, that are measured at once: 1.4 to 1.7 times as fast as
# 2,000 samples for Models B and C of DropNet, with the same bits there (our own measurement).
_CACHED = 1 << 24
# Filters of a layer, on average, from which convolutions in bfloat16 are faster with forward and backward pass and the
# conversions (our own measurement, AVX-512 with its instructions).
WIDE = 16


def device(name: str = "auto") -> torch.device:
    """The torch device of a name: ``"auto"`` is CUDA where there is one, else the CPU.

    Raises:
        PrunelabError: CUDA is asked for and absent, or the name is no device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        if found.type != "cuda":
            torch.zeros(1, device=found).item()  # torch knows the names of devices that it was built without
    except (RuntimeError, AssertionError, TypeError):
        raise PrunelabError(f"device {name!r}: no such device; use 'auto', 'cpu' or 'cuda'") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise PrunelabError(f"device {name!r}: this machine has no usable CUDA; use device='auto' or 'cpu'")
    return found


def knows_bfloat16(where: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; elsewhere it is slower than float32."""
    if where.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public name for these
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def generator(seed: int, purpose: str) -> torch.Generator:
    """A random generator (CPU) made of the run's seed and a purpose, so that no two uses share a stream."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass
class Member:
    """One run inside a population: all that its training reads and changes.

    Attributes:
        model: the plain module; while it is in a stack its parameters are views.
        train: the settings of this training.
        masks: what stays zero.
        order: generator of the batch order and the augmentation.
        moments: optimiser state, kind -> parameter name -> tensor of the parameter's shape.
        steps: optimiser steps since the moments began.
        epoch: epochs done in this training.
        best_loss: lowest validation loss of this training.
        stale: epochs since then.
        best: the weights of that epoch, kept when ``train.restore_best``.
        failure: why the run cannot go on; None while it can.
        penalty: from the model to the gradient of a penalty, parameter name -> tensor, which is added to that of the
            loss in every step; None: no penalty. Set it together with a change of the model or the masks. It may look
            at every weight, so the model stays whole.
        each_step: called before every step of the optimiser; what it raises ends the training.
        frozen: how many leading modules learn no more, each time that some were frozen; see ``freeze``.
        features: what those modules give for every training sample; None: all learns, on the data.
        beginning: what its weights and their training follow from. Members of one beginning, with as many epochs and
            nothing changed since, are trained once for all of them; None: nobody begins like this one.
        full: parameter name -> shape before anything was pruned, from which that of its slot in a stack follows.
    """

    model: nn.Module
    train: Train
    masks: Masks
    order: torch.Generator
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    steps: int = 0
    epoch: int = 0
    best_loss: float = math.inf
    stale: int = 0
    best: dict[str, Tensor] | None = None
    failure: str | None = None
    penalty: Callable[[nn.Module], Mapping[str, Tensor]] | None = None
    each_step: Callable[[], None] | None = None
    frozen: tuple[int, ...] = ()
    features: Tensor | None = None
    beginning: Hashable = None
    version: int = 0

    def __post_init__(self) -> None:
        self.masks.apply_(self.model)
        self.full = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    @property
    def lr(self) -> float:
        """The learning rate of the next epoch."""
        return self.lr_of(self.epoch)

    def lr_of(self, epoch: int) -> float:
        """The learning rate of an epoch, 0-based."""
        return self.train.lr * self.train.lr_factor ** sum(epoch >= m for m in self.train.lr_milestones)

    @property
    def done(self) -> bool:
        """Whether this training has ended: budget spent, patience lost, or failed."""
        stopped = self.train.patience is not None and self.stale >= self.train.patience
        return self.failure is not None or stopped or self.epoch >= self.train.epochs

    @property
    def state(self) -> Hashable:
        """Equal for members whose weights, moments and batch order are equal."""
        return id(self) if self.beginning is None or self.version else (self.beginning, self.epoch)

    @torch.no_grad()
    def follow(self, other: Member) -> None:
        """Take over what an epoch made of a member that was in the same state."""
        for mine, its in zip(self.model.state_dict().values(), other.model.state_dict().values(), strict=True):
            mine.copy_(its)
        self.moments = {kind: release(tensors) for kind, tensors in other.moments.items()}
        self.order.set_state(other.order.get_state())
        self.epoch, self.steps, self.failure = other.epoch, other.steps, other.failure

    def observe(self, validation_loss: float) -> None:
        """Take the validation loss of the epoch just done into account for early stopping."""
        if validation_loss < self.best_loss:
            self.best_loss, self.stale = validation_loss, 0
            if self.train.restore_best:
                self.best = release(self.model.state_dict())
        else:
            self.stale += 1

    def restore_best(self) -> None:
        """Go back to the best weights, if they were kept."""
        if self.best is not None:
            self.model.load_state_dict(self.best)
            self.masks.apply_(self.model)
            self.version += 1  # a narrowed copy in a stack still has the last weights

    def change(self, model: nn.Module, masks: Masks, moments: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        """Go on with other weights, shapes or masks.

        Args:
            model: the module from now on.
            masks: its masks; applied to the weights and to the moments.
            moments: optimiser state in the new shapes; None: a fresh optimiser.
        """
        masks.apply_(model)
        self.model, self.masks = model, masks
        self.moments = {} if moments is None else {kind: _masked(tensors, masks) for kind, tensors in moments.items()}
        self.steps = self.steps if moments is not None else 0
        self.version += 1

    def restart(self, train: Train) -> None:
        """Begin the next training: budget, patience, learning-rate plan and optimiser from the start."""
        self.train, self.epoch, self.stale, self.best_loss, self.best = train, 0, 0, math.inf, None
        self.moments, self.steps = {}, 0
        self.version += 1

    def outputs(self, modules: int, data: Dataset, folder: Path | None = None) -> Tensor:
        """What the first modules of the chain give for every training sample, from what is stored already or the data.

        Args:
            modules: as ``prefix.parts`` counts them, more than are frozen.
            data: that of the population.
            folder: for the file.
        """
        x = data.train.x if self.features is None else self.features
        own = [module for _, module in prefix.parts(self.model)[sum(self.frozen[-1:]) : modules]]
        pieces = (data.scale(piece).to(data.train.y.device) for piece in x.split(EVALUATION_BATCH))
        return prefix.stored(own, pieces, len(x), folder)

    def freeze(self, modules: int, features: Tensor) -> None:
        """Train only what lies behind the first modules of the chain from now on; the model stays whole.

        Args:
            modules: as ``prefix.parts`` counts them.
            features: their ``outputs``, which take the place of the training data.
        """
        self.frozen, self.features = (*self.frozen, modules), features
        left = {name for name, _ in prefix.tail(self.model, modules).named_parameters()}
        self.moments = {kind: {n: t for n, t in own.items() if n in left} for kind, own in self.moments.items()}
        self.version += 1

    def part(self, data: Dataset) -> Narrow:
        """What of the model trains on the data: without the units that are masked whole, or the frozen modules."""
        if not self.frozen:
            if self.penalty is not None:
                return Narrow(self.model, self.masks, {})
            return narrow(self.model, self.masks, data.scale(data.train.x[:1]))
        return Narrow(prefix.tail(self.model, self.frozen[-1]), self.masks, {})

    def precision(self, where: torch.device) -> torch.dtype:
        """In which it learns: for ``"auto"`` bfloat16 where the device has instructions and the maps are wide enough.

        It follows from the device and the unpruned network, never from a clock, so that it is the same in all rounds.
        """
        if self.train.precision != "auto":
            return getattr(torch, self.train.precision)
        filters = [shape[0] for shape in self.full.values() if len(shape) == 4]
        wide = sum(filters) >= WIDE * len(filters) > 0
        return torch.bfloat16 if wide and knows_bfloat16(where) else torch.float32

    def few_threads(self) -> contextlib.AbstractContextManager[None]:
        """As many threads for its pruning as for its training: see ``Stack``."""
        return threads(1) if _room(self, self.model) is not None else contextlib.nullcontext()

    def detach(self) -> None:
        """Own the storage of the weights and moments, after the stack."""
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            tensor.data = tensor.data.clone()
        self.moments = {kind: release(tensors) for kind, tensors in self.moments.items()}


def _masked(tensors: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    return {name: tensor * masks[name] if name in masks else tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Epoch:
    """What one epoch of training did to one member.

    Attributes:
        loss: mean cross entropy over the samples, while the weights were changing; mean squared error of numbers.
        accuracy: running accuracy, likewise; NaN of numbers.
        seconds: wall time of the stack's epoch divided by the members in the stack.
        lockstep: how many these were.
        alike: members in the same state, for whom one was trained; the machine spent ``seconds`` once for all of them.
    """

    loss: float
    accuracy: float
    seconds: float
    lockstep: int
    alike: int = 1


@dataclass(frozen=True)
class Evaluation:
    """A model on one part of the data.

    Attributes:
        loss: mean cross entropy over the samples; where the targets are numbers, the mean squared error.
        loss_of_batches: mean over batches of the training's batch size of their means; DyPrune's published code
            decides by it.
        accuracy: share of right answers; NaN where the targets are numbers, ``f1_macro`` too.
        f1_macro: unweighted mean over the classes of the F1 score; a class that never occurs nor is predicted counts
            as 0.
    """

    loss: float
    loss_of_batches: float
    accuracy: float
    f1_macro: float


class Population:
    """Members that train on one data set.

    Args:
        data: its tensors lie on the device on which everything runs.
    """

    def __init__(self, data: Dataset) -> None:
        self.data = data
        self._stacks: list[_Lockstep] = []
        self._seen: tuple[tuple[int, int], ...] = ()

    def epoch(self, members: Sequence[Member]) -> list[Epoch]:
        """Train every member for one epoch, those that fit together in lockstep.

        Of those in the same state one is trained and the others follow. A member whose loss stops being finite gets
        ``failure`` set, with the batch where it happened; the others are not touched by it.
        """
        alike = _alike(members)
        done: dict[int, Epoch] = {}
        for stack in self._plan([first for first, *_ in alike]):
            done.update(stack.epoch(self.data))
        for first, *rest in alike:
            done[id(first)] = dataclasses.replace(done[id(first)], alike=1 + len(rest))
            for member in rest:
                member.follow(first)
                done[id(member)] = done[id(first)]
        return [done[id(member)] for member in members]

    def evaluate(self, members: Sequence[Member], split: Split) -> list[Evaluation]:
        """Measure every member on a part of the data, in evaluation mode."""
        if not members:  # in most epochs nobody asks, and the stacks stay as they are
            return []
        alike = _alike(members)
        done: dict[int, Evaluation] = {}
        for stack in self._plan([first for first, *_ in alike]):
            done.update(stack.evaluate(self.data, split))
        for first, *rest in alike:
            for member in rest:
                member.model.eval()  # as whoever was measured
                done[id(member)] = done[id(first)]
        return [done[id(member)] for member in members]

    def _plan(self, members: Sequence[Member]) -> list[_Lockstep]:
        """Stacks of similar sizes; made anew only when a member came, left or changed."""
        seen = tuple((id(member), member.version) for member in members)
        if seen != self._seen:
            for stack in self._stacks:
                for member in stack.members:
                    member.detach()
            parts = {id(member): member.part(self.data) for member in members}
            groups = _groups(members, parts)
            self._stacks = [_Lockstep(group, [parts[id(member)] for member in group]) for group in groups]
            self._seen = seen
        return self._stacks


def _alike(members: Sequence[Member]) -> list[list[Member]]:
    """The members of each state, in the order in which they come."""
    found: dict[Hashable, list[Member]] = {}
    for member in members:
        found.setdefault(member.state, []).append(member)
    return list(found.values())


def _groups(members: Sequence[Member], parts: Mapping[int, Narrow]) -> list[list[Member]]:
    """Members that share a stack: same chain of layers, slots of one shape, same batch size, optimiser and so on."""
    groups: dict[Hashable, list[Member]] = {}
    for member in members:
        groups.setdefault(_company(member, parts[id(member)].model), []).append(member)
    return list(groups.values())


def _company(member: Member, part: nn.Module) -> Hashable:
    """Equal for members that train in one stack."""
    room = _room(member, part)
    if room is None:
        return id(member)
    shared = ("batch_size", "optimiser", "momentum", "weight_decay", "shuffle", "augment", "precision")
    layers = tuple((name, type(module)) for name, module in part.named_children())
    return layers, tuple(room.items()), tuple(getattr(member.train, name) for name in shared)


def _room(member: Member, part: nn.Module) -> dict[str, tuple[int, ...]] | None:
    """Parameter name -> shape of the member's slot in a stack; None: it trains by itself, in its own shapes."""
    if member.frozen or not stackable(part) or sum(p.numel() for p in part.parameters()) > ALONE:
        return None
    return {name: tuple(map(slot, parameter.shape, member.full[name])) for name, parameter in part.named_parameters()}


class _Lockstep:
    """Members in one stack, with the optimiser that serves them all."""

    def __init__(self, members: Sequence[Member], parts: Sequence[Narrow]) -> None:
        self.members, self.parts = list(members), list(parts)
        self.settings = members[0].train
        models, room = [part.model for part in parts], _room(members[0], parts[0].model)
        where = next(models[0].parameters()).device
        self.stack = Stack(models, members[0].precision(where), room)
        self.names = list(self.stack.parameters)
        self.leaves = list(self.stack.parameters.values())
        self.masks = self._stack_masks()
        kinds = _moments(self.settings)
        self.plain = self.settings.optimiser == "sgd" and not kinds and not self.settings.weight_decay
        self.penalised = [run for run, member in enumerate(members) if member.penalty is not None]
        self.fused = self.plain and not self.masks and not self.penalised
        self.drops = any(isinstance(module, DROPOUTS) for module in self.stack.models[0].modules())
        self.moments = {kind: self._stack_moment(kind) for kind in kinds}
        self.gradients = None if self.fused else {name: self.stack.zeros(name) for name in self.names}
        self.right = torch.zeros(len(members), dtype=torch.long, device=self.leaves[0].device)
        self._learners: dict[tuple[float, ...], Callable[[Tensor, Tensor], Tensor]] = {}

    def _stack_masks(self) -> dict[str, Tensor]:
        """Float masks of the parameters that have one, and of all where padding would not stay zero by itself."""
        found = {}
        models = self.stack.models
        sigmoid = any(isinstance(module, nn.Sigmoid) for module in models[0].modules())
        for name, leaf in zip(self.names, self.leaves, strict=True):
            own = [part.masks.get(name) for part in self.parts]
            parameters = [model.get_parameter(name) for model in models]
            padded = sigmoid and self.stack.chain and any(p.shape != leaf.shape[1:] for p in parameters)
            if padded or not all(mask is None or bool(mask.all()) for mask in own):
                found[name] = self.stack.zeros(name)
                for run, (mask, parameter) in enumerate(zip(own, parameters, strict=True)):
                    corner(found[name][run], parameter.shape).copy_(
                        torch.ones_like(parameter) if mask is None else mask
                    )
        return found

    def _stack_moment(self, kind: str) -> list[Tensor]:
        """The optimiser state of all members; of those that are not narrowed it becomes views."""
        stacked = []
        for name in self.names:
            whole = self.stack.zeros(name)
            for run, (member, part) in enumerate(zip(self.members, self.parts, strict=True)):
                mine = corner(whole[run], part.model.get_parameter(name).shape)
                before = member.moments.setdefault(kind, {}).get(name)
                if before is not None:
                    mine.copy_(part.cut(name, before))
                if not part.index:
                    member.moments[kind][name] = mine
                elif before is None:
                    member.moments[kind][name] = torch.zeros_like(member.model.get_parameter(name))
            stacked.append(whole)
        return stacked

    def _write_back(self, steps: int) -> None:
        """What was trained in a narrowed model, to its place in the whole one, where the rest made its steps, too."""
        for run, (member, part) in enumerate(zip(self.members, self.parts, strict=True)):
            if not part.index:
                continue
            if not self.plain:
                self._decay(member, part, steps)
            for i, name in enumerate(self.names):
                small = part.model.get_parameter(name).detach()
                part.write_back(name, small, member.model.get_parameter(name).detach())
                for kind, stacked in self.moments.items():
                    part.write_back(name, corner(stacked[i][run], small.shape), member.moments[kind][name])
            for name, small in part.model.named_buffers():  # what BatchNorm counted
                part.write_back(name, small, member.model.get_buffer(name))

    @torch.no_grad()
    def _decay(self, member: Member, part: Narrow, steps: int) -> None:
        """The optimiser's steps for what narrowing left out: no gradient, but weight decay and the moments there were.

        These are the weights that read a unit without output, in the next layer. Moments follow recursions of their
        own, and the fused rules round in their way, so the steps are made: one small call for each.
        """
        zeros = torch.zeros_like
        gone = {name: torch.ones_like(member.model.get_parameter(name), dtype=torch.bool) for name in self.names}
        for name, rest in gone.items():
            part.write_back(name, zeros(part.model.get_parameter(name), dtype=torch.bool), rest)
        whole = {kind: [member.moments[kind][name] for name in self.names] for kind in self.moments}
        whole["weight"] = [member.model.get_parameter(name).detach() for name in self.names]
        # Filled up, since the last few elements of a tensor are computed in another way.
        rest = {
            kind: [F.pad(own[i], (0, -int(i.sum()) % 16)) for own, i in zip(tensors, gone.values(), strict=True)]
            for kind, tensors in whole.items()
        }
        weights = rest.pop("weight")
        if not any(
            bool(own.any()) for own in itertools.chain(weights if self.settings.weight_decay else (), *rest.values())
        ):
            return
        count, still = (
            [torch.full((), float(member.steps), device=own.device) for own in weights],
            [*map(zeros, weights)],
        )
        for _ in range(steps):
            _optimise(self.settings, weights, still, rest, count, member.lr)
        for kind, tensors in {"weight": weights, **rest}.items():
            for own, i, new in zip(whole[kind], gone.values(), tensors, strict=True):
                own[i] = new[: int(i.sum())]

    def epoch(self, data: Dataset) -> dict[int, Epoch]:
        settings, runs, features = self.settings, len(self.members), self.members[0].features
        split = data.train if features is None else Split(features, data.train.y)
        samples, size = len(split.y), settings.batch_size
        where = split.y.device
        order = self._order(samples)
        losses = torch.zeros(math.ceil(samples / size), runs, device=where)
        learn = self._learner(shared=order is None and settings.augment == "none")
        self.right.zero_()
        for model in [*self.stack.models, *(member.model for member in self.members)]:
            model.train()
        begin = time.perf_counter()
        with _drawing_from(self.members[0].order, where) if self.drops else contextlib.nullcontext():
            for batch, start in enumerate(range(0, samples, size)):
                rows = slice(start, start + size)
                losses[batch] = learn(*self._batch(data, split, rows if order is None else order[:, rows]))
        history = losses.cpu()
        seconds = (time.perf_counter() - begin) / runs
        self._write_back(len(history))
        weights = [size] * (len(history) - 1) + [samples - size * (len(history) - 1)]
        mean = [math.fsum(map(operator.mul, weights, own)) / samples for own in history.t().tolist()]
        done = {}
        for run, member in enumerate(self.members):
            member.epoch += 1
            member.steps += len(history)
            if not math.isfinite(mean[run]):
                bad = int((~history[:, run].isfinite()).nonzero()[0]) + 1
                member.failure = (
                    f"the loss was not finite from batch {bad} of epoch {member.epoch} on; "
                    f"lower lr = {member.lr_of(member.epoch - 1):g}"
                )
            accuracy = self.right[run].item() / samples if data.labelled else math.nan
            done[id(member)] = Epoch(mean[run], accuracy, seconds, runs)
        return done

    def _learner(self, shared: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """One step of all members, from a batch to their losses; right answers are added up in ``right``.

        It is kept from epoch to epoch while the learning rates stay.
        """
        now = tuple(member.lr for member in self.members)
        if now not in self._learners:
            # Not self in the closure: a ring would keep the memory of a stack that is through until it is collected.
            stack, gradients, right, where = self.stack, self.gradients, self.right, self.leaves[0].device
            rates = torch.tensor(now, device=where)
            step = None if self.fused else self._stepper()
            hooks = [member.each_step for member in self.members if member.each_step is not None]

            def one(x: Tensor, y: Tensor) -> Tensor:
                for hook in hooks:
                    hook()
                loss, hits = stack.learn(x, y, gradients, rates, shared)
                if step is not None:
                    step()
                right.add_(hits)
                return loss

            self._learners = {now: one}
        return self._learners[now]

    def _order(self, samples: int) -> Tensor | None:
        """Sample numbers in the order in which they are seen, [R, N]; None where all runs see the data's own order."""
        if not self.settings.shuffle:
            return None
        where = self.leaves[0].device
        return torch.stack([torch.randperm(samples, generator=member.order) for member in self.members]).to(where)

    def _batch(self, data: Dataset, split: Split, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """A batch for all, [B, ...] and [B], or one for each run, [R, B, ...] and [R, B]."""
        kind, runs = self.settings.augment, len(self.members)
        own = isinstance(rows, Tensor)
        x = split.x.index_select(0, rows.flatten().to(split.x.device)) if own else split.x[rows]
        y = data.target(split.y[rows])
        if kind != "none":
            per_run = x.chunk(runs) if own else [x] * runs
            x = torch.cat([augment(part, kind, m.order) for part, m in zip(per_run, self.members, strict=True)])
            y, own = y.expand(runs, -1), True
        x = data.scale(x).to(y.device, torch.float32)  # stored features are float16, and on the CPU
        return (x.unflatten(0, (runs, -1)) if own else x), y

    def _stepper(self) -> Callable[[], None]:
        """One optimiser step for all members; cut into runs only where their step counts or learning rates differ."""
        members, stack, s, gradients, narrowed = self.members, self.stack, self.settings, self.gradients, self.parts
        penalised, flat = self.penalised, stack.flat
        masked = [flat(gradients[name]) for name in self.masks]
        keep = [flat(mask) for mask in self.masks.values()]
        uniform = len({(member.steps, member.lr) for member in members}) == 1

        def parts(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
            rows = [flat(tensor) for tensor in tensors]
            return [rows] if uniform else [[own[run] for own in rows] for run in range(len(members))]

        weights = parts(self.leaves)
        moments = {kind: parts(tensors) for kind, tensors in self.moments.items()}
        rates = [member.lr for member in (members[:1] if uniform else members)]
        where = self.leaves[0].device  # where the optimisers want the counts, too
        counts = [[torch.full((), float(member.steps), device=where) for _ in self.names] for member in members]
        found = parts(gradients.values())  # written into, never replaced

        @torch.no_grad()
        def step() -> None:
            for run in penalised:
                for name, change in members[run].penalty(narrowed[run].model).items():
                    corner(gradients[name][run], change.shape).add_(change)
            if keep:
                torch._foreach_mul_(masked, keep)
            for i, (own, rate) in enumerate(zip(weights, rates, strict=True)):
                _optimise(s, own, found[i], {k: m[i] for k, m in moments.items()}, counts[i], rate)

        return step

    @torch.no_grad()
    def evaluate(self, data: Dataset, split: Split) -> dict[int, Evaluation]:
        losses, predicted = [], []
        for model in [*self.stack.models, *(member.model for member in self.members)]:
            model.eval()
        size = pieces(self.members[0].full, data.shape, split.y.device)
        for start in range(0, len(split.y), size):
            rows = slice(start, start + size)
            y = data.target(split.y[rows])
            logits = self._answers(data.scale(split.x[rows]))
            if not data.labelled:
                losses.append((logits - y).square().mean(-1))
                continue
            flat = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none")
            losses.append(flat.view(len(logits), -1))
            predicted.append(logits.argmax(-1))
        with threads(1):  # how sums are rounded must not depend on the number
            found = []
            for run, loss in enumerate(torch.cat(losses, 1).double().unbind(0)):
                batches = torch.stack([part.mean() for part in loss.split(self.settings.batch_size)]).mean()
                answers = math.nan, math.nan
                if data.labelled:
                    prediction = torch.cat([piece[run] for piece in predicted])
                    right = (prediction == split.y).double().mean().item()
                    answers = right, f1_macro(prediction, split.y, len(data.classes))
                found.append(Evaluation(loss.mean().item(), batches.item(), *answers))
        return {id(member): one for member, one in zip(self.members, found, strict=True)}

    def _answers(self, x: Tensor) -> Tensor:
        """What every member's whole model gives, [R, B, C]."""
        first = self.members[0]
        return first.model(x)[None] if first.frozen else self.stack(x, shared=True)


@contextlib.contextmanager
def _drawing_from(order: torch.Generator, where: torch.device) -> Iterator[None]:
    """Dropout draws from the generators of the process; meanwhile they follow from a member's own, so from its seed."""
    with torch.random.fork_rng([where] if where.type == "cuda" else []):
        seed = int(torch.randint(2**62, (), generator=order))
        torch.random.default_generator.manual_seed(seed)
        if where.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


def pieces(parameters: Mapping[str, Sequence[int]], shape: Sequence[int], where: torch.device) -> int:
    """How many samples to measure at once: maps that fit the cache are computed about twice as fast on a CPU.

    Args:
        parameters: name -> shape, of the unpruned network: the number must not change from round to round.
        shape: of a sample.
        where: the device.
    """
    filters = next((size[0] for size in parameters.values() if len(size) == 4), 0)
    if not filters or where.type != "cpu":
        return EVALUATION_BATCH
    fitting = _CACHED // (4 * filters * math.prod(shape[1:]))
    return min(max(fitting // 16, 1) * 16, EVALUATION_BATCH)


def _moments(settings: Train) -> tuple[str, ...]:
    if settings.optimiser == "sgd":
        return ("momentum_buffer",) if settings.momentum else ()
    return ("exp_avg", "exp_avg_sq")


def _optimise(
    settings: Train,
    weights: list[Tensor],
    gradients: list[Tensor],
    moments: Mapping[str, list[Tensor]],
    steps: list[Tensor],
    lr: float,
) -> None:
    """Torch's own update rules, in their functional form, because they take per-run tensors and step counts."""
    if settings.optimiser == "sgd":
        sgd(
            weights,
            gradients,
            moments.get("momentum_buffer") or [None] * len(weights),
            fused=True,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        return
    rule = adamw if settings.optimiser == "adamw" else adam
    rule(
        weights,
        gradients,
        moments["exp_avg"],
        moments["exp_avg_sq"],
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=lr,
        weight_decay=settings.weight_decay,
        eps=1e-8,
        maximize=False,
    )


def f1_macro(predicted: Tensor, y: Tensor, classes: int) -> float:
    """Unweighted mean over classes of F1 = 2 TP / (2 TP + FP + FN), 0 for a class that is neither there nor predicted.

    Args:
        predicted: int64 [N], class numbers.
        y: int64 [N], the true ones.
        classes: how many there are.
    """
    confusion = torch.bincount(y * classes + predicted, minlength=classes * classes).view(classes, classes).double()
    hit, both = confusion.diagonal(), confusion.sum(0) + confusion.sum(1)
    return torch.where(both > 0, 2 * hit / both.clamp(min=1), both).mean().item()
