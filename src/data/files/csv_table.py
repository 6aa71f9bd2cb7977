"""A table in a text file, with the names of its columns in the first line: comma separated, or, `*.tsv`, by tabs."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence

from etils import epath

from src.common.files.images import ENDINGS
from src.common.files.paths import read_bounded
from src.common.files.strict_json import is_wide
from src.common.tree import listed
from src.data.example import BadRow

TABLE_BYTES = 1 << 28  # a table is held in memory


class CsvTable:
    """The rows of a local or remote table by number, each a dict of texts by column.

    A row with too many or too few fields, or broken quotes, is a bad row; empty lines are none. A column without a name
    is not read. Of a field over several lines none may be a row itself, with as many fields and an image (in
    the first of the columns `images` that there is), or, where names of images have no known ending, all of them with
    as many fields: a quote too many or too few joined them, and each of its lines is a bad row.

    Raises FileNotFoundError, and ValueError for a file that is too long, is not UTF-8, or has no names of columns, and
    for a field over several lines that is not closed.
    """

    def __init__(self, path: epath.Path, images: Sequence[str] = ()):
        self.name = path.name
        data = read_bounded(path, TABLE_BYTES, "table")
        if is_wide(data):
            raise ValueError(f"{os.fspath(path)!r} is UTF-16 text: save it as UTF-8")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{os.fspath(path)!r} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
        lines, separator = list(io.StringIO(text, newline="")), "\t" if path.suffix == ".tsv" else ","
        rows = _rows(lines, separator, os.fspath(path))
        _, _, first = next(rows, (0, 0, ""))
        self.columns = [column.strip() for column in first] if isinstance(first, list) else []
        named = [column for column in self.columns if column]
        if len(set(named)) != len(named) or len(named) < 2:
            raise ValueError(
                f"{os.fspath(path)!r} begins with the columns {listed(named) or 'none'}: its first line should"
                " name at least two, each once, such as file_name and text"
            )
        place = next((self.columns.index(name) for name in images if name in self.columns), None)
        self._rows: list[tuple[int, list[str] | str]] = []
        for start, end, fields in rows:
            inside = end > start and not isinstance(fields, str)
            if inside and _is_joined(lines[start:end], separator, fields, len(self.columns), place):
                fields = f"a quote joins the lines {start} to {end}"
            if isinstance(fields, str):
                self._rows += [(number, fields) for number in range(start, end + 1) if lines[number - 1].strip()]
            else:
                self._rows.append((start, fields))

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
        return {column: field for column, field in zip(self.columns, fields, strict=True) if column}


def _rows(lines: list[str], separator: str, path: str) -> Iterator[tuple[int, int, list[str] | str]]:
    """The rows that are not empty: their first and last line, and their fields, or what is wrong with them.

    Raises ValueError for a field over several lines that is not closed, or is longer than `csv` reads.
    """
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            fields: list[str] | str = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            end = reader.line_num
            opened = _open_quote(lines[start - 1 : end], separator)
            if opened is not None and end > start:
                raise ValueError(
                    f"the quote in line {start + opened} of {path!r} opens a field that is not closed (read to line"
                    f" {end}): close it, or write a quote in a text as two, in quotes"
                ) from error
            fields = f"{error}; it goes on to line {end}"
        if isinstance(fields, str) or any(field.strip() for field in fields):
            yield start, reader.line_num, fields


def _open_quote(lines: list[str], separator: str) -> int | None:
    """In which of the lines of a row, from 0, a field begins that is not closed; None: in none."""
    text, place = "".join(lines), 0
    closed = re.compile(r'"(?:[^"]|"")*"(?!")')
    after = re.compile(rf"[^{separator}\r\n]*(?:{separator}|\r\n?|\n|$)")
    while place < len(text):
        if text[place] == '"':
            if not (field := closed.match(text, place)):
                return len(list(io.StringIO(text[: place + 1], newline=""))) - 1
            place = field.end()
        place = after.match(text, place).end()
    return None


def _is_joined(lines: list[str], separator: str, fields: list[str], columns: int, place: int | None) -> bool:
    """Whether one of the lines behind the first of a row is a row itself, with the name of an image at `place`, or,
    where the row has no such name, all of them are rows."""
    parts = [next(csv.reader([line], delimiter=separator), []) for line in lines if line.strip()]
    alone = [len(part) == columns for part in parts]
    if place is None or not _names_image(fields, place):
        return bool(parts) and all(alone)
    return any(own and _names_image(part, place) for own, part in zip(alone, parts, strict=True))


def _names_image(fields: list[str], place: int) -> bool:
    return place < len(fields) and fields[place].strip().lower().endswith(ENDINGS)
