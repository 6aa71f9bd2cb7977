"""Sources of files: every row is what its file says, broken ones are named, and an epoch is a permutation."""

import collections
import io
import itertools
import json
import pickle

import numpy as np
import pytest
from etils import epath
from PIL import Image

from src.codecs.pixels import Pixels, crop, letterbox, scaled
from src.codecs.text import Bytes
from src.data.files import array_record, json_list, shards
from src.data.pipeline.stream import Stream, ordered
from src.data.prepare import ShardPlan, prepare
from src.data.sources import _chats
from src.data.sources.captions import Captions
from src.data.sources.image_folders import ImageFolders
from src.data.sources.journeydb import JourneyDB
from src.data.sources.llava import Llava
from src.data.sources.records import Records
from src.data.sources.ultrachat import UltraChat
from src.data.sources.webdataset import WebDataset
from src.data.splits import numbers_of
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.chat import Chat
from src.data.templates.class_label import ClassLabel
from src.data.templates.class_prompt import ClassPrompt
from src.data.templates.image_to_caption import ImageToCaption
from src.data.templates.picture_chat import PictureChat
from tests.helpers import formats
from tests.helpers.fields import field, patches, table
from tests.helpers.rows import build, flaw, rows_of, words
from tests.helpers.shards import write_shards

CODEC = Bytes()
JOURNEY = "Please generate an image of {}"


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


def task(source, template, size=8):
    vision = field("vision", Pixels(8, 8, fit="letterbox"), patches(4))
    return SourceTask("t", source, template, table(CODEC, (size, size, 3), classes=5, vision=vision))


def labelled(folder, size=8, **options):
    return task(ImageFolders(folder, **options), ClassLabel(), size)


def said(tokens, row=0):
    """What is written in a text, without special tokens."""
    return CODEC.decode(tokens.value[row][tokens.valid[row]])


def test_imagenet_rows_are_the_sorted_files_in_adms_crop(tmp_path):
    folder, _ = formats.make_imagenet(tmp_path, height=57, width=80)
    (folder / "n01440764" / "readme.txt").write_text("no image")
    for other in ("__MACOSX", "@eaDir"):  # systems leave them behind
        (folder / other).mkdir()
        (folder / other / "1.jpg").write_bytes(b"no class")
    (folder / "n01440764" / "a.PNG").write_bytes(formats.encoded(formats.picture(7, 33, 16), "PNG"))
    (folder / "n01440764" / "c.webp").write_bytes(formats.encoded(formats.picture(8, 33, 16), "WEBP"))
    files = sorted((p for p in folder.glob("n*/*") if p.suffix != ".txt"), key=lambda p: (p.parent.name, p.name))
    data = labelled(folder, 16)
    batch = rows_of(data)
    assert data.rows("train") == len(files) == 22
    wnids = sorted(formats.CLASSES)
    for row, file in enumerate(files):
        golden = adm(file, 16)
        np.testing.assert_array_equal(data.read("train", row)["image"], golden)
        np.testing.assert_allclose(batch.tokens["image"].value[row], golden / 127.5 - 1, atol=1e-6)
        assert batch.cond["label"][row] == wnids.index(file.parent.name)
    (folder / "n01440764" / "b.jpg").write_bytes(b"not an image")
    again = labelled(folder, 16)
    assert again.rows("train") == 23  # the kept list of files is another one when a folder has changed
    assert flaw(again, 1) == ("n01440764/b.jpg", "the image cannot be read")
    copy = pickle.loads(pickle.dumps(again))
    assert "files" not in vars(copy.source) and copy.read("train", 2)["label"] == 0


