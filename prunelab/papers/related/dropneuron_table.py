"""DropNeuron's runs beside what its published code reports: weights and neurons left, quality around the threshold."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prunelab import data, models, papers, paths
from prunelab.masks import prunable
from prunelab.papers.related.while_learning import DROPNEURON
from prunelab.pruners.dropneuron import neurons_left, report

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from prunelab.plots.tables import Table
    from prunelab.runs import Store
    from prunelab.settings import Run
    from prunelab.stats import Interval

SHOWN = ("density", "neurons_share", "before", "after")


def left(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row per finished run.

    Args:
        results: experiment of ``protocols.dropneuron`` -> the ``experiment.Results`` of its runs, by strategy.

    Returns:
        experiment, strategy, seed, id; before, after (the threshold, on the test part: accuracy; of the autoencoder the
        mean squared error, of the regression that over the mean squared target); and of the regularised matrices alone
        what ``pruners.dropneuron.report`` counts, with ``neurons_by_layer`` as text. Neurons are counted as the
        script of the experiment does, that of ConvNet by the larger side. ``epochs`` is the length of the training,
        ``complete`` whether that and the data are those of the script.
    """
    import pandas as pd

    rows = []
    for experiment, found in results.items():
        for (strategy, seed, run_id), rounds in found.rounds.groupby(["strategy", "seed", "id"], sort=False):
            run = found.store.settings(run_id)
            parts = data.load(run.data)
            quality = rounds.sort_values("round")["test_accuracy" if parts.labelled else "test_loss"]
            if not parts.labelled and run.data.target == "label":
                quality = quality / parts.test.y.square().mean().item()
            weights = matrices(found.store, run, parts)
            rule = "max" if experiment == "convnet" else "min"
            by_layer = neurons_left(weights, rule)
            counts = report(weights, rule) | {"neurons_by_layer": "-".join(map(str, by_layer))}
            who = {"experiment": experiment, "strategy": strategy, "seed": seed, "id": run_id}
            around = {"before": quality.iloc[0], "after": quality.iloc[-1]}
            own = DROPNEURON[experiment]
            complete = run.train.epochs == own.epochs and run.data == own.data
            rows.append({**who, "epochs": run.train.epochs, "complete": complete, **around, **counts})
    return pd.DataFrame(rows)


def matrices(store: Store, run: Run, parts: data.Dataset) -> list[Tensor]:
    """Masks [out, in] of the fully connected layers of a finished run, in forward order."""
    import torch

    net = models.build(run.model, parts.shape, len(parts.classes), run.seed)
    masks = store.masks(run)
    return [torch.from_numpy(masks[name]) for name in prunable(net) if masks[name].ndim == 2]


@functools.cache
def _reported() -> pd.DataFrame:
    import pandas as pd

    table = pd.read_csv(paths.PACKAGE / "papers" / "related" / "dropneuron.csv")
    table["density"] = table["weights"] / table["weights_total"]
    return table.assign(neurons_share=table["neurons"] / table["neurons_total"])


def beside_reported(rows: pd.DataFrame) -> pd.DataFrame:
    """Every quantity of ``SHOWN`` that was reported, beside ours.

    Args:
        rows: of ``left``.

    Returns:
        experiment, strategy, quantity, reported, ours (mean), ours_half (95 % t interval), n, difference; NaN where
        nothing was reported, or where one run has no interval.
    """
    import pandas as pd

    from prunelab import stats

    keys = ["experiment", "strategy"]
    ours = stats.summarise(rows, keys, list(SHOWN))
    pairs = rows[keys].drop_duplicates().merge(ours, on=keys).merge(_reported()[[*keys, *SHOWN]], "left", keys)
    parts = []
    for name in SHOWN:
        part = pairs[keys].assign(quantity=name, reported=pairs[f"{name}_y"], ours=pairs[f"{name}_x"])
        part = part.assign(ours_half=pairs[f"{name}_half"], n=pairs["n"])
        parts.append(part.assign(difference=part["ours"] - part["reported"]))
    return pd.concat(parts, ignore_index=True)


