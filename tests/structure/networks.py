"""Networks of many kinds, small and fast: what people write, in the ways they write it.

``NETWORKS`` holds name -> builder. A builder returns the model in evaluation mode and an example of its inputs: one
tensor, a tuple of positional arguments, or a dict of keyword arguments. The same call gives the same numbers.
"""

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

NETWORKS = {}


def network(build):
    """Register a builder, and make it deterministic: parameters that start trivial become random as well."""

    @functools.wraps(build)
    def built(seed=0):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model, example = build()
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith("running_mean"):
                    tensor.normal_(0, 0.1)
                elif name.endswith("running_var"):
                    tensor.uniform_(0.5, 1.5)
                elif isinstance(tensor, nn.Parameter) and tensor.numel() > 1 and tensor.min() == tensor.max():
                    tensor.uniform_(0.5, 1.5) if tensor.max() == 1 else tensor.normal_(0, 0.1)
            return model.eval(), example

    NETWORKS[build.__name__] = built
    return built


def conv_bn(inputs, outputs, kernel=3, stride=1, groups=1, activation=nn.ReLU):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        activation(),
    )


# Images --------------------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.middle = conv_bn(3, 8), conv_bn(8, 16), conv_bn(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge2, self.merge1 = conv_bn(32, 16), conv_bn(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.middle(F.max_pool2d(second, 2))
        x = self.merge2(torch.cat([self.up2(x), second], 1))
        return self.head(self.merge1(torch.cat([self.up1(x), first], dim=1)))


@network
def unet():
    """A U-Net: transposed convolutions, skips that are concatenated; the picture is not square."""
    return UNet(), torch.randn(2, 3, 16, 24)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.start = nn.Linear(12, 16 * 4 * 4)
        self.widen = nn.Conv2d(16, 32, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, bias=False)
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, noise):
        x = F.relu(self.start(noise)).view(-1, 16, 4, 4)
        x = F.leaky_relu(self.norm(self.shuffle(self.widen(x))), 0.2)
        return torch.tanh(self.out(F.relu(self.up(x))))


@network
def generator():
    """The generator of a GAN: a vector becomes a picture, by PixelShuffle and a transposed convolution."""
    return Generator(), torch.randn(2, 12)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.squeeze, self.excite = nn.Linear(channels, channels // 4), nn.Linear(channels // 4, channels)

    def forward(self, x):
        batch, channels, _, _ = x.size()
        scale = F.adaptive_avg_pool2d(x, 1).view(batch, channels)
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(scale)))).view(batch, channels, 1, 1)
        return x * scale.expand_as(x)


@network
def squeeze_excitation():
    """Squeeze-and-excitation written with view, as in the reference code."""
    model = nn.Sequential(
        conv_bn(3, 16), SqueezeExcitation(16), conv_bn(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )
    return model, torch.randn(2, 3, 12, 12)


class Shuffle(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def forward(self, x):
        batch, channels, height, width = x.shape
        x = x.view(batch, self.groups, channels // self.groups, height, width)
        return x.transpose(1, 2).contiguous().view(batch, -1, height, width)


@network
def channel_shuffle():
    """A grouped convolution, a shuffle of channels, a depthwise one: ShuffleNet's unit."""
    model = nn.Sequential(
        conv_bn(3, 16),
        conv_bn(16, 16, 1, groups=2),
        Shuffle(2),
        conv_bn(16, 16, groups=16),
        nn.Conv2d(16, 12, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    return model, torch.randn(2, 3, 12, 12)


class InvertedBottleneck(nn.Module):
    def __init__(self, channels, expanded):
        super().__init__()
        self.expand, self.depthwise = conv_bn(channels, expanded, 1), conv_bn(expanded, expanded, groups=expanded)
        self.project = nn.Sequential(nn.Conv2d(expanded, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        return x + self.project(self.depthwise(self.expand(x)))


@network
def inverted_bottleneck():
    """MobileNet's block: wide depthwise convolution on a narrow residual stream."""
    blocks = [InvertedBottleneck(8, 24), InvertedBottleneck(8, 24)]
    model = nn.Sequential(conv_bn(3, 8), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return model, torch.randn(2, 3, 12, 12)


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, outputs, groups):
        super().__init__()
        self.path = nn.Sequential(
            conv_bn(inputs, width, 1), conv_bn(width, width, groups=groups), nn.Conv2d(width, outputs, 1, bias=False)
        )
        self.norm, self.skip = nn.BatchNorm2d(outputs), nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        out = self.norm(self.path(x))
        out += self.skip(x)
        return F.relu(out, inplace=True)


@network
def grouped_bottleneck():
    """ResNeXt's block: a grouped convolution within a residual one, added in place."""
    blocks = [Bottleneck(8, 16, 24, 4), Bottleneck(24, 16, 24, 4)]
    model = nn.Sequential(conv_bn(3, 8), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))
    return model, torch.randn(2, 3, 12, 12)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.start = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 6 * i), nn.ReLU(), nn.Conv2d(8 + 6 * i, 6, 3, padding=1)) for i in range(3)
        )
        self.norm, self.head = nn.BatchNorm2d(26), nn.Linear(26, 5)

    def forward(self, x):
        parts = [self.start(x)]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)))
        return self.head(F.relu(self.norm(torch.cat(parts, 1))).mean((2, 3)))


