"""ImageNet, or any folder of images by class: `<folder>/<wnid>/*.JPEG`, for tasks prompted by the class or its name.

Classes are numbered by their folders' names, sorted; with `names` by the ids in that file, so that a part of ImageNet
keeps its numbers. `names` is a JSON file {"n01440764": "tench", …} or {"n01440764": {"label": "tench", …}, …}. Two
names of ImageNet stand for two classes each; `CLEARER` has other words for those.
"""

from __future__ import annotations

import collections
import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from src.common.files.store import is_remote
from src.common.files.strict_json import read_json
from src.common.tree import listed
from src.data.class_prompts import ClassPrompts
from src.data.example import Example, label_of
from src.data.file_task import ExampleTask, given
from src.data.files.index_cache import cached_table
from src.data.pictures import blank_image, image_field, pixels_of
from src.data.rows import image_tokens
from src.interfaces import Field, LabelField
from src.sequence.layout import Segment

ENDINGS = (".jpeg", ".jpg", ".png")
WNID = re.compile(r"n\d{8}")
# What WordNet says of the classes whose published name is another one's, too.
CLEARER = {
    ("n02012849", "crane"): "crane bird",
    ("n03126707", "crane"): "construction crane",
    ("n03710637", "maillot"): "maillot tights",
    ("n03710721", "maillot"): "maillot tank suit",
}


class ImageFolders:
    """The images of a folder of classes by number, sorted by class and name; other files are left out.

    names       a file that names the classes; without it folders that are words ("red_fox") name themselves
    ambiguous   what happens to names of two classes: `words` takes those of `CLEARER` and refuses others, `keep` leaves
                them (as published)

    Raises FileNotFoundError for a missing folder, ValueError for one without classes or images, names that lack a
    folder's class or are given twice.
    """

    kind = "classes"

    def __init__(self, folder: epath.Path, names: str | os.PathLike[str] = "", ambiguous: str = "words"):
        self.folder = folder
        try:
            found = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.is_dir())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(f"{os.fspath(folder)!r} is no folder: give that of the classes' folders") from error
        if not found:
            raise ValueError(f"{os.fspath(folder)!r} should hold one folder for each class, and has none")
        self.classes = named_classes(found, names, ambiguous, whole=True)
        self._folders = found
        numbers = {c["id"]: number for number, c in enumerate(self.classes)}
        self._labels = np.array([numbers[name] for name in found])
        self._files = self._list()
        if not len(self._files):
            raise ValueError(f"{os.fspath(folder)!r} has folders of classes and no image in them ({' '.join(ENDINGS)})")
        filled = set((self._files[:, 0] + 256 * self._files[:, 1].astype(int)).tolist())
        if empty := [name for place, name in enumerate(found) if place not in filled]:
            logging.warning("%s: no image in the folders of %d classes: %s", folder, len(empty), listed(empty))

    def _list(self) -> np.ndarray:
        """Rows of bytes: number of the folder (2), name of the file, filled with zeros."""
        parts = [self.folder / name for name in self._folders]
        if is_remote(self.folder):
            return _listing(parts)
        key = [f"{os.path.abspath(part)}\0{os.stat(part).st_mtime_ns}" for part in parts]
        return cached_table("images", key, lambda: _listing(parts))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        row = self._files[index].tobytes()
        part = int.from_bytes(row[:2], "little")
        where = f"{self._folders[part]}/{os.fsdecode(row[2:].rstrip(bytes(1)))}"
        return Example(where, {"label": int(self._labels[part])}, (self.folder / where,))


def _listing(parts: list[epath.Path]) -> np.ndarray:
    rows: list[bytes] = []
    for number, part in enumerate(parts):
        names = [p.name for p in part.iterdir()] if is_remote(part) else os.listdir(part)
        kept = sorted(os.fsencode(name) for name in names if name.lower().endswith(ENDINGS) and name[0] != ".")
        rows += [number.to_bytes(2, "little") + name for name in kept]
    width = max(map(len, rows), default=2)
    return np.frombuffer(b"".join(row.ljust(width, bytes(1)) for row in rows), np.uint8).reshape(len(rows), width)


