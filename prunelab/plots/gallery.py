"""Pictures, their tidy numbers and their provenance: written together under ``out/``, read back from ``figures/``."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import io
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from prunelab import digest, paths
from prunelab.errors import PrunelabError, nearest
from prunelab.papers.library import PRESETS, Chosen

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_NAME = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)+")


class Facts(dict[str, Any]):
    """Provenance: a dictionary that a notebook shows as a small table in words, the less usual entries in a fold."""

    FIRST = ("data", "n", "preset", "overridden", "protocol", "hardware", "git_commit")
    NAMES: ClassVar = {"n": "runs of each point", "git_commit": "commit", "torch_version": "torch"}

    def _rows(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Name and words of the usual entries, and of the others; tables are counted, not printed."""

        def words(value: Any) -> str:
            if isinstance(value, Mapping):
                return ", ".join(f"{key} = {part}" for key, part in value.items())
            if hasattr(value, "columns"):
                return f"{len(value):,} row{'s' * (len(value) != 1)}"
            return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

        order = [key for key in self.FIRST if key in self]
        rest = [key for key in self if key not in order]
        named = [[(self.NAMES.get(k, k.replace("_", " ")), words(self[k])) for k in keys] for keys in (order, rest)]
        return named[0], named[1]

    def __repr__(self) -> str:
        first, rest = self._rows()
        return "\n".join(f"{name}: {value}" for name, value in (*first, *rest))

    def _repr_html_(self) -> str:
        def table(rows: list[tuple[str, str]]) -> str:
            cells = "<tr><th style='text-align:left'>{}</th><td style='text-align:left'>{}</td></tr>"
            return f"<table>{''.join(cells.format(*map(html.escape, row)) for row in rows)}</table>"

        first, rest = self._rows()
        return table(first) + (f"<details><summary>more</summary>{table(rest)}</details>" if rest else "")


def provenance(rounds: pd.DataFrame, preset: str | Chosen, **more: Any) -> dict[str, Any]:
    """Where the numbers of a table or picture come from, read from the rounds that they were computed from.

    Args:
        rounds: one row per (run, round), as the store gives it; columns that it lacks are left out.
        preset: ``"smoke"``, ``"quick"`` or ``"paper"``, or what ``papers.chosen`` gave, with what was overridden.
        more: further entries, for instance ``protocol``, ``network``, ``claims`` (of ``papers.verdicts``); they win;
            empty ones are left out.

    Returns:
        Plain values, those that are known: preset, overridden, n (seeds, in words), interval, data, hardware, runs,
        minutes (training and pruning of all runs), git_commit, torch_version, versions (of methods, models and readers
        of data: rows of kind, name, version).
    """
    preset, overridden = (preset.preset, preset.overridden) if isinstance(preset, Chosen) else (preset, {})
    if preset not in PRESETS:
        raise PrunelabError(f"preset = {preset!r}: {nearest(preset, PRESETS)}")

    def seen(column: str) -> list[Any]:
        return sorted(rounds[column].dropna().unique().tolist()) if column in rounds else []

    devices = [str(device) for device in seen("device")]
    threads = (
        [f"{int(count)} thread{'s' if count > 1 else ''}" for count in seen("threads")] if "cpu" in devices else []
    )
    used = {*seen("precision"), *seen("train.precision")}  # older rows have what was asked for alone
    reduced = sorted(str(name) for name in used - {"float32", "auto"})
    spent = [rounds[column].sum() for column in ("seconds", "prune_seconds") if column in rounds]
    if "seconds_spent" in rounds:  # less, where runs that begin alike were trained once for all of them
        spent[0] = rounds["seconds_spent"].fillna(rounds["seconds"]).sum()
    facts = {
        "preset": preset,
        "overridden": overridden,
        "n": _seeds(rounds) if seen("seed") else None,
        "interval": "mean ± 95 % t interval" if len(seen("seed")) > 1 else None,
        "data": _data(rounds),
        "hardware": ", ".join(devices + threads + reduced) or None,
        "runs": len(seen("id")) or None,
        "minutes": round(float(sum(spent)) / 60, 2) if spent else None,
        "git_commit": seen("git_commit"),
        "torch_version": seen("torch_version"),
        "versions": [
            {"kind": kind, "name": str(name), "version": int(version)}
            for kind, column in (("method", "method"), ("model", "model.name"), ("data", "data"))
            if {column, f"version.{kind}"} <= {*rounds}
            for name, version in sorted({*zip(rounds[column], rounds[f"version.{kind}"], strict=True)})
        ],
    }
    known = {key: value for key, value in facts.items() if value not in (None, [], {})}
    return Facts(known | {key: value for key, value in more.items() if not (isinstance(value, str) and not value)})