@network
def dense_concat():
    """DenseNet's block: every layer reads all before it, through a norm of its own."""
    return Dense(), torch.randn(2, 3, 10, 10)


class LayerScaleBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.up, self.down = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)
        self.gamma = nn.Parameter(0.5 * torch.ones(channels))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


@network
def layer_scale():
    """ConvNeXt's block: channels last within the block, a learnt scale for each channel."""
    blocks = [LayerScaleBlock(12), LayerScaleBlock(12)]
    model = nn.Sequential(nn.Conv2d(3, 12, 2, 2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    return model, torch.randn(2, 3, 12, 12)


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([conv_bn(3, 8, stride=2), conv_bn(8, 16, stride=2), conv_bn(16, 24, stride=2)])
        self.lateral = nn.ModuleList(nn.Conv2d(c, 12, 1) for c in (8, 16, 24))
        self.smooth = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        top = self.lateral[-1](maps[-1])
        outputs = [top]
        for level in (1, 0):
            top = self.lateral[level](maps[level]) + F.interpolate(top, size=maps[level].shape[-2:], mode="nearest")
            outputs.append(top)
        return [self.head(F.relu(smooth(x))) for smooth, x in zip(self.smooth, outputs, strict=True)]


@network
def feature_pyramid():
    """A feature pyramid: maps of three sizes are interpolated and added; the head is used three times."""
    return Pyramid(), torch.randn(2, 3, 32, 24)


@network
def autoencoder():
    """Convolutions down to a vector of 10 and transposed ones back, with Unflatten."""
    encoder = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    decoder = [nn.Linear(10, 16 * 4 * 4), nn.ReLU(), nn.Unflatten(1, (16, 4, 4)), nn.ConvTranspose2d(16, 8, 2, 2)]
    model = nn.Sequential(*encoder, nn.Linear(256, 10), *decoder, nn.ReLU(), nn.ConvTranspose2d(8, 1, 2, 2))
    return model, torch.randn(2, 1, 16, 16)


class PReluNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(3, 12, 3), nn.InstanceNorm2d(12, affine=True), nn.PReLU(12)
        self.second, self.group, self.head = nn.Conv2d(12, 16, 3), nn.GroupNorm(4, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = F.max_pool2d(self.act(self.norm(self.first(x))), 2)
        return self.head(torch.amax(F.silu(self.group(self.second(x))), dim=(-2, -1)))


@network
def prelu_norms():
    """Parameters for each channel outside of convolutions: PReLU, InstanceNorm, GroupNorm."""
    return PReluNet(), torch.randn(2, 3, 14, 14)


class BatchNormAct(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


@network
def batchnorm_subclass():
    """A subclass of BatchNorm that brings its activation, as timm's."""
    layers = [nn.Conv2d(3, 12, 3), BatchNormAct(12), nn.Conv2d(12, 16, 3), BatchNormAct(16)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)), torch.randn(2, 3, 12, 12)


@network
def weight_normed():
    """A convolution and a Linear whose weights are parametrised by weight_norm, between others."""
    convolutions = [parametrizations.weight_norm(nn.Conv2d(3, 12, 3)), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU()]
    linears = [nn.Linear(16, 20), nn.ReLU(), parametrizations.weight_norm(nn.Linear(20, 10)), nn.ReLU()]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *linears, nn.Linear(10, 5))
    return model, torch.randn(2, 3, 12, 12)


# Sounds, videos, points ----------------------------------------------------------------------------------------------


@network
def audio():
    """A 1-D network on raw sound: strides, dilation, a depthwise convolution, ELU."""
    layers = [
        nn.Conv1d(1, 16, 16, 4),
        nn.BatchNorm1d(16),
        nn.ELU(),
        nn.Conv1d(16, 16, 5, groups=16),
        nn.Conv1d(16, 24, 1),
    ]
    layers += [nn.ELU(), nn.MaxPool1d(4), nn.Conv1d(24, 24, 3, dilation=2), nn.ReLU(), nn.AdaptiveMaxPool1d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 5)), torch.randn(2, 1, 400)


class Residual3d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.space = nn.Conv3d(channels, 20, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.time = nn.Conv3d(20, channels, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.norm1, self.norm2 = nn.BatchNorm3d(20), nn.BatchNorm3d(channels)

    def forward(self, x):
        return F.relu(x + self.norm2(self.time(F.relu(self.norm1(self.space(x))))))


@network
def video():
    """A 3-D network on video: convolutions in space and in time, residual."""
    layers = [nn.Conv3d(3, 12, 3, padding=1), Residual3d(12), nn.MaxPool3d(2), Residual3d(12), nn.AdaptiveAvgPool3d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 5)), torch.randn(2, 3, 4, 12, 10)


class PointNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1))
        self.head = nn.Sequential(nn.Linear(32, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 5))

    def forward(self, points):
        return self.head(torch.max(self.shared(points.transpose(2, 1)), 2, keepdim=True)[0].view(-1, 32))


