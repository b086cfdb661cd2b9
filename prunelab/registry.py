"""Things that a setting names: those of this package, those that were registered, and any other by its import path."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from prunelab.errors import PrunelabError, first_line, nearest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Name -> entry. ``registry["mymethods:LargestGo"]`` is one of ``LargestGo`` in the module ``mymethods``.

    To import a module runs its code, as the statement ``import`` does; so name only what you would import.

    Args:
        kind: what the entries are, for messages.
        entries: those of this package.
        adopt: makes an entry of something of the user's own and of options, or raises ``PrunelabError`` with what it
            should be.

    Attributes:
        registered: name -> thing and options, as they were registered, for other processes.
    """

    def __init__(self, kind: str, entries: Mapping[str, T], adopt: Callable[..., T]) -> None:
        self.kind, self._entries, self._adopt = kind, dict(entries), adopt
        self._imported: dict[str, T] = {}
        self.registered: dict[str, tuple[Any, dict[str, Any]]] = {}

    def __getitem__(self, name: str) -> T:
        if name in self._entries:
            return self._entries[name]
        if not isinstance(name, str) or ":" not in name:
            raise KeyError(name)
        if name not in self._imported:
            self._imported[name] = self._adopted(name, self._import(name))
        return self._imported[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._imported

    def find(self, name: str) -> T:
        """The entry of that name, or at that import path.

        Raises:
            PrunelabError: one line: there is none, or it is of another kind.
        """
        try:
            return self[name]
        except KeyError:
            own = "or give the import path of your own, 'module:name'"
            raise PrunelabError(f"there is no {self.kind} {name!r}: {nearest(str(name), self)}, {own}") from None

    def register(self, name: str, thing: Any, **options: Any) -> None:
        """Make something of your own known by a name, as those of this package are; once more: in place of the old.

        Args:
            name: lower-case letters, digits and ``_``; no name of this package.
            thing: what the name stands for.
            **options: what belongs to the entry besides.

        Raises:
            PrunelabError: the name is taken, or cannot be one, or the thing is of another kind.
        """
        if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
            raise PrunelabError(f"{self.kind} {name!r}: should be lower-case letters, digits and _, a letter first")
        if name in self._entries and name not in self.registered:
            raise PrunelabError(f"{self.kind} {name!r} is one of this package: choose another name")
        self._entries[name] = self._adopted(name, thing, **options)
        self.registered[name] = thing, options

    def _adopted(self, name: str, thing: Any, **options: Any) -> T:
        try:
            return self._adopt(thing, **options)
        except PrunelabError as error:
            raise PrunelabError(f"{self.kind} {name!r}: {error}") from None

    def _import(self, path: str) -> Any:
        module, _, attribute = path.partition(":")
        if not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
            raise PrunelabError(f"{self.kind} {path!r}: should be an import path, 'package.module:name'")
        try:
            found = importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - whatever the user's module raises
            raise PrunelabError(f"{self.kind} {path!r}: {module} cannot be imported ({first_line(error)})") from None
        if not hasattr(found, attribute):
            known = (name for name in vars(found) if not name.startswith("_"))
            raise PrunelabError(f"{self.kind} {path!r}: {module} has no {attribute!r}: {nearest(attribute, known)}")
        return getattr(found, attribute)
