"""Streams are distinct, repeatable and safe to derive inside a compiled step."""

import itertools
import zlib

import jax
import numpy as np

from src.common.rng import step_key, stream


def test_streams_differ_repeat_and_trace():
    derive = jax.jit(lambda step, i: [stream(step_key(3, step), name, i) for name in ("noise", "mask")])
    keys = [key for step, i in itertools.product(range(3), range(3)) for key in derive(step, i)]
    keys += [stream(step_key(4, 0), "noise", 0), stream(step_key(3, 0), "noise"), step_key(3, 0)]
    data = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}
    assert len(data) == 3 * 3 * 2 + 3
    again = jax.random.fold_in(jax.random.fold_in(step_key(3, 2), zlib.crc32(b"mask")), 1)
    assert jax.random.key_data(again).tolist() == jax.random.key_data(derive(2, 1)[1]).tolist()


def test_the_name_has_the_same_value_in_every_process():
    by_hand = jax.random.fold_in(jax.random.key(0), 0xFDA99629)  # crc32 of "noise"
    assert jax.random.key_data(stream(jax.random.key(0), "noise")).tolist() == jax.random.key_data(by_hand).tolist()
