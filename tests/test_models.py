"""Networks: sizes counted by hand, names, first weights, and what they refuse."""

import pytest
import torch
from torch import nn

from prunelab import settings
from prunelab.errors import PrunelabError
from prunelab.models import MODELS, build, initialise, layer_widths, mlp, other_sizes

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "hidden", "shape", "classes", "parameters"),
    [
        ("mlp", (), MNIST, 10, 2_797_010),  # DyPrune's network
        ("mlp", (5, 4), (4,), 3, (4 + 1) * 5 + (5 + 1) * 4 + (4 + 1) * 3),
        ("lenet_300_100", (), MNIST, 10, 266_610),
        ("lenet_5", (), MNIST, 10, 431_080),
        ("dropnet_a", (), MNIST, 10, (784 + 1) * 40 + (40 + 1) * 40 + (40 + 1) * 10),
        ("dropnet_a", (20, 40), MNIST, 10, (784 + 1) * 20 + (20 + 1) * 40 + (40 + 1) * 10),
        ("dropnet_b", (), MNIST, 10, (9 + 1) * 64 + (9 * 64 + 1) * 64 + (7 * 7 * 64 + 1) * 10),
        ("dropnet_b", (20, 20), MNIST, 10, (9 + 1) * 20 + (9 * 20 + 1) * 20 + (7 * 7 * 20 + 1) * 10),
        (
            "dropnet_c",
            (),
            CIFAR,
            10,
            (27 + 1) * 64
            + (9 * 64 + 1) * 64
            + (9 * 64 + 1) * 128
            + (9 * 128 + 1) * 128
            + (2 * 2 * 128 + 1) * 256
            + (256 + 1) * 10,
        ),
    ],
)
def test_parameters_are_those_counted_by_hand(name, hidden, shape, classes, parameters):
    model = build(settings.Model(name, hidden), shape, classes, seed=0)
    assert size(model) == parameters
    assert model(torch.zeros(2, *shape)).shape == (2, classes)


def test_every_model_is_a_chain_and_the_small_ones_of_plain_torch_modules():
    for name in MODELS:
        model = build(settings.Model(name), CIFAR, 10, seed=0)
        assert type(model) is nn.Sequential
        if name.startswith(("mlp", "lenet", "dropnet_a", "dropnet_b", "dropnet_c")):
            assert {type(layer) for layer in model} <= {nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten, nn.Linear}


def test_layers_have_the_promised_names_in_forward_order():
    assert [name for name, _ in mlp(4, 5, 4, 3).named_children()] == [
        *("flatten", "hidden_1", "relu_1", "hidden_2", "relu_2", "output")
    ]
    assert [name for name, _ in build(settings.Model("lenet_5"), MNIST, 10, 0).named_children()] == [
        *("conv_1", "relu_1", "pool_1", "conv_2", "relu_2", "pool_2", "flatten", "dense", "relu_dense", "output")
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("shape", "classes"), [((3, 64, 64), 200), ((1, 21, 33), 2), ((2, 16, 16), 100)])
def test_every_model_builds_for_any_image_and_number_of_classes(name, shape, classes):
    small = tuple(2 + n for n in range(len(MODELS[name].hidden)))
    model = build(settings.Model(name, small), shape, classes, seed=1)
    assert model(torch.zeros(3, *shape)).shape == (3, classes)


def test_same_seed_gives_the_same_bits_and_another_seed_others():
    one, same, other = (build(settings.Model("lenet_5"), MNIST, 10, seed) for seed in (3, 3, 4))
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("init", ["pytorch", "kaiming_normal", "glorot_uniform"])
def test_building_leaves_the_global_generator_where_it_was_and_does_not_depend_on_it(init):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build(settings.Model("mlp", (8,), init), (4,), 3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    second = build(settings.Model("mlp", (8,), init), (4,), 3, seed=0)
    assert torch.equal(first.hidden_1.weight, second.hidden_1.weight)


def test_models_are_built_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        model = build(settings.Model("dropnet_b", (2, 2)), MNIST, 10, seed=0)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def spread(weight: torch.Tensor) -> float:
    return weight.detach().double().std().item()


def test_pytorch_weights_and_biases_are_uniform_within_one_over_root_fan_in():
    model = build(settings.Model("lenet_300_100"), MNIST, 10, seed=0)
    for layer, fan_in in ((model.hidden_1, 784), (model.hidden_2, 300)):
        bound = fan_in**-0.5
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert 0.5 * bound < layer.bias.abs().max() <= bound
        assert spread(layer.weight) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_kaiming_normal_has_variance_two_over_fan_in_and_keeps_the_biases_of_pytorch():
    plain = build(settings.Model("lenet_5"), MNIST, 10, seed=0)
    model = build(settings.Model("lenet_5", init="kaiming_normal"), MNIST, 10, seed=0)
    for name, fan_in in (("conv_2", 20 * 25), ("dense", 50 * 16)):
        weight = model.get_submodule(name).weight
        assert spread(weight) == pytest.approx((2 / fan_in) ** 0.5, rel=0.03)
        assert weight.abs().max() > 3 * (2 / fan_in) ** 0.5  # a normal has tails, a uniform of this spread none
        assert torch.equal(model.get_submodule(name).bias, plain.get_submodule(name).bias)


def test_glorot_uniform_has_the_bounds_of_keras_and_zero_biases():
    model = build(settings.Model("dropnet_c", init="glorot_uniform"), CIFAR, 10, seed=0)
    for name, fans in (("conv_3", 9 * 64 + 9 * 128), ("dense", 512 + 256), ("output", 256 + 10)):
        layer, bound = model.get_submodule(name), (6 / fans) ** 0.5
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert spread(layer.weight) == pytest.approx(bound / 3**0.5, rel=0.03)
        assert not layer.bias.any()


def test_initialise_leaves_normalisation_alone_and_takes_layers_without_bias():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4))
    drawn = model[0].weight.detach().clone()
    initialise(model, "glorot_uniform")
    assert not torch.equal(model[0].weight, drawn)
    assert model[1].weight.eq(1).all()


