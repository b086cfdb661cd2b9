"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest

# Before torch is loaded: test processes side by side share the cores, instead of each starting a thread for every core.
_SIDE_BY_SIDE = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (2 * _SIDE_BY_SIDE))))

from prunelab import paths  # noqa: E402


@pytest.fixture
def data_root() -> Path:
    """The folder with the real data sets, or a skip that says how to get one."""
    root = paths.data_root()
    if root is None:
        pytest.skip("PRUNELAB_DATA is not set: no real MNIST, Fashion-MNIST, CIFAR-10 or Tiny ImageNet here")
    return root


@pytest.fixture(autouse=True)
def _own_places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's runs or figures; prepared data sets are shared by all of a test session."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # every worker has a folder of its own in that of the session
        base = base.parent
    monkeypatch.setenv("PRUNELAB_RUNS", str(tmp_path_factory.mktemp("runs")))
    monkeypatch.setenv("PRUNELAB_FIGURES", str(tmp_path_factory.mktemp("figures")))
    if "PRUNELAB_CACHE" not in os.environ:
        monkeypatch.setenv("PRUNELAB_CACHE", str(base / "cache"))
