"""The two LeNets with the sizes of Caffe, as NNrelief trains them (its models.py)."""

from __future__ import annotations

from torch import nn

from prunelab.models.convnet import convnet
from prunelab.models.mlp import perceptron


def lenet_300_100(input_shape: tuple[int, ...], hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    """``flatten, hidden_1, relu_1, hidden_2, relu_2, output``: 266,610 parameters on MNIST."""
    return perceptron(input_shape, hidden, classes)


def lenet_5(input_shape: tuple[int, ...], hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    """Two convolutions of 5 x 5 and a layer ``dense``, 20-50-500: 431,080 parameters on MNIST.

    NNrelief has a ReLU after each convolution, Caffe itself only after ``dense``; that changes no count.
    """
    return convnet(input_shape, hidden[:2], classes, kernel=5, padding=0, dense=hidden[2])


def lenet_5_same(input_shape: tuple[int, ...], hidden: tuple[int, ...], classes: int) -> nn.Sequential:
    """DropNeuron's LeNet-5 and ConvNet: 32-64-512, both convolutions padded to keep the size, so 3,136 to 512 to 10."""
    return convnet(input_shape, hidden[:2], classes, kernel=5, padding=2, dense=hidden[2])
