"""Masks of NNrelief against an oracle in NumPy that goes unit by unit, as the published rule reads.

The oracle knows three small architectures only: a perceptron, a chain of convolutions (with BatchNorm or without), and
a residual net with option-A shortcuts. It shares no code with the package.
"""

import numpy as np
import pytest
import torch
from torch import nn

from prunelab.models.resnet import Block
from prunelab.pruners import prune

SEEDS = range(50)
ALPHA = 0.8


# -- the network, one operation after the other -----------------------------------------------------------------------


def convolve(x, weight, bias, stride, padding):
    """[N, C, H, W] -> [N, filters, h, w], window by window."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    size = weight.shape[2]
    rows, columns = (range(0, length - size + 1, stride) for length in x.shape[2:])
    made = np.zeros((len(x), len(weight), len(rows), len(columns)))
    for a, r in enumerate(rows):
        for b, c in enumerate(columns):
            window = x[:, :, r : r + size, c : c + size]
            made[:, :, a, b] = np.tensordot(window, weight, ([1, 2, 3], [1, 2, 3]))
    return made if bias is None else made + bias[:, None, None]


def normalise(x, norm):
    """BatchNorm with running statistics; norm is (gamma, beta, mean, variance)."""
    gamma, beta, mean, variance = (value[:, None, None] for value in norm)
    return gamma * (x - mean) / np.sqrt(variance + 1e-5) + beta


def relu(x):
    return np.maximum(x, 0)


def pool(x):
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    x = x[:, :, :height, :width]
    return np.maximum.reduce([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)])


# -- the rule, one unit after the other -------------------------------------------------------------------------------


def kept_contributions(values, faithful):
    """Section 1.2 (the text) and 1.3 (the code) for the contributions to one unit; a list of bool."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    running, cumulated = 0.0, []
    for i in order:
        running += values[i]
        cumulated.append(running)
    p = sum(level < ALPHA * sum(values) for level in cumulated)
    if faithful:
        last = len(values) - 1
        threshold = values[order[p + 1 if p < last else last]]
        return [value > threshold for value in values]
    return [i in order[: p + 1] and values[i] > 0 for i in range(len(values))]


def norm_of(response, x, reduce):
    """Over the positions of |K| * |x|, for each sample or for their mean."""
    if reduce == "mean_of_norm":
        return np.mean([np.linalg.norm(response(np.abs(sample))) for sample in x])
    found = response(np.mean(np.abs(x), axis=0))
    return np.linalg.norm(found) if reduce == "norm_of_mean" else found.sum()


def conv_rule(x, weight, bias, stride, padding, reduce, faithful):
    """Kernels kept, bool [filters, channels], and biases kept, bool [filters]."""
    kernels, biases = np.zeros(weight.shape[:2], bool), np.zeros(len(weight), bool)
    for j in range(len(weight)):
        values = []
        for i in range(weight.shape[1]):
            kernel = np.abs(weight[j : j + 1, i : i + 1])
            values.append(
                norm_of(
                    lambda m, kernel=kernel: convolve(m[None, None], kernel, None, stride, padding), x[:, i], reduce
                )
            )
        if bias is not None:
            positions = convolve(x[:1], weight[:1], None, stride, padding)[0, 0].size
            values.append(abs(bias[j]) * (positions if reduce == "sum" else np.sqrt(positions)))
        keep = kept_contributions([float(v) for v in values], faithful)
        kernels[j], biases[j] = keep[: weight.shape[1]], keep[-1]
    return kernels, biases


def dense_rule(x, weight, bias, faithful):
    keeps, biases = np.zeros(weight.shape, bool), np.zeros(len(weight), bool)
    for j, row in enumerate(weight):
        values = [float(np.mean([abs(w * sample[i]) for sample in x])) for i, w in enumerate(row)]
        keep = kept_contributions([*values, float(abs(bias[j]))], faithful)
        keeps[j], biases[j] = keep[:-1], keep[-1]
    return keeps, biases


# -- perceptrons and chains of convolutions ---------------------------------------------------------------------------


