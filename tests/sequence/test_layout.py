"""Masks as drawn matrices, and the places and positions of tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from src.interfaces import SequenceSpec
from src.sequence.layout import Layout, Segment, with_time_tokens
from src.sequence.mask import visible


def draw(mask):
    """A boolean matrix as lines of `#` and `.`."""
    return ["".join("#" if v else "." for v in row) for row in np.asarray(mask)]


def mask_of(layout, valid=None):
    spec = layout.spec(jnp.ones((1, layout.length), bool) if valid is None else jnp.asarray([valid], bool))
    return visible(spec, spec)[0]


def test_monoformer_row():
    """[bos a b im_start] t [2x2 image] [im_end x PAD]: only the image's own tokens see each other both ways."""
    segments = (Segment("p", "text", 4), Segment("i", "image", 4, "bidirectional"), Segment("c", "text", 3))
    layout = with_time_tokens(Layout(segments))
    assert [s.name for s in layout.segments] == ["p", "i.time", "i", "c"]
    assert draw(mask_of(layout, [1] * 11 + [0])) == [
        "#...........",
        "##..........",
        "###.........",
        "####........",
        "#####.......",
        "#########...",
        "#########...",
        "#########...",
        "#########...",
        "##########..",
        "###########.",
        "............",
    ]


def test_causal_is_a_mode_of_the_image():
    segments = (Segment("p", "text", 2), Segment("i", "image", 3, "causal"))
    np.testing.assert_array_equal(mask_of(Layout(segments)), np.tri(5, dtype=bool))


def test_blocks_and_two_images():
    """Blocks see their own and earlier blocks; two bidirectional images do not see each other's future."""
    layout = Layout((Segment("i", "image", 5, "block:2"), Segment("t", "text", 1)))
    assert draw(mask_of(layout)) == ["##....", "##....", "####..", "####..", "#####.", "######"]
    layout = Layout((Segment("a", "image", 2, "bidirectional"), Segment("b", "image", 2, "bidirectional")))
    assert draw(mask_of(layout)) == ["##..", "##..", "####", "####"]


def test_packed_examples_do_not_meet():
    order = np.arange(5)
    spec = SequenceSpec(order, order, np.zeros(5, int), np.array([1, 1, 2, 2, 0]), np.zeros((5, 1), int))
    assert draw(visible(spec, spec)) == ["#....", "##...", "..#..", "..##.", "....."]
    only = np.zeros((5, 5), bool)
    only[3, 3] = True
    assert draw(visible(spec.replace(relation=only), spec))[3] == "...#."


def test_positions_skip_padding_wherever_it_lies():
    layout = Layout((Segment("p", "text", 3), Segment("i", "image", 2, "bidirectional")))
    spec = layout.spec(jnp.asarray([[1, 1, 0, 1, 1]], bool))
    assert spec.position[0, :, 0].tolist() == [0, 1, 1, 2, 3]
    assert layout.slices() == {"p": slice(0, 3), "i": slice(3, 5)} and layout.length == 5


@pytest.mark.parametrize(
    "build, match",
    [
        (lambda: Segment("i", "image", 4, "diagonal"), "mask mode 'diagonal' is unknown"),
        (lambda: Segment("i", "image", 4, "block:0"), "mask mode 'block:0' is unknown"),
        (lambda: Segment("i", "sound", 4), "kind 'sound' is unknown"),
        (lambda: Segment("i", "text", 0), "length 0"),
        (lambda: Layout((Segment("i", "text", 1), Segment("i", "text", 1))), "two segments of one name"),
    ],
)
def test_refusals(build, match):
    with pytest.raises(ValueError, match=match):
        build()
