"""Batches are functions of (seed, number): of no process count, prefetch, restart or other task."""

import jax
import numpy as np
import pytest

from src.data.pipeline.stream import Mixture, Stream, ordered, split_batch
from src.data.sources.digits import Digits
from src.data.sources.numbers import Numbers
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.image_to_caption import ImageToCaption
from src.data.templates.text import Text
from src.interfaces import Batch, Tokens
from tests.helpers.fields import table


class Counting:
    """A task whose rows are their index and their uniform numbers."""

    draws = 2

    def __init__(self, rows=10, test=7):
        self._rows = {"train": rows, "test": test}

    def rows(self, split):
        return self._rows[split]

    def read(self, split, index, uniforms):
        return {"row": np.array([index, *([] if uniforms is None else uniforms)])}

    def blank(self):
        return self.read("train", 0, [0, 0])

    def build(self, rows):
        there = np.ones((len(rows["row"]), 1), bool)
        return Batch({"row": Tokens(rows["row"], there, there)})


def take(stream, count):
    rows = [next(stream).tokens["row"].value for _ in range(count)]
    stream.close()
    return rows


def test_epochs_cover_every_row_once_in_new_orders_with_new_draws():
    rows = np.concatenate(take(Stream(Counting(10), 5, seed=3), 4))
    first, second = rows[:10], rows[10:]
    assert sorted(first[:, 0]) == sorted(second[:, 0]) == list(range(10))
    assert first[:, 0].tolist() != second[:, 0].tolist()
    assert len(np.unique(rows[:, 1:])) == 40  # no draw is ever used twice
    other = np.concatenate(take(Stream(Counting(10), 5, seed=4), 2))
    assert other[:, 0].tolist() != first[:, 0].tolist()


@pytest.mark.parametrize("shards", [2, 4])
def test_processes_joined_in_order_give_the_batch_of_one(shards):
    alone = take(Stream(Counting(10), 8, seed=0), 4)
    parts = [take(Stream(Counting(10), 8, seed=0, shard=(i, shards)), 4) for i in range(shards)]
    for batch, *shares in zip(alone, *parts, strict=True):
        np.testing.assert_array_equal(batch, np.concatenate(shares))


def test_state_counts_consumed_rows_and_moves_between_batch_sizes_and_processes():
    stream = Stream(Counting(10), 4, seed=0, prefetch=2)
    rows = np.concatenate([next(stream).tokens["row"].value for _ in range(9)])
    stream.set_state(12)  # back in time, with batches prefetched
    assert stream.get_state() == 12
    np.testing.assert_array_equal(np.concatenate(take(stream, 3)), rows[12:24])
    assert stream.get_state() == 24
    parts = []
    for shard in range(3):  # 4 rows of one process, then 6 rows of three: row 4 begins a batch
        other = Stream(Counting(10), 6, seed=0, shard=(shard, 3), prefetch=0)
        other.set_state(4)
        parts.append(take(other, 2))
        assert other.get_state() == 16  # rows of all processes
    joined = np.concatenate([np.concatenate(shares) for shares in zip(*parts, strict=True)])
    np.testing.assert_array_equal(joined, rows[4:16])


def assert_equal(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_mixture_resumes_exactly_and_tasks_do_not_disturb_each_other():
    fields = table()
    tasks = {
        "draw": SourceTask("draw", Digits(), CaptionToImage(), fields),
        "say": SourceTask("say", Digits(), ImageToCaption(), fields),
        "count": SourceTask("count", Numbers(), Text(), fields),
    }
    rows = {"draw": 6, "say": 4, "count": 2}
    mixture = Mixture(tasks, rows, seed=0)
    assert mixture.get_state() == {"draw": 0, "say": 0, "count": 0}
    for _ in range(3):
        batch = next(mixture)
    assert {name: len(jax.tree.leaves(part)[0]) for name, part in batch.items()} == rows
    state = mixture.get_state()
    assert state == {"draw": 18, "say": 12, "count": 6}
    expected = [next(mixture) for _ in range(2)]
    mixture.close()

    resumed = Mixture(tasks, rows, seed=0, prefetch=0)
    resumed.set_state(state)
    for batch in expected:
        assert_equal(next(resumed), batch)
    alone = Mixture({"say": tasks["say"]}, {"say": 4}, seed=0)
    alone.set_state({"say": 12})
    assert_equal(next(alone), {"say": expected[0]["say"]})
    twins = Mixture({"say": tasks["say"], "too": tasks["say"]}, {"say": 4, "too": 4}, seed=0)
    twin = next(twins)
    assert (twin["say"].tokens["image"].value != twin["too"].tokens["image"].value).any()
    other = Mixture(tasks, rows, seed=1)
    other.set_state(state)
    assert (next(other)["say"].tokens["image"].value != expected[0]["say"].tokens["image"].value).any()
    for stream in (resumed, alone, twins, other):
        stream.close()
    with pytest.raises(ValueError, match="resume with the same tasks"):
        alone.set_state(state)


@pytest.mark.parametrize("shards", [1, 2])
def test_ordered_pass_sees_each_row_once_and_pads_with_the_last(shards):
    parts = [list(ordered(Counting(test=7), "test", 4, (i, shards))) for i in range(shards)]
    batches = [np.concatenate([b.tokens["row"].value[:, 0] for b in shares]) for shares in zip(*parts, strict=True)]
    assert [b.tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 6]]


def test_padding_rows_of_the_ordered_pass_have_no_target():
    task = SourceTask("count", Numbers(relations=("successor",)), Text(), table())
    batches = [batch.tokens["text.sentence"] for batch in ordered(task, "test", 4)]
    assert task.rows("test") == 7 and len(batches) == 2
    assert [b.target.any(1).tolist() for b in batches] == [[True] * 4, [True, True, True, False]]
    assert batches[1].valid.any(1).all()  # no empty row reaches the model


@pytest.mark.parametrize(
    ("batch", "weights", "multiple", "rows"),
    [
        (64, {"a": 0.5, "b": 0.38, "c": 0.12}, 1, {"a": 32, "b": 24, "c": 8}),
        (10, {"a": 1, "b": 1, "c": 1}, 1, {"a": 4, "b": 3, "c": 3}),
        (8, {"a": 100, "b": 1, "c": 1}, 1, {"a": 6, "b": 1, "c": 1}),
        (3, {"a": 100, "b": 100, "c": 1}, 1, {"a": 1, "b": 1, "c": 1}),
        (64, {"a": 0.5, "b": 0.38, "c": 0.12}, 8, {"a": 32, "b": 24, "c": 8}),
        (32, {"a": 0.9, "b": 0.1}, 8, {"a": 24, "b": 8}),
    ],
)
def test_split_batch(batch, weights, multiple, rows):
    assert split_batch(batch, weights, multiple) == rows


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: split_batch(2, {"a": 1, "b": 1, "c": 1}), "2 rows cannot be split among 3"),
        (lambda: split_batch(12, {"a": 1, "b": 1}, 8), "multiples of 8"),
        (lambda: split_batch(8, {"a": 1, "b": 0}), "must all be positive"),
        (lambda: Stream(Counting(), 6, 0, (0, 4)), "6 rows cannot be shared by process 0 of 4"),
        (lambda: Mixture({"a": Counting()}, {"b": 2}, 0), r"\['a'\].*\['b'\]"),
        (lambda: ordered(SourceTask("count", Numbers(), Text(), table()), "val", 2), r"tasks\.count.*no split 'val'"),
    ],
)
def test_what_cannot_work_is_refused(refused, words):
    with pytest.raises(ValueError, match=words):
        refused()
