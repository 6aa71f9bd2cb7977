"""The digits and their language: splits, layouts, targets, randomness, and the very rows that were recorded."""

import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest

from src.codecs.text import Bytes, SentencePiece
from src.common.tree import flatten
from src.data.images import Images
from src.data.pipeline.reader import read_row, stack
from src.data.pipeline.stream import Mixture, split_batch
from src.data.sources import digits, numbers
from src.data.sources.digits import Digits
from src.data.sources.numbers import Numbers
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.class_label import ClassLabel
from src.data.templates.class_prompt import ClassPrompt
from src.data.templates.image_to_caption import ImageToCaption
from src.data.templates.text import Text
from tests.helpers import recorded
from tests.helpers.fields import table
from tests.helpers.rows import build

TASKS = {
    "caption_to_image": lambda fields, **o: SourceTask("caption_to_image", Digits(), CaptionToImage(**o), fields),
    "image_to_caption": lambda fields, **o: SourceTask("image_to_caption", Digits(), ImageToCaption(**o), fields),
    "number_sentences": lambda fields, **o: SourceTask("number_sentences", Numbers(), Text(**o), fields),
    "label_to_image": lambda fields, **o: SourceTask("label_to_image", Digits(), ClassLabel(**o), fields),
}
TEXTS = [name for name in TASKS if name != "label_to_image"]


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return SentencePiece(vocab_size=200, folder=tmp_path_factory.mktemp("tokenizer")).fit(Digits().texts())


@pytest.fixture(scope="module")
def tasks(codec):
    return {name: make(table(codec)) for name, make in TASKS.items()}


def words(codec, tokens, row=0):
    """Tokens of one row with special tokens by name, padding left out."""
    names = {codec.bos: "<s>", codec.eos: "</s>", codec.image_start: "[", codec.image_end: "]"}
    out, run = [], []
    for token in tokens.value[row][tokens.valid[row]].tolist():
        if token in names:
            out += [codec.decode(run)] * bool(run) + [names[token]]
            run = []
        else:
            run.append(token)
    return " ".join(out + [codec.decode(run)] * bool(run))


def uniforms(task, count, seed=0):
    return np.random.default_rng(seed).random((count, task.draws))


def test_the_rows_of_the_configs_are_those_that_were_recorded(codec):
    fields = table(codec)
    relations = ("sum", "successor", "larger")
    mixed = {
        "caption_to_image": SourceTask("a", Digits(shift=0), CaptionToImage(row_length=25), fields),
        "image_to_caption": SourceTask("b", Digits(), ImageToCaption(row_length=25), fields),
        "number_sentences": SourceTask("c", Numbers(relations=relations), Text(), fields),
    }
    single = {"label_to_image": SourceTask("d", Digits(shift=0), ClassLabel(), fields)}
    for run, tasks, batch, weights in (
        ("digits", mixed, 88, {"caption_to_image": 32, "image_to_caption": 24, "number_sentences": 32}),
        ("sit_digits", single, 64, {"label_to_image": 1.0}),
    ):
        mixture = Mixture(tasks, split_batch(batch, weights), seed=0)
        for expected in recorded.read("rows")[run]:
            arrays = flatten(jax.tree.map(np.asarray, next(mixture)))
            assert {path: zlib.crc32(np.ascontiguousarray(arrays[path]).tobytes()) for path in expected} == expected
        mixture.close()


def test_images_are_scikit_learns_and_split_for_good():
    from sklearn.datasets import load_digits

    theirs = load_digits()
    train, test = digits.load("train"), digits.load("test")
    assert np.bincount(test.labels).tolist() == [36] * 10 and len(train.labels) == 1437
    assert train.values.shape == (1437, 8, 8, 1) and train.values.dtype == np.float32
    assert train.values.min() == -1 and train.values.max() == 1

    def rows(values, labels):
        return sorted((v.tobytes(), int(n)) for v, n in zip(values, labels, strict=True))

    every = (theirs.images[..., None] / 8 - 1).astype(np.float32)
    joined = np.concatenate([train.values, test.values]), np.concatenate([train.labels, test.labels])
    assert rows(*joined) == rows(every, theirs.target)


