"""Sources of files: every row is what its file says, broken ones are named, and an epoch is a permutation."""

import collections
import io
import itertools
import json
import pickle
from functools import partial

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from src.codecs.text import Bytes
from src.codecs.vision import Pixels
from src.data import chats, imagenet, journeydb, llava, pictures, tars, tfds
from src.data.files import array_record, json_list, shards
from src.data.pipeline.bad_rows import BadRow
from src.data.pipeline.stream import Stream, ordered
from src.data.prepare import Plan, prepare
from tests import formats

CODEC = Bytes()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def adm(data, size):
    """The centre crop of ADM, step by step with Pillow from a file's bytes."""
    image = Image.open(data).convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def decoded(field, row, only=None):
    keep = field.valid[row] if only is None else field.valid[row] & only[row]
    return CODEC.decode(field.ids[row][keep])


def rows_of(task, split="train", count=None):
    """All rows in order as fields of one batch, which fits the spec; None in the place of what is refused."""
    count = task.rows(split) if count is None else count
    extra = [task.read(split, i) for i in range(count)]
    fields = task.build(split, np.arange(count), None, {k: np.stack([e[k] for e in extra]) for k in extra[0]})
    told = lambda leaf: (leaf.shape, leaf.dtype)
    for other in (task.element_spec(count), task.fake(count, 0)):
        assert jax.tree.map(told, fields) == jax.tree.map(told, _like(other, fields))
    blank = task.blank()
    assert {k: (v.shape, v.dtype) for k, v in blank.items()} == {k: (v.shape, v.dtype) for k, v in extra[0].items()}
    return fields


def _like(spec, fields):
    """A spec has `valid` of all images; pipelines set it where a task does not."""
    drop = [k for k, v in fields.items() if hasattr(v, "values") and v.valid is None]
    return {k: v.replace(valid=None) if k in drop else v for k, v in spec.items()}


def flaw(task, row):
    with pytest.raises(BadRow) as error:
        task.read("train", row)
    return error.value.where, error.value.reason


def test_imagenet_rows_are_the_sorted_files_in_adms_crop(tmp_path):
    folder, _ = formats.make_imagenet(tmp_path, height=57, width=80)
    (folder / "n01440764" / "readme.txt").write_text("no image")
    (folder / "n01440764" / "a.PNG").write_bytes(formats.encoded(formats.picture(7, 33, 16), "PNG"))
    files = sorted((p for p in folder.glob("*/*") if p.suffix != ".txt"), key=lambda p: (p.parent.name, p.name))
    task = imagenet.ClassToImage(16, 5, folder=folder, patch=2)
    fields = rows_of(task)
    assert task.rows("train") == len(files) == 21
    wnids = sorted(formats.CLASSES)
    for row, file in enumerate(files):
        golden = adm(file, 16)
        np.testing.assert_array_equal(task.read("train", row)["image"], golden)
        np.testing.assert_allclose(fields["image"].values[row], golden / 127.5 - 1, atol=1e-6)
        assert fields["label"].ids[row] == wnids.index(file.parent.name)
    (folder / "n01440764" / "b.jpg").write_bytes(b"not an image")
    again = imagenet.ClassToImage(16, 5, folder=folder)
    assert again.rows("train") == 22  # the kept list of files is another one when a folder has changed
    assert flaw(again, 1) == ("n01440764/b.jpg", "the image cannot be read")
    assert pickle.loads(pickle.dumps(again)).read("train", 2)["label"] == 0


