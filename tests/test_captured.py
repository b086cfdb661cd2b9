"""Steps that are recorded and replayed: by a recorder of torch's operations, and by CUDA where there is a GPU.

The recorder replays what CUDA would: the same operations on the same memory, with the numbers of Python frozen as they
were. So whatever a step does by Python, or in memory that another call does not use, shows here too.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from prunelab import models
from prunelab.data import load
from prunelab.masks import Masks
from prunelab.settings import Data, Model, Train
from prunelab.training import captured, train
from prunelab.training.captured import WARM_UP, Repeated
from prunelab.training.train import Member, Population, generator


class Recorder(TorchDispatchMode):
    """Keeps every operation with its tensors; unlike CUDA it cannot but do it, so the first replay does nothing."""

    def __init__(self):
        super().__init__()
        self.tape, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.tape.append((function, args, kwargs or {}, result))
        return result

    def warm_up(self, step):
        return step()

    def record(self, step):
        with self:
            return step()

    def replay(self):
        self.replays += 1
        if self.replays == 1:
            return
        with torch._C._AutoDispatchBelowAutograd():  # where they were recorded
            for function, args, kwargs, result in self.tape:
                again = function(*args, **kwargs)
                for old, new in zip(flat(result), flat(again), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)  # the memory in which the recorded result lies


def flat(result):
    found = []
    tree_map_only(torch.Tensor, found.append, result)
    return found


@pytest.fixture
def recorded(monkeypatch):
    graphs = []

    def repeated(step, where):
        graphs.append(Recorder())
        return Repeated(step, graphs[-1])

    monkeypatch.setattr(train, "repeated", repeated)
    return graphs


CASES = {
    "one, plain SGD": (1, "mlp", Train(epochs=3, batch_size=32, optimiser="sgd", lr=0.1)),
    "three, plain SGD": (3, "mlp", Train(epochs=3, batch_size=32, optimiser="sgd", lr=0.1)),
    "three in the data's order": (3, "mlp", Train(epochs=3, batch_size=32, optimiser="sgd", lr=0.1, shuffle=False)),
    "three, momentum": (3, "mlp", Train(epochs=3, batch_size=32, optimiser="sgd", lr=0.05, momentum=0.9)),
    "three, Adam": (3, "mlp", Train(epochs=3, batch_size=32, optimiser="adam", weight_decay=5e-4)),
    "three, plan": (3, "mlp", Train(epochs=3, batch_size=32, optimiser="adam", lr_milestones=(1, 2))),
    "two of convolutions": (2, "dropnet_b", Train(epochs=2, batch_size=32, optimiser="sgd", lr=0.1)),
    "two in bfloat16": (2, "dropnet_b", Train(epochs=2, batch_size=32, optimiser="sgd", lr=0.1, precision="bfloat16")),
    "one by autograd in bfloat16": (
        1,
        "resnet20",
        Train(epochs=2, batch_size=32, optimiser="sgd", precision="bfloat16"),
    ),
    "one by autograd": (1, "resnet20", Train(epochs=2, batch_size=32, optimiser="sgd", lr=0.05, momentum=0.9)),
}


def trained(runs, model, settings, where="cpu", masked=True):
    data = load(Data("digits", train_size=300), where)
    sizes = {"mlp": (20, 12), "dropnet_b": (4, 6), "resnet20": (4, 4, 4)}[model]
    members = []
    for seed in range(runs):
        net = models.build(Model(model, sizes), data.shape, len(data.classes), seed)
        draw = torch.Generator().manual_seed(seed)
        masks = Masks({n: torch.rand(p.shape, generator=draw) < 0.7 for n, p in net.named_parameters() if p.dim() > 1})
        net, masks = net.to(where), (masks if masked else Masks.ones(net)).to(where)
        members.append(Member(net, settings, masks, generator(seed, "order")))
    population = Population(data)
    epochs = [population.epoch(members) for _ in range(settings.epochs)]
    losses = [[(e.loss, e.accuracy) for e in epoch] for epoch in epochs]
    return losses, [{n: t.detach().cpu().clone() for n, t in m.model.state_dict().items()} for m in members]


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_a_recorded_step_does_what_the_step_does(recorded, monkeypatch, case, masked):
    found = trained(*CASES[case], masked=masked)
    monkeypatch.setattr(train, "repeated", captured.repeated)
    expected = trained(*CASES[case], masked=masked)
    assert all(graph.replays > WARM_UP for graph in recorded)
    assert len(recorded) == (3 if case == "three, plan" else 1)  # a new learning rate is a new recording
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]))
    for own, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(own, other)


def test_inputs_of_another_shape_and_steps_that_cannot_be_recorded_run_as_they_are(caplog):
    seen = []

    def step(x):
        seen.append(tuple(x.shape))
        return x.sum()

    graph = Recorder()
    again = Repeated(step, graph)
    for n in range(6):
        assert again(torch.full((2,), float(n))) == 2 * n
    assert again(torch.ones(5)) == 5
    assert seen == [(2,)] * (WARM_UP + 1) + [(5,)]
    assert graph.replays == 6 - WARM_UP

    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graph = Recorder()
    graph.record = refuse
    again = Repeated(step, graph)
    assert [again(torch.ones(3)).item() for _ in range(6)] == [3] * 6
    assert [r.getMessage() for r in caplog.records] == [
        "the step runs without a CUDA graph: operation not permitted when stream is capturing"
    ]


def test_a_cpu_has_nothing_to_gain():
    assert captured.repeated(len, torch.device("cpu")) is len


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_replays_what_a_cpu_does(case):
    found, expected = trained(*CASES[case], where="cuda"), trained(*CASES[case])
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-3, atol=1e-3)
    for own, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-2, atol=1e-3)
