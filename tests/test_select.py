"""Selection: exact counts whatever the scores, ties by the generator, nothing revived; against a plain NumPy oracle."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from acting import looked_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

from prunelab.errors import PrunelabError
from prunelab.masks import MaskError, Masks, unit_axis
from prunelab.pruners import partition, prune
from prunelab.pruners.select import amount_to_count, keep_highest, keep_highest_units, scored_names, units_of
from prunelab.pruners.units import remove_lowest, unit_masks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["few numbers", "many numbers"])
def paths_of_the_threshold(request, monkeypatch):
    """Small inputs take the short way; here they also go through sample, bracket (which often misses) and pieces."""
    if request.param == "many numbers":
        monkeypatch.setattr(partition, "_MANY", 1)
        monkeypatch.setattr(partition, "_SAMPLE", 9)
        monkeypatch.setattr(partition, "_WIDTH", -0.7)
        monkeypatch.setattr(partition, "_PIECE", 5)


FEW_VALUES = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.5, -3.0, 1e-30, math.inf, -math.inf])
SCORES = st.one_of(FEW_VALUES, st.floats(allow_nan=False, width=32))


@st.composite
def problems(draw):
    """Scores of one to four parameters, what is left of them, and a number to remove."""
    scores, current = {}, {}
    for index in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([(1,), (7,), (2, 3), (4, 1, 3, 2), (0,)]))
        size = math.prod(shape)
        values = draw(st.one_of(st.lists(SCORES, min_size=size, max_size=size), SCORES.map(lambda v, n=size: [v] * n)))
        scores[f"{index}.weight"] = torch.tensor(values).view(shape)
        left = draw(st.one_of(st.just([True] * size), st.lists(st.booleans(), min_size=size, max_size=size)))
        current[f"{index}.weight"] = torch.tensor(left, dtype=torch.bool).view(shape)
    current = Masks(current)
    return scores, current, draw(st.integers(0, current.kept))


def flat(tensors) -> np.ndarray:
    return np.concatenate([tensor.numpy().ravel() for tensor in tensors])


many_examples = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many_examples
@given(problems(), st.integers(0, 5))
def test_exactly_the_lowest_go_and_nothing_comes_back(paths_of_the_threshold, problem, seed):
    scores, current, count = problem
    after = keep_highest(scores, current, count, generator(seed), allow_empty=True)
    was, stays, score = flat(current.values()), flat(after.values()), flat(scores.values())
    gone = was & ~stays
    assert gone.sum() == count
    assert not (stays & ~was).any()
    expected = np.sort(score[was])[:count]  # the oracle sorts
    assert np.array_equal(np.sort(score[gone]) + 0.0, expected + 0.0)


@many_examples
@given(problems(), st.data())
def test_more_removed_is_less_kept_under_the_same_seed(paths_of_the_threshold, problem, data):
    scores, current, count = problem
    fewer = data.draw(st.integers(0, count))
    small = keep_highest(scores, current, count, generator(), allow_empty=True)
    large = keep_highest(scores, current, fewer, generator(), allow_empty=True)
    assert small & large == small


@many_examples
@given(problems())
def test_each_parameter_loses_its_own_number(paths_of_the_threshold, problem):
    scores, current, _ = problem
    counts = {name: current.counts[name] // 2 for name in list(scores)[:2]}
    after = keep_highest(scores, current, counts, generator(), allow_empty=True)
    for name in scores:
        assert current.counts[name] - after.counts[name] == counts.get(name, 0)
        alone = keep_highest({name: scores[name]}, current, counts.get(name, 0), generator(), allow_empty=True)
        live = current[name]
        assert torch.equal(
            scores[name][live & ~after[name]].sort().values, scores[name][live & ~alone[name]].sort().values
        )


def test_four_numbers_by_hand():
    scores = {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([3.0, 2.0])}
    current = Masks({name: torch.ones(2) for name in scores})
    kept = [keep_highest(scores, current, count, generator(), allow_empty=True) for count in range(5)]
    assert [flat(masks.values()).astype(int).tolist() for masks in kept] == [
        [1, 1, 1, 1],
        [1, 0, 1, 1],
        [1, 0, 1, 0],
        [1, 0, 0, 0],
        [0, 0, 0, 0],
    ]


def test_every_set_of_ties_is_as_likely_as_any_other():
    scores = {"a": torch.zeros(2, 2), "b": torch.tensor([-1.0, 9.0])}
    current = Masks({name: torch.ones_like(score) for name, score in scores.items()})
    drawn = Counter()
    for seed in range(3000):
        after = keep_highest(scores, current, 3, generator(seed))
        assert after["b"].tolist() == [False, True]
        drawn[tuple(after["a"].flatten().tolist())] += 1
    expected = 3000 / 6
    assert len(drawn) == 6
    # chi-square with 5 degrees of freedom: 20.5 is passed once in 1000 times by chance, and the seeds are fixed
    assert sum((times - expected) ** 2 / expected for times in drawn.values()) < 20.5


def test_ties_are_broken_by_the_generator_and_by_nothing_else():
    scores, current = {"a": torch.ones(1000)}, Masks({"a": torch.ones(1000)})
    first, again, other = (keep_highest(scores, current, 500, generator(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    source = generator()
    before = source.get_state()
    keep_highest({"a": torch.arange(1000.0)}, current, 500, source)
    assert torch.equal(source.get_state(), before)


def test_units_follow_the_same_rules():
    scores, there = {"a": torch.tensor([1.0, 5.0, 3.0])}, {"a": torch.tensor([True, False, True])}
    assert keep_highest_units(scores, there, 1, generator())["a"].tolist() == [False, False, True]
    with pytest.raises(MaskError, match="layer 'a' would lose all 2"):
        keep_highest_units(scores, there, 2, generator())
    assert not keep_highest_units(scores, there, 2, generator(), allow_empty=True)["a"].any()


# ------------------------------------------------------------------------------------------------- what is refused


def test_nan_is_refused_by_name_where_it_would_matter_and_only_there():
    scores = {"a": torch.tensor([1.0, 2.0]), "hidden.weight": torch.tensor([torch.nan, 1.0])}
    current = Masks({"a": torch.ones(2), "hidden.weight": torch.ones(2)})
    for count in (0, 1, 3):
        with pytest.raises(MaskError, match=r"hidden\.weight: a score is NaN"):
            keep_highest(scores, current, count, generator())
    gone = current & Masks({"hidden.weight": torch.tensor([0, 1])})
    assert keep_highest(scores, gone, 1, generator()).kept == 2


def test_infinite_scores_are_scores():
    scores = {"a": torch.tensor([math.inf, -math.inf, 0.0, math.inf])}
    after = keep_highest(scores, Masks({"a": torch.ones(4)}), 2, generator())
    assert after["a"].tolist() == [True, False, False, True]


@pytest.mark.parametrize("count", [3, -1, {"a": 3}])
def test_more_than_is_left_cannot_go(count):
    with pytest.raises(MaskError, match="choose a number from 0 to 2, what is left"):
        keep_highest({"a": torch.ones(4)}, Masks({"a": torch.tensor([1, 1, 0, 0])}), count, generator())


def test_scores_and_counts_must_fit_the_masks():
    current = Masks({"first": torch.ones(2), "second": torch.ones(2)})
    with pytest.raises(MaskError, match=r"scores for 'fist' but no mask: did you mean 'first'\?"):
        keep_highest({"fist": torch.ones(2)}, current, 1, generator())
    with pytest.raises(MaskError, match=r"count for 'second' but no scores: known: first"):
        keep_highest({"first": torch.ones(2)}, current, {"second": 1}, generator())
    with pytest.raises(MaskError, match=r"first: scores and mask have shapes \(3,\) and \(2,\)"):
        keep_highest({"first": torch.ones(3)}, current, 1, generator())


def test_emptying_a_layer_is_refused_by_name_unless_allowed_or_already_done():
    scores = {"small.weight": torch.zeros(2), "large.weight": torch.ones(8)}
    current = Masks({name: torch.ones_like(score) for name, score in scores.items()})
    with pytest.raises(MaskError, match=r"layer 'small' would lose all 2 .* allow_empty=True"):
        keep_highest(scores, current, 2, generator())
    empty = keep_highest(scores, current, 2, generator(), allow_empty=True)
    assert empty.counts == {"small.weight": 0, "large.weight": 8}
    assert keep_highest(scores, empty, 3, generator()).kept == 5


# ------------------------------------------------------------------------------------------------- kinds of tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_scores_of_any_type_compete_with_each_other(paths_of_the_threshold, dtype):
    scores = {"a": torch.tensor([3, 1, 5], dtype=dtype), "b": torch.tensor([0.5, 4.0, 2.0])}
    after = keep_highest(scores, Masks({"a": torch.ones(3), "b": torch.ones(3)}), 3, generator())
    assert [mask.tolist() for mask in after.values()] == [[True, False, True], [False, True, False]]


def test_doubles_that_floats_cannot_tell_apart_are_told_apart():
    scores = {"a": torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64).flip(0), "b": torch.tensor([1.0])}
    after = keep_highest(scores, Masks({"a": torch.ones(2), "b": torch.ones(1)}), 2, generator(), allow_empty=True)
    assert after["a"].tolist() == [True, False]


def test_memory_layout_does_not_matter():
    score = torch.randn(4, 3, 2, 2, generator=generator())
    current = Masks({"a": torch.rand(4, 3, 2, 2, generator=generator()) < 0.7})
    columns = keep_highest({"a": score.to(memory_format=torch.channels_last)}, current, 9, generator())
    last = Masks({"a": current["a"].to(memory_format=torch.channels_last)})
    assert (
        columns
        == keep_highest({"a": score}, current, 9, generator())
        == keep_highest({"a": score}, last, 9, generator())
    )


# ---------------------------------------------------------------------------------------------------- large inputs


def large(kind: str) -> torch.Tensor:
    size = 1 << 21
    numbers = torch.randn(size, generator=generator())
    return {
        "random": numbers,
        "all equal": torch.zeros(size),
        "mostly zeros": numbers.clamp(min=1),
        "sorted": torch.arange(size, dtype=torch.float32),
        "two values": (torch.arange(size) % 2).float(),
        "one odd": torch.zeros(size).index_fill_(0, torch.tensor([5]), -1.0),
    }[kind]


@pytest.mark.parametrize("kind", ["random", "all equal", "mostly zeros", "sorted", "two values", "one odd"])
@pytest.mark.parametrize("pruned_before", [False, True])
def test_millions_of_scores_are_cut_exactly(kind, pruned_before):
    score = large(kind)
    live = torch.rand(len(score), generator=generator(1)) < (0.05 if pruned_before else 2)
    scores, current = dict(zip("abc", score.split([10, 1_000_000, len(score) - 1_000_010]), strict=True)), {}
    current = Masks(dict(zip("abc", live.split([10, 1_000_000, len(score) - 1_000_010]), strict=True)))
    for count in (1, current.kept // 3, current.kept - 1):
        after = keep_highest(scores, current, count, generator(), allow_empty=True)
        stays = torch.cat(list(after.values()))
        assert current.kept - after.kept == count
        assert not (stays & ~live).any()
        assert score[live & ~stays].max() <= score[stays].min()


def test_of_millions_only_a_few_per_cent_are_partitioned(monkeypatch):
    sizes = []
    whole = np.partition
    monkeypatch.setattr(np, "partition", lambda numbers, k: sizes.append(len(numbers)) or whole(numbers, k))
    score = large("random")
    for current in (Masks({"a": torch.ones_like(score)}), Masks({"a": score > 0.5})):
        for share in (0.01, 0.5, 0.98):
            keep_highest({"a": score}, current, int(share * current.kept), generator())
            assert sizes.pop() < 0.05 * current.kept
    assert not sizes


def test_the_number_of_threads_changes_nothing():
    score, threads = large("mostly zeros"), torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(keep_highest({"a": score}, Masks({"a": torch.ones_like(score)}), len(score) // 4, generator()))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


@pytest.mark.gpu
def test_a_gpu_removes_the_same():
    scores = {"a": large("mostly zeros"), "b": torch.randn(50, 40, generator=generator(3))}
    current = Masks({name: torch.rand(score.shape, generator=generator(4)) < 0.9 for name, score in scores.items()})
    on_gpu = {name: score.cuda() for name, score in scores.items()}
    for count in (0, 1, 1000, current.kept // 3, current.kept * 4 // 5):
        here = keep_highest(scores, current, count, generator())
        assert keep_highest(on_gpu, current.to("cuda"), count, generator()).to("cpu") == here


# --------------------------------------------------------------------------------------------------- amounts, units


def test_amounts_round_half_to_even_as_torch_does():
    assert [amount_to_count(0.5, n) for n in (1, 3, 5, 7)] == [0, 2, 2, 4]
    assert amount_to_count(0, 10) == 0
    for amount, size in itertools.product((0.1, 0.25, 0.5, 0.77, 0.999), (1, 2, 3, 10, 333)):
        pruned = torch_prune.l1_unstructured(nn.Linear(size, 1), "weight", amount)
        assert amount_to_count(amount, size) == int((pruned.weight_mask == 0).sum())


def test_rounding_down_with_at_least_one_gives_the_series_of_dropnet():
    series = [80]
    while series[-1] > 4:
        series.append(series[-1] - amount_to_count(0.2, series[-1], "floor", minimum=1))
    assert series == [80, 64, 52, 42, 34, 28, 23, 19, 16, 13, 11, 9, 8, 7, 6, 5, 4]
    assert amount_to_count(0.2, 0, "floor", minimum=1) == 0


@pytest.mark.parametrize("amount", [1.2, 1, -0.1, math.nan, "0.5", True, None])
def test_an_amount_that_is_no_fraction_is_one_line(amount):
    with pytest.raises(PrunelabError, match=r"^amount = .*: should be at least 0 and below 1.*\Z"):
        amount_to_count(amount, 10)


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 3))


def test_units_of_the_last_layer_never_compete():
    model = convnet()
    names = ["0.weight", "1.weight", "3.weight", "4.weight"]
    current = Masks.ones(model)
    assert scored_names(model, current, "weight") == names
    assert scored_names(model, current, "filter") == names[:2]
    assert scored_names(model, current, "neuron") == names[2:3]
    with pytest.raises(MaskError, match="'neuron': the model has no masked Linear before the last layer"):
        scored_names(model, Masks.ones(model, ["4"]), "neuron")


def test_a_unit_goes_with_its_weights_and_its_bias():
    model = convnet()
    masks = unit_masks(model, {"3": torch.tensor([1, 0, 1, 1, 0]).bool()})
    assert masks["3.weight"].sum(1).tolist() == [6, 0, 6, 6, 0]
    assert masks["3.bias"].tolist() == [True, False, True, True, False]
    assert units_of(model, masks, ["3.weight"])["3"].tolist() == [True, False, True, True, False]


class Conv1D(nn.Module):
    """As that of transformers: a Linear whose weight is [inputs, outputs]."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


