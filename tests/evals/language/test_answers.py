"""Answers and captions against the texts of the data: VQA accuracy, BLEU, ROUGE-L, CIDEr-D, and the evaluator."""

import types

import numpy as np
import pytest

from src.data.example import BadRow, Example
from src.data.templates.image_to_caption import ImageToCaption
from src.data.templates.picture_chat import PictureChat
from src.data.templates.text import Text
from src.evals.answers import AnswersEvaluator
from src.evals.language.text_scores import bleu, cider_d, normalized, rouge_l, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("It's a Dog.", "it's dog"),
        ("two  DOGS, the cat", "2 dogs cat"),
        ("1,000", "1000"),
        ("red,blue", "red blue"),
        ("3.5 m", "3.5 m"),
        ("dont", "don't"),
        ("wouldntve go", "wouldn't've go"),
        ("no-smoking", "no smoking"),
        ("well - no", "well no"),
        ("(left) side", "left side"),
        ("None", "0"),
        ("the", ""),
        ("\tan\nold   man\n", "old man"),
    ],
)
def test_answers_are_compared_as_vqa_does(answer, same):
    assert normalized(answer) == " ".join(same.split()) and normalized(normalized(answer)) == normalized(answer)


def test_an_answer_of_many_people_counts_by_its_share():
    for count, accuracy in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        references = ["Two."] * count + [f"{n} others" for n in range(10 - count)]
        assert vqa_accuracy("2", references) == pytest.approx(accuracy)
    assert vqa_accuracy("a cat", ["Cat."]) == 1 and vqa_accuracy("cats", ["Cat."]) == 0


def test_bleu_and_rouge_by_hand():
    said, meant = ["The cat sat on the mat."], [["the cat is on the mat", "there is a cat on the mat"]]
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples (on the mat), none of four
    assert bleu(said, meant, 3) == pytest.approx((5 / 6 * 3 / 5 * 1 / 4) ** (1 / 3))
    assert bleu(said, meant) == 0 and bleu(said, [[said[0]]]) == 1
    assert bleu(["on the mat it sat"], [["on the mat it sat down now"]]) == pytest.approx(np.exp(1 - 7 / 5))
    precision, recall = 5 / 6, 5 / 6  # the cat on the mat
    assert rouge_l(said[0], [meant[0][0]]) == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))
    assert rouge_l("a b c", ["c b a"]) == pytest.approx(1 / 3) and rouge_l("", ["a"]) == 0 == rouge_l("x", ["a"])
    assert rouge_l("a b", ["a b c d", "z a"]) == pytest.approx(2.44 * 1 * 0.5 / (0.5 + 1.44))


def test_cider_by_hand_and_as_the_published_code():
    """A word or pair that one of two rows has weighs log 2, one that both have nothing, one of no reference log 2."""
    # a: the same; of four lengths two have grams. b: 1 of 2 weighted words, 1 of 2 pairs, one word too long
    found = cider_d(["A cat.", "a dog runs"], [["a cat"], ["a dog"]])
    assert found == pytest.approx(10 / 4 * (2 + 2 / np.sqrt(2) * np.exp(-1 / 72)) / 2)
    # the second "cat" counts no more: 2 * 1 and not 2 * 2 of 2 * 2; of two references the mean
    clipped = cider_d(["cat cat", "-"], [["cat", "x"], ["dog"]])
    assert clipped == pytest.approx(10 / 4 * 0.5 * np.exp(-1 / 72) / 2 / 2)
    assert cider_d(["a cat"], [["a cat"]]) == 0 == cider_d(["", "x"], [["a"], ["b"]]), "of one row nothing is rare"
    # pycocoevalcap 1.2, Cider().compute_score of the same words
    meant = [
        ["A red fox sits on the mat", "the fox is on a mat, sitting"],
        ["two dogs run in the park", "a dog runs near a big dog", "dogs"],
        ["the cat sleeps"],
    ]
    said = ["a red fox on the mat", "a dog and a dog run in the park", "the cat sleeps on the sofa all day"]
    assert cider_d(said, meant) == pytest.approx(2.576981649169976, rel=1e-12)


