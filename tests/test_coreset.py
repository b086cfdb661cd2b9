"""Neural coresets on numbers by hand: what is drawn, what the weights become, and that the sum is right on average."""

import copy
import itertools
import math

import pandas as pd
import pytest
import torch
from acting import looked_at
from torch import nn

import prunelab
from prunelab import papers, pruners
from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.papers.related import without_retraining as protocol
from prunelab.pruners.coreset import Coreset, draw, measure, pairs, sensitivity
from prunelab.runs import Store
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.training.experiment import run_all


def network(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pruned(model: nn.Module, amount: float, seed: int = 0, **options) -> tuple[Masks, dict[str, torch.Tensor]]:
    step = Coreset(**options).prune(looked_at(model, generator=source(seed)), amount)
    return step.masks, step.weights


def exact_sums(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def error(model: nn.Sequential, approximation: nn.Sequential, x: torch.Tensor) -> float:
    """How far off the second layer is before its activation: root mean square over that of the model."""
    exact, ours = exact_sums(model[:3], x), exact_sums(approximation[:3], x)
    return float((ours - exact).square().mean().sqrt() / exact.square().mean().sqrt())


# ------------------------------------------------------------------------------------------------ what is drawn


def test_sensitivity_is_the_largest_outgoing_weight_times_the_length_of_weights_and_bias():
    weight, bias = torch.tensor([[3.0], [0.0], [5.0]]), torch.tensor([4.0, 2.0, 12.0])  # lengths 5, 2, 13
    read = torch.tensor([[1.0, -2.0, 0.1], [-3.0, 0.5, 0.2]])  # largest 3, 2, 0.2
    assert sensitivity(weight, bias, read, nn.ReLU()).tolist() == pytest.approx([15, 4, 2.6])
    half = sensitivity(weight, bias, read, nn.Sigmoid(), radius=0.5)
    by_hand = [3 / (1 + math.exp(-2.5)), 2 / (1 + math.exp(-1)), 0.2 / (1 + math.exp(-6.5))]
    assert half.tolist() == pytest.approx(by_hand)


def test_the_radius_decides_only_where_the_activation_bends():
    for activation, same in ((nn.ReLU, True), (nn.Sigmoid, False)):
        model = network(4, 6, 3, activation=activation)
        weight, bias, read = model[0].weight.detach(), model[0].bias.detach(), model[2].weight.detach()
        one, nine = (sensitivity(weight, bias, read, activation(), radius) for radius in (1.0, 9.0))
        assert torch.allclose(one / one.sum(), nine / nine.sum(), rtol=1e-12) is same


def test_drawing_ends_with_the_neuron_that_was_waited_for():
    probability = torch.tensor([0.5, 0.3, 0.1, 0.1, 0.0]).double()
    for seed in range(20):
        counts = draw(probability, 3, source(seed))
        assert int((counts > 0).sum()) == 3
        assert (counts == 1).any()  # the last one was new
        assert counts[4] == 0
    assert int((draw(probability, 5, source()) > 0).sum()) == 4  # no more can be drawn
    assert int(draw(probability, 7, source(), distinct=False).sum()) == 7


def test_neurons_are_drawn_as_often_as_their_probability_says():
    probability = torch.tensor([0.6, 0.3, 0.1]).double()
    share = draw(probability, 40_000, source(), distinct=False) / 40_000
    assert share.tolist() == pytest.approx(probability.tolist(), abs=0.01)  # four standard errors


def test_what_can_hardly_be_drawn_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("prunelab.pruners.coreset.MOST", 1000)
    counts = draw(torch.tensor([0.5, 0.5, 1e-30]).double(), 3, source())
    assert int((counts > 0).sum()) == 2
    assert int(counts.sum()) >= 1000


def test_waiting_for_distinct_neurons_is_biased_when_nearly_all_are_waited_for():
    """Of two neurons, both waited for, the share of draws of the likely one is not its probability; summed by hand."""
    p, q = 0.9, 0.1  # first m times one, then the other: sum over m of p^m q m / (m + 1) + q^m p / (m + 1)
    by_hand = q * (p / q - (-math.log(q) / p - 1)) + p * (-math.log(p) / q - 1)
    assert by_hand == pytest.approx(0.7924, abs=1e-4)
    probability, generator = torch.tensor([p, q]).double(), source()
    shares = [(counts := draw(probability, 2, generator))[0].item() / counts.sum().item() for _ in range(4000)]
    assert sum(shares) / len(shares) == pytest.approx(by_hand, abs=0.015)  # five standard errors; 0.9 is far away
    first = [draw(probability, 1, generator)[0].item() for _ in range(2000)]  # one of two: the probability itself
    assert sum(first) / len(first) == pytest.approx(p, abs=0.03)


# ---------------------------------------------------------------------------------------------- what it becomes


def test_outgoing_weights_are_multiplied_by_their_share_of_the_draws_over_their_probability():
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight.data = torch.tensor([[1.0], [2.0], [5.0]])
    model[2].weight.data = torch.tensor([[1.0, -1.0, 0.2], [0.5, 0.5, 0.2]])  # sensitivities 1, 2, 1 of 4
    masks, weights = pruned(model, 1 / 3, seed=3)
    counts = draw(torch.tensor([0.25, 0.5, 0.25]).double(), 2, source(3))
    factor = counts / counts.sum() / torch.tensor([0.25, 0.5, 0.25])
    assert list(weights) == ["2.weight"]
    assert torch.allclose(weights["2.weight"], model[2].weight * factor)
    assert masks["0.weight"].flatten().tolist() == (counts > 0).tolist()
    assert int((counts > 0).sum()) == 2


def test_the_mean_over_many_draws_is_the_exact_sum():
    model, x = network(5, 12, 4), torch.randn(6, 5, generator=source(1))
    exact = exact_sums(model, x)
    for options, right in (({}, True), ({"importance": False}, True), ({"reweight": False}, False)):
        sums = []
        for seed in range(1000):
            approximation = copy.deepcopy(model)
            pruners.prune_(approximation, Coreset(draws="fixed", **options), 0.5, seed=seed)
            sums.append(exact_sums(approximation, x))
        sums = torch.stack(sums)
        error = (sums.mean(0) - exact).abs() / (sums.std(0) / math.sqrt(len(sums)))
        assert bool(error.max() < 4.5) is right


def test_draws_by_sensitivity_approximate_better_than_uniform_ones():
    model = network(5, 40, 4)
    model[0].weight.data *= torch.logspace(-2, 1, 40)[:, None]  # neurons that differ
    x, mean = torch.randn(50, 5, generator=source(1)), {}
    for importance in (True, False):
        errors = []
        for seed in range(60):
            approximation = copy.deepcopy(model)
            pruners.prune_(approximation, "coreset", 0.5, seed=seed, importance=importance)
            errors.append(error(model, approximation, x))
        mean[importance] = sum(errors) / len(errors)
    assert mean[True] < 0.5 * mean[False]


def test_every_hidden_layer_keeps_its_share_and_biases_stay():
    model = network(20, 30, 10, 5)
    masks, weights = pruned(model, 0.9)
    assert [int(masks[f"{layer}.weight"].any(1).sum()) for layer in (0, 2)] == [3, 1]
    assert torch.equal(masks["0.bias"], masks["0.weight"].any(1))
    assert masks["4.weight"].all()
    assert set(weights) == {"2.weight", "4.weight"}


def test_the_last_hidden_layer_comes_first_so_that_a_neuron_only_read_by_a_dropped_one_is_never_drawn():
    model = network(3, 3, 2, 1)
    model[2].weight.data = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    model[4].weight.data = torch.tensor([[1.0, 0.0]])  # the second neuron of layer 2 is read by nobody
    for seed in range(10):
        masks, _ = pruned(model, 0.5, seed)
        assert masks["2.weight"].any(1).tolist() == [True, False]
        assert not masks["0.weight"][2].any()


def test_dropped_neurons_give_nothing_on_even_where_the_activation_of_zero_is_not_zero():
    model = network(4, 8, 3, activation=nn.Sigmoid)
    approximation, x = copy.deepcopy(model), torch.randn(5, 4, generator=source(1))
    masks = pruners.prune_(approximation, "coreset", 0.5, reweight=False)
    kept = masks["0.weight"].any(1)
    hidden = torch.sigmoid(model[0](x))[:, kept]
    by_hand = hidden @ model[2].weight[:, kept].T + model[2].bias
    assert torch.allclose(approximation(x), by_hand, atol=1e-6)


def test_where_nothing_goes_nothing_changes():
    model = network(4, 6, 3)
    masks, weights = pruned(model, 0.0)
    assert (masks, weights) == (Masks.ones(model), {})


def test_only_chosen_layers_are_thinned_out_although_the_weights_behind_them_change():
    model = network(6, 8, 8, 3)
    before = copy.deepcopy(model)
    masks = pruners.prune_(model, "coreset", 0.5, layers=["0"])
    assert masks.by_layer()[0]["density"] == 0.5
    assert set(masks) == {"0.weight", "0.bias"}
    assert not torch.equal(model[2].weight, before[2].weight)
    assert torch.equal(model[2].bias, before[2].bias)
    assert torch.equal(model[4].weight, before[4].weight)
    kept = masks["0.bias"]
    assert torch.equal(model[0].weight[kept], before[0].weight[kept])


def test_prune_gives_the_masks_and_prune_in_place_does_all():
    model = network(6, 8, 3)
    whole = copy.deepcopy(model)
    assert prunelab.prune(model, "coreset", 0.5, seed=2) == pruners.prune_(model, "coreset", 0.5, seed=2)
    assert not model[2].weight.equal(whole[2].weight)
    plain = copy.deepcopy(whole)
    masks = pruners.prune_(plain, "magnitude", 0.5)
    assert torch.equal(plain[0].weight, whole[0].weight * masks["0.weight"])


def test_what_is_measured_without_fine_tuning_is_the_mean_over_draws():
    model, x = network(5, 12, 8, 4), torch.randn(30, 5, generator=source(1))
    labels = model(x).argmax(1)
    table = measure({7: model}, {"coreset": ("coreset", {}), "all": ("none", {})}, [0.5], x, labels, draws=3)
    errors, right = [], []
    for seed in range(3):
        one, every = copy.deepcopy(model), copy.deepcopy(model)
        pruners.prune_(one, "coreset", 0.5, layers=["0"], seed=seed)
        pruners.prune_(every, "coreset", 0.5, seed=seed)
        errors.append(error(model, one, x))
        right.append((every(x).argmax(1) == labels).float().mean().item())
    assert table.iloc[0].tolist() == ["coreset", 0.5, 7, pytest.approx(sum(errors) / 3), pytest.approx(sum(right) / 3)]
    assert table.iloc[1].tolist() == ["all", 0.5, 7, 0, 1]


# ------------------------------------------------------------------------------------------------------- in runs


def run(**prune) -> Run:
    still = Train(epochs=1, batch_size=200, optimiser="sgd", lr=1e-12)  # so weights stay what the method made of them
    prune = Prune("coreset", 0.5, 1, **prune) if prune else Prune()
    return Run(Data("digits", train_size=200, test_size=200), Model("mlp", (16, 12)), still, prune)


def test_a_run_goes_on_from_the_new_weights_unless_it_goes_back_to_older_ones(tmp_path):
    runs = {how: run(recover=how) for how in ("none", "finetune", "rewind")}
    results = run_all([run(), *runs.values()], store=Store(tmp_path), jobs=1, progress=False)
    assert not results.failed
    dense = results.store.weights(run().id)["output.weight"]
    for how, one in runs.items():
        kept = results.store.masks(one.id)["hidden_2.weight"].any(1)
        assert kept.sum() == 6
        assert results.rounds.query("id == @one.id")["units"].tolist() == [28, 14]
        after = results.store.weights(one.id)["output.weight"][:, kept]
        factor = after / dense[:, kept]
        assert factor == pytest.approx(factor[:1].repeat(10, 0), rel=1e-3)  # one factor for each neuron
        assert (abs(factor - 1).max() < 1e-3) == (how == "rewind")


def test_the_protocol_thins_out_the_same_trainings_and_the_claims_take_paired_numbers():
    study = protocol.coresets(2, kept=(0.5, 0.1), epochs=3, recovery=2)
    assert {name: len(runs) for name, runs in study.items()} == {
        "dense": 2,
        "coreset": 4,
        "uniform": 4,
        "largest weights": 4,
    }
    assert {run.train for runs in study.values() for run in runs} == {study["dense"][0].train}
    assert sorted({run.prune.amount for run in study["coreset"]}) == [0.5, 0.9]
    rounds, thinned = [], []
    for seed in (0, 1):
        rounds.append(("dense", seed, 0, 0.2, 0.90 + seed / 100, 100))
        for name, level in (("coreset", 0.80), ("uniform", 0.70), ("largest weights", 0.85)):
            thinned.append((name, seed, 0.5, level + seed / 10, 0.3))
            for amount in (0.5, 0.9):
                rounds.append((name, seed, 0, amount, 0.5, 100))
                rounds.append((name, seed, 1, amount, level + seed / 100 + (amount == 0.5) / 10, 10))
    columns = ["strategy", "seed", "round", "prune.amount", "test_accuracy", "weights"]
    rows = protocol.coreset_rows(
        pd.DataFrame(rounds, columns=columns),
        pd.DataFrame(thinned, columns=["strategy", "seed", "fraction", "error", "test_accuracy"]),
    )
    assert rows["fraction"].value_counts().to_dict() == {0.5: 12, 0.1: 6, 1.0: 2}
    found = {name: interval.mean for name, interval in protocol.coreset_findings(rows).items()}
    assert found == pytest.approx(
        {
            "gain_at_fewest": -0.1,
            "error_below_uniform": -0.1,
            "error_below_largest": 0.05,
            "tuned_over_uniform": 0.1,
            "tuned_over_largest": -0.05,
        }
    )
    assert set(found) == {claim.quantity for claim in papers.artefact("related/coresets").claims}
    with pytest.raises(PrunelabError, match="did you mean 'uniform'"):
        protocol.coresets(methods=["unifrm"])


# --------------------------------------------------------------------------------------------- what is refused


def test_pairs_are_found_in_nested_chains_and_end_at_what_is_no_activation():
    nested = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    assert [(pair.layer, pair.next) for pair in pairs(nn.Sequential(nested, nn.Linear(4, 2)))] == [
        ("0.0.0", "0.1.0"),
        ("0.1.0", "1"),
    ]
    normed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert [(pair.layer, pair.next) for pair in pairs(normed)] == [("3", "5")]
    relu = nn.ReLU()  # one module at two places
    shared = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2))
    assert all(isinstance(pair.activation[0], nn.ReLU) for pair in pairs(shared))


def test_a_model_without_such_layers_is_refused():
    convnet = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2), nn.Softmax(), nn.Linear(2, 2))
    with pytest.raises(PrunelabError, match="coreset needs a Linear that another one reads"):
        prunelab.prune(convnet, "coreset", 0.5)
    mixed = nn.Sequential(nn.Linear(4, 4), nn.Softmax(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(PrunelabError, match="no masked layer is a Linear that another one reads"):
        prunelab.prune(mixed, "coreset", 0.5, layers=["0"])


def test_a_layer_that_nobody_reads_is_named():
    model = network(4, 6, 3)
    model[2].weight.data.zero_()
    with pytest.raises(PrunelabError, match="layer '0': nothing reads any of its neurons"):
        prunelab.prune(model, "coreset", 0.5)
    with pytest.raises(PrunelabError, match="radius"):
        Coreset(radius=0)
