"""One loop for one run and many: equal to torch's own optimisers, equal in company, deterministic, masked for good."""

import math
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from torch import nn

from prunelab import models
from prunelab.data import load
from prunelab.errors import PrunelabError
from prunelab.masks import Masks
from prunelab.models import mlp
from prunelab.settings import Data, Model, Train
from prunelab.structure.chains import compact
from prunelab.training import train
from prunelab.training.stack import Stack, stackable
from prunelab.training.train import Member, Population, device, f1_macro, generator


@pytest.fixture(scope="module")
def digits():
    return load(Data("digits", train_size=300))


def member(seed=0, train=None, masks=None, model="mlp", hidden=(20, 12), data=None):
    shape, classes = (data.shape, len(data.classes)) if data else ((1, 8, 8), 10)
    net = models.build(Model(model, hidden), shape, classes, seed)
    if masks is None:
        masks = Masks.ones(net)
    return Member(net, train or Train(epochs=5, batch_size=32), masks, generator(seed, "order"))


def half_masks(net, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return Masks(
        {n: torch.rand(p.shape, generator=draw) < 0.5 for n, p in net.named_parameters() if n.endswith("weight")}
    )


def weights(m):
    return {name: p.detach().clone() for name, p in m.model.named_parameters()}


OPTIMISERS = {
    "sgd": (Train(epochs=3, batch_size=32, optimiser="sgd", lr=0.1), lambda ps: torch.optim.SGD(ps, lr=0.1)),
    "momentum": (
        Train(epochs=3, batch_size=32, optimiser="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4),
        lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=5e-4),
    ),
    "adam": (
        Train(epochs=3, batch_size=32, optimiser="adam", weight_decay=5e-4),
        lambda ps: torch.optim.Adam(ps, lr=1e-3, weight_decay=5e-4),
    ),
    "adamw": (
        Train(epochs=3, batch_size=32, weight_decay=0.01),
        lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.01),
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_run_equals_the_loop_one_would_write_by_hand(digits, name):
    train, optimiser = OPTIMISERS[name]
    ours = member(train=train)
    theirs = models.build(Model("mlp", (20, 12)), (1, 8, 8), 10, 0)
    step, order = optimiser(theirs.parameters()), generator(0, "order")
    population = Population(digits)
    for _ in range(2):
        population.epoch([ours])
        for rows in torch.randperm(len(digits.train.y), generator=order).split(32):
            step.zero_grad()
            F.cross_entropy(theirs(digits.scale(digits.train.x[rows])), digits.train.y[rows]).backward()
            step.step()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.model.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("model", ["mlp", "dropnet_b"])
def test_company_changes_nothing(digits, name, model):
    """A population of four with masks, widths and ages of their own, against each of them alone."""
    train = OPTIMISERS[name][0]

    def make():
        hidden = (20, 12) if model == "mlp" else (6, 5)
        crowd = [member(seed, train, model=model, hidden=hidden) for seed in range(4)]
        crowd[1].change(crowd[1].model, half_masks(crowd[1].model))
        thin = half_masks(crowd[2].model, 7) & half_masks(crowd[2].model, 8) & half_masks(crowd[2].model, 9)
        small = compact(crowd[2].model, thin)
        crowd[2].change(small.model, Masks({n: small.cut(n, m) for n, m in thin.items()}))
        Population(digits).epoch(crowd[3:])  # one epoch older than the others
        return crowd

    together, alone = make(), make()
    population = Population(digits)
    for _ in range(2):
        population.epoch(together)
    for one in alone:
        single = Population(digits)
        for _ in range(2):
            single.epoch([one])
    for a, b in zip(together, alone, strict=True):
        for parameter, value in weights(a).items():
            torch.testing.assert_close(value, weights(b)[parameter], rtol=1e-4, atol=1e-5)
    joint = population.evaluate(together, digits.test)
    for a, b in zip(joint, [Population(digits).evaluate([m], digits.test)[0] for m in alone], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-3)


def test_small_runs_do_share_a_stack(digits):
    crowd = [member(seed) for seed in range(3)]
    assert {epoch.lockstep for epoch in Population(digits).epoch(crowd)} == {3}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_is_pruned_stays_zero_with_its_optimiser_state(digits, name):
    runs = [member(seed, OPTIMISERS[name][0]) for seed in range(2)]
    for run in runs:
        run.change(run.model, half_masks(run.model))
    population = Population(digits)
    for _ in range(3):
        population.epoch(runs)
    for run in runs:
        for parameter, mask in run.masks.items():
            assert (run.model.get_parameter(parameter)[~mask] == 0).all()
            assert (run.model.get_parameter(parameter)[mask] != 0).any()
            for moments in run.moments.values():
                assert (moments[parameter][~mask] == 0).all()


def test_moments_survive_a_change_of_shape(digits):
    run = member(train=Train(epochs=9, batch_size=32))
    population = Population(digits)
    population.epoch([run])
    thin = half_masks(run.model, 1) & half_masks(run.model, 2) & half_masks(run.model, 3)
    small = compact(run.model, thin)
    cut = {kind: {n: small.cut(n, t) for n, t in own.items()} for kind, own in run.moments.items()}
    steps = run.steps
    run.change(small.model, Masks({n: small.cut(n, m) for n, m in thin.items()}), cut)
    assert run.steps == steps > 0
    assert run.moments["exp_avg"]["output.weight"].abs().sum() > 0
    population.epoch([run])
    assert all(t.shape == run.model.get_parameter(n).shape for own in run.moments.values() for n, t in own.items())


def test_same_seed_same_bits_other_seed_other_bits(digits):
    def trained(seed):
        run = member(seed)
        Population(digits).epoch([run])
        return torch.cat([p.detach().flatten() for p in run.model.parameters()])

    assert torch.equal(trained(3), trained(3))
    assert not torch.equal(trained(3), trained(4))


def test_training_leaves_the_global_generator_alone(digits):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    Population(digits).epoch([member()])
    assert torch.rand(1) == expected


def test_a_diverged_run_fails_alone_and_says_where(digits):
    wild, tame = (
        member(0, Train(optimiser="sgd", lr=1e18, batch_size=32)),
        member(1, Train(optimiser="sgd", lr=0.1, batch_size=32)),
    )
    Population(digits).epoch([wild, tame])
    assert "not finite from batch" in wild.failure
    assert "epoch 1" in wild.failure
    assert tame.failure is None
    assert all(p.isfinite().all() for p in tame.model.parameters())


def test_early_stopping_counts_epochs_without_a_lower_loss():
    run = member(train=Train(epochs=50, patience=2))
    for loss, done in [(1.0, False), (0.9, False), (0.95, False), (0.9, True)]:
        run.observe(loss)
        assert run.done is done
    assert run.best_loss == 0.9


def test_best_weights_come_back_only_when_asked(digits):
    run = member(train=Train(epochs=9, restore_best=True, batch_size=32))
    population = Population(digits)
    population.epoch([run])
    run.observe(0.5)
    best = weights(run)
    population.epoch([run])
    run.observe(0.6)
    assert not torch.equal(weights(run)["output.weight"], best["output.weight"])
    run.restore_best()
    assert all(torch.equal(value, best[name]) for name, value in weights(run).items())


def test_best_weights_that_came_back_are_those_that_a_narrowed_network_is_measured_with(digits):
    gone = torch.arange(20) < 8
    run = member(train=Train(epochs=9, restore_best=True, batch_size=32))
    run.masks = Masks({"hidden_1.weight": ~gone[:, None].expand(-1, 64), "hidden_1.bias": ~gone})
    run.masks.apply_(run.model)
    population = Population(digits)
    population.epoch([run])
    best = population.evaluate([run], digits.validation)[0]
    run.observe(0.5)
    population.epoch([run])
    run.observe(0.6)
    assert population.evaluate([run], digits.validation)[0] != best
    run.restore_best()
    assert population.evaluate([run], digits.validation)[0].loss == pytest.approx(best.loss, rel=1e-6)


def test_learning_rate_falls_at_its_milestones():
    run = member(train=Train(epochs=9, lr=1.0, lr_milestones=(2, 4), lr_factor=0.1))
    rates = []
    for run.epoch in range(6):
        rates.append(run.lr)
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_loss_of_batches_weighs_a_short_last_batch_like_a_full_one(digits):
    run = member(train=Train(batch_size=200))
    found = Population(digits).evaluate([run], digits.test)[0]
    with torch.no_grad():
        each = F.cross_entropy(run.model(digits.scale(digits.test.x)), digits.test.y, reduction="none")
    assert found.loss == pytest.approx(each.mean().item(), rel=1e-5)
    assert found.loss_of_batches == pytest.approx(
        torch.stack([b.mean() for b in each.split(200)]).mean().item(), rel=1e-5
    )


def test_f1_macro_by_hand_and_against_scikit_learn():
    y, predicted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])
    # class 0: 2*1/(2+0+1) = 2/3; class 1: 2*1/(2+2+0) = 1/2; class 2: 0
    assert f1_macro(predicted, y, 3) == pytest.approx((2 / 3 + 1 / 2) / 3)
    draw = torch.Generator().manual_seed(0)
    y, predicted = torch.randint(0, 5, (200,), generator=draw), torch.randint(0, 5, (200,), generator=draw)
    assert f1_macro(predicted, y, 5) == pytest.approx(f1_score(y, predicted, average="macro"))


