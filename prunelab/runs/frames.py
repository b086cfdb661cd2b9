"""The columns of the result tables: their order, their types, and how rows of many runs become one DataFrame.

A column has the same type whatever runs are asked for, so that a plot written for one study works for the next: what
every row has is int64; every measurement is float64, counts too, NaN where a run lacks it; text is pandas' own text
type; and the switches among the options are pandas' ``boolean``, which knows "missing".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from prunelab.errors import PrunelabError, first_line, nearest
from prunelab.settings import Run, Train

Kind = Literal["int", "float", "text", "bool", "switch", "mixed"]
Row = Mapping[str, Any]

TEXT = pd.Series(["text"]).dtype  # object before pandas 3, str from then on
ARROW = {"int": pa.int64(), "float": pa.float64(), "text": pa.string(), "bool": pa.bool_()}
DTYPES = {"int": "int64", "float": "float64", "text": TEXT, "bool": "bool", "switch": "boolean", "mixed": object}
_HOLDS = {
    "int": ("whole numbers", (int,)),
    "float": ("numbers", (int, float)),
    "text": ("text", (str,)),
    "bool": ("true or false", (bool,)),
}


def plain(value: Any, where: str) -> Any:
    """``value`` as it will be read back from JSON: numpy scalars as Python's, tuples as lists.

    Raises:
        PrunelabError: a key that is not text, or a value that JSON does not know; ``where`` names the place.
    """
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(entry, where) for entry in value]
    if isinstance(value, Mapping):
        # JSON would turn the key 3 into "3" without a word, and a resumed run would not find it.
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise PrunelabError(
                f"{where}: the key {wrong[0]!r} is not text and would change in JSON: use {str(wrong[0])!r}"
            )
        return {key: plain(entry, f"{where}.{key}") for key, entry in value.items()}
    raise PrunelabError(
        f"{where}: JSON cannot keep {type(value).__name__}: give numbers, text, lists or mappings of these"
    )


def _columns(text: str, **others: Kind) -> dict[str, Kind]:
    """Column names in their order; those that are not among ``others`` are measurements."""
    return {name: others.get(name, "float") for name in text.split()}


ROUNDS = _columns(
    """round requested_sparsity sparsity compression_ratio density weights weights_total parameters
    units units_by_layer units_total train_accuracy train_loss validation_accuracy validation_loss
    test_accuracy test_loss test_f1_macro pruned_test_accuracy epochs epoch seconds seconds_spent prune_seconds
    macs effective_macs rate note precision device threads git_commit torch_version finished""",
    round="int",
    **dict.fromkeys(
        ["units_by_layer", "note", "precision", "device", "git_commit", "torch_version", "finished"], "text"
    ),
)
EPOCHS = _columns(
    """round epoch train_loss train_accuracy validation_loss validation_accuracy test_loss test_accuracy
    seconds weights units pruned rate trigger""",
    round="int",
    epoch="int",
    pruned="bool",
)
TABLES = {"rounds": ROUNDS, "epochs": EPOCHS}


def table(rows: Sequence[Row], columns: Mapping[str, Kind]) -> pa.Table:
    """Rows as they are written to parquet: known columns in their own type, the others in the type of their values.

    Lists and mappings become JSON text. Columns that identify a run are left out: its settings say them.

    Raises:
        PrunelabError: a value of another type than its column, or a row without its number.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    own = {"id", "status", *Run().flat()} - set(columns)
    arrays = {}
    for name in [*columns, *(name for name in names if name not in columns and name not in own)]:
        if name not in names and columns[name] != "int":
            continue
        values = [plain(row.get(name), f"column {name!r}") for row in rows]
        values = [json.dumps(value) if isinstance(value, list | dict) else value for value in values]
        if columns.get(name) == "int" and None in values:
            raise PrunelabError(f"a row of results has no {name!r}: every row needs {', '.join(_always(columns))}")
        try:
            arrays[name] = pa.array(values, type=ARROW[columns[name]] if name in columns else None)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            should, types = _HOLDS.get(columns.get(name, ""), ("values of one type", ()))
            wrong = next((v for v in values if v is not None and type(v) not in types), values[-1])
            raise PrunelabError(f"column {name!r} of the results holds {wrong!r}: it should hold {should}") from None
    return pa.table(arrays)


def checked(rows: pa.Table, columns: Mapping[str, Kind]) -> pa.Table:
    """Rows as ``table`` makes them.

    Raises:
        ValueError: they lack their numbers, or a column is of another type: it is another table.
    """
    kinds = {field.name: field.type for field in rows.schema}
    for name, kind in columns.items():
        needed = kind == "int"
        if kinds.get(name, None if needed else ARROW[kind]) != ARROW[kind] or (needed and rows.column(name).null_count):
            raise ValueError(f"column {name!r} is missing or of another type: is it another table?")
    return rows


