"""What a fair comparison has, after Blalock et al. (MLSys 2020), ticked by looking at the rounds, not by saying so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunelab.plots.tables import Table
from prunelab.runs.columns import need

if TYPE_CHECKING:
    import pandas as pd

ASKED = (2, 4, 8, 16, 32)  # compressions, Blalock et al., section 6
NEAR = 1.15  # a point at 15 % more or less counts as being at a compression: our own default


def checklist(rounds: pd.DataFrame, by: str = "strategy") -> Table:
    """The checklist of Blalock et al., "What is the State of Neural Network Pruning?", section 6 and appendix B.

    Args:
        rounds: one row per run and round of everything that is compared: id, seed, data, model, method, round,
            compression_ratio, test_accuracy, effective_macs, epoch; ``by``.
        by: column that names what is compared.

    Returns:
        One row per point: kept or not, the point, and what was found.

    Raises:
        PrunelabError: a column that is missing.
    """
    import pandas as pd

    wanted = ["id", "seed", "data", "model", "method", "round", "compression_ratio", "test_accuracy", "effective_macs"]
    need(rounds, [*wanted, "epoch", by], "checklist")
    pruned = rounds[rounds["round"] > 0]
    whole = rounds[rounds["round"] == 0]
    pairs = rounds[["data", "model"]].drop_duplicates()
    seeds = int(pruned.groupby(by)["seed"].nunique().min()) if len(pruned) else 0
    means = pruned.groupby([by, "model", "round"])["compression_ratio"].mean()
    reached = means.groupby(level=0).apply(lambda c: sum(((c / a).between(1 / NEAR, NEAR)).any() for a in ASKED))
    fewest = int(reached.min()) if len(reached) else 0
    anew = pruned[by].astype(str).str.endswith("new weights")  # a control that trains anew for the whole budget
    budgets = pruned[~anew].groupby(["id", "round"])["epoch"].max().groupby(level="round").nunique()
    names = {str(name).rpartition(": ")[2].split(",")[0] for name in rounds[by].unique()}
    foreign = [str(name) for name in rounds[by].unique() if "layers as" in str(name)]
    both = len(pruned) > 0 and pruned[["compression_ratio", "effective_macs"]].notna().all(axis=None)
    raw = rounds["test_accuracy"].notna().all() and not rounds.duplicated([by, "id", "round"]).any()
    dense = whole.groupby(["data", "model", "seed"])["test_accuracy"].nunique()
    baseline, budget = (len(counts) > 0 and bool((counts == 1).all()) for counts in (dense, budgets))
    rows = [
        (len(pairs) >= 3, "three or more pairs of data and architecture", f"{len(pairs)}: {_pairs(pairs)}"),
        (fewest >= 5, "compressions 2, 4, 8, 16, 32", f"the least of a method: {fewest} of 5 (within 15 %)"),
        (bool(both), "compression and multiply-accumulates of every network", "weights kept and effective MACs"),
        (seeds >= 3, "several seeds with their spread", f"{seeds} seeds; mean, 95 % t interval and every run"),
        (baseline, "one dense baseline for all", "same seed, same network before the first pruning"),
        (budget, "one training budget for all", "epochs up to each round, recovery included"),
        ({"random", "magnitude"} <= names or {"random units", "L1 units"} <= names or {"random", "L1"} <= names,
         "random and magnitude pruning beside them", "global"),
        (bool(foreign), "both with the layer proportions of the method", f"{len(foreign)} such controls"),
        (any("new weights" in str(name) for name in rounds[by].unique()), "the masks on new weights", "and shuffled"),
        (bool(raw), "raw accuracies", "one row per run and round beside the picture"),
    ]  # fmt: skip
    numbers = pd.DataFrame(rows, columns=["kept", "point", "found"])
    shown = numbers.assign(kept=["✓" if kept else "✗" for kept in numbers["kept"]]).rename(columns={"kept": ""})
    return Table(shown, numbers, "After Blalock et al. (2020); a cross says what this comparison does not have")


def _pairs(pairs: pd.DataFrame) -> str:
    return ", ".join(f"{row.model} on {row.data}" for row in pairs.itertuples())
