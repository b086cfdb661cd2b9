"""The explorer without a browser: moving a control is setting its value."""

import asyncio
import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

import prunelab
from prunelab import data, models, settings
from prunelab.errors import PrunelabError
from prunelab.lab.live import PruningExplorer, controls, offer, pruning, view
from prunelab.lab.live import explorer as live
from prunelab.pruners.magnitude import Magnitude
from prunelab.structure import cost


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
    return text(explorer._screen.sentence)


CHOICES = [
    ("magnitude", "weight"),
    ("magnitude", "neuron"),
    ("random", "weight"),
    ("random", "neuron"),
    ("l2_neuron", "neuron"),
    ("taylor", "neuron"),
    ("dropnet", "unit"),
    ("wanda", "weight"),
]


def options(explorer, method, granularity):
    """For ``prunelab.prune``: what the name itself sets is no option."""
    free = {"granularity": granularity} if method in ("magnitude", "random", "taylor") else {}
    return {**free, "batches": explorer._subject._batches, "allow_empty": True}


@pytest.mark.parametrize(("method", "granularity"), CHOICES)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_masks_at_every_position_are_those_of_prune(model, digits, method, granularity, scope):
    explorer = PruningExplorer(
        model, digits, method=method, granularity=granularity, scope=scope, seed=3, evaluate=10, rate=0.1
    )
    for rate in (0.0, 0.37, 0.9, 0.99, 0.5):  # also back
        explorer.rate.value = rate
        expected = prunelab.prune(model, method, rate, seed=3, scope=scope, **options(explorer, method, granularity))
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
    x, y = digits.scale(digits.validation.x), digits.validation.y
    explorer.rate.value = 0.8
    now = measured(model, prunelab.prune(model, "magnitude", 0.8), x, y)
    dense = measured(model, prunelab.Masks({}), x, y)
    assert dense > now
    assert sentence(explorer).startswith(
        f"By magnitude (weights), at a pruning rate of 80 % (sparsity 0.800) accuracy on 150 validation images is "
        f"{100 * now:.1f} %, dense {100 * dense:.1f} %."
    )
    assert str(explorer) == sentence(explorer)


def test_the_sample_is_fixed_random_and_of_the_stated_size(model, digits):
    small = PruningExplorer(model, digits, evaluate=64)
    again = PruningExplorer(model, digits, evaluate=64, seed=9)
    assert "on 64 validation images" in str(small)
    assert torch.equal(small._subject._sample.y, again._subject._sample.y)
    assert not torch.equal(small._subject._sample.y, digits.validation.y[:64])


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
    eager = measured(net, explorer.masks, explorer._subject._sample.x, explorer._subject._sample.y)
    assert explorer.visited.set_index("rate")["accuracy"][0.9] == eager


def test_a_sweep_visits_the_standard_rates_and_comes_back(model, digits):
    explorer = PruningExplorer(model, digits, rate=0.3)
    explorer.buttons["sweep"].click()
    visited = explorer.visited
    assert visited["rate"].tolist() == [0.3, *live.STANDARD]
    assert visited["sparsity"].tolist() == pytest.approx(visited["rate"].tolist(), abs=2e-4)
    assert explorer.rate.value == 0.3
    assert "pruning rate of 30 %" in str(explorer)
    assert explorer.masks == prunelab.prune(model, "magnitude", 0.3)
    assert explorer._screen.curve.value.count('class="visited"') == 1 + len(live.STANDARD)


def test_each_setting_has_a_curve_of_its_own(model, digits):
    explorer = PruningExplorer(model, digits)
    explorer.rate.value = 0.5
    explorer.score.value = "random"
    explorer.scope.value = "layer"
    assert explorer._screen.curve.value.count('class="visited"') == 1
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
    assert {0.8765, *controls.STEPS} == {value for _, value in explorer.rate.options}


def test_an_error_is_shown_raised_and_remembered(model, digits, monkeypatch):
    explorer = PruningExplorer(model, digits)
    explorer.check()

    def broken(*_):
        raise RuntimeError("no selection today")

    with monkeypatch.context() as patch:
        patch.setattr(Magnitude, "select", broken)
        with pytest.raises(RuntimeError, match="no selection today"):
            explorer.rate.value = 0.1
    (shown,) = explorer._screen.errors.outputs
    assert (shown["output_type"], shown["ename"], shown["evalue"]) == ("error", "RuntimeError", "no selection today")
    assert (
        sentence(explorer)
        == explorer._screen.curve.value
        == explorer._screen.bars.value
        == explorer._screen.table.value
        == ""
    ), "an old picture would lie"
    assert not explorer.buttons["undo"].disabled
    explorer.rate.value = 0.2
    assert explorer._screen.errors.outputs == ()
    assert "20 %" in sentence(explorer)
    with pytest.raises(RuntimeError, match="no selection today"):
        explorer.check()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"method": "magnitud"}, "did you mean 'magnitude'"),
        ({"method": "l1_neuron"}, "method = 'l1_neuron'"),
        ({"granularity": "filter"}, "granularity = 'filter'"),
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