def test_a_stack_is_the_models_side_by_side():
    nets = [mlp(6, 5, 3), mlp(6, 4, 3)]
    x = torch.randn(2, 7, 6)
    expected = torch.stack([net(part) for net, part in zip(nets, x, strict=True)])
    shared = torch.stack([net(x[0]) for net in nets])
    stack = Stack(nets)
    torch.testing.assert_close(stack(x), expected)
    torch.testing.assert_close(stack(x[0], shared=True), shared)
    assert nets[1].hidden_1.weight.shape == (4, 6)


def test_models_that_are_no_chain_train_alone(digits):
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.output = nn.Linear(64, 10)

        def forward(self, x):
            x = x.flatten(1)
            return self.output(x + self.first(x).relu())

    assert not stackable(Skip())
    runs = [Member(net, Train(batch_size=32), Masks.ones(net), generator(0, "order")) for net in (Skip(), Skip())]
    assert [epoch.lockstep for epoch in Population(digits).epoch(runs)] == [1, 1]
    assert all(math.isfinite(e.loss) for e in Population(digits).evaluate(runs, digits.test))


def test_absent_cuda_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(PrunelabError, match="no usable CUDA; use device='auto' or 'cpu'"):
        device("cuda")
    for absent in ("meta", None):
        with pytest.raises(PrunelabError, match=f"device {absent!r}: no such device"):
            device(absent)
    with pytest.raises(PrunelabError, match="no such device"):
        device("gpuu")
    assert device("auto").type == "cpu"


