"""Classes by number, on the host: a condition of a whole row, or tokens in front of it."""

from __future__ import annotations

from typing import ClassVar

from src.interfaces import FieldSpec


class Classes:
    """Classes 0 … count - 1; `null` = count stands for no class, for guidance, so that a table has count + 1 rows.

    tokens   0: the class conditions the row; else it is so many tokens, ids of their own for each class and for none

    Raises ValueError for a count below 1, and for tokens below 0.
    """

    where: ClassVar[str] = "host"
    shape: ClassVar[tuple[int, ...]] = ()

    def __init__(self, count: int, tokens: int = 0):
        if count < 1 or tokens < 0:
            raise ValueError(
                f"count={count}, tokens={tokens} is not possible: give at least 1 class, and 0 tokens or more"
            )
        self.count = self.null = count
        self.tokens = tokens
        self.spec = FieldSpec(vocab=(count + 1) * tokens if tokens else count)

    def encode(self, value: int) -> int:
        """The class itself. Raises ValueError for what is none."""
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.count:
            raise ValueError(f"{value!r} is none of the classes 0 to {self.count - 1}")
        return value

    def decode(self, value: int) -> int:
        """The class itself."""
        return int(value)