def _seeds(rounds: pd.DataFrame) -> str:
    """``3 seeds``, or ``2 to 6 seeds`` where the series have different ones."""
    each = rounds.groupby("strategy")["seed"].nunique() if "strategy" in rounds else [rounds["seed"].nunique()]
    low, high = min(each), max(each)
    return f"{low} seed{'s' if low > 1 else ''}" if low == high else f"{low} to {high} seeds"


def _data(rounds: pd.DataFrame) -> list[str]:
    """Each data set, as ``MNIST, 2,000 training and 2,000 test samples`` where not all of them were used."""
    source, data = rounds.get("source"), rounds.get("data")
    names = data if source is None else source if data is None else source.fillna(data)
    found = []
    for name, own in rounds.groupby(names) if names is not None else ():
        parts = []
        for part, setting in (("training", "data.train_size"), ("test", "data.test_size")):
            if setting in own and (sizes := own[setting]).notna().any():
                counts = [f"{int(size):,}" for size in sorted(sizes.dropna().unique())]
                parts.append(f"{' or '.join([*counts, *(['all'] if sizes.isna().any() else [])])} {part}")
        found.append(f"{name}, {' and '.join(parts)} samples" if parts else str(name))
    return found


class Saved(NamedTuple):
    """Where ``save`` put its files, in ``name`` relative to the folder of results."""

    name: str
    png: Path | None
    csv: Path
    json: Path
    note: str

    def __str__(self) -> str:
        return self.note