@network
def pointnet():
    """PointNet: one MLP for all points as Conv1d, the maximum over the points."""
    return PointNet(), torch.randn(2, 40, 3)


# Sequences -----------------------------------------------------------------------------------------------------------


class CRNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(conv_bn(1, 8), nn.MaxPool2d(2), conv_bn(8, 12), nn.MaxPool2d((4, 1)))
        self.recurrent = nn.LSTM(12 * 2, 16, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.features(x)
        batch, channels, height, width = x.shape
        x = x.permute(0, 3, 1, 2).reshape(batch, width, channels * height)
        return self.head(self.recurrent(x)[0]).log_softmax(-1)


@network
def crnn():
    """Reading of text in pictures: columns of a feature map are the steps of an LSTM."""
    return CRNN(), torch.randn(2, 1, 16, 24)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16, padding_idx=0)
        self.lstm = nn.LSTM(16, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, 6)

    def forward(self, tokens):
        states, _ = self.lstm(self.embedding(tokens))
        return self.head(states)


@network
def lstm_tagger():
    """A tagger: embedding, two bidirectional layers of LSTM, a Linear for each token."""
    return Tagger(), torch.randint(0, 50, (2, 9))


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.hidden, self.head = nn.GRU(4, 16), nn.Linear(16, 12), nn.Linear(12, 1)

    def forward(self, series):
        _, last = self.gru(series)
        return self.head(torch.relu(self.hidden(last[-1]))).squeeze(-1)


@network
def gru_regressor():
    """A regression on the last state of a GRU; time first."""
    return Regressor(), torch.randn(15, 2, 4)


class GatedConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.start, self.gated = nn.Conv1d(4, 12, 3, padding=1), nn.Conv1d(12, 24, 3, padding=1)
        self.mix, self.head = nn.Linear(12, 32), nn.Linear(16, 5)

    def forward(self, x):
        value, gate = self.gated(self.start(x)).chunk(2, dim=1)
        return self.head(F.glu(self.mix((value * torch.sigmoid(gate)).mean(-1)), dim=-1))


@network
def gated_linear_units():
    """Gated linear units twice: by chunk and by F.glu."""
    return GatedConvolutions(), torch.randn(2, 4, 20)