def test_class_names_are_given_and_told_apart(tmp_path):
    folder, names = formats.make_imagenet(tmp_path, each=1)
    options = {"codec": CODEC, "size": 8, "prompt_length": 64, "folder": folder}
    task = imagenet.ClassPromptToImage(**options, names=names, drop=0.25)
    found = [words for words, _ in task.prompts("test")] if task.rows("train") else []
    said = ["tench", "crane bird", "construction crane", "maillot tights", "maillot tank suit"]
    assert found == [f"Please generate an image of {name}." for name in said]
    published = imagenet.ClassPromptToImage(**options, names=names, ambiguous="keep", phrases="official", newline=True)
    assert published.rows("train") == 5 and len(set(published.names)) == 3
    uniforms = np.stack([np.full(5, 0.99), np.full(5, 0.5)], 1)
    extra = {"label": np.arange(5), "image": np.zeros((5, 8, 8, 3), np.uint8)}
    fields = published.build("train", np.arange(5), uniforms, extra)
    assert decoded(fields["prompt"], 1) == "an photo of crane."
    assert fields["tail"].ids[0].tolist() == [CODEC.image_end, 10, CODEC.eos, CODEC.pad]
    assert len(imagenet.ClassPromptToImage(**options, phrases="released", names=names).phrases) == 3
    with pytest.raises(ValueError, match=r"5 of 5 classes have an id and no name .*data.names"):
        imagenet.ClassPromptToImage(**options).rows("train")
    (tmp_path / "twice.json").write_text(json.dumps(dict.fromkeys(formats.CLASSES, "fox")))
    with pytest.raises(ValueError, match="classes have one name: fox"):
        imagenet.ClassPromptToImage(**options, names=tmp_path / "twice.json").rows("train")
    (tmp_path / "few.json").write_text(json.dumps({"n01440764": "tench"}))
    with pytest.raises(ValueError, match="does not name 4 classes of the data: n02012849"):
        imagenet.ClassPromptToImage(**options, names=tmp_path / "few.json").rows("train")
    for wnid in ("n02012849", "n03126707"):  # a part of ImageNet keeps its numbers
        for file in (folder / wnid).iterdir():
            file.unlink()
        (folder / wnid).rmdir()
    assert rows_of(imagenet.ClassToImage(8, 5, folder=folder, names=names))["label"].ids.tolist() == [0, 3, 4]
    (tmp_path / "none" / "n01440764").mkdir(parents=True)
    with pytest.raises(ValueError, match="none' has folders of classes and no image in them"):
        imagenet.ClassToImage(8, 5, folder=tmp_path / "none", names=names).rows("train")
    with pytest.raises(ValueError, match=r"have 3 classes and tasks.<name>.data.classes=5"):
        imagenet.ClassToImage(8, 5, folder=folder).rows("train")


def test_held_out_images_are_of_all_classes_and_never_trained_on(tmp_path):
    folder, _ = formats.make_imagenet(tmp_path, each=4)
    whole = [imagenet.ClassToImage(8, 5, folder=folder).read("train", i)["image"].tobytes() for i in range(20)]
    for held in (1, 5, 7, 19):
        task = imagenet.ClassToImage(8, 5, folder=folder, held_out=held)
        parts = [[task.read(split, i) for i in range(task.rows(split))] for split in ("train", "test")]
        assert [len(part) for part in parts] == [20 - held, held]
        train, test = ([whole.index(row["image"].tobytes()) for row in part] for part in parts)
        assert sorted(train + test) == list(range(20)) and train == sorted(train) and test == sorted(test)
        assert held < 5 or {int(row["label"]) for row in parts[1]} == set(range(5))


def test_an_epoch_is_one_permutation_of_a_source_for_any_number_of_processes(tmp_path):
    folder, _ = formats.make_imagenet(tmp_path, each=4)  # 20 images
    whole = Stream(imagenet.ClassToImage(8, 5, folder=folder, drop=0), 4, 3)
    parts = [Stream(imagenet.ClassToImage(8, 5, folder=folder, drop=0), 4, 3, (i, 2)) for i in range(2)]
    seen = []
    for _ in range(10):
        values = next(whole)["image"].values
        halves = np.concatenate([next(part)["image"].values for part in parts])
        np.testing.assert_array_equal(values, halves)
        seen += [value.tobytes() for value in values]
    for stream in (whole, *parts):
        stream.close()
    assert len(set(seen[:20])) == 20 and set(seen[:20]) == set(seen[20:]) and seen[:20] != seen[20:]


