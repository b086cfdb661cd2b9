"""Settings are refused at the door with one line, and name a run for ever."""

import json
import math

import pytest

from prunelab.settings import Data, Model, Prune, Run, SettingsError, Train


def test_ids_never_change():
    """If this fails, every stored run is lost to its users: give the new field a default that changes nothing."""
    run = Run(
        Data("mnist"),
        Model("mlp", (40, 40)),
        prune=Prune("magnitude", amount=0.5, rounds=3, options={"scope": "layer"}),
        seed=3,
    )
    assert run.id == "magnitude-mlp_40_40-mnist-s3-401b46f7"
    assert Run().id == "none-mlp-mnist-s0-44136fa3"


def test_id_depends_on_every_kind_of_field():
    base = Run()
    others = [
        Run(seed=1),
        Run(train=Train(lr=0.1)),
        Run(data=Data("iris")),
        Run(prune=Prune(options={"norm": 2})),
        Run(retrain=Train(epochs=3)),
    ]
    assert len({run.id for run in [base, *others]}) == 6


def test_round_trip_through_json_keeps_the_id():
    run = Run(
        model=Model(hidden=(3, 4)),
        train=Train(lr_milestones=(5, 9)),
        retrain=Train(epochs=2),
        prune=Prune(options={"rate": 0.5, "n": 2}),
    )
    again = Run.fromdict(json.loads(json.dumps(run.asdict())))
    assert again == run
    assert again.id == run.id


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Prune(amount=1.2), "Prune: amount = 1.2: input should be less than 1"),
        (lambda: Train(epohs=3), "Train has no setting 'epohs': did you mean 'epochs'?"),
        (lambda: Train(optimiser="sdg"), "Train: optimiser = 'sdg': input should be 'sgd', 'adam' or 'adamw'"),
        (
            lambda: Train(patience=3, validate_every_epoch=False),
            "Train: patience needs the validation loss of every epoch: leave validate_every_epoch at True",
        ),
        (lambda: Train(lr=math.inf), "Train: lr = inf: input should be a finite number"),
        (lambda: Train(weight_decay=math.inf), "Train: weight_decay = inf: input should be a finite number"),
        (lambda: Train(lr_factor=math.nan), "Train: lr_factor = nan: input should be a finite number"),
        (lambda: Prune("dropneuron", options={"l1": math.nan}), "Prune: options.l1 = nan: should be a finite number"),
        (lambda: Run(seed=-1), "Run: seed = -1: input should be greater than or equal to 0"),
        (lambda: Run(seed=2**63), f"Run: seed = {2**63}: input should be less than or equal to {2**63 - 1}"),
        (
            lambda: Train(batch_size=2**70),
            f"Train: batch_size = {2**70}: input should be less than or equal to {2**63 - 1}",
        ),
        (
            lambda: Data(split_seed=2**70),
            f"Data: split_seed = {2**70}: input should be less than or equal to {2**63 - 1}",
        ),
        (lambda: Data(validation=float("nan")), "Data: validation = nan: should be 0 or more"),
        (lambda: Data(validation=-1), "Data: validation = -1: should be 0 or more"),
        (lambda: Data(train_size=0), "Data: train_size = 0: should be 1 or more"),
        (
            lambda: Data(validation=1.5),
            "Data: validation = 1.5: should be a fraction below 1 or a whole number of samples",
        ),
        (lambda: Run.fromdict({"trian": {}}), "Run has no setting 'trian': did you mean 'train'?"),
        (lambda: Run.fromdict({"train": {"lr": -1}}), "Train: lr = -1: input should be greater than 0"),
    ],
)
def test_a_wrong_setting_is_refused_with_one_line(build, message):
    with pytest.raises(SettingsError) as caught:
        build()
    assert str(caught.value) == message


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError):
        Run().seed = 3


def test_flat_columns_hold_every_setting_once():
    columns = Run(prune=Prune("dyprune", options={"trigger": "static"})).flat()
    assert columns["method"] == "dyprune"
    assert columns["prune.trigger"] == "static"
    assert columns["train.epochs"] == 25
    assert not any(isinstance(value, list | dict) for value in columns.values())


def test_a_run_is_shown_by_its_id_and_what_is_not_default():
    run = Run(Data("digits"), train=Train(epochs=3), prune=Prune("snip", options={"granularity": "<unit>"}))
    shown = run._repr_html_()
    assert f"<caption>{run.id}</caption>" in shown
    assert "<td>train.epochs</td><td>3</td>" in shown
    assert "<td>prune.options.granularity</td><td>&lt;unit&gt;</td>" in shown
    assert "train.lr" not in shown
    assert "Run(" in repr(run)
