"""A mapping of many items of which a few change now and then."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

V = TypeVar("V")

MOST_CHANGED = 1_000
"""Changed items that are kept apart. With more of them, all items are copied."""


class Layered(Mapping[str, V]):
    """A mapping that never changes, and that is quick to make from another one with a few changes.

    It shares most items with the one that it was made from.
    """

    __slots__ = ("_base", "_changed", "_size")

    def __init__(self, items: Mapping[str, V] | None = None) -> None:
        self._base: dict[str, V] = dict(items or {})
        self._changed: dict[str, V | None] = {}
        """Items in place of those of the base; None for one that was removed."""
        self._size = len(self._base)

    def with_changes(self, changes: Mapping[str, V | None]) -> "Layered[V]":
        """Return a mapping with these items, and without those that are None."""
        if len(self._changed) + len(changes) > MOST_CHANGED:
            base = self._base | self._changed | dict(changes)
            return Layered({name: value for name, value in base.items() if value is not None})
        new = Layered[V]()
        new._base = self._base
        new._changed = self._changed | dict(changes)
        gone = sum(name in self for name, value in changes.items() if value is None)
        new._size = (
            self._size - gone + sum(name not in self for name, value in changes.items() if value is not None)
        )
        return new

    def __getitem__(self, name: str) -> V:
        changed = self._changed
        value = changed[name] if name in changed else self._base.get(name)
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        changed = self._changed
        yield from (name for name in self._base if changed.get(name, self) is not None)
        yield from (name for name, value in changed.items() if value is not None and name not in self._base)

    def __len__(self) -> int:
        return self._size
