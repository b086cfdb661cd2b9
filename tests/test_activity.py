"""When units fire: shares by class on numbers by hand, and what they are summed up to."""

import pandas as pd
import pytest
import torch
from torch import nn

from prunelab.errors import PrunelabError
from prunelab.plots import layers
from prunelab.pruners import activity


@pytest.fixture
def net():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    return model


def test_firing_is_the_share_of_the_samples_of_a_class(net):
    x, y = torch.tensor([[1.0], [2.0], [-3.0], [-4.0]]), torch.tensor([0, 0, 0, 1])
    found = activity.firing(net, x, y, ["a", "b"]).set_index(["unit", "class"])
    assert found["layer"].unique().tolist() == ["0"]
    assert found["firing"].round(6).to_dict() == {(0, "a"): 0.666667, (1, "a"): 0.333333, (0, "b"): 0, (1, "b"): 1}
    assert found["strength"].to_dict() == {(0, "a"): 1, (1, "a"): 1, (0, "b"): 0, (1, "b"): 4}
    assert found["samples"].to_dict() == {(0, "a"): 3, (1, "a"): 3, (0, "b"): 1, (1, "b"): 1}


def test_of_filters_the_positions_count_too():
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    x = torch.tensor([[[[1.0, -1.0], [1.0, 1.0]]]])
    (row,) = activity.firing(model, x, torch.tensor([0]), ["a"]).to_dict("records")
    assert (row["firing"], row["strength"]) == (0.75, 1.5)


def test_a_class_without_a_sample_has_no_share(net):
    found = activity.firing(net, torch.ones(1, 1), torch.tensor([0]), ["a", "b"])
    assert found[found["class"] == "b"]["firing"].isna().all()


def test_inputs_and_labels_that_do_not_fit_are_refused(net):
    with pytest.raises(PrunelabError, match="1 inputs, 2 labels, 2 classes"):
        activity.firing(net, torch.ones(1, 1), torch.tensor([0, 1]), ["a", "b"])


def test_the_summary_by_hand():
    rates = {0: [0.9, 0.5, 0.1], 1: [0.0, 0.0, 0.0], 2: [0.2, 0.2, 0.2]}
    patterns = pd.DataFrame(
        {"network": "n", "layer": "l", "unit": unit, "class": name, "firing": rate}
        for unit, row in rates.items()
        for name, rate in zip("abc", row, strict=True)
    )
    (row,) = activity.summary(patterns).to_dict("records")
    assert (row["units"], row["firing_units"]) == (3, 2)
    assert row["firing"] == pytest.approx(2.1 / 6)
    assert row["selected_classes"] == 2.5


def test_the_picture_counts_the_units_that_fire(net):
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])
    patterns = activity.firing(net, x, y, ["a", "b"]).assign(network="dense")
    assert "dense, 0: 1 of 2 units fire." in layers.firing(patterns).alt
