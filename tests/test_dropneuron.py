"""DropNeuron: penalties by hand and by autograd, alone and in company; the threshold; what is counted; its table."""

import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunelab import models, papers
from prunelab.data import load
from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.papers.related import dropneuron, dropneuron_table
from prunelab.plots.paired import ours_and_reported
from prunelab.pruners import prune
from prunelab.pruners.dropneuron import EPS, DropNeuron, connected, neurons_left, report, weight_gradient
from prunelab.runs import Store
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.training.experiment import check, run_all
from prunelab.training.train import Member, Population, generator

W, B = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([1.0, -2.0])  # rows 5 and 0 long, columns 3 and 4


def test_their_gradients_by_hand_with_zero_for_a_neuron_that_is_gone():
    lengths = weight_gradient(W, 0, 0, 1)
    torch.testing.assert_close(lengths, torch.tensor([[0.1 * (3 / 5 + 1), 0.1 * (4 / 5 + 1)], [0.0, 0.0]]))
    torch.testing.assert_close(weight_gradient(W, 1, 0, 0), torch.tensor([[0.1, 0.1], [0.0, 0.0]]))
    torch.testing.assert_close(weight_gradient(W, 0, 1, 0), 0.1 * W)
    torch.testing.assert_close(weight_gradient(B, 1, 0, 0), torch.tensor([0.1, -0.1]))


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2, 2)])
@pytest.mark.parametrize("strengths", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.3, 0.2, 0.7)])
def test_gradients_are_those_of_autograd(shape, strengths):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    l1, l2, dropneuron_ = strengths
    rows, columns = tuple(range(1, len(shape))), (0, *range(2, len(shape)))
    total = l1 * 0.1 * weight.abs().sum() + l2 * 0.05 * weight.square().sum()
    for axes in (rows, columns):
        total = total + dropneuron_ * 0.1 * (weight.square().sum(axes) + EPS).sqrt().sum()
    torch.testing.assert_close(weight_gradient(weight.detach(), *strengths), torch.autograd.grad(total, weight)[0])


FIRST = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])  # of three hidden neurons two have an incoming weight


@pytest.mark.parametrize(
    ("second", "least", "most", "both"),
    [
        ([[5.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [1, 1, 1], [1, 2, 1], [1, 1, 1]),
        ([[5.0, 6.0, 0.0], [0.0, 7.0, 0.0]], [1, 2, 2], [1, 2, 2], [1, 1, 1]),  # the second neuron reads nothing
        ([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]], [1, 1, 2], [1, 2, 2], [0, 0, 0]),  # no way through at all
    ],
)
def test_neurons_left_by_each_rule(second, least, most, both):
    weights = [FIRST, torch.tensor(second)]
    assert neurons_left(weights) == least
    assert neurons_left(weights, "max") == most
    assert neurons_left(weights, "connected") == both
    assert [kept.shape for kept in connected(weights)] == [w.shape for w in weights]


def test_what_dies_with_a_neuron_is_found_through_all_layers():
    chain = [torch.ones(3, 2), torch.diag(torch.tensor([1.0, 1.0, 0.0])), torch.tensor([[0.0, 1.0, 1.0]])]
    assert neurons_left(chain) == [2, 2, 2, 1]
    assert neurons_left(chain, "connected") == [2, 1, 1, 1]
    assert report(chain) == {
        **{"weights": 10, "weights_total": 18, "density": 10 / 18, "compression_ratio": 1.8},
        **{"neurons": 7, "neurons_total": 9, "neurons_share": 7 / 9, "connected_weights": 4, "connected_neurons": 5},
    }
    assert report(chain, "max")["neurons"] == 2 + 3 + 2 + 1
    assert report([torch.zeros(1, 1)])["compression_ratio"] == math.inf


def small() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(1, 1, 2), nn.Flatten(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))
    for parameter in model.parameters():
        parameter.data.fill_(1e-3)
    model[2].weight.data = torch.tensor([[0.01, 0.0099, -0.5, 0.0], [-0.01, -0.0099, 0.02, 1.0]])
    model[4].weight.data = torch.tensor([[0.3, -0.001]])
    return model


