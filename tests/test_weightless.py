"""Weightless networks: every step worked out by hand, a slow oracle for the whole, pruning on small tables."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from prunelab import data
from prunelab.errors import PrunelabError
from prunelab.models import weightless
from prunelab.models.weightless import MODELS, Code, Sizes
from prunelab.papers.related.lut_networks import data_of, findings, largest_share
from prunelab.papers.related.lut_networks import weightless as protocol
from prunelab.pruners import lut
from prunelab.pruners.lut import Lut
from prunelab.runs import Store
from prunelab.settings import Data, Model, Prune, Run, Train
from prunelab.training.train import generator
from prunelab.training.weightless_runs import arrays, restore, run_all, train

PUBLISHED = {  # KiB of Table 3, as printed
    "mnist_small": "70.0", "mnist_medium": "210", "mnist_large": "960", "ecoli": "0.875", "iris": "0.281",
    "letter": "78.0", "satimage": "9.00", "shuttle": "2.63", "vehicle": "2.25", "vowel": "3.44", "wine": "0.422",
}  # fmt: skip
YES, NO = True, False


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("name", "printed"), PUBLISHED.items())
def test_the_eleven_models_have_the_published_sizes(name, printed):
    kib = MODELS[f"bthowen_{name}"].kib
    decimals = len(printed.partition(".")[2])
    assert math.floor(kib * 10**decimals + 0.5) / 10**decimals == float(printed)


def test_every_bit_of_the_published_models_fills_a_place():
    for name in PUBLISHED:
        sizes, features, *_ = MODELS[f"bthowen_{name}"]
        assert features * sizes.bits % sizes.inputs == 0
    assert Sizes(2, 3, 8, 1).filters(features=5) == 4  # 10 bits in groups of 3: two zeros are added


# ---- the code ----


def test_the_thermometer_is_that_of_a_gaussian():
    x = np.array([[0.0, 7.0], [2.0, 7.0]])  # mean 1, deviation of the population 1; a feature that never changes
    thresholds = weightless.thermometer_thresholds(x, 3)
    assert thresholds[:, 0] == pytest.approx([1 - 0.67449, 1, 1 + 0.67449], abs=1e-5)
    assert thresholds[:, 1].tolist() == [7, 7, 7]
    bits = weightless.thermometer(np.array([[0.2, 7.0], [1.0, 6.0], [9.0, 8.0]]), thresholds)
    assert bits.astype(int).tolist() == [
        [0, 1, 0, 1, 0, 1],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
    ]  # bit 1 of all, ...


def test_pixels_have_the_thresholds_of_their_numbers():
    pixels = np.random.default_rng(0).integers(0, 256, (5001, 3), dtype=np.uint8)
    numbers = pixels.astype(np.float64)
    found = weightless.thermometer_thresholds(pixels, 2)
    assert found == pytest.approx(numbers.mean(0) + np.array([[-1], [1]]) * 0.430727 * numbers.std(0), abs=1e-4)


def test_the_hash_is_the_xor_of_the_constants_of_the_ones():
    constants = np.array([[1, 2, 4], [3, 5, 6]])
    bits = np.array([[YES, NO, YES], [NO, NO, NO], [YES, YES, YES]])
    assert weightless.h3(bits, constants).tolist() == [[1 ^ 4, 0, 7], [3 ^ 6, 0, 3 ^ 5 ^ 6]]


def test_the_hash_of_many_bits_is_the_slow_one():
    random = np.random.default_rng(1)
    bits, constants = random.random((4, 5, 49)) < 0.5, random.integers(0, 8192, (3, 49))
    found = weightless.h3(bits, constants)
    for k, n, f in np.ndindex(found.shape):
        assert found[k, n, f] == np.bitwise_xor.reduce(constants[k][bits[n, f]])


def test_the_smallest_counter_rises_and_is_what_is_remembered():
    seen = np.array([[[0], [1], [0], [3]], [[1], [2], [1], [3]]])  # [hashes, samples, one filter]
    counts = weightless.fill(seen, np.zeros(4, int), 1, 4)
    # (0,1): 1 1 0 0; (1,2): 1 1 1 0, for only the zero rises; (0,1): 2 2 1 0; (3,3): 2 2 1 1
    assert counts.tolist() == [[[2, 2, 1, 1]]]
    assert weightless.least(counts, seen)[:, 0, 0].tolist() == [2, 1, 2, 1]


def test_all_classes_at_once_fill_the_tables_that_one_sample_at_a_time_fills():
    random = np.random.default_rng(2)
    addresses, y = random.integers(0, 8, (3, 60, 4)).astype(np.int32), random.choice(3, 60, p=[0.6, 0.1, 0.3])
    slow = np.zeros((3, 4, 8), int)
    for n, f in np.ndindex(60, 4):
        own, at = slow[y[n], f], addresses[:, n, f]
        lowest = own[at].min()
        own[at] = np.maximum(own[at], lowest + 1)
    assert np.array_equal(weightless.fill(addresses, y, 3, 8), slow)


@pytest.mark.parametrize(
    ("highest", "best"),
    [
        (8, 3),  # 4, with 2 and 6: 2 is best; with 1 and 3: 3; with 2 and 4: 3 stays
        (3, 1),  # 1, with 2 as good: the first stays, so a better 3 is not seen
        (100, 10),  # 50, 25, 13, 13, 10: where nobody says yes class 0 wins, twice of three times
    ],
)
def test_the_bleach_is_found_by_halving_steps(highest, best):
    # The filters of class 0 remember its own samples 3 times, the other's twice; one of class 1 always says 9.
    remembered = np.array([[[3, 3], [9, 0]], [[2, 2], [9, 0]], [[3, 3], [9, 0]]])
    y = np.array([0, 1, 0])
    right = {b: int((weightless.votes(remembered >= b).argmax(1) == y).sum()) for b in (1, 2, 3, 4, 9, 10)}
    assert right == {1: 2, 2: 2, 3: 3, 4: 1, 9: 1, 10: 2}
    assert weightless.best_bleach(remembered, y, highest) == best


def test_of_equal_bleaches_the_lower_is_taken_and_it_never_falls_below_one():
    always = np.full((2, 2, 1), 50)
    always[:, 1] = 0
    assert weightless.best_bleach(always, np.array([0, 0]), 40) == 1
    assert weightless.best_bleach(always, np.array([1, 1]), 1) == 1  # nothing is ever right


def test_votes_count_the_kept_filters_and_the_first_of_equal_classes_wins():
    heard = np.array([[[YES, YES, NO], [NO, YES, YES]], [[NO, NO, NO], [NO, NO, YES]]])
    kept = np.array([[YES, NO, YES], [YES, YES, YES]])
    assert weightless.votes(heard).tolist() == [[2, 2], [0, 1]]
    assert weightless.votes(heard, kept, np.array([0, 3])).tolist() == [[1, 5], [0, 4]]
    assert weightless.tied(weightless.votes(heard)) == 0.5
    assert weightless.votes(heard).argmax(1).tolist() == [0, 1]


def test_a_whole_network_answers_as_the_slow_oracle():
    random = np.random.default_rng(3)
    y = np.arange(90) % 3
    x = random.normal(size=(90, 5)) + y[:, None]
    net = weightless.fit(x, y, Sizes(3, 4, 16, 2), 3, draw())
    code, predicted = net.code, net.predict(x[:12])
    for n in range(12):
        bits = [x[n, j] >= code.thresholds[i, j] for i in range(3) for j in range(5)] + [False]  # 15 bits in fours
        shuffled = [bits[i] for i in code.order]
        votes = [0, 0, 0]
        for f in range(4):
            at = [0, 0]
            for k in range(2):
                for i in range(4):
                    at[k] ^= int(code.constants[k, i]) if shuffled[4 * f + i] else 0
            for c in range(3):
                votes[c] += all(net.tables[c, f, a] for a in at)
        assert votes == net.votes(x[n : n + 1])[0].tolist()
        assert predicted[n] == votes.index(max(votes))
    assert (net.predict(x) == y).mean() > 0.5


def test_the_last_tenth_of_large_data_only_chooses_the_bleach():
    assert (weightless.held_out(10_000), weightless.held_out(60_000)) == (0, 6_000)
    x = np.random.default_rng(4).normal(size=(10_010, 2))
    y, out = (x[:, 0] > 0).astype(int), slice(9_009, None)
    net = weightless.fit(x, y, Sizes(2, 2, 4, 1), 2, draw())
    assert np.array_equal(net.code.thresholds, weightless.thermometer_thresholds(x, 2))
    counts = weightless.fill(net.code.addresses(x[:9_009]), y[:9_009], 2, 4)
    kept_out = weightless.least(counts, net.code.addresses(x[out]))
    assert net.bleach == weightless.best_bleach(kept_out, y[out], int(counts.max()))
    assert np.array_equal(net.tables, counts >= net.bleach)


def test_the_seed_decides_the_network():
    x, y = np.random.default_rng(5).normal(size=(50, 6)), np.arange(50) % 2
    a, b, c = (weightless.fit(x, y, Sizes(2, 3, 16, 2), 2, draw(seed)) for seed in (1, 1, 2))
    assert np.array_equal(a.tables, b.tables)
    assert np.array_equal(a.code.order, b.code.order)
    assert not np.array_equal(a.code.order, c.code.order)
    assert not np.array_equal(a.code.constants, c.code.constants)


# ---- which tables go ----

HEARD = np.array(  # 4 samples, 2 classes, 3 filters
    [
        [[YES, YES, NO], [NO, YES, NO]],
        [[YES, NO, YES], [NO, NO, YES]],
        [[NO, YES, YES], [YES, YES, NO]],
        [[NO, YES, NO], [YES, NO, YES]],
    ]
)
LABELS = np.array([0, 0, 1, 1])


def test_the_score_is_how_well_the_answer_tells_the_class():
    # class 0: filter 0 says yes to its two alone (+2), filter 1 to one of its and both others (1 - 2), filter 2 to 1, 1
    assert lut.scores(HEARD, LABELS, "faithful").tolist() == [[2, -1, 0], [2, 0, 0]]
    assert lut.scores(HEARD, LABELS).tolist() == [[1, -0.5, 0], [1, 0, 0]]


def test_the_corrected_score_is_the_covariance_for_any_sizes_of_classes():
    random = np.random.default_rng(6)
    heard, y = random.random((50, 3, 4)) < 0.4, random.choice(3, 50, p=[0.7, 0.2, 0.1])
    found = lut.scores(heard, y)
    for c, f in np.ndindex(3, 4):
        assert found[c, f] == pytest.approx(50 * np.cov(heard[:, c, f], y == c, ddof=0)[0, 1])


@pytest.mark.parametrize(
    ("scope", "removed", "kept"),
    [
        ("position", 0.5, [[0, 0, 1, 1], [0, 0, 1, 1]]),  # best of each position: 5 6 7 8
        ("discriminator", 0.5, [[0, 0, 1, 1], [1, 0, 0, 1]]),
        ("global", 0.5, [[0, 0, 1, 0], [1, 0, 1, 1]]),
        ("global", 0.39, [[0, 0, 1, 1], [1, 0, 1, 1]]),  # 3.12 of 8: rounded down
        ("discriminator", 0.0, [[1] * 4, [1] * 4]),
    ],
)
def test_each_scope_removes_the_lowest_of_those_that_compete(scope, removed, kept):
    scores = torch.tensor([[0.0, 1, 7, 2], [5, 1.5, 4, 8]], dtype=torch.float64)
    scores[0, 1] = 1.0
    scores[1, 1] = 6.0 if scope == "position" else 1.5
    whole = torch.ones(2, 4, dtype=torch.bool)
    assert Lut(scope=scope).select(scores, whole, removed, draw()).int().tolist() == kept


@pytest.mark.parametrize("scope", lut.SCOPES)
def test_steps_end_where_one_cut_would_and_revive_nothing(scope):
    scores = torch.randn(5, 20, generator=draw(7), dtype=torch.float64)
    whole = torch.ones(5, 20, dtype=torch.bool)
    pruner, current = Lut(scope=scope), whole
    for step in range(1, 8):
        after = pruner.select(scores, current, step * 0.1, draw())
        assert not bool((after & ~current).any())
        assert int(after.sum()) == 100 - 10 * step  # 0.7 * 20 is 14, not 13.999...
        current = after
    assert torch.equal(current, pruner.select(scores, whole, 0.7, draw()))


def test_positions_go_from_all_discriminators():
    after = Lut(scope="position").select(torch.randn(4, 9), torch.ones(4, 9, dtype=torch.bool), 0.4, draw())
    assert bool((after == after[0]).all())


def test_random_scores_depend_on_the_generator_alone():
    pruner = Lut(score="random")
    a, b, c = (pruner.scores(HEARD, LABELS, draw(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# ---- the bias ----


def test_votes_that_say_nothing_get_the_bias_of_the_frequencies():
    votes, y = np.zeros((10, 2), int), np.array([0] * 9 + [1])
    bias = lut.bias_at_optimum(votes, y)
    assert bias[0] - bias[1] == pytest.approx(math.log(9), rel=1e-4)
    assert Lut().bias(votes, y, draw()).tolist() == [2, 0]  # log 9 = 2.2: +1.1 and -1.1 round to 1 and -1


def test_at_the_optimum_the_classes_are_as_frequent_as_they_are():
    random = np.random.default_rng(8)
    y = random.choice(4, 300, p=[0.4, 0.3, 0.2, 0.1])
    votes = random.integers(0, 20, (300, 4)) + np.array([9, 0, 3, 0])
    bias = lut.bias_at_optimum(votes, y)
    shares = torch.softmax(torch.from_numpy(votes + bias), 1).mean(0)
    assert shares.numpy() == pytest.approx(np.bincount(y) / 300, abs=1e-6)
    assert lut.cross_entropy(votes + bias, y) < lut.cross_entropy(votes, y)
    torch_says = torch.nn.functional.cross_entropy(torch.from_numpy(votes).double(), torch.from_numpy(y)).item()
    assert lut.cross_entropy(votes, y) == pytest.approx(torch_says)


def test_the_published_bias_goes_the_same_way():
    y = np.array([0] * 9 + [1]).repeat(100)
    votes = np.zeros((1000, 2), int)
    found = lut.bias_by_adam(votes, y, draw())
    assert 0.2 < found[0] - found[1] < math.log(9)  # 8 epochs of 32 steps of 0.001: on its way
    assert np.array_equal(found, lut.bias_by_adam(votes, y, draw()))


def test_a_discriminator_that_lost_more_gets_its_votes_back():
    y = np.arange(200) % 2
    votes = np.stack([6 * (y == 0), 4 + 6 * (y == 1)], 1)  # class 0 lost four filters that always said yes
    votes[::10] = [[3, 7]] * 20
    assert (votes.argmax(1) == y).mean() == 0.9
    bias = Lut().bias(votes, y, draw())
    assert bias[1] == 0
    assert ((votes + bias).argmax(1) == y).all()


# ---- runs ----

QUICK = {"share": 0.2, "rounds": 3}


def test_a_study_is_stored_and_its_networks_come_back(tmp_path):
    study, store = protocol(["bthowen_digits"], 1, **QUICK), Store(tmp_path)
    first = run_all(study, store=store, progress=False)
    assert (first.loaded, first.trained, len(study)) == (0, 7, 7)
    again = run_all(study, store=store, progress=False)
    assert (again.loaded, again.trained) == (7, 0)
    pd.testing.assert_frame_equal(first.rounds, again.rounds)
    rounds = first.rounds
    units = rounds.groupby("strategy", sort=False)["units"].apply(list)
    assert (
        units["position"] == units["discriminator"] == units["random + bias"] == [320, 260, 200, 130]
    )  # 6, 12, 19 of 32
    assert units["global"] == units["global + bias"] == [320, 256, 192, 128]  # 64, 128, 192 of 320
    dense = rounds[rounds["round"] == 0]
    assert (dense["kib"] == MODELS["bthowen_digits"].kib).all()
    assert dense["test_accuracy"].nunique() == 1
    assert dense["test_accuracy"].iloc[0] > 0.9
    for run in study["global + bias"]:
        net, row = restore(store, run), rounds[(rounds["id"] == run.id) & (rounds["round"] == 3)].iloc[0]
        x, y = arrays(data.load(run.data).test)
        assert (net.predict(x) == y).mean() == pytest.approx(row["test_accuracy"])
        assert net.kib == row["kib"]
        assert net.bias.any()
        gone = store.removals(run)["round/luts"]
        assert np.array_equal(gone == -1, net.kept)
        assert set(np.unique(gone)) == {-1, 1, 2, 3}
    assert not restore(store, study["global"][0]).bias.any()


def test_each_run_alone_gives_the_same_numbers(tmp_path):
    study = protocol(["bthowen_iris"], 2, **QUICK)
    together = run_all(study, store=Store(tmp_path / "a"), progress=False).rounds
    one = study["random + bias"][1]
    alone = run_all([one], store=Store(tmp_path / "b"), progress=False).rounds
    own = together[together["id"] == one.id].reset_index(drop=True)
    for column in ("test_accuracy", "test_loss", "units", "validation_accuracy"):
        assert own[column].tolist() == alone[column].tolist()
    assert together.groupby("strategy")["seed"].nunique().eq(2).all()


def test_the_published_bias_prunes_the_same_network(tmp_path):
    ours, published = (protocol(["bthowen_iris"], 1, variant=v, **QUICK) for v in ("corrected", "faithful"))
    name, store = "global + bias", Store(tmp_path)
    both = run_all({"ours": ours[name], "published": published[name]}, store=store, jobs=2, progress=False)
    by_way = both.rounds.set_index(["strategy", "round"])["test_loss"]
    assert by_way["ours", 0] == by_way["published", 0]
    assert restore(store, ours[name][0]).bias.any()
    assert not restore(store, published[name][0]).bias.any()  # 32 steps of 0.001 round to nothing


def test_a_validation_part_of_the_settings_chooses_the_bleach(tmp_path):
    run = Run(Data("iris", validation=30, test=50), Model("bthowen_iris"), Train(epochs=1), Prune("lut"))
    row = run_all([run], store=Store(tmp_path), progress=False).rounds.iloc[0]
    dataset = data.load(run.data)
    x, y = arrays(dataset.validation)
    assert row["validation_accuracy"] == pytest.approx((train(dataset, run).predict(x) == y).mean())
    assert len(y) == 30


def test_where_nothing_went_no_bias_is_learnt(tmp_path):
    prune = Prune("lut", 0.0, 1, options={"share": 0.05})  # of 6 filters none
    rounds = run_all(
        [Run(Data("iris"), Model("bthowen_iris"), prune=prune)], store=Store(tmp_path), progress=False
    ).rounds
    assert rounds["units"].tolist() == [18, 18]
    assert rounds["test_loss"].nunique() == 1


def test_mnist_small_comes_within_a_point_of_the_published_accuracy(data_root):
    run = protocol(["bthowen_mnist_small"], 1)["discriminator"][0]
    dataset = data.load(run.data)
    x, y = arrays(dataset.test)
    assert (train(dataset, run).predict(x) == y).mean() == pytest.approx(0.934, abs=0.01)


# ---- what is asked of the numbers ----


def rows(accuracies, strategy="discriminator + bias", model="bthowen_iris", seed=0):
    gone = [0.2 * i for i in range(len(accuracies))]
    return pd.DataFrame(
        {
            "model": model, "strategy": strategy, "seed": seed, "round": range(len(gone)), "sparsity": gone,
            "requested_sparsity": gone, "test_accuracy": accuracies,
        }
    )  # fmt: skip


def test_the_largest_share_ends_before_the_first_loss_of_more_than_a_point():
    table = pd.concat([rows([0.95, 0.94, 0.945, 0.9, 0.95]), rows([0.9, 0.8], "global")])
    found = largest_share(table)
    assert found["bthowen_iris", "discriminator + bias", 0] == pytest.approx(0.4)
    assert found["bthowen_iris", "global", 0] == 0


def test_the_findings_are_differences_in_points_of_one_seed_each():
    ways = {"discriminator + bias": 0.0, "global": -0.3, "global + bias": -0.1, "random + bias": -0.02}
    table = pd.concat(
        rows([0.9 + 0.01 * seed, 0.895 + 0.01 * seed, 0.89 + 0.02 * seed + less], way, seed=seed)
        for way, less in ways.items()
        for seed in (0, 1)
    )
    found = findings(table)
    assert found["accuracy_iris"].mean == pytest.approx(90.5)
    assert found["change_iris"].mean == pytest.approx(-0.5)  # -1 and 0
    assert found["bias_iris"].mean == pytest.approx(20)
    assert found["score_iris"].mean == pytest.approx(2)  # at 40 %; over both shares it would be 1
    assert found["average_share"].mean == pytest.approx(40)
    assert "change_iris" not in findings(table, at=0.3)


def test_the_name_of_a_model_says_its_data():
    assert [data_of(f"bthowen_{n}") for n in ("mnist_small", "mnist_large", "iris")] == ["mnist", "mnist", "iris"]
    study = protocol(["bthowen_mnist_small", "bthowen_iris"], 2, small_seeds=3)
    assert [run.data.name for run in study["position"]] == ["mnist"] * 2 + ["iris"] * 3
    assert [run.data.split_seed for run in study["position"]][2:] == [0, 1, 2]


# ---- mistakes ----


def lut_run(model="bthowen_iris", source="iris", hidden=(), rounds=1, method="lut", **options):
    prune = Prune(method, 0.0, rounds, options=options)
    return run_all([Run(Data(source), Model(model, hidden), prune=prune)], progress=False)


X, Y = np.ones((6, 2)), np.array([0, 1, 0, 1, 0, 1])
FIT = (Sizes(1, 2, 4, 1), 2, draw())


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda: lut_run("bthowen_irs"), "did you mean 'bthowen_iris'"),
        (lambda: lut_run(hidden=(3, 2, 128)), r"hidden = \(3, 2, 128\): should be \(bits, inputs, entries, hashes\)"),
        (lambda: lut_run(hidden=(3, 2, 100, 1)), "entries = 100: should be a power of two"),
        (lambda: lut_run(method="magnitude"), "method 'magnitude' does not prune weightless networks: use 'lut'"),
        (lambda: lut_run(scop="global"), "no option 'scop': did you mean 'scope'"),
        (lambda: lut_run(scope="layer"), "scope = 'layer'"),
        (lambda: lut_run(share=1.0), "share = 1.0"),
        (lambda: lut_run(rounds=10), "rounds = 10 with share = 0.1 would remove every table"),
        (lambda: lut_run(source="irs"), "did you mean 'iris'"),
        (lambda: run_all([], progress=False), "is the number of seeds 0"),
        (lambda: run_all({"luts": []}, progress=False), "no runs of 'luts' were asked for"),
        (lambda: run_all([Run()], jobs=0, progress=False), "jobs = 0"),
        (lambda: protocol([]), "no weightless model was named"),
        (lambda: weightless.fit(X, Y[:5], *FIT), r"samples \[6, 2\] and labels \[5\]"),
        (lambda: weightless.fit(X * np.nan, Y, *FIT), "NaN or infinite"),
        (lambda: weightless.fit(X, Y + 1, *FIT), "labels from 1 to 2 with 2 classes"),
        (lambda: weightless.fit(X, Y * 0, *FIT), "class 1 has no sample to learn from"),
        (lambda: Code.draw(X, FIT[0], draw()).addresses(X[:, :1]), r"\[6, 1\] do not fit the network.*\[N, 2\]"),
    ],
)
def test_a_mistake_gets_one_line(mistake, words):
    with pytest.raises(PrunelabError, match=words) as error:
        mistake()
    assert "\n" not in str(error.value)


def test_a_run_of_weights_has_no_tables(tmp_path):
    from prunelab.training import experiment

    run = Run(Data("iris"), Model("mlp", (4,)), Train(epochs=1))
    store = Store(tmp_path)
    experiment.run_all([run], store=store, jobs=1, progress=False)
    with pytest.raises(PrunelabError, match="not of a weightless network"):
        restore(store, run)


def test_purposes_of_one_seed_share_no_stream():
    assert not torch.equal(
        torch.rand(3, generator=generator(0, "weightless")), torch.rand(3, generator=generator(0, "pruning"))
    )
