"""Texts for diffusion: the corpus with several right answers, ends in whole blocks, spans that are to be filled in."""

import numpy as np
import pytest

from src.codecs.chain import build_chain
from src.data.example import Example
from src.data.sources.arithmetic import KINDS, Arithmetic, ceiling, questions
from src.data.sources.numbers import WORDS, Numbers
from src.data.task import SourceTask
from src.data.templates.packed import Packed
from src.data.templates.text import Text
from src.interfaces import Field
from tests.helpers.tasks import nothing

BLOCKS = {"role": "copies", "noisy_blocks": 8}


def table():
    chain = build_chain({"host": {"name": "text:Bytes"}}, "fields.text.codec", nothing)
    return {"text": Field("text", chain.spec, chain)}


def test_every_answer_of_the_corpus_is_judged_by_arithmetic():
    source = Arithmetic()
    said = {example["text"] for example in map(source.__getitem__, range(len(source)))}
    assert said == set(source.every("text")), "no answer is left out"
    words = {word: number for number, word in enumerate(WORDS)}
    value = lambda word: words.get(word, int(word) if word.isdigit() else None)
    for number in range(0, len(source), 7):
        example = source[number]
        prompt, answer = example["prompt"].split(), example["answer"].split()
        assert source.right(example["prompt"], f" {example['answer']} ")
        assert not source.right(example["prompt"], example["answer"] + " plus")
        if prompt[0] in ("count", "all"):
            first, last = value(prompt[-4]), value(prompt[-2])
            up = list(range(first, last + 1))
            assert [value(word) for word in answer] in (up, up[::-1])
        else:
            said = [value(word) for word in prompt if word not in ("a", "sum", "of", "for", "with", "is")]
            parts = sorted([value(answer[0]), value(answer[2])])
            assert answer[1] == "plus" and sum(parts) == max(said) and {*said} <= {sum(parts), *parts}
    with pytest.raises(ValueError, match=r"unknown kinds of arithmetic \['product'\]"):
        Arithmetic(kinds=("sum", "product"))


def test_held_out_questions_are_trained_in_other_forms():
    train, test = questions("train"), questions("test")
    assert not {q.prompt for q in train} & {q.prompt for q in test}
    assert {q.kind for q in test} == set(KINDS) and len(test) == pytest.approx(len(train + test) / 10, abs=1)
    assert all(len(q.answers) == len(set(q.answers)) for q in (*train, *test))
    assert np.mean([len(q.answers) > 1 for q in (*train, *test)]) > 0.98
    for question in test:  # the same fact, in the same style
        assert sum(other.answers == question.answers for other in train) >= 1, question


def test_the_ceiling_is_what_independent_words_reach():
    question = next(q for q in questions("train") if q.prompt in ("three for seven is", "3 for 7 is"))
    assert ceiling(question) == 0.5  # "a plus b" and "b plus a"
    sums = next(q for q in questions("train") if q.kind == "sum" and len(q.answers) == 8)
    assert ceiling(sums) == pytest.approx(1 / 8)
    rng, columns = np.random.default_rng(0), [list(c) for c in zip(*(a.split() for a in question.answers), strict=True)]
    source = Arithmetic()
    drawn = [" ".join(rng.choice(column) for column in columns) for _ in range(1000)]
    share = np.mean([source.right(question.prompt, answer) for answer in drawn])
    assert share == pytest.approx(0.5, abs=0.06)


def test_what_a_text_begins_with_may_be_given():
    task = SourceTask("t", Arithmetic(), Text(length=80, given="prompt", segment=BLOCKS, filled=True), table())
    codec = table()["text"].codec.host
    for number in range(0, 900, 100):
        example, row = Arithmetic()[number], task.read("train", number)
        given = 1 + len(codec.encode(example["prompt"]))
        target = row["text.sentence/target"]
        assert not target[:given].any() and target[given : row["text.sentence/valid"].sum()].all()
    with pytest.raises(ValueError, match="does not go on behind its prompt"):
        task.prompt([{"text": "one two", "prompt": "three"}])


def test_numbers_are_judged_too():
    source = Numbers()
    asked = source.asked("test")[0]
    assert source.right(asked.prompt, f"{asked.answer} ") and not source.right(asked.prompt, "nothing")


def test_a_text_is_filled_up_to_the_end_of_its_block():
    task = SourceTask("t", Numbers(), Text(length=48, segment=BLOCKS, filled=True), table())
    plain = SourceTask("t", Numbers(), Text(length=48, segment=BLOCKS), table())
    codec = table()["text"].codec.host
    for number in range(0, 60, 7):
        row, short = task.read("train", number), plain.read("train", number)
        count, used = int(row["text.sentence/valid"].sum()), int(short["text.sentence/valid"].sum())
        assert count % 8 == 0 and 0 <= count - used < 8
        ids, target = row["text.sentence/ids"], row["text.sentence/target"]
        assert ids[:used].tolist() == short["text.sentence/ids"][:used].tolist()
        assert (ids[used - 1 : count] == codec.eos).all() and target[1:count].all() and not target[count:].any()
    whole = SourceTask("t", Numbers(), Text(length=48, segment=BLOCKS | {"noisy_blocks": 0}, filled=True), table())
    assert whole.read("train", 3)["text.sentence/valid"].all()


def test_a_masked_text_has_targets_between_given_tokens():
    task = SourceTask("t", Numbers(), Text(length=48, segment=BLOCKS, filled=True), table())
    codec = table()["text"].codec.host
    _, batch = task.prompt([{"masked": "3 plus <mask><mask> is 7"}])
    tokens = batch.tokens["text.sentence"]
    before, after = codec.encode("3 plus"), codec.encode("is 7")
    places = np.flatnonzero(tokens.target[0])
    assert places.tolist() == [1 + len(before), 2 + len(before)]
    behind = places[-1] + 1
    assert tokens.value[0, 1 : 1 + len(before)].tolist() == before
    assert tokens.value[0, behind : behind + len(after) + 1].tolist() == [*after, codec.eos]
    assert tokens.valid[0].sum() == -(-(behind + len(after) + 1) // 8) * 8
    for wrong, told in (("three plus", "has no <mask>"), ("<mask>" * 50, "too long")):
        with pytest.raises(ValueError, match=told):
            task.prompt([{"masked": wrong}])


class Documents:
    """Texts of several lengths."""

    texts = ("one", "fourteen letters", "a", "seven and eight", "nine")

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, number):
        return Example({"parts": [{"text": self.texts[number]}]}, f"text {number}")


def test_packed_examples_begin_with_blocks_of_their_own():
    template = Packed(48, text_segment=BLOCKS, filled=True)
    task = SourceTask("t", Documents(), template, table())
    assert task.layout.length == 96, "the noisy copies lie behind the row"
    rows = [task.read("train", number) for number in range(task.rows("train"))]
    sizes = [int((row["segment"] == example).sum()) for row in rows for example in range(1, row["segment"].max() + 1)]
    assert len(sizes) == 5 and not any(size % 8 for size in sizes)
    batch = task.build({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    blocks = np.asarray(task.layout.block_of(batch, "text"))
    for row, numbers in zip(rows, blocks, strict=True):
        there = row["segment"] > 0
        assert numbers[there].tolist() == (np.arange(there.sum()) // 8).tolist()
