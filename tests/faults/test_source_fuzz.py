"""Damaged and hostile files of the sources: what is wrong is one sentence or a bad row, and no other row changes."""

import json
import random

import pytest
from array_record.python import array_record_module

from src.codecs.pixels import Pixels
from src.data.example import BadRow
from src.data.files.array_record import write_shard
from src.data.sources.journeydb import JourneyDB
from src.data.sources.llava import Llava
from src.data.sources.tfds import Tfds
from src.data.sources.ultrachat import UltraChat
from src.data.sources.webdataset import WebDataset
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.chat import Chat
from src.data.templates.class_label import ClassLabel
from src.data.templates.picture_chat import PictureChat
from tests.helpers import formats
from tests.helpers.fields import field, patches, table

pytestmark = pytest.mark.faults
FIELDS = table(size=(8, 8, 3), classes=5, vision=field("vision", Pixels(8, 8, fit="letterbox"), patches(4)))


def made(folder):
    """(files that are damaged, how they are opened, rows that one byte may change) by format."""
    (anno, images), (talk, seen) = formats.make_journeydb(folder / "j"), formats.make_llava(folder / "l")
    archives, split, talks = (formats.make_tars(folder / "t"), formats.make_tfds(folder / "f"),
                              formats.make_ultrachat(folder / "u"))  # fmt: skip
    shards = sorted(split.glob("mini-*"))
    task = lambda source, template: SourceTask("t", source, template, FIELDS)
    labelled = lambda: task(Tfds(split, label="label"), ClassLabel())
    shown = lambda: task(Llava(talk, seen), PictureChat(24, 96))
    journey = lambda: task(JourneyDB(anno, images), CaptionToImage(64, caption="prompt"))
    return {
        "journey": ([anno, *sorted(images.rglob("*.jpg"))], journey, 2),
        "llava": ([talk, *sorted(seen.rglob("*.jpg"))], shown, 8),
        "chats": (sorted(talks.iterdir()), lambda: task(UltraChat(talks), Chat(64)), 2),
        "split": (sorted(talks.iterdir()), lambda: task(UltraChat(talks, split=120), Chat(40)), 8),
        "tars": (sorted(archives.iterdir()), lambda: task(WebDataset(archives), CaptionToImage(32)), 4),
        "tfds": (shards, labelled, 1),
        "tfds description": ([split / "dataset_info.json", split / "features.json"], labelled, 7),
    }


def contents(task):
    found = []
    for row in range(task.rows("train")):
        try:
            found.append(b"".join(leaf.tobytes() for leaf in task.read("train", row).values()))
        except BadRow:
            found.append(None)
    return found


@pytest.mark.parametrize("name", ["journey", "llava", "chats", "split", "tars", "tfds", "tfds description"])
def test_damaged_files_are_told_and_spoil_nothing_else(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths, opened, most = made(tmp_path)[name]
    sound, draw = contents(opened()), random.Random(0)
    counts = {"refused": 0, "changed": 0, "same": 0}
    for _ in range(400):
        path = draw.choice(paths)
        kept = path.read_bytes()
        data = bytearray(kept)
        places = [i for i, byte in enumerate(data) if byte] if name in ("tars", "tfds") else range(len(data))
        kind = draw.randrange(4)
        for _ in range(1 if kind < 2 else 8):
            data[draw.choice(places)] = draw.choice((0, 34, 44, 91, 92, 93, 123, 125, 255, draw.randrange(256)))
        path.write_bytes(data[: draw.randrange(len(data))] if kind == 3 else data)
        try:
            found = contents(opened())
            changed = sum(a != b for a, b in zip(sound, found, strict=False)) if len(found) == len(sound) else 0
            assert kind >= 2 or changed <= most, (path, changed)
            counts["changed" if found != sound else "same"] += 1
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)
            counts["refused"] += 1
        path.write_bytes(kept)
    print(name, counts)
    assert contents(opened()) == sound and counts["refused"] + counts["changed"] > 50


def test_records_of_strangers_are_bad_rows(tmp_path):
    """Any bytes in the place of a tf.train.Example."""
    folder, draw = formats.make_tfds(tmp_path / "f", rows=1, shards=1), random.Random(0)
    (shard,) = folder.glob("mini-*")
    whole, count = array_record_module.ArrayRecordReader(str(shard)).read([0])[0], 20_000
    records = []
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 5)):
            place = draw.choice((draw.randrange(len(data)), draw.randrange(60), len(data) - 1 - draw.randrange(60)))
            data[place] = draw.randrange(256)
        records.append(bytes(data))
    write_shard(shard, records)
    info = folder / "dataset_info.json"
    told = json.loads(info.read_text())
    told["splits"][0]["shardLengths"] = [str(count)]
    info.write_text(json.dumps(told))
    source, bad = Tfds(folder, label="label", caption="captions/text"), 0
    assert len(source) == count
    for number in range(count):
        try:
            assert set(source[number]) <= {"image", "label", "caption"}
        except BadRow as flaw:
            assert flaw.reason in ("the record has not these features", "the text is not UTF-8")
            bad += 1
    print("bad", bad)
    assert 1000 < bad < count
    for splits in (7, None, [{}], [{"name": "train", "shardLengths": ["-1"]}]):
        info.write_text(json.dumps(told | {"splits": splits}))
        with pytest.raises((ValueError, OSError)) as error:
            len(Tfds(folder, label="label"))
        assert "\n" not in str(error.value)
