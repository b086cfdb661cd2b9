"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest

from prunelab import paths


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