def quantities(rows: pd.DataFrame) -> dict[str, Interval]:
    """What the claims of ``artefacts/related.toml`` ask for, of the runs that are complete.

    Args:
        rows: of ``left``.

    Returns:
        For DropNeuron in each experiment, as far as it is claimed: ``<experiment>_weights`` and ``_neurons`` (left, %),
        ``_inputs`` (left), ``_after`` (accuracy in %, MSE, NMSE in millionths) and ``_change`` (after less before,
        points). For LeNet-300-100 ``fewer_weights`` and ``fewer_neurons``: what the L1 penalty alone leaves, less what
        DropNeuron leaves, in points.
    """
    from prunelab import stats

    found = {}
    whole = rows[rows["complete"]].assign(change=rows["after"] - rows["before"])
    names = {"weights": "density", "neurons": "neurons_share", "after": "after", "change": "change"}
    for experiment, own in whole[whole["strategy"] == "DropNeuron"].groupby("experiment"):
        for name, column in names.items():
            scale = 100.0
            if name in ("after", "change"):
                scale = {"autoencoder": 1.0, "sparse_regression": 1e6}.get(experiment, 100.0)
            found[f"{experiment}_{name}"] = stats.mean_interval(own[column] * scale)
        inputs = own["neurons_by_layer"].str.partition("-")[0].astype(int)
        found[f"{experiment}_inputs"] = stats.mean_interval(inputs)
    lenet = whole[whole["experiment"] == "lenet_300_100"].set_index(["strategy", "seed"])
    if {"DropNeuron", "L1 only"} <= set(lenet.index.get_level_values(0)):
        for name in ("weights", "neurons"):
            left_ = 100 * lenet[names[name]]
            found[f"fewer_{name}"] = stats.paired_difference(left_["L1 only"], left_["DropNeuron"])
    asked = {claim.quantity for claim in papers.artefact("related/dropneuron").claims}
    return {name: value for name, value in found.items() if name in asked}


def table(rows: pd.DataFrame) -> Table:
    """The table to read: reported and ours in turn; ``numbers`` are those of ``beside_reported``."""
    import pandas as pd

    from prunelab.plots.tables import Table

    numbers = beside_reported(rows)
    lengths = rows.groupby(["experiment", "strategy"])["epochs"].first()
    labels = {"density": "weights left", "neurons_share": "neurons left", "before": "before", "after": "after"}
    shown = []
    for (experiment, strategy), group in numbers.groupby(["experiment", "strategy"], sort=False):
        length = f"{lengths[experiment, strategy]} of {DROPNEURON[experiment].epochs}"
        line = {"experiment": experiment, "strategy": strategy, "epochs": length}
        for row in group.itertuples():
            shares = row.quantity in ("density", "neurons_share") or experiment not in ("autoencoder", _REGRESSION)
            line[f"{labels[row.quantity]}, reported"] = _text(row.reported, float("nan"), shares)
            line[f"{labels[row.quantity]}, ours"] = _text(row.ours, row.ours_half, shares)
        shown.append({**line, "n": str(group["n"].iloc[0])})
    caption = (
        "left: % of the regularised matrices' weights, of all neurons; before and after the threshold: test accuracy "
        "in %, MSE of the autoencoder, NMSE of the regression; ours: mean ± half width of the 95 % t interval"
    )
    return Table(pd.DataFrame(shown), numbers, caption)


_REGRESSION = "sparse_regression"


def _text(value: float, half: float, share: bool) -> str:
    from prunelab.runs.columns import MISSING

    if value != value:
        return MISSING
    scale, form = (100, ".2f") if share else (1, ".3g")
    return f"{value * scale:{form}}" + (f" ± {half * scale:{form}}" if half == half else "")
