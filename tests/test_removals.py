"""The record of removals: every removal once, with round and score, by original index."""

import math

import pytest
import torch
from torch import nn

from prunelab.masks import MaskError, Masks
from prunelab.pruners import prune
from prunelab.pruners.scores import magnitude, reduce_to_units
from prunelab.training.removals import Removals


def masks(*keep: int, name: str = "a.weight") -> Masks:
    return Masks({name: torch.tensor(keep).view(2, 2)})


ALL = masks(1, 1, 1, 1)


def test_four_weights_go_in_two_rounds_with_their_scores():
    scores = {"a.weight": torch.tensor([[0.1, 0.4], [0.2, 0.3]])}
    record = Removals.start(ALL).add(1, ALL, masks(0, 1, 1, 1), scores)
    record = record.add(2, masks(0, 1, 1, 1), masks(0, 1, 0, 0), {"a.weight": scores["a.weight"] * 10})
    assert record.rounds["a.weight"].tolist() == [[1, -1], [2, 2]]
    assert record.rounds["a.weight"].dtype == torch.int16
    assert record.scores["a.weight"].dtype == torch.float32
    frame = record.frame()
    assert list(frame.columns) == ["parameter", "unit", "round", "score"]
    assert frame["unit"].tolist() == [0, 2, 3]
    assert frame["round"].tolist() == [1, 2, 2]
    assert frame["score"].tolist() == pytest.approx([0.1, 2.0, 3.0])
    assert frame["parameter"].tolist() == ["a.weight"] * 3


def test_add_leaves_the_record_it_was_called_on():
    empty = Removals.start(ALL)
    empty.add(1, ALL, masks(0, 0, 1, 1), {"a.weight": torch.ones(2, 2)})
    assert empty.frame().empty
    assert empty.rounds["a.weight"].unique().tolist() == [-1]


def test_without_scores_the_score_is_nan_and_what_was_gone_at_the_start_went_in_round_0():
    record = Removals.start(masks(0, 1, 1, 1)).add(3, masks(0, 1, 1, 1), masks(0, 0, 1, 1))
    assert record.frame()["round"].tolist() == [0, 3]
    assert all(math.isnan(score) for score in record.frame()["score"])


def test_scores_of_units_hold_for_all_their_weights_and_their_bias():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    start, after = Masks.ones(model), prune(model, "l1_neuron", 0.5)
    scores = reduce_to_units(model, magnitude(model, ["0.weight"]), ["0.weight"])
    record = Removals.start(model).add(1, start, after, scores)
    units = record.frame(whole_units=True)
    lowest = scores["0"].argsort()[:2].sort().values
    assert units["unit"].tolist() == lowest.tolist()
    assert units["score"].tolist() == pytest.approx(scores["0"][lowest].tolist())
    assert set(units["parameter"]) == {"0.weight"}
    entries = record.frame()
    assert len(entries) == 2 * 3 + 2
    assert entries[entries["parameter"] == "0.bias"]["unit"].tolist() == lowest.tolist()


def test_a_unit_goes_with_the_last_of_its_weights():
    record = Removals.start(ALL).add(1, ALL, masks(0, 1, 0, 1)).add(2, masks(0, 1, 0, 1), masks(0, 0, 0, 1))
    units = record.frame(whole_units=True)
    assert (units["unit"].tolist(), units["round"].tolist()) == ([0], [2])


def test_the_record_survives_as_tensors():
    record = Removals.start(ALL).add(1, ALL, masks(1, 0, 0, 1), {"a.weight": torch.rand(2, 2)})
    again = Removals.from_tensors({**record.tensors(), "index/a.weight": torch.zeros(1)})
    assert again.frame().equals(record.frame())
    with pytest.raises(MaskError, match=r"only a round or only a score of 'a\.weight'"):
        Removals.from_tensors({"round/a.weight": torch.zeros(1)})


def test_what_does_not_fit_the_record_is_refused():
    record = Removals.start(ALL).add(1, ALL, masks(0, 1, 1, 1))
    with pytest.raises(MaskError, match=r"a\.weight: a pruned entry came back"):
        record.add(2, masks(0, 1, 1, 1), ALL)
    with pytest.raises(MaskError, match=r"a\.weight: a pruned entry came back"):
        record.add(2, ALL, ALL)
    with pytest.raises(MaskError, match=r"a\.weight: an entry on record as gone went again"):
        record.add(2, ALL, masks(0, 0, 1, 1))
    with pytest.raises(MaskError, match=r"a\.weight: pruned entries came back, since it has no mask"):
        record.add(2, masks(0, 1, 1, 1), Masks({}))
    with pytest.raises(MaskError, match="original shapes"):
        record.add(2, Masks({"a.weight": torch.ones(3)}), Masks({"a.weight": torch.ones(3)}))
    with pytest.raises(MaskError, match="round = 40000"):
        record.add(40000, ALL, ALL)
    with pytest.raises(MaskError, match=r"a\.weight: scores of shape \(3,\)"):
        record.add(2, masks(0, 1, 1, 1), masks(0, 0, 1, 1), {"a": torch.ones(3)})


def test_an_empty_record_gives_an_empty_frame_with_the_same_columns():
    assert list(Removals({}, {}).frame().columns) == list(Removals.start(ALL).frame().columns)
