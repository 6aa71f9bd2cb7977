"""Rows of tasks, read without a pipeline."""

import jax
import numpy as np
import pytest

from src.data.example import BadRow
from src.data.pipeline.reader import stack


def build(task, split, index, uniforms=None):
    """The batch of some rows, with uniform numbers [B, draws]."""
    draws = [None] * len(index) if uniforms is None else uniforms
    return task.build(stack([task.read(split, int(i), u) for i, u in zip(index, draws, strict=True)]))


def told(batch):
    """Shapes and dtypes of a batch."""
    return jax.tree.map(lambda leaf: (leaf.shape, np.dtype(leaf.dtype)), batch)


def rows_of(task, split="train"):
    """The batch of all rows in order, of which spec, blank rows and fakes have the form."""
    count = task.rows(split)
    batch = build(task, split, range(count))
    assert told(batch) == told(task.element_spec(count)) == told(task.fake(count, 0))
    blank, first = task.blank(), task.read(split, 0)
    assert told(blank) == told(first)
    return batch


def flaw(task, row, split="train"):
    """Where and why a row is bad."""
    with pytest.raises(BadRow) as error:
        task.read(split, row)
    return error.value.where, error.value.reason


def content(task, split="train"):
    """Of each row its content, or where and why there is none."""
    found = []
    for row in range(task.rows(split)):
        try:
            found.append(tuple(leaf.tobytes() for leaf in task.read(split, row).values()))
        except BadRow as error:
            found.append((error.where, error.reason))
    return found


def captions(source):
    """Of each example its caption, or where and why there is none."""
    told = []
    for number in range(len(source)):
        try:
            told.append(source[number]["caption"])
        except BadRow as flaw:
            told.append((flaw.where, flaw.reason))
    return told


def read_in_pieces(monkeypatch, module, size):
    """Files that a module opens give at most `size` bytes at a time."""

    opened = open

    class Pieces:
        def __init__(self, *args):
            self.file = opened(*args)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def read(self, _):
            return self.file.read(size)

    monkeypatch.setattr(module, "open", Pieces, raising=False)


def words(codec, tokens, row=0):
    """Tokens of one row with special tokens by name, padding left out, what is learned in brackets."""
    special = {codec.bos: "<s>", codec.eos: "</s>", codec.image_start: "<i>", codec.image_end: "</i>"}
    parts, run, inside = [], [], False
    valid = tokens.valid[row]
    for token, target in zip(tokens.value[row][valid].tolist(), tokens.target[row][valid].tolist(), strict=True):
        if token in special or target != inside:
            parts.append(codec.decode(run))
            run = []
        if target != inside:
            parts.append("[" if target else "]")
            inside = target
        if token in special:
            parts.append(special[token])
        else:
            run.append(token)
    return "".join([*parts, codec.decode(run), "]" if inside else ""])
