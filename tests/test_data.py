"""Data sets: read bit by bit, divided as the papers do, cached once, and refused in one line when something is off."""

import dataclasses
import gzip
import hashlib
import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits, load_iris
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from prunelab import data, digest, paths
from prunelab.data.sources import SOURCES
from prunelab.errors import PrunelabError
from prunelab.settings import Data


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root, an empty cache, and no network."""

    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    folder = tmp_path / "root"
    folder.mkdir()
    monkeypatch.setenv("PRUNELAB_DATA", str(folder))
    monkeypatch.setenv("PRUNELAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return folder


def cache_files() -> dict[str, bytes]:
    """All that lies in the cache, locks apart."""
    found = [path for path in (paths.cache() / "data").rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.name: path.read_bytes() for path in found}


def refused(call: Callable[[], object], *parts: str) -> str:
    """The one line that ``call`` is refused with; the cache is as it was before."""
    before = cache_files()
    with pytest.raises(PrunelabError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert cache_files() == before
    assert not list(paths.cache().glob("data/.*"))
    return message


def write_idx(file: Path, values: np.ndarray) -> None:
    header = (0x0800 + values.ndim).to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in values.shape)
    file.write_bytes(header + values.astype(np.uint8).tobytes())


def write_mnist(root: Path, *, train: int = 60, test: int = 20, seed: int = 0) -> dict[str, np.ndarray]:
    """A small MNIST in torchvision's layout."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    arrays = {}
    for stem, n in (("train", train), ("t10k", test)):
        arrays[f"{stem}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28))
        arrays[f"{stem}-labels-idx1-ubyte"] = rng.permutation(np.arange(n) % 10)
    for name, values in arrays.items():
        write_idx(folder / name, values)
    return arrays


def write_tree(
    folder: Path, classes: tuple[str, ...] = ("rose", "tulip"), *, size: int = 6, mode: str = "RGB", suffix: str = "png"
) -> Path:
    """Three training images and two test images per class; pixel (0, 0) tells which one it is."""
    for part, n in (("train", 3), ("test", 2)):
        for k, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                value = 10 * k + i + (100 if part == "test" else 0)
                colour = value if mode == "L" else (value, 0, 255)
                Image.new(mode, (size, size), colour).save(folder / part / name / f"{i}.{suffix}")
    return folder


def zipped(folder: Path, file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, f"{folder.name}/{path.relative_to(folder)}")
    return file


def tarred(folder: Path, file: Path, *, mode: str = "w") -> Path:
    with tarfile.open(file, mode) as archive:
        archive.add(folder, ".")
    return file


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_idx_files_arrive_bit_for_bit(root: Path, packed: bool) -> None:
    arrays = write_mnist(root)
    if packed:
        for file in list((root / "MNIST" / "raw").iterdir()):
            file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    mnist = data.load(Data(name="mnist", validation=0))
    assert np.array_equal(mnist.train.x[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    assert np.array_equal(mnist.test.y.numpy(), arrays["t10k-labels-idx1-ubyte"])
    assert (mnist.train.x.dtype, mnist.train.y.dtype, mnist.shape) == (torch.uint8, torch.int64, (1, 28, 28))
    assert (mnist.source, len(mnist.validation)) == ("MNIST", 0)


@pytest.mark.parametrize("form", ["folder", "zip", "tar", "tar.gz"])
def test_a_tree_reads_the_same_from_a_folder_a_zip_and_a_tar(root: Path, tmp_path: Path, form: str) -> None:
    tree = write_tree(tmp_path / "tree")
    (tree / "train" / "README.txt").write_text("no image")
    place = {
        "folder": lambda: tree,
        "zip": lambda: zipped(tree, tmp_path / "f.zip"),
        "tar": lambda: tarred(tree, tmp_path / "f.tar"),
        "tar.gz": lambda: tarred(tree, tmp_path / "f.tar.gz", mode="w:gz"),
    }[form]()
    data.prepare("flowers", from_=place)
    flowers = data.load(Data(name="flowers", validation=0))
    assert flowers.classes == ("rose", "tulip")
    shown = sorted(zip(flowers.train.y.tolist(), flowers.train.x[:, 0, 0, 0].tolist(), strict=True))
    assert shown == [(0, 0), (0, 1), (0, 2), (1, 10), (1, 11), (1, 12)]
    assert sorted(flowers.test.x[:, 0, 0, 0].tolist()) == [100, 101, 110, 111]
    assert torch.equal(flowers.train.x[0, :, 5, 5], torch.tensor([flowers.train.x[0, 0, 0, 0], 0, 255]))
    data.prepare("garden", from_=tree)
    assert data.load("garden").digest == flowers.digest


def test_a_tree_in_the_data_root_loads_by_its_name(root: Path) -> None:
    write_tree(root / "flowers", mode="L")
    assert data.load("flowers").shape == (1, 6, 6)


def test_stored_order_of_a_tree_mixes_the_classes(root: Path, tmp_path: Path) -> None:
    data.prepare("flowers", from_=write_tree(tmp_path / "tree", tuple("abcdef")))
    labels = data.load(Data(name="flowers", validation=0)).train.y
    assert not torch.equal(labels, labels.sort().values)


def test_cifar10_from_jpeg_files_says_so_and_from_png_files_does_not(root: Path, tmp_path: Path) -> None:
    classes = tuple("abcdefghij")
    data.prepare("cifar10", from_=write_tree(tmp_path / "jpeg", classes, size=32, suffix="jpg"))
    assert data.load("cifar10").source == "CIFAR-10 (JPEG)"
    data.prepare("cifar10", from_=write_tree(tmp_path / "png", classes, size=32))
    assert data.load("cifar10").source == "CIFAR-10"


def tarred_under(folder: Path, file: Path) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        archive.add(folder, folder.name)
    return file


@pytest.fixture
def original_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """CIFAR-10 as its authors pack it, with 20 + 10 images and the digests to match."""
    import torchvision.datasets

    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 3072), dtype=np.uint8)
    contents = {
        "data_batch_1": {"data": images[:20], "labels": list(range(10)) * 2},
        "test_batch": {"data": images[20:], "labels": list(range(10))},
        "batches.meta": {"label_names": list("abcdefghij")},
    }
    digests = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        digests[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    archive = tarred_under(folder, root / "cifar-10-python.tar.gz")
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [["data_batch_1", digests["data_batch_1"]]])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", digests["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": digests["batches.meta"]})
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive, images.reshape(30, 3, 32, 32)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar.gz"])
def test_the_original_cifar10_reads_from_its_folder_and_its_archive(
    original_cifar: tuple[Path, np.ndarray], packed: bool
) -> None:
    archive, images = original_cifar
    data.prepare("cifar10", from_=archive if packed else None)
    cifar = data.load(Data(name="cifar10", validation=0))
    assert np.array_equal(torch.cat([cifar.train.x, cifar.test.x]).numpy(), images)
    assert (cifar.source, cifar.train.y.tolist()) == ("CIFAR-10", list(range(10)) * 2)


def test_an_original_cifar10_that_was_touched_is_never_opened(original_cifar: tuple[Path, np.ndarray]) -> None:
    archive, _ = original_cifar
    batch = archive.parent / "cifar-10-batches-py" / "data_batch_1"
    batch.write_bytes(batch.read_bytes()[:-1] + b"!")
    refused(lambda: data.prepare("cifar10"), "cifar-10-batches-py", "incomplete or corrupt", "fetch")
    archive.write_bytes(archive.read_bytes()[:-9])
    refused(lambda: data.prepare("cifar10", from_=archive), archive.name, "wrong md5", "fetch it again")


def write_tiny(folder: Path) -> Path:
    """Two classes with two training images and one validation image each, in the order of wnids.txt."""
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("n2\nn1\n")
    lines = []
    for k, wnid in enumerate(("n2", "n1")):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i in range(2):
            mode, colour = ("L", 50 * k) if i else ("RGB", (50 * k,) * 3)
            Image.new(mode, (64, 64), colour).save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        Image.new("RGB", (64, 64), (50 * k,) * 3).save(folder / "val" / "images" / f"val_{k}.JPEG")
        lines.append(f"val_{k}.JPEG\t{wnid}\t0\t0\t9\t9\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "test" / "images").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "test" / "images" / "test_0.JPEG")  # unlabelled: not read
    return folder


def test_tiny_imagenet_takes_labels_from_its_lists_and_grey_images_become_rgb(root: Path) -> None:
    write_tiny(root / "tiny-imagenet-200")
    tiny = data.load(Data(name="tiny_imagenet", validation=0))
    assert (tiny.source, tiny.classes, tiny.shape) == ("Tiny ImageNet (subset)", ("n2", "n1"), (3, 64, 64))
    assert torch.equal(tiny.train.x[:, :, 0, 0], 50 * tiny.train.y[:, None].expand(4, 3).to(torch.uint8))
    assert torch.equal(tiny.test.x[:, 0, 0, 0].long(), 50 * tiny.test.y)


def test_tiny_imagenet_reads_the_same_from_its_zip(root: Path, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny-imagenet-200")
    digests = []
    for place in (folder, zipped(folder, tmp_path / "tiny-imagenet-200.zip")):
        data.prepare("tiny_imagenet", from_=place)
        digests.append(data.load("tiny_imagenet").digest)
    assert digests[0] == digests[1]


def test_iris_and_digits_are_those_of_scikit_learn(root: Path) -> None:
    digits = data.load(Data(name="digits", validation=0))
    together = torch.cat([digits.train.x, digits.test.x])[:, 0].long()
    assert (len(digits.train), len(digits.test), digits.peak, digits.shape) == (1500, 297, 16, (1, 8, 8))
    assert torch.equal(together.sum(0), torch.from_numpy(load_digits().images).long().sum(0))
    iris = data.load("iris")
    assert (iris.classes, iris.shape, len(iris.test)) == (("setosa", "versicolor", "virginica"), (4,), 25)


# Dividing -------------------------------------------------------------------------------------------------------------


def test_iris_is_divided_as_random_split_does_for_dyprune(root: Path) -> None:
    iris = data.load(Data(name="iris", validation=25, test=25, scaling="minmax_all"))
    x, y = load_iris(return_X_y=True)
    x = torch.from_numpy(MinMaxScaler().fit_transform(x)).float()
    pieces = torch.utils.data.random_split(range(150), [100, 25, 25], torch.Generator().manual_seed(42))
    for part, rows in zip((iris.train, iris.validation, iris.test), pieces, strict=True):
        assert torch.allclose(part.x, x[list(rows)], atol=1e-6)
        assert part.y.tolist() == y[list(rows)].tolist()


def test_the_permutation_of_a_seed_does_not_change_with_the_version_of_torch() -> None:
    assert data.order(150, torch.Generator().manual_seed(42))[:5].tolist() == [42, 95, 30, 64, 52]


def test_stratified_parts_are_those_of_train_test_split_as_in_dropnet(root: Path) -> None:
    arrays = write_mnist(root, train=200)
    mnist = data.load(Data(name="mnist", validation=0.1, stratify=True))
    x, y = arrays["train-images-idx3-ubyte"], arrays["train-labels-idx1-ubyte"]
    train_x, held_x, _, held_y = train_test_split(x, y, test_size=0.1, stratify=y, random_state=42)
    assert np.array_equal(mnist.train.x[:, 0].numpy(), train_x)
    assert np.array_equal(mnist.validation.x[:, 0].numpy(), held_x)
    assert torch.bincount(mnist.validation.y).tolist() == [2] * 10
    assert mnist.validation.y.tolist() == held_y.tolist()


def test_a_fraction_and_its_number_give_the_same_split_and_every_row_is_in_one_part(root: Path) -> None:
    arrays = write_mnist(root)
    by_fraction = data.load(Data(name="mnist", validation=0.25))
    by_number = data.load(Data(name="mnist", validation=15))
    assert torch.equal(by_fraction.validation.x, by_number.validation.x)
    rows = torch.cat([by_number.train.x, by_number.validation.x])[:, 0].reshape(60, -1).tolist()
    assert sorted(rows) == sorted(arrays["train-images-idx3-ubyte"].reshape(60, -1).tolist())
    other = data.load(Data(name="mnist", validation=15, split_seed=1))
    assert not torch.equal(other.validation.x, by_number.validation.x)


def test_smaller_sizes_take_from_the_same_split(root: Path) -> None:
    write_mnist(root)
    whole = data.load(Data(name="mnist", validation=10))
    small = data.load(Data(name="mnist", validation=10, train_size=7, test_size=4))
    assert [len(small.train), len(small.validation), len(small.test)] == [7, 4, 4]
    assert torch.equal(small.train.x, whole.train.x[:7])
    assert torch.equal(small.validation.x, whole.validation.x[:4])
    rows = {tuple(row) for row in whole.test.x.flatten(1).tolist()}
    assert rows >= {tuple(row) for row in small.test.x.flatten(1).tolist()}
    at_most = data.load(Data(name="mnist", validation=10, train_size=50, test_size=1000))
    assert [len(at_most.train), len(at_most.validation), len(at_most.test)] == [50, 10, 20]


def test_stratified_smaller_sizes_keep_the_classes_even(root: Path) -> None:
    write_mnist(root, train=220)
    small = data.load(Data(name="mnist", validation=20, stratify=True, train_size=100, test_size=10))
    assert torch.bincount(small.train.y).tolist() == [10] * 10
    assert torch.bincount(small.test.y).tolist() == [1] * 10


# Scaling --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scaling", "scaler"), [("unit", MinMaxScaler), ("minmax", MinMaxScaler), ("standard", StandardScaler)]
)
def test_features_are_scaled_by_the_training_part_alone(root: Path, scaling: str, scaler: type) -> None:
    iris = data.load(Data(name="iris", validation=25, scaling=scaling))
    rows = data.order(150, torch.Generator().manual_seed(42)).numpy()
    x = load_iris().data[rows]
    expected = scaler().fit(x[:100]).transform(x)
    parts = torch.cat([iris.train.x, iris.validation.x, iris.test.x])
    assert np.allclose(parts.numpy(), expected, atol=1e-5)
    assert iris.scale(iris.test.x) is iris.test.x


def test_unit_scaling_divides_bytes_by_their_peak_exactly(root: Path) -> None:
    write_mnist(root)
    mnist, digits = data.load("mnist"), data.load("digits")
    assert torch.equal(mnist.scale(mnist.train.x), mnist.train.x.float() / 255)
    assert torch.equal(digits.scale(torch.tensor([0, 8, 16], dtype=torch.uint8)), torch.tensor([0, 0.5, 1]))


def test_standard_scaling_uses_the_moments_of_each_training_channel(root: Path, tmp_path: Path) -> None:
    data.prepare("flowers", from_=write_tree(tmp_path / "tree"))
    flowers = data.load(Data(name="flowers", validation=0, scaling="standard"))
    before = flowers.train.x.clone()
    scaled = flowers.scale(flowers.train.x)
    pixels = flowers.train.x.double()
    assert torch.equal(flowers.train.x, before)
    assert torch.allclose(scaled[:, 0].double(), (pixels[:, 0] - pixels[:, 0].mean()) / pixels[:, 0].std(correction=0))
    assert torch.equal(scaled[:, 1:], torch.zeros_like(scaled[:, 1:]))  # channels that never change
    assert torch.equal(flowers.scale(flowers.test.x[None]), flowers.scale(flowers.test.x)[None])


def test_minmax_of_images_looks_at_the_test_part_only_when_told(root: Path, tmp_path: Path) -> None:
    data.prepare("flowers", from_=write_tree(tmp_path / "tree", mode="L"))  # training pixels 0..12, test pixels to 111
    own = data.load(Data(name="flowers", validation=0, scaling="minmax"))
    both = data.load(Data(name="flowers", validation=0, scaling="minmax_all"))
    assert own.scale(own.train.x).max() == 1
    assert own.scale(own.test.x).max() == pytest.approx(111 / 12)
    assert both.scale(both.test.x).max() == 1


# Batches --------------------------------------------------------------------------------------------------------------


def part(n: int = 10) -> data.Split:
    return data.Split(torch.arange(n, dtype=torch.float32)[:, None], torch.arange(n))


def test_batches_without_a_generator_are_views_in_stored_order_with_the_rest_at_the_end() -> None:
    whole = part()
    found = list(data.batches(whole, 4))
    assert [y.tolist() for _, y in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert found[1][0].data_ptr() == whole.x[4:].data_ptr()


def test_batches_with_a_generator_follow_its_order_and_pair_x_with_y() -> None:
    found = list(data.batches(part(), 4, torch.Generator().manual_seed(1)))
    labels = torch.cat([y for _, y in found])
    assert torch.equal(labels, data.order(10, torch.Generator().manual_seed(1)))
    assert torch.equal(torch.cat([x for x, _ in found])[:, 0].long(), labels)
    assert sorted(labels.tolist()) == list(range(10))


def test_an_empty_part_has_no_batch_and_a_batch_of_nothing_is_refused() -> None:
    assert list(data.batches(part(0), 4)) == []
    with pytest.raises(PrunelabError, match="batch_size = 0"):
        list(data.batches(part(), 0))


# The cache ------------------------------------------------------------------------------------------------------------


def test_a_prepared_data_set_is_mapped_into_memory_and_carries_its_origin(root: Path) -> None:
    write_mnist(root)
    path = data.prepare("mnist")
    mnist = data.load(Data(name="mnist", validation=0))
    if sys.platform == "linux":
        assert str(path) in Path("/proc/self/maps").read_text()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    images = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    assert (metadata["source"], metadata["format"], metadata["reader"]) == ("MNIST", "2", "1")
    assert metadata["sha256_of_tensors"] == mnist.digest
    assert json.loads(metadata["files"])[images.name] == hashlib.sha256(images.read_bytes()).hexdigest()
    assert not any(str(root) in value for value in metadata.values())


def test_the_cache_wins_over_a_changed_data_root_until_prepare_is_asked(root: Path) -> None:
    write_mnist(root, seed=0)
    first = data.load("mnist").digest
    write_mnist(root, seed=1)
    assert data.load("mnist").digest == first
    data.prepare("mnist")
    assert data.load("mnist").digest != first


def test_available_tells_what_is_prepared_and_where_the_rest_would_come_from(root: Path, tmp_path: Path) -> None:
    write_mnist(root)
    data.prepare("mnist")
    data.prepare("flowers", from_=write_tree(tmp_path / "tree"))
    rows = {row["name"]: row for row in data.available()}
    assert set(rows) == {*SOURCES, "flowers"}
    assert (rows["mnist"]["prepared"], rows["mnist"]["images"], rows["mnist"]["origin"]) == (
        True,
        80,
        str(root / "MNIST" / "raw"),
    )
    assert (rows["iris"]["prepared"], rows["iris"]["origin"], rows["cifar100"]["origin"]) == (
        False,
        "scikit-learn",
        "download",
    )
    assert rows["flowers"]["bytes"] == data.prepare("flowers", from_=tmp_path / "tree").stat().st_size


def test_one_changed_byte_is_found_by_verify_and_by_load(root: Path) -> None:
    write_mnist(root)
    path = data.prepare("mnist")
    assert data.verify() == [{"name": "mnist", "ok": True, "problem": ""}]
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    (row,) = data.verify("mnist")
    assert not row["ok"]
    refused(lambda: data.load("mnist"), "its bytes are not those that were written", "prunelab data prepare mnist")
    assert "its bytes are not those that were written" in row["problem"]


def test_what_another_version_of_the_reader_prepared_is_prepared_again(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_mnist(root)
    data.prepare("mnist")
    newer = {**SOURCES, "mnist": dataclasses.replace(SOURCES["mnist"], version=2)}
    monkeypatch.setattr("prunelab.data.cache.SOURCES", newer)
    write_mnist(root, seed=1)
    again = data.load("mnist").digest
    assert "by another version of its reader" in caplog.text
    assert data.load("mnist").digest == again
    change_cache(data.prepare("mnist"), format="1")  # of before there were digests
    assert data.load("mnist").digest == again


def test_verify_says_that_a_known_data_set_is_not_prepared(root: Path) -> None:
    (row,) = data.verify("cifar10")
    assert row == {
        "name": "cifar10",
        "ok": False,
        "problem": "cifar10 is not prepared: run `prunelab data prepare cifar10`",
    }


def test_two_processes_that_ask_at_once_get_the_same_data(root: Path) -> None:
    write_mnist(root, train=2000)
    code = "import torch; from prunelab import data; torch.set_num_threads(1); print(data.load('mnist').digest)"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = [process.communicate(timeout=60)[0].strip() for process in both]
    assert digests == [data.load("mnist").digest] * 2
    assert list(cache_files()) == ["mnist.safetensors"]


def test_what_a_killed_process_left_does_not_stand_in_the_way(root: Path) -> None:
    write_mnist(root)
    left = paths.cache() / "data" / ".mnist.part"
    left.mkdir(parents=True)
    (left / "mnist.safetensors").write_bytes(b"half")
    assert len(data.load("mnist").train) == 54
    assert not left.exists()


def test_a_download_is_cached_and_then_needs_no_network(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def fake(folder: Path, download: bool) -> None:
        assert download
        write_mnist(Path(folder))

    monkeypatch.setattr(torchvision.datasets, "MNIST", fake)
    assert len(data.load("mnist").test) == 20
    monkeypatch.undo()
    monkeypatch.setenv("PRUNELAB_CACHE", str(root.parent / "cache"))
    assert len(data.load("mnist").test) == 20
    assert list(cache_files()) == ["mnist.safetensors"]


# Mistakes -------------------------------------------------------------------------------------------------------------

RAW = "MNIST/raw/train-images-idx3-ubyte"
LABELS = "MNIST/raw/t10k-labels-idx1-ubyte"


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        (RAW, lambda content: content[:-5], "truncated"),
        (RAW, lambda content: content[:3], "not an IDX file"),
        (RAW, lambda content: b"\x1f" + content[1:], "not an IDX file"),
        (LABELS, lambda content: content[:-1] + b"\x0b", "label 11 of sample 19 is out of range 0..9"),
    ],
    ids=["truncated", "header", "magic", "label"],
)
def test_a_broken_idx_file_is_named_and_the_cache_untouched(
    root: Path, name: str, change: Callable[[bytes], bytes], what: str
) -> None:
    write_mnist(root)
    data.prepare("mnist")
    rewrite(root / name, change)
    refused(lambda: data.prepare("mnist"), str(root / name), what, "fetch the file again")


def test_a_missing_idx_file_is_named(root: Path) -> None:
    write_mnist(root)
    (root / LABELS).unlink()
    refused(lambda: data.load("mnist"), str(root / LABELS), "No such file")


def test_a_truncated_gzip_is_named(root: Path) -> None:
    write_mnist(root)
    (root / f"{RAW}.gz").write_bytes(gzip.compress((root / RAW).read_bytes())[:-20])
    (root / RAW).unlink()
    refused(lambda: data.load("mnist"), f"{RAW}.gz", "truncated or corrupt", "fetch the file again")


def test_a_file_that_is_not_the_one_in_sha256sums_is_refused(root: Path) -> None:
    write_mnist(root)
    (root / "SHA256SUMS").write_text(f"{hashlib.sha256((root / RAW).read_bytes()).hexdigest()}  {RAW}\n")
    data.prepare("mnist")
    rewrite(root / RAW, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    refused(lambda: data.prepare("mnist"), str(root / RAW), "wrong digest", "fetch the file again")


def test_a_class_without_a_sample_and_unequal_counts_are_refused(root: Path) -> None:
    write_mnist(root)
    write_idx(root / LABELS, np.arange(20) % 9)
    refused(lambda: data.load("mnist"), "class '9' has no test sample")
    write_idx(root / LABELS, np.arange(19) % 10)
    refused(lambda: data.load("mnist"), "20 test images but 19 labels")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda t: rewrite(t / "train/rose/0.png", lambda b: b[:-30]), ["train/rose/0.png", "cannot be decoded"]),
        (lambda t: (t / "test/rose/0.png").write_text("no"), ["test/rose/0.png", "not an image", "fetch"]),
        (lambda t: (t / "test/rose/0.png").write_bytes(b""), ["test/rose/0.png", "cannot be decoded"]),
        (lambda t: Image.new("RGB", (5, 4)).save(t / "train/rose/1.png"), ["train/rose/1.png", "5 x 4", "6 x 6"]),
        (lambda t: Image.new("I;16", (6, 6)).save(t / "train/rose/1.png"), ["train/rose/1.png", "8 bits"]),
        (lambda t: (t / "train/daisy").mkdir(), ["class 'daisy' has no image in its train part"]),
        (lambda t: [f.unlink() for f in (t / "test/rose").iterdir()], ["class 'rose' has no image in its test part"]),
        (lambda t: (t / "test").rename(t / "val"), ["no test/<class>/ folder"]),
    ],
    ids=["truncated", "text", "empty", "size", "depth", "empty_class", "emptied_class", "no_test_part"],
)
def test_a_broken_tree_is_refused_with_the_name_of_the_file(
    root: Path, tmp_path: Path, spoil: Callable[[Path], object], parts: list[str]
) -> None:
    tree = write_tree(tmp_path / "tree")
    spoil(tree)
    refused(lambda: data.prepare("flowers", from_=tree), str(tree), *parts)


def test_a_truncated_jpeg_is_named(root: Path, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", suffix="jpg", size=40)
    rewrite(tree / "train/rose/0.jpg", lambda content: content[:-20])
    refused(lambda: data.prepare("flowers", from_=tree), "train/rose/0.jpg", "truncated", "fetch the file again")


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
def test_a_truncated_archive_is_named_wherever_it_was_cut(root: Path, tmp_path: Path, form: str) -> None:
    tree = write_tree(tmp_path / "tree")
    file = tmp_path / f"f.{form}"
    _ = zipped(tree, file) if form == "zip" else tarred(tree, file, mode="w:gz" if form == "tar.gz" else "w")
    whole = file.read_bytes()
    end = len(whole.rstrip(b"\0")) if form == "tar" else len(whole)
    cuts = {10, end // 3, end // 2, end - 4}
    if form == "tar":
        with tarfile.open(file) as archive:
            cuts |= {member.offset + part for member in archive.getmembers()[3:] for part in (0, 99)}  # after a member
    for cut in cuts:
        file.write_bytes(whole[:cut])
        refused(lambda: data.prepare("flowers", from_=file), str(file), "not a readable", "fetch it again")


def test_a_tar_with_a_damaged_header_in_the_middle_is_not_read_as_a_shorter_one(root: Path, tmp_path: Path) -> None:
    file = tarred(write_tree(tmp_path / "tree"), tmp_path / "f.tar")
    with tarfile.open(file) as archive:
        offset = archive.getmembers()[-1].offset
    rewrite(file, lambda content: content[: offset + 150] + b"x" + content[offset + 151 :])
    refused(lambda: data.prepare("flowers", from_=file), str(file), "damaged", "fetch it again")


def test_a_member_that_points_outside_the_archive_is_refused(root: Path, tmp_path: Path) -> None:
    pixel = io.BytesIO()
    Image.new("L", (2, 2)).save(pixel, "PNG")
    file = zipped(write_tree(tmp_path / "tree"), tmp_path / "f.zip")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("../../train/rose/9.png", pixel.getvalue())
    refused(lambda: data.prepare("flowers", from_=file), str(file), "'../../train/rose/9.png'", "outside")


def loads(root: Path, place: Path, *warning: str) -> data.Dataset:
    """The data set of a place; each word stands in the one warning that there is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.prepare("flowers", from_=place)
    assert len(caught) == bool(warning)
    for word in warning:
        assert word in str(caught[0].message)
    return data.load(Data(name="flowers", validation=0))


def test_links_of_a_folder_are_followed_and_those_of_a_tar_in_the_tar_only(root: Path, tmp_path: Path) -> None:
    tree, subset = write_tree(tmp_path / "tree"), tmp_path / "subset"
    for part in ("train", "test"):
        (subset / part).mkdir(parents=True)
        for name in ("rose", "tulip"):
            (subset / part / name).symlink_to(tree / part / name)
    (tree / "train" / "rose" / "again").symlink_to(tree / "train")  # never ends
    (tree / "train" / "rose" / "3.png").symlink_to(tree / "train" / "rose" / "0.png")
    assert len(loads(root, subset).train) == len(loads(root, tree).train) == 7
    (tree / "train" / "rose" / "again").unlink()
    (tree / "train" / "rose" / "3.png").unlink()
    (tree / "train" / "rose" / "3.png").hardlink_to(tree / "train" / "rose" / "0.png")
    (tree / "train" / "rose" / "4.png").symlink_to("0.png")
    (tree / "train" / "rose" / "9.png").symlink_to("/etc/hostname")
    archive = tarred(tree, tmp_path / "f.tar")
    assert len(loads(root, archive, "f.tar: 1 file left out", "train/rose/9.png").train) == 8


def test_files_that_are_left_out_are_named_and_counted(root: Path, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    rose = tree / "train" / "rose"
    for name in (".DS_Store", "._0.png", "Thumbs.db"):  # clutter: nobody misses it
        (rose / name).write_bytes(b"x")
    assert len(loads(root, tree).train) == 6
    (rose / "0.png").rename(rose / "0.PNG")
    Image.new("RGB", (6, 6)).save(rose / "more.ppm")
    for name in ("notes.txt", ".hidden.png", "3.heic", "4.npy"):
        (rose / name).write_bytes(b"x")
    Image.new("RGB", (6, 6)).save(tree / "train" / "lost.png")
    found = loads(root, tree, "5 files left out", "train/lost.png", " and 2 more")
    assert len(found.train) == 7


def test_photos_come_in_upright(root: Path, tmp_path: Path) -> None:
    tree, tag = write_tree(tmp_path / "tree"), Image.Exif()
    tag[0x0112] = 6  # turned by 90 degrees
    rows = np.tile((np.arange(6, dtype=np.uint8) * 30)[:, None, None], (1, 6, 3))
    for file in tree.rglob("*.png"):
        Image.fromarray(rows).save(file, exif=tag)
    assert loads(root, tree).train.x[0, 0].tolist() == np.rot90(rows[..., 0], -1).tolist()


def test_a_class_is_one_however_unicode_composes_its_name(root: Path, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", ("pens\u00e9e", "rose"))
    (tree / "test" / "pens\u00e9e").rename(tree / "test" / "pense\u0301e")
    assert loads(root, tree).classes == ("pens\u00e9e", "rose")


def test_images_that_would_be_cut_are_counted(root: Path, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 6, 6, 16, 2, 0, 0, 0)  # 16 bits for each of three colours
    lines = b"".join(b"\0" + bytes(36) for _ in range(6))
    for name in ("0.png", "1.png"):
        png = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
        (tree / "train" / "rose" / name).write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    refused(lambda: data.prepare("flowers", from_=tree), "train/rose/", "and 1 others are more than 8 bits deep")
    for name in ("0.png", "1.png"):
        (tree / "train" / "rose" / name).write_bytes(b"no")
    refused(lambda: data.prepare("flowers", from_=tree), "(not an image), nor can 1 others")
    film = [Image.new("RGB", (6, 6), (value, 0, 0)) for value in (9, 99)]
    for name in ("0.png", "1.png"):
        (tree / "train" / "rose" / name).unlink()
    film[0].save(tree / "train" / "rose" / "0.gif", save_all=True, append_images=film[1:])
    assert 9 in loads(root, tree, "1 file of several frames", "0.gif").train.x[:, 0, 0, 0].tolist()


def test_a_pickle_of_cifar_is_read_and_never_run(original_cifar: tuple[Path, np.ndarray]) -> None:
    archive, images = original_cifar
    batch = archive.parent / "cifar-10-batches-py" / "test_batch"

    class Harm:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.write_text, (archive.parent / "harm", "done")

    import torchvision.datasets

    content = {
        "harm": Harm(),
        "filenames": ["labels.png"] * 10,
        "data": images[20:].reshape(10, 3072),
        "labels": [*range(10)],
    }
    for protocol in (2, 5):  # 2: as its authors wrote it
        batch.write_bytes(pickle.dumps(content, protocol))
        torchvision.datasets.CIFAR10.test_list[0][1] = hashlib.md5(batch.read_bytes()).hexdigest()
        data.prepare("cifar10")
        cifar = data.load(Data(name="cifar10", validation=0))
        assert np.array_equal(cifar.test.x.numpy(), images[20:])
        assert cifar.test.y.tolist() == list(range(10))
        assert not (archive.parent / "harm").exists()


def test_tiny_imagenet_refuses_lists_that_do_not_fit(root: Path) -> None:
    folder = write_tiny(root / "tiny-imagenet-200")
    notes = folder / "val" / "val_annotations.txt"
    rewrite(notes, lambda content: content.replace(b"n1", b"n7"))
    refused(lambda: data.load("tiny_imagenet"), "label 'n7' of val_1.JPEG is not in wnids.txt")
    rewrite(notes, lambda content: content.replace(b"n7", b"n1").replace(b"val_1", b"val_8"))
    refused(lambda: data.load("tiny_imagenet"), "image val_8.JPEG is not there")
    notes.unlink()
    refused(lambda: data.load("tiny_imagenet"), "no val_annotations.txt")


def test_another_data_set_under_a_known_name_is_refused(root: Path, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", size=32)
    refused(lambda: data.prepare("cifar10", from_=tree), "2 classes", "CIFAR-10 has 10")
    tree = write_tree(tmp_path / "small", tuple("abcdefghij"), size=16)
    refused(lambda: data.prepare("cifar10", from_=tree), "(3, 16, 16)", "(3, 32, 32)")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "tiny_imagenet"])
def test_without_network_and_data_root_the_remedy_is_given(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.delenv("PRUNELAB_DATA")
    message = refused(lambda: data.load(name), name, "no data root was given", "download failed", "PRUNELAB_DATA=")
    assert f"`prunelab data prepare {name} --from PATH`" in message
    assert capsys.readouterr().out == ""


def test_a_data_root_that_lacks_the_data_set_or_does_not_exist_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(lambda: data.load("fashion_mnist"), f"{root} has no FashionMNIST/raw", "download failed")
    monkeypatch.setenv("PRUNELAB_DATA", str(root / "nowhere"))
    refused(lambda: data.load("mnist"), "nowhere: no such folder")


def test_torch_and_torchvision_of_different_indexes_are_told_apart(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    honest = builtins.__import__

    def broken(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return honest(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    message = refused(lambda: data.load("mnist"), "different indexes", "torchvision::nms does not exist")
    assert "pip install --force-reinstall torch torchvision" in message


def test_an_unknown_name_gets_the_nearest_one_and_a_path_is_no_name(root: Path) -> None:
    refused(lambda: data.load("fashon_mnist"), "unknown data set 'fashon_mnist'", "did you mean 'fashion_mnist'?")
    refused(lambda: data.verify("mnits"), "did you mean 'mnist'?")
    refused(lambda: data.load("../mnist"), "use lower-case letters")
    refused(lambda: data.prepare("flowers", from_="nowhere.zip"), "nowhere.zip", "no such file")
    refused(lambda: data.prepare("iris", from_="iris.csv"), "ships in scikit-learn")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"validation": 60}, ["validation = 60", "60 samples"]),
        ({"validation": 10, "train_size": 51}, ["train_size = 51", "only 50 samples"]),
        ({"test": 5}, ["has a test part", "test_size"]),
        ({"validation": 5, "stratify": True}, ["5 of 60", "stratify"]),
        ({"name": "iris", "test": 150}, ["test = 150", "150 samples"]),
        ({"name": "iris", "test": 0}, ["no test sample"]),
        ({"name": "iris", "validation": 125}, ["validation = 125", "125 samples"]),
    ],
)
def test_more_samples_than_there_are_is_refused(root: Path, settings: dict[str, object], parts: list[str]) -> None:
    write_mnist(root)
    data.prepare("mnist")
    data.prepare("iris")
    refused(lambda: data.load(Data(**{"name": "mnist", **settings})), *parts)


def change_cache(path: Path, **metadata: str) -> None:
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    metadata = {**old, **digest.IN_TENSORS, **metadata}
    save_file({key: tensor.clone() for key, tensor in load_file(path).items()}, path, metadata)
    with path.open("r+b") as file:
        digest.seal(file)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda path: rewrite(path, lambda content: content[:-100]), "damaged"),
        (lambda path: path.write_bytes(b"no tensors"), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: change_cache(path, sha256_of_this="none"), "its digest is gone"),
        (lambda path: change_cache(path, classes='["a", "b"]'), "label is out of range 0..1"),
        (lambda path: change_cache(path, classes="["), "incomplete"),
        (lambda path: save_file({"train_x": torch.zeros(3)}, path, {"format": "2", "reader": "1"}), "digest is gone"),
    ],
    ids=["truncated", "text", "empty", "format", "labels", "metadata", "tensors"],
)
def test_a_damaged_cache_file_is_named_with_the_command_that_writes_it_again(
    root: Path, spoil: Callable[[Path], None], what: str
) -> None:
    write_mnist(root)
    path = data.prepare("mnist")
    spoil(path)
    refused(lambda: data.load("mnist"), str(path), what, "prunelab data prepare mnist")
    assert [row["ok"] for row in data.verify()] == [False]
    data.prepare("mnist")
    assert data.verify("mnist")[0]["ok"]


def test_a_cache_that_cannot_be_written_names_the_variable_that_moves_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = root / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("PRUNELAB_CACHE", str(blocked))
    with pytest.raises(PrunelabError, match=r"cannot be written .*set PRUNELAB_CACHE"):
        data.load("iris")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_asked_for_and_absent_is_one_line(root: Path) -> None:
    refused(lambda: data.load("iris", device="cuda"), "'cuda' was asked for", "use device 'cpu'")
    refused(lambda: data.load("iris", device="gpu0"), "'gpu0' is unknown")


# Real data ------------------------------------------------------------------------------------------------------------


def test_real_mnist_equals_what_torchvision_reads(data_root: Path) -> None:
    from torchvision.datasets import MNIST

    mnist = data.load(Data(name="mnist", validation=0))
    for part, train in ((mnist.train, True), (mnist.test, False)):
        original = MNIST(data_root, train=train)
        assert torch.equal(part.x[:, 0], original.data)
        assert torch.equal(part.y, original.targets)


def test_real_fashion_mnist_has_the_known_mean_and_deviation(data_root: Path) -> None:
    fashion = data.load(Data(name="fashion_mnist", validation=0, scaling="standard"))
    assert (len(fashion.train), len(fashion.test)) == (60_000, 10_000)
    assert fashion.shift.item() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert fashion.spread.item() / 255 == pytest.approx(0.3530, abs=5e-5)


def test_real_cifar10_comes_from_its_jpeg_tar_pixel_by_pixel(data_root: Path) -> None:
    cifar = data.load(Data(name="cifar10", validation=0))
    assert (cifar.source, cifar.classes[3], cifar.shape) == ("CIFAR-10 (JPEG)", "cat", (3, 32, 32))
    assert torch.bincount(cifar.train.y).tolist() == [5000] * 10
    with tarfile.open(data_root / "cifar10-jpeg.tar") as archive:
        image = Image.open(io.BytesIO(archive.extractfile("test/airplane/0007.jpg").read())).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    same = (cifar.test.x == pixels).flatten(1).all(1)
    assert cifar.test.y[same].tolist() == [0]


def test_real_tiny_imagenet_is_called_a_subset(data_root: Path) -> None:
    tiny = data.load("tiny_imagenet")
    assert (tiny.source, tiny.shape, len(tiny.classes)) == ("Tiny ImageNet (subset)", (3, 64, 64), 200)
    assert (len(tiny.train), len(tiny.validation), len(tiny.test)) == (9000, 1000, 2000)