def without_first_units(net, layer, count):
    weight = net.get_parameter(f"{layer}.weight")
    rows = torch.ones(len(weight), dtype=torch.bool)
    rows[:count] = False
    masks = {f"{layer}.weight": rows.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight), f"{layer}.bias": rows}
    return {**dict(Masks.ones(net)), **masks}


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("name", "layer", "count"), [("mlp", "hidden_2", 3), ("dropnet_b", "conv_1", 2), ("mlp", "hidden_1", 6)]
)
def test_units_that_are_masked_whole_are_left_out_and_nothing_changes(digits, name, layer, count, optimiser):
    hidden = (6, 5) if name == "mlp" else (4, 3)
    train = Train(epochs=2, batch_size=32, optimiser=optimiser, lr=0.05, shuffle=False)
    net = models.build(Model(name, hidden), digits.shape, 10, 0)
    masks = Masks(without_first_units(net, layer, count))
    run = Member(net, train, masks, generator(0, "order"))
    other = models.build(Model(name, hidden), digits.shape, 10, 0)
    masks.apply_(other)
    torch_s = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimiser](other.parameters(), lr=0.05)
    population = Population(digits)
    for _ in range(2):
        population.epoch([run])
        for start in range(0, len(digits.train.y), 32):
            x, y = digits.scale(digits.train.x[start : start + 32]), digits.train.y[start : start + 32]
            torch_s.zero_grad()
            F.cross_entropy(other(x), y).backward()
            torch_s.step()
            masks.apply_(other)
    for (name_, mine), its in zip(run.model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=2e-3, atol=2e-4, msg=lambda text, n=name_: f"{n}: {text}")
    assert population.evaluate([run], digits.test)[0].accuracy == pytest.approx(
        (other(digits.scale(digits.test.x)).argmax(1) == digits.test.y).double().mean().item(), abs=0.02
    )


