"""First weights by name, as the papers draw them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from prunelab.errors import PrunelabError, nearest


def _pytorch(layer: nn.Linear | nn.Conv2d) -> None:
    """What the layer drew when it was made: weights and biases from U(±1/sqrt(fan_in))."""


def _kaiming_normal(layer: nn.Linear | nn.Conv2d) -> None:
    """Weights from N(0, 2/fan_in), biases as PyTorch drew them: NNrelief, models.py."""
    nn.init.kaiming_normal_(layer.weight)


def _glorot_uniform(layer: nn.Linear | nn.Conv2d) -> None:
    """Weights from U(±sqrt(6/(fan_in + fan_out))), zero biases: the default of Keras, hence DropNet's.

    Both fans of a convolution count its receptive field, in Keras as in ``xavier_uniform_``.
    """
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _normal(std: float) -> Callable[[nn.Linear | nn.Conv2d], None]:
    """Weights and biases from N(0, std^2): DropNeuron, lenet-300-100.py (0.01), regression.py, autoencoder.py (1)."""

    def draw(layer: nn.Linear | nn.Conv2d) -> None:
        for parameter in layer.parameters(recurse=False):
            nn.init.normal_(parameter, std=std)

    return draw


def _truncated(std: float) -> Callable[[nn.Linear | nn.Conv2d], None]:
    """Weights and biases from N(0, std^2) cut at two standard deviations: DropNeuron, lenet-5.py (std 0.01).

    For its convnet.py (std 0.1) that the biases are drawn too is our own default.
    """

    def draw(layer: nn.Linear | nn.Conv2d) -> None:
        for parameter in layer.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)

    return draw


INITIALISATIONS: dict[str, Callable[[nn.Linear | nn.Conv2d], None]] = {
    "pytorch": _pytorch,
    "kaiming_normal": _kaiming_normal,
    "glorot_uniform": _glorot_uniform,
    "normal_0.01": _normal(0.01),
    "normal_1": _normal(1.0),
    "truncated_0.01": _truncated(0.01),
    "truncated_0.1": _truncated(0.1),
}


def initialise(model: nn.Module, name: str) -> None:
    """Draw the Linear and Conv2d layers of a newly built ``model`` anew, in place, from the global generator.

    Normalisation layers keep PyTorch's defaults, and so does everything under the name ``pytorch``.

    Raises:
        PrunelabError: An unknown name.
    """
    if name not in INITIALISATIONS:
        raise PrunelabError(f"no initialisation is called {name!r}: {nearest(name, INITIALISATIONS)}")
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            INITIALISATIONS[name](layer)