def test_journeydb_takes_prompts_or_captions_and_names_what_is_broken(tmp_path):
    annotations, images = formats.make_journeydb(tmp_path)
    lines = annotations.read_text().splitlines()
    (images / "000" / "2.jpg").unlink()
    extra = ['{"img_path": "./000/0.jpg", "prompt": ""}', '{"img_path": "../x.jpg", "prompt": "a"}', "{half"]
    annotations.write_text("\n".join([*lines, *extra]) + "\n")
    options = {"annotations": annotations, "images": images, "codec": CODEC, "size": 8}
    task = journeydb.CaptionToImage(**options, length=64)
    assert task.rows("train") == 9
    row = task.read("train", 3)
    assert CODEC.decode(row["ids"]) == "Please generate an image of a red fox number 3 --v 4"
    np.testing.assert_array_equal(row["image"], adm(images / "000" / "3.jpg", 8))
    assert flaw(task, 2) == ("train_anno.jsonl line 3", "the image is missing")
    reasons = ["the prompt is empty", "the name of the image is not allowed", "the line is not JSON"]
    assert [flaw(task, i)[1] for i in (6, 7, 8)] == reasons
    describe = journeydb.ImageToCaption(**options, length=24)
    assert (
        CODEC.decode(describe.read("train", 4)["ids"]) == "The fox 4 sits."
        and flaw(describe, 6)[1] == "there is no caption"
    )
    captioned = journeydb.CaptionToImage(**options, length=64, text="caption", phrase="{}", newline=True)
    assert rows_of(captioned, count=2)["tail"].ids[0].tolist() == [CODEC.image_end, 10, CODEC.eos, CODEC.pad]
    assert CODEC.decode(captioned.read("train", 5)["ids"]) == "The fox 5 sits."
    with pytest.raises(ValueError, match="has not one place for the words"):
        journeydb.CaptionToImage(**options, length=64, phrase="{} {}")


def pairs(field, row):
    """The text of a row with its special tokens, those with loss in brackets."""
    special = {CODEC.bos: "<s>", CODEC.eos: "</s>", CODEC.image_start: "<i>", CODEC.image_end: "</i>"}
    out, before = "", False
    for i, ok, loss in zip(field.ids[row], field.valid[row], field.loss[row], strict=True):
        if not ok:
            assert not loss and i == CODEC.pad
            continue
        out += ("[" if loss and not before else "]" if before and not loss else "") + special.get(int(i), chr(int(i)))
        before = loss
    return out + ("]" if before else "")


def test_chats_have_all_turns_and_losses_where_they_belong(tmp_path):
    folder = formats.make_ultrachat(tmp_path)
    with open(folder / "train_0.jsonl", "a") as file:
        for turns in (["q"], ["q", " "], "q", ["q", 7], ["q?", "a", "left over"], ["x" * 200, "a"]):
            file.write(json.dumps({"data": turns}) + "\n")
    task = chats.ChatToText(CODEC, 128, folder=folder)
    assert task.rows("train") == 14
    fields = rows_of(task, count=4)
    said = "".join(f"<s>Question 2.{t}?[Answer 2.{t}: it is so.</s>]" for t in range(3))
    assert pairs(fields["text"], 1) == said
    reasons = ["the turns are not question and answer", "a turn is empty", *["the turns are no list of texts"] * 2]
    assert [flaw(task, i) for i in range(4, 8)] == [
        (f"train_0.jsonl line {i + 1}", r) for i, r in zip(range(4, 8), reasons, strict=True)
    ]
    one = {k: v[None] for k, v in task.read("train", 8).items()}
    assert pairs(task.build("train", np.arange(1), None, one)["text"], 0) == "<s>q?[a</s>]"
    assert flaw(task, 9)[1] == "the question leaves no place for an answer"

    published = chats.ChatToText(CODEC, 128, folder=folder, turns="last", train_on_source=True)
    assert pairs(rows_of(published, count=4)["text"], 1) == "<s>[Question 2.2?Answer 2.2: it is so.</s>]"
    plain = chats.ChatToText(CODEC, 128, folder=folder, train_on_source=True, template=True)
    one = rows_of(plain, count=1)["text"]
    assert pairs(one, 0) == "<s>[### Human: Question 0.0?### Assistant: Answer 0.0: it is so.</s>]"
    brief = rows_of(chats.ChatToText(CODEC, 50, folder=folder, turns="last", question=6), count=4)["text"]
    assert pairs(brief, 1) == "<s>Quest[Answer 2.2: it is so.</s>]"
    cut = rows_of(chats.ChatToText(CODEC, 50, folder=folder), count=4)["text"]
    assert pairs(cut, 1) == "<s>Question 2.0?[Answer 2.0: it is so.</s>]<s>Question 2.1?"
    assert flaw(chats.ChatToText(CODEC, 50, folder=folder, too_long="skip"), 1)[1] == "the chat is too long"


