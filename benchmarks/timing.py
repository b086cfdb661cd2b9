"""Timings that can be compared: rivals take turns, so that a busy machine slows them all.

Reported are medians, and the median of the ratios within each turn.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_KINDS = {
    # Those that work in place take the step of plain SGD with them.
    "matrix products": {f"aten::{name}" for name in ("mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_")},
    "batches": {"aten::index_select", "aten::index", "aten::div_", "aten::sub_"},
    "optimiser": {"aten::_fused_sgd_", "aten::_fused_adamw_", "aten::_fused_adam_"},
    "masks": {"aten::_foreach_mul_", "aten::mul_"},
    "gradients into their buffers": {"aten::add_", "aten::_foreach_zero_", "aten::zero_"},
}


def compare(
    rivals: Mapping[str, Callable[..., Any]],
    repeats: int,
    setup: Callable[[], Any] | None = None,
    settle: Callable[[], None] = lambda: None,
    turns: dict[str, list[float]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Time each rival ``repeats`` times, in turns, after one turn that does not count.

    Args:
        rivals: Name -> what is timed; the first one is what the others are compared with.
        repeats: Turns that count.
        setup: Called before each call, untimed; its result is the rival's argument.
        settle: Called within the time, at its end (``torch.cuda.synchronize`` on a GPU).
        turns: Filled with the seconds of every turn that counts, by name.

    Returns:
        Name -> ``median``, ``lowest``, ``highest`` (seconds), ``ratio`` (median over the turns of first / this: above 1
        is faster than the first), ``repeats``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    names = list(rivals)
    for turn in range(repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always comes after the same one
            rival = rivals[name]
            arguments = () if setup is None else (setup(),)
            start = time.perf_counter()
            rival(*arguments)
            settle()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    if turns is not None:
        turns.update(seconds)
    first = next(iter(seconds.values()))
    return {
        name: {
            "median": statistics.median(own),
            "lowest": min(own),
            "highest": max(own),
            "ratio": statistics.median(a / b for a, b in zip(first, own, strict=True)),
            "repeats": repeats,
        }
        for name, own in seconds.items()
    }


def claim(
    text: str,
    value: float,
    unit: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    spread: tuple[float, float] | None = None,
    quickest: float | None = None,
) -> dict[str, Any]:
    """What a benchmark says in one number, with the goal that was set for it, for the table in ``README.md``.

    Args:
        text: What is compared with what.
        value: The measured number.
        unit: ``"x"`` (times as fast), ``"%"`` or ``"ms"``.
        at_least: The goal, from below; None: see ``at_most``.
        at_most: The goal, from above; None: see ``at_least``.
        spread: The lower and the upper quartile of the turns, where the noise is as large as the number: a goal that
            lies between them is neither met nor missed.
        quickest: The same number from the quickest turn of each, which others on the machine disturbed least.

    Returns:
        Text, value, unit, goal in words, and met: None where it is not decided.
    """
    if at_least is not None:
        goal, inside = f"at least {at_least:g}", [number >= at_least for number in spread or (value,)]
    else:
        goal, inside = f"at most {at_most:g}", [number <= at_most for number in spread or (value,)]
    met = inside[0] if len(set(inside)) == 1 else None
    found = {"text": text, "value": round(value, 2), "unit": unit, "goal": goal, "met": met}
    found |= {"spread": list(spread)} if spread else {}
    return found | ({} if quickest is None else {"quickest": round(quickest, 2)})


def options(doc: str, **defaults: float) -> argparse.Namespace:
    """What the command line asks for; ``--threads`` (2) is one of the options, and torch is told at once.

    Args:
        doc: of the script; its first line describes it.
        defaults: option -> its value where nothing else is asked for, which also says its type.
    """
    import torch

    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name, value in {**defaults, "threads": 2}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    return found


def faster(text: str, results: Mapping[str, Mapping[str, Any]], rival: str, at_least: float) -> dict[str, Any]:
    """The claim that ``rival`` is so many times as fast as the first."""
    return claim(text, results[rival]["ratio"], "x", at_least=at_least, quickest=quickest(results, rival))


def quickest(results: Mapping[str, Mapping[str, Any]], rival: str, against: str | None = None) -> float:
    """How many times as fast ``rival`` is as ``against`` (None: the first), in the quickest turn of each."""
    return results[against or next(iter(results))]["lowest"] / results[rival]["lowest"]


def shares(work: Callable[[], Any]) -> dict[str, float]:
    """What one call spends its operator time on, in per cent by kind of operator: self time of torch's profiler.

    The profiler adds a little to every operator, so small ones look larger than they are.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    spent = dict.fromkeys([*_KINDS, "other operators"], 0.0)
    for event in profiled.key_averages():
        kind = next((kind for kind, names in _KINDS.items() if event.key in names), "other operators")
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: round(100 * value / total, 1) for kind, value in spent.items()}


def machine() -> dict[str, Any]:
    """What the numbers hold for: processor, cores, threads, versions, load; no names of hosts."""
    import numpy
    import torch

    found = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as lines for the screen."""
    width = max(map(len, results))
    lines = [f"{'':{width}}  {'median':>10}  {'lowest':>10}  {'highest':>10}  {'ratio':>7}"]
    for name, row in results.items():
        times = "  ".join(f"{row[key] * 1e3:7.1f} ms" for key in ("median", "lowest", "highest"))
        lines.append(f"{name:{width}}  {times}  {row['ratio']:6.1f}x")
    return "\n".join(lines)


def write(name: str, values: Mapping[str, Any]) -> Path:
    """Write ``results/<name>.json``, with the machine; the old file stays until the new one is whole."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    part = path.with_suffix(".json.part")
    part.write_text(
        json.dumps({"date": _today(), "machine": machine(), **values}, indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    part.replace(path)
    return path


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor() or "unknown",
    )