class Chain:
    """conv (BatchNorm) relu pool, twice; dense relu; output. Without convolutions: three dense layers."""

    def __init__(self, model):
        def array(value):
            return value.detach().numpy().copy()

        self.layers = []
        for module in model:
            if isinstance(module, nn.Conv2d | nn.Linear):
                layer = {"w": array(module.weight), "b": array(module.bias), "conv": isinstance(module, nn.Conv2d)}
                if layer["conv"]:
                    layer |= {"stride": module.stride[0], "padding": module.padding[0]}
                layer["k"] = np.ones(layer["w"].shape[:2], bool)  # kernels or connections kept
                layer["kb"], layer["kn"] = (np.ones(len(layer["w"]), bool) for _ in range(2))  # biases, BatchNorm
                self.layers.append(layer)
            elif isinstance(module, nn.BatchNorm2d):
                norm = (module.weight, module.bias, module.running_mean, module.running_var)
                self.layers[-1]["norm"] = [array(value) for value in norm]

    def activations(self, x, pruned):
        """The input of every layer, and the activation of its units: (x, a) for each."""
        found = []
        for number, layer in enumerate(self.layers):
            w, b = layer["w"].copy(), layer["b"].copy()
            if pruned(number):
                w[~layer["k"]], b[~layer["kb"]] = 0, 0
            if not layer["conv"] and x.ndim == 4:
                x = x.reshape(len(x), -1)
            if layer["conv"]:
                a = convolve(x, w, b, layer["stride"], layer["padding"])
                if "norm" in layer:
                    gamma, beta, mean, variance = (value.copy() for value in layer["norm"])
                    if pruned(number):
                        gamma[~layer["kn"]], beta[~layer["kn"]] = 0, 0
                    a = normalise(a, (gamma, beta, mean, variance))
            else:
                a = x @ w.T + b
            if number < len(self.layers) - 1:
                a = relu(a)
            found.append((x, a))
            x = pool(a) if layer["conv"] else a
        return found

    def rule(self, number, x, reduce, faithful):
        layer = self.layers[number]
        if layer["conv"]:
            keep = conv_rule(x, layer["w"], layer["b"], layer["stride"], layer["padding"], reduce, faithful)
        else:
            keep = dense_rule(x, layer["w"], layer["b"], faithful)
        layer["k"], layer["kb"] = layer["k"] & keep[0], layer["kb"] & keep[1]

    def remove(self, number, unit):
        layer = self.layers[number]
        layer["k"][unit], layer["kb"][unit], layer["kn"][unit] = False, False, False

    def remove_silent(self, number, a):
        for unit in range(a.shape[1]):
            if number < len(self.layers) - 1 and not a[:, unit].any():
                self.remove(number, unit)

    def read(self, number, unit):
        """Whether the next layer has a kept kernel or connection from this unit."""
        following = self.layers[number + 1]["k"]
        each = following.shape[1] // len(self.layers[number]["w"])  # positions of a map that is flattened
        return following[:, unit * each : (unit + 1) * each].any()

    def published(self, x, reduce):
        convs = [n for n, layer in enumerate(self.layers) if layer["conv"]]
        for number, (given, a) in enumerate(self.activations(x, lambda n: False)):
            if number in convs:
                self.rule(number, given, reduce, True)
                self.remove_silent(number, a)
        for number, (given, a) in enumerate(self.activations(x, lambda n: n in convs)):
            if number not in convs:
                self.rule(number, given, reduce, True)
                self.remove_silent(number, a)
        for number in range(len(self.layers) - 2, -1, -1):
            for unit in range(len(self.layers[number]["w"])):
                if not self.read(number, unit):
                    self.remove(number, unit)

    def corrected(self, x, reduce):
        for number, (given, _) in enumerate(self.activations(x, lambda n: False)):
            self.rule(number, given, reduce, False)
        for number, (_, a) in enumerate(self.activations(x, lambda n: True)):
            self.remove_silent(number, a)
        before = None
        while before != (before := [layer["k"].sum() + layer["kb"].sum() for layer in self.layers]):
            gives = np.ones(self.layers[0]["w"].shape[1], bool)
            for number, layer in enumerate(self.layers[:-1]):
                if number and not layer["conv"] and self.layers[number - 1]["conv"]:
                    gives = np.repeat(gives, layer["w"].shape[1] // len(gives))
                own = np.array([(k & gives).any() or kb for k, kb in zip(layer["k"], layer["kb"], strict=True)])
                if "norm" in layer:
                    own = layer["kn"]  # what BatchNorm makes of nothing is a constant, and counts
                for unit in range(len(own)):
                    if not own[unit] or not self.read(number, unit):
                        self.remove(number, unit)
                gives = own


def chain_of(seed, kind):
    torch.manual_seed(seed)
    if kind == "perceptron":
        layers = [nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)]
        x = torch.rand(8, 6)
    else:
        stride, padding = 1 + seed % 2, seed // 2 % 3
        first, second = nn.Conv2d(2, 4, 3, stride, padding), nn.Conv2d(4, 3, 3, 1, 1)
        norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(3)] if kind == "norm" else [nn.Identity(), nn.Identity()]
        for norm in norms:
            scatter(norm)
        x = torch.randn(4, 2, 12, 10)
        middle = nn.Sequential(
            first, norms[0], nn.ReLU(), nn.MaxPool2d(2), second, norms[1], nn.ReLU(), nn.MaxPool2d(2)
        )
        width = middle(x).flatten(1).shape[1]
        layers = [*middle, nn.Flatten(), nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).double().eval(), x.double()


