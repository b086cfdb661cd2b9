"""The explorer without a browser: moving a control is setting its value."""

import copy
import re

import pytest
import torch
from torch import nn

import prunelab
from prunelab import data, live, live_view, models, settings
from prunelab.errors import PrunelabError
from prunelab.live import PruningExplorer
from prunelab.pruners.magnitude import Magnitude


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        return data.load("digits")


@pytest.fixture(scope="module")
def model(digits):
    """A network that has learnt something, so that its accuracy depends on what is pruned."""
    net = models.build(settings.Model("mlp", hidden=(40, 20)), digits.shape, 10, seed=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    x = digits.scale(digits.train.x)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), digits.train.y).backward()
        optimizer.step()
    return net


def measured(model, masks, x, y):
    """Accuracy by another way than the explorer's: masks multiplied into a copy."""
    other = copy.deepcopy(model).eval()
    masks.apply_(other)
    with torch.no_grad():
        return (other(x).argmax(1) == y).double().mean().item()


def text(widget):
    return re.sub("<[^>]*>", "", widget.value)


def sentence(explorer):
    return text(explorer.children[2])


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_masks_at_every_position_are_those_of_prune(model, digits, method, scope):
    explorer = PruningExplorer(model, digits, method=method, scope=scope, seed=3, evaluate=10)
    for rate in (0.0, 0.37, 0.9, 0.999, 0.5):  # also back
        explorer.rate.value = rate
        expected = prunelab.prune(model, method, rate, seed=3, scope=scope, allow_empty=True)
        assert explorer.masks == expected


def test_ties_are_broken_as_prune_breaks_them(model, digits):
    coarse = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in coarse.parameters():
            parameter.copy_((parameter * 4).round() / 4)
    explorer = PruningExplorer(coarse, digits, rate=0.7, evaluate=10)
    drawn = []
    for seed in (0, 1):
        explorer.seed.value = seed
        assert explorer.masks == prunelab.prune(coarse, "magnitude", 0.7, seed=seed, allow_empty=True)
        drawn.append(explorer.masks)
    assert drawn[0] != drawn[1]


def test_the_sentence_states_rate_sparsity_sample_and_both_accuracies(model, digits):
    explorer = PruningExplorer(model, digits, rate=0.5)
    x, y = digits.scale(digits.test.x), digits.test.y
    explorer.rate.value = 0.8
    now = measured(model, prunelab.prune(model, "magnitude", 0.8), x, y)
    dense = measured(model, prunelab.Masks({}), x, y)
    assert dense > now
    assert sentence(explorer) == (
        f"At a pruning rate of 80 % (sparsity 0.800) accuracy on 297 test images is {now:.1%}, dense {dense:.1%}."
    ).replace("%,", " %,").replace("%.", " %.")
    assert str(explorer) == sentence(explorer)


def test_the_sample_is_fixed_random_and_of_the_stated_size(model, digits):
    small = PruningExplorer(model, digits, evaluate=64)
    again = PruningExplorer(model, digits, evaluate=64, seed=9)
    assert "on 64 test images" in str(small)
    assert torch.equal(small._y, again._y)
    assert not torch.equal(small._y, digits.test.y[:64])


def test_inputs_and_labels_of_ones_own_do_as_well(model, digits):
    x, y = digits.scale(digits.validation.x), digits.validation.y
    explorer = PruningExplorer(model, (x.flatten(1), y), rate=0.6)
    assert explorer.visited["accuracy"].tolist() == [measured(model, explorer.masks, x, y)]
    assert "on 150 samples" in str(explorer)


def test_the_model_and_its_mode_stay_as_they_are(digits):
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 10)
    ).train()
    before = copy.deepcopy(net.state_dict())
    explorer = PruningExplorer(net, digits, evaluate=50)
    explorer.sweep()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert net[0].weight.is_contiguous()
    eager = measured(net, explorer.masks, explorer._x, explorer._y)
    assert explorer.visited.set_index("rate")["accuracy"][0.9] == eager


def test_a_sweep_visits_the_standard_rates_and_comes_back(model, digits):
    explorer = PruningExplorer(model, digits, rate=0.3)
    explorer.button.click()
    visited = explorer.visited
    assert visited["rate"].tolist() == [0.3, *live.STANDARD]
    assert visited["sparsity"].tolist() == pytest.approx(visited["rate"].tolist(), abs=2e-4)
    assert explorer.rate.value == 0.3
    assert "pruning rate of 30 %" in str(explorer)
    assert explorer.masks == prunelab.prune(model, "magnitude", 0.3)
    assert explorer.children[3].value.count('class="visited"') == 1 + len(live.STANDARD)


def test_each_setting_has_a_curve_of_its_own(model, digits):
    explorer = PruningExplorer(model, digits)
    explorer.rate.value = 0.5
    explorer.score.value = "random"
    explorer.scope.value = "layer"
    assert explorer.children[3].value.count('class="visited"') == 1
    found = explorer.visited[["method", "scope", "rate"]].to_records(index=False).tolist()
    assert found == [
        ("magnitude", "global", 0.9),
        ("magnitude", "global", 0.5),
        ("random", "global", 0.5),
        ("random", "layer", 0.5),
    ]