# Attention -----------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@network
def own_rms_norm():
    """An MLP of residual blocks with a hand-written RMSNorm."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = RMSNorm(16), nn.Linear(16, 40), nn.Linear(40, 16)

        def forward(self, x):
            return x + self.down(F.silu(self.up(self.norm(x))))

    return nn.Sequential(nn.Linear(6, 16), Block(), Block(), RMSNorm(16), nn.Linear(16, 3)), torch.randn(4, 6)


class GroupedQueries(nn.Module):
    def __init__(self, width, heads, pairs):
        super().__init__()
        self.heads, self.pairs, self.head_dim = heads, pairs, width // heads
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, pairs * self.head_dim, bias=False)
        self.v, self.o = nn.Linear(width, pairs * self.head_dim, bias=False), nn.Linear(width, width, bias=False)

    def rotate(self, x):
        half = self.head_dim // 2
        angles = torch.arange(x.shape[2])[:, None] / 10000 ** (torch.arange(half) / half)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def forward(self, x):
        batch, length, _ = x.shape
        q = self.rotate(self.q(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2))
        k = self.rotate(self.k(x).view(batch, length, self.pairs, self.head_dim).transpose(1, 2))
        v = self.v(x).view(batch, length, self.pairs, self.head_dim).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.pairs, dim=1) for t in (k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))


class LlamaBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2, self.attention = RMSNorm(width), RMSNorm(width), GroupedQueries(width, 4, 2)
        self.gate, self.up = nn.Linear(width, 48, bias=False), nn.Linear(width, 48, bias=False)
        self.down = nn.Linear(48, width, bias=False)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class TinyLlama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(40, 32), nn.ModuleList([LlamaBlock(32), LlamaBlock(32)])
        self.norm, self.head = RMSNorm(32), nn.Linear(32, 40, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@network
def llama():
    """A Llama written by hand: grouped queries, rotary positions, RMSNorm, a gated MLP, a causal mask."""
    return TinyLlama(), torch.randint(0, 40, (2, 7))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, width))


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 24)), nn.Parameter(torch.randn(1, 17, 24))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(24),
                    "attention": Attention(24, 3),
                    "norm2": nn.LayerNorm(24),
                    "mlp": nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)),
                }
            )
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = x + block["attention"](block["norm1"](x))
            x = x + block["mlp"](block["norm2"](x))
        return self.head(self.norm(x)[:, 0])


@network
def vision_transformer():
    """A ViT: class token, learnt positions, queries, keys and values from one Linear."""
    return VisionTransformer(), torch.randn(2, 3, 16, 16)


class WindowBlock(nn.Module):
    def __init__(self, width, heads, window, shift):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias_table = nn.Parameter(0.5 * torch.randn((2 * window - 1) ** 2, heads))
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None] + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])

    def forward(self, x):
        batch, height, width, channels = x.shape
        rows, columns, size = height // self.window, width // self.window, self.window
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), dims=(1, 2))
        y = y.view(batch, rows, size, columns, size, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, size**2, channels)
        qkv = self.qkv(y).view(len(y), size**2, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.bias_table[self.index.view(-1)].view(size**2, size**2, -1).permute(2, 0, 1)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=bias.unsqueeze(0))
        y = self.proj(y.transpose(1, 2).reshape(len(y), size**2, channels))
        y = y.view(batch, rows, columns, size, size, channels).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        return x + torch.roll(y, (self.shift, self.shift), dims=(1, 2))


class WindowAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 16, 2, 2), nn.Sequential(*(WindowBlock(16, 2, 4, s) for s in (0, 2)))
        self.merge, self.norm = nn.Linear(64, 24, bias=False), nn.LayerNorm(24)
        self.head = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 5))

    def forward(self, x):
        x = self.blocks(self.patches(x).permute(0, 2, 3, 1))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.head(self.norm(self.merge(x)).mean((1, 2)))


@network
def window_attention():
    """Swin's block: windows by view and permute, shifted by roll, relative positions as a learnt bias, merging."""
    return WindowAttention(), torch.randn(2, 3, 16, 16)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 40, dropout=0.0, batch_first=True)
        self.embedding, self.encoder = nn.Embedding(30, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


@network
def transformer_encoder():
    """torch's own TransformerEncoder of two layers, which has a fast path of its own."""
    return Encoder(), torch.randint(0, 30, (2, 8))


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.memory = nn.Linear(5, 16), nn.Linear(7, 12)
        self.attention = nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True)
        self.hidden, self.head = nn.Linear(16, 20), nn.Linear(20, 3)

    def forward(self, x, memory):
        memory = torch.relu(self.memory(memory))
        x, _ = self.attention(torch.relu(self.query(x)), memory, memory, need_weights=False)
        return self.head(torch.relu(self.hidden(x)))


@network
def cross_attention():
    """nn.MultiheadAttention from one input to another, with widths of its own for keys and values."""
    return CrossAttention(), (torch.randn(2, 6, 5), torch.randn(2, 9, 7))


