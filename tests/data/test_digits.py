"""The digits and their language: splits, layouts, losses, randomness."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from src.codecs.text import Bytes, SentencePiece
from src.data import digits, numbers
from src.data.labels import LabelToImage
from src.data.pipeline.reader import build_rows
from src.interfaces import ImageField, LabelField, TokenField

TASKS = (digits.CaptionToImage, digits.ImageToCaption, digits.NumberSentences)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return SentencePiece.cached(digits.texts(), 200, tmp_path_factory.mktemp("tokenizer"))


def words(codec, field, row):
    """Tokens of one row with special tokens by name, padding left out."""
    names = {codec.bos: "<s>", codec.eos: "</s>", codec.image_start: "[", codec.image_end: "]"}
    out, run = [], []
    for token in field.ids[row][field.valid[row]].tolist():
        if token in names:
            out += [codec.decode(run)] * bool(run) + [names[token]]
            run = []
        else:
            run.append(token)
    return " ".join(out + [codec.decode(run)] * bool(run))


def uniforms(task, count, seed=0):
    return np.random.default_rng(seed).random((count, task.draws))


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


def test_layouts_and_losses(codec):
    draw, say, count = (task(codec) for task in TASKS)
    one = np.array([5])
    label = int(digits.load("train").labels[5])
    fields = draw.build("train", one, np.array([[0.0, 0.5, 0.5, 0.5]]), {})
    assert words(codec, fields["prompt"], 0) == f"<s> {digits.phrases(label)[0]} ["
    assert words(codec, fields["tail"], 0) == "] </s>"
    assert not fields["prompt"].loss.any() and not fields["tail"].loss.any()
    dropped = draw.build("train", one, np.array([[0.0, 0.09, 0.5, 0.5]]), {})
    assert words(codec, dropped["prompt"], 0) == "<s> [" and dropped["prompt"].valid[0].sum() == 2

    fields = say.build("train", one, np.array([[0.5, 0.5]]), {})
    assert words(codec, fields["head"], 0) == "<s> ["
    assert words(codec, fields["caption"], 0) == f"] {digits.caption(label)} </s>"
    target = fields["caption"].ids[0][fields["caption"].loss[0]].tolist()
    assert target == [*codec.encode(digits.caption(label)), codec.eos]
    np.testing.assert_array_equal(fields["image"].values[0], digits.load("train").values[5])

    fields = count.build("train", np.array([0]), None, {})["sentence"]
    assert words(codec, fields, 0) == "<s> zero plus zero is zero </s>"
    assert fields.loss[0].tolist() == [False, *fields.valid[0, 1:]]
    for field in (fields, *(draw.build("train", np.arange(50), None, {})[n] for n in ("prompt", "tail"))):
        assert (np.diff(field.valid.astype(int), axis=1) <= 0).all()  # left aligned
        assert ((field.ids == codec.pad) == ~field.valid).all()


def test_text_loss_is_on_the_words_of_undropped_rows_only(codec):
    task = digits.CaptionToImage(codec, text_loss=True, drop=0.5)
    fields = task.build("train", np.arange(40), uniforms(task, 40), {})
    prompt = fields["prompt"]
    empty = prompt.valid.sum(1) == 2
    assert 5 < empty.sum() < 35
    assert not prompt.loss[empty].any()
    assert (prompt.loss[~empty].sum(1) == prompt.valid[~empty].sum(1) - 1).all() and not prompt.loss[:, 0].any()
    assert fields["tail"].loss.tolist() == [[False, True]] * 40


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_all_texts_fit_and_length_can_be_shared(kind, codec):
    codec = codec if kind == "sentencepiece" else Bytes()
    tasks = [task(codec) for task in TASKS]
    longest = max(task.length for task in tasks)
    for task in TASKS:
        assert task(codec, length=longest + 3).length == longest + 3
        with pytest.raises(ValueError, match=rf"{task.name}: length=9 is too short"):
            task(codec, length=9)


def test_augmentation_moves_the_image_by_one_pixel_with_background(codec):
    task = digits.CaptionToImage(codec)
    draws = np.array([[0.0, 0.5, 0.99, 0.0]])  # down, left
    moved = task.build("train", np.array([7]), draws, {})["image"].values[0, ..., 0]
    image = digits.load("train").values[7, ..., 0]
    expected = np.full((8, 8), -1.0, np.float32)
    expected[1:, :-1] = image[:-1, 1:]
    np.testing.assert_array_equal(moved, expected)


def test_drop_and_phrases_have_their_frequencies(codec):
    task = digits.CaptionToImage(codec)
    prompt = task.build("train", np.zeros(4000, int), uniforms(task, 4000), {})["prompt"]
    empty = prompt.valid.sum(1) == 2
    assert abs(empty.mean() - 0.1) < 0.02  # four standard errors
    assert len(np.unique(prompt.ids, axis=0)) == len(digits.PHRASES) + 1


def test_labels_are_dropped_to_the_null_class():
    task = LabelToImage(drop=0.25)
    index = np.arange(1000)
    fields = task.build("train", index, uniforms(task, 1000), {})
    null = fields["label"].ids == task.null
    assert abs(null.mean() - 0.25) < 0.055
    np.testing.assert_array_equal(fields["label"].ids[~null], digits.load("train").labels[:1000][~null])
    assert not (task.build("test", index[:360], None, {})["label"].ids == task.null).any()
    assert [(s.kind, s.length, s.mode) for s in task.segments] == [("image", 16, "bidirectional")]


@pytest.mark.parametrize("make", [*TASKS, LabelToImage])
def test_spec_fake_and_true_rows_agree(make, codec):
    task = make() if make is LabelToImage else make(codec)
    spec = task.element_spec(6)
    true = build_rows(task, "train", np.arange(6), uniforms(task, 6), {}, np.ones(6, bool))
    for rows in (task.fake(6, seed=1), true):
        assert set(rows) == set(spec)
        for name, field in rows.items():
            assert type(field) is type(spec[name]) in (TokenField, ImageField, LabelField)
            for leaf, want in zip(jax.tree.leaves(field), jax.tree.leaves(spec[name]), strict=True):
                assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype), name
    again, other = task.fake(6, seed=1), task.fake(6, seed=2)
    first = next(iter(spec))
    leaf = {"image": "values"}.get(first, "ids")
    np.testing.assert_array_equal(getattr(again[first], leaf), getattr(task.fake(6, 1)[first], leaf))
    assert (getattr(again[first], leaf) != getattr(other[first], leaf)).any()


def test_prompts_of_the_command_line_are_those_of_training(codec):
    draw, say, count = (task(codec) for task in TASKS)
    phrase, digit = draw.prompts("test")[77]
    assert phrase in digits.phrases(digit)
    assert words(codec, draw.encode_prompt(phrase), 0) == f"<s> {phrase} ["
    assert words(codec, draw.encode_prompt(), 0) == "<s> ["
    assert words(codec, say.encode_prompt(), 0) == "]"
    prompt, answer = count.prompts("test")[3]
    assert words(codec, count.encode_prompt(prompt), 0) == f"<s> {prompt}"
    row = count.build("test", np.array([3]), None, {})["sentence"]
    given = count.encode_prompt(prompt)
    size = int(given.valid.sum())
    assert row.ids[0, :size].tolist() == given.ids[0, :size].tolist()
    assert codec.decode(row.ids[0, size:]) == answer
    image, label = say.prompts("test")[9]
    assert image.shape == (8, 8, 1) and label == digits.load("test").labels[9]
    with pytest.raises(ValueError, match="use fewer words"):
        draw.encode_prompt("draw a seven " * 9)


def test_neither_tensorflow_nor_sklearn_is_imported():
    """Nor Grain, which takes seconds, until a batch is asked for."""
    script = (
        "import sys; from src.codecs.text import Bytes; from src.data import arrays, canvas, digits, labels\n"
        "from src.data.pipeline import stream\n"
        "task = digits.ImageToCaption(Bytes()); mixture = stream.Mixture({'a': task}, {'a': 2}, 0)\n"
        "assert not {'grain', 'sklearn', 'tensorflow'} & set(sys.modules)\n"
        "next(mixture); mixture.close()\n"
        "assert 'grain' in sys.modules and not {'sklearn', 'tensorflow'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