def save(
    picture: Figure | None,
    artefact: str,
    data: pd.DataFrame,
    provenance: Mapping[str, Any],
    *,
    runs: pd.DataFrame | None = None,
) -> Saved:
    """Write ``<out>/<artefact>.png``, ``.csv`` and ``.json``; nothing else in the project writes there.

    All three are finished under other names before the first is moved into place. Preset ``smoke`` writes under
    ``smoke/``, numbers with other parameters than their preset's under ``custom/``; ``quick`` never replaces an
    artefact of preset ``paper``, it goes to ``quick/`` then.

    Args:
        picture: what is shown; None for an artefact that is only a table.
        artefact: ``"dyprune/training"``.
        data: the tidy numbers of the picture; floats are written with six significant digits.
        provenance: at least ``preset``; ``overridden`` where parameters are not the preset's; ``alt`` where the picture
            has no alternative text of its own.
        runs: the rows of the store that ``data`` was computed from; they go to ``<artefact>_runs.csv``, a line for each
            run and round, without the settings, so that anybody can compute an interval again.

    Returns:
        The paths, and in ``note`` one sentence that says where and why.

    Raises:
        PrunelabError: a name that is no ``paper/artefact``, no preset, no alternative text, no rows, or a folder that
            cannot be written.
    """
    if not _NAME.fullmatch(artefact):
        raise PrunelabError(f"artefact {artefact!r}: should be paper/name in small letters, digits and underscores")
    preset = provenance.get("preset")
    if preset not in PRESETS:
        raise PrunelabError(f"{artefact}: provenance['preset'] = {preset!r}: should be one of {', '.join(PRESETS)}")
    alt = provenance.get("alt") or getattr(picture, "alt", "")
    if picture is not None and not alt:
        raise PrunelabError(f"{artefact}: no alternative text; say in provenance['alt'] what the picture shows")
    if data.empty:
        raise PrunelabError(f"{artefact}: the table of its numbers has no rows")
    name = place(artefact, preset, provenance.get("overridden") or {})
    base = paths.out() / name
    files = {".csv": _csv(data)}
    if picture is not None:
        files[".png"] = _png(picture)
    if runs is not None:
        files["_runs.csv"] = _csv(runs[[name for name in runs if "." not in name]])
    facts = {
        **provenance,
        "artefact": artefact,
        "alt": alt or f"table with {len(data)} rows",
        "files": {ending: digest.of(content) for ending, content in files.items()},
        digest.THIS: digest.BLANK,
    }
    text = json.dumps(plain(facts), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    files[".json"] = digest.sealed(text.encode())
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as all_or_none:
            for ending, content in reversed(files.items()):  # the one that holds the digests is moved last
                part = all_or_none.enter_context(paths.replacing(base.with_name(base.name + ending)))
                part.write_bytes(content)
    except OSError as error:
        what = f"{base}.*: cannot be written ({error.strerror})"
        raise PrunelabError(f"{what}: set PRUNELAB_OUT to a folder that can") from None
    png = base.with_name(base.name + ".png") if picture is not None else None
    return Saved(
        name,
        png,
        base.with_name(base.name + ".csv"),
        base.with_name(base.name + ".json"),
        f"saved as {base}{_WHY.get(name.partition('/')[0], '')}",
    )


def as_json(facts: Mapping[str, Any]) -> bytes:
    """The provenance as it lies beside a figure."""
    return (json.dumps(plain(facts), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _csv(data: pd.DataFrame) -> bytes:
    return data.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()


def saved(artefact: str, folder: Path | None = None) -> dict[str, Any] | None:
    """The provenance of a saved artefact; None where it was never saved.

    Args:
        artefact: its name, with that of its place before it as ``place`` gives it.
        folder: where it lies; None: the committed figures.

    Raises:
        PrunelabError: the file is there and is not what ``save`` writes, or cannot be read.
    """
    path = (folder or paths.figures()) / f"{artefact}.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PrunelabError(f"{path}: cannot be read ({error.strerror}): set PRUNELAB_FIGURES to a folder") from None
    try:
        sealed, facts = digest.check(data), json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PrunelabError(f"{path}: damaged, or no JSON ({error}); delete it and make the artefact again") from None
    if isinstance(facts, dict) and "files" in facts and not sealed:
        raise PrunelabError(f"{path}: damaged (its digest is gone); delete it and make the artefact again")
    if not isinstance(facts, dict) or facts.get("preset") not in PRESETS:
        raise PrunelabError(f"{path}: names no preset; delete it and make the artefact again")
    return facts


def damage(artefact: str) -> str:
    """What of the files beside a saved artefact is gone or is not what was written, in words; empty if nothing is.

    Of artefacts from before there were digests it is only seen whether they are there.
    """
    base, facts = paths.figures() / artefact, saved(artefact) or {}
    for ending, sha256 in {".png": "", ".csv": "", **facts.get("files", {})}.items():
        file = base.with_name(base.name + ending)
        if not file.is_file():
            return f"figures/{artefact}{ending} is missing"
        if sha256 and digest.of(file) != sha256:
            return f"figures/{artefact}{ending} is not what was saved with it"
    return ""


def place(artefact: str, preset: str, overridden: Mapping[str, Any]) -> str:
    """Where the numbers of an artefact go, relative to the folder of results."""
    if preset == "smoke":
        return f"smoke/{artefact}"
    if overridden:
        return f"custom/{artefact}"
    before = saved(artefact, paths.out()) if preset == "quick" else None
    return f"quick/{artefact}" if before and before["preset"] == "paper" else artefact


_WHY = {
    "smoke": ": preset smoke shows that it runs, its numbers mean nothing",
    "custom": ": with other parameters than the preset's it stands for itself",
    "quick": ": the numbers of preset paper stay where they are",
}


def _png(figure: Figure) -> bytes:
    """The bytes of a ``Picture``, or of a figure that the user drew without the package."""
    if hasattr(figure, "png"):
        return figure.png()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: arrays, dataclasses and tables become plain, what is not finite becomes null.

    Floats keep ten digits: the last bits of a mean differ from machine to machine.
    """
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        return plain(value.to_dict(orient="records"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set):
        return [plain(entry) for entry in (sorted(value) if isinstance(value, set) else value)]
    if isinstance(value, float):
        return float(f"{value:.10g}") if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool) or value is None else str(value)
