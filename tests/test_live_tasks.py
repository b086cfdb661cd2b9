"""The explorer on any data and any task: what it takes, how it measures, who pays, and what can be taken home."""

import asyncio
import copy
import io
import re

import numpy as np
import pytest
import torch
from matplotlib import image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import prunelab
from prunelab import data, models, settings
from prunelab.errors import PrunelabError
from prunelab.lab.live import PruningExplorer
from prunelab.lab.live import explorer as live
from prunelab.runs.columns import short
from prunelab.structure import cost, export
from prunelab.structure.shrink import remove_dead


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        return data.load("digits")


@pytest.fixture(scope="module")
def model(digits):
    net = models.build(settings.Model("mlp", hidden=(40, 20)), digits.shape, 10, seed=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    x = digits.scale(digits.train.x)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), digits.train.y).backward()
        optimizer.step()
    return net


def text(widget):
    return re.sub("<[^>]*>", "", widget.value)


def below(explorer):
    return text(explorer._screen.table)


def right(model, masks, x, y):
    other = copy.deepcopy(model).eval()
    masks.apply_(other)
    with torch.no_grad():
        return other(x).argmax(-1) == y


# -- whatever holds samples --------------------------------------------------------------------------------------------


class Pairs(Dataset):
    classes = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, at):
        return self.x[at], int(self.y[at])


class Stream(IterableDataset):
    def __init__(self, pairs):
        self.pairs = pairs

    def __iter__(self):
        return iter(self.pairs)


def test_data_come_in_any_form(model, digits):
    x, y = digits.scale(digits.validation.x), digits.validation.y
    loader = DataLoader(TensorDataset(x, y), batch_size=40)
    forms = {
        "150 images": [
            (x, y),
            [x, y],
            [(x, y)],
            [(x[:50], y[:50]), (x[50:], y[50:])],
            Pairs(x, y),
            TensorDataset(x, y),
        ],
        "the first 150 images": [loader, DataLoader(Stream(list(zip(x, y, strict=True))), batch_size=40)],
        "150 validation images": [digits],
    }
    values = set()
    for what, each in forms.items():
        for form in each:
            explorer = PruningExplorer(model, form, rate=0.8)
            assert explorer.sample == what
            values.add(explorer.visited["accuracy"].iloc[0])
    assert len(values) == 1
    assert PruningExplorer(model, loader, evaluate=50).sample == "the first 50 images"
    on_test = PruningExplorer(model, digits, part="test")
    assert "accuracy on 297 test images is" in str(on_test)


def test_two_inputs_are_a_tuple(digits):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x, y):
            return self.c(torch.relu(self.a(x)) + torch.relu(self.b(y)))

    torch.manual_seed(0)
    x, y = (torch.randn(60, 4), torch.randn(60, 4)), torch.arange(60) % 3
    explorer = PruningExplorer(Two(), (x, y), rate=0.5, evaluate=30)
    assert explorer.visited["accuracy"].iloc[0] <= 1
    assert "effective MACs of 88" in explorer._screen.facts.value


NET = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
X, Y = torch.randn(30, 4), torch.arange(30) % 3


