"""BatchNorm folded into the layer before it: same outputs, reasons for what is left, files and ONNX."""

import copy

import pytest
import torch
from test_shrink import ARCHITECTURES, IMAGES, Net, conv, head, made, random_masks
from torch import nn

from prunelab.masks import Masks
from prunelab.pruners import prune
from prunelab.structure.export import ExportError, load, save, to_onnx
from prunelab.structure.report import report
from prunelab.structure.shrink import TOLERANCE, ShrinkError, batchnorms, carry, norms, remove_dead, shrink

pytestmark = pytest.mark.filterwarnings("ignore::prunelab.structure.NotRemoved")


def settled(model):
    """BatchNorms as after a training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            if module.running_mean is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def normalised(name, seed):
    """An architecture with a BatchNorm right behind every layer but the last."""
    model = made(name, seed)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for place in layers[:-1]:
        layer = model.get_submodule(place)
        kind = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d
        model.set_submodule(place, nn.Sequential(layer, kind(len(layer.weight))))
    return settled(model), [f"{place}.1" for place in layers[:-1]]


def same(expected, found):
    return float((expected - found).detach().abs().max()) <= TOLERANCE * float(expected.detach().abs().max())


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "last axis"])  # no axis of BatchNorm
@pytest.mark.parametrize("whole_units", [True, False])
def test_outputs_are_those_of_the_masked_model(name, whole_units):
    folded = 0
    for seed in range(4):
        model, norms = normalised(name, seed)
        masks = random_masks(model, seed, whole_units)
        before = copy.deepcopy(model.state_dict())
        masked = copy.deepcopy(model)
        masks.apply_(masked)
        example, other = torch.randn(IMAGES), torch.randn(IMAGES)
        try:
            found = remove_dead(model, masks, example, fold_batchnorm=True)
        except ShrinkError as error:
            assert "no live unit left" in str(error)  # noqa: PT017
            continue
        folded += 1
        assert set(norms) <= set(found.folded)
        assert found.unfolded == {}
        assert not batchnorms(found.model)
        assert same(masked(other), found.model(other))
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert folded


def test_the_numbers_by_hand():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2, eps=0.0)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0], [3.0]]))
        model[1].running_mean.copy_(torch.tensor([1.0, -1.0]))
        model[1].running_var.copy_(torch.tensor([4.0, 0.25]))
        model[1].weight.copy_(torch.tensor([1.0, 0.5]))
        model[1].bias.copy_(torch.tensor([10.0, 20.0]))
    found = shrink(model, None, torch.tensor([[1.0], [2.0], [4.0]]), fold_batchnorm=True)
    assert found[0].weight.flatten().tolist() == [1.0, 3.0]
    assert found[0].bias.tolist() == [9.5, 21.0]


def dense_block(net, x):
    a = net.first(x)
    b = net.second(net.norm_1(a).relu())
    return net.head(net.norm_2(torch.cat([a, b], 1)).relu().mean((2, 3)))


CASES = {
    "concatenation": (
        lambda: Net(
            dense_block, first=conv(2, 3), norm_1=nn.BatchNorm2d(3), second=conv(3, 4), norm_2=nn.BatchNorm2d(7),
            head=head(7)
        ),
        {
            "norm_1": "what 'first' gives is also read elsewhere",
            "norm_2": "what it reads is not given by a convolution or a Linear",
        },
    ),
    "two readers": (
        lambda: Net(
            lambda net, x: net.head((net.norm_1(a := net.first(x)) + net.norm_2(a)).mean((2, 3))),
            first=conv(2, 3), norm_1=nn.BatchNorm2d(3), norm_2=nn.BatchNorm2d(3), head=head(3)
        ),
        {
            "norm_1": "what 'first' gives is also read elsewhere",
            "norm_2": "what 'first' gives is also read elsewhere",
        },
    ),
    "activation between": (
        lambda: nn.Sequential(conv(2, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), head(192)),
        {"2": "what it reads is not given by a convolution or a Linear"},
    ),
    "statistics of the batch": (
        lambda: nn.Sequential(conv(2, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), head(192)),
        {"1": "it has no running statistics"},
    ),
    "a layer twice": (
        lambda: Net(
            lambda net, x: net.head(net.norm(net.first(net.first(x))).mean((2, 3))),
            first=conv(2, 2), norm=nn.BatchNorm2d(2), head=head(2)
        ),
        {"norm": "'first' is used more than once, or it is itself"},
    ),
    "a norm twice": (
        lambda: Net(
            lambda net, x: net.head(net.norm(net.second(net.norm(net.first(x)))).mean((2, 3))),
            first=conv(2, 3), second=conv(3, 3), norm=nn.BatchNorm2d(3), head=head(3)
        ),
        {"norm": "'first' is used more than once, or it is itself"},
    ),
    "another axis": (
        lambda: Net(
            lambda net, x: net.head(net.norm(net.first(x.flatten(2))).mean(1)),
            first=nn.Linear(64, 5), norm=nn.BatchNorm1d(2), head=head(5)
        ),
        {"norm": "what it reads is not given by a convolution or a Linear"},
    ),
    "a computed weight": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(conv(2, 3)), nn.BatchNorm2d(3), nn.Flatten(), head(192)
        ),
        {"1": "what it reads is not given by a convolution or a Linear"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_folded_is_named_with_the_reason(name):
    torch.manual_seed(0)
    make, expected = CASES[name]
    model, x = settled(make()), torch.randn(IMAGES)
    found = remove_dead(model, None, x, fold_batchnorm=True)
    assert found.unfolded == expected == norms(model, x)[1]
    assert found.folded == {}
    assert found.model is model


def test_what_does_nothing_may_stand_between_and_two_norms_in_a_row_both_go():
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(2, 3, bias=False), nn.Dropout(), nn.BatchNorm2d(3), nn.Identity(), nn.BatchNorm2d(3, affine=False),
        nn.ReLU(), nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4)
    )  # fmt: skip
    settled(model)
    x = torch.randn(IMAGES)
    small = shrink(model, None, x, fold_batchnorm=True, memory_format=torch.channels_last)
    assert not batchnorms(small)
    assert same(model(x), small(x))
    assert small[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert batchnorms(model) == {"2", "4", "8"}
    brief = shrink(model.bfloat16(), None, x.bfloat16(), fold_batchnorm=True)
    assert {tensor.dtype for tensor in brief.parameters()} == {torch.bfloat16}


def test_an_activation_works_in_place_where_it_alone_reads_a_folded_norm():
    def forward(net, x):
        a = net.norm_1(net.first(x))
        b = net.norm_2(net.second(net.relu(a)))
        return net.head((a + net.free(b) + net.late(net.pool(x.repeat(1, 2, 1, 1)[:, :3]))).mean((2, 3)))

    torch.manual_seed(0)
    model = Net(
        forward, first=conv(2, 3), norm_1=nn.BatchNorm2d(3), relu=nn.ReLU(), second=conv(3, 3),
        norm_2=nn.BatchNorm2d(3), free=nn.LeakyReLU(), pool=nn.Identity(), late=nn.ReLU(), head=head(3)
    )  # fmt: skip
    x = torch.randn(IMAGES)
    small = shrink(settled(model), None, x, fold_batchnorm=True)
    assert [module.inplace for module in (small.relu, small.free, small.late)] == [False, True, False]
    assert not model.free.inplace
    assert same(model(x), small(x))


def test_without_batchnorm_or_with_nothing_pruned():
    model, x = made("chain").train(), torch.randn(IMAGES)
    assert shrink(model, Masks.ones(model), x, fold_batchnorm=True) is model
    assert model.training
    model, _ = normalised("chain", 0)
    small = shrink(model.train(), Masks.ones(model), x, fold_batchnorm=True)
    assert model.training
    assert not small.training
    assert type(small) is type(model)


def test_an_optimiser_is_refused():
    model, x = made("identity skip"), torch.randn(IMAGES)
    rule = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ShrinkError, match="is for inference: leave out optimizer, or fold_batchnorm"):
        shrink(model, None, x, optimizer=rule, fold_batchnorm=True)
    with pytest.raises(ShrinkError, match="is for inference"):
        carry(rule, model, remove_dead(model, None, x, fold_batchnorm=True))


def test_the_report_says_what_was_not_folded():
    torch.manual_seed(0)
    model, x = settled(CASES["concatenation"][0]()), torch.randn(IMAGES)
    model.second = nn.Sequential(model.second, nn.BatchNorm2d(4)).eval()
    small = shrink(model, None, x)
    folded = shrink(model, None, x, fold_batchnorm=True)
    found = report(model, {"small": small, "folded": folded}, x, repeats=3)
    assert found.unfolded == {"small": {}, "folded": CASES["concatenation"][1]}
    assert found.notes == [
        "BatchNorm not folded in folded: norm_1: what 'first' gives is also read elsewhere; "
        "norm_2: what it reads is not given by a convolution or a Linear"
    ]


@pytest.mark.parametrize("name", ["identity skip", "batchnorm", "written sizes"])
def test_a_folded_network_comes_back_from_its_file(tmp_path, name):
    model, _ = normalised(name, 0)
    x = torch.randn(IMAGES)
    layer = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    small = shrink(model, prune(model, "l1_filter", 0.3, layers=[layer]), x, fold_batchnorm=True)
    place = save(tmp_path / "net", small)
    again, _ = load(place, model)
    with torch.no_grad():
        torch.testing.assert_close(again(x), small(x))
    assert set(again.state_dict()) == set(small.state_dict())
    assert batchnorms(model)
    plain = save(tmp_path / "plain", shrink(model, None, x))
    with pytest.raises(ExportError, match="it was saved from another model"):
        load(plain, small)


TORCHVISION = ["resnet18", "mobilenet_v2", "densenet121", "vgg11_bn", "mobilenet_v3_small"]


@pytest.mark.parametrize("name", TORCHVISION[:3])
def test_torchvisions_networks_give_the_same_outputs(name):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, x = settled(getattr(torchvision.models, name)(num_classes=5)), torch.randn(2, 3, 64, 64)
    masks = prune(model, "l1_filter", 0.5, scope="layer")
    found = remove_dead(model, masks, x, fold_batchnorm=True)
    masked = copy.deepcopy(model)
    masks.apply_(masked)
    other = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert same(masked(other), found.model(other))
    assert set(found.folded) | set(found.unfolded) == batchnorms(model)
    assert bool(found.unfolded) == (name == "densenet121")


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_folded_networks_run_in_onnxruntime(tmp_path, name):
    pytest.importorskip("onnxscript")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, x = settled(getattr(torchvision.models, name)(num_classes=5)), torch.randn(2, 3, 64, 64)
    small = shrink(model, prune(model, "l1_filter", 0.5, scope="layer"), x, fold_batchnorm=True)
    assert to_onnx(small, tmp_path / "net.onnx", x) < 1e-4
