"""Files of tensors that notice damage: safetensors with their own digest (``digest``). Nothing is unpickled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from prunelab import digest
from prunelab.errors import PrunelabError, first_line


@dataclass(frozen=True)
class TensorFile:
    """A kind of file: its format as the metadata name it, and how error messages speak of it.

    Attributes:
        format: ``"prunelab masks 2"``; files that say so are refused where their digest is absent or wrong.
        what: ``"masks"``.
        writer: what to call to write one again: ``"Masks.save"``.
        error: the class of its errors.
        older: formats, ``""`` where none is named, that are read although they have no digest.
    """

    format: str
    what: str
    writer: str
    error: type[PrunelabError]
    older: tuple[str, ...] = ()

    def save(self, path: str | Path, tensors: Mapping[str, Tensor], **facts: str) -> Path:
        """Write a file; at no moment is there half a file under that name.

        Args:
            path: of the file.
            tensors: name -> values, on any device.
            facts: metadata.

        Raises:
            PrunelabError: of the class ``error``: the folder does not exist or cannot be written.
        """
        path = self._path(path)
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            with digest.sealing(path) as part:
                safetensors.torch.save_file(own, part, metadata={"format": self.format, **facts, **digest.IN_TENSORS})
        except (OSError, SafetensorError) as error:
            why = "the folder does not exist" if not path.parent.is_dir() else _line(error)
            where = f"{path}: {self.what} cannot be written there"
            raise self.error(f"{where} ({why}): choose another place") from None
        return path

    def load(self, path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors, on the CPU, and metadata.

        Raises:
            PrunelabError: of the class ``error``: the file is absent, of another kind, or damaged.
        """
        path = self._path(path)
        if not path.is_file():
            raise self.error(f"{path}: there is no such file; {self.writer} writes one")
        again = f"write it again with {self.writer}"
        try:
            data = path.read_bytes()
            facts, tensors = digest.metadata(data), safetensors.torch.load(data)
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise self.error(f"{path}: not a file of {self.what} ({_line(error)}): {again}") from None
        found = facts.get("format", "")
        if digest.THIS not in facts and found in self.older:
            return tensors, facts
        if found != self.format:
            raise self.error(
                f"{path}: not a file of {self.what}: its format is {found!r}, not {self.format!r}: {again}"
            )
        try:
            sealed = digest.check(data)
        except ValueError:
            sealed = False
        if not sealed:
            raise self.error(f"{path}: damaged: its contents are not those that were written: {again}")
        return dict(sorted(tensors.items())), facts

    def _path(self, path: str | Path) -> Path:
        if not isinstance(path, str | os.PathLike):
            raise self.error(f"path is a {type(path).__name__}: should be the path of a file")
        return Path(path)


def _line(error: Exception) -> str:
    return " ".join(first_line(error).split())