def test_sentences_are_true_and_each_prompt_has_one_answer():
    meaning = {w: n for n, w in enumerate(numbers.WORDS)} | {str(n): n for n in range(19)}
    rules = {
        "plus": lambda a, b: a + b,
        "sum": lambda a, b: a + b,
        "minus": lambda a, b: a - b,
        "taking": lambda b, a: a - b,
        "after": lambda a: a + 1,
        "larger": max,
    }
    seen = {}
    for split in ("train", "test"):
        for sentence in numbers.sentences(split):
            tokens = sentence.prompt.split()
            rule = next(rules[t] for t in tokens if t in rules)
            assert meaning[sentence.answer] == rule(*(meaning[t] for t in tokens if t in meaning)), sentence.text
            assert sentence.prompt not in seen
            seen[sentence.prompt] = sentence.answer


@pytest.mark.parametrize("relation", list(numbers.RELATIONS))
def test_a_tenth_is_held_out_and_every_fact_still_trained(relation):
    train, test = (numbers.sentences(split, (relation,)) for split in ("train", "test"))
    assert len(test) == round(0.1 * (len(train) + len(test)))
    assert not {s.text for s in train} & {s.text for s in test}
    assert {s.fact for s in train} >= {s.fact for s in test}
    assert {s.form for s in train} == {s.form for s in test}  # and every way to say it is tested


def test_layouts_and_targets(codec, tasks):
    one, label = np.array([5]), int(digits.load("train").labels[5])
    draw, say, count = (tasks[name] for name in TEXTS)
    batch = build(draw, "train", one, np.array([[0.0, 0.5, 0.5, 0.5]])).tokens
    assert words(codec, batch["text.prompt"]) == f"<s> {digits.phrases(label)[0]} ["
    assert words(codec, batch["text.tail"]) == "] </s>"
    assert batch["image"].target.all() and batch["image"].valid.all()
    assert not batch["text.prompt"].target.any() and not batch["text.tail"].target.any()
    dropped = build(draw, "train", one, np.array([[0.0, 0.09, 0.5, 0.5]])).tokens["text.prompt"]
    assert words(codec, dropped) == "<s> [" and dropped.valid[0].sum() == 2

    batch = build(say, "train", one, np.array([[0.5, 0.5]])).tokens
    assert words(codec, batch["text.head"]) == "<s> ["
    assert words(codec, batch["text.caption"]) == f"] {digits.caption(label)} </s>"
    target = batch["text.caption"].value[0][batch["text.caption"].target[0]].tolist()
    assert target == [*codec.encode(digits.caption(label)), codec.eos]
    assert not batch["image"].target.any() and batch["image"].valid.all()
    np.testing.assert_array_equal(batch["image"].value[0], digits.load("train").values[5])

    sentence = build(count, "train", np.array([0])).tokens["text.sentence"]
    assert words(codec, sentence) == "<s> zero plus zero is zero </s>"
    assert sentence.target[0].tolist() == [False, *sentence.valid[0, 1:]]
    ordered = build(draw, "train", np.arange(50)).tokens
    for tokens in (sentence, ordered["text.prompt"], ordered["text.tail"]):
        assert (np.diff(tokens.valid.astype(int), axis=1) <= 0).all()  # left aligned
        assert ((tokens.value == codec.pad) == ~tokens.valid).all()
    assert [words(codec, ordered["text.prompt"], i).strip("<s>[ ") for i in range(13)] == [
        digits.phrases(int(digits.load("train").labels[i]))[i % 12] for i in range(13)
    ]


def test_text_loss_is_on_the_words_of_undropped_rows_only(codec):
    task = TASKS["caption_to_image"](table(codec), text_loss=True, drop=0.5)
    batch = build(task, "train", np.arange(40), uniforms(task, 40)).tokens
    prompt = batch["text.prompt"]
    empty = prompt.valid.sum(1) == 2
    assert 5 < empty.sum() < 35
    assert not prompt.target[empty].any()
    assert (prompt.target[~empty].sum(1) == prompt.valid[~empty].sum(1) - 1).all() and not prompt.target[:, 0].any()
    assert batch["text.tail"].target.tolist() == [[False, True]] * 40


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_all_texts_fit_and_length_can_be_given(kind, name, codec):
    fields = table(codec if kind == "sentencepiece" else Bytes())
    task = TASKS[name](fields)
    length = max(s.length for s in task.layout.segments if s.name.startswith("text"))
    assert TASKS[name](fields, length=length + 3).layout.length == task.layout.length + 3
    with pytest.raises(ValueError, match=rf"tasks\.{name}\.template: .*length=4 is too short"):
        TASKS[name](fields, length=4)