def test_split_chats_are_whole_pairs_that_together_are_everything(tmp_path):
    folder = formats.make_ultrachat(tmp_path, turns=9, rows=18)
    source = chats.UltraChat(folder, split=100)
    whole = chats.UltraChat(folder)
    joined = collections.defaultdict(list)
    for i in range(len(source)):
        example = source[i]
        joined[example.where.partition(" turns")[0]] += example.told["turns"]
        assert len(example.told["turns"]) == 2 or sum(map(len, example.told["turns"])) <= 100
    assert dict(joined) == {e.where: e.told["turns"] for e in map(whole.__getitem__, range(len(whole)))}
    assert len(source) > len(whole)
    task = chats.ChatToText(CODEC, 40, folder=folder, too_long="split")
    assert task.rows("train") == len(chats.UltraChat(folder, split=120)) and task.read("train", 0)["loss"].any()

    prepare(partial(chats.UltraChat, epath.Path(folder), split=120), tmp_path / "shards", Plan(7))
    chat = [task.examples[i].where.partition(" turns")[0] for i in range(len(task.examples))]
    more = 0
    for held_out in range(1, len(chat) - 9):  # the first chat has at most 9 pieces
        options = {"codec": CODEC, "length": 40, "too_long": "split", "held_out": held_out}
        found = []
        for where in ({"folder": folder}, {"records": tmp_path / "shards"}):
            held = chats.ChatToText(**where, **options)
            places = {split: [held.place(split, i) for i in range(held.rows(split))] for split in ("train", "test")}
            assert places["train"] + places["test"] == list(range(len(chat)))
            found.append(len(places["test"]))
        first = found[0]
        assert found == [first, first] and chat[-first] != chat[-first - 1], "no chat is parted"
        assert first == held_out or chat[-held_out] == chat[-first], "and no more is held out than that needs"
        more += first > held_out
    assert more > 5


def test_a_damaged_piece_parts_no_chat(tmp_path):
    piece = lambda chat, first: shards.pack({"turns": [chat, "a"]} | ({"before": first} if first else {}))
    rows = [piece("one", 0), piece("one", 2), piece("two", 0), b"damaged", piece("two", 4), piece("two", 6)]
    shard = {"name": "0.arrayrecord"} | array_record.write_shard(tmp_path / "0.arrayrecord", rows)
    shards.write_manifest(epath.Path(tmp_path), [shard], schema={"kind": "chats"})
    task = chats.ChatToText(CODEC, 40, records=tmp_path, held_out=1)
    assert (task.rows("train"), task.rows("test")) == (2, 4)