def _always(columns: Mapping[str, Kind]) -> list[str]:
    return [name for name, kind in columns.items() if kind == "int"]


def merge(runs: pd.DataFrame, tables: Sequence[pa.Table], columns: Mapping[str, Kind]) -> pd.DataFrame:
    """One row per row of ``tables``, with the columns of its run in front.

    Args:
        runs: One row per run, from ``settings_frame``.
        tables: The rows of each run, in the same order.
        columns: ``ROUNDS`` or ``EPOCHS``.

    Raises:
        PrunelabError: a column that holds text in one run and numbers in another.
    """
    empty = pa.table({name: pa.array([], type=ARROW[kind]) for name, kind in columns.items()})
    try:
        rows = pa.concat_tables([empty, *tables], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        why = first_line(error)
        raise PrunelabError(f"the runs disagree about the type of a column ({why}): ask for them apart") from None
    series = {}
    for name in [*columns, *sorted(set(rows.column_names) - set(columns))]:
        kind = columns.get(name) or _arrow_kind(rows.schema.field(name).type)
        series[name] = _series(rows.column(name), kind)
    where = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    settings = runs.take(where).reset_index(drop=True)
    return pd.concat([settings, pd.DataFrame(series)], axis=1)


def _arrow_kind(kind: pa.DataType) -> Kind:
    if pa.types.is_boolean(kind):
        return "switch"
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else "float"


def _series(column: pa.ChunkedArray, kind: Kind) -> pd.Series:
    if kind == "float":
        column = column.cast(pa.float64(), safe=False)
    elif kind == "text":
        column = column.cast(pa.string())
    elif kind == "bool":
        column = column.fill_null(False)
    return column.to_pandas().astype(DTYPES[kind])


def settings_frame(runs: Sequence[tuple[str, str, Run, Mapping[str, int]]]) -> pd.DataFrame:
    """One row per run: id, status, then every setting, in an order that depends on no run.

    Args:
        runs: id, status, settings, and the versions that they were made by, which become ``version.method``,
            ``version.model`` and ``version.data``; 1 where nothing is stored.
    """
    made = {f"version.{name}": 1 for name in ("method", "model", "data")}
    flat = [
        {"id": run_id, "status": status, **run.flat(), **made, **{f"version.{n}": v for n, v in versions.items()}}
        for run_id, status, run, versions in runs
    ]
    usual = {"id": "", "status": "", **Run().flat(), **made}
    names = set(usual).union(*flat) if flat else set(usual)
    lead = ["id", "status", "seed", "data", "model", "method"]
    known = {**usual, **Run(retrain=Train()).flat()}
    order = [*(name for name in known if name in names), *sorted(names - set(known))]
    parts = dict.fromkeys(["prune", "train", "data", "model", *(name.split(".")[0] for name in order if "." in name)])
    columns = lead + [name for part in parts for name in order if name.startswith(f"{part}.")]
    return pd.DataFrame(
        {name: _typed([row.get(name) for row in flat], usual.get(name), name in usual) for name in columns}
    )


def _typed(values: list[Any], example: Any, always: bool) -> pd.Series:
    """A column of settings; one that every run has takes its type from the default, where None stands for a number."""
    if always and example is None and not any(isinstance(value, str) for value in values):
        kind: Kind = "float"
    elif always:
        kind = {bool: "bool", int: "int", float: "float"}.get(type(example), "text")  # type: ignore[assignment]
    else:
        kind = _kind({type(value) for value in values if value is not None})
    return pd.Series([np.nan if value is None and kind == "float" else value for value in values], dtype=DTYPES[kind])


def _kind(types: set[type]) -> Kind:
    if types <= {bool} and types:
        return "switch"
    if types <= {str} and types:
        return "text"
    return "float" if types <= {int, float} else "mixed"


def select(frame: pd.DataFrame, filters: Mapping[str, Any]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rows that equal every filter, and the filters whose column ``frame`` does not have.

    A list, tuple or set keeps the rows that equal one of its members; None keeps the rows without a value.
    """
    keep = np.ones(len(frame), dtype=bool)
    for name in filters.keys() & set(frame.columns):
        column, value = frame[name], filters[name]
        if value is None:
            matches = column.isna()
        else:
            matches = column.isin(list(value)) if isinstance(value, list | tuple | set | frozenset) else column == value
        keep &= matches.fillna(False).to_numpy(dtype=bool)
    return frame[keep], {name: value for name, value in filters.items() if name not in frame}


def refuse_unknown(filters: Mapping[str, Any], frame: pd.DataFrame) -> None:
    """Raise the one-line error for the first filter that names no column."""
    for name in filters:
        raise PrunelabError(f"results have no column {name!r}: {nearest(name, frame.columns)}")
