"""The campaign's table: every part says how often it was tried, what survived, and what was lost."""

import collections

import pytest

_ROWS = collections.defaultdict(collections.Counter)


class Tally:
    """Counts of one row of the table."""

    def __init__(self, name):
        self._row = _ROWS[name]

    def add(self, outcome, trials=1):
        """One of: survived (nothing was lost, or the damage was named), lost."""
        self._row["tried"] += trials
        self._row[outcome] += trials

    def judge(self, said, trials=1, **held):
        """Count trials that survived if all that should hold does, and fail otherwise."""
        broken = [name for name, holds in held.items() if not holds]
        self.add("lost" if broken else "survived", trials)
        assert not broken, f"not {', '.join(broken)}: {said}"


@pytest.fixture
def tally():
    return Tally


def pytest_terminal_summary(terminalreporter):
    if _ROWS:
        wide = max(map(len, _ROWS))
        terminalreporter.write_line(f"\n{'':{wide}s}  tried  survived  lost")
        for name, row in _ROWS.items():
            terminalreporter.write_line(f"{name:{wide}s}  {row['tried']:5d}  {row['survived']:8d}  {row['lost']:4d}")
