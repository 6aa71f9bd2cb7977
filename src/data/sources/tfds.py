"""Data sets that TFDS prepared as ArrayRecord (`file_format="array_record"`), read without TensorFlow or TFDS.

`folder` is that of one version, `…/imagenet2012/5.1.0`, with dataset_info.json, features.json and the shards; a record
is a tf.train.Example. Classes have the names of `<label>.labels.txt`.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from etils import epath

from src.common.files.paths import inside, read_bounded
from src.common.files.strict_json import read_json
from src.common.tree import listed
from src.data.example import BadRow, Example
from src.data.files.array_record import ShardFiles
from src.data.sources._classes import named_classes
from src.data.sources._files import FileSource

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
LABELS = 1 << 24  # bytes of a file of class names


class Tfds(FileSource):
    """`image`, and `label` or `caption` of the examples of one split.

    image     name of the feature with the encoded image
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

    @property
    def kind(self) -> str:
        """What the examples are."""
        return "classes" if self.label else "captions"

    @property
    def spread(self) -> bool:
        """Rows of classes are sorted."""
        return bool(self.label)

    @functools.cached_property
    def classes(self) -> list[dict[str, str]]:
        """Id and name of each class."""
        if not self.label:
            return []
        path = self.path("folder") / f"{self.label.replace('/', '-')}.labels.txt"
        ids = read_bounded(path, LABELS, "file of class names").decode().split("\n")[:-1]
        return named_classes(ids, self.names, self.ambiguous)

    def open(self) -> ShardFiles:
        """The shards.

        Raises FileNotFoundError, and ValueError for a data set in another format, without these features, or with
        shards that are missing or damaged.
        """
        folder = self.path("folder")
        shards = _shards(folder, self.split)
        features = _features(read_json(folder / "features.json", what="file of features"))
        wanted = [name for name in (self.image, self.label, self.caption) if name]
        if missing := [name for name in wanted if name not in features]:
            raise ValueError(f"the data set {os.fspath(folder)!r} has no {listed(missing)}: it has {listed(features)}")
        _ = self.classes  # refused here, not at the first row
        files = ShardFiles(folder, shards)
        wrong = [name for name, _ in shards if not (folder / name).exists()] or files.damaged()
        if wrong:
            raise ValueError(
                f"{len(wrong)} of the {len(shards)} shards of {os.fspath(folder)!r} are missing or damaged:"
                f" {listed(wrong)}; prepare the data set again"
            )
        return files

    def __getitem__(self, number: int) -> Example:
        data, where = self.files[number]
        values = parse_record(data, where)
        example = Example({}, where)
        if self.label:
            label = values.get(self.label)
            example["label"] = label[0] if isinstance(label, list) and len(label) == 1 else None
        if self.caption:
            text = values.get(self.caption)
            if isinstance(text, list) and text and isinstance(text[0], bytes):
                example["caption"] = text[0].decode(errors="replace")
        image = values.get(self.image)
        if isinstance(image, list) and len(image) == 1 and isinstance(image[0], bytes):
            example["image"] = image[0]
        return example


def _shards(folder: epath.Path, split: str) -> list[tuple[str, int]]:
    """Names and rows of a split's shards."""
    path = folder / "dataset_info.json"
    try:
        told = read_json(path, what="description of the data set")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{os.fspath(path)!r} does not exist: give the folder of one version, such as …/imagenet2012/5.1.0"
        ) from error
    try:
        if told.get("fileFormat") != "array_record":
            raise ValueError(
                f"it is in the format {told.get('fileFormat')!r}: prepare it with file_format=array_record"
            )
        splits = {s["name"]: s for s in told["splits"]}
        if split not in splits:
            raise ValueError(f"it has no split {split!r}, it has {listed([*splits])}")
        rows = [int(n) for n in splits[split]["shardLengths"]]
        template = splits[split].get("filepathTemplate") or TEMPLATE
        words = {
            "DATASET": told["name"],
            "SPLIT": split,
            "FILEFORMAT": "array_record",
            "NUM_SHARDS": f"{len(rows):05d}",
        }
        found = []
        for number, count in enumerate(rows):
            place = {"SHARD_INDEX": f"{number:05d}", "SHARD_X_OF_Y": f"{number:05d}-of-{len(rows):05d}"}
            name = functools.reduce(lambda n, w: n.replace(f"{{{w[0]}}}", w[1]), (words | place).items(), template)
            inside(folder, name)
            found.append((name, count))
        if any(count < 0 for _, count in found):
            raise ValueError("a shard has a negative length")
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the data set {os.fspath(folder)!r} cannot be read: {error}") from error


def _features(told: Any, name: str = "") -> list[str]:
    """Names of the leaves, joined by "/"; nothing for what is no description."""
    if not isinstance(told, dict):
        return []
    inner = told.get("featuresDict", {}).get("features") if isinstance(told.get("featuresDict"), dict) else None
    if isinstance(inner, dict):
        return [leaf for key, part in inner.items() for leaf in _features(part, f"{name}/{key}" if name else key)]
    sequence = told.get("sequence")
    if isinstance(sequence, dict) and "feature" in sequence:
        return _features(sequence["feature"], name)
    return [name]


def parse_record(data: bytes, where: str) -> dict[str, list[Any]]:
    """The features of a serialized tf.train.Example by name: lists of bytes, float or int. Raises BadRow."""
    from google.protobuf.message import DecodeError

    try:
        features = _example_class().FromString(data).features.feature
        kinds = {name: feature.WhichOneof("kind") for name, feature in features.items()}
        return {name: list(getattr(features[name], kind).value) for name, kind in kinds.items() if kind}
    except DecodeError as error:
        raise BadRow("the record is no tf.train.Example", where, error) from error


@functools.cache
def _example_class() -> Any:
    """tf.train.Example (tensorflow/core/example/example.proto, feature.proto), in a pool of its own."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="plain", syntax="proto3")

    def add(message: Any, name: str, number: int, what: int | str, repeated: bool = False, **more: Any) -> None:
        label = kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL
        of = {"type": kind.TYPE_MESSAGE, "type_name": f".plain.{what}"} if isinstance(what, str) else {"type": what}
        message.field.add(name=name, number=number, label=label, **of, **more)

    lists = (("BytesList", kind.TYPE_BYTES), ("FloatList", kind.TYPE_FLOAT), ("Int64List", kind.TYPE_INT64))
    for name, what in lists:
        add(file.message_type.add(name=name), "value", 1, what, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, _) in enumerate(lists, start=1):
        add(feature, name.removesuffix("List").lower() + "_list", number, name, oneof_index=0)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, kind.TYPE_STRING)
    add(entry, "value", 2, "Feature")
    add(features, "feature", 1, "Features.FeatureEntry", repeated=True)
    add(file.message_type.add(name="Example"), "features", 1, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("plain.Example"))