@pytest.mark.parametrize(
    "layers", [(nn.ReLU,), (nn.Sigmoid, nn.ReLU), (nn.Tanh,), (nn.LeakyReLU,), (nn.GELU,), (nn.Identity, nn.ReLU)]
)
@pytest.mark.parametrize("pool", [nn.MaxPool2d, nn.AvgPool2d])
def test_gradients_written_by_hand_are_those_of_autograd(layers, pool):
    torch.manual_seed(0)
    nets = [
        nn.Sequential(
            nn.Conv2d(2, wide, 3, padding=1), *[kind() for kind in layers], pool(2),
            nn.Conv2d(wide, 4, 3, stride=2), *[kind() for kind in layers], nn.Flatten(),
            nn.Linear(4 * 3 * 3, 5), *[kind() for kind in layers], nn.Linear(5, 3),
        )
        for wide in (3, 5)
    ]  # fmt: skip
    for chosen in (nets, nets[:1]):
        x, y = torch.randn(len(chosen), 7, 2, 14, 14), torch.randint(0, 3, (len(chosen), 7))
        expected = [
            torch.autograd.grad(F.cross_entropy(net(part), own), list(net.parameters()))
            for net, part, own in zip(chosen, x, y, strict=True)
        ]
        stack = Stack(chosen)
        gradients = {name: stack.zeros(name) for name in stack.parameters}
        stack.learn(x, y, gradients, torch.ones(len(chosen)))
        for run, own in enumerate(expected):
            for (name, parameter), gradient in zip(chosen[run].named_parameters(), own, strict=True):
                found = gradients[name][run][tuple(slice(size) for size in parameter.shape)]
                torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_a_penalty_on_the_squared_weights_is_weight_decay(digits):
    decayed, penalised = (
        member(train=Train(epochs=2, batch_size=32, optimiser="sgd", lr=0.1, weight_decay=decay), data=digits)
        for decay in (0.01, 0.0)
    )
    penalised.penalty = lambda model: {name: 0.01 * p.detach() for name, p in model.named_parameters()}
    others = [
        member(seed=s, train=Train(epochs=2, batch_size=32, optimiser="sgd", lr=0.1), data=digits) for s in (1, 2)
    ]
    Population(digits).epoch([decayed])
    Population(digits).epoch([*others, penalised])
    for name, parameter in weights(decayed).items():
        torch.testing.assert_close(weights(penalised)[name], parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "hidden"), [("vgg11", (4, 4, 8, 8, 8, 8)), ("resnet20", (4, 8, 8))])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_of_a_network_that_is_no_chain_is_torch_s(digits, model, hidden, momentum):
    """The gradients of its convolutions lie in memory in another order than the weights."""
    settings = Train(epochs=1, batch_size=300, optimiser="sgd", lr=0.05, momentum=momentum)
    ours, theirs = (member(train=settings, model=model, hidden=hidden, data=digits) for _ in range(2))
    before = {name: parameter.clone() for name, parameter in weights(ours).items()}
    Population(digits).epoch([ours])
    net, rows = theirs.model.train(), torch.randperm(300, generator=generator(0, "order"))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=momentum)
    F.cross_entropy(net(digits.scale(digits.train.x[rows])), digits.train.y[rows]).backward()
    optimiser.step()
    for name, parameter in net.named_parameters():
        step = parameter.detach() - before[name]
        off = (weights(ours)[name] - parameter).abs().max()
        assert off <= 0.05 * step.abs().max() + 1e-7, name


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_stays_with_the_process():
    """A block that was freed still counts as memory of the process."""
    code = """
import sys
import psutil, torch
from prunelab.training.memory import keep_freed_memory
torch.ones(1)
assert sys.argv[1] == "plain" or keep_freed_memory()
before = psutil.Process().memory_info().rss
torch.ones(16, 2**20)
print(psutil.Process().memory_info().rss - before)
"""
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", code, how], check=True, capture_output=True, text=True).stdout)
        for how in ("plain", "kept")
    )
    assert plain < 2**24 < 2**25 < kept  # of 64 MiB


BF16 = {"epochs": 2, "batch_size": 32, "optimiser": "sgd", "lr": 0.05, "momentum": 0.9, "precision": "bfloat16"}


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("pool", [nn.MaxPool2d, nn.AvgPool2d])
def test_gradients_of_maps_in_bfloat16_are_as_close_to_those_in_float32_as_autocast_gets(runs, pool):
    torch.manual_seed(0)
    nets = [
        nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), pool(2), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(8 * 5 * 5, 5), nn.ReLU(), nn.Linear(5, 3),
        )
        for _ in range(runs)
    ]  # fmt: skip
    x, y = torch.randn(runs, 32, 2, 14, 14), torch.randint(0, 3, (runs, 32))

    def by_autograd(reduced):
        found = []
        for net, part, own in zip(nets, x, y, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
                logits = net(part)
            loss = F.cross_entropy(logits.float(), own)
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))
        return torch.stack(found)

    exact, usual = by_autograd(reduced=False), by_autograd(reduced=True)
    stack = Stack(nets, torch.bfloat16)
    gradients = {name: stack.zeros(name) for name in stack.parameters}
    stack.learn(x, y, gradients, torch.ones(runs))
    ours = torch.cat([gradient.reshape(runs, -1) for gradient in gradients.values()], 1)
    assert 0 < (ours - exact).norm() < 1.5 * (usual - exact).norm() < 0.2 * exact.norm()
    assert stack(x).dtype == torch.float32


