"""Groups of channels as pruners see them, what is done after shrinking, and models and examples that are refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunelab.structure import NotRemoved, StructureError, channel_groups, fit, recalibrate, remove_dead, shrink


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.r, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.norm(self.a(x))
        return self.b(x + F.relu(self.r(x)))


class Attention(nn.Module):
    """Heads as they are often written, with the numbers as attributes."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


def dropped(groups, name, *which):
    keep = torch.ones(groups[name].size, dtype=torch.bool)
    keep[list(which)] = False
    return groups.masks({name: keep})


def same_as_masked(model, masks, small, x):
    whole = copy.deepcopy(model)
    masks.apply_(whole)
    with torch.no_grad():
        torch.testing.assert_close(small(x), whole(x), rtol=1e-4, atol=1e-5)


def test_what_a_skip_joins_is_one_space_with_every_slice_of_it():
    model, x = Residual().eval(), torch.randn(2, 3, 5, 5)
    groups = channel_groups(model, x)
    assert {name: (space.size, space.pinned) for name, space in groups.items()} == {
        "a": (8, None), "b": (4, "it is an output of the model"),
    }  # fmt: skip
    roles = {(part.name, part.dim): part.role for part in groups["a"].slices}
    assert roles == {
        ("a.weight", 0): "out", ("a.bias", 0): "bias", ("norm.weight", 0): "affine", ("norm.bias", 0): "affine",
        ("norm.running_mean", 0): "affine", ("norm.running_var", 0): "affine", ("r.weight", 0): "out",
        ("r.weight", 1): "in", ("r.bias", 0): "bias", ("b.weight", 1): "in",
    }  # fmt: skip
    masks = dropped(groups, "a", 1, 6)
    assert set(masks) == {"a.weight", "a.bias", "norm.weight", "norm.bias", "r.weight", "r.bias"}
    small = shrink(model, masks, x)
    assert [p.shape[0] for p in (small.a.weight, small.r.weight, small.norm.running_mean)] == [6, 6, 6]
    same_as_masked(model, masks, small, x)
    assert channel_groups(model, x) is groups  # as long as no shape changes


@pytest.mark.parametrize(("granularity", "size", "heads", "wide"), [("head", 4, 3, 4), ("channel", 4, 4, 3)])
def test_heads_go_whole_or_lose_the_same_part_each(granularity, size, heads, wide):
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 5, 16)
    groups = channel_groups(model, x, granularity)
    assert groups["qkv"].size == size
    masks = dropped(groups, "qkv", 2)
    small = shrink(model, masks, x)
    assert (small.num_heads, small.head_dim) == (heads, wide)
    assert (small.qkv.out_features, small.proj.in_features) == (36, 12)
    same_as_masked(model, masks, small, x)


