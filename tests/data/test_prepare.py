"""Shards that are prepared from any source give the same rows, however often the work was stopped."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from src.codecs.pixels import Pixels
from src.codecs.text import Bytes
from src.data.example import BadRow
from src.data.files import json_lines
from src.data.pipeline.bad_rows import Ledger, TooManyBadRowsError
from src.data.prepare import ShardPlan, prepare
from src.data.sources.captions import Captions
from src.data.sources.digits import Digits
from src.data.sources.image_folders import ImageFolders
from src.data.sources.journeydb import JourneyDB
from src.data.sources.llava import Llava
from src.data.sources.records import Records
from src.data.sources.tfds import Tfds
from src.data.sources.ultrachat import UltraChat
from src.data.sources.webdataset import WebDataset
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.chat import Chat
from src.data.templates.class_label import ClassLabel
from src.data.templates.class_prompt import ClassPrompt
from src.data.templates.image_to_caption import ImageToCaption
from src.data.templates.picture_chat import PictureChat
from src.tools import prepare as tool
from tests.helpers import formats
from tests.helpers.fields import field, patches, table
from tests.helpers.rows import build

CODEC = Bytes()
SIZE = 8


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def task(source, template):
    vision = field("vision", Pixels(8, 8, fit="letterbox"), patches(4))
    return SourceTask("t", source, template, table(CODEC, (SIZE, SIZE, 3), classes=5, vision=vision))


def sources(folder):
    """(source, template, bad rows) for each format."""
    (classes, names), (anno, images) = formats.make_imagenet(folder / "i"), formats.make_journeydb(folder / "j")
    (talk, seen), split = formats.make_llava(folder / "l"), formats.make_tfds(folder / "f")
    talks, captions = formats.make_ultrachat(folder / "u"), formats.make_captions(folder / "c")
    archives = formats.make_tars(folder / "t")
    (classes / "n01440764" / "n01440764_1.JPEG").write_bytes(b"broken")
    for path in (images / "000" / "2.jpg", seen / "coco" / "5.jpg", captions / "3.png"):
        path.unlink()
    with open(talks / "train_1.jsonl", "a") as file:
        file.write("{\n")
    return {
        "prompts": (ImageFolders(classes, names=names), lambda: ClassPrompt(64), 1),
        "labels": (ImageFolders(classes), ClassLabel, 1),
        "journey": (JourneyDB(anno, images), lambda: CaptionToImage(64, caption="prompt"), 1),
        "chats": (UltraChat(talks), lambda: Chat(64), 1),
        "pieces": (UltraChat(talks, split=48), lambda: Chat(16), 1),
        "llava": (Llava(talk, seen), lambda: PictureChat(24, 96), 1),
        "captions": (Captions(captions), lambda: CaptionToImage(32), 1),
        "tars": (WebDataset(archives), lambda: ImageToCaption(32), 0),
        "tfds": (Tfds(split, label="label"), ClassLabel, 0),
    }


def contents(task):
    """Every sound row as bytes by name, and the places of the others."""
    rows, bad = [], []
    for row in range(task.rows("train")):
        try:
            rows.append({name: (leaf.dtype, leaf.tobytes()) for name, leaf in task.read("train", row).items()})
        except BadRow as flaw:
            bad.append(flaw.where)
    return rows, bad


@pytest.mark.parametrize("size", [0, SIZE])
def test_every_format_gives_the_same_rows_from_shards(tmp_path, size):
    for name, (source, template, flawed) in sources(tmp_path).items():
        if size and name in ("chats", "pieces", "llava"):
            continue  # the image of a chat is not cut
        files, out = task(source, template()), tmp_path / "o" / name
        rows, bad = contents(files)
        manifest = prepare(source, out, ShardPlan(rows=3, size=size), name=name, ledger=Ledger(out, share=1))
        copy = task(Records(out), template())
        assert contents(copy) == (rows, []) and len(bad) == flawed
        assert (manifest["rows"], manifest["bad_rows"]) == (len(rows), flawed)
        assert manifest["schema"]["kind"] == source.kind and len({s["sha256"] for s in manifest["shards"]}) > 1
        report = out / "skipped.jsonl"
        found = [json.loads(line)["where"] for line in report.read_text().splitlines()] if flawed else []
        assert found == bad and report.exists() == bool(flawed)
        names = {p.name for p in out.iterdir()} - {"skipped.jsonl", "manifest.json"}
        assert names == {shard["name"] for shard in manifest["shards"]}  # nothing else is left
        if not flawed:
            jax.tree.map(np.testing.assert_array_equal, build(files, "train", (0, 1)), build(copy, "train", (0, 1)))
        if name == "prompts":
            assert copy.template.names == files.template.names and copy.template.names[1] == "crane bird"


class Mine:
    """A data set of one's own, with arrays."""

    def __len__(self):
        return 3

    def __getitem__(self, number):
        return {"image": np.full((9, 12, 3), 60 * number, np.uint8), "label": np.int64(number), "weight": 0.5}


