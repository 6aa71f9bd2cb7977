"""Documents in packed rows: each once, whole where it has room, refused by name where it cannot be used."""

import io
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from src.codecs.pixels import Pixels
from src.codecs.text import Bytes
from src.data.example import BadRow
from src.data.files import json_lines
from src.data.files.array_record import write_shard
from src.data.files.shards import images_of, pack
from src.data.pipeline.stream import Mixture
from src.data.prepare import ShardPlan as prepare_plan
from src.data.prepare import prepare
from src.data.sources.documents import Documents
from src.data.sources.records import Records
from src.data.sources.ultrachat import UltraChat
from src.data.task import SourceTask
from src.data.templates.packed import Packed
from tests.helpers.fields import field, patches, table
from tests.helpers.rows import told, words

CODEC, LENGTH, PATCHES = Bytes(), 48, 4
START, END, BOS, EOS = CODEC.image_start, CODEC.image_end, CODEC.bos, CODEC.eos
COUNT = 24


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def png(seed):
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, "PNG")
    return file.getvalue()


def corpus(folder, count=COUNT):
    """A folder of documents: two images with words between them, an image that is understood and its caption, words."""
    (folder / "a").mkdir(parents=True)
    lines = []
    for i in range(count):
        for k, name in enumerate("xy"):
            (folder / f"a/{i}{name}.png").write_bytes(png(2 * i + k))
        kinds = [
            [{"text": f"draw {i}"}, {"image": f"a/{i}x.png"}, {"text": "and"}, {"image": f"a/{i}y.png", "loss": False}],
            [{"image": f"a/{i}x.png", "role": "understand"}, {"text": "?", "loss": False}, {"text": f"it is {i}"}],
            [{"text": f"only words {i}"}],
        ]
        lines.append(json.dumps({"parts": kinds[i % 3]}))
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return folder


def expected(i):
    """Ids, which are valid, which are targets (by hand), and the images of document i."""
    o, x, y = CODEC.image, 2 * i, 2 * i + 1
    if i % 3 == 0:
        first = [BOS, *f"draw {i}".encode(), START]
        ids = [*first, o, *[o] * PATCHES, END, *b"and", START, o, *[o] * PATCHES, END, EOS]
        loss = [0] + [1] * (len(first) - 1) + [0] * (PATCHES + 2) + [1] * 3 + [0] * (PATCHES + 4)
        second = len(first) + PATCHES + 6
        return ids, loss, [("image", len(first) + 1, x), ("image", second + 1, y)]
    if i % 3 == 1:
        said = f"it is {i}".encode()
        loss = [0] * (PATCHES + 5) + [1] * (len(said) + 1)
        return [BOS, START, o, *[o] * PATCHES, END, *b"?", *said, EOS], loss, [("vision", 3, x)]
    said = f"only words {i}".encode()
    return [BOS, *said, EOS], [0] + [1] * (len(said) + 1), []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("data") / "documents")


def task(source, codec=CODEC, length=LENGTH, size=8, **options):
    source = source if isinstance(source, Documents | Records | UltraChat) else Documents(source)
    vision = field("vision", Pixels(8, 8, fit="letterbox"), patches(4))
    fields = table(codec, (size, size, 3), 4, vision=vision)
    return SourceTask("t", source, Packed(length, **{"images": 2, "visions": 2} | options), fields)


def chats(source, length=32):
    return task(source, length=length, images=0, visions=0)


def plan(data):
    return data.template._plans["train"]


def batch_of(data, row, uniforms=None):
    return data.build({name: a[None] for name, a in data.read("train", row, uniforms).items()})


def examples(batch, r=0):
    """The packed examples of a row: ids, flags, and (name, first slot, first pixel) of its images."""
    segment, text, begins = batch.packing.segment[r], batch.tokens["text"], batch.packing.begins
    for s in range(1, segment.max() + 1):
        here = np.flatnonzero(segment == s)
        assert (np.diff(here) == 1).all()
        images = [
            (name, int(begin) - int(here[0]), batch.tokens[name].value[r, i])
            for name in begins
            for i, begin in enumerate(begins[name][r])
            if here[0] <= begin <= here[-1] and batch.tokens[name].valid[r, i].all()
        ]
        yield *(a[r, here].tolist() for a in (text.value, text.valid, text.target)), images


