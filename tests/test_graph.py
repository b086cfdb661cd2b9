"""The graph of a model: what is normalised to what, what is not understood, and that tracing changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunelab.structure.graph import GraphError, trace

X = torch.randn(3, 4, 8, 8)


class Net(nn.Module):
    """A network whose forward is a function of its layers."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.compute = forward

    def forward(self, x):
        return self.compute(self, x)


def kinds(forward, x=X, **layers):
    return [node.kind for node in trace(Net(forward, **layers), x)]


@pytest.mark.parametrize(
    ("kind", "same"),
    [
        (
            "elementwise",
            [F.relu, torch.relu, lambda x: x.relu(), nn.ReLU(), nn.PReLU(), lambda x: x + 1, torch.sigmoid],
        ),
        ("flatten", [lambda x: torch.flatten(x, 1), lambda x: x.flatten(1), nn.Flatten(), lambda x: x.view(3, -1)]),
        ("pool", [nn.MaxPool2d(2), lambda x: F.max_pool2d(x, 2), lambda x: F.adaptive_avg_pool2d(x, 1)]),
        ("mean", [lambda x: x.mean([2, 3]), lambda x: torch.mean(x, (2, 3))]),
        ("slice", [lambda x: x[:, :, ::2, ::2]]),
        ("pad", [lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), nn.ConstantPad3d((0, 0, 0, 0, 1, 1), 0.0), nn.ZeroPad2d(1)]),
        ("permute", [lambda x: x.permute(0, 2, 3, 1), lambda x: x.transpose(1, 2)]),
    ],
)
def test_forms_of_one_operation_are_one_kind(kind, same):
    for operation in same:
        found = kinds(lambda net, x, operation=operation: operation(x), operation=operation) if isinstance(
            operation, nn.Module
        ) else kinds(lambda net, x, operation=operation: operation(x))  # fmt: skip
        assert found == ["input", kind, "output"], operation


@pytest.mark.parametrize(
    ("kind", "same"),
    [
        ("add", [lambda a, b: a + b, torch.add, lambda a, b: a.add(b), lambda a, b: a - b]),
        ("mul", [lambda a, b: a * b, torch.mul, lambda a, b: a / b]),
        ("cat", [lambda a, b: torch.cat([a, b], 1), lambda a, b: torch.cat((a, b), dim=1)]),
    ],
)
def test_forms_of_one_joining_are_one_kind(kind, same):
    for operation in same:
        assert kinds(lambda net, x, operation=operation: operation(x.relu(), x.tanh()))[-2] == kind


def test_sizes_are_constants_and_a_view_of_them_flattens():
    graph = trace(Net(lambda net, x: x.view(x.size(0), -1)), X)
    assert [node.kind for node in graph] == ["input", "constant", "flatten", "output"]
    assert graph["view"].shape == (3, 256)


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: x.chunk(2, 1)[0],
        lambda x: x / x.abs().max(),
        lambda x: x - x.mean((0, 2, 3)).view(1, -1, 1, 1),
        lambda x: x[:, 1:],
        lambda x: torch.softmax(x, 1),
        lambda x: x.view(3, 2, 2, 8, 8).transpose(1, 2).reshape(3, 4, 8, 8),
    ],
)
def test_what_mixes_channels_is_opaque(odd):
    graph = trace(Net(lambda net, x: odd(x)), X)
    assert "opaque" in [node.kind for node in graph]


def test_nested_modules_are_traced_into_and_named():
    inner = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    graph = trace(nn.Sequential(nn.Sequential(inner), nn.Flatten(), nn.Linear(180, 2)), X)
    assert [(n.module_name, n.kind) for n in graph if n.module_name] == [
        ("0.0.0", "conv"), ("0.0.1", "batchnorm"), ("0.0.2", "elementwise"), ("1", "flatten"), ("2", "linear"),
    ]  # fmt: skip
    assert [node.module_name for node in graph.weighted()] == ["0.0.0", "2"]
    conv, linear = graph.weighted()
    assert [node.kind for node in graph.consumers(conv.name)] == ["batchnorm"]
    assert (conv.shape, linear.shape) == ((3, 5, 6, 6), (3, 2))
    assert conv.where == "module '0.0.0' (Conv2d)"


def test_tracing_changes_neither_the_model_nor_its_mode():
    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Dropout(), nn.Flatten(), nn.Linear(180, 2))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    trace(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True, True]
    assert torch.equal(generator, torch.get_rng_state())


def test_what_cannot_be_traced_is_refused_in_one_line():
    cases = [
        (lambda net, x: x if x.sum() > 0 else -x, "should not branch on values"),
        (lambda net, x: x @ x.new_zeros(5, 5), r"takes no input of shape \(3, 4, 8, 8\)"),
    ]
    for forward, why in cases:
        with pytest.raises(GraphError, match=why) as caught:
            trace(Net(forward), X)
        assert "\n" not in str(caught.value)


def test_the_arguments_behind_the_first_have_their_defaults():
    class Optional(nn.Module):
        def forward(self, x, scale=None, features=False, *, slope=0.1):
            found = F.leaky_relu(x, slope)
            if scale is not None:
                found = found * scale
            return (found, x) if features else found

    graph = trace(Optional(), X)
    assert graph["leaky_relu"].kwargs["negative_slope"] == 0.1
    assert [node.kind for node in graph] == ["input", "elementwise", "output"]


def test_an_example_that_is_no_tensor_is_refused_in_one_line():
    with pytest.raises(GraphError, match="should be one batch of inputs, a tensor, not a tuple"):
        trace(nn.ReLU(), (X, X))
