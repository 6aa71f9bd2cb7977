"""Classes by number: a condition of a whole row, on the host."""

from __future__ import annotations

from typing import ClassVar

from src.interfaces import FieldSpec


class Classes:
    """Classes 0 … count - 1; `null` = count stands for no class, for guidance, so that a table has count + 1 rows.

    Raises ValueError for a count below 1.
    """

    where: ClassVar[str] = "host"
    shape: ClassVar[tuple[int, ...]] = ()

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"count={count} is not possible: give at least 1 class")
        self.count = self.null = count
        self.spec = FieldSpec(vocab=count)

    def encode(self, value: int) -> int:
        """The class itself. Raises ValueError for what is none."""
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.count:
            raise ValueError(f"{value!r} is none of the classes 0 to {self.count - 1}")
        return value

    def decode(self, value: int) -> int:
        """The class itself."""
        return int(value)
