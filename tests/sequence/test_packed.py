"""Packed rows: who sees whom, where, and from which place a token is predicted."""

import jax.numpy as jnp
import numpy as np
import pytest

from src.interfaces import Batch, Packing, Tokens
from src.sequence.layout import FixedLayout
from src.sequence.mask import visible
from src.sequence.packed import PackedLayout
from src.sequence.segment import Segment
from tests.sequence.test_layout import draw

IMAGE, VISION = Segment("image", 2, "bidirectional"), Segment("vision", 2)
LAYOUT = PackedLayout((Segment("text", 16), IMAGE, VISION), slots=16, most=(("image", 3), ("vision", 2)))
# Two images of one example that touch, one that is understood, a word that was dropped, another example, padding.
#           0123456789abcdef
ROW = "tTIITIItTppt" + "-tt."
EXAMPLE = [1] * 12 + [2] * 3 + [0]


def row():
    flags = jnp.asarray([[c == "t" for c in ROW]])

    def parts(there):
        valid = jnp.asarray([there])[..., None].repeat(2, axis=2)
        return Tokens(jnp.ones((*valid.shape, 1)), valid, valid)

    tokens = {"text": Tokens(jnp.zeros((1, 16), jnp.int32), flags, flags)}
    tokens |= {"image": parts([True, True, False]), "vision": parts([True, False])}
    begins = {"image": jnp.asarray([[2, 5, -1]]), "vision": jnp.asarray([[9, 13]])}
    return Batch(tokens, packing=Packing(jnp.asarray([EXAMPLE]), begins))


def led(layout):
    return layout.with_leads(lambda segment: 1)


@pytest.mark.parametrize("timed", [True, False])
def test_the_mask_of_a_row(timed):
    spec = (led(LAYOUT) if timed else LAYOUT).spec(row())
    found = draw(visible(spec, spec)[0])
    t = "#" if timed else "."
    assert found == [
        "#...............",
        "##.............." if timed else "." * 16,
        f"#{t}##............",
        f"#{t}##............",
        "#####..........." if timed else "." * 16,
        f"#{t}##{t}##.........",
        f"#{t}##{t}##.........",
        f"#{t}##{t}###........",
        f"#{t}##{t}####......." if timed else "." * 16,
        f"#{t}##{t}###{t}#......",
        f"#{t}##{t}###{t}##.....",
        f"#{t}##{t}###{t}###....",
        "................",
        ".............#..",
        ".............##.",
        "................",
    ]
    dense = np.tril(np.ones((16, 16), bool))  # the definition: the past, and one's own image, of one's own example
    for begin in (2, 5):
        dense[begin : begin + 2, begin : begin + 2] = True
    there = np.asarray([c in ("tIpT" if timed else "tIp") for c in ROW])
    dense &= there & there[:, None] & np.equal.outer(EXAMPLE, EXAMPLE)
    assert found == draw(dense)
    place = spec.position[0, :, 0][there]
    assert place.tolist() == [*range(there[:12].sum()), 0, 1]


def test_a_token_is_predicted_from_its_own_example():
    layout = led(LAYOUT)
    sequence = jnp.arange(16.0)[None, :, None]
    state, exists = layout.before(row(), sequence, "text")
    assert state[0, 1:, 0].tolist() == list(range(15))
    assert [i for i in range(16) if exists[0, i]] == [*range(1, 12), 14]
    states = layout.take(row(), sequence, "image")
    assert states[0, :2, :, 0].tolist() == [[2, 3], [5, 6]]


def test_parts_are_joined_into_their_slots():
    batch, layout = row(), led(LAYOUT)
    text = 100 + jnp.arange(16)[None, :, None]
    image = jnp.arange(6).reshape(1, 3, 2, 1)
    lead = 50 + jnp.arange(3).reshape(1, 3, 1, 1)
    vision = 70 + jnp.arange(4).reshape(1, 2, 2, 1)
    parts = {("text", "clean"): text, ("image", "clean"): image, ("image", "lead"): lead, ("vision", "clean"): vision}
    joined = layout.join(batch, parts)[0, :, 0].tolist()
    assert joined[:12] == [100, 50, 0, 1, 51, 2, 3, 107, 108, 70, 71, 111]
    owner = layout.join(batch, {("image", "clean"): np.arange(3)[:, None].repeat(2, axis=1)}, fill=-1)
    assert owner[0].tolist() == [-1, -1, 0, 0, -1, 1, 1, *[-1] * 9]


def test_noisy_copies_have_the_blocks_of_each_example():
    """Examples of 5 and 3 tokens and a slot of padding: the mask is that of each alone."""
    sizes, slots = (5, 3), 9
    example = jnp.asarray(np.repeat([1, 2, 0], [*sizes, 1])[None])
    text = Segment("text", slots, 1, "copies", noisy_blocks=2)
    layout, there = PackedLayout((text,), slots), np.asarray(example > 0)
    batch = Batch({"text": Tokens(jnp.zeros((1, slots), jnp.int32), there, there)}, packing=Packing(example, {}))
    spec, wanted = layout.spec(batch), np.zeros((2 * slots, 2 * slots), bool)
    start = 0
    for size in sizes:
        alone = FixedLayout((Segment("text", size, 1, "copies", noisy_blocks=2),))
        flags = np.ones((1, size), bool)
        one = alone.spec(Batch({"text": Tokens(np.zeros((1, size), np.int32), flags, flags)}))
        here = np.concatenate([start + np.arange(size), slots + start + np.arange(size)])
        wanted[np.ix_(here, here)] = visible(one, one)[0]
        np.testing.assert_array_equal(spec.position[0, here], one.position[0])
        start += size
    np.testing.assert_array_equal(visible(spec, spec)[0], wanted)
    assert layout.block_of(batch, "text")[0].tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 5]
    assert not spec.contiguous and layout.length == 2 * slots == layout.static_orders()[0].size
    with pytest.raises(ValueError, match="blocks of one size, and no other segments"):
        PackedLayout((Segment("text", 16, 1, "copies"), IMAGE), slots=16)


@pytest.mark.parametrize(
    "segments, match",
    [
        ((Segment("text", 8), IMAGE), "16 slots need a causal first segment"),
        ((IMAGE,), "16 slots need a causal first segment"),
        ((Segment("text", 16), Segment("i", 4, "block:2")), r"segments \['i'\]"),
        ((Segment("text", 16), Segment("i", 4, role="copies")), r"segments \['i'\]"),
    ],
)
def test_refusals(segments, match):
    with pytest.raises(ValueError, match=match):
        PackedLayout(segments, slots=16)


def test_values_of_the_first_segment_may_be_the_same_in_all_rows():
    index = np.arange(16)
    parts = {("text", "clean"): index, ("image", "clean"): np.asarray([[70, 71], [80, 81], [90, 91]])}
    parts["image", "lead"] = np.full((3, 1), -1)
    found = led(LAYOUT).join(row(), parts)
    np.testing.assert_array_equal(found[0], [0, -1, 70, 71, -1, 80, 81, *range(7, 16)])
    noisy = PackedLayout((Segment("text", 16, role="noisy"), IMAGE, VISION), 16, LAYOUT.most)
    for values in (index, index[None]):
        np.testing.assert_array_equal(noisy.join(row(), {("text", "noisy"): values}), index[None])