def test_llava_rows_have_the_picture_where_its_marker_was(tmp_path):
    path, images = formats.make_llava(tmp_path)
    vision = Pixels(8, 4)
    options = {"codec": CODEC, "vision": vision, "annotations": path, "images": images}
    task = llava.PictureChatToText(head_length=24, length=96, **options)
    assert [(s.name, s.kind, s.length) for s in task.segments] == [
        ("head", "text", 24), ("picture", "vision", 4), ("rest", "text", 96)]  # fmt: skip
    fields = rows_of(task)
    heads = ["<s><i>", "<s>What is 1?\n<i>", "<s><i>", "<s>"]
    rests = ["</i>\nWhat is 0?[A fox, [0] of \"{many}\".</s>]",
             "</i>[A fox, [1] of \"{many}\".</s>]<s>Which colour?[Red.</s>]",
             "</i>\nHow 2?[A fox, [2] of \"{many}\".</s>]",
             "Why 3?[A fox, [3] of \"{many}\".</s>]<s>Which colour?[Red.</s>]"]  # fmt: skip
    for row in range(4):
        assert (pairs(fields["head"], row), pairs(fields["rest"], row)) == (heads[row], rests[row])
        assert fields["picture"].valid[row] == (row != 3) == fields["picture"].values[row].any()
    seen = np.asarray(Image.open(images / "coco" / "1.jpg"))
    np.testing.assert_array_equal(fields["picture"].values[1], vision.preprocess(seen))
    assert pickle.loads(pickle.dumps(task)).read("train", 1)["seen"]

    brief = rows_of(llava.PictureChatToText(head_length=24, length=96, **options, question=6))  # with <s> and marker
    assert (pairs(brief["head"], 0), pairs(brief["head"], 1)) == ("<s><i>", "<s>What<i>")
    assert pairs(brief["rest"], 0).startswith("</i>\nWha[A fox")
    assert pairs(brief["rest"], 1) == '</i>[A fox, [1] of "{many}".</s>]<s>Which[Red.</s>]'
    assert pairs(brief["rest"], 3).startswith("Why 3[A fox") and brief["picture"].valid[:3].all()

    published = llava.PictureChatToText(head_length=24, length=96, **options, marks=False, train_on_source=True)
    fields = rows_of(published)
    assert pairs(fields["head"], 1) == "<s>[What is 1?\n]" and pairs(fields["head"], 0) == "<s>"
    assert pairs(fields["rest"], 3) == 'W[hy 3?A fox, [3] of "{many}".</s><s>Which colour?Red.</s>]'
    assert (
        flaw(llava.PictureChatToText(head_length=8, length=96, **options), 1)[1]
        == "the text before the picture is too long"
    )
    assert (
        flaw(llava.PictureChatToText(head_length=24, length=30, **options, too_long="skip"), 1)[1]
        == "the chat is too long"
    )

    later = [("human", "Hi"), ("gpt", "Hello."), ("human", "<image>\nWhat?"), ("gpt", "Fox.")]
    element = {"image": "coco/0.jpg", "conversations": [{"from": who, "value": text} for who, text in later]}
    (tmp_path / "later.json").write_text(json.dumps([element]))
    options["annotations"] = tmp_path / "later.json"
    found = rows_of(llava.PictureChatToText(head_length=24, length=96, **options))
    assert (pairs(found["head"], 0), pairs(found["rest"], 0)) == ("<s>HiHello.</s><s><i>", "</i>\nWhat?[Fox.</s>]")
    found = rows_of(llava.PictureChatToText(head_length=24, length=96, **options, marks=False, train_on_source=True))
    assert (pairs(found["head"], 0), pairs(found["rest"], 0)) == ("<s>[HiHello.</s><s>]", "[\nWhat?Fox.</s>]")

    element["conversations"][2]["value"] = "In <image> this?"
    (tmp_path / "later.json").write_text(json.dumps([element]))
    found = rows_of(llava.PictureChatToText(head_length=24, length=96, **options, question=8))
    assert (pairs(found["head"], 0), pairs(found["rest"], 0)) == ("<s>HiHello.</s><s>In <i>", "</i> th[Fox.</s>]")

    options["annotations"] = path
    (images / "coco" / "1.jpg").unlink()
    batch = next(ordered(llava.PictureChatToText(head_length=24, length=96, held_out=7, **options), "test", 8))
    assert batch["picture"].valid.tolist() == [False, True, False, True, True, True, False, False]
    assert not batch["rest"].valid[0].any() and batch["rest"].valid[2].any()  # 1 is bad, 3 and 7 have no picture