def test_class_names_are_given_and_told_apart(tmp_path):
    folder, names = formats.make_imagenet(tmp_path, each=1)
    prompted = lambda source, **options: task(source, ClassPrompt(64, **options))
    data = prompted(ImageFolders(folder, names=names), drop=0.25)
    prompt = rows_of(data).tokens["text.prompt"]
    known = ["tench", "crane bird", "construction crane", "maillot tights", "maillot tank suit"]
    assert [said(prompt, row) for row in range(5)] == [f"Please generate an image of {name}." for name in known]
    asked = data.prompt([{"label": 3}, {"caption": "a fox"}, {}])[1].tokens
    found = [words(CODEC, asked["text.prompt"], row) for row in range(3)]
    assert found == ["<s>Please generate an image of maillot tights.<i>", "<s>a fox<i>", "<s><i>"]
    assert asked["image"].target.all()

    published = prompted(ImageFolders(folder, names=names, ambiguous="keep"), phrases="official", newline=True)
    assert published.rows("train") == 5 and len(set(published.template.names)) == 3
    batch = build(published, "train", range(5), np.stack([np.full(5, 0.99), np.full(5, 0.5)], 1)).tokens
    assert said(batch["text.prompt"], 1) == "an photo of crane."
    assert batch["text.tail"].value[0].tolist() == [CODEC.image_end, 10, CODEC.eos, CODEC.pad]
    assert len(prompted(ImageFolders(folder, names=names), phrases="released").template.phrases) == 3
    with pytest.raises(ValueError, match="phrases='x'"):
        ClassPrompt(64, phrases="x")
    with pytest.raises(ValueError, match=r"tasks\.t: prompt .* does not fit into length=40"):
        task(ImageFolders(folder, names=names), ClassPrompt(40)).rows("train")
    (tmp_path / "twice.json").write_text(json.dumps(dict.fromkeys(formats.CLASSES, "fox")))
    (tmp_path / "few.json").write_text(json.dumps({"n01440764": "tench"}))
    for name, wrong in (
        ("", r"5 of 5 classes have an id and no name .*source\.names"),
        (tmp_path / "twice.json", "classes have one name: fox"),
        (tmp_path / "few.json", "does not name 4 classes of the data: n02012849"),
    ):
        with pytest.raises(ValueError, match=rf"tasks\.t: .*{wrong}"):
            prompted(ImageFolders(folder, names=name)).rows("train")
    for wnid in ("n02012849", "n03126707"):  # a part of ImageNet keeps its numbers
        for file in (folder / wnid).iterdir():
            file.unlink()
        (folder / wnid).rmdir()
    assert rows_of(labelled(folder, names=names)).cond["label"].tolist() == [0, 3, 4]
    (tmp_path / "none" / "n01440764").mkdir(parents=True)
    with pytest.raises(ValueError, match="none' has folders of classes and no image in them"):
        labelled(tmp_path / "none", names=names).rows("train")
    with pytest.raises(ValueError, match=r"have 3 classes and fields.label.codec has count=5"):
        labelled(folder).rows("train")


def test_held_out_images_are_of_all_classes_and_never_trained_on(tmp_path):
    folder, _ = formats.make_imagenet(tmp_path, each=4)
    whole = [labelled(folder).read("train", i)["image"].tobytes() for i in range(20)]
    for held in (1, 5, 7, 19):
        data = labelled(folder, held_out=held)
        parts = [[data.read(split, i) for i in range(data.rows(split))] for split in ("train", "test")]
        assert [len(part) for part in parts] == [20 - held, held]
        train, test = ([whole.index(row["image"].tobytes()) for row in part] for part in parts)
        assert sorted(train + test) == list(range(20)) and train == sorted(train) and test == sorted(test)
        assert held < 5 or {int(row["label"]) for row in parts[1]} == set(range(5))