def scatter(norm):
    """Statistics and shifts as after a training; some shifts so low that channels are silent."""
    if isinstance(norm, nn.BatchNorm2d):
        with torch.no_grad():
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.3, 2)
            norm.weight.uniform_(0.2, 1.5)
            norm.bias.normal_(0, 0.7)
            norm.bias[torch.rand(len(norm.bias)) < 0.2] = -9.0


def equal(found, name, keep):
    mask = found[name].numpy() if name in found else np.ones(keep.shape, bool)
    keep = keep.reshape(*keep.shape, *[1] * (mask.ndim - keep.ndim))
    np.testing.assert_array_equal(mask, np.broadcast_to(keep, mask.shape), err_msg=name)


@pytest.mark.parametrize("variant", ["corrected", "faithful"])
@pytest.mark.parametrize("kind", ["perceptron", "plain", "norm"])
def test_masks_of_a_chain_are_those_of_the_oracle(kind, variant):
    silent = 0
    for seed in SEEDS:
        model, x = chain_of(seed, kind)
        reduce = ("mean_of_norm", "norm_of_mean", "sum")[seed % 3]
        oracle = Chain(model)
        oracle.corrected(x.numpy(), reduce) if variant == "corrected" else oracle.published(x.numpy(), reduce)
        options = {"alpha_fc": ALPHA, "alpha_conv": ALPHA, "conv_reduce": reduce, "variant": variant, "samples": 0}
        found = prune(model, "nnrelief", 0.0, batches=[x[:3], x[3:]], allow_empty=True, **options)
        names = [name for name, module in model.named_children() if isinstance(module, nn.Conv2d | nn.Linear)]
        for name, layer in zip(names, oracle.layers, strict=True):
            equal(found, f"{name}.weight", layer["k"])
            equal(found, f"{name}.bias", layer["kb"])
            if "norm" in layer:
                equal(found, f"{int(name) + 1}.weight", layer["kn"])
            silent += (~layer["k"].any(1)).sum()
    assert silent > 20  # dead units were among them


# -- a residual net ---------------------------------------------------------------------------------------------------

STEM, WIDE = 3, 5  # channels of the first block, and of the second, which halves the map


def residual_of(seed):
    torch.manual_seed(seed)
    model = nn.Sequential()
    for name, module in {
        "conv": nn.Conv2d(2, STEM, 3, padding=1, bias=False), "norm": nn.BatchNorm2d(STEM), "relu": nn.ReLU(),
        "first": Block(STEM, STEM, 1), "second": Block(STEM, WIDE, 2),
        "average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "output": nn.Linear(WIDE, 3),
    }.items():  # fmt: skip
        model.add_module(name, module)
    for module in model.modules():
        scatter(module)
    with torch.no_grad():  # some filters that hardly add to the shortcut
        for block in (model.first, model.second):
            weak = torch.rand(len(block.norm_2.weight)) < 0.3
            block.norm_2.weight[weak], block.norm_2.bias[weak] = 1e-4, 0
    return model.double().eval(), torch.randn(4, 2, 6, 6).double()