def offered(net, data=True):
    return offer.offered(net, prunelab.Masks.ones(net), data)


def test_methods_that_rank_a_finished_model_are_offered_once_with_what_they_can_remove(model):
    conv = models.build(settings.Model("lenet_5"), (1, 28, 28), 10, 0)
    normed = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    assert offered(model)["magnitude"] == ["weight", "neuron"]
    assert offered(conv)["magnitude"] == ["weight", "neuron", "filter", "unit"]
    assert {"snip", "taylor", "wanda", "dropnet", "apoz", "l2_filter"} <= set(offered(conv))
    assert {"magnitude", "random", "l2_neuron", "lamp", "fpgm"} == set(offered(model, data=False))
    assert "slimming" in offered(normed)
    assert not {"slimming", "movement", "none", "dyprune", "l1_weight", "random_filter", "n_of_m"} & set(offered(conv))
    assert "dropnet_oracle" not in offered(conv), "it removes one unit, whatever the rate"


@pytest.mark.parametrize("method", ["snip", "taylor", "wanda"])
def test_scores_that_look_at_data_get_some_of_the_training_part(method):
    digits = data.load(settings.Data("digits"))
    model = models.build(settings.Model("mlp", (12, 8)), digits.shape, 10, 0)
    explorer = live.PruningExplorer(model, digits, method=method, rate=0.5, evaluate=50)
    assert explorer.masks.sparsity == pytest.approx(0.5, abs=0.01)
    explorer.scope.value = "layer"
    explorer.check()


# -- layers with a rate of their own -----------------------------------------------------------------------------------


def test_a_layer_with_a_rate_of_its_own_no_longer_competes(model, digits):
    explorer = PruningExplorer(model, digits, rate=0.8, evaluate=20)
    explorer.own["hidden_1"].value = 0.25
    by_layer = {row["parameter"]: row for row in explorer.masks.by_layer()}
    assert by_layer["hidden_1.weight"]["kept"] == 0.75 * 2560
    others = prunelab.prune(model, "magnitude", 0.8, layers=["hidden_2", "output"], allow_empty=True)
    assert all(torch.equal(explorer.masks[name], mask) for name, mask in others.items())
    assert "pruning rate of 80 %, hidden_1 25 % (sparsity" in str(explorer)
    assert explorer.visited["own"].tolist() == ["", "hidden_1 25 %"]
    assert "hidden_1 25 %" in explorer._controls.fold.titles[0]
    explorer.own["hidden_1"].value = controls.ABOVE
    assert explorer.masks == prunelab.prune(model, "magnitude", 0.8)


def test_layers_of_which_nothing_can_go_have_no_slider_that_moves(model, digits):
    explorer = PruningExplorer(model, digits, granularity="neuron", evaluate=20)
    assert {name: slider.disabled for name, slider in explorer.own.items()} == {
        "hidden_1": False,
        "hidden_2": False,
        "output": True,
    }
    explorer.granularity.value = "weight"
    assert not any(slider.disabled for slider in explorer.own.values())


def test_a_score_offers_what_it_can_remove(model, digits):
    explorer = PruningExplorer(model, digits, granularity="neuron", evaluate=20)
    explorer.score.value = "wanda"
    assert [kind for _, kind in explorer.granularity.options] == ["weight"]
    assert explorer.visited["granularity"].tolist() == ["neuron", "weight"], "one picture for one move"


# -- what it costs, and what goes --------------------------------------------------------------------------------------


def test_work_and_bytes_are_those_of_the_cost_module():
    net = models.build(settings.Model("lenet_5"), (1, 28, 28), 10, 0)
    x, y = torch.rand(4, 1, 28, 28), torch.zeros(4, dtype=torch.long)
    explorer = PruningExplorer(net, (x, y), rate=0.75)
    weights = cost.summarise(net, (1, 28, 28), explorer.masks)
    assert explorer._subject.work(explorer.masks) == (weights.effective_macs, weights.macs)
    assert "effective MACs of 2.29M" in explorer._screen.facts.value
    assert f"<b>{view.size(4 * weights.weights)}</b>" in explorer._screen.facts.value
    assert "non-zero weights of 1.72 MB" in explorer._screen.facts.value


