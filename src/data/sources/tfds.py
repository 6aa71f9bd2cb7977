"""Data sets that TFDS prepared as ArrayRecord (`file_format="array_record"`), read by TFDS, which does without
TensorFlow for this.

`folder` is that of one version, `…/imagenet2012/5.1.0`, with dataset_info.json, features.json and the shards. Nothing
is downloaded or prepared here. Images are not decoded by TFDS but as those of all sources are.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from src.common.files.paths import shown
from src.common.files.store import is_remote
from src.common.tree import listed
from src.data.example import BadRow, Example
from src.data.files.array_record import ShardFiles
from src.data.sources._classes import named_classes
from src.data.sources._files import NamedFeatures

FORMAT = "array_record"
SPARE_FILES = 512  # open files that a run needs beside the shards


class Tfds(NamedFeatures):
    """`image`, and `label` or `caption` of the examples of one split.

    split     a split as TFDS writes it, such as "train", "train[:10%]" or "train+validation"
    image     name of the feature with the image
    label     name of the class, or "": then there are captions
    caption   name of the text, or "": then there are classes. Parts of nested features are joined by "/"; of several
              texts in one feature ("captions/text" of COCO) the first counts
    names, ambiguous   of classes, as `image_folders` has them; without a file the names of the data set
    held_out  how many rows are "test": the last ones, of classes some all over the split
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: str = "train",
        image: str = "image",
        label: str = "",
        caption: str = "",
        names: str | os.PathLike[str] = "",
        ambiguous: str = "words",
        held_out: int = 0,
    ):
        super().__init__(held_out)
        if not (label or caption):
            raise ValueError("source.label and source.caption are empty: name the feature that goes with the image")
        self.folder, self.split, self.image, self.label, self.caption = folder, split, image, label, caption
        self.names, self.ambiguous = names, ambiguous

    @functools.cached_property
    def classes(self) -> list[dict[str, str]]:
        """Id and name of each class; none of labels that are plain numbers. Raises ValueError for other labels."""
        if not self.label:
            return []
        feature = self.files.leaves[self.label]
        ids = getattr(feature, "names", None)
        if ids is None and not np.issubdtype(feature.np_dtype, np.integer):
            raise ValueError(f"source.label={self.label!r} is no ClassLabel and no whole number: name such a feature")
        return [] if ids is None else named_classes(ids, self.names, self.ambiguous)

    def open(self) -> _Records:
        """The records of the split.

        Raises FileNotFoundError, and ValueError for a data set in another format, without these features or this split,
        or with shards that are missing or damaged.
        """
        wanted = [name for name in (self.image, self.label, self.caption) if name]
        return _Records(self.path("folder"), self.split, wanted)

    def __len__(self) -> int:
        _ = self.classes  # refused here, not at the first row
        return len(self.files)

    def __getitem__(self, number: int) -> Example:
        values, where = self.files[number]
        example = Example({}, where)
        if self.label:
            label = _first(values[self.label], single=True)
            example["label"] = int(label) if isinstance(label, int | np.integer) else None
        if self.caption:
            example["caption"] = _text(_first(values[self.caption]), where)
        image = _first(values[self.image], single=True)
        if isinstance(image, bytes | np.ndarray):
            example["image"] = image
        return example