def test_an_epoch_is_one_permutation_of_a_source_for_any_number_of_processes(tmp_path):
    folder, _ = formats.make_imagenet(tmp_path, each=4)  # 20 images
    whole = Stream(labelled(folder), 4, 3)
    parts = [Stream(labelled(folder), 4, 3, (i, 2)) for i in range(2)]
    seen = []
    for _ in range(10):
        values = next(whole).tokens["image"].value
        halves = np.concatenate([next(part).tokens["image"].value for part in parts])
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
    source = JourneyDB(annotations, images)
    data = task(source, CaptionToImage(64, caption="prompt", phrase=JOURNEY))
    assert data.rows("train") == 9
    batch = build(data, "train", [3])
    assert said(batch.tokens["text.prompt"]) == "Please generate an image of a red fox number 3 --v 4"
    np.testing.assert_array_equal(data.read("train", 3)["image"], adm(images / "000" / "3.jpg", 8))
    assert flaw(data, 2) == ("train_anno.jsonl line 3", "the image is missing")
    reasons = ["the prompt is empty", "the name of the image is not allowed", "the line is not JSON"]
    assert [flaw(data, i)[1] for i in (6, 7, 8)] == reasons
    describe = task(source, ImageToCaption(24))
    assert said(build(describe, "train", [4]).tokens["text.caption"]) == "The fox 4 sits."
    assert flaw(describe, 6)[1] == "there is no caption"
    captioned = task(source, CaptionToImage(64))
    assert said(build(captioned, "train", [5]).tokens["text.prompt"]) == "The fox 5 sits."


def test_chats_have_all_turns_and_targets_where_they_belong(tmp_path):
    folder = formats.make_ultrachat(tmp_path)
    with open(folder / "train_0.jsonl", "a") as file:
        odd = (
            ["q"],
            ["q", " "],
            "q",
            ["q", 7],
            ["q?", "a", "left over"],
            ["x" * 200, "a"],
            ["a\0b", "c"],
            ["a", "b\0c"],
        )
        for turns in odd:
            file.write(json.dumps({"data": turns}) + "\n")
    source = UltraChat(folder)
    text = lambda template, row: words(CODEC, build(task(source, template), "train", [row]).tokens["text"])
    data = task(source, Chat(128))
    assert data.rows("train") == 16
    pairs = "".join(f"<s>Question 2.{t}?[Answer 2.{t}: it is so.</s>]" for t in range(3))
    assert text(Chat(128), 1) == pairs
    reasons = ["the turns are not question and answer", "a turn is empty", *["the turns are no list of texts"] * 2]
    assert [flaw(data, i) for i in range(4, 8)] == [
        (f"train_0.jsonl line {i + 1}", r) for i, r in zip(range(4, 8), reasons, strict=True)
    ]
    assert text(Chat(128), 8) == "<s>q?[a</s>]"
    assert flaw(data, 9)[1] == "the question leaves no place for an answer"
    assert [text(Chat(128), row) for row in (10, 11)] == ["<s>a\0b[c</s>]", "<s>a[b\0c</s>]"]

    assert text(Chat(128, turns="last", train_on_source=True), 1) == "<s>[Question 2.2?Answer 2.2: it is so.</s>]"
    headed = text(Chat(128, train_on_source=True, headers=True), 0)
    assert headed == "<s>[### Human: Question 0.0?### Assistant: Answer 0.0: it is so.</s>]"
    assert text(Chat(50, turns="last", question=6), 1) == "<s>Quest[Answer 2.2: it is so.</s>]"
    assert text(Chat(50), 1) == "<s>Question 2.0?[Answer 2.0: it is so.</s>]<s>Question 2.1?"
    assert flaw(task(source, Chat(50, too_long="skip")), 1)[1] == "the chat is too long"
    for options in ({"turns": "x"}, {"too_long": "x"}, {"question": -1}):
        with pytest.raises(ValueError, match="use"):
            Chat(50, **options)

    _, batch = data.prompt([{"prompt": "Why?"}, {"turns": ["Hi", "Hello", "Why?"]}, {"turns": ["a", "b"]}])
    asked = batch.tokens["text"]
    assert [words(CODEC, asked.replace(valid=asked.valid & ~asked.target), row) for row in range(3)] == [
        "<s>Why?", "<s>HiHello</s><s>Why?", "<s>ab</s>"]  # fmt: skip
    assert asked.valid[:2].all() and asked.target[:2].sum(1).tolist() == [123, 114] and not asked.target[2].any()
    with pytest.raises(ValueError, match="prompt 0: the chat is too long"):
        data.prompt([{"prompt": "x" * 200}])


