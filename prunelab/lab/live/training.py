"""An epoch of fine-tuning in the background, by the package's own trainer, which can be watched and stopped."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from prunelab.data import Dataset, Split
from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.settings import Train
from prunelab.training.train import Member, Population, generator

REPORTS = 0.1  # seconds between two reports, at least


class _Stopped(Exception):  # noqa: N818 - it is no error
    """Somebody asked for it, or the kernel ends."""


class FineTuning(threading.Thread):
    """One epoch of a pruned network, whose pruned weights stay zero.

    It is no daemon, so Python waits for it, and it stops by itself in the next batch once the main thread has ended: it
    never outlives its kernel, and never computes while Python is being taken down.

    Args:
        model: The network; the thread owns it.
        masks: What stays zero.
        data: A data set; its training part is learnt.
        train: Settings of the training, of which the number of epochs is not read.
        seed: Of the batch order.
        report: Called in the thread with the batches done and all of them, ten times a second at most.
        done: Called in the thread at the end with the new weights, or None where it was stopped, and with the error
            that it met, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        data: Dataset,
        train: Train,
        seed: int,
        report: Callable[[int, int], None],
        done: Callable[[Mapping[str, Tensor] | None, Exception | None], None],
    ) -> None:
        super().__init__(name="prunelab fine-tuning", daemon=False)
        self._member = Member(model, train, masks, generator(seed, "order"), each_step=self._step)
        self._data, self._report, self._done = data, report, done
        self._batches = math.ceil(len(data.train) / train.batch_size)
        self._count, self._reported, self._stop_asked = 0, 0.0, threading.Event()

    def stop(self) -> None:
        """End it with the next batch; the network stays as it was before."""
        self._stop_asked.set()

    def run(self) -> None:
        """The thread's work; what goes wrong is handed on."""
        found, failure = None, None
        try:
            where = next(self._member.model.parameters()).device
            Population(_moved(self._data, where)).epoch([self._member])
            if self._member.failure:
                raise PrunelabError(f"fine-tuning: {self._member.failure}")
            found = {name: value.detach().clone() for name, value in self._member.model.state_dict().items()}
        except _Stopped:
            pass
        except Exception as error:  # noqa: BLE001 - it has to be seen where somebody looks, not in the thread
            failure = error
        if threading.main_thread().is_alive():
            self._done(found, failure)

    def _step(self) -> None:
        """Stop, or report, where it is time."""
        if self._stop_asked.is_set() or not threading.main_thread().is_alive():
            raise _Stopped
        self._count += 1
        if time.monotonic() - self._reported > REPORTS:
            self._reported = time.monotonic()
            self._report(self._count, self._batches)


def _moved(data: Dataset, where: torch.device) -> Dataset:
    """The data set on the network's device."""
    if data.train.y.device == where:
        return data
    return dataclasses.replace(data, train=Split(data.train.x.to(where), data.train.y.to(where)))
