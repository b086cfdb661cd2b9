"""The one kind of error that a user meets: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable
from numbers import Integral
from typing import Any


class PrunelabError(ValueError):
    """Bad input, a missing file or a machine that lacks something; the message is one line with the remedy in it."""


class PrunelabWarning(UserWarning):
    """Something that was asked for was done in part only, or not at all; one line."""


def checked_seed(seed: Any) -> int:
    """A seed that torch's generators, the tables and JSON take.

    Raises:
        PrunelabError: it is no whole number from 0 to 2**63 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise PrunelabError(f"seed = {seed!r}: should be a whole number, from 0 to 2**63 - 1")
    return int(seed)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" :.")


def as_output(error: BaseException, trace: list[str] | None = None) -> dict[str, Any]:
    """An error as an ``Output`` widget shows it, with its own trace, or the ``trace`` that it had elsewhere."""
    lines = trace or traceback.format_exception(error)
    return {"output_type": "error", "ename": type(error).__name__, "evalue": str(error), "traceback": lines}


def nearest(wrong: str, known: Iterable[str]) -> str:
    """A clause for an error message: the known name nearest to ``wrong``, or all known names when none is near.

    Args:
        wrong: The name as it was typed.
        known: The names that would have been understood.

    Returns:
        ``"did you mean 'mnist'?"`` or ``"known: a, b, c"``.
    """
    names = sorted(known)
    same = [name for name in names if _unpadded(name) == _unpadded(str(wrong))]
    matches = same or difflib.get_close_matches(str(wrong), names, n=1, cutoff=0.5)
    return f"did you mean {matches[0]!r}?" if matches else f"known: {', '.join(names) or 'none'}"


def _unpadded(name: str) -> str:
    """Without the zeros in front of numbers: figure_3 is figure_03."""
    return re.sub(r"(?<!\d)0+(?=\d)", "", name)
