"""The sample on which ``live`` measures accuracy: drawn once, measured part by part, so that nobody has to wait."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prunelab.data import Dataset
from prunelab.errors import PrunelabError

BATCH = 500  # samples at a time; more fall out of the processor's cache
WORK = 10**10  # multiply-accumulates at a time and thread: about a fifth of a second
WHOLE = 25 * 10**9  # a sample of no more than these, likewise, is measured in one go, which is faster than in parts


class Sample:
    """Some of the test part, or of the inputs that were given; a random choice, since classes may lie in blocks.

    Args:
        data: A data set, or inputs and labels.
        count: How many; all where there are fewer.
        device: Where they are put.

    Attributes:
        x: Inputs as the model takes them.
        y: Labels, int64.
        what: What they are called, such as ``"2,000 test images"``.
    """

    def __init__(self, data: Dataset | tuple[Tensor, Tensor], count: int, device: torch.device) -> None:
        x, y = (data.test.x, data.test.y) if isinstance(data, Dataset) else data
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise PrunelabError(f"evaluate = {count!r}: should be a number of samples, at least 1")
        if len(x) != len(y) or not len(y):
            raise PrunelabError(f"data has {len(x)} inputs and {len(y)} labels: give as many, and at least one")
        rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:count].to(y.device)
        x = data.scale(x[rows]) if isinstance(data, Dataset) else x[rows]
        # Convolutions are twice as fast with images in this order of memory.
        self.x = x.to(device, memory_format=torch.channels_last) if x.ndim == 4 else x.to(device)
        self.y = y[rows].to(device)
        self.kind = f"{'test ' * isinstance(data, Dataset)}{'images' if x.ndim == 4 else 'samples'}"
        self.what = f"{len(rows):,} {self.kind}"
        self._batch, self._masked = BATCH, dict[str, Tensor]()

    def __len__(self) -> int:
        return len(self.y)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self.x.shape[1:])

    def suit(self, macs: int) -> None:
        """Take fewer at a time where all together cost so many multiply-accumulates that one would have to wait."""
        threads = torch.get_num_threads()
        if macs * len(self) > WHOLE * threads:
            self._batch = max(16, min(BATCH, WORK * threads // macs))

    def answers(self, model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[tuple[int, int]]:
        """Right answers and samples seen so far, after each part; the first part alone is a random choice too.

        Args:
            model: In evaluation mode; it is not changed.
            masks: What is left of its weights.
        """
        with torch.inference_mode():
            # Into the same memory again and again: that of a large network is not had for nothing.
            weights = {
                name: torch.mul(model.get_parameter(name), mask, out=self._masked.get(name))
                for name, mask in masks.items()
            }
        self._masked |= weights
        right = seen = 0
        for x, y in zip(self.x.split(self._batch), self.y.split(self._batch), strict=True):
            with torch.inference_mode():
                right += int((functional_call(model, weights, (x,)).argmax(-1) == y).sum())
            seen += len(y)
            yield right, seen
