"""Masks as drawn matrices, and the places and positions of tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from src.interfaces import Batch, SequenceSpec, Tokens
from src.sequence.layout import FixedLayout
from src.sequence.mask import visible
from src.sequence.segment import Segment
from src.train.flops import visible_pairs
from tests.helpers.family import golden


def draw(mask):
    """A boolean matrix as lines of `#` and `.`."""
    return ["".join("#" if v else "." for v in row) for row in np.asarray(mask)]


def batch_of(layout, valid=None, **blocks):
    """One row; `valid` by name, as 0 and 1, and `blocks` by name."""
    tokens = {}
    for segment in layout.segments:
        flags = jnp.asarray([(valid or {}).get(segment.name, [1] * segment.length)], bool)
        block = blocks.get(segment.name)
        for name in segment.names:
            tokens[name] = Tokens(
                jnp.zeros(flags.shape), flags, flags, block=None if block is None else jnp.asarray([block])
            )
    return Batch(tokens)


def mask_of(layout, valid=None, **blocks):
    spec = layout.spec(batch_of(layout, valid, **blocks))
    found = visible(spec, spec)
    return found[0] if found.ndim == 3 else found


def test_monoformer_row():
    """[bos a b im_start] t [2x2 image] [im_end x PAD]: only the image's own tokens see each other both ways."""
    segments = (Segment("p", 4), Segment("i", 4, "bidirectional", lead=1), Segment("c", 3))
    layout = FixedLayout(segments)
    assert [(p.segment.name, p.copy, p.start) for p in layout.parts] == [
        ("p", "clean", 0), ("i", "lead", 4), ("i", "clean", 5), ("c", "clean", 9),
    ]  # fmt: skip
    assert draw(mask_of(layout, {"c": [1, 1, 0]})) == [
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
    layout = FixedLayout((Segment("p", 2), Segment("i", 3, "causal")))
    np.testing.assert_array_equal(mask_of(layout), np.tri(5, dtype=bool))


def test_blocks_and_two_images():
    """Blocks see their own and earlier blocks; two bidirectional images do not see each other's future."""
    layout = FixedLayout((Segment("i", 5, "block:2"), Segment("t", 1)))
    assert draw(mask_of(layout)) == ["##....", "##....", "####..", "####..", "#####.", "######"]
    layout = FixedLayout((Segment("a", 2, 0), Segment("b", 2, 0)))
    assert draw(mask_of(layout)) == ["##..", "##..", "####", "####"]


def test_scales_and_what_is_markov():
    """Scales of 1 and 3 tokens: Markov scales see what lies before the segment and themselves; later text sees all."""
    scales = Segment("i", 4, (1, 3))
    assert draw(mask_of(FixedLayout((Segment("p", 1), scales)))) == ["#....", "##...", "#####", "#####", "#####"]
    markov = FixedLayout((Segment("p", 1), Segment("i", 4, (1, 3), markov=True), Segment("t", 1)))
    assert draw(mask_of(markov)) == ["#.....", "##....", "#.###.", "#.###.", "#.###.", "######"]


def test_a_noisy_copy_reads_the_clean_blocks_before_its_own_and_nobody_reads_it():
    """p · clean blocks a a b b · t · noisy A A B B."""
    layout = FixedLayout((Segment("p", 1), Segment("i", 4, 2, role="copies"), Segment("t", 1)))
    clean = ["#.........", "###.......", "###.......", "#####.....", "#####.....", "######...."]
    assert draw(mask_of(layout)) == [*clean, "#.....##..", "#.....##..", "###.....##", "###.....##"]
    causal = FixedLayout((Segment("i", 4, 1, role="copies", noisy_blocks=2),))
    assert draw(mask_of(causal)) == [
        "#.......", "##......", "###.....", "####....", "....##..", "....##..", "##....##", "##....##",
    ]  # fmt: skip
    position = layout.spec(batch_of(layout)).position[0, :, 0]
    assert position.tolist() == [0, 1, 2, 3, 4, 5, 1, 2, 3, 4]


@pytest.mark.parametrize("length, size", [(6, 1), (6, 2), (6, 3), (6, 6), (8, 4)])
def test_the_published_mask_of_block_diffusion(length, size):
    """BD3-LM has the noisy tokens first; both halves have the same positions."""
    layout = FixedLayout((Segment("i", length, size, role="copies"),))
    swapped = np.roll(np.arange(2 * length), length)
    wanted = golden("bd3lm/block_mask")[f"mask_n{length}_b{size}"]
    np.testing.assert_array_equal(mask_of(layout)[np.ix_(swapped, swapped)], wanted)
    position = layout.spec(batch_of(layout)).position[0, :, 0]
    np.testing.assert_array_equal(position, np.tile(np.arange(length), 2))
    beside = mask_of(FixedLayout((Segment("i", length, 1, role="copies", noisy_blocks=size),)))
    np.testing.assert_array_equal(beside[length:], mask_of(layout)[length:])


@pytest.mark.parametrize("sizes", [(6,), (2, 4), (1, 2, 3), (1, 1, 1, 1, 1, 1)], ids=str)
def test_the_published_mask_of_blocks_of_any_size(sizes):
    """CausalFusion: class tokens in front, and no clean tokens of the last block, which nobody reads."""
    layout = FixedLayout((Segment("label", 2, 0), Segment("i", 6, role="copies")))
    block = np.repeat(np.arange(len(sizes)), sizes)
    there = np.r_[[True] * 2, block < block[-1], [True] * 6]
    name = "sees_" + "_".join(map(str, sizes))
    wanted = golden("causalfusion/mask_and_weights")[name]
    for found in (
        mask_of(layout, i=block),
        mask_of(FixedLayout((Segment("label", 2, 0), Segment("i", 6, sizes, "copies")))),
    ):
        np.testing.assert_array_equal(np.asarray(found)[np.ix_(there, there)], wanted)
        assert not np.asarray(found)[np.ix_(there, ~there)].any()


def test_both_copies_of_a_markov_segment_see_none_of_its_earlier_blocks():
    """p · clean blocks a a b b · t · noisy A A B B: sampling keeps no block that only later ones would read."""
    layout = FixedLayout((Segment("p", 1), Segment("i", 4, 2, role="copies", markov=True), Segment("t", 1)))
    clean = ["#.........", "###.......", "###.......", "#..##.....", "#..##.....", "######...."]
    assert draw(mask_of(layout)) == [*clean, *["#.....##.."] * 2, *["#.......##"] * 2]
    scales = FixedLayout((Segment("i", 3, 1, role="copies", noisy_blocks=(1, 2), markov=True),))
    assert draw(mask_of(scales)) == ["#.....", ".#....", "..#...", "...#..", "....##", "....##"]


@pytest.mark.parametrize("markov", [False, True])
@pytest.mark.parametrize("role", ["copies", "clean", "noisy"])
def test_blocks_that_differ_by_row_are_those_of_equal_static_ones(role, markov):
    static, drawn = (
        FixedLayout((Segment("p", 2), Segment("i", 4, blocks, role=role, markov=markov), Segment("t", 1)))
        for blocks in (2, 1)
    )
    assert draw(mask_of(drawn, i=[0, 0, 1, 1])) == draw(mask_of(static))


def test_a_window_hides_what_lies_far_back_and_no_own_image():
    layout = FixedLayout((Segment("p", 3), Segment("i", 3, "bidirectional", role="copies"), Segment("c", 2)))
    spec = layout.spec(batch_of(layout))
    found = np.asarray(visible(spec.replace(window=2), spec)).reshape(11, 11)
    everything = np.asarray(visible(spec, spec)).reshape(11, 11)
    groups = (spec.group[:, None] == spec.group) & (spec.group > 0)
    for query, key in np.ndindex(11, 11):
        near = spec.read[query] - spec.write[key] < 2
        assert found[query, key] == (everything[query, key] and (near or groups[query, key]))
    assert draw(found)[3:8] == ["...###.....", "...###.....", "...###.....", "...####....", "......##..."]
    assert draw(found)[8:] == [".##.....###"] * 3
    assert visible_pairs(layout, 2) == found.sum() < everything.sum()


def test_packed_examples_do_not_meet():
    order = np.arange(5)
    spec = SequenceSpec(order, order, np.zeros(5, int), np.array([1, 1, 2, 2, 0]), np.zeros((5, 1), int))
    assert draw(visible(spec, spec)) == ["#....", "##...", "..#..", "..##.", "....."]
    only = np.zeros((5, 5), bool)
    only[3, 3] = True
    assert draw(visible(spec.replace(relation=only), spec))[3] == "...#."


def test_positions_skip_padding_wherever_it_lies():
    layout = FixedLayout((Segment("p", 3), Segment("i", 2, 0)))
    spec = layout.spec(batch_of(layout, {"p": [1, 1, 0]}))
    assert spec.position[0, :, 0].tolist() == [0, 1, 1, 2, 3] and layout.length == 5


def test_the_first_token_is_predicted_from_the_last_valid_one_before_it():
    """Behind a padded prompt, and behind an image with its lead; nothing predicts the first token of a row."""
    layout = FixedLayout((Segment("p", 3), Segment("c", 2), Segment("i", 2, 0, lead=1), Segment("t", 1)))
    batch = batch_of(layout, {"p": [1, 0, 0], "c": [1, 0]})
    sequence = jnp.arange(layout.length, dtype=jnp.float32)[None, :, None]

    def before(name):
        states, exists = layout.before(batch, sequence, name)
        return [int(s) if e else None for s, e in zip(states[0, :, 0], exists[0], strict=True)]

    assert (before("p"), before("c"), before("i"), before("t")) == ([None, 0, None], [0, 3], [5, 6], [7])
    assert layout.take(batch, sequence, "i")[0, :, 0].tolist() == [6, 7]


def test_join_is_the_inverse_of_take_and_adds_the_names_of_a_segment():
    layout = FixedLayout((Segment("p", 2), Segment(("a", "b"), 3, 0, role="copies")))
    batch, rng = batch_of(layout), np.random.default_rng(0)
    sizes = {("p", "clean"): 2, ("a", "clean"): 3, ("b", "clean"): 3, ("a", "noisy"): 3}
    parts = {key: jnp.asarray(rng.normal(size=(1, n, 4))) for key, n in sizes.items()}
    joined = layout.join(batch, parts)
    np.testing.assert_array_equal(layout.take(batch, joined, "b"), parts["a", "clean"] + parts["b", "clean"])
    np.testing.assert_array_equal(layout.take(batch, joined, "b", "noisy"), parts["a", "noisy"])
    static = layout.join(batch, {("a", "noisy"): np.arange(3)}, fill=-1)
    assert isinstance(static, np.ndarray) and static.tolist() == [-1, -1, -1, -1, -1, 0, 1, 2]


@pytest.mark.parametrize(
    "build, match",
    [
        (lambda: Segment("i", 4, "diagonal"), "'diagonal'"),
        (lambda: Segment("i", 4, "block:0"), "'block:0'"),
        (lambda: Segment("i", 4, (1, 2)), r"\(1, 2\).* 4"),
        (lambda: Segment("i", 4, role="sound"), "'sound'"),
        (lambda: Segment("i", 0), "length 0"),
        (lambda: FixedLayout((Segment("i", 1), Segment("i", 1))), "two segments with one name"),
        (lambda: FixedLayout((Segment("i", 1, lead=1, role="copies"),)), "segment i has noisy copies"),
    ],
)
def test_refusals(build, match):
    with pytest.raises(ValueError, match=match):
        build()