def test_a_model_whose_work_cannot_be_counted_is_explored_without_it(model, digits, monkeypatch):
    monkeypatch.setattr(pruning.cost, "work", lambda *_: (_ for _ in ()).throw(PrunelabError("no")))
    explorer = PruningExplorer(model, digits, evaluate=20)
    assert "MACs" not in explorer._screen.facts.value
    assert "non-zero weights" in explorer._screen.facts.value


@pytest.mark.parametrize("rate", [0.1, 0.6, 0.99])
def test_the_histogram_counts_the_weights_and_parts_them_at_the_threshold(model, digits, rate):
    explorer = PruningExplorer(model, digits, rate=rate, evaluate=20)
    found = explorer._subject.histogram(explorer._shown, explorer.masks)
    weights = torch.cat([model.get_parameter(name).detach().flatten() for name in explorer.masks])
    keep = torch.cat([mask.flatten() for mask in explorer.masks.values()])
    assert found.edge == float(weights.abs().max())
    expected = torch.histc(weights, pruning.BINS, -found.edge, found.edge)
    assert np.abs(np.cumsum(found.there) - expected.cumsum(0).numpy()).max() <= 2, "rounding at the edges of the bins"
    assert (sum(found.there), sum(found.kept)) == (3560, explorer.masks.kept)
    assert float(weights[~keep].abs().max()) <= found.threshold <= float(weights[keep].abs().min())
    assert f"|w| = {found.threshold:.3g}" in explorer._screen.bars.value


def test_without_one_size_that_parts_them_no_threshold_is_drawn(model, digits):
    explorer = PruningExplorer(model, digits, scope="layer", rate=0.6, evaluate=20)
    assert "no one threshold" in explorer._screen.bars.value
    assert 'class="cut"' not in explorer._screen.bars.value
    explorer.layer.value = "hidden_2"
    assert "|w| = " in explorer._screen.bars.value
    assert "of 800 are kept" in explorer._screen.bars.value
    assert len(explorer.visited) == 1, "to look at a layer is no move"
    explorer.score.value = "random"
    assert 'class="cut"' not in explorer._screen.bars.value
    explorer.rate.value = 0.0
    assert "all are kept" in explorer._screen.bars.value


def test_the_units_of_each_layer_are_counted(model, digits):
    explorer = PruningExplorer(model, digits, granularity="neuron", rate=0.5, evaluate=20)
    left = [int(explorer.masks[f"{layer}.weight"].any(1).sum()) for layer in ("hidden_1", "hidden_2")]
    assert sum(left) == 30
    table = explorer._screen.table.value
    assert f"<td>{left[0]} of 40</td>" in table
    assert f"<td>{left[1]} of 20</td>" in table
    assert "<td>10 of 10</td>" in table


def test_the_network_is_drawn_on_request_and_follows_the_slider(model, digits):
    explorer = PruningExplorer(model, digits, rate=0.5, evaluate=20)
    assert "<table>" in explorer._screen.table.value
    explorer.view.value = "network"
    assert 'aria-label="Network at a pruning rate of 50 %. Live units: in' in explorer._screen.table.value
    explorer.rate.value = 0.98
    into = explorer.masks["hidden_2.weight"].any(1)
    live = int((into & explorer.masks["output.weight"].any(0)).sum()), int(explorer.masks["output.weight"].any(1).sum())
    assert live[0] < 20
    assert f"hidden_2 {live[0]} of 20, output {live[1]} of 10." in explorer._screen.table.value
    assert len(explorer.visited) == 2, "to look at it is no move"
    explorer.view.value = "units"
    assert "<table>" in explorer._screen.table.value


def test_a_network_whose_layers_do_not_follow_one_by_one_is_drawn_as_bars(digits):
    net = models.build(settings.Model("resnet20"), digits.shape, 10, 0)
    explorer = PruningExplorer(net, digits, rate=0.5, evaluate=2)
    explorer.view.value = "network"
    assert "weights left per layer at a pruning rate of 50 %" in explorer._screen.table.value


@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_units_that_are_gone_whole_are_left_out_where_that_saves_time(digits, rate, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.BatchNorm2d(12)),
        *(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(108, 20), nn.ReLU(), nn.Linear(20, 10)),
    )
    for norm in (net[1], net[4]):
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.normal_(norm.bias)
    explorer = PruningExplorer(net, digits, granularity="unit", rate=rate)
    subject, x, y = explorer._subject, explorer._subject._sample.x, explorer._subject._sample.y
    assert subject._smaller(explorer.masks) is None, "so small a network is measured before it is made smaller"
    monkeypatch.setattr(pruning, "LARGE", 0)
    small = subject._smaller(explorer.masks)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        torch.testing.assert_close(small(x), explorer.model(x), rtol=1e-4, atol=1e-5)
    assert subject.value(explorer.masks) == measured(net, explorer.masks, x, y)
    explorer.granularity.value = "weight"
    assert subject._smaller(explorer.masks) is None