class _Records:
    """The features that are wanted of each record of a split, by name."""

    def __init__(self, folder: epath.Path, split: str, wanted: list[str]):
        if not (folder / "dataset_info.json").exists():
            raise FileNotFoundError(
                f"{os.fspath(folder / 'dataset_info.json')!r} does not exist: give the folder of one version, such as"
                " …/imagenet2012/5.1.0"
            )
        tfds, where = _library(), f"the data set {os.fspath(folder)!r}"
        try:
            builder = tfds.builder_from_directory(folder)
            formats = sorted(f.value for f in builder.info.available_file_formats())
            self.leaves = _leaves(builder.info.features)
        except Exception as error:  # of hostile files: those of protocol buffers, JSON, paths and more
            raise ValueError(f"{where} cannot be read ({type(error).__name__}: {shown(error)})") from error
        if FORMAT not in formats:
            raise ValueError(f"{where} is in the format {listed(formats)}: prepare it with file_format={FORMAT}")
        if missing := [name for name in wanted if name not in self.leaves]:
            raise ValueError(f"{where} has no {listed(missing)}: it has {listed(sorted(self.leaves))}")
        self._wanted = wanted
        tops = {name.partition("/")[0] for name in wanted}
        images = [n for n, leaf in self.leaves.items() if n.partition("/")[0] in tops and _is_image(leaf)]
        self._decoders = _nested(dict.fromkeys(images, _skip_decoding(tfds)))
        raw = tfds.decode.DeserializeMethod.RAW_BYTES  # of which the wanted features alone are decoded
        try:
            self._features = tfds.features.FeaturesDict({name: builder.info.features[name] for name in tops})
            self._parts = [*builder.info.splits[split].file_instructions]
            self._files = _shards(folder, self._parts)
            self._data = builder.as_data_source(split, deserialize_method=raw, file_format=FORMAT)
        except Exception as error:
            raise ValueError(f"{where}: {' '.join(str(error).split())[:300]} (source.split={split!r})") from error
        self._starts = np.cumsum([0, *(part.take for part in self._parts)])
        self._remote = is_remote(folder)
        _allow_open_files(len(self._parts))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[dict[str, Any], str]:
        """The values of a record, and its name in reports. Raises BadRow."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        name, place = _name(self._parts[number]), self._parts[number].skip + index - int(self._starts[number])
        where = f"{name} record {place}"
        try:
            # TFDS reads no store; the files are copied one by one.
            record = self._files.record(name, place) if self._remote else self._data[index]
        except RuntimeError as error:
            raise BadRow("the record is damaged", where, error) from error
        try:
            values = self._features.deserialize_example_np(record, decoders=self._decoders)
            return {name: _at(values, name) for name in self._wanted}, where
        except Exception as error:  # any bytes may be there
            raise BadRow("the record has not these features", where, error) from error


def _library() -> Any:
    """TFDS, which takes half a second to import."""
    import tensorflow_datasets as tfds

    return tfds


def _skip_decoding(tfds: Any) -> Any:
    """TFDS' decoder that leaves images as they are; that of 4.9.10 lacks a method for those of a sequence."""

    class Encoded(tfds.decode.SkipDecoding):
        def decode_batch_example_np(self, values: Any) -> Any:
            return values

    return Encoded()


def _name(part: Any) -> str:
    return pathlib.PurePath(part.filename).name


def _shards(folder: epath.Path, parts: list[Any]) -> ShardFiles:
    """The shards of the parts of a split. Raises ValueError naming those that are missing or damaged."""
    rows = {_name(part): part.examples_in_shard for part in parts}
    files = ShardFiles(folder, [*rows.items()])
    if wrong := [name for name in rows if not (folder / name).exists()] or files.damaged():
        raise ValueError(
            f"{len(wrong)} of the {len(rows)} shards are missing or damaged: {listed(wrong)}; prepare it again"
        )
    return files


def _is_image(feature: Any) -> bool:
    return isinstance(getattr(feature, "feature", feature), _library().features.Image)


def _leaves(features: Any, name: str = "") -> dict[str, Any]:
    """The features that hold values, by their names joined with "/"."""
    inner = getattr(features, "feature", features)  # of a sequence
    if not hasattr(inner, "items"):
        return {name: features}
    prefix = f"{name}/" if name else ""
    return {leaf: part for key, value in inner.items() for leaf, part in _leaves(value, prefix + key).items()}


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """Values by path as nested dicts."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parts, last = path.split("/")
        functools.reduce(lambda inner, part: inner.setdefault(part, {}), parts, tree)[last] = value
    return tree


def _at(values: Any, name: str) -> Any:
    """What stands at a path; of several examples inside one, the first."""
    for part in name.split("/"):
        values = values[part] if isinstance(values, dict) else _first(values)[part]
    return values


def _first(value: Any, *, single: bool = False) -> Any:
    """The first of several values; with `single` None where there are more. A value of its own is itself."""
    if isinstance(value, np.ndarray) and value.ndim != 1:
        return value.item() if value.ndim == 0 else value
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        return value
    return value[0] if len(value) and (len(value) == 1 or not single) else None


def _text(value: Any, where: str) -> str | None:
    try:
        return value.decode() if isinstance(value, bytes) else value if isinstance(value, str) else None
    except UnicodeDecodeError as error:
        raise BadRow("the text is not UTF-8", where, error) from error


def _allow_open_files(count: int) -> None:
    """Lets this process keep as many shards open as TFDS does, where the system allows it."""
    import resource  # not on every system

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
        )