def test_split_chats_are_whole_pairs_that_together_are_everything(tmp_path):
    folder = formats.make_ultrachat(tmp_path, turns=9, rows=18)
    source, whole = UltraChat(folder, split=100), UltraChat(folder)
    joined = collections.defaultdict(list)
    for i in range(len(source)):
        example = source[i]
        joined[example.where.partition(" turns")[0]] += example["turns"]
        assert len(example["turns"]) == 2 or sum(map(len, example["turns"])) <= 100
    assert dict(joined) == {e.where: e["turns"] for e in map(whole.__getitem__, range(len(whole)))}
    assert len(source) > len(whole)

    prepare(UltraChat(folder, split=120), tmp_path / "shards", ShardPlan(7))
    source = UltraChat(folder, split=120)
    chat = [source[i].where.partition(" turns")[0] for i in range(len(source))]
    more = 0
    for held_out in range(1, len(chat) - 9):  # the first chat has at most 9 pieces
        found = []
        for held in (UltraChat(folder, split=120, held_out=held_out), Records(tmp_path / "shards", held_out=held_out)):
            data = task(held, Chat(40))
            parts = [numbers_of(held, split, np.arange(data.rows(split))) for split in ("train", "test")]
            assert np.concatenate(parts).tolist() == list(range(len(chat)))
            found.append(len(parts[1]))
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
    data = task(Records(tmp_path, held_out=1), Chat(40))
    assert (data.rows("train"), data.rows("test")) == (2, 4)


def test_llava_rows_have_the_image_where_its_marker_was(tmp_path):
    path, images = formats.make_llava(tmp_path)
    data = task(Llava(path, images), PictureChat(24, 96))
    assert [(s.name, s.length, s.role) for s in data.layout.segments] == [
        ("text.head", 24, "clean"), ("vision", 4, "clean"), ("text.rest", 96, "clean")]  # fmt: skip
    texts = lambda template, rows: [
        (words(CODEC, b["text.head"], row), words(CODEC, b["text.rest"], row))
        for b in [build(task(Llava(path, images), template), "train", rows).tokens]
        for row in range(len(rows))
    ]
    batch = rows_of(data).tokens
    assert texts(PictureChat(24, 96), range(4)) == [
        ("<s><i>", '</i>\nWhat is 0?[A fox, [0] of "{many}".</s>]'),
        ("<s>What is 1?\n<i>", '</i>[A fox, [1] of "{many}".</s>]<s>Which colour?[Red.</s>]'),
        ("<s><i>", '</i>\nHow 2?[A fox, [2] of "{many}".</s>]'),
        ("<s>", 'Why 3?[A fox, [3] of "{many}".</s>]<s>Which colour?[Red.</s>]'),
    ]
    assert batch["vision"].valid[:4].any(1).tolist() == [True, True, True, False] and not batch["vision"].target.any()
    assert not batch["vision"].value[3].any()
    seen = np.asarray(Image.open(images / "coco" / "1.jpg"))
    np.testing.assert_array_equal(batch["vision"].value[1], scaled(letterbox(seen, 8, 8)))
    assert pickle.loads(pickle.dumps(data)).read("train", 1)["vision/there"]

    brief = texts(PictureChat(24, 96, question=6), range(4))  # with <s> and marker
    assert (brief[0][0], brief[1][0]) == ("<s><i>", "<s>What<i>") and brief[0][1].startswith("</i>\nWha[A fox")
    assert brief[1][1] == '</i>[A fox, [1] of "{many}".</s>]<s>Which[Red.</s>]'
    assert brief[3][1].startswith("Why 3[A fox")
    published = texts(PictureChat(24, 96, marks=False, train_on_source=True), range(4))
    assert published[1][0] == "<s>[What is 1?\n]" and published[0][0] == "<s>"
    assert published[3][1] == '[Why 3?A fox, [3] of "{many}".</s><s>Which colour?Red.</s>]'
    short = task(Llava(path, images), PictureChat(8, 96))
    assert flaw(short, 1)[1] == "the text before the image is too long"

    asked = data.prompt([{"image": seen, "prompt": "Who?"}, {"turns": ["Why?"]}])[1].tokens
    given = asked["text.rest"].replace(valid=asked["text.rest"].valid & ~asked["text.rest"].target)
    assert [words(CODEC, asked["text.head"], row) for row in range(2)] == ["<s><i>", "<s>"]
    assert [words(CODEC, given, row) for row in range(2)] == ["</i>Who?", "Why?"]
    assert asked["text.rest"].valid.all() and asked["vision"].valid.any(1).tolist() == [True, False]

    later = [("system", "Be short."), ("human", "Hi"), ("gpt", "Hello."), ("human", "<image>\nWhat?"), ("gpt", "Fox.")]
    element = {"image": "coco/0.jpg", "conversations": [{"from": who, "value": text} for who, text in later]}
    path.write_text(json.dumps([element]))
    assert texts(PictureChat(24, 96), [0]) == [("<s>Be short.\n\nHiHello.</s><s><i>", "</i>\nWhat?[Fox.</s>]")]
    published = PictureChat(24, 96, marks=False, train_on_source=True)
    assert texts(published, [0]) == [("<s>[Be short.\n\nHiHello.</s><s>]", "[\nWhat?Fox.</s>]")]
    element["conversations"][3]["value"] = "In <image> this?"
    path.write_text(json.dumps([element]))
    assert texts(PictureChat(24, 96, question=8), [0]) == [("<s>Be shorHello.</s><s>In <i>", "</i> th[Fox.</s>]")]


