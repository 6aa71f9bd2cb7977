"""Image files with captions.

The folder holds the images and one of

    captions.jsonl     a line {"image": "a/b.png", "caption": "two red pears"} for each image
    metadata.jsonl     a line {"file_name": "a/b.png", "text": "two red pears"}, as Hugging Face's ImageFolder has it
    metadata.csv, .tsv, captions.csv, .tsv    a table whose first line names such columns
    a/b.txt            beside each image a/b.png a text file of its name

The first that is there is read. Paths of images are below the folder. Broken lines, captions that are empty or no text,
images that are missing, lie outside the folder or cannot be decoded are bad rows (`BadRow`): named by their line, never
replaced.
"""

from __future__ import annotations

import os

from etils import epath

from src.data.example import BadRow, Example
from src.data.files.csv_table import CsvTable
from src.data.files.json_lines import LineFile
from src.data.files.text_pairs import TextPairs
from src.data.sources._files import FileSource, image_path

LINES = ("captions.jsonl", "metadata.jsonl")
TABLES = ("captions.csv", "captions.tsv", "metadata.csv", "metadata.tsv")
IMAGE = ("image", "file_name", "filepath", "image_path")
CAPTION = ("caption", "text")


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
                return LineFile(folder / name) if name in LINES else _table(folder / name)
        pairs = TextPairs(folder)
        if not pairs.pairs:
            raise FileNotFoundError(
                f"{os.fspath(folder / LINES[0])!r} does not exist: the folder needs a line"
                ' {"image": "a.png", "caption": "words"} for each image there, or a table metadata.csv with the columns'
                " file_name and text, or an a.txt beside each a.png" + (f" (it has {pairs.left})" if pairs.left else "")
            )
        pairs.left.warn(folder)
        return pairs

    def __getitem__(self, number: int) -> Example:
        where, row = self.files.where(number), self.files[number]
        key = next((key for key in IMAGE if key in row), None)
        if key is None:
            keys = ", ".join(map(repr, [*row][:6])) or "none"
            wanted = '{"image": "a.png", "caption": "words"}'
            raise BadRow("the row names no image", where, f"its keys are {keys}; write {wanted}")
        image = image_path(self.path("folder"), row.pop(key), where)
        texts = {name: text for name, text in row.items() if isinstance(text, str)}
        caption = next((texts[name] for name in CAPTION if name in texts), None)
        return Example(texts | ({} if caption is None else {"caption": caption}) | {"image": image}, where)


def _table(path: epath.Path) -> CsvTable:
    """The table. Raises ValueError where no column names the images, and as `CsvTable`."""
    table = CsvTable(path, IMAGE)
    if not set(IMAGE) & set(table.columns):
        raise ValueError(
            f"{os.fspath(path)!r} has the columns {', '.join(filter(None, table.columns))} and none with the images:"
            f" its first line should name {IMAGE[1]} (or {', '.join(IMAGE)}) and {CAPTION[1]} (or {CAPTION[0]})"
        )
    return table