def test_scores_are_computed_once_for_all_positions(model, digits, monkeypatch):
    calls, scores = [], Magnitude.scores
    monkeypatch.setattr(Magnitude, "scores", lambda self, *given: calls.append(1) or scores(self, *given))
    explorer = PruningExplorer(model, digits)
    for rate in (0.1, 0.2, 0.9):
        explorer.rate.value = rate
    explorer.scope.value = "layer"
    assert len(calls) == 1


def test_a_layer_that_dies_is_named(model, digits):
    with torch.no_grad():
        weak = copy.deepcopy(model)
        weak.get_submodule("hidden_2").weight.mul_(1e-6)
    explorer = PruningExplorer(weak, digits, rate=0.9)
    assert "Layer hidden_2 is cut off" in str(explorer)
    with pytest.raises(PrunelabError, match="'hidden_2' would"):
        prunelab.prune(weak, "magnitude", 0.9)


def test_a_message_of_the_browser_moves_it(model, digits):
    explorer = PruningExplorer(model, digits)
    explorer.rate.set_state({"index": 42})
    assert "pruning rate of 42 %" in sentence(explorer)


def test_a_rate_between_the_steps_gets_a_position(model, digits):
    explorer = PruningExplorer(model, digits, rate=0.8765)
    assert explorer.rate.label == "87.65 %"
    assert {0.8765, *live.STEPS} == {value for _, value in explorer.rate.options}


def test_an_error_is_shown_raised_and_remembered(model, digits, monkeypatch):
    explorer = PruningExplorer(model, digits)
    explorer.check()

    def broken(*_):
        raise RuntimeError("no selection today")

    with monkeypatch.context() as patch:
        patch.setattr(Magnitude, "select", broken)
        with pytest.raises(RuntimeError, match="no selection today"):
            explorer.rate.value = 0.1
    (shown,) = explorer.children[4].outputs
    assert (shown["output_type"], shown["ename"], shown["evalue"]) == ("error", "RuntimeError", "no selection today")
    assert sentence(explorer) == explorer.children[3].value == "", "an old picture would lie"
    explorer.rate.value = 0.2
    assert explorer.children[4].outputs == ()
    assert "20 %" in sentence(explorer)
    with pytest.raises(RuntimeError, match="no selection today"):
        explorer.check()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"method": "magnitud"}, "did you mean 'magnitude'"),
        ({"method": "l1_neuron"}, "method = 'l1_neuron'"),
        ({"scope": "unit"}, "scope = 'unit'"),
        ({"rate": 1.2}, "amount = 1.2"),
        ({"evaluate": 0}, "evaluate = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"model": "lenet"}, "model is a str"),
        ({"data": (torch.zeros(3, 64), torch.zeros(2))}, "3 inputs and 2 labels"),
    ],
)
def test_what_cannot_be_explored_is_refused_in_one_line(model, digits, wrong, words):
    with pytest.raises(PrunelabError, match=re.escape(words)) as caught:
        PruningExplorer(**{"model": model, "data": digits, **wrong})
    assert "\n" not in str(caught.value)


def test_only_methods_that_rank_single_weights_are_offered():
    assert {"magnitude", "random", "snip", "taylor", "wanda"} <= set(live.offered())
    assert {"magnitude", "random"} == set(live.offered(data=False))
    assert not {"movement", "slimming"} & set(live.offered())
    assert not {"none", "dyprune", "l1_weight", "l1_neuron", "random_filter"} & set(live.offered())


def test_the_curve_puts_points_where_they_belong():
    left, right = live_view.LEFT, live_view.WIDTH - live_view.RIGHT
    top, bottom = live_view.TOP, live_view.HEIGHT - live_view.BOTTOM
    drawn = live_view.curve([(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)], (0.5, 0.5), 1.0, 'a "b" <c>')
    points = [float(number) for number in re.split("[ ,]", re.search('points="([^"]*)"', drawn)[1])]
    assert points == [left, top, (left + right) / 2, (top + bottom) / 2, right, bottom]  # in the order of the rates
    assert f'class="here" cx="{(left + right) / 2}" cy="{(top + bottom) / 2}"' in drawn
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in drawn
    assert "dense 100.0 %" in drawn


def test_the_layers_are_a_table_whose_bars_are_the_densities():
    rows = [
        {"parameter": "<a>.weight", "kept": 250, "total": 1000},
        {"parameter": "b.weight", "kept": 0, "total": 1000},
    ]
    table = live_view.layers(rows)
    assert [float(width) for width in re.findall(r"width:([\d.]+)%", table)] == [25.0, 0.0, 12.5]
    assert re.findall("<td>([^<]*)</td>", table)[-3:] == ["250", "2,000", "0.1250"]
    assert "<th>&lt;a&gt;</th>" in table


@pytest.mark.parametrize("method", ["snip", "taylor", "wanda"])
def test_scores_that_look_at_data_get_some_of_the_training_part(method):
    digits = data.load(settings.Data("digits"))
    model = models.build(settings.Model("mlp", (12, 8)), digits.shape, 10, 0)
    explorer = live.PruningExplorer(model, digits, method=method, rate=0.5, evaluate=50)
    assert explorer.masks.sparsity == pytest.approx(0.5, abs=0.01)
    explorer.scope.value = "layer"
    explorer.check()
