"""Who is next: owners take turns, and within an owner first come, first served."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar, runtime_checkable

__all__ = ["FairQueue"]


@runtime_checkable
class _Owned(Protocol):
    @property
    def owner(self) -> str: ...


Item = TypeVar("Item", bound=_Owned)


class FairQueue(Generic[Item]):
    """Items that wait, in a fair order: the owner served least recently comes first, however many items it has.

    Example:
        >>> from types import SimpleNamespace as Item
        >>> queue = FairQueue()
        >>> for name in ("a1", "a2", "a3", "b1"):
        ...     queue.add(Item(owner=name[0], name=name))
        >>> [item.name for item in queue]
        ['a1', 'b1', 'a2', 'a3']
    """

    def __init__(self) -> None:
        self._items = OrderedDict[str, deque[Item]]()  # by owner, the one served least recently first

    def __len__(self) -> int:
        return sum(map(len, self._items.values()))

    def __iter__(self) -> Iterator[Item]:
        """As they would be taken: each owner's first, then each owner's second, and so on."""
        rest = [iter(items) for items in self._items.values()]
        end = object()
        while rest:
            ahead = [(items, next(items, end)) for items in rest]
            yield from (item for _, item in ahead if item is not end)  # pyright: ignore[reportReturnType]
            rest = [items for items, item in ahead if item is not end]

    def add(self, item: Item) -> None:
        self._items.setdefault(item.owner, deque()).append(item)

    def take(self, item: Item) -> None:
        """Remove an item because it starts: its owner was served."""
        self.remove(item)
        if item.owner in self._items:
            self._items.move_to_end(item.owner)

    def remove(self, item: Item) -> None:
        """Remove an item that will not start."""
        items = self._items[item.owner]
        items.remove(item)
        if not items:
            del self._items[item.owner]