def test_a_data_set_of_ones_own_becomes_shards(tmp_path):
    assert prepare(Mine(), tmp_path / "o", ShardPlan())["schema"]["kind"] == "classes"
    mine, copy = (task(source, ClassLabel()) for source in (Mine(), Records(tmp_path / "o")))
    assert contents(copy) == contents(mine) and copy.source[1]["weight"] == 0.5
    with pytest.raises(ValueError, match="has no row that can be used"):  # floats are no image file
        prepare(Digits(), tmp_path / "d", ShardPlan(), ledger=Ledger(share=1))


class Stop(Exception):
    pass


def test_what_a_line_may_hold_a_record_holds_too(tmp_path):
    """However it is written there: every letter of three bytes takes six."""
    line = json.dumps({"data": ["é", "\u597d" * (json_lines.LINE_BYTES // 3 - 20)]}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(line, encoding="utf-8")
    source = UltraChat(tmp_path)
    assert len(line.encode()) <= json_lines.LINE_BYTES and prepare(source, tmp_path / "o", ShardPlan())["rows"] == 1
    assert Records(tmp_path / "o")[0] == source[0]


def test_stopped_work_goes_on_and_gives_the_same_bytes(tmp_path):
    folder = formats.make_captions(tmp_path / "c", rows=20)
    (folder / "7.png").write_bytes(b"broken")
    opened = Captions(folder)
    ledger = lambda name: Ledger(tmp_path / name, share=1)
    whole = prepare(opened, tmp_path / "whole", ShardPlan(rows=3), ledger=ledger("whole"))

    def stop_after(done, shards, rows):
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        prepare(opened, tmp_path / "o", ShardPlan(rows=3), ledger=ledger("o"), say=stop_after)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "o").glob("*.arrayrecord")}
    assert len(kept) == 4 and not (tmp_path / "o" / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match=r"manifest.json' does not exist"):
        task(Records(tmp_path / "o"), CaptionToImage(32)).rows("train")
    (tmp_path / "o" / ".00004.arrayrecord.x.tmp").write_bytes(b"half")  # as a kill leaves it
    (tmp_path / "o" / "00001.arrayrecord").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"was begun with another rows \(3, now 4\)"):
        prepare(opened, tmp_path / "o", ShardPlan(rows=4), ledger=ledger("o"))
    other = formats.make_captions(tmp_path / "other", rows=20)
    (other / "captions.jsonl").write_text((folder / "captions.jsonl").read_text().replace("fox", "cat"))
    with pytest.raises(ValueError, match="was begun with another probe"):
        prepare(Captions(other), tmp_path / "o", ShardPlan(rows=3), ledger=ledger("o"))
    said = []
    again = prepare(opened, tmp_path / "o", ShardPlan(rows=3), ledger=ledger("o"), say=lambda *told: said.append(told))
    assert not list((tmp_path / "o").glob(".*"))
    assert again == whole and said[0] == (3, 7, 9) and said[-1] == (7, 7, 20)
    now = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "o").glob("*.arrayrecord")}
    assert {name for name in kept if kept[name] != now[name]} == {"00001.arrayrecord"}
    assert len((tmp_path / "o" / "skipped.jsonl").read_text().splitlines()) == 1
    for name in now:
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(FileExistsError, match="has shards already"):
        prepare(opened, tmp_path / "o", ShardPlan(rows=3))