@pytest.mark.parametrize(("granularity", "heads", "wide"), [("head", 3, 8), ("channel", 4, 6)])
def test_a_fresh_attention_gets_the_sizes_of_a_smaller_one(granularity, heads, wide):
    torch.manual_seed(0)
    model, x = Attention(32).eval(), torch.randn(2, 5, 32)
    groups = channel_groups(model, x, granularity)
    small = shrink(model, dropped(groups, "qkv", *range(groups["qkv"].size // 4)), x)
    assert (small.num_heads, small.head_dim) == (heads, wide)
    with pytest.raises(StructureError, match="fewer heads, or of smaller heads: say which"):
        fit(Attention(32), small.state_dict(), x)
    again = fit(Attention(32), small.state_dict(), x, granularity).eval()
    assert (again.num_heads, again.head_dim) == (heads, wide)
    with torch.no_grad():
        torch.testing.assert_close(again(x), small(x))


def test_a_state_dict_of_a_smaller_model_goes_into_a_fresh_one():
    model, x = Residual().eval(), torch.randn(2, 3, 5, 5)
    small = shrink(model, dropped(channel_groups(model, x), "a", 0, 3), x)
    again = fit(Residual(), small.state_dict()).eval()
    assert (again.a.out_channels, again.norm.num_features, again.r.in_channels) == (6, 6, 6)
    assert torch.equal(again(x), small(x))
    with pytest.raises(StructureError, match=r"a\.weight: shape \(9, 3, 1, 1\) is no part of \(8, 3, 1, 1\)"):
        fit(Residual(), {"a.weight": torch.zeros(9, 3, 1, 1)})


def test_statistics_are_the_plain_mean_over_the_batches():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    batches = [torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[5.0, 0.0], [7.0, 4.0]])]
    assert recalibrate(model, batches) == 2
    assert model[0].running_mean.tolist() == [4.0, 2.0]  # means 2, 2 and 6, 2
    assert model[0].running_var.tolist() == [2.0, 4.0]  # variances 2, 0 and 2, 8
    assert (model.training, model[0].momentum) == (True, 0.1)
    with pytest.raises(StructureError, match="there is no batch"):
        recalibrate(model, [])


def test_statistics_over_channels_hold_them_unless_outputs_may_change():
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 5)
    assert "statistics over channels" in channel_groups(model, x)["0"].pinned
    groups = channel_groups(model, x, exact=False)
    small = shrink(model, dropped(groups, "0", 1, 2), x, exact=False)
    assert (small[0].out_features, small[1].normalized_shape, small[2].in_features) == (6, (6,), 6)


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_wrappers_are_looked_through(wrap):
    model, x = Residual().eval(), torch.randn(2, 3, 5, 5)
    wrapped = wrap(model)
    masks = dropped(channel_groups(wrapped, x), "a", 2)
    assert all(name.startswith(("_orig_mod.", "module.")) for name in masks)
    assert shrink(wrapped, masks, x).a.out_channels == 7


def test_inputs_may_be_named_and_the_model_and_the_random_numbers_are_as_before():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.kept = nn.Linear(4, 8), nn.Linear(8, 3), None
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, *, shift):
            self.calls += 1
            self.kept = F.relu(self.a(x.mul_(2)) * shift.sum())
            return {"y": self.b(self.kept), "n": 3}

    model, example = Two().train(), {"x": torch.randn(2, 4), "shift": torch.ones(2)}
    before, state = example["x"].clone(), torch.get_rng_state()
    found = remove_dead(model, dropped(channel_groups(model, example), "a", 0), example)
    assert found.model.a.out_features == 7
    assert (model.kept, int(model.calls), model.training) == (None, 0, True)
    assert torch.equal(example["x"], before)
    assert torch.equal(torch.get_rng_state(), state)


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8 * 36, 3)

    def forward(self, x):
        return self.head(self.conv(x).view(-1, 288))


def test_what_cannot_go_is_one_warning_with_its_reason():
    model, x = Written(), torch.randn(2, 1, 8, 8)
    masks = dropped(channel_groups(model, x), "conv", 0, 1)
    with pytest.warns(NotRemoved, match="2 of 2 channels .* a size is written in the forward of"):
        small = shrink(model, masks, x)
    assert small.conv.out_channels == 8


class Noisy(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x))


def spoilt():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[1, 1] = float("nan")
    return model


@pytest.mark.parametrize(
    ("model", "example", "why"),
    [
        (nn.Linear(4, 3), torch.randn(2, 5), r"Linear does not take the example of shape \(2, 5\): mat1 and mat2"),
        (nn.Linear(4, 3), torch.randn(0, 4), "the example has no samples"),
        (nn.Linear(4, 3), torch.ones(2, 4, dtype=torch.long), "does not take the example"),
        (nn.LazyLinear(3), torch.randn(2, 4), "weight has no shape yet: run the model on a batch first"),
        (nn.Linear(4, 3, device="meta"), torch.randn(2, 4), "weight is on the meta device"),
        (spoilt(), torch.randn(2, 4), r"0\.weight holds NaN"),
        (nn.Sequential(nn.Linear(4, 6), Noisy(6, 6), nn.Linear(6, 2)), torch.randn(9, 4), "random outputs"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(model, example, why):
    masks = {"0.weight": torch.arange(6)[:, None].expand(6, 4) > 2} if isinstance(model, nn.Sequential) else None
    with pytest.raises(StructureError, match=why) as caught:
        shrink(model, masks, example)
    assert "\n" not in str(caught.value)
