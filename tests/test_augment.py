"""Augmentation against loops over single images, and against what Keras does, spelt out in NumPy and SciPy."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from prunelab.data.augment import PADDING, affine_matrices, augment
from prunelab.errors import PrunelabError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 64, channels: int = 3, height: int = 12, width: int = 9) -> torch.Tensor:
    return torch.randint(1, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator(7))


def test_crop_flip_equals_a_loop_over_single_images() -> None:
    x = images()
    draws = generator(3)
    top, left = torch.randint(2 * PADDING + 1, (2, len(x)), generator=draws).tolist()
    mirrored = (torch.rand(len(x), generator=draws) < 0.5).tolist()
    expected = []
    for image, t, at, mirror in zip(x.numpy(), top, left, mirrored, strict=True):
        padded = np.pad(image, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
        crop = padded[:, t : t + image.shape[1], at : at + image.shape[2]]
        expected.append(crop[:, :, ::-1] if mirror else crop)
    assert np.array_equal(augment(x, "crop_flip", generator(3)).numpy(), np.stack(expected))


def test_crop_flip_reaches_every_place_and_both_sides_about_equally_often() -> None:
    image = torch.arange(1.0, 82.0).reshape(1, 1, 9, 9)
    out = augment(image.expand(20_000, 1, 9, 9), "crop_flip", generator())
    centre = out[:, 0, 4, 4]  # the middle of the image is inside every crop, and each place shows another pixel there
    mirrored = out[:, 0, 4, 3] > out[:, 0, 4, 5]  # zero padding cannot decide at the outer columns, so leave those out
    inner = (centre - 1) % 9
    decided = (inner > 0) & (inner < 8)
    counts = torch.bincount(centre.long() - 1, minlength=81)
    assert counts.min() > 180  # 247 expected, standard deviation 16
    assert counts.max() < 320
    assert mirrored[decided].float().mean() == pytest.approx(0.5, abs=0.02)


def test_crop_flip_of_floats_equals_that_of_bytes() -> None:
    x = images()
    assert torch.equal(augment(x.float(), "crop_flip", generator(5)), augment(x, "crop_flip", generator(5)).float())


def keras(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """What ``apply_affine_transform`` of Keras does with one image [C, H, W], then the mirror."""
    height, width = image.shape[1:]
    even = 2 * draws - 1
    theta, shear = np.deg2rad(even[0] * 40), np.deg2rad(even[3] * 0.2)
    rotation = np.array([[np.cos(theta), -np.sin(theta), 0], [np.sin(theta), np.cos(theta), 0], [0, 0, 1]])
    shift = np.array([[1, 0, even[1] * 0.2 * height], [0, 1, even[2] * 0.2 * width], [0, 0, 1]])
    sheared = np.array([[1, -np.sin(shear), 0], [0, np.cos(shear), 0], [0, 0, 1]])
    zoom = np.diag([1 + 0.2 * even[4], 1 + 0.2 * even[5], 1])
    centre = np.array([[1, 0, height / 2 - 0.5], [0, 1, width / 2 - 0.5], [0, 0, 1]])
    matrix = centre @ rotation @ shift @ sheared @ zoom @ np.linalg.inv(centre)
    out = [ndimage.affine_transform(c, matrix[:2, :2], matrix[:2, 2], order=1, mode="nearest") for c in image]
    return np.stack(out)[:, :, ::-1] if draws[6] < 0.5 else np.stack(out)


@pytest.mark.parametrize("size", [(12, 9), (64, 64)], ids=["oblong", "tiny_imagenet"])
def test_affine_equals_keras_on_single_images(size: tuple[int, int]) -> None:
    x = images(16, 3, *size).double()
    draws = torch.rand(len(x), 7, generator=generator(11)).numpy().astype(np.float64)
    expected = np.stack([keras(image, d) for image, d in zip(x.numpy(), draws, strict=True)])
    assert np.abs(augment(x, "affine", generator(11)).numpy() - expected).max() < 0.02  # of 255; angles are float32


def test_affine_of_bytes_is_that_of_floats_rounded() -> None:
    x = images()
    rounded = augment(x.float(), "affine", generator(2)).round().to(torch.uint8)
    assert torch.equal(augment(x, "affine", generator(2)), rounded)


def test_affine_leaves_a_plain_image_plain_because_the_nearest_pixel_fills() -> None:
    x = torch.full((32, 1, 8, 8), 200, dtype=torch.uint8)
    assert torch.equal(augment(x, "affine", generator()), x)


def test_middle_draws_change_nothing_and_the_mirror_negates_the_columns() -> None:
    draws = torch.tensor([[0.5] * 7, [0.5] * 6 + [0.0]])
    identity, mirror = affine_matrices(draws, 6, 4)
    assert torch.equal(identity, torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    assert torch.equal(mirror, torch.tensor([[-1.0, 0, 0], [0, 1, 0]]))


def test_a_largest_shift_of_rows_looks_a_fifth_of_the_height_further_down() -> None:
    draws = torch.tensor([[0.5, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]])
    assert torch.allclose(affine_matrices(draws, 10, 5), torch.tensor([[[1.0, 0, 0], [0, 1, 0.4]]]))  # 0.4 of -1..1


@pytest.mark.parametrize("kind", ["crop_flip", "affine"])
def test_the_same_generator_gives_the_same_batch_and_the_next_call_another(kind: str) -> None:
    x, draws = images(), generator(4)
    before = x.clone()
    first = augment(x, kind, draws)
    assert torch.equal(first, augment(x, kind, generator(4)))
    assert not torch.equal(first, augment(x, kind, draws))
    assert torch.equal(x, before)
    assert (first.shape, first.dtype) == (x.shape, x.dtype)


def test_none_returns_the_batch_itself_without_a_draw() -> None:
    x, draws = images(), generator()
    state = draws.get_state()
    assert augment(x, "none", draws) is x
    assert torch.equal(draws.get_state(), state)


def test_an_unknown_kind_and_a_table_of_features_are_refused_in_one_line() -> None:
    with pytest.raises(PrunelabError, match=r"did you mean 'crop_flip'\?$"):
        augment(images(), "cropflip", generator())
    with pytest.raises(PrunelabError, match=r"not shape \(5, 4\): use 'none'$"):
        augment(torch.zeros(5, 4), "affine", generator())