class Residual:
    CONVS = ("conv", "first.conv_1", "first.conv_2", "second.conv_1", "second.conv_2")

    def __init__(self, model):
        state = {name: value.numpy().copy() for name, value in model.state_dict().items()}
        self.w = {name: state[f"{name}.weight"] for name in (*self.CONVS, "output")}
        self.b = state["output.bias"]
        parts = ("weight", "bias", "running_mean", "running_var")
        self.norm = {name: [state[f"{name.replace('conv', 'norm')}.{part}"] for part in parts] for name in self.CONVS}
        self.k = {name: np.ones(w.shape[:2], bool) for name, w in self.w.items()}
        self.kn = {name: np.ones(len(self.w[name]), bool) for name in self.CONVS}
        self.kb = np.ones(3, bool)
        self.open = {"first": np.ones(STEM, bool), "second": np.ones(WIDE, bool)}  # shortcuts, channel by channel

    def branch(self, name, x, pruned, stride=1):
        w, norm = self.w[name].copy(), [value.copy() for value in self.norm[name]]
        if pruned:
            w[~self.k[name]] = 0
            norm[0][~self.kn[name]], norm[1][~self.kn[name]] = 0, 0
        return normalise(convolve(x, w, None, stride, 1), norm)

    def run(self, x, pruned):
        """Name of each convolution -> its input, what it adds, what is added to it, and the activation behind."""
        seen, a = {}, relu(self.branch("conv", x, pruned))
        seen["conv"] = (x, None, None, a)
        for block, stride in (("first", 1), ("second", 2)):
            x, shortcut = a, a[:, :, ::stride, ::stride]
            if block == "second":
                shortcut = np.pad(shortcut, ((0, 0), (1, 1), (0, 0), (0, 0)))
            if pruned:
                shortcut = shortcut * self.open[block][:, None, None]
            middle = relu(self.branch(f"{block}.conv_1", x, pruned, stride))
            added = self.branch(f"{block}.conv_2", middle, pruned)
            a = relu(added + shortcut)
            seen[f"{block}.conv_1"] = (x, None, None, middle)
            seen[f"{block}.conv_2"] = (middle, added, shortcut, a)
        return seen, a.mean((2, 3))

    def rule(self, name, x, reduce, faithful):
        stride = 2 if name == "second.conv_1" else 1
        self.k[name] &= conv_rule(x, self.w[name], None, stride, 1, reduce, faithful)[0]

    def compete(self, name, added, shortcut, with_norm):
        """Section 1.5: whole filters go that add little, and shortcuts close that bring little."""
        for unit in range(added.shape[1]):
            a = np.linalg.norm(np.abs(added[:, unit]).mean(0))
            b = np.linalg.norm(np.abs(shortcut[:, unit]).mean(0))
            if b > 0 and a / b < (1 - ALPHA) / ALPHA:
                self.k[name][unit] = False
                self.kn[name][unit] &= not with_norm
            if a > 0 and b / a < (1 - ALPHA) / ALPHA:
                self.open[name.partition(".")[0]][unit] = False

    def remove(self, name, unit, weights=True):
        if weights:
            self.k[name][unit] = False
        self.kn[name][unit] = False

    def remove_silent(self, name, a, weights=True):
        """Units of a convolution whose activation is 0; behind an addition the shortcut closes with them."""
        for unit in range(a.shape[1]):
            if not a[:, unit].any():
                self.remove(name, unit, weights)
                if name.endswith("conv_2"):
                    self.open[name.partition(".")[0]][unit] = False

    def constants(self):
        """What each convolution, BatchNorm and activation always gives; NaN where it varies."""
        known = {}

        def branch(name, given):
            empty = ~(self.k[name] & (given != 0)).any(1)
            known[name] = np.where(empty, 0.0, np.nan)
            gamma, beta, mean, variance = self.norm[name]
            level = np.where(self.kn[name], beta - gamma * mean / np.sqrt(variance + 1e-5), 0)
            known[f"{name} norm"] = np.where(empty | ~self.kn[name], level, np.nan)
            return known[f"{name} norm"]

        stem = relu(branch("conv", np.full(2, np.nan)))
        middle = relu(branch("first.conv_1", stem))
        known["first"] = np.where(self.open["first"], stem, 0)
        known["between"] = relu(branch("first.conv_2", middle) + known["first"])
        middle = relu(branch("second.conv_1", known["between"]))
        known["second"] = np.where(self.open["second"], np.pad(known["between"], 1), 0)
        known["out"] = relu(branch("second.conv_2", middle) + known["second"])
        known["conv relu"], known["first.conv_1 relu"] = stem, relu(known["first.conv_1 norm"])
        known["second.conv_1 relu"] = relu(known["second.conv_1 norm"])
        return known

    def backwards(self, known, spared=()):
        """From the output: what nobody reads. The second block reads channel c of the first as its channel c + 1."""
        read = {"output": np.ones(3, bool)}

        def gone(name):  # channels that always give 0
            return np.equal(known.get(name, np.nan), 0)

        def column(name):  # whether anything reads each channel, by the kept kernels of filters that are read
            rows = read[name] & ~gone(name)
            return (self.k[name] & rows[:, None]).any(0)

        out = column("output") & ~gone("out")
        read["second.conv_2"] = out
        read["second.conv_1"] = column("second.conv_2") & ~gone("second.conv_1 relu")
        brought = out & ~gone("second") & self.open["second"]
        between = (column("second.conv_1") | brought[1:4]) & ~gone("between")
        read["first.conv_2"] = between
        read["first.conv_1"] = column("first.conv_2") & ~gone("first.conv_1 relu")
        brought = between & ~gone("first") & self.open["first"]
        read["conv"] = (column("first.conv_1") | brought) & ~gone("conv relu")
        self.open["second"] &= out & ~gone("second")
        self.open["first"] &= between & ~gone("first")
        for name in self.CONVS:
            for unit in np.flatnonzero(~read[name] | gone(f"{name} norm")):
                self.remove(name, unit, name not in spared)

    def published(self, x, reduce):
        seen, _ = self.run(x, False)
        for name, (given, added, shortcut, a) in seen.items():
            if name != "conv":
                self.rule(name, given, reduce, True)
            self.remove_silent(name, a, name != "conv")
            if added is not None:
                self.compete(name, added, shortcut, False)
        keep, self.kb = dense_rule(self.run(x, True)[1], self.w["output"], self.b, True)
        self.k["output"] &= keep
        self.backwards({}, ("conv",))

    def corrected(self, x, reduce):
        seen, features = self.run(x, False)
        for name, (given, *_) in seen.items():
            self.rule(name, given, reduce, False)
        keep, self.kb = dense_rule(features, self.w["output"], self.b, False)
        self.k["output"] &= keep
        for name, (_, added, shortcut, _) in self.run(x, True)[0].items():
            if added is not None:
                self.compete(name, added, shortcut, True)
        for name, (*_, a) in self.run(x, True)[0].items():
            self.remove_silent(name, a)
        self.backwards(self.constants())