def test_every_document_lies_in_one_row_with_its_images_and_flags(folder):
    data = task(folder)
    rows = data.rows("train")
    found = {tuple(e[0]): e[1:] for r in range(rows) for e in examples(batch_of(data, r))}
    assert len(found) == sum(len(list(examples(batch_of(data, r)))) for r in range(rows)) == COUNT
    for i in range(COUNT):
        ids, targets, images = expected(i)
        valid, loss, shown = found[tuple(ids)]
        assert valid == [c != CODEC.image for c in ids] and loss == [bool(t) for t in targets]
        assert [e[:2] for e in shown] == [e[:2] for e in images]
        for (*_, values), (*_, seed) in zip(shown, images, strict=True):
            np.testing.assert_allclose(values, pixels(seed) / 127.5 - 1, atol=1e-6)
    assert rows < COUNT and sum(len(e[0]) for e in map(expected, range(COUNT))) / (rows * LENGTH) == pytest.approx(
        1 - plan(data).packs.padding
    )
    copy = pickle.loads(pickle.dumps(data))  # what a worker process gets
    assert "files" not in vars(copy.source) and plan(copy) and copy.read("train", 0)["text/ids"].any()
    assert told(data.fake(3, 0)) == told(data.element_spec(3)) and len(list(examples(data.fake(1, 0)))) > 1
    assert told(batch_of(data, 0)) == told(data.element_spec(1)) and told(data.blank()) == told(data.read("train", 0))
    layout, batch = data.layout, batch_of(data, 0)
    assert (layout.slots, layout.parts_of("image"), layout.segment("vision").length) == (LENGTH, 2, PATCHES)
    there = (batch.tokens["image"].valid.any(-1), batch.packing.begins["image"] >= 0)
    assert (there[0] == there[1]).all() and (batch.tokens["image"].target == batch.tokens["image"].valid).all()
    spec = layout.spec(batch)  # a slot holds a token of the text or of an image, or the place of a lead
    covered = batch.tokens["text"].valid[0].sum() + PATCHES * sum((b >= 0).sum() for b in batch.packing.begins.values())
    assert (np.asarray(spec.segment) > 0).sum() == covered


def test_words_are_dropped_where_something_is_drawn_and_nowhere_else(folder):
    data = task(folder, length=96, images=5, drop=0.5)
    uniforms = np.asarray([0.4, 0.6, 0.6, 0.6, 0.6])  # what is drawn first in a row loses its words
    assert data.draws == 5 and task(folder).draws == 0
    for row in range(data.rows("train")):
        first, (whole, some) = True, (list(examples(batch_of(data, row, u))) for u in (None, uniforms))
        for (ids, valid, loss, images), (_, fewer, less, _) in zip(whole, some, strict=True):
            drawn = first and any(name == "image" for name, *_ in images)
            first = first and not drawn
            words = [v and c < 256 for c, v in zip(ids, valid, strict=True)]
            assert fewer == ([v and not w for v, w in zip(valid, words, strict=True)] if drawn else valid)
            after = [w or b for w, b in zip(words, [False, *words], strict=False)]
            assert less == ([v and not w for v, w in zip(loss, after, strict=True)] if drawn else loss)


def test_what_took_long_to_learn_is_remembered_until_the_files_change(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    where, asked = corpus(tmp_path / "documents", 6), []

    class Counting(Bytes):
        def encode(self, text):
            asked.append(text)
            return super().encode(text)

    def rows():
        asked.clear()
        data = task(where, Counting())
        return [plan(data)[row].tolist() for row in range(data.rows("train"))]

    first = rows()
    assert asked and rows() == first and not asked
    (kept,) = (tmp_path / "cache/monoformer-jax/tables").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])  # damaged
    assert rows() == first and asked
    with open(where / "documents.jsonl", "a") as file:
        file.write("\n" + json.dumps({"parts": [{"text": "one more"}]}))
    assert sum(map(len, rows())) == 7 and asked


def line(*parts):
    return json.dumps({"parts": parts}).encode()


BROKEN = [
    (b'{"parts": [', "the line is not JSON"),
    (b"[]", "the line is not a JSON object"),
    (b"{}", "there are no parts"),
    (line(), "there are no parts"),
    (line("text"), "a part is neither a text nor an image"),
    (line({"text": "a", "image": "a/0x.png"}), "a part is neither a text nor an image"),
    (line({"text": "a", "los": True}), "a part has an unknown key"),
    (line({"text": "a", "loss": 1}), "loss is neither true nor false"),
    (line({"text": ""}), "a text is empty or no text"),
    (line({"image": "a/0x.png", "role": "draw"}), "the role of an image is neither generate nor understand"),
    (line({"image": "a/0x.png", "role": ["generate"]}), "the role of an image is neither generate nor understand"),
]
SPOILT = [  # known only when the images are read
    (line({"text": "1"}, {"image": "a/none.png"}), "the image is missing"),
    (line({"text": "2"}, {"image": "a/text.png"}), "the image cannot be read"),
    (line({"text": "3"}, {"image": "../outside.png"}), "the name of the image is not allowed"),
    (line({"text": "4"}, {"image": 7}), "the name of the image is not allowed"),
]


