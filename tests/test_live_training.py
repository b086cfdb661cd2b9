"""Fine-tuning in the explorer: the package's trainer, in a thread that can be watched and stopped."""

import copy
import gc
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest
import torch

import prunelab
from prunelab import data, models, settings
from prunelab.errors import PrunelabError
from prunelab.lab.live import PruningExplorer
from prunelab.training.train import Member, Population, generator

TUNING = settings.Train(lr=0.01, batch_size=32)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        return data.load("digits")


@pytest.fixture
def model(digits):
    return models.build(settings.Model("mlp", hidden=(40, 20)), digits.shape, 10, seed=0)


@pytest.fixture
def explorer(model, digits):
    made = PruningExplorer(model, digits, rate=0.8, tuning=TUNING)
    yield made
    made.stop()
    if made._tuning is not None:
        made._tuning.join(10)


@pytest.fixture
def held(explorer):
    """Lets a training begin and waits until it is in its first batch; it goes on when ``held`` is set."""
    begun, go_on, report = threading.Event(), threading.Event(), explorer._report

    def wait(done, total):
        report(done, total)
        begun.set()
        assert go_on.wait(10)

    explorer._report = wait
    explorer.buttons["fine-tune 1 epoch"].click()
    assert begun.wait(10)
    yield go_on
    go_on.set()


def same(model, other):
    return all(torch.equal(value, other[name]) for name, value in model.state_dict().items())