@pytest.mark.parametrize("variant", ["corrected", "faithful"])
def test_masks_of_a_residual_net_are_those_of_the_oracle(variant):
    lost, spared, shut = 0, 0, {"first": 0, "second": 0}
    for seed in SEEDS:
        model, x = residual_of(seed)
        reduce = ("mean_of_norm", "norm_of_mean", "sum")[seed % 3]
        oracle = Residual(model)
        oracle.corrected(x.numpy(), reduce) if variant == "corrected" else oracle.published(x.numpy(), reduce)
        options = {"alpha_fc": ALPHA, "alpha_conv": ALPHA, "conv_reduce": reduce, "variant": variant, "samples": 0}
        found = prune(model, "nnrelief", 0.0, batches=[x], allow_empty=True, **options)
        for name in oracle.CONVS:
            equal(found, f"{name}.weight", oracle.k[name])
            for part in ("weight", "bias"):
                equal(found, f"{name.replace('conv', 'norm')}.{part}", oracle.kn[name])
        for block, opened in oracle.open.items():
            equal(found, f"{block}.shortcut.open", opened)
            shut[block] += (~opened[1:4]).sum()  # those that are zero-padded apart
        equal(found, "output.weight", oracle.k["output"])
        equal(found, "output.bias", oracle.kb)
        lost += sum((~oracle.k[f"{block}.conv_2"].any(1)).sum() for block in ("first", "second"))
        spared += oracle.k["conv"].all()
    assert lost > 20
    assert min(shut.values()) > 5
    assert (spared == len(SEEDS)) == (variant == "faithful")  # where there are shortcuts, its first convolution stays