@pytest.mark.parametrize(
    ("given", "how", "words"),
    [
        (None, {}, "data is None: give samples"),
        (X, {}, "data is a Tensor: give a data set, (inputs, targets)"),
        ("digits", {}, "data is a str: give a data set"),
        (DataLoader([{"x": X[0], "y": 1}]), {}, "data gives a dict: give batches of (inputs, targets)"),
        ([], {}, "data is a list: give a data set"),
        ((X, Y[:5]), {}, "30 inputs and 5 labels"),
        ((X, Y[:, None]), {}, "labels should be [N], as targets[:, 0]"),
        ((X, Y + 1), {}, "label 3 of sample"),
        ((X[:, :3], Y), {}, "Sequential does not take the inputs: mat1 and mat2"),
        ((X, torch.randn(30)), {}, "which is no classification: give metric="),
        ((X, Y), {"metric": 3}, "metric = 3: should be a function"),
        ((X, Y), {"metric": max, "loss": max}, "metric= and loss= are given"),
        ((X, Y), {"evaluate": len, "metric": max}, "evaluate= is a function, and metric="),
        ((X, Y), {"evaluate": lambda _: {"a": float("nan")}}, "gave a = nan: should give name -> number"),
        ((X, Y), {"evaluate": lambda _: {}}, "gave nothing: should give name -> number"),
        ((X, Y), {"evaluate": lambda _: 1 / 0}, "failed: ZeroDivisionError: division by zero"),
        ((X, Y), {"better": "more"}, "better = 'more'"),
        ((X, Y), {"state": {"rate": 0.5}}, "state has rate: should be explorer.state, with method,"),
        ((X, Y), {"state": 5}, "state has a int"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(given, how, words):
    with pytest.raises(PrunelabError, match=re.escape(words)) as caught:
        PruningExplorer(NET, given, **how)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_data_set_without_a_validation_part_says_what_to_do(model, digits):
    whole = data.load(settings.Data("digits", validation=0))
    with pytest.raises(PrunelabError, match=r"digits has no validation sample: .* say part='test'"):
        PruningExplorer(model, whole)
    with pytest.raises(PrunelabError, match="part = 'train': should be"):
        PruningExplorer(model, whole, part="train")


# -- any task ----------------------------------------------------------------------------------------------------------


def test_regression_is_measured_by_rmse():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 1)), torch.randn(600, 6)
    with torch.no_grad():
        y = net(x)[:, 0] + 0.1
    explorer = PruningExplorer(net, (x, y), rate=0.5, evaluate=600)
    with torch.no_grad():
        error = (explorer.model(x)[:, 0] - y).square().mean().sqrt().item()
    assert explorer.visited["RMSE"].iloc[0] == pytest.approx(error, rel=1e-5)
    assert f"RMSE on 600 samples is {error:.3g}, dense 0.1." in str(explorer)
    assert ">dense 0.1<" in explorer._screen.curve.value
    assert "points" not in str(explorer)
    explorer.view.value = "classes"
    assert "no classes" in below(explorer)
    steep = PruningExplorer(net, (x, y), method="taylor", rate=0.5, batches=[(x, y[:, None])])
    how = {"batches": [(x, y[:, None])], "loss": nn.functional.mse_loss, "allow_empty": True}
    assert steep.masks == prunelab.prune(net, "taylor", 0.5, **how)
    assert "loss=torch.nn.functional.mse_loss" in steep.code


def test_segmentation_is_measured_by_the_mean_iou():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    x = torch.randn(40, 1, 8, 8)
    with torch.no_grad():
        y = net(x).argmax(1)
    y[:, 0] = 255  # not counted
    explorer = PruningExplorer(net, (x, y), rate=0.6)
    with torch.no_grad():
        answers = explorer.model(x).argmax(1)
    shares = []
    for label in range(3):
        mine, yours = (answers == label) & (y != 255), y == label
        shares.append(((mine & yours).sum() / (mine | yours).sum()).item())
    assert explorer.visited["mean IoU"].iloc[0] == pytest.approx(np.mean(shares), abs=1e-6)
    assert "mean IoU on 40 images is" in str(explorer)
    assert "dense 100.0 %" in str(explorer)


def test_metric_loss_and_a_function_of_the_model_take_the_place_of_the_usual_measure(model, digits):
    x, y = digits.scale(digits.validation.x), digits.validation.y
    explorer = PruningExplorer(model, digits, loss=nn.functional.cross_entropy, rate=0.5)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(explorer.model(x), y).item()
    assert explorer.visited["loss"].iloc[0] == pytest.approx(expected, rel=1e-5)

    def evaluate(net):
        with torch.no_grad():
            answers = net(x).argmax(1)
        return {"errors": int((answers != y).sum()), "nines": int((answers == 9).sum())}

    own = PruningExplorer(model, evaluate=evaluate, better="lower", rate=0.9)
    assert own.visited["errors"].iloc[0] == int((~right(model, own.masks, x, y)).sum())
    assert re.search(r"errors is \d+, dense \d+\.", str(own))
    assert "nines" in own._screen.facts.value
    own.pin()
    own.score.value = "random"
    assert re.search(r"Pinned, magnitude \(weights\), is at \d+ there: \d+ (better|worse)\.", str(own))


# -- who pays ----------------------------------------------------------------------------------------------------------


def test_the_classes_that_lose_most_are_named_and_counted(model, digits):
    x, y = digits.scale(digits.validation.x), digits.validation.y
    explorer = PruningExplorer(model, digits, rate=0.85)
    now, dense = (right(model, masks, x, y) for masks in (explorer.masks, prunelab.Masks({})))
    gaps = {
        int(label): (now[y == label].double().mean() - dense[y == label].double().mean()).item() for label in y.unique()
    }
    worst = min(gaps.values())
    named = re.search(r"Class (\d) loses most, from ([\d.]+) % to ([\d.]+) %", str(explorer))
    assert gaps[int(named[1])] == pytest.approx(worst)
    assert float(named[3]) - float(named[2]) == pytest.approx(100 * worst, abs=0.11)
    explorer.view.value = "classes"
    rows = re.findall(r"<tr><th>(\d)</th>.*?<td>(\d+)</td>.*?([-+][\d.]+) points", explorer._screen.table.value)
    assert {int(name): int(n) for name, n, _ in rows} == {int(label): int((y == label).sum()) for label in y.unique()}
    assert [float(gap) for *_, gap in rows] == sorted(float(gap) for *_, gap in rows)
    explorer.view.value = "confusion"
    cells = np.array(
        [int(n or 0) for n in re.findall(r'<td style="background[^>]*>(\d*)</td>', explorer._screen.table.value)]
    )
    assert cells.reshape(10, 10).trace() == int(now.sum())
    assert cells.sum() == 150
    explorer.rate.value = 0.0
    assert "loses most" not in str(explorer)


def test_samples_whose_answer_changed_are_shown(model, digits):
    explorer = PruningExplorer(model, digits, rate=0.85)
    explorer.view.value = "changed"
    x = explorer._subject._sample.x
    with torch.no_grad():
        before, after = model(x).argmax(1), explorer.model(x).argmax(1)
    different = before != after
    assert f"{int(different.sum())} of 150 answers differ" in below(explorer)
    pictures = re.findall(r'<img alt="(\d) → (\d) \((\d)\)"', explorer._screen.table.value)
    assert len(pictures) == 10
    first = int(different.nonzero()[0])
    assert pictures[0] == tuple(str(int(own[first])) for own in (before, after, explorer._subject.labels))


# -- rates, and two at once --------------------------------------------------------------------------------------------


def test_a_rate_can_be_typed_and_chosen_as_a_compression(model, digits):
    explorer = PruningExplorer(model, digits, rate=0.5, evaluate=20)
    explorer.percent.value = 97.3
    assert (explorer.rate.value, round(explorer.compression.value, 1)) == (0.973, 37.0)
    assert "pruning rate of 97.3 %" in str(explorer)
    explorer.compression.value = 20
    assert (explorer.rate.value, explorer.percent.value) == (0.95, 95)
    explorer.rate.value = 0.999
    assert (explorer.percent.value, explorer.compression.value) == (99.9, pytest.approx(1000))
    explorer.rate.value = 0.7
    explorer.compression.value = 10**0.52  # so the browser rounds 3.33 to its own steps
    assert explorer.rate.value == 0.7
    assert explorer.visited["rate"].tolist() == [0.5, 0.973, 0.95, 0.999, 0.7], "one picture for each"
    flat = explorer._screen.curve.value
    explorer.axis.value = "compression"
    assert "log axis" in explorer._screen.curve.value != flat
    assert len(explorer.visited) == 5


def test_a_curve_stays_when_the_setting_changes_and_a_pinned_one_moves_along(model, digits):
    explorer = PruningExplorer(model, digits, rate=0.5, evaluate=60)
    explorer.rate.value = 0.7
    explorer.score.value = "random"
    curve = explorer._screen.curve.value
    assert curve.count('class="other"') == 1
    assert "magnitude (weights)" in curve
    assert curve.count('class="visited"') == 1
    explorer.undo()
    explorer.pin()
    explorer.score.value = "random"
    explorer.rate.value = 0.9
    found = explorer.visited.set_index(["method", "rate"])["accuracy"]
    gap = 100 * (found["random", 0.9] - found["magnitude", 0.9])
    assert f"Pinned, magnitude (weights), is at {100 * found['magnitude', 0.9]:.1f} % there: " in str(explorer)
    assert f"{abs(gap):.1f} points {'worse' if gap > 0 else 'better'}." in str(explorer)
    assert explorer._screen.curve.value.count('class="pinned"') == 1
    explorer.scope.value = "layer"
    assert "By random (weights, each layer by itself), at" in str(explorer)
    assert explorer.masks == prunelab.prune(model, "random", 0.9, scope="layer", allow_empty=True)
    explorer.score.value, explorer.scope.value = "magnitude", "global"
    explorer.buttons["pin"].click()
    assert "Pinned" not in str(explorer)


# -- what can be taken home --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "granularity", "own"),
    [
        ("magnitude", "weight", {}),
        ("taylor", "neuron", {}),
        ("magnitude", "weight", {"hidden_1": 0.25}),
        ("l2_neuron", "neuron", {}),
    ],
)
def test_the_code_makes_the_masks_that_are_shown(model, digits, method, granularity, own):
    explorer = PruningExplorer(
        model, digits, method=method, granularity=granularity, scope="layer", rate=0.6, evaluate=20
    )
    for layer, rate in own.items():
        explorer.own[layer].value = rate
    explorer.buttons["copy as code"].click()
    code = text(explorer._controls.code)
    names = {"model": copy.deepcopy(model), "images": digits}
    exec(explorer.code, names)
    assert names["masks"] == explorer.masks
    assert "prune(model, &#x27;" in code
    explorer.rate.value = 0.5
    assert "0.5" in text(explorer._controls.code)


