"""A training step on a GPU as a CUDA graph: what it launches is recorded once and replayed with new numbers.

The kernels of a small network take less time than it takes to launch them. A replay launches the whole step at once.
The recorded step reads and writes the same memory each time, so its inputs are copied to where the first ones lay; the
first steps run as they are, on a stream of their own, as torch's notes on CUDA graphs have it. Nothing is executed
while it is recorded, so no step is done twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Step = Callable[..., Tensor]
WARM_UP = 3  # steps before the recording; the number of torch's own examples


class Graph(Protocol):
    """What records a step."""

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        """Do a step as it is, in the surroundings of the recording."""

    def record(self, step: Callable[[], Tensor]) -> Tensor:
        """Record a step without doing it; returns where its result will stand."""

    def replay(self) -> None:
        """Do the recorded step."""


class CudaGraph:
    """``torch.cuda.CUDAGraph``, with the stream on which the first steps run."""

    def __init__(self, where: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._side = torch.cuda.Stream(where)

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        """Do a step as it is, on the side stream."""
        own = torch.cuda.current_stream(self._side.device)
        self._side.wait_stream(own)
        with torch.cuda.stream(self._side):
            result = step()
        own.wait_stream(self._side)
        return result

    def record(self, step: Callable[[], Tensor]) -> Tensor:
        """Record a step without doing it."""
        with torch.cuda.graph(self._graph, stream=self._side):
            return step()

    def replay(self) -> None:
        """Do the recorded step."""
        self._graph.replay()


def repeated(step: Step, where: torch.device) -> Step:
    """A step that is called again and again; on a GPU it is recorded and replayed.

    Args:
        step: takes tensors on ``where``; keeps what it changes in place; its result is overwritten by the next call.
        where: a CPU has nothing to gain, the step is returned as it is.
    """
    return Repeated(step, CudaGraph(where)) if where.type == "cuda" else step


class Repeated:
    """A step, and the graph that takes its place after ``WARM_UP`` calls with inputs of the same shapes.

    Calls with other shapes, as with the last batch of an epoch, run as they are. So do all where the step does what
    no recording can follow, like reading a number back from the GPU; that is logged once.
    """

    def __init__(self, step: Step, graph: Graph) -> None:
        self._step = step
        self._graph: Graph | None = graph
        self._calls = 0
        self._inputs: tuple[Tensor, ...] = ()
        self._result: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Do the step."""
        if self._graph is None:
            return self._step(*inputs)
        if not self._inputs:
            self._inputs = tuple(x.clone() for x in inputs)
        if any(x.shape != own.shape for x, own in zip(inputs, self._inputs, strict=True)):
            return self._step(*inputs)
        for own, x in zip(self._inputs, inputs, strict=True):
            own.copy_(x)
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._graph.warm_up(self._again)
        if self._result is None:
            try:
                self._result = self._graph.record(self._again)
            except RuntimeError as error:
                log.warning("the step runs without a CUDA graph: %s", str(error).partition("\n")[0])
                self._graph = None
                return self._step(*inputs)
        self._graph.replay()
        return self._result

    def _again(self) -> Tensor:
        return self._step(*self._inputs)