def named_classes(
    ids: Sequence[str], names: str | os.PathLike[str], ambiguous: str = "words", *, whole: bool = False
) -> list[dict[str, str]]:
    """Classes with id and name, numbered as `ids` are, or, if `whole`, as the ids in the file `names` are when sorted.

    An id that is a word names itself, a number of WordNet has no name. Raises FileNotFoundError and ValueError: see
    `ImageFolders`.
    """
    if ambiguous not in ("words", "keep"):
        raise ValueError(f"ambiguous={ambiguous!r} is unknown: use words or keep")
    told = read_names(names) if os.fspath(names) else {}
    missing = [i for i in ids if i not in told] if told else []
    if missing:
        raise ValueError(
            f"{os.fspath(names)!r} does not name {len(missing)} classes of the data: {listed(missing)}; add them to"
            " that file, or give the folder whose folders are the classes"
        )
    ids = sorted(told) if told and whole else ids
    words = {i: told.get(i, "" if WNID.fullmatch(i) else i.replace("_", " ")) for i in ids}
    words = words if ambiguous == "keep" else distinct(words)
    return [{"id": i, "name": words[i]} for i in ids]


def read_names(path: str | os.PathLike[str]) -> dict[str, str]:
    """Names of classes by id, from a file as the head of this module says.

    Raises FileNotFoundError, ValueError.
    """
    told = read_json(path, what="file of class names")
    if isinstance(told, dict):
        words = {i: value.get("label") if isinstance(value, dict) else value for i, value in told.items()}
        if words and all(isinstance(word, str) and word.strip() for word in words.values()):
            return {i: word.replace("_", " ").strip() for i, word in words.items()}
    raise ValueError(
        f"{os.fspath(path)!r} does not name classes: write a JSON object such as"
        ' {"n01440764": "tench"} or {"n01440764": {"label": "tench"}}'
    )


def distinct(names: Mapping[str, str]) -> dict[str, str]:
    """The names by id, with the words of `CLEARER` where one name stands for two classes.

    Raises ValueError if that does not help.
    """
    seen = collections.Counter(names.values())
    clear = {i: CLEARER.get((i, name), name) if seen[name] > 1 else name for i, name in names.items()}
    left = sorted(name for name, count in collections.Counter(clear.values()).items() if name and count > 1)
    if left:
        raise ValueError(f"classes have one name: {listed(left)}; give them others in names, or set ambiguous='keep'")
    return clear


class _Classes(ExampleTask):
    """Rows of a class and an image, by whatever `source` subclasses name."""

    kind = "classes"
    spread = True  # rows are sorted by class
    source: Any = ImageFolders

    def __init__(self, folder, size, *, names, ambiguous, channels, records, held_out):
        super().__init__(records=records, held_out=held_out)
        self.folder, self.names_file, self.ambiguous = folder, names, ambiguous
        self.image_shape = (size, size, channels)

    def open(self) -> Any:
        """The folder's images."""
        return self.source(given(self.folder, "folder", self.name), self.names_file, self.ambiguous)

    def read(self, split: str, index: int) -> dict[str, np.ndarray]:
        """The row's `image` uint8 [size, size, C] and its `label`. Raises BadRow."""
        example = self.example(split, index)
        label = label_of(example.told, example.where, len(self.examples.classes))
        return {"image": pixels_of(example, self.image_shape), "label": np.asarray(label)}

    def blank(self) -> dict[str, np.ndarray]:
        """Arrays of the same shapes for a row that was refused."""
        return {"image": blank_image(self.image_shape), "label": np.asarray(0)}