def test_missing_images_of_chats_are_bad_rows_in_their_places(tmp_path):
    path, images = formats.make_llava(tmp_path)
    (images / "coco" / "1.jpg").unlink()
    data = task(Llava(path, images, held_out=7), PictureChat(24, 96))
    batch = next(ordered(data, "test", 8)).tokens
    assert batch["vision"].valid.any(1).tolist() == [False, True, False, True, True, True, False, False]
    assert not batch["text.rest"].valid[0].any() and batch["text.rest"].valid[2].any()  # 1 is bad, 3 and 7 have none


class Tower:
    """A frozen network that prepares images itself."""

    where = "frozen"

    def __init__(self):
        from src.interfaces import FieldSpec

        self.spec, self.shape, self.takes = FieldSpec((2, 2), features=7), (4, 7), (6, 6, 3)

    def preprocess(self, pixels):
        return np.full((6, 6, 3), pixels.mean() / 255, np.float32)


def test_a_frozen_network_prepares_images_itself(tmp_path):
    path, images = formats.make_llava(tmp_path)
    fields = table(CODEC, vision=field("vision", Tower()))
    data = SourceTask("t", Llava(path, images), PictureChat(24, 96), fields)
    batch = rows_of(data).tokens["vision"]
    assert batch.value.shape == (8, 6, 6, 3) and batch.valid.shape == (8, 4)
    seen = np.asarray(Image.open(images / "coco" / "1.jpg"))
    np.testing.assert_allclose(batch.value[1], seen.mean() / 255, rtol=1e-6)
    assert pickle.loads(pickle.dumps(data)).read("train", 1)["vision"].any()


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
    data = task(Llava(path, images), PictureChat(24, 96))
    assert data.rows("train") == 12
    reasons = [*(reason for _, reason in odd), "the line is not JSON"]
    for row, reason in enumerate(reasons, start=1):
        assert flaw(data, row) == (f"llava_mix665k.json element {row + 1}", reason)
    assert data.read("train", 0)["vision/there"] and data.read("train", 11)["vision/there"]
    late = [{"from": "gpt", "value": "Hello."}, *good[3]["conversations"], {"from": "human", "value": "and?"}]
    assert _chats.conversation(late, "") == [turn["value"] for turn in good[3]["conversations"]]
    for text, reason in (
        ('[{"a": 1}', "ends before its list does"),
        ('{"a": 1}', "does not begin with"),
        ("[1] x", "goes on"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"is no JSON list, it {reason}"):
            task(Llava(path, images), PictureChat(24, 96)).rows("train")


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


def test_tar_shards_are_read_in_place(tmp_path, caplog):
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
        files |= {"IMG.2021.jpg": good, "a\\_b.png": good, "a\\_b.txt": b"\xef\xbb\xbfodd"}
        for name, data in files.items():
            formats.add_file(archive, name, data)
    data = task(WebDataset(folder), CaptionToImage(32))
    assert data.rows("train") == 8 + 9
    assert "1 with more than one ending (such as 'IMG.2021.jpg')" in caplog.text and "1 .cls" in caplog.text
    caption = lambda row: said(build(data, "train", [row]).tokens["text.prompt"])
    for row in range(8):
        assert caption(row) == f"a fox, {row}"
        golden = np.asarray(Image.open(io.BytesIO(formats.encoded(formats.picture(row)))))
        np.testing.assert_array_equal(data.read("train", row)["image"], crop(golden, 8, 8))
    assert {row: caption(row) for row in (8, 13, 15, 16)} == {8: "one", 13: "first", 15: "long", 16: "odd"}
    broken = [(9, "b/1.txt", "the image is missing"), (10, "c.jpg", "there is no caption")]
    broken += [(11, "d.jpg", "the image cannot be read"), (12, "../e.jpg", "the name of the file is not allowed")]
    broken += [(14, "h.jpg", "the text is not UTF-8")]
    for row, name, reason in broken:
        assert flaw(data, row) == (f"00009.tar {name}", reason)
    path = folder / "00001.tar"
    whole = path.read_bytes()
    second = whole.index(b"000005.jpg")  # a header
    zipped, header = b"\x1f\x8b" + whole[2:], whole[:second] + b"x" + whole[second + 1 :]
    for spoilt in (whole[:3000], whole[:512], b"", zipped, header, whole + whole):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"1 archives of .* cannot be read: 00001.tar"):
            task(WebDataset(folder), CaptionToImage(32)).rows("train")