def test_broken_elements_of_the_list_are_bad_rows_and_no_other_is(tmp_path):
    path, images = formats.make_llava(tmp_path)
    good = json.loads(path.read_text())
    talk = good[3]["conversations"]
    odd = [
        ({"id": "1"}, "there is no conversation"),
        ({"conversations": talk[1:2]}, "the turns are not question and answer"),
        ({"conversations": [talk[0], talk[0], talk[1]]}, "the turns are not question and answer"),
        ({"conversations": [talk[0], {"from": "gpt", "value": None}]}, "the turns are no list of texts"),
        ({"conversations": talk, "image": "coco/0.jpg"}, "the questions have not one <image>"),
        ({"conversations": good[0]["conversations"] * 2, "image": "coco/0.jpg"}, "the questions have not one <image>"),
        ({"conversations": good[0]["conversations"], "image": "coco/none.jpg"}, "the image is missing"),
        ({"conversations": good[0]["conversations"], "image": "/etc/passwd"}, "the name of the image is not allowed"),
        (7, "the line is not a JSON object"),
    ]
    texts = [json.dumps(element) for element, _ in odd] + ['{"id": nonsense, "x": [1,,2]}']
    path.write_text("[" + ",\n".join([json.dumps(good[0]), *texts, json.dumps(good[1])]) + "]")
    task = llava.PictureChatToText(CODEC, Pixels(8, 4), 24, 96, annotations=path, images=images)
    assert task.rows("train") == 12
    reasons = [*(reason for _, reason in odd), "the line is not JSON"]
    for row, reason in enumerate(reasons, start=1):
        assert flaw(task, row) == (f"llava_mix665k.json element {row + 1}", reason)
    assert task.read("train", 0)["seen"] and task.read("train", 11)["seen"]
    late = [{"from": "gpt", "value": "Hello."}, *good[3]["conversations"], {"from": "human", "value": "and?"}]
    assert llava.conversation(late, "") == [turn["value"] for turn in good[3]["conversations"]]
    for text, words in (
        ('[{"a": 1}', "ends before its list does"),
        ('{"a": 1}', "does not begin with"),
        ("[1] x", "goes on"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"is no JSON list, it {words}"):
            llava.PictureChatToText(CODEC, Pixels(8, 4), 24, 96, annotations=path, images=images).rows("train")


def test_the_index_of_a_list_is_that_of_json(tmp_path, monkeypatch):
    """Whatever the strings hold and wherever the blocks end."""
    draw = np.random.default_rng(0)
    words = ["a,b", '"', "\\", '\\"', "]", "[{", '\\\\"', "ü水", "\n", 7, None, 1.5, "\\" * 5 + '"', "}", ""]

    def value(depth):
        kind = draw.integers(7 if depth < 4 else 4)
        if kind < 4:
            return words[draw.integers(len(words))]
        inner = [value(depth + 1) for _ in range(draw.integers(4))]
        return inner if kind == 4 else {f'{i}"{words[draw.integers(6)]}': x for i, x in enumerate(inner)}

    path = tmp_path / "l.json"
    for _ in range(60):
        data = [value(0) for _ in range(draw.integers(6))]
        text = json.dumps(data, indent=[None, 1][draw.integers(2)], ensure_ascii=bool(draw.integers(2)))
        path.write_bytes(b" " * draw.integers(3) + text.encode() + b"\n" * draw.integers(3))
        monkeypatch.setattr(json_list, "BLOCK", int([1, 2, 3, 7, 50, 10**6][draw.integers(6)]))
        whole, bounds = path.read_bytes(), json_list.element_bounds(path)
        assert [json.loads(whole[a + 1 : b]) for a, b in itertools.pairwise(bounds)] == data
        path.write_bytes(whole.rstrip()[: -1 - draw.integers(5)])
        with pytest.raises(ValueError, match="is no JSON list"):
            json_list.element_bounds(path)


def test_tar_shards_are_read_in_place(tmp_path):
    import tarfile

    folder = formats.make_tars(tmp_path / "t")
    with tarfile.open(folder / "00009.tar", "w") as archive:
        good = formats.encoded(formats.picture(0))
        files = {
            "a/1.jpg": good,
            "a/1.txt": b"one",
            "b/1.txt": b"alone",
            "c.jpg": good,
            "d.jpg": b"no",
            "d.txt": b"four",
        }
        files |= {
            "../e.jpg": good,
            "../e.txt": b"out",
            "f.json": b'{"caption": "late"}',
            "f.png": good,
            "f.txt": b"first",
            "f.jpg": b"no",
        }
        files |= {"g.cls": b"3", "h.jpg": good, "h.txt": b"\xff", "x" * 150 + ".jpg": good, "x" * 150 + ".txt": b"long"}
        for name, data in files.items():
            formats.add_file(archive, name, data)
    task = tars.CaptionToImage(CODEC, 8, 32, folder=folder)
    assert task.rows("train") == 8 + 8
    for row in range(8):
        found = task.read("train", row)
        assert CODEC.decode(found["ids"]) == f"a fox, {row}"
        np.testing.assert_array_equal(found["image"], pictures.crop(np.asarray(Image.open(
            io.BytesIO(formats.encoded(formats.picture(row))))), 8))  # fmt: skip
    told = {8: "one", 13: "first", 15: "long"}
    assert {row: CODEC.decode(task.read("train", row)["ids"]) for row in told} == told
    broken = [(9, "b/1.txt", "the image is missing"), (10, "c.jpg", "there is no caption")]
    broken += [(11, "d.jpg", "the image cannot be read"), (12, "../e.jpg", "the name of the file is not allowed")]
    broken += [(14, "h.jpg", "the text is not UTF-8")]
    for row, name, reason in broken:
        assert flaw(task, row) == (f"00009.tar {name}", reason)
    path = folder / "00001.tar"
    whole = path.read_bytes()
    second = whole.index(b"000005.jpg")  # a header
    zipped, header = b"\x1f\x8b" + whole[2:], whole[:second] + b"x" + whole[second + 1 :]
    for spoilt in (whole[:3000], whole[:512], b"", zipped, header):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"1 of the 3 archives .* cannot be read: 00001.tar"):
            tars.CaptionToImage(CODEC, 8, 32, folder=folder).rows("train")


