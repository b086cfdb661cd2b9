"""Gates: a factor for each channel where there is no weight that a mask could act on, as in an identity shortcut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """Lets channels through, or not; all are open until a mask closes some.

    The factors are a buffer and no parameter: they are not learnt, and are not among the parameters that are counted.

    Args:
        channels: of what goes through.

    Attributes:
        open: float [channels], 1 = lets through, 0 = closed.
    """

    open: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("open", torch.ones(channels))

    @property
    def channels(self) -> int:
        """How many there are."""
        return len(self.open)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> the same shape."""
        # On the CPU a look is cheaper than the product; on other devices, and for compilers, it is not.
        looked_at = self.open.is_cpu and not torch.compiler.is_compiling()
        if looked_at and bool(self.open.all()):
            return x
        return x * self.open.to(x.dtype).view(-1, 1, 1)

    def extra_repr(self) -> str:
        """For printing."""
        return str(self.channels)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}open", torch.ones_like(self.open))  # from before there were gates: all open
        super()._load_from_state_dict(state_dict, prefix, *rest)
