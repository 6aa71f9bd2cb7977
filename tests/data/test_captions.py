"""Folders and shards of images with captions: every kind of broken row is named by its line, the others are whole."""

import io
import json
import os
import pickle
import random
import time

import numpy as np
import pytest
from PIL import Image

from src.codecs.pixels import crop
from src.codecs.text import Bytes
from src.data import words as texts
from src.data.example import BadRow
from src.data.files import json_lines
from src.data.pipeline.stream import Mixture
from src.data.sources.captions import Captions
from src.data.sources.records import Records
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.image_to_caption import ImageToCaption
from tests.helpers.fields import table
from tests.helpers.rows import content, told, words
from tests.helpers.shards import write_shards

CODEC = Bytes()


def picture(seed, height=9, width=12):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def line(image, caption="red"):
    return json.dumps({"image": image, "caption": caption}).encode()


def broken(folder):
    """(line, reason or None) of every kind of row."""
    good = png(picture(0))
    files = {
        "a/good.png": good,
        "empty.png": b"",
        "cut.png": good[:-60],
        "text.png": b"not an image",
        "wide.png": png(picture(1, 4, 80)),
    }
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    header = bytearray(good)
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # 3.6e9 pixels declared
    files |= {"flip.png": bytes(flipped), "bomb.png": bytes(header), "grey.png": png(picture(0)[..., 0])}
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "pipe.png")
    (folder.parent / "outside.png").write_bytes(good)
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    image, name = "the image cannot be read", "the name of the image is not allowed"
    return [
        (line("a/good.png"), None),
        (line("grey.png", "ümlaut 水"), None),
        (line("a/good.png", "x" * 2**15), None),  # cut
        (line("none.png"), "the image is missing"),
        *((line(n), image) for n in ("empty.png", "cut.png", "text.png", "flip.png", "bomb.png", "pipe.png", "a")),
        (line("wide.png"), "the image is too narrow"),
        *((line(n), name) for n in ("../outside.png", "/etc/passwd", "link.png", "", "a\0b", 7, None, "C:\\x")),
        (b'{"image": "a/good.png"}', "there is no caption"),
        (b'{"image": "a/good.png", "caption": 7}', "there is no caption"),
        (line("a/good.png", ""), "the caption is empty"),
        (line("a/good.png", " \n\t"), "the caption is empty"),
        (b'{"image": "a/good.png", "caption": "\xff\xfe"}', "the text is not UTF-8"),
        (b'{"image": "a/good.png", "caption": "\\ud800"}', "the line is not JSON"),
        (b'{"image": "a/good.png", "capt', "the line is not JSON"),
        (b"[" * 100_000, "the line is not JSON"),
        (b'["a/good.png", "red"]', "the line is not a JSON object"),
        (b"null", "the line is not a JSON object"),
        (line("a/good.png", "x" * json_lines.LINE_BYTES), "the line is too long"),
        (line("a/good.png", "the last"), None),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    rows = broken(folder)
    mark = b"\xef\xbb\xbf"  # as programs of Windows begin a file; and there is no line break at the end
    (folder / "captions.jsonl").write_bytes(mark + b"\n".join(data for data, _ in rows))
    return folder, [reason for _, reason in rows]


def task(source, make=ImageToCaption, codec=CODEC, length=16, **options):
    source = source if isinstance(source, Captions | Records) else Captions(source)
    return SourceTask("p", source, make(length, **options), table(codec, (8, 8, 3)))


def test_every_broken_row_is_named_by_its_line_and_reason(folder):
    """Faults 23: undecodable images, empty and endless captions, broken lines and text."""
    where, reasons = folder
    data = task(where)
    assert data.rows("train") == len(reasons) == 32
    for row, reason in enumerate(reasons):
        began = time.thread_time()
        if reason is None:
            assert data.read("train", row)["image"].any()
        else:
            with pytest.raises(BadRow) as error:
                data.read("train", row)
            assert (error.value.reason, error.value.where) == (reason, f"captions.jsonl line {row + 1}")
        assert time.thread_time() - began < 1  # nothing endless is read
    copy = pickle.loads(pickle.dumps(data))  # what a worker process gets
    assert "files" not in vars(copy.source) and copy.read("train", 31)["text.caption/valid"].sum() == 10


def test_a_caption_without_end_is_a_bad_row_even_where_long_ones_are_cut(tmp_path):
    (tmp_path / "a.png").write_bytes(png(picture(0)))
    lines = [line("a.png", "x" * texts.ENDLESS), line("a.png", "x" * (texts.ENDLESS + 1))]
    (tmp_path / "captions.jsonl").write_bytes(b"\n".join(lines))
    data = task(tmp_path)
    assert data.read("train", 0)["text.caption/valid"].sum() == 15
    with pytest.raises(BadRow, match=r"line 2: .*65,536 characters \(65,537 characters\)"):
        data.read("train", 1)


def test_long_captions_are_cut_or_skipped_as_the_task_says(folder):
    where, _ = folder
    encoded = []

    class Counting(Bytes):
        def encode(self, text):
            encoded.append(len(text))
            return super().encode(text)

    cut = task(where, codec=Counting()).read("train", 2)
    assert encoded == [texts.CHARACTERS * 16]  # of 32,768
    ids = cut["text.caption/ids"].tolist()
    assert ids == [CODEC.image_end, *b"x" * 14, CODEC.pad] and cut["text.caption/valid"].sum() == 15  # it does not end
    with pytest.raises(BadRow, match=r"line 3: the text is too long \(32,768 characters"):
        task(where, too_long="skip").read("train", 2)
    prompt = task(where, CaptionToImage).read("train", 2)["text.prompt/ids"]
    assert prompt.tolist() == [CODEC.bos, *b"x" * 14, CODEC.image_start]
    whole = task(Captions(where, held_out=1), too_long="skip").read("test", 0)  # the last line
    assert whole["text.caption/ids"].tolist()[:10] == [CODEC.image_end, *b"the last", CODEC.eos]


@pytest.mark.parametrize("make", [CaptionToImage, ImageToCaption])
def test_rows_are_the_images_and_captions_and_fit_the_spec(folder, make):
    where, reasons = folder
    draws = make is CaptionToImage
    data = task(where, make, **({"drop": 0.5} if draws else {}))
    mixture = Mixture({"p": data}, {"p": 32}, 0)
    mixture.ledger.share = 1
    batch = next(mixture)["p"].tokens
    mixture.close()
    assert mixture.ledger.skipped["p"] == sum(r is not None for r in reasons) == 28
    image, text = batch["image"], batch["text.prompt" if draws else "text.caption"]
    sound = text.valid.any(axis=1)
    said = [CODEC.decode(ids[ok]) for ids, ok in zip(text.value[sound], text.valid[sound], strict=True)]
    expected = {"red", "ümlaut 水", "x" * 14, "the last"}
    assert set(said) - {""} <= expected and ("" not in said or draws)
    assert set(said) == expected or draws
    assert image.valid.all() and not image.value[~sound].any()
    assert (image.target == (sound & draws)[:, None]).all()
    assert told(batch) == told(data.element_spec(32).tokens) == told(data.fake(32, 0).tokens)
    first = data.read("train", 0)["image"]
    with Image.open(where / "a/good.png") as found:  # 12 x 9, scaled to 11 x 8 and cut
        whole = np.asarray(found.resize((round(12 * 8 / 9), 8), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(first, whole[:, 1:9])
    near = np.abs(image.value[sound] - (first / 127.5 - 1)).max(axis=(1, 2, 3))
    assert near.min() < 1e-6 and np.abs(image.value).max() <= 1


def test_phrases_are_put_around_captions(folder):
    where, _ = folder
    data = task(where, CaptionToImage, length=32, phrase="a photo of {}")
    row = data.build({name: leaf[None] for name, leaf in data.read("train", 0).items()})
    assert words(CODEC, row.tokens["text.prompt"]) == "<s>a photo of red<i>"
    newline = task(where, CaptionToImage, newline=True).read("train", 0)
    assert newline["text.tail/ids"].tolist() == [CODEC.image_end, 10, CODEC.eos, CODEC.pad]
    for phrase in ("a photo", "{} {}", "{x}"):
        with pytest.raises(ValueError, match="has not one place for the words"):
            CaptionToImage(8, phrase=phrase)


def test_large_images_are_halved_before_they_are_scaled():
    pixels = picture(3, 41, 70)
    image = Image.fromarray(pixels).resize((35, 20), Image.Resampling.BOX).resize((17, 10), Image.Resampling.BOX)
    wanted = np.asarray(image.resize((14, 8), Image.Resampling.BICUBIC))[:, 3:11]
    np.testing.assert_array_equal(crop(pixels, 8, 8), wanted)


ROWS = 40


@pytest.fixture
def shards(tmp_path):
    """40 rows in shards of 15; noise is not compressed, so that damage hits what it hits."""
    write_shards(tmp_path / "s", ((f"caption {i}", png(picture(i))) for i in range(ROWS)), rows=15)
    return tmp_path / "s"


def test_a_damaged_record_is_a_bad_row_and_no_other_is(shards):
    """Fault 21: any flipped bit makes one bad row or is found at the start; nothing wrong is ever read."""
    sound = content(task(Records(shards), CaptionToImage))
    assert len(set(sound)) == ROWS and all(len(row) == 9 for row in sound)
    draw, counts = random.Random(0), {"bad": 0, "refused": 0, "harmless": 0}
    for _ in range(60):
        path = shards / f"{draw.randrange(3):05d}.arrayrecord"
        kept = path.read_bytes()
        places = np.flatnonzero(np.frombuffer(kept, np.uint8))  # most of a small file is filling
        spoilt, place = bytearray(kept), draw.choice(places)
        spoilt[place] ^= 1 << draw.randrange(8)
        path.write_bytes(spoilt)
        try:
            found = content(task(Records(shards), CaptionToImage))
            changed = [i for i, (a, b) in enumerate(zip(sound, found, strict=True)) if a != b]
            assert len(changed) <= 1, (place, changed)
            counts["bad" if changed else "harmless"] += 1
            for row in changed:
                assert found[row] == (f"{path.name} record {row % 15}", "the record is damaged")
        except ValueError as error:
            assert "1 of the 3 shards" in str(error) and f"{path.name} has a damaged index" in str(error)
            counts["refused"] += 1
        path.write_bytes(kept)
    print(counts)
    assert counts["bad"] > 20


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: p.unlink(), "00001.arrayrecord is missing"),
        (lambda p: p.write_bytes(b""), r"00001.arrayrecord has 0 of [\d,]+ bytes"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), r"00001.arrayrecord has [\d,]+ of [\d,]+ bytes"),
        (lambda p: p.write_bytes(bytes(len(p.read_bytes()))), "00001.arrayrecord has a damaged index"),
        (lambda p: p.write_bytes((p.parent / "00002.arrayrecord").read_bytes()), r"00001.arrayrecord has"),
        (lambda p: (p.parent / "manifest.json").unlink(), "manifest.json' does not exist"),
        (lambda p: (p.parent / "manifest.json").write_text("{}"), "is no manifest of shards"),
        (lambda p: (p.parent / "manifest.json").write_text('{"format": 9}'), "its format is 9"),
        (lambda p: (p.parent / "manifest.json").write_text(
            '{"format": 1, "shards": [{"name": "../x", "rows": 1, "bytes": 1}]}'), "is no manifest"),
        (lambda p: (p.parent / "manifest.json").write_text(
            '{"format": 1, "shards": [{"name": "x", "rows": -1, "bytes": 1}]}'), "has no sizes"),
    ],
)  # fmt: skip
def test_shards_that_are_missing_or_damaged_are_refused_at_the_start(shards, spoil, words):
    """Fault 22."""
    spoil(shards / "00001.arrayrecord")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        Mixture({"r": task(Records(shards))}, {"r": 4}, 0)
    assert "\n" not in str(error.value)


def test_records_that_are_no_examples_are_bad_rows(tmp_path):
    good = png(picture(0))
    write_shards(tmp_path, [("fine", good), ("", good), ("cut", good[:-60]), ("none", b"")])
    found = content(task(Records(tmp_path)))
    reasons = [None, "the caption is empty", *["the image cannot be read"] * 2]
    assert [row[1] if len(row) == 2 else None for row in found] == reasons


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    data = task(tmp_path / "none")
    assert data.element_spec(2).tokens["image"].value.shape == (2, 8, 8, 3)
    with pytest.raises(FileNotFoundError, match=r"captions\.jsonl' does not exist"):
        data.rows("train")
    (tmp_path / "captions.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tasks\.p: .*is empty: the source has 0 rows"):
        task(tmp_path).rows("train")
    with pytest.raises(ValueError, match=r"tasks\.p: source\.folder is empty"):
        task(Captions("")).rows("train")
    with pytest.raises(ValueError, match="cut or skip"):
        task(tmp_path, too_long="x")
    with pytest.raises(ValueError, match=r"tasks\.p\.template: length=2"):
        task(tmp_path, length=2)