def test_an_epoch_is_that_of_the_trainer_with_the_pruned_weights_held_at_zero(explorer, model, digits):
    masks = explorer.masks
    explorer.fine_tune(wait=True)
    member = Member(copy.deepcopy(model), TUNING, masks, generator(0, "order"))
    Population(digits).epoch([member])
    assert same(explorer.model, member.model.state_dict())
    assert all(not explorer.model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    assert "after 1 epoch of fine-tuning accuracy" in str(explorer)
    x, y = digits.scale(digits.validation.x), digits.validation.y
    with torch.no_grad():
        right = (member.model.eval()(x).argmax(1) == y).double().mean().item()
    assert explorer.visited.iloc[-1][["network", "epochs", "accuracy"]].tolist() == [1, 1, right]


def test_whole_neurons_that_are_gone_stay_gone(explorer):
    explorer.granularity.value = "neuron"
    masks = explorer.masks
    explorer.fine_tune(wait=True)
    assert explorer.masks == masks
    tuned = explorer.model
    assert all(not tuned.get_parameter(name)[~mask].any() for name, mask in masks.items())


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("granularity", ["weight", "neuron"])
def test_the_rate_still_counts_from_the_whole_network(explorer, scope, granularity):
    explorer.granularity.value, explorer.scope.value, explorer.rate.value = granularity, scope, 0.5
    before = explorer.masks
    explorer.fine_tune(wait=True)
    explorer.rate.value = 0.75
    tuned = explorer._subject.network()
    options = {"granularity": granularity, "scope": scope, "allow_empty": True}
    assert explorer.masks == prunelab.prune(tuned, "magnitude", 0.5, current=before, **options)
    explorer.rate.value = 0.2
    assert explorer.masks == before
    assert "What was gone before the fine-tuning stays gone." in str(explorer)


def test_undo_brings_the_weights_back(explorer, model):
    accuracy = str(explorer)
    explorer.fine_tune(wait=True)
    explorer.fine_tune(wait=True)
    assert "after 2 epochs" in str(explorer)
    assert explorer._screen.curve.value.count('class="past"') == 2
    explorer.undo()
    assert "after 1 epoch " in str(explorer)
    explorer.undo()
    assert str(explorer) == accuracy
    assert same(explorer._subject.network(), model.state_dict())
    explorer.rate.value = 0.5  # not from memory
    assert explorer.masks == prunelab.prune(model, "magnitude", 0.5)


def test_while_it_trains_only_stop_can_be_pressed_and_stopping_changes_nothing(explorer, held, model):
    before, others = str(explorer), [b for name, b in explorer.buttons.items() if name != "stop"]
    assert all(control.disabled for control in (explorer.rate, explorer.score, explorer.own["output"], *others))
    assert explorer.progress.layout.display == ""
    assert (explorer.progress.value, explorer.progress.max) == (1, 43)  # of 1,350 samples, 32 at a time
    with pytest.raises(PrunelabError, match="a fine-tuning is under way"):
        explorer.undo()
    with pytest.raises(PrunelabError, match="a fine-tuning is under way"):
        explorer.fine_tune()
    explorer.buttons["stop"].click()
    held.set()
    explorer._tuning.join(10)
    assert str(explorer) == before
    assert same(explorer._subject.network(), model.state_dict())
    assert "Stopped" in explorer._controls.note.value
    assert explorer.progress.layout.display == "none"
    assert not explorer.rate.disabled
    assert explorer.buttons["stop"].disabled
    assert explorer.buttons["undo"].disabled


def test_the_second_press_of_a_double_click_does_nothing(explorer, held):
    """The browser sends it before it has heard that the button is off."""
    shown = explorer._screen.curve.value
    for name in ("fine-tune 1 epoch", "undo", "sweep", "keep these masks"):
        explorer.buttons[name].click()
    assert (explorer._screen.errors.outputs, explorer._screen.curve.value, explorer.kept) == ((), shown, None)
    held.set()
    explorer._tuning.join(10)
    explorer.buttons["undo"].click()
    assert "fine-tuning" not in str(explorer)
    explorer.check()


def test_closing_ends_the_training_and_lets_go_of_the_network(model, digits):
    explorer = PruningExplorer(model, digits, rate=0.8, evaluate=50, tuning=TUNING)
    explorer.fine_tune()
    tuning, network = explorer._tuning, weakref.ref(explorer._subject.module)
    explorer.close()
    tuning.join(10)
    assert not tuning.is_alive()
    del explorer, tuning
    gc.collect()
    assert network() is None


def test_the_given_model_is_not_trained(explorer, model):
    before = copy.deepcopy(model.state_dict())
    explorer.fine_tune(wait=True)
    assert same(model, before)
    assert not same(explorer.model, before)


def test_a_training_that_fails_is_shown_and_raised_by_check(model, digits):
    wild = PruningExplorer(model, digits, rate=0.5, tuning=settings.Train(optimiser="sgd", lr=1e30))
    with pytest.raises(PrunelabError, match="the loss was not finite"):
        wild.fine_tune(wait=True)
    (shown,) = wild._screen.errors.outputs
    assert "not finite" in shown["evalue"]
    assert not wild.buttons["fine-tune 1 epoch"].disabled
    with pytest.raises(PrunelabError, match="not finite"):
        wild.check()


def test_without_a_training_part_there_is_nothing_to_press(model, digits):
    explorer = PruningExplorer(model, (digits.scale(digits.test.x), digits.test.y), rate=0.5)
    assert explorer.buttons["fine-tune 1 epoch"].disabled
    with pytest.raises(PrunelabError, match="needs a training part"):
        explorer.fine_tune()


def test_convolutions_with_batch_norm_are_trained_too(digits):
    layers = [torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(288, 10))
    explorer = PruningExplorer(net, digits, granularity="filter", rate=0.5, tuning=TUNING)
    means = explorer._subject.network()[1].running_mean
    explorer.fine_tune(wait=True)
    assert explorer.masks["0.weight"].any((1, 2, 3)).sum() == 4
    assert not torch.equal(explorer.model[1].running_mean, means)
    assert explorer.visited["accuracy"].iloc[-1] > 0.5


def test_a_training_ends_with_its_process():
    code = """
        import threading
        from prunelab import data, models, settings
        from prunelab.lab.live import PruningExplorer

        digits, begun = data.load("digits"), threading.Event()
        model = models.build(settings.Model("mlp", hidden=(40, 20)), digits.shape, 10, seed=0)
        explorer = PruningExplorer(model, digits, tuning=settings.Train(batch_size=1))
        report = explorer._report
        explorer._report = lambda *at: (report(*at), begun.set())
        explorer.fine_tune()
        assert begun.wait(20)
        print("the main thread ends here", explorer.progress.value)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("the main thread ends here")