def test_layer_widths_lists_hidden_neurons_and_filters_but_not_the_output():
    model = build(settings.Model("dropnet_c"), CIFAR, 10, seed=0)
    filters = [("conv_1", 64), ("conv_2", 64), ("conv_3", 128), ("conv_4", 128)]
    assert layer_widths(model) == [*filters, ("dense", 256)]
    masked = [name for name, _ in filters]
    assert sum(units for _, units in layer_widths(model, masked)) == 384  # the count of DropNet's Fig. 9
    assert layer_widths(mlp(4, 3)) == []


def message(*args, **kwargs) -> str:
    with pytest.raises(PrunelabError) as caught:
        build(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_misspelt_model_layer_or_initialisation_gets_the_nearest_name():
    assert "did you mean 'lenet_5'" in message(settings.Model("lenet5"), MNIST, 10, 0)
    with pytest.raises(PrunelabError, match="did you mean 'hidden_1'"):
        layer_widths(mlp(4, 5, 3), ["hiden_1"])
    with pytest.raises(PrunelabError, match="did you mean 'kaiming_normal'"):
        initialise(mlp(4, 3), "kaiming")


@pytest.mark.parametrize(
    ("name", "hidden", "expected"),
    [("lenet_5", (20, 50), 3), ("dropnet_a", (40,), 2), ("dropnet_b", (1, 2, 3), 2), ("dropnet_c", (64, 64), 4)],
)
def test_hidden_sizes_of_the_wrong_number_are_refused(name, hidden, expected):
    assert f"should have {expected}" in message(settings.Model(name, hidden), CIFAR, 10, 0)


@pytest.mark.parametrize(
    ("name", "side", "layer", "needed"),
    [
        ("lenet_5", 15, "pool_2", 16),
        ("lenet_5", 12, "conv_2", 16),
        ("lenet_5", 5, "pool_1", 16),
        ("lenet_5", 3, "conv_1", 16),
        ("dropnet_b", 3, "pool_2", 4),
        ("dropnet_c", 15, "pool_4", 16),
    ],
)
def test_too_small_an_image_names_the_layer_and_the_size_it_needs(name, side, layer, needed):
    text = message(settings.Model(name), (1, side, 40), 10, 0)
    assert f"model {name!r}" in text
    assert f"layer {layer!r}: needs {needed} x {needed}" in text
    enough = build(settings.Model(name), (1, needed, needed), 10, 0)
    assert enough(torch.zeros(1, 1, needed, needed)).shape == (1, 10)


def test_inputs_that_make_no_sense_are_refused():
    assert "use 'mlp'" in message(settings.Model("lenet_5"), (4,), 3, 0)
    assert "should be (features,) or (C, H, W)" in message(settings.Model("mlp"), (28, 28), 10, 0)
    assert "should be (features,) or (C, H, W)" in message(settings.Model("mlp"), (0,), 10, 0)
    assert "0 classes" in message(settings.Model("mlp"), (4,), 0, 0)
    with pytest.raises(PrunelabError, match="each at least 1"):
        mlp(4)
    with pytest.raises(PrunelabError, match="each at least 1"):
        mlp(4, 0, 3)


def test_a_caption_names_sizes_only_where_they_are_not_the_networks_own():
    assert other_sizes("vgg_like", ()) == ""
    assert other_sizes("lenet_300_100", [300, 100]) == ""
    assert other_sizes("lenet_300_100", (30, 10)) == "widths 30-10 in place of 300-100"
    assert other_sizes("dropnet_a", (20, 40), (20, 40)) == ""