def test_augmentation_moves_the_image_by_one_pixel_with_background(tasks):
    draws = np.array([[0.0, 0.5, 0.99, 0.0]])  # down, left
    moved = build(tasks["caption_to_image"], "train", np.array([7]), draws).tokens["image"].value[0, ..., 0]
    image = digits.load("train").values[7, ..., 0]
    expected = np.full((8, 8), -1.0, np.float32)
    expected[1:, :-1] = image[:-1, 1:]
    np.testing.assert_array_equal(moved, expected)


def test_drop_and_phrases_have_their_frequencies(tasks):
    task = tasks["caption_to_image"]
    prompt = build(task, "train", np.zeros(4000, int), uniforms(task, 4000)).tokens["text.prompt"]
    empty = prompt.valid.sum(1) == 2
    assert abs(empty.mean() - 0.1) < 0.02  # four standard errors
    assert len(np.unique(prompt.value, axis=0)) == len(numbers.PHRASES) + 1


def test_labels_are_dropped_to_the_null_class():
    task, index = TASKS["label_to_image"](table(), drop=0.25), np.arange(1000)
    label = build(task, "train", index, uniforms(task, 1000)).cond["label"]
    assert abs((label == 10).mean() - 0.25) < 0.055
    np.testing.assert_array_equal(label[label != 10], digits.load("train").labels[:1000][label != 10])
    assert not (build(task, "test", index[:360]).cond["label"] == 10).any()
    assert [(s.names, s.length, s.blocks, s.role) for s in task.layout.segments] == [(("image",), 16, 0, "noisy")]
    with pytest.raises(ValueError, match=r"tasks\.a: .*10 classes .* count=7"):
        SourceTask("a", Digits(), ClassLabel(), table(classes=7)).rows("train")


@pytest.mark.parametrize("name", list(TASKS))
def test_spec_fake_blank_and_true_rows_agree(name, tasks):
    task = tasks[name]
    spec = task.element_spec(6)
    bad = task.build(stack([task.blank()] * 6))
    for batch in (task.fake(6, seed=1), build(task, "train", np.arange(6), uniforms(task, 6)), bad):
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), batch)
        assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), spec)
    for path, tokens in bad.tokens.items():
        assert not tokens.value.any() and not tokens.target.any() and tokens.valid.all() == (path == "image")
    one, same, other = (jax.tree.leaves(task.fake(6, seed)) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))
    for path, tokens in task.fake(6, 1).tokens.items():
        assert tokens.valid[:, 0].all() and tokens.target.any() == (path in task.fill)


def test_prompts_begin_as_training_rows_do(codec, tasks):
    draw, say, count = (tasks[name] for name in TEXTS)
    layout, batch = draw.prompt([{"caption": "draw a seven"}, {}])
    assert layout == draw.layout and words(codec, batch.tokens["text.prompt"]) == "<s> draw a seven ["
    assert words(codec, batch.tokens["text.prompt"], 1) == "<s> ["
    image = batch.tokens["image"]
    assert image.target.all() and image.valid.all() and not image.value.any()
    null = draw.prompt([{"caption": "draw a seven"}], null=True)[1]
    assert words(codec, null.tokens["text.prompt"]) == "<s> ["
    given = draw.prompt([{"caption": "7", "image": digits.load("test").values[0]}])[1].tokens["image"]
    assert not given.target.any() and given.value.any()

    batch = say.prompt([{"image": digits.load("test").values[9]}])[1].tokens
    caption = batch["text.caption"]
    assert caption.value[0, 0] == codec.image_end and not caption.target[0, 0]
    assert caption.valid.all() and caption.target[0, 1:].all() and not caption.value[0, 1:].any()
    assert words(codec, batch["text.head"]) == "<s> [" and not batch["image"].target.any()

    said = numbers.sentences("test")[3]
    sentence = count.prompt([{"prompt": said.prompt}])[1].tokens["text.sentence"]
    row = build(count, "test", np.array([3])).tokens["text.sentence"]
    size = int((~sentence.target[0]).sum())
    assert row.value[0, :size].tolist() == sentence.value[0, :size].tolist() and sentence.valid.all()
    assert codec.decode(row.value[0, size:]) == said.answer
    whole = count.prompt([{"text": said.text}])[1].tokens["text.sentence"]
    assert (whole.value == row.value).all() and (whole.valid == row.valid).all() and not whole.target.any()

    label = tasks["label_to_image"]
    assert label.prompt([{"label": 3}, {}])[1].cond["label"].tolist() == [3, 10]
    assert label.prompt([{"label": 3}], null=True)[1].cond["label"].tolist() == [10]
    for task, example in ((draw, {"caption": "draw a seven " * 9}), (say, {}), (label, {"label": 11})):
        with pytest.raises(ValueError, match="prompt 0"):
            task.prompt([example])