def test_the_threshold_takes_what_is_below_it_and_neither_biases_nor_convolutions():
    masks = prune(small(), "dropneuron", 0.0)
    assert masks["2.weight"].tolist() == [[True, False, True, False], [True, False, True, True]]
    assert masks["4.weight"].tolist() == [[True, False]]
    assert masks["0.weight"].all()
    assert not any(name.endswith("bias") for name in masks)
    everywhere = prune(small(), "dropneuron", 0.0, convolutions=True, threshold=1e-3)
    assert everywhere["0.weight"].all()  # equal to the threshold is not below it


def test_an_empty_layer_is_refused_unless_allowed():
    with pytest.raises(PrunelabError, match=r"layer '4' would lose every weight at threshold = 0\.4"):
        prune(small(), "dropneuron", 0.0, threshold=0.4)
    assert prune(small(), "dropneuron", 0.0, threshold=2.0, allow_empty=True)["2.weight"].sum() == 0
    with pytest.raises(PrunelabError, match="no fully connected layer"):
        prune(nn.Sequential(nn.Conv2d(1, 1, 2)), "dropneuron", 0.0)
    with pytest.raises(PrunelabError, match="threshold = -1"):
        DropNeuron(threshold=-1)


def test_only_fully_connected_layers_are_penalised_and_the_ungrouped_one_by_l1_alone():
    model = small()
    found = DropNeuron(l1=1, dropneuron=1, ungrouped="4").penalty(model, {})(model)
    assert set(found) == {"2.weight", "2.bias", "4.weight", "4.bias"}
    torch.testing.assert_close(found["2.weight"], weight_gradient(model[2].weight.detach(), 1, 0, 1))
    torch.testing.assert_close(found["4.weight"], torch.tensor([[0.1, -0.1]]))
    torch.testing.assert_close(found["4.bias"], torch.tensor([0.1]))
    assert "0.weight" in DropNeuron(convolutions=True).penalty(model, {})(model)
    assert DropNeuron(l1=0, dropneuron=0).penalty(model, {}) is None
    with pytest.raises(PrunelabError, match="ungrouped = '5'"):
        DropNeuron(ungrouped="5").penalty(model, {})


# ---------------------------------------------------------------------------------------------------- in the trainer

PARTS = {
    "labels": Data("digits", train_size=200),
    "the input": Data("digits", train_size=200, target="input"),
    "a number": Data("sparse_regression", train_size=200, scaling="raw"),
}


def member(data, strengths, seed=0, name="mlp", hidden=(9, 7), train=None):
    parts = load(data)
    net = models.build(Model(name, hidden), parts.shape, len(parts.classes), seed)
    train = train or Train(epochs=9, batch_size=32, optimiser="adam", lr=1e-2)
    made = Member(net, train, Masks.ones(net), generator(seed, "order"))
    made.penalty = DropNeuron(**strengths).penalty(net, {})
    return made


def weights(one):
    return [p.detach().clone() for p in one.model.parameters()]


STRONG = {"l1": 0.02, "l2": 0.01, "dropneuron": 0.05}


