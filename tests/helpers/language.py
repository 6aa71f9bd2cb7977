"""The golden Llama with the tokenizer of the golden scores, and what lm-eval's `hf` made of its texts."""

import functools
import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TOKENIZER = GOLDEN / "lm_eval/tokenizer.model"


@functools.cache
def expected():
    """The arrays of tests/golden/lm_eval/make.py."""
    return dict(np.load(GOLDEN / "lm_eval/expected.npz"))


@functools.cache
def golden(batch_size=16):
    """The `TextModel`; its rows are split over the devices."""
    from src.tools.language.opened import open_weights

    return open_weights(str(GOLDEN / "llama"), tokenizer=str(TOKENIZER), batch_size=batch_size)


def pairs():
    """(ids of the context, ids of the continuation) of each question and answer."""
    want, start, found = expected(), 0, []
    for first, second in zip(want["pair_context"].tolist(), want["pair_continuation"].tolist(), strict=True):
        ids = want["pair_ids"][start : start + first + second].tolist()
        found.append((ids[:first], ids[first:]))
        start += first + second
    return found
