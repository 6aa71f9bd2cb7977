"""Image files with captions.

The folder holds the images and one of

    captions.jsonl     a line {"image": "a/b.png", "caption": "two red pears"} for each image
    metadata.jsonl     a line {"file_name": "a/b.png", "text": "two red pears"}, as Hugging Face's ImageFolder has it
    metadata.csv, .tsv, captions.csv, .tsv    a table whose first line names such columns
    a/b.txt            beside each image a/b.png a text file of its name

The first that is there is read. Paths of images are below the folder; images that are not named there are counted, and
a warning tells of them, of other such files and of all else that the folder holds. Broken lines, captions that are
empty or no text, images that are missing, lie outside the folder or cannot be decoded are bad rows (`BadRow`): named by
their line, never replaced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from etils import epath

from src.data.example import BadRow, Example
from src.data.files.csv_table import CsvTable
from src.data.files.json_lines import LineFile
from src.data.files.left_out import warn_tests
from src.data.files.text_pairs import TextPairs
from src.data.files.unnamed import warn_unnamed
from src.data.sources._files import CAPTION, FileSource, image_path, texts_of_row

LINES = ("captions.jsonl", "metadata.jsonl")
TABLES = ("captions.csv", "captions.tsv", "metadata.csv", "metadata.tsv")
IMAGE = ("image", "file_name", "filepath", "image_path")


class Captions(FileSource):
    """`image` and the texts of a row, `caption` or others; a row without "caption" has its "text" under that name, too.
    `held_out` rows are "test"."""

    def __init__(self, folder: str | os.PathLike[str], *, held_out: int = 0):
        super().__init__(held_out)
        self.folder = folder

    def open(self) -> LineFile | CsvTable | TextPairs:
        """The rows. Raises FileNotFoundError if the folder has none of these, ValueError for a table that is none."""
        folder = self.path("folder")
        for name in (*LINES, *TABLES):
            if (folder / name).exists():
                rows = LineFile(folder / name) if name in LINES else _table(folder / name)
                warn_unnamed(folder, [folder / name], _images(rows))
                return rows
        pairs = TextPairs(folder)
        if not pairs.pairs:
            raise FileNotFoundError(
                f"{os.fspath(folder / LINES[0])!r} does not exist: the folder needs a line"
                ' {"image": "a.png", "caption": "words"} for each image there, or a table metadata.csv with the columns'
                " file_name and text, or an a.txt beside each a.png" + (f" (it has {pairs.left})" if pairs.left else "")
            )
        pairs.left.warn(folder)
        warn_tests(folder, pairs.folders)
        return pairs

    def __getitem__(self, number: int) -> Example:
        where, row = self.files.where(number), self.files[number]
        key = next((key for key in IMAGE if key in row), None)
        if key is None:
            keys = ", ".join(map(repr, [*row][:6])) or "none"
            wanted = '{"image": "a.png", "caption": "words"}'
            raise BadRow("the row names no image", where, f"its keys are {keys}; write {wanted}")
        name = row[key]
        row = {other: value for other, value in row.items() if not (other in IMAGE and (other == key or value == name))}
        image = image_path(self.path("folder"), name, where)
        return Example(texts_of_row(row, where) | {"image": image}, where)


def _images(rows: LineFile | CsvTable) -> Iterator[object]:
    """What the rows say of their images' paths, as far as they can be read."""
    for number in range(len(rows)):
        try:
            row = rows[number]
        except BadRow:
            continue
        yield next((row[key] for key in IMAGE if key in row), None)


def _table(path: epath.Path) -> CsvTable:
    """The table. Raises ValueError where no column names the images, and as `CsvTable`."""
    table = CsvTable(path, IMAGE)
    if not set(IMAGE) & set(table.columns):
        raise ValueError(
            f"{os.fspath(path)!r} has the columns {', '.join(filter(None, table.columns))} and none with the images:"
            f" its first line should name {IMAGE[1]} (or {', '.join(IMAGE)}) and {CAPTION[1]} (or {CAPTION[0]})"
        )
    return table