@pytest.mark.parametrize(("model", "hidden"), [("dropnet_b", (6, 5)), ("resnet20", (4, 4, 4))])
def test_training_in_bfloat16_keeps_float32_weights_and_what_is_pruned_at_zero(digits, model, hidden):
    exact = {name: value for name, value in BF16.items() if name != "precision"}
    runs = [member(0, Train(**settings), model=model, hidden=hidden, data=digits) for settings in (BF16, exact)]
    for run in runs:
        run.change(run.model, half_masks(run.model))
    population = Population(digits)
    assert [epoch.lockstep for epoch in population.epoch(runs)] == [1, 1]  # those of two precisions do not fit together
    population.epoch(runs)
    reduced, plain = runs
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in reduced.model.state_dict().values())
    assert all((reduced.model.get_parameter(name)[~mask] == 0).all() for name, mask in reduced.masks.items())
    assert any(not torch.equal(weights(reduced)[name], value) for name, value in weights(plain).items())
    here, there = population.evaluate(runs, digits.test)
    assert here.loss == pytest.approx(there.loss, rel=0.15)
    with torch.no_grad():  # what is measured is measured in float32
        expected = F.cross_entropy(reduced.model(digits.scale(digits.test.x)), digits.test.y).item()
    assert here.loss == pytest.approx(expected, rel=1e-5)


def test_what_dropout_drops_follows_from_the_seed(digits):
    def losses(seed):
        run = member(seed, Train(epochs=2, batch_size=50), Masks({}), "vgg_like", (2, 2, 2, 2, 2, 8))
        population = Population(digits)
        return [population.epoch([run])[0].loss for _ in range(2)]

    before = torch.get_rng_state()
    first = losses(0)
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's numbers change
    torch.rand(3)
    assert losses(0) == first
    assert first[0] != first[1]


def test_auto_is_the_precision_that_is_faster_here(digits, monkeypatch):
    auto = Train(**(BF16 | {"precision": "auto"}))
    where = torch.device("cpu")
    for knows in (True, False):
        monkeypatch.setattr(train, "knows_bfloat16", lambda where, knows=knows: knows)
        wide = member(0, auto, model="dropnet_b", hidden=(32, 16), data=digits)
        narrow = member(0, auto, model="dropnet_b", hidden=(6, 5), data=digits)
        assert wide.precision(where) == (torch.bfloat16 if knows else torch.float32)
        assert narrow.precision(where) == member(0, auto, data=digits).precision(where) == torch.float32
    fixed = member(0, Train(**BF16), model="dropnet_b", hidden=(6, 5), data=digits)
    assert fixed.precision(where) == torch.bfloat16
    asked = member(0, Train(**(BF16 | {"precision": "float32"})), model="dropnet_b", hidden=(6, 5), data=digits)
    for one in (narrow, asked):
        Population(digits).epoch([one])
    assert all(torch.equal(value, weights(asked)[name]) for name, value in weights(narrow).items())


def test_maps_are_measured_in_pieces_that_fit_the_cache(digits):
    assert train.pieces({"w": (40, 784)}, (1, 28, 28), torch.device("cpu")) == train.EVALUATION_BATCH
    # 64 maps of 28 x 28 float32 are 200,704 bytes: 83 samples in 16 MiB, 80 in rows of 16
    assert train.pieces({"conv.weight": (64, 1, 3, 3)}, (1, 28, 28), torch.device("cpu")) == 80
    assert train.pieces({"conv.weight": (64, 3, 3, 3)}, (3, 224, 224), torch.device("cpu")) == 16
    one = member(0, Train(epochs=1), model="dropnet_b", hidden=(6, 5), data=digits)
    found = Population(digits).evaluate([one], digits.test)[0]
    with torch.no_grad():
        expected = F.cross_entropy(one.model(digits.scale(digits.test.x)), digits.test.y).item()
    assert found.loss == pytest.approx(expected, rel=1e-5)