def test_bad_documents_are_refused_by_name_and_spoil_no_other(folder, tmp_path):
    where = corpus(tmp_path / "documents", 3)
    (where / "a/text.png").write_bytes(b"not an image")
    good = (where / "documents.jsonl").read_bytes()
    (where / "documents.jsonl").write_bytes(b"\n".join([good, *(data for data, _ in BROKEN + SPOILT)]))
    data = task(where, images=16)
    reasons, kept, bad = {}, [], 0
    for row in range(data.rows("train")):
        try:
            arrays = data.read("train", row)
        except BadRow as flaw:
            arrays, bad = flaw.rest, bad + 1
            reasons[flaw.where] = flaw.reason
            reasons |= {name.strip(): "shared" for name in flaw.detail.partition("row: ")[2].split(", ") if name}
        if arrays is not None:
            kept += [tuple(e[0]) for e in examples(data.build({k: a[None] for k, a in arrays.items()}))]
    assert sorted(kept) == sorted(tuple(expected(i)[0]) for i in range(3))
    assert set(reasons) == {f"documents.jsonl line {4 + i}" for i in range(len(BROKEN + SPOILT))}
    for i, (_, reason) in enumerate(BROKEN + SPOILT):
        assert reasons[f"documents.jsonl line {4 + i}"] in (reason, "shared")
    seen, batches = [], Mixture({"d": data}, {"d": data.rows("train")}, 0)
    batches.ledger.least = 1000
    batch = next(batches)["d"]
    for r in range(data.rows("train")):
        seen += [tuple(e[0]) for e in examples(batch, r)]
    assert sorted(seen) == sorted(kept) and batches.ledger.skipped["d"] == bad > len(BROKEN)
    batches.close()


def test_documents_larger_than_a_row_are_cut_or_refused(tmp_path):
    where = corpus(tmp_path / "documents", 3)
    x, y = ({"image": f"a/0{name}.png"} for name in "xy")
    lines = [
        line({"text": "a" * 30}, x, {"text": "b" * 30}),
        line(x, y, x),
        line({"text": "c" * 42}, x),
        line(x, y),
    ]
    (where / "documents.jsonl").write_bytes(b"\n".join(lines))
    data = task(where)
    found = sorted((e for r in range(data.rows("train")) for e in examples(batch_of(data, r))), key=lambda e: e[0])
    image = [START, *[CODEC.image] * (PATCHES + 1), END]
    assert [e[0] for e in found] == sorted(
        [[BOS, *b"a" * 30, *image, *b"b" * 10], [BOS, *image, *image], [BOS, *b"c" * 42], [BOS, *image, *image, EOS]]
    )
    assert plan(data).cut == 3
    data = task(where, too_long="skip")
    assert data.rows("train") == 4 and next(examples(batch_of(data, 0)))[0] == [BOS, *image, *image, EOS]
    for row in (1, 2, 3):
        with pytest.raises(BadRow, match="the document is too long"):
            data.read("train", row)


def test_conversations_share_rows_and_are_learned_where_they_answer(tmp_path):
    (tmp_path / "1.jsonl").write_text(json.dumps({"data": ["hi", "hello", "and?", "bye"]}) + "\n")
    (tmp_path / "2.jsonl").write_text(json.dumps({"data": ["a", "b", "left out"]}) + "\n" + '{"data": ["a"]}\n')
    (tmp_path / "3.jsonl").write_text(json.dumps({"data": ["q" * 40, "a"]}))
    data = chats(UltraChat(tmp_path))
    assert [s.name for s in data.layout.segments] == ["text"] and data.rows("train") == 3
    found = sorted(examples(batch_of(data, 0)), key=lambda e: len(e[0]))
    turns = [[BOS, *b"ab", EOS], [BOS, *b"hihello", EOS, BOS, *b"and?bye", EOS]]
    assert [e[0] for e in found] == turns
    assert [i for i, loss in enumerate(found[1][2]) if loss] == [3, 4, 5, 6, 7, 8, 14, 15, 16, 17]
    for row, wrong in ((1, r"2.jsonl line 2: the turns are not"), (2, r"3.jsonl line 1: nothing of it .* is a target")):
        with pytest.raises(BadRow, match=wrong):
            data.read("train", row)


