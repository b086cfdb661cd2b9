"""Channels that have to be decided together, with every slice of every parameter that belongs to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from prunelab.errors import PrunelabError, nearest
from prunelab.masks import Masks
from prunelab.structure.fold import Constants, anything, live
from prunelab.structure.watch import FIXED, Seen, named_tensors, unwrapped, watch

Role = Literal["in", "out", "bias", "affine"]
Granularity = Literal["channel", "head"]
_ROLES: dict[int, Role] = {0: "affine", 1: "in", 2: "out", 3: "bias"}


@dataclass(frozen=True)
class Slice:
    """One axis of a parameter or buffer that a space runs along.

    Attributes:
        name: of the parameter or buffer.
        dim: the axis.
        group: for each index of the axis the number of its group in the space, int64; -1 where it has none.
        role: ``"out"``: rows of a weight that make the channels; ``"bias"``: added to them right there; ``"in"``:
            columns that read them; ``"affine"``: what acts on each by itself, as normalisation and layer scale do.
    """

    name: str
    dim: int
    group: Tensor
    role: Role


@dataclass(frozen=True)
class Space:
    """Channels that are decided together, as those of the residual stream of one stage: any of its groups may go.

    Attributes:
        name: the first layer, in forward order, that makes its channels.
        size: how many groups there are; a group goes whole or stays whole, and at least one stays.
        slices: all that belongs to them, over all parameters and buffers, in forward order.
        pinned: why none of them can go; None: some can.
        fixed: bool [size], groups that stay; all where it is pinned.
    """

    name: str
    size: int
    slices: tuple[Slice, ...]
    pinned: str | None
    fixed: Tensor

    @property
    def layers(self) -> tuple[str, ...]:
        """The parameters that make the channels."""
        return tuple(part.name for part in self.slices if part.role == "out")


@dataclass(frozen=True)
class Groups(Mapping[str, Space]):
    """What goes together in a model: a mapping from the name of each space to it, in forward order.

    >>> groups = channel_groups(model, example)
    >>> for name, space in groups.items():
    ...     if space.pinned is None:
    ...         scores = torch.zeros(space.size)
    ...         for part in space.slices:
    ...             if part.role == "out":
    ...                 norm = dict(model.named_parameters())[part.name].movedim(part.dim, 0).flatten(1).norm(dim=1)
    ...                 own = part.group >= 0
    ...                 scores.index_add_(0, part.group[own], norm[own])
    >>> masks = groups.masks({name: keep})  # keep: bool [space.size]

    Where a network reshapes channels into rows and columns (attention heads, groups of a convolution, halves of a
    chunk), what is left has to be rectangular. A group is then one column of all rows (``granularity="channel"``: the
    same place in each head), or one whole row (``"head"``), so that any choice of groups can be removed.
    """

    spaces: dict[str, Space]
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def __getitem__(self, name: str) -> Space:
        return self.spaces[name]

    def __iter__(self) -> Any:
        return iter(self.spaces)

    def __len__(self) -> int:
        return len(self.spaces)

    def masks(self, kept: Mapping[str, Tensor]) -> Masks:
        """Masks of everything that makes the dropped groups: rows, biases, and what acts on each channel by itself.

        Args:
            kept: space -> bool [size], True = keep; spaces that are not named stay whole.

        Raises:
            PrunelabError: a name, a length, or a group that has to stay.
        """
        made: dict[str, Tensor] = {}
        for name, keep in kept.items():
            if name not in self.spaces:
                raise PrunelabError(f"there is no space {name!r}: {nearest(name, self.spaces)}")
            space, keep = self.spaces[name], keep.bool().cpu()
            if keep.shape != (space.size,):
                raise PrunelabError(f"{name}: {space.size} groups, but kept has shape {tuple(keep.shape)}")
            if bool((~keep & space.fixed).any()):
                raise PrunelabError(f"{name}: groups that stay are to go: {space.pinned or 'see its fixed'}")
            for part in space.slices:
                if part.role == "in" or part.name not in self.names:
                    continue
                own = torch.where(part.group >= 0, keep[part.group.clamp(min=0)], True)
                shape = [1] * len(self.shapes[part.name])
                shape[part.dim] = -1
                mask = made.setdefault(part.name, torch.ones(self.shapes[part.name], dtype=torch.bool))
                mask &= own.view(shape)
        return Masks({self.names[name]: mask for name, mask in made.items()})


@dataclass
class Analysis:
    """What is kept of a model as long as its shapes stay.

    Attributes:
        seen: what one run showed.
        why: group -> why it stays whatever the weights are; groups of ``seen``.
        space: per group the number of its space, -1: it is made by no weight.
    """

    seen: Seen
    why: dict[int, str]
    space: Tensor
    groups: dict[Any, Groups] = field(default_factory=dict)

    def fixed(self, exact: bool) -> Tensor:
        """Bool [groups], those that stay whatever the weights are."""
        stays = torch.zeros(len(self.space), dtype=torch.bool)
        stays[torch.tensor(list(self.why), dtype=torch.long)] = True
        if exact:
            stays[torch.tensor(list(self.seen.soft), dtype=torch.long)] = True
        return stays


_KNOWN: WeakKeyDictionary[nn.Module, tuple[Any, Analysis]] = WeakKeyDictionary()


def analysis(model: nn.Module, example: Any) -> Analysis:
    """What one run of a model shows; run again only when a shape, or a module, of the model or the example changes."""
    model, _ = unwrapped(model)
    leaves, form = tree_flatten(example)
    of_model = (
        tuple((name, tuple(t.shape)) for name, t in named_tensors(model).items())
        if isinstance(model, nn.Module)
        else ()
    )
    modules = tuple(type(module) for module in model.modules()) if isinstance(model, nn.Module) else ()
    key = (
        of_model,
        modules,
        str(form),
        tuple((tuple(t.shape), t.dtype) if isinstance(t, Tensor) else repr(t) for t in leaves),
    )
    if isinstance(model, nn.Module) and model in _KNOWN and _KNOWN[model][0] == key:
        return _KNOWN[model][1]
    seen = watch(model, example)
    found = Analysis(seen, _stays(seen), _spaces(seen))
    _KNOWN[model] = key, found
    return found


def _stays(seen: Seen) -> dict[int, str]:
    """Group -> why it stays, whatever the weights are; what no output depends on is left alone, too."""
    why = dict(seen.pinned)
    fixed = torch.zeros(int(seen.root.max()) + 1, dtype=torch.bool)
    fixed[torch.tensor([*why, *seen.soft], dtype=torch.long)] = True
    shapes = {name: seen.shapes[number] for number, name in seen.names.items()}
    reads = Constants(seen, anything(shapes)).reads
    reached = live(seen, reads, fixed)
    while not bool(reached.all()):  # what leads nowhere stays where it ends; before that it may shrink
        ends = ~reached
        for read in reads:
            ends[seen.root[read.columns]] = False
        if not bool(ends.any()):
            ends = ~reached
        for group in ends.nonzero().flatten().tolist():
            why[group] = "no output of the model depends on it"
        reached = live(seen, reads, reached | ends)
    return why


def _components(size: int, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    pairs = list(pairs)
    a, b = (
        torch.cat([pair[i].flatten() for pair in pairs]) if pairs else torch.zeros(0, dtype=torch.long) for i in (0, 1)
    )
    graph = coo_matrix((np.ones(len(a), dtype=np.bool_), (a.numpy(), b.numpy())), shape=(size, size))
    return torch.from_numpy(connected_components(graph, directed=False)[1].astype(np.int64))


def _made(seen: Seen) -> list[tuple[str, int, Tensor]]:
    """The axes along which weights make channels, with their groups."""
    return [
        (name, dim, seen.root[numbers])
        for name, axes in seen.slots.items()
        for dim, numbers in axes.items()
        if 2 in seen.roles[numbers].numpy()
    ] + [
        (name, dim, seen.root[numbers].flatten())
        for name, (dim, numbers) in seen.columns.items()
        if 2 in seen.roles[numbers].numpy()
    ]


def _role(roles: Tensor) -> Role:
    found = set(roles.numpy().tobytes())
    return next((_ROLES[role] for role in (2, 1, 3) if role in found), "affine")


def _spaces(seen: Seen) -> Tensor:
    size = int(seen.root.max()) + 1
    made = [(name, dim, groups[groups != seen.root[FIXED]]) for name, dim, groups in _made(seen)]
    parts = _components(size, ((groups[:1].expand_as(groups), groups) for _, _, groups in made))
    space = torch.full((size,), -1, dtype=torch.long)
    for _, _, groups in made:
        space[groups] = parts[groups]
    return space


def channel_groups(
    model: nn.Module, example: Any, granularity: Granularity = "channel", *, exact: bool = True
) -> Groups:
    """The channels of a model that have to be decided together; found by running it once.

    Args:
        model: any module that runs; it is not changed. What was found is kept while its shapes stay.
        example: a batch of inputs: a tensor, a tuple of positional arguments or a dict of named ones.
        granularity: ``"channel"``: of attention heads, and of groups of a convolution, a group is the same place in
            each; ``"head"``: it is one whole head, or group. Everything else is the same for both.
        exact: whether channels over which statistics are taken (LayerNorm, GroupNorm) stay.

    Raises:
        StructureError: the model does not run on the example.
    """
    if granularity not in ("channel", "head"):
        raise PrunelabError(f"granularity = {granularity!r}: {nearest(granularity, ('channel', 'head'))}")
    found, (inner, prefix) = analysis(model, example), unwrapped(model)
    key = granularity, exact, prefix
    if key not in found.groups:
        found.groups[key] = _grouped(found, inner, prefix, granularity, exact)
    return found.groups[key]


def _grouped(found: Analysis, model: nn.Module, prefix: str, granularity: Granularity, exact: bool) -> Groups:
    seen, size = found.seen, len(found.space)
    slotted = torch.zeros(size, dtype=torch.bool)
    for axes in seen.slots.values():
        for numbers in axes.values():
            slotted[seen.root[numbers]] = True
    heads: set[int] = set()  # blocks whose rows stay though they have parameters of their own
    while True:
        pairs = [(cells[:1].expand_as(cells), cells) for cells in seen.products]
        for number, (rows, cells, fixed) in enumerate(seen.blocks):
            own = rows is not None and bool(slotted[rows].any()) and number not in heads
            if own or (granularity == "head" and not fixed and cells.shape[1] > 1):
                pairs.append((cells[:, :1].expand_as(cells), cells))
                if rows is not None:
                    pairs.append((rows, cells[:, 0]))
            else:
                pairs.append((cells[:1].expand_as(cells), cells))
        merged = _components(size, pairs)
        stuck = {
            number
            for number, (rows, cells, _) in enumerate(seen.blocks)
            if granularity == "channel" and rows is not None and min(cells.shape) > 1 and bool(slotted[rows].any())
            and len(merged[cells].unique()) == 1 < len(cells.unique())
        }  # fmt: skip
        if stuck <= heads:
            break
        heads |= stuck
    stays = torch.zeros(size, dtype=torch.bool)
    stays[merged[found.fixed(exact)]] = True
    why: dict[int, str] = {}
    for number in heads:
        rows = merged[seen.blocks[number].rows]
        stays[rows] = True
        why.update(dict.fromkeys(rows.tolist(), "what stays of each of them goes instead"))
    place = merged.tolist()
    for group, reason in itertools.chain(found.why.items(), seen.soft.items() if exact else ()):
        why.setdefault(place[group], reason)
    made = _made(seen)
    parts = _components(size, ((g[:1].expand_as(g), g) for g in (merged[g[g != seen.root[FIXED]]] for _, _, g in made)))
    owners: dict[int, str] = {}
    members: dict[int, list[Tensor]] = {}
    for name, _, groups in made:
        own = merged[groups[groups != seen.root[FIXED]]]
        if len(own):
            number = int(parts[own[0]])
            owners.setdefault(number, name)
            members.setdefault(number, []).append(own)
    place = torch.full((size,), -1, dtype=torch.long)
    of_space = torch.full((size,), -1, dtype=torch.long)
    for number, lists in members.items():
        groups = torch.cat(lists).unique()
        place[groups] = torch.arange(len(groups))
        of_space[groups] = number
    slices: dict[int, list[Slice]] = {number: [] for number in members}
    place_of, space_of = (numbers[merged[seen.root]] for numbers in (place, of_space))
    for name, axes in seen.slots.items():
        for dim, numbers in axes.items():
            if name in seen.columns and seen.columns[name][0] == dim:
                cells = merged[seen.root[seen.columns[name][1]]]
                same = (cells == cells[:1]).all(0)
                groups = torch.where(same, cells[0], seen.root[FIXED])
                own, spaces_of = place[groups], of_space[groups]
            else:
                own, spaces_of = place_of[numbers], space_of[numbers]
            role, first = _role(seen.roles[numbers]), int(spaces_of[0])
            if bool((spaces_of == first).all()):
                parts_of = {first: own}
            else:
                parts_of = {n: torch.where(spaces_of == n, own, -1) for n in spaces_of.unique().tolist()}
            for number, own in parts_of.items():
                if number >= 0:
                    slices[number].append(Slice(name, dim, own, role))
    spaces = {}
    for number, owner in owners.items():
        groups = torch.cat(members[number]).unique()
        reasons = [why[g] for g in groups[stays[groups]].tolist() if g in why]
        pinned = max(reasons, key=reasons.count) if reasons and bool(stays[groups].all()) else None
        name = owner.removesuffix(".weight")
        spaces[name if name not in spaces else owner] = Space(
            name, len(groups), tuple(slices[number]), pinned, stays[groups]
        )
    own = dict(model.named_parameters())
    aliases = {id(p): name for name, p in own.items()}
    names = {name: prefix + aliases[id(t)] for name, t in named_tensors(model).items() if id(t) in aliases}
    return Groups(spaces, names, {name: tuple(own[names[name].removeprefix(prefix)].shape) for name in names})
