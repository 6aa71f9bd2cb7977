"""A table in a text file, with the names of its columns in the first line: comma separated, or, `*.tsv`, by tabs."""

from __future__ import annotations

import csv
import io
import os

from etils import epath

from src.common.files.paths import read_bounded
from src.common.files.strict_json import is_wide
from src.common.tree import listed
from src.data.example import BadRow

TABLE_BYTES = 1 << 28  # a table is held in memory


class CsvTable:
    """The rows of a local or remote table by number, each a dict of texts by column.

    A row with too many or too few fields, or broken quotes, is a bad row; empty lines are none. Raises
    FileNotFoundError, and ValueError for a file that is too long, is not UTF-8, or has no names of columns.
    """

    def __init__(self, path: epath.Path):
        self.name = path.name
        data = read_bounded(path, TABLE_BYTES, "table")
        if is_wide(data):
            raise ValueError(f"{os.fspath(path)!r} is UTF-16 text: save it as UTF-8")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{os.fspath(path)!r} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
        self._rows = _rows(text, "\t" if path.suffix == ".tsv" else ",")
        first = self._rows.pop(0)[1] if self._rows else []
        self.columns = [column.strip() for column in first] if isinstance(first, list) else []
        if len(set(self.columns) - {""}) != len(self.columns) or len(self.columns) < 2:
            raise ValueError(
                f"{os.fspath(path)!r} begins with the columns {listed(self.columns) or 'none'}: its first line should"
                " name at least two, each once, such as file_name and text"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, number: int) -> str:
        """The first line of a row, for people, who count from 1."""
        return f"{self.name} line {self._rows[number][0]}"

    def __getitem__(self, number: int) -> dict[str, str]:
        fields = self._rows[number][1]
        if isinstance(fields, str):
            raise BadRow("the row is no row of a table", self.where(number), fields)
        if len(fields) != len(self.columns):
            found = f"{len(fields)} instead of {len(self.columns)}"
            raise BadRow("the row has another number of columns", self.where(number), found)
        return dict(zip(self.columns, fields, strict=True))


def _rows(text: str, separator: str) -> list[tuple[int, list[str] | str]]:
    """The rows that are not empty: the line they begin in, and their fields, or what is wrong with them."""
    found: list[tuple[int, list[str] | str]] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields: list[str] | str = next(reader)
        except StopIteration:
            return found
        except csv.Error as error:
            fields = f"{error}; it goes on to line {reader.line_num}"
        if isinstance(fields, str) or any(field.strip() for field in fields):
            found.append((line, fields))
