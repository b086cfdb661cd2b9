"""DyPrune's rate and trigger, on numbers worked out by hand."""

import math

import numpy as np
import pytest

from prunelab.pruners.schedules import Trigger, dyprune_path, dyprune_rate, relative_gradient


@pytest.mark.parametrize(
    ("weights", "rate"),
    [
        (0, 0),
        (403, 0),
        (404, 0.000141),
        (1000, 0.090776),
        (10_000, 0.321034),
        (100_000, 0.551293),
        (1_000_000, 0.781551),
    ],
)
def test_rate_follows_the_published_formula(weights, rate):
    assert dyprune_rate(weights) == pytest.approx(rate, abs=5e-7)


def test_rate_is_capped_from_three_million_weights_on():
    assert dyprune_rate(3_269_018) == 0.9
    assert dyprune_rate(10**9) == 0.9
    assert dyprune_rate(3_269_016) < 0.9


def test_ideal_path_of_the_paper_network():
    assert dyprune_path(2_794_000, 8) == [2_794_000, 323_270, 107_124, 47_330, 24_778, 14_575, 9_347, 6_409, 4_637]


def test_nothing_is_removed_from_408_weights_down():
    assert dyprune_path(408, 1) == [408, 408]
    assert dyprune_path(409, 1) == [409, 408]


def test_relative_gradient_compares_each_fall_with_the_steepest_so_far():
    # falls: -1.0, -0.5, +0.2, -2.0
    ratios = relative_gradient([4.0, 3.0, 2.5, 2.7, 0.7])
    assert math.isnan(ratios[0])
    np.testing.assert_allclose(ratios[1:], [1.0, 0.5, -0.2, 1.0])


def test_relative_gradient_is_undefined_until_the_loss_has_fallen():
    assert np.isnan(relative_gradient([1.0, 2.0, 3.0])).all()
    assert relative_gradient([]).size == 0


SLOW = [4.0, 3.0, 2.98, 2.97, 2.96, 2.95, 2.94, 2.93]  # steep once, then at 1 to 2 % of that


def test_dynamic_trigger_waits_for_the_plateau_then_for_its_cooldown():
    trigger = Trigger("dynamic")
    pruned: list[int] = []
    for now in range(len(SLOW)):
        if trigger.due(SLOW[: now + 1], 25, pruned[-1] if pruned else None):
            pruned.append(now)
    assert pruned == [2, 5]


def test_rising_loss_never_triggers_dynamic_pruning():
    assert not Trigger("dynamic").due([4.0, 3.0, 3.001], 25)


def test_static_trigger_counts_epochs_from_zero_and_needs_one_fall():
    trigger = Trigger("static", every=2)
    losses = [4.0, 3.0, 3.5, 3.6, 3.7, 3.8]
    assert [t for t in range(6) if trigger.due(losses[: t + 1], 25)] == [2, 4]
    assert not trigger.due([1.0, 2.0, 3.0], 25)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_no_pruning_after_the_last_epoch(kind):
    assert Trigger(kind, every=2).due(SLOW[:3], 4)
    assert not Trigger(kind, every=2).due(SLOW[:3], 3)


def test_published_static_schedules_prune_as_often_as_reported():
    losses = list(np.linspace(3, 1, 25))
    for every, expected in [(2, 11), (4, 5)]:
        trigger = Trigger("static", every=every)
        assert sum(trigger.due(losses[: t + 1], 25) for t in range(25)) == expected