def test_digits_have_names_for_prompts_too():
    codec = Bytes()  # which knows the letters of the phrases
    task = SourceTask("named", Digits(), ClassPrompt(64), table(codec))
    batch = build(task, "test", [0, 1]).tokens["text.prompt"]
    labels = digits.load("test").labels
    said = [f"<s> Please generate an image of {numbers.WORDS[labels[row]]}. [" for row in (0, 1)]
    assert [words(codec, batch, row) for row in (0, 1)] == said


def test_a_data_set_of_ones_own_is_a_length_and_an_item(codec):
    class Mine:
        def __len__(self):
            return 4

        def __getitem__(self, number):
            if number == 2:
                return {"image": np.zeros((9, 9), np.uint8), "caption": "7"}
            return {"image": np.full((9, 12, 1), 60 * number, np.uint8), "caption": ["seven", "7"][number % 2]}

    task = SourceTask("mine", Mine(), CaptionToImage(8), table(codec))
    batch = build(task, "train", [0, 1, 3])
    assert [words(codec, batch.tokens["text.prompt"], i) for i in range(3)] == ["<s> seven [", "<s> 7 [", "<s> 7 ["]
    np.testing.assert_allclose(batch.tokens["image"].value[:, 0, 0, 0], np.array([0, 60, 180]) / 127.5 - 1, rtol=1e-6)
    _, flaw = read_row(task, "train", 2)
    assert b"another shape\nrow 2" in flaw.tobytes()
    with pytest.raises(ValueError, match=r"tasks\.mine.*'test' is empty"):
        task.rows("test")
    with pytest.raises(ValueError, match=r"tasks\.mine: .*'label'.* image, caption"):
        SourceTask("mine", Mine(), ClassLabel(), table(codec)).rows("train")
    for source, template, said in (
        (Mine(), CaptionToImage(), "length=None"),
        (Mine(), CaptionToImage(8, text="words"), "text='words' names no field"),
        (Mine(), CaptionToImage(8, text="image"), "text='image' is a field without text"),
    ):
        with pytest.raises(ValueError, match=rf"tasks\.mine\.template: .*{said}"):
            SourceTask("mine", source, template, table(codec))
    with pytest.raises(ValueError, match="holds 'films'"):
        Mine.holds = "films"
        Images("image", table(codec)["image"], Mine(), made=True)


def test_neither_tensorflow_nor_sklearn_is_imported():
    """Nor Grain, which takes seconds, until a batch is asked for."""
    script = (
        "import sys; from tests.helpers.fields import table\n"
        "from src.data.pipeline import stream; from src.data.task import SourceTask\n"
        "from src.data.sources.digits import Digits; from src.data.templates.image_to_caption import ImageToCaption\n"
        "task = SourceTask('a', Digits(), ImageToCaption(), table())\n"
        "mixture = stream.Mixture({'a': task}, {'a': 2}, 0)\n"
        "assert not {'grain', 'sklearn', 'tensorflow'} & set(sys.modules)\n"
        "next(mixture); mixture.close()\n"
        "assert 'grain' in sys.modules and not {'sklearn', 'tensorflow'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