def test_tfds_is_read_without_it(tmp_path):
    folder = formats.make_tfds(tmp_path)
    names = tmp_path / "names.json"
    names.write_text(json.dumps(formats.CLASSES))
    task = tfds.ClassPromptToImage(codec=CODEC, size=8, prompt_length=64, folder=folder, names=names)
    assert task.rows("train") == 7 and task.names[2] == "construction crane"
    order = [0, 1, 2, 3, 4, 5, 6]
    for row in order:
        found = task.read("train", row)
        assert found["label"] == row % 5
        with Image.open(io.BytesIO(formats.encoded(formats.picture(row)))) as image:
            np.testing.assert_array_equal(found["image"], pictures.crop(np.asarray(image), 8))
    caption = tfds.ImageToCaption(CODEC, 8, 32, folder=folder)
    assert CODEC.decode(caption.read("train", 6)["ids"]) == "a fox, 6"
    plain = tfds.ClassToImage(size=8, classes=5, folder=folder)
    assert rows_of(plain)["label"].ids.tolist() == [0, 1, 2, 3, 4, 0, 1]
    with pytest.raises(ValueError, match="has no split 'test', it has train"):
        tfds.ClassToImage(size=8, classes=5, folder=folder, split="test").rows("train")
    with pytest.raises(ValueError, match="has no picture: it has captions/text, image, label"):
        tfds.ClassToImage(size=8, classes=5, folder=folder, image="picture").rows("train")
    with pytest.raises(BadRow, match=r"no tf.train.Example"):
        tfds.parse_record(b"\x0a\xff", "")
    (folder / "mini-train.array_record-00001-of-00002").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of the 2 shards .* are missing or damaged: mini-train.array_record-00001"):
        tfds.ClassToImage(size=8, classes=5, folder=folder).rows("train")


def test_records_say_what_they_hold(tmp_path):
    shards.write_shards(tmp_path / "r", [("fox", formats.encoded(formats.picture(0)))])
    with pytest.raises(ValueError, match="holds 'captions', this task reads classes"):
        imagenet.ClassToImage(8, 5, records=tmp_path / "r").rows("train")
    task = journeydb.ImageToCaption(CODEC, 8, 16, records=tmp_path / "r")
    assert CODEC.decode(task.read("train", 0)["ids"]) == "fox"
    with pytest.raises(ValueError, match="needs annotations, or records of it"):
        journeydb.ImageToCaption(CODEC, 8, 16).rows("train")