# -- a network that is slow to measure ---------------------------------------------------------------------------------


def moved_by_a_person(explorer, index):
    """As the browser's message does it: inside the kernel's loop."""
    explorer.rate.set_state({"index": index})


def test_a_part_of_the_sample_comes_first_and_is_called_so(model, digits, monkeypatch):
    explorer = PruningExplorer(model, digits, rate=0.5)
    monkeypatch.setattr(live, "HURRY", -1.0)
    explorer._subject._sample.take_fewer(10**12)  # 16 samples at a time

    async def drag():
        moved_by_a_person(explorer, 70)
        seen = [str(explorer)]
        visited = len(explorer.visited)
        moved_by_a_person(explorer, 80)  # the rest of 70 % is never measured
        while explorer._rest is not None:
            await asyncio.sleep(0.01)
        return seen[0], visited

    first, visited = asyncio.run(drag())
    assert "70 % (sparsity 0.700) accuracy on 16 of 150 validation images, so far, is" in first
    assert visited == 1
    assert explorer.visited["rate"].tolist() == [0.5, 0.8]
    x, y = explorer._subject._sample.x, explorer._subject._sample.y
    assert explorer.visited["accuracy"].iloc[-1] == measured(model, explorer.masks, x, y)
    assert "80 % (sparsity 0.800) accuracy on 150 validation images is" in str(explorer)
    assert explorer._screen.curve.value.count('class="visited"') == 2


def test_a_program_gets_the_whole_answer_at_once(model, digits, monkeypatch):
    explorer = PruningExplorer(model, digits, rate=0.5)
    monkeypatch.setattr(live, "HURRY", -1.0)
    explorer._subject._sample.take_fewer(10**12)

    async def move():
        explorer.rate.value = 0.7
        return str(explorer)

    assert "on 150 validation images is" in asyncio.run(move())
    moved_by_a_person(explorer, 80)  # where no kernel runs
    assert "on 150 validation images is" in str(explorer)


def test_an_error_in_the_rest_is_shown(model, digits, monkeypatch):
    explorer = PruningExplorer(model, digits, rate=0.5)
    monkeypatch.setattr(live, "HURRY", -1.0)

    def broken(_):
        yield 1, 16
        raise RuntimeError("no more today")

    monkeypatch.setattr(explorer._subject, "answers", broken)

    async def move():
        moved_by_a_person(explorer, 70)
        await asyncio.sleep(0.2)

    asyncio.run(move())
    assert [output["evalue"] for output in explorer._screen.errors.outputs] == ["no more today"]
    with pytest.raises(RuntimeError, match="no more today"):
        explorer.check()


# -- back, and aside ---------------------------------------------------------------------------------------------------


def test_undo_goes_back_one_change_at_a_time(model, digits, monkeypatch):
    monkeypatch.setattr(live, "PAUSE", -1.0)
    explorer = PruningExplorer(model, digits, rate=0.5, evaluate=50)
    assert explorer.buttons["undo"].disabled
    seen = [str(explorer)]
    for change in (
        lambda: setattr(explorer.rate, "value", 0.9),
        lambda: setattr(explorer.score, "value", "wanda"),
        lambda: setattr(explorer.own["hidden_2"], "value", 0.1),
        lambda: setattr(explorer.seed, "value", 7),
    ):
        change()
        seen.append(str(explorer))
    for expected in seen[-2::-1]:
        explorer.buttons["undo"].click()
        assert str(explorer) == expected
    assert (explorer.rate.value, explorer.score.value, explorer.seed.value) == (0.5, "magnitude", 0)
    assert explorer.own["hidden_2"].value == controls.ABOVE
    assert explorer.buttons["undo"].disabled
    explorer.undo()
    assert str(explorer) == seen[0]


def test_a_drag_is_undone_as_one_change(model, digits):
    explorer = PruningExplorer(model, digits, rate=0.5, evaluate=50)
    for rate in (0.6, 0.7, 0.8):
        explorer.rate.value = rate
    explorer.scope.value = "layer"
    explorer.undo()
    assert "80 %" in str(explorer)
    explorer.undo()
    assert "50 %" in str(explorer)


def test_masks_that_are_kept_stay_while_the_slider_goes_on(model, digits):
    explorer = PruningExplorer(model, digits, rate=0.5, evaluate=50)
    assert explorer.kept is None
    explorer.buttons["keep these masks"].click()
    explorer.rate.value = 0.9
    assert explorer.kept == prunelab.prune(model, "magnitude", 0.5)
    assert explorer.keep() == explorer.kept == explorer.masks
    assert "sparsity 0.900" in explorer._controls.note.value