def test_code_that_would_give_other_masks_reads_a_file(model, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    explorer = PruningExplorer(model, digits, method="random", rate=0.6, evaluate=20)
    explorer.own["hidden_1"].value = 0.25
    explorer.buttons["save masks"].click()
    names = {}
    exec(explorer.code, names)
    assert names["masks"] == explorer.masks
    assert str(tmp_path) in text(explorer._controls.note)


def test_the_small_model_has_the_answers_of_the_one_that_is_shown(model, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    explorer = PruningExplorer(model, digits, granularity="neuron", rate=0.5, evaluate=20)
    explorer.buttons["save small model"].click()
    small, _ = export.load(tmp_path / "model_magnitude_neuron_50.safetensors", model)
    x = digits.scale(digits.validation.x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), explorer.model(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_what_shrinking_gives_is_measured_when_the_hand_rests(model, digits, monkeypatch):
    monkeypatch.setattr(live, "SETTLED", 0.05)
    explorer = PruningExplorer(model, digits, granularity="neuron", rate=0.3, evaluate=20)

    async def move():
        explorer.rate.set_state({"index": 40})
        explorer.rate.set_state({"index": 50})
        for _ in range(100):
            await asyncio.sleep(0.05)
            if "shrunk" in explorer._screen.facts.value:
                break

    asyncio.run(move())
    small = remove_dead(model, explorer.masks, digits.scale(digits.validation.x[:1])).model
    found = explorer.shrunk()
    assert found["parameters"] == tuple(sum(p.numel() for p in net.parameters()) for net in (small, model))
    assert found["macs"] == tuple(cost.macs(net, digits.shape) for net in (small, model))
    assert all(seconds > 0 for seconds in found["latency"])
    assert f"shrunk: parameters of {short(found['parameters'][1])}" in text(explorer._screen.facts)
    explorer.rate.value = 0.6
    assert "shrunk" not in text(explorer._screen.facts), "of other masks"


def test_a_state_goes_to_another_explorer(model, digits):
    explorer = PruningExplorer(model, digits, method="wanda", scope="layer", rate=0.7, seed=5, evaluate=20)
    explorer.own["hidden_2"].value = 0.1
    again = PruningExplorer(model, digits, state=explorer.state, evaluate=20)
    assert (again.masks, again.state) == (explorer.masks, explorer.state)
    assert again.own["hidden_2"].value == 0.1


def test_it_is_a_picture_and_a_sentence_where_nothing_runs(model, digits):
    explorer = PruningExplorer(model, digits, rate=0.5, evaluate=20)
    explorer.sweep((0.2, 0.8))
    shown = explorer._repr_mimebundle_()
    assert image.imread(io.BytesIO(shown["image/png"])).shape[2] == 4
    assert shown["text/plain"] == str(explorer)
    assert "application/vnd.jupyter.widget-view+json" in shown