# How models are called, and what they do besides ---------------------------------------------------------------------


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [conv_bn(1, 8), nn.MaxPool2d(2), conv_bn(8, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.tower, self.head = nn.Sequential(*layers, nn.Linear(12, 10)), nn.Linear(10, 1)

    def forward(self, left, right):
        return self.head((self.tower(left) - self.tower(right)).abs()).squeeze(1)


@network
def siamese():
    """One tower used twice, on two inputs; their distance decides."""
    return Siamese(), (torch.randn(2, 1, 12, 12), torch.randn(2, 1, 12, 12))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU())
        self.label, self.box = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, features, scale=None):
        x = self.body(features if scale is None else features * scale)
        return {"label": self.label(x), "boxes": [self.box(x).sigmoid()]}


@network
def dict_output():
    """Keyword arguments in, a dict with a list in it out."""
    return Heads(), {"features": torch.randn(3, 8), "scale": torch.rand(3, 1)}


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    features: torch.Tensor | None = None
    count: int = 0


class DataclassOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(conv_bn(3, 8), conv_bn(8, 12)), nn.Linear(12, 4)

    def forward(self, x):
        x = self.body(x).mean((2, 3))
        return Answer(self.head(x), count=len(x))


@network
def dataclass_output():
    """The answer is a dataclass, with other things than tensors in it."""
    return DataclassOutput(), torch.randn(2, 3, 10, 10)


class TiedLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.hidden, self.back = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.back(F.gelu(self.hidden(x))))


@network
def tied_embeddings():
    """A language model whose last Linear has the embedding's weight."""
    return TiedLanguageModel(), torch.randint(0, 40, (2, 6))


class GatedBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.fine, self.coarse = conv_bn(12, 16), nn.Sequential(conv_bn(12, 10, 1), conv_bn(10, 16, 5))
        self.gate, self.head = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2)), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        weights = self.gate(x.mean((2, 3))).softmax(1)[:, :, None, None, None]
        return self.head((weights * torch.stack([self.fine(x), self.coarse(x)], 1)).sum(1).mean((2, 3)))


@network
def gated_branches():
    """A mixture of two branches, weighted by a gate that is computed from the input."""
    return GatedBranches(), torch.randn(2, 3, 10, 10)


class ControlFlow(nn.Module):
    def __init__(self):
        super().__init__()
        self.start, self.again, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.other = nn.Linear(16, 16)

    def forward(self, x):
        far = x.mean() > 1e6
        x = torch.relu(self.start(x))
        for step in range(3):
            if far:
                x = self.other(x)
            x = x + torch.relu(self.again(x)) / (step + 1)
        return self.head(x) if x.shape[0] > 1 else self.head(x[0])


@network
def control_flow():
    """Loops, a branch on values that is not taken, one on shapes; a layer used three times."""
    return ControlFlow(), torch.randn(4, 6)


class FrozenBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, 8), nn.MaxPool2d(2), conv_bn(8, 16))
        self.hidden, self.head = nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x):
        with torch.no_grad():
            x = self.backbone(x).mean((2, 3))
        return self.head(torch.tanh(self.hidden(x)))


@network
def no_grad_inside():
    """A backbone that runs under no_grad within forward."""
    return FrozenBackbone(), torch.randn(2, 3, 12, 12)


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.cross = nn.Linear(5, 12), nn.Linear(6, 10), nn.Bilinear(12, 10, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, pair):
        left, right = pair
        return self.head(torch.relu(self.cross(torch.relu(self.left(left)), torch.relu(self.right(right)))))


@network
def bilinear():
    """A bilinear layer on two inputs that come as one tuple."""
    return Bilinear(), ((torch.randn(3, 5), torch.randn(3, 6)),)


class HighOrder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 6) / 3)
        self.bias = nn.Parameter(torch.randn(10))
        self.scale, self.head = nn.Parameter(torch.rand(10) + 0.5), nn.Linear(10, 3)

    def forward(self, x):
        x = torch.einsum("bi,oi->bo", x, self.weight) + self.bias
        return self.head(F.softplus(x) * self.scale)


@network
def own_parameters():
    """A layer of bare parameters, multiplied by einsum."""
    return HighOrder(), torch.randn(4, 6)


class MixerBlock(nn.Module):
    def __init__(self, tokens, channels):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.across = nn.Sequential(nn.Linear(tokens, 20), nn.GELU(), nn.Linear(20, tokens))
        self.within = nn.Sequential(nn.Linear(channels, 32), nn.GELU(), nn.Linear(32, channels))

    def forward(self, x):
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 16, 4, 4), nn.Sequential(MixerBlock(9, 16), MixerBlock(9, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


@network
def mixer():
    """MLP-Mixer: a Linear over the tokens, between two transposes."""
    return Mixer(), torch.randn(2, 3, 12, 12)