def test_records_say_what_they_hold(tmp_path):
    write_shards(tmp_path / "r", [("fox", formats.encoded(formats.picture(0)))])
    with pytest.raises(ValueError, match=r"tasks\.t: .*'label' .* caption, image"):
        task(Records(tmp_path / "r"), ClassLabel()).rows("train")
    with pytest.raises(ValueError, match=r"tasks\.t\.template: the source has moments .* no autoencoder"):
        task(Records(tmp_path / "r", moments=True), ClassLabel())
    data = task(Records(tmp_path / "r"), ImageToCaption(16))
    assert said(build(data, "train", [0]).tokens["text.caption"]) == "fox"
    for source in (JourneyDB("", ""), Captions(""), UltraChat(""), Llava("", "x")):
        with pytest.raises(ValueError, match=r"tasks\.t: source\.\w+ is empty"):
            task(source, ImageToCaption(16)).rows("train")


def test_a_record_names_no_file_of_its_reader(tmp_path):
    """A header that brings an image of its own is not believed."""
    rows = [shards.pack({"turns": ["q", "a"], "image": "/etc/passwd"}), shards.pack({"caption": "x", "image": "/a"})]
    for kind, row in zip(("chats", "captions"), rows, strict=True):
        (tmp_path / kind).mkdir()
        shard = {"name": "0.arrayrecord"} | array_record.write_shard(tmp_path / kind / "0.arrayrecord", [row])
        shards.write_manifest(epath.Path(tmp_path / kind), [shard], schema={"kind": kind})
        assert Records(tmp_path / kind)[0].get("image") in (None, b"")
