"""Channels that have to be decided together, with every slice of every parameter that belongs to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from prunelab.masks import Masks

Role = Literal["in", "out", "bias", "affine"]


@dataclass(frozen=True)
class Slice:
    """One axis of a parameter or buffer that a space runs along."""

    name: str
    dim: int
    group: Tensor
    role: Role


@dataclass(frozen=True)
class Space:
    """Channels that are decided together."""

    name: str
    size: int
    slices: tuple[Slice, ...]
    pinned: str | None
    fixed: Tensor


@dataclass(frozen=True)
class Groups(Mapping[str, Space]):
    """A mapping from the name of each space to it."""

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
        """Masks of everything that makes the dropped groups."""
        made: dict[str, Tensor] = {}
        for name, keep in kept.items():
            for part in self.spaces[name].slices:
                if part.role == "in" or part.name not in self.names:
                    continue
                own = torch.where(part.group >= 0, keep.cpu()[part.group.clamp(min=0)], True)
                shape = [1] * len(self.shapes[part.name])
                shape[part.dim] = -1
                mask = made.setdefault(part.name, torch.ones(self.shapes[part.name], dtype=torch.bool))
                mask &= own.view(shape)
        return Masks({self.names[name]: mask for name, mask in made.items()})
