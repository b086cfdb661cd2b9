"""The schedule designer: curves follow the controls, settings come out, errors are seen."""

import pytest

from prunelab import plots
from prunelab.errors import PrunelabError
from prunelab.lab.designer import ScheduleDesigner
from prunelab.pruners import build
from prunelab.pruners.schedules import Ramp


def test_what_is_shown_is_what_is_handed_out():
    designer = ScheduleDesigner("one_cycle", 0.9, epochs=20)
    assert designer.settings.options == {
        "schedule": "one_cycle",
        "sparsity": 0.9,
        "start": 0.0,
        "alpha": 14.0,
        "beta": 5.0,
    }
    designer.final.value = 95
    designer.beta.value = 7
    assert build(designer.settings).ramp == designer.ramp == Ramp("one_cycle", 0.95, 0.0, 14.0, 7.0, 3)
    assert "50 % of the training" in designer.sentence.value
    assert "beta&#x27;: 7.0" in designer.code.value
    assert "alt=" in designer.picture.value


def test_a_schedule_brings_its_own_beginning_and_its_own_controls():
    designer = ScheduleDesigner()
    assert (designer.alpha.disabled, designer.steps.disabled) == (False, True)
    designer.kind.value = "iterative"
    assert (designer.begin.value, designer.alpha.disabled, designer.steps.disabled) == (20, True, False)
    assert designer.settings.options["steps"] == 3
    before = designer.picture.value
    designer.steps.value = 6
    assert designer.picture.value != before
    designer.check()


def test_a_schedule_that_is_none_is_refused():
    with pytest.raises(PrunelabError, match="schedule 'onecycle': did you mean 'one_cycle'"):
        ScheduleDesigner("onecycle")


@pytest.mark.parametrize("epochs", [0, "8", True])
def test_epochs_that_are_none_are_refused(epochs):
    with pytest.raises(PrunelabError, match=r"ScheduleDesigner: epochs = .*: should be a whole number"):
        ScheduleDesigner(epochs=epochs)


def test_what_was_asked_for_is_not_cut_to_the_length_of_a_slider():
    designer = ScheduleDesigner(final=0.99955)
    assert designer.settings.options["sparsity"] == 0.99955


def test_an_error_is_shown_and_kept(monkeypatch):
    designer = ScheduleDesigner()

    def broken(*_, **__):
        raise ValueError("no ink")

    monkeypatch.setattr("prunelab.lab.designer.schedule_curves", broken)
    with pytest.raises(ValueError, match="no ink"):
        designer.final.value = 50
    assert designer.errors.outputs[0]["evalue"] == "no ink"
    with pytest.raises(ValueError, match="no ink"):
        designer.check()


def test_curves_say_their_numbers():
    picture = plots.schedule_curves({"mine": Ramp("linear", 0.8), "other": Ramp("agp", 0.8)}, epochs=10)
    assert "mine: 0.0 % at 0, 20.0 % at 0.25, 40.0 % at 0.5" in picture.alt
