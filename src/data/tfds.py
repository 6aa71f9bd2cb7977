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
from src.data import imagenet, pictures
from src.data.example import Example
from src.data.file_task import given
from src.data.files.array_record import ShardFiles
from src.data.imagenet import named_classes
from src.data.pipeline.bad_rows import BadRow

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
LABELS = 1 << 24  # bytes of a file of class names


class Tfds:
    """The examples of one split by number.

    image          name of the feature with the encoded image
    label, texts   name of the class, or of texts; parts of nested features are joined by "/", of several texts in one
                   feature ("captions/text" of COCO) the first counts
    names          a file of the classes' names, as `imagenet` has it; without it those of the data set

    Raises FileNotFoundError, and ValueError for a data set in another format, without these features, or with shards
    that are missing or damaged.
    """

    def __init__(
        self,
        folder: epath.Path,
        split: str = "train",
        *,
        image: str = "image",
        label: str = "",
        texts: tuple[str, ...] = (),
        names: str | os.PathLike[str] = "",
        ambiguous: str = "words",
    ):
        self.folder, self.kind = folder, "classes" if label else "captions"
        self._image, self._label, self._texts = image, label, texts
        shards = _shards(folder, split)
        features = _features(read_json(folder / "features.json", what="file of features"))
        missing = [name for name in (image, label, *texts) if name and name not in features]
        if missing:
            raise ValueError(f"the data set {os.fspath(folder)!r} has no {listed(missing)}: it has {listed(features)}")
        self.classes = named_classes(self._ids(), names, ambiguous) if label else []
        self._files = ShardFiles(folder, shards)
        wrong = [name for name, _ in shards if not (folder / name).exists()] or self._files.damaged()
        if wrong:
            raise ValueError(
                f"{len(wrong)} of the {len(shards)} shards of {os.fspath(folder)!r} are missing or damaged:"
                f" {listed(wrong)}; prepare the data set again"
            )

    def _ids(self) -> list[str]:
        path = self.folder / f"{self._label.replace('/', '-')}.labels.txt"
        return read_bounded(path, LABELS, "file of class names").decode().split("\n")[:-1]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        data, where = self._files[index]
        values = parse_record(data, where)
        told: dict[str, Any] = {}
        if self._label:
            label = values.get(self._label)
            told["label"] = label[0] if isinstance(label, list) and len(label) == 1 else None
        for name in self._texts:
            text = values.get(name)
            if isinstance(text, list) and text and isinstance(text[0], bytes):
                told["caption" if len(self._texts) == 1 else name] = text[0].decode(errors="replace")
        image = values.get(self._image)
        found = isinstance(image, list) and len(image) == 1 and isinstance(image[0], bytes)
        return Example(where, told, (image[0],) if found else ())


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


class _Labelled:
    """Opens the split; the options of the task itself are those of `imagenet`."""

    def __init__(
        self, *arguments: Any, split: str = "train", image: str = "image", label: str = "label", **options: Any
    ):
        super().__init__(*arguments, **options)
        self._split, self._features = split, {"image": image, "label": label}

    def open(self) -> Tfds:
        """The data set."""
        folder = given(self.folder, "folder", self.name)
        return Tfds(folder, self._split, **self._features, names=self.names_file, ambiguous=self.ambiguous)


class ClassPromptToImage(_Labelled, imagenet.ClassPromptToImage):
    """`imagenet.ClassPromptToImage` from a TFDS split."""

    name = "tfds_prompt_to_image"


class ClassToImage(_Labelled, imagenet.ClassToImage):
    """`imagenet.ClassToImage` from a TFDS split."""

    name = "tfds_class_to_image"


class _Captioned:
    """Opens the split; the options of the task itself are those of `pictures`, and `caption` names the feature."""

    def __init__(
        self,
        *arguments: Any,
        split: str = "train",
        image: str = "image",
        caption: str = "captions/text",
        **options: Any,
    ):
        super().__init__(*arguments, **options)
        self._split, self._features = split, {"image": image, "texts": (caption,)}

    def open(self) -> Tfds:
        """The data set."""
        return Tfds(given(self.folder, "folder", self.name), self._split, **self._features)


class CaptionToImage(_Captioned, pictures.CaptionToImage):
    """`pictures.CaptionToImage` from a TFDS split."""

    name = "tfds_caption_to_image"


class ImageToCaption(_Captioned, pictures.ImageToCaption):
    """`pictures.ImageToCaption` from a TFDS split."""

    name = "tfds_image_to_caption"