def test_one_example_is_completed_at_a_time(folder):
    layout, batch = task(folder, prompt_length=20).prompt([{"prompt": "a cat"}, {"prompt": "ü", "image": pixels(0)}])
    assert [(s.name, s.length, s.role) for s in layout.segments] == [("text", 20, "clean"), ("image", 4, "noisy")]
    assert [words(CODEC, batch.tokens["text"], row) for row in range(2)] == ["<s>a cat<i>", "<s>ü<i>"]
    image = batch.tokens["image"]
    assert image.target.any(1).tolist() == [True, False] and image.valid.all() and not image.value[0].any()
    assert words(CODEC, task(folder).prompt([{"prompt": "a cat"}], null=True)[1].tokens["text"]) == "<s><i>"
    layout, batch = chats(UltraChat("")).prompt([{"turns": ["hi", "hello", "and?"]}, {"prompt": "hi"}])
    text = batch.tokens["text"]
    assert [s.length for s in layout.segments] == [32] and text.valid.all()
    given = text.replace(valid=~text.target)
    assert [words(CODEC, given, row) for row in range(2)] == ["<s>hihello</s><s>and?", "<s>hi"]
    for data, example in ((task(folder), {"prompt": "x" * 99}), (chats(UltraChat("")), {"turns": ["x" * 99]})):
        with pytest.raises(ValueError, match=r"tasks\.t: prompt 0: the text is too long"):
            data.prompt([example])
    with pytest.raises(ValueError, match="use a task of picture_chat"):
        task(folder, images=0).prompt([{"prompt": "a"}])


def arrays_of(data):
    return [{name: a.tobytes() for name, a in data.read("train", row).items()} for row in range(data.rows("train"))]


@pytest.mark.parametrize("size", [0, 8])
def test_prepared_documents_give_the_same_rows(tmp_path, size):
    where, shards = corpus(tmp_path / "documents"), tmp_path / "shards"
    for i, path in enumerate(sorted((where / "a").iterdir())):
        wide = np.random.default_rng(i).integers(0, 256, (12, 20, 3), dtype=np.uint8)
        Image.fromarray(wide).save(path)
    files = task(where)
    manifest = prepare(files.source, shards, prepare_plan(rows=5, size=size), name="documents")
    assert manifest["rows"] == COUNT and manifest["schema"]["kind"] == "documents"
    copy = task(Records(shards))
    assert arrays_of(copy) == arrays_of(files)
    kept = [[Image.open(io.BytesIO(data)).size for data in images_of(copy.source[i], "documents")] for i in range(3)]
    assert kept == [[(size or 20, size or 12)] * 2, [(20, 12)], []], "what is only read stays whole"
    records = [b"\x0e\0\0\0" + b'{"bytes": [9]}', pack({"parts": [{"image": "a.png"}]}, sized=True)]
    sound = write_shard(shards / "00000.arrayrecord", [*records, *records[:1] * 3])
    told = json.loads((shards / "manifest.json").read_text())
    told["shards"][0] |= sound
    (shards / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(BadRow, match=r"record 0: the images are not as long as the record says .0 bytes."):
        _ = Records(shards)[0]
    with pytest.raises(BadRow, match=r"record 1: the record has not the images of its parts .0 of 1."):
        _ = Records(shards)[1]


def test_prepared_chats_share_rows(tmp_path):
    (tmp_path / "1.jsonl").write_text("".join(json.dumps({"data": [f"q{i}", f"a{i}" * 3]}) + "\n" for i in range(9)))
    files = chats(UltraChat(tmp_path))
    prepare(files.source, tmp_path / "shards", prepare_plan(rows=4))
    assert arrays_of(chats(Records(tmp_path / "shards"))) == arrays_of(files) and files.rows("train") == 3


def test_any_number_of_files_is_read(tmp_path):
    """By threads, and more files than may be open at a time."""
    count = json_lines.OPEN + 30
    for i in range(count):
        (tmp_path / f"{i:03}.jsonl").write_text(json.dumps({"data": [f"q{i}", "a"]}))
    before, source = len(os.listdir("/dev/fd")), UltraChat(tmp_path)
    assert len(source) == count
    order = np.random.default_rng(0).integers(0, count, 3000).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: source[i]["turns"][0], order))
    assert found == [f"q{i}" for i in order] and len(os.listdir("/dev/fd")) <= before + json_lines.OPEN


@pytest.mark.parametrize(
    "options, match",
    [
        ({"too_long": "bend"}, "too_long='bend' is unknown"),
        ({"vision": "eyes"}, "vision='eyes' names no field"),
        ({"size": 64}, "no room for one image"),
        ({"images": -1}, "is not possible"),
        ({"segment": {"block": 1}}, "segment has no option 'block'"),
    ],
)
def test_refusals(folder, options, match):
    with pytest.raises(ValueError, match=match):
        task(folder, **options)
