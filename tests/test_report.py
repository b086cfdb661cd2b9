"""Reports: counts by hand, measured in turns, tables that can be read, and one line for what cannot be measured."""

import dataclasses

import pytest
import torch
from torch import nn

from prunelab.errors import PrunelabError
from prunelab.models import mlp
from prunelab.pruners import prune
from prunelab.structure import shrink
from prunelab.structure.report import _median_interval, latencies, report


def two():
    model = mlp(6, 4, 2)
    masks = prune(model, "l1_neuron", 0.5)
    return model, masks, shrink(model, masks, torch.randn(2, 6))


def test_counts_are_those_of_the_two_models():
    model, _, small = two()
    found = report(model, small, torch.randn(8, 6), requested=0.5, repeats=3)
    dense, less = found.sides["dense"], found.sides["small"]
    assert (dense.parameters, less.parameters) == (6 * 4 + 4 + 4 * 2 + 2, 6 * 2 + 2 + 2 * 2 + 2)
    assert (dense.macs, less.macs) == (6 * 4 + 4 * 2, 6 * 2 + 2 * 2)
    assert (dense.activation_bytes, less.activation_bytes) == (4 * (4 + 2), 4 * (2 + 2))
    assert found.achieved == pytest.approx(0.5)
    assert dense.energy == pytest.approx(1e-12 * (4.6 * 32 + 640 * dense.nonzero))
    assert dense.latency_low <= dense.latency <= dense.latency_high


def test_a_sparse_file_counts_values_and_places():
    model = nn.Sequential(nn.Linear(100, 10, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0, :5] = 1
    side = report(model, model, torch.randn(2, 100), repeats=3).sides["dense"]
    assert side.bytes_sparse == 5 * (4 + 4) + 4 * 11
    assert side.bytes_dense > 4000
    assert side.effective_macs == 5


def test_the_table_says_how_it_was_measured():
    model, _, small = two()
    found = report(model, {"small": small, "same": model}, torch.randn(8, 6), requested=0.5, repeats=3)
    text = str(found)
    assert "batch 8" in text
    assert "median of 3 interleaved repeats; sparsity requested 0.5, achieved 0.5" in text
    assert text.splitlines()[0].split() == ["dense", "small", "of", "dense", "same", "of", "dense"]
    assert "<table" in found._repr_html_()
    assert list(found.frame().index) == ["dense", "small", "same"]


def test_models_are_timed_in_turns_and_left_in_their_mode():
    order = []

    class Noted(nn.Identity):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            order.append(self.name)
            return x

    a, b = Noted("a").train(), Noted("b").eval()
    times = latencies({"a": a, "b": b}, torch.randn(1), 3)
    assert order == ["a", "b"] * 4
    assert [len(own) for own in times.values()] == [3, 3]
    assert (a.training, b.training) == (True, False)


def test_an_example_that_does_not_fit_is_named():
    model, _, small = two()
    with pytest.raises(PrunelabError, match="model 'dense' does not take the example of shape"):
        report(model, small, torch.randn(8, 7), repeats=3)
    with pytest.raises(PrunelabError, match="repeats = 1"):
        report(model, small, torch.randn(8, 6), repeats=1)


def test_what_is_no_tensor_or_no_second_model_gets_one_line():
    model, masks, small = two()
    x = torch.randn(8, 6)

    class Silent(nn.Module):
        def forward(self, x):
            raise RuntimeError

    for second, example, says in (
        (small, "x", "the example is a str: give a tensor, or a tuple or dict of several"),
        ({}, x, "there is no second model"),
        ({"dense": small}, x, "'dense' is what the first model is called"),
        (masks, x, "is a Tensor, not a model: `shrink"),
        (nn.Bilinear(6, 6, 2), x, "'small' does not take the example of shape (8, 6): Bilinear.forward() missing"),
        (Silent(), x, "'small' does not take the example of shape (8, 6): RuntimeError"),
    ):
        with pytest.raises(PrunelabError) as caught:
            report(model, second, example, repeats=3)
        assert says in str(caught.value)


@pytest.mark.parametrize(
    ("n", "outside"),  # P(B <= 5) = 0.013 and P(B <= 6) = 0.039 for 21 tosses; 2 / 2^5 = 0.06: 5 values bracket nothing
    [(3, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (20, 5), (21, 5)],
)
def test_the_interval_of_the_median_leaves_out_as_many_at_both_ends(n, outside):
    assert _median_interval(range(n, 0, -1)) == (1 + outside, n - outside)


def test_fewer_than_six_repeats_have_a_range_and_no_interval():
    model, _, small = two()
    found = report(model, small, torch.randn(8, 6), repeats=3)
    assert "± half of the range of the repeats" in found.caption
    assert "± half of the 95 % interval of the median" in dataclasses.replace(found, repeats=6).caption


def test_dead_units_that_are_still_there_are_named_with_the_reason():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.Flatten())
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 1.0
        model[0].weight[2], model[0].bias[2] = 0, -1.0
    small = shrink(model, None, x := torch.randn(2, 1, 4, 4))
    found = report(model, small, x, repeats=3)
    why = "1 of 3 units: constant but not 0, and module '2' pads its input with zeros"
    assert found.dead == {"small": {"0": why}}
    assert f"dead units in small: 0: {why}" in str(found)
    assert "module &#x27;2&#x27;" in found._repr_html_()


def test_the_notes_are_short_and_the_source_of_the_energy_is_named():
    model, _, small = two()
    found = report(model, small, torch.randn(8, 6), repeats=3)
    assert "Horowitz, ISSCC 2014" in found.caption
    many = dataclasses.replace(found, dead={"small": {f"layer_{i}": "why" for i in range(9)}, "same": {}})
    assert many.notes == ["dead units in small: layer_0: why; layer_1: why; layer_2: why; and 6 more layers"]


def test_a_model_that_cannot_be_traced_is_reported_all_the_same():
    class Branching(nn.Module):
        def forward(self, x):
            return x if len(x) else -x

    model = nn.Sequential(nn.Linear(3, 2), Branching())
    assert report(model, model, torch.randn(2, 3), repeats=3).dead == {"small": {}}


def test_a_model_that_takes_numbers_of_words_is_reported():
    dense = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    found = report(dense, {"same": dense}, torch.zeros(2, 5, dtype=torch.long), repeats=3)
    assert found.sides["dense"].macs == 5 * (4 * 6 + 6 * 2)


def test_models_of_every_make_are_reported(recwarn):
    class Made(nn.Module):
        """Constants in forward, something in its state that is no tensor, two inputs."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def get_extra_state(self):
            return {"made": "today", "shape": torch.zeros(2)}

        def forward(self, x, y=None):
            x = (x - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([1.0, 2.0, 3.0])
            return self.b(self.a(x if y is None else x + y))

    net, x = Made(), torch.randn(4, 3)
    for example in (x, (x, x), {"y": x, "x": x}):
        found = report(
            net,
            {"wrapped": nn.DataParallel(net), "averaged": torch.optim.swa_utils.AveragedModel(net)},
            example,
            repeats=3,
        )
        assert [side.macs for side in found.sides.values()] == [20, 20, 20]
        assert found.batch == 4
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    quantised = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    found = report(plain, quantised, torch.randn(2, 8), repeats=3)
    dense, small = found.sides.values()
    assert (small.parameters, small.macs) == (dense.parameters, dense.macs) == (195, 176)
    assert small.bytes_dense < dense.bytes_dense
    assert found.achieved is None, "its weights are packed, and which are 0 was decided by rounding"
