"""Things that a setting names: those of this package, those that were registered, and any other by its import path."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from prunelab.errors import PrunelabError, first_line, nearest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Name -> thing. ``registry["mymethods:LargestGo"]`` imports ``LargestGo`` from the module ``mymethods``.

    To import a module runs its code, as the statement ``import`` does; so name only what you would import.

    Args:
        kind: what they are, for messages.
        known: those of this package.
        adopt: makes an entry of something of the user's own, or raises ``PrunelabError`` with what it should be.
    """

    def __init__(self, kind: str, known: Mapping[str, T], adopt: Callable[..., T]) -> None:
        self.kind, self._known, self._adopt, self.added = kind, dict(known), adopt, {}

    def __getitem__(self, name: str) -> T:
        if name in self._known:
            return self._known[name]
        if not isinstance(name, str) or ":" not in name:
            raise KeyError(name)
        if name not in self.added:
            self.added[name] = self._adopted(name, _imported(self.kind, name))
        return self.added[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def find(self, name: str) -> T:
        """The thing of that name, or at that import path.

        Raises:
            PrunelabError: one line: there is none, or it is of another kind.
        """
        try:
            return self[name]
        except KeyError:
            own = f"{nearest(str(name), self)}, or give the import path of your own, 'module:name'"
            raise PrunelabError(f"there is no {self.kind} {name!r}: {own}") from None

    def register(self, name: str, thing: Any, **preset: Any) -> None:
        """Make something of your own known by a name, as those of this package are; again: it takes its place.

        Args:
            name: lower-case letters, digits and ``_``; no name of this package.
            thing: what the name stands for.
            **preset: what ``adopt`` takes besides.

        Raises:
            PrunelabError: the name is taken, or cannot be one, or the thing is of another kind.
        """
        if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
            raise PrunelabError(f"{self.kind} {name!r}: should be lower-case letters, digits and _, a letter first")
        if name in self._known and name not in self.added:
            raise PrunelabError(f"{self.kind} {name!r} is one of this package: choose another name")
        self._known[name] = self.added[name] = self._adopted(name, thing, **preset)

    def _adopted(self, name: str, thing: Any, **preset: Any) -> T:
        try:
            return self._adopt(thing, **preset)
        except PrunelabError as error:
            raise PrunelabError(f"{self.kind} {name!r}: {error}") from None


def _imported(kind: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise PrunelabError(f"{kind} {path!r}: should be an import path, 'package.module:name'")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - whatever the user's module raises
        raise PrunelabError(f"{kind} {path!r}: {module} cannot be imported ({first_line(error)})") from None
    if not hasattr(found, attribute):
        raise PrunelabError(f"{kind} {path!r}: {module} has no {attribute!r}: {nearest(attribute, vars(found))}")
    return getattr(found, attribute)