class ClassPromptToImage(_Classes, ClassPrompts):
    """Class name -> image in [-1, 1], its centre of `size` x `size` pixels, with `ClassPrompts` around it.

    names      file of the classes' names (prepared shards have names of their own)
    records    shards that `tools.prepare` made, read instead of `folder`; `held_out` rows are "test"
    phrases    fixed | official | released: see `PHRASES`
    """

    name = "imagenet_prompt_to_image"

    def __init__(
        self,
        codec: Any,
        size: int,
        prompt_length: int,
        *,
        folder: str | os.PathLike[str] = "",
        names: str | os.PathLike[str] = "",
        ambiguous: str = "words",
        records: str | os.PathLike[str] = "",
        held_out: int = 0,
        channels: int = 3,
        patch: int = 2,
        image_mode: str = "bidirectional",
        drop: float = 0.1,
        newline: bool = False,
        phrases: str = "fixed",
    ):
        options = {"names": names, "ambiguous": ambiguous, "channels": channels}
        super().__init__(folder, size, **options, records=records, held_out=held_out)
        image = Segment("image", "image", image_tokens(size, size, patch), image_mode)
        self.set_words(codec, prompt_length, image, drop=drop, newline=newline, phrases=phrases)

    @functools.cached_property
    def names(self) -> list[str]:
        """Names of the classes.

        Raises ValueError where a class has none.
        """
        told = self.examples.classes
        if self.records and os.fspath(self.names_file):
            words = read_names(self.names_file)
            words = words if self.ambiguous == "keep" else distinct(words)
            told = [{"id": c["id"], "name": words.get(c["id"], c["name"])} for c in told]
        missing = [c["id"] for c in told if not c["name"]]
        if missing:
            raise ValueError(
                f"task {self.name}: {len(missing)} of {len(told)} classes have an id and no name"
                f" ({listed(missing, 3)}):"
                ' give a JSON file {"n01440764": "tench", …} as tasks.<name>.data.names'
            )
        return [c["name"] for c in told]

    def rows(self, split: str) -> int:
        """Rows of the split; also refuses classes without names and prompts that do not fit, before the first row."""
        rows = super().rows(split)
        self.check_words()
        return rows

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]:
        """Fields of the rows: uniforms are phrase, drop."""
        words = self.words(extra["label"], uniforms)
        return {"prompt": words["prompt"], "image": image_field(extra["image"]), "tail": words["tail"]}


class ClassToImage(_Classes):
    """Class -> image: fields label [B] and image, one image segment (SiT, DiT).

    `classes` is the number of classes, which the folder (or `names`) must have. In training the label is replaced by
    `null` = `classes` with probability `drop`, so the model's label table needs classes + 1 rows.
    """

    name = "imagenet_class_to_image"
    draws = 1

    def __init__(
        self,
        size: int,
        classes: int,
        *,
        folder: str | os.PathLike[str] = "",
        names: str | os.PathLike[str] = "",
        records: str | os.PathLike[str] = "",
        held_out: int = 0,
        channels: int = 3,
        patch: int = 2,
        image_mode: str = "bidirectional",
        drop: float = 0.1,
    ):
        options = {"names": names, "ambiguous": "keep", "channels": channels}
        super().__init__(folder, size, **options, records=records, held_out=held_out)
        self.classes = self.null = classes
        self.drop = drop
        self.segments = (Segment("image", "image", image_tokens(size, size, patch), image_mode),)

    def rows(self, split: str) -> int:
        """Rows of the split; also refuses data of another number of classes, before the first row."""
        rows, found = super().rows(split), len(self.examples.classes)
        if found != self.classes:
            raise ValueError(
                f"task {self.name}: the data have {found} classes and tasks.<name>.data.classes={self.classes}: set it"
                " to theirs, or give names, a file that has them all"
            )
        return rows

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]:
        """Fields of the rows: the uniform number is drop."""
        labels = extra["label"]
        if uniforms is not None:
            labels = np.where(uniforms[:, 0] < self.drop, self.null, labels)
        return {"label": LabelField(labels.astype(np.int32)), "image": image_field(extra["image"])}