@pytest.mark.parametrize("what", PARTS)
@pytest.mark.parametrize("strengths", [STRONG, {"l1": 0, "dropneuron": 0}], ids=["penalised", "plain"])
def test_a_penalised_training_is_the_loop_one_would_write_by_hand(what, strengths):
    parts, ours = load(PARTS[what]), member(PARTS[what], strengths)
    net = models.build(Model("mlp", (9, 7)), parts.shape, len(parts.classes), 0)
    step, order = torch.optim.Adam(net.parameters(), lr=1e-2), generator(0, "order")
    penalty = DropNeuron(**strengths)
    population, losses = Population(parts), []
    for _ in range(2):
        (epoch,) = population.epoch([ours])
        seen = []
        for rows in torch.randperm(len(parts.train.y), generator=order).split(32):
            x, y = parts.scale(parts.train.x[rows]), parts.train.y[rows]
            wanted = {"labels": y, "the input": x.flatten(1), "a number": y}[what]
            loss = (F.cross_entropy if what == "labels" else F.mse_loss)(net(x), wanted)
            seen.append(loss.item() * len(rows))
            total = loss
            for layer in (net.hidden_1, net.hidden_2, net.output):
                w, b = layer.weight, layer.bias
                total = total + 0.1 * penalty.l1 * (w.abs().sum() + b.abs().sum())
                total = total + 0.05 * penalty.l2 * (w.square().sum() + b.square().sum())
                sizes = [(w.square().sum(axis) + EPS).sqrt().sum() for axis in (0, 1)]
                total = total + 0.1 * penalty.dropneuron * sum(sizes)
            step.zero_grad()
            total.backward()
            step.step()
        losses.append((epoch.loss, sum(seen) / 200))
    for own, theirs in zip(weights(ours), net.parameters(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    for own, theirs in losses:  # the penalty is not part of the loss that is reported
        assert own == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("what", PARTS)
def test_each_member_of_a_stack_has_its_own_penalty(what):
    strengths = [STRONG, {"l1": 0, "dropneuron": 0}, {"l1": 0, "dropneuron": 0.2}]
    sizes = [(9, 7), (9, 7), (8, 6)]
    together = [
        member(PARTS[what], s, seed, hidden=h) for seed, (s, h) in enumerate(zip(strengths, sizes, strict=True))
    ]
    alone = [member(PARTS[what], s, seed, hidden=h) for seed, (s, h) in enumerate(zip(strengths, sizes, strict=True))]
    parts = load(PARTS[what])
    crowd, found = Population(parts), []
    for _ in range(2):
        found = crowd.epoch(together)
    assert [epoch.lockstep for epoch in found] == [2, 2, 1]  # other sizes have a stack of their own
    measured = crowd.evaluate(together, parts.test)
    for one, same, theirs in zip(alone, together, measured, strict=True):
        single = Population(parts)
        for _ in range(2):
            single.epoch([one])
        for own, other in zip(weights(one), weights(same), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
        assert theirs.loss == pytest.approx(single.evaluate([one], parts.test)[0].loss, rel=1e-4)


def test_numbers_are_measured_by_their_squared_error_and_have_no_accuracy():
    parts = load(PARTS["the input"])
    one = member(PARTS["the input"], STRONG, name="autoencoder", hidden=(9,))
    (epoch,) = Population(parts).epoch([one])
    assert math.isnan(epoch.accuracy)
    (measured,) = Population(parts).evaluate([one], parts.test)
    x = parts.scale(parts.test.x).flatten(1)
    assert measured.loss == pytest.approx((one.model(parts.scale(parts.test.x)) - x).square().mean().item(), rel=1e-5)
    assert math.isnan(measured.accuracy)
    assert math.isnan(measured.f1_macro)


def test_a_network_that_is_no_chain_learns_numbers_too():
    parts, data = load(PARTS["the input"]), PARTS["the input"]
    ours, net = member(data, {"l1": 0, "dropneuron": 0}), member(data, {"l1": 0, "dropneuron": 0}).model
    ours.model = nn.Sequential(nn.Sequential(*ours.model))
    ours.masks = Masks.ones(ours.model)
    Population(parts).epoch([ours])
    step = torch.optim.Adam(net.parameters(), lr=1e-2)
    for rows in torch.randperm(200, generator=generator(0, "order")).split(32):
        x = parts.scale(parts.train.x[rows])
        step.zero_grad()
        F.mse_loss(net(x), x.flatten(1)).backward()
        step.step()
    for own, theirs in zip(weights(ours), net.parameters(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("prune_", "train", "what"),
    [
        (Prune("retraining_free", 0.5, 1), Train(epochs=1), "'retraining_free' looks at labels"),
        (Prune("dropnet_oracle", 0.5, 1), Train(epochs=1), "'dropnet_oracle' looks at labels"),
        (Prune("none"), Train(epochs=1, augment="affine"), "leave it out where the targets are numbers"),
    ],
)
def test_what_needs_labels_is_refused_where_there_are_none(prune_, train, what):
    plain = Run(PARTS["the input"], Model("autoencoder", (9,)), Train(epochs=1), Prune("none"))
    with pytest.raises(PrunelabError, match=what):
        check([plain, Run(PARTS["the input"], Model("autoencoder", (9,)), train, prune_)])


def test_slopes_of_the_squared_error_are_scores_where_the_targets_are_numbers(tmp_path):
    run = Run(PARTS["the input"], Model("autoencoder", (9,)), Train(epochs=1), Prune("taylor", 0.5, 1))
    results = run_all([run], store=Store(tmp_path), jobs=1, progress=False)
    assert not results.failed
    assert results.last["density"].item() == pytest.approx(0.5, abs=0.01)


# ------------------------------------------------------------------------------------------------------ the experiments


def test_the_regression_is_the_one_that_was_specified():
    parts = load(dropneuron("sparse_regression", 1)["DropNeuron"][0].data)
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [500, 100, 500]
    found = torch.linalg.lstsq(parts.train.x.double(), parts.train.y.double()).solution
    assert int((found.abs() > 1e-4).sum()) == 2
    torch.testing.assert_close(parts.test.x.double() @ found, parts.test.y.double(), rtol=1e-4, atol=1e-3)
    assert parts.train.x.std().item() == pytest.approx(10, rel=0.05)


def test_networks_and_scripts_have_the_published_sizes(data_root):
    sizes = {"sparse_regression": 105, "autoencoder": 217_088, "lenet_300_100": 266_200}
    sizes |= {"lenet_5": 1_610_752, "convnet": 1_610_752}
    for name, total in sizes.items():
        run = dropneuron(name, 1)["DropNeuron"][0]
        parts = load(run.data)
        net = models.build(run.model, parts.shape, len(parts.classes), 0)
        assert sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Linear)) == total
    assert len(load(dropneuron("lenet_300_100", 1)["DropNeuron"][0].data).train) == 55_000
    convnet = load(dropneuron("convnet", 1)["DropNeuron"][0].data)
    assert len(convnet.train) == 50_000
    pixels = convnet.scale(convnet.test.x[:100])
    assert (pixels.min().item(), pixels.max().item()) == (-0.5, 0.5)


def test_the_first_weights_have_the_spread_of_the_scripts():
    for init, std in (("normal_1", 1.0), ("normal_0.01", 0.01)):
        net = models.build(Model("autoencoder", (128,), init), (784,), 784, 0)
        for parameter in net.parameters():
            assert parameter.std().item() == pytest.approx(std, rel=0.3)
        assert net.hidden_1.weight.std().item() == pytest.approx(std, rel=0.01)
    for init, std in (("truncated_0.01", 0.01), ("truncated_0.1", 0.1)):
        weight = models.build(Model("lenet_5_same", (4, 4, 64), init), (1, 28, 28), 10, 0).dense.weight
        assert weight.abs().max().item() <= 2 * std
        assert weight.std().item() == pytest.approx(0.8796 * std, rel=0.02)  # of a normal cut at two deviations


def test_the_table_sets_the_reported_numbers_beside_ours(tmp_path):
    store = Store(tmp_path)
    small_ = {"epochs": 1, "train_size": 60}
    studies = {
        "sparse_regression": dropneuron("sparse_regression", 2, **small_),
        "lenet_300_100": dropneuron("lenet_300_100", 2, data="digits", hidden=(6, 5), **small_),
        "autoencoder": dropneuron("autoencoder", 1, data="digits", hidden=(5,), **small_),
        "convnet": dropneuron("convnet", 1, data="digits", hidden=(2, 2, 4), strategies=["DropNeuron"], **small_),
    }
    results = {name: run_all(study, store=store, jobs=1, progress=False) for name, study in studies.items()}
    rows = dropneuron_table.left(results)
    assert len(rows) == 4 + 6 + 3 + 1
    for row in rows.itertuples():
        last = results[row.experiment].last.set_index("id").loc[row.id]
        dense = sum(len(m) * m.shape[1] for m in dropneuron_table.matrices(store, *_asked(store, row.id)))
        assert row.weights_total == dense
        if row.experiment != "convnet":  # which has weights of convolutions too
            assert (row.weights, row.density) == (last["weights"], pytest.approx(last["density"]))
        if row.experiment == "lenet_300_100":
            assert row.after == last["test_accuracy"]
    beside = dropneuron_table.beside_reported(rows).set_index(["experiment", "strategy", "quantity"])
    assert beside.loc[("lenet_300_100", "DropNeuron", "density"), "reported"] == pytest.approx(0.0991, abs=5e-5)
    assert beside.loc[("lenet_300_100", "DropNeuron", "neurons_share"), "reported"] == pytest.approx(0.583, abs=5e-4)
    assert math.isnan(beside.loc[("sparse_regression", "no penalty", "after"), "reported"])
    text = str(dropneuron_table.table(rows))
    assert "9.91" in text
    assert "1.31e-05" in text


def _rows(**values):
    """Rows of ``left`` by hand: two seeds of LeNet-300-100 each."""
    both = [
        ("DropNeuron", 0, 0.10, 0.60),
        ("DropNeuron", 1, 0.12, 0.62),
        ("L1 only", 0, 0.13, 0.7),
        ("L1 only", 1, 0.14, 0.7),
    ]
    names = ["strategy", "seed", "density", "neurons_share"]
    frame = pd.DataFrame(both, columns=names).assign(experiment="lenet_300_100", before=0.98, after=0.981)
    frame["neurons_by_layer"] = "2-1-1"
    return frame.assign(**{"epochs": 100, "complete": True, **values})


def test_what_the_claims_ask_for_is_reckoned_from_complete_runs_only():
    found = dropneuron_table.quantities(_rows())
    assert found["lenet_300_100_weights"].mean == pytest.approx(11)
    assert found["lenet_300_100_neurons"].mean == pytest.approx(61)
    assert found["lenet_300_100_after"].mean == pytest.approx(98.1)
    assert found["lenet_300_100_change"].mean == pytest.approx(0.1)
    assert found["fewer_weights"].mean == pytest.approx((3 + 2) / 2)
    assert found["fewer_neurons"].mean == pytest.approx((10 + 8) / 2)
    everything = [_rows(experiment=name) for name in dropneuron_table.DROPNEURON]
    asked = {claim.quantity for claim in papers.artefact("related/dropneuron").claims}
    assert set(dropneuron_table.quantities(pd.concat(everything, ignore_index=True))) == asked
    assert dropneuron_table.quantities(_rows(complete=False)) == {}
    errors = _rows(experiment="sparse_regression", before=3e-6, after=1e-6)
    assert dropneuron_table.quantities(errors)["sparse_regression_after"].mean == pytest.approx(1)


def test_the_picture_tells_both_numbers():
    numbers = dropneuron_table.beside_reported(_rows())
    picture = ours_and_reported(numbers, ["density", "neurons_share"], ["experiment", "strategy"])
    assert "lenet_300_100: DropNeuron, share of neurons left: ours 0.61, reported 0.583." in picture.alt
    assert len(picture.axes) == 2
    assert [label.get_text() for label in picture.legends[0].get_texts()] == ["ours", "reported"]


def _asked(store, run_id):
    run = store.settings(run_id)
    return run, load(run.data)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: dropneuron("lenet_300"), "did you mean 'lenet_300_100'"),
        (lambda: load(Data("iris", scaling="centred")), "'centred' is for images"),
        (lambda: dropneuron("lenet_5", strategies=["dropneuron"]), "did you mean 'DropNeuron'"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_line(call, what):
    with pytest.raises(PrunelabError, match=what):
        call()