def test_too_many_bad_rows_stop_it_with_the_list(tmp_path):
    folder = formats.make_captions(tmp_path / "c", rows=20)
    for row in range(4, 12):
        (folder / f"{row}.png").unlink()
    opened = Captions(folder)
    with pytest.raises(TooManyBadRowsError, match=r"5 of the 9 rows .*captions.jsonl: the image is missing: line 5 \("):
        prepare(opened, tmp_path / "o", ShardPlan(rows=3), ledger=Ledger(tmp_path / "o", share=0.1, least=3))
    assert len((tmp_path / "o" / "skipped.jsonl").read_text().splitlines()) == 5
    parts = set((tmp_path / "o").glob("*.arrayrecord"))
    with pytest.raises(TooManyBadRowsError, match="5 of the 9 rows"):  # the same command, and nothing was read
        prepare(opened, tmp_path / "o", ShardPlan(rows=3), ledger=Ledger(tmp_path / "o", share=0.1, least=3))
    assert set((tmp_path / "o").glob("*.arrayrecord")) == parts
    manifest = prepare(opened, tmp_path / "o", ShardPlan(rows=3), ledger=Ledger(tmp_path / "o", share=1))  # goes on
    assert (manifest["rows"], manifest["bad_rows"], len(manifest["shards"])) == (12, 8, 5)  # two had none


def test_shards_of_something_else_are_not_overwritten(tmp_path):
    folder = formats.make_captions(tmp_path / "c")
    (folder / "00000.arrayrecord").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="holds shards that were not begun here"):
        prepare(Captions(folder), folder, ShardPlan(rows=3))
    assert (folder / "00000.arrayrecord").read_bytes() == b"mine" and not (folder / "plan.json").exists()


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    folder, names = formats.make_imagenet(tmp_path)
    command = ["prepare", "--source=image_folders", f"--set=folder={folder}", f"--set=names={names}"]
    command += [f"--out={tmp_path / 'o'}", "--processes=1", f"--size={SIZE}", "--rows=7"]
    assert tool.main(command) == 0
    assert "20 rows in 3 shards" in capsys.readouterr().out
    source = Records(tmp_path / "o")
    data = source[0]["image"]
    assert len(source) == 20 and Image.open(io.BytesIO(data)).size == (SIZE, SIZE)
    unset, config = "--task=None is none that can be prepared; this config has none", "--config=configs/digits.py"
    wrong = {
        "has shards already": command,
        "no argument 'x'": [*command, "--set=x=1"],
        "there is no src/data/sources/imagenet.py": ["", "--source=imagenet", "--out=o"],
        "either --config=<file> or --source": ["", "--out=o"],
        unset: ["", "--out=o", config],
    }
    for words, arguments in wrong.items():
        assert tool.main(arguments) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error


@pytest.mark.faults
def test_killed_work_of_several_processes_goes_on(tmp_path):
    """SIGKILL at random times, until it is done: the shards are those of one process that nobody disturbed."""
    folder = formats.make_captions(tmp_path / "c", rows=600)
    opened = Captions(folder)
    whole = prepare(opened, tmp_path / "whole", ShardPlan(rows=5))
    command = [sys.executable, "-m", "src.tools.prepare", "--source=captions", f"--set=folder={folder}"]
    command += [f"--out={tmp_path / 'o'}", "--rows=5", "--processes=2"]
    draw, kills = np.random.default_rng(0), 0
    while not (tmp_path / "o" / "manifest.json").exists():
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        enough = len(list((tmp_path / "o").glob("*.arrayrecord"))) + 20 + draw.integers(20)
        while process.poll() is None and len(list((tmp_path / "o").glob("*.arrayrecord"))) < enough:
            time.sleep(0.02)
        if process.poll() is None and kills < 3:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    print(f"{kills} kills")
    again = json.loads((tmp_path / "o" / "manifest.json").read_text())
    assert kills and again["shards"] == whole["shards"]


def test_data_of_a_bucket_become_shards_in_a_bucket(tmp_path, bucket):
    local = {"imagenet": formats.make_imagenet(tmp_path / "i", each=2)[0], "tars": formats.make_tars(tmp_path / "t")}
    for name, folder in local.items():
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            epath.Path(f"gs://b/{name}/{path.relative_to(folder)}").write_bytes(path.read_bytes())
    for name, make, template in (
        ("imagenet", ImageFolders, ClassLabel),
        ("tars", WebDataset, lambda: CaptionToImage(32)),
    ):
        here, there = (task(make(folder), template()) for folder in (local[name], f"gs://b/{name}"))
        assert contents(here) == contents(there)
        prepare(there.source, f"gs://b/{name}-shards", ShardPlan(rows=3), name=name)
        assert contents(task(Records(f"gs://b/{name}-shards"), template())) == contents(here)
        left = {p.name for p in epath.Path(f"gs://b/{name}-shards").iterdir()}
        assert all(n == "manifest.json" or n.endswith(".arrayrecord") for n in left)