class Rows(list):
    """A source whose last rows are held out; one that is an exception is a bad row."""

    held_out = 4

    def __getitem__(self, number):
        value = super().__getitem__(number)
        if isinstance(value, Exception):
            raise value
        return value


def task_of(template, rows):
    source = Rows(rows)
    return types.SimpleNamespace(template=template, source=source, fill=template.fill, rows=lambda split: 4)


class Told:
    """A pipeline that answers with these texts, and refuses questions with the word long."""

    def __init__(self, texts, name):
        self.texts, self.name, self.asked = texts, name, []

    def check(self, task, given):
        if "long" in given[0].get("turns", [""])[-1]:
            raise ValueError("too long")

    def __call__(self, task, given, seed):
        self.asked += given
        return [{self.name: text} for text in self.texts[: len(given)]]


def test_the_last_turn_of_a_chat_is_what_is_meant():
    def chat(*turns, **more):
        return Example({"turns": list(turns), "image": "1.jpg", **more}, "row")

    rows = [chat("trained", "on"), chat("What?", "A fox.", "Which colour?", "Red, dark red"), BadRow("broken"),
            chat("a long one?", "yes"), chat("How many?", "3", answers=["two"] * 3 + ["3"])]  # fmt: skip
    evaluator = AnswersEvaluator({"chat": task_of(PictureChat(16, 64), rows)}, task="chat", prefix="a_")
    pipeline = Told(["red dark red", "2"], "text.rest")
    found = evaluator(pipeline, 0)
    assert [each["turns"] for each in pipeline.asked] == [["What?", "A fox.", "Which colour?"], ["How many?"]]
    assert pipeline.asked[0]["image"] == "1.jpg"
    assert found.scalars == {"a_exact_match": 0, "a_vqa_accuracy": (1 + (3 * 2 / 3 + 1) / 4) / 2, "a_rows": 2,
                             "a_bleu_4": found.scalars["a_bleu_4"], "a_rouge_l": 0.5,
                             "a_cider_d": found.scalars["a_cider_d"]}  # fmt: skip
    assert found.texts["a_answers"].splitlines()[0] == "- Which colour? **red dark red**"


def test_all_captions_of_an_image_are_references():
    rows = [Example({"image": str(n), "caption": [f"a fox {n}", f"fox number {n}"]}, f"row {n}") for n in range(-1, 4)]
    evaluator = AnswersEvaluator({"read": task_of(ImageToCaption(8), rows)}, task="read", rows=2)
    pipeline = Told(["fox number 0", "a fox 2"], "text.caption")
    found = evaluator(pipeline, 0)
    assert [each["image"] for each in pipeline.asked] == ["0", "2"] and "caption" not in pipeline.asked[0]
    assert found.scalars["exact_match"] == 1 and found.scalars["rouge_l"] == 1 and found.scalars["rows"] == 2
    said, meant = ["fox number 0", "a fox 2"], [["a fox 0", "fox number 0"], ["a fox 2", "fox number 2"]]
    assert found.scalars["cider_d"] == cider_d(said, meant) > 0


def test_a_beginning_that_is_given_is_no_part_of_the_answer():
    rows = [Example({"prompt": "two plus two is", "text": "two plus two is four"}, "row")] * 5
    found = AnswersEvaluator({"go_on": task_of(Text(), rows)}, task="go_on")(Told(["four"] * 4, "text.sentence"), 0)
    assert found.scalars["exact_match"] == 1 and found.texts["answers"].startswith("- two plus two is **four**")


def test_a_task_without_text_or_rows_is_refused():
    read = task_of(ImageToCaption(8), [BadRow("broken")] * 5)
    images = types.SimpleNamespace(template=types.SimpleNamespace(answers=("image",)), fill=("image",))
    for options, said in (({"task": "gone"}, "task='gone', and there are read, draw"), ({"task": "draw"}, "not a text"),
                          ({"task": "read", "rows": 0}, "rows=0")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            AnswersEvaluator({"read": read, "draw": images}, **options)
    with pytest.raises(ValueError, match="no sound held-out rows"):
        AnswersEvaluator({"read": read}, task="read")(Told([], "text.caption"), 0)
