"""Files of tensors that notice damage: safetensors with a digest of all that they hold. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

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
        path = Path(path)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        facts = {"format": self.format, **facts}
        try:
            safetensors.torch.save_file(own, part, metadata={**facts, "digest": _digest(own, facts)})
            part.replace(path)
        except (OSError, SafetensorError) as error:
            why = "the folder does not exist" if not path.parent.is_dir() else _line(error)
            where = f"{path}: {self.what} cannot be written there"
            raise self.error(f"{where} ({why}): choose another place") from None
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
        return path

    def load(self, path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors, on the CPU, and metadata.

        Raises:
            PrunelabError: of the class ``error``: the file is absent, of another kind, or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise self.error(f"{path}: there is no such file; {self.writer} writes one")
        again = f"write it again with {self.writer}"
        try:
            with safetensors.safe_open(path, "pt") as file:
                facts, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:  # a header that is no UTF-8 is a ValueError
            raise self.error(f"{path}: not a file of {self.what} ({_line(error)}): {again}") from None
        digest, found = facts.pop("digest", None), facts.get("format", "")
        if digest is None and found in self.older:
            return tensors, facts
        if found != self.format:
            raise self.error(
                f"{path}: not a file of {self.what}: its format is {found!r}, not {self.format!r}: {again}"
            )
        if digest != _digest(tensors, facts):
            raise self.error(f"{path}: damaged: its contents are not those that were written: {again}")
        return tensors, facts


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """sha256 over the metadata, and name, type, shape and bytes of every tensor."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _line(error: Exception) -> str:
    return " ".join(first_line(error).split())
