"""Data whose length nobody knows."""

from collections.abc import Iterable, Iterator
from typing import Any


class Unsized:
    """Hands out *batches*, each time from the first, by their own iterator; has no length."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)
