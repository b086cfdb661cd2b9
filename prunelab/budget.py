"""How long a study may train: ``"90s"``, ``"10m"``, ``"2h"``, or seconds; then it stops, and goes on another time."""

from __future__ import annotations

import math
import os
import re
import time

from prunelab.errors import PrunelabError

VARIABLE = "PRUNELAB_UNTIL"  # the end in seconds since 1970, for the notebooks that a command runs
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
USED = "the time is used"


class OutOfTime(PrunelabError):  # noqa: N818 - nothing went wrong
    """Runs are left that another call goes on with."""


def seconds(budget: float | str) -> float:
    """A length of time in seconds.

    Raises:
        PrunelabError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", str(budget).strip())
    value = float(found[1]) * _UNITS[found[2]] if found and not isinstance(budget, bool) else math.nan
    if not 0 < value < math.inf:
        raise PrunelabError(f"budget = {budget!r}: should be a length of time like 90s, 10m or 2h")
    return value


def until(budget: float | str | None) -> float | None:
    """When training stops, in seconds since 1970: after ``budget``, or as ``PRUNELAB_UNTIL`` says; None: never."""
    if budget is not None:
        return time.time() + seconds(budget)
    given = os.environ.get(VARIABLE)
    return None if not given else float(given)


def over(end: float | None) -> bool:
    """Whether the time is used."""
    return end is not None and time.time() >= end