@pytest.mark.parametrize(
    ("layer", "shape", "granularity"),
    [
        (nn.Conv1d(3, 4, 2), (3, 6), "filter"),
        (nn.Conv3d(3, 4, 2), (3, 4, 4, 4), "filter"),
        (nn.ConvTranspose1d(3, 4, 2), (3, 6), "filter"),
        (nn.ConvTranspose2d(3, 4, 2, stride=2), (3, 4, 4), "filter"),
        (Conv1D(4, 3), (3,), "neuron"),
        (nn.Linear(3, 4), (3,), "neuron"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_units_of_every_kind_of_layer_are_what_it_gives(layer, shape, granularity):
    model, x = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)), torch.randn(2, *shape)
    before = model(x)
    assert before.shape == (2, 2)
    with torch.no_grad():  # the norm of unit i is i, whatever the others are
        weight = layer.weight if unit_axis(layer) == 0 else layer.weight.transpose(0, 1)
        for row, norm in enumerate((4.0, 1.0, 2.0, 3.0)):
            weight[row] *= norm / weight[row].abs().sum()
    masks = prune(model, f"l1_{granularity}", 0.5)
    assert masks["0.bias"].tolist() == [True, False, False, True]
    assert units_of(model, masks, ["0.weight"])["0"].tolist() == [True, False, False, True]
    masks.apply_(model)
    out = model[0](x).detach()
    alive = out.movedim(-1 if out.dim() == 2 else 1, 0).flatten(1).any(1)
    assert alive.tolist() == [True, False, False, True]


def test_units_of_layers_with_parameters_of_their_own_are_refused():
    class Adapted(nn.Linear):
        def __init__(self, inputs, outputs):
            super().__init__(inputs, outputs)
            self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    model = nn.Sequential(Adapted(8, 16), nn.ReLU(), nn.Linear(16, 3))
    assert prune(model, "magnitude", 0.5).keys() == {"0.weight", "2.weight"}
    with pytest.raises(MaskError, match=r"layer '0' \(Adapted\) has the parameter 'down' beside weight and bias"):
        prune(model, "l1_neuron", 0.5)


@pytest.mark.parametrize(("scope", "left"), [("global", [1, 4]), ("layer", [2, 3])])
def test_scope_decides_where_units_compete(scope, left):
    model = convnet()
    scores = {"0": torch.tensor([0.1, 0.2, 0.3, 9.0]), "1": torch.tensor([0.15, 0.16, 5.0, 6.0, 7.0, 8.0])}
    after = remove_lowest(looked_at(model), scores, 0.5, granularity="filter", scope=scope)
    assert [int(after[f"{layer}.bias"].sum()) for layer in "01"] == left
    again = remove_lowest(looked_at(model, masks=after), scores, 0.5, granularity="filter", scope="layer")
    assert again & after == again
    assert [int(again[f"{layer}.bias"].sum()) for layer in "01"] == [n - round(n / 2) for n in left]
