"""Packed rows: who sees whom, where, and from which place a token is predicted."""

import jax.numpy as jnp
import numpy as np
import pytest

from src.interfaces import ImageField, PlaceField, TokenField
from src.sequence.layout import Segment
from src.sequence.mask import visible
from src.sequence.packed import Document
from src.sequence.view import clean_view
from tests.sequence.test_layout import draw

IMAGE, PICTURE = Segment("image", "image", 2, "bidirectional"), Segment("picture", "vision", 2)
LAYOUT = Document((Segment("text", "text", 16), IMAGE, PICTURE), slots=16)
# Two images of one example that touch, one that is understood, a word that was dropped, another example, padding.
#           0123456789abcdef
ROW = "tTIITIItTppt" + "-tt."
SEGMENT = [1] * 12 + [2] * 3 + [0]


def row():
    flags = np.asarray([[c == "t" for c in ROW]])
    places = PlaceField(np.asarray([SEGMENT]), {"image": np.asarray([[2, 5, -1]]), "picture": np.asarray([[9, 13]])})
    return {
        "text": TokenField(np.zeros((1, 16), np.int32), flags, flags),
        "image": ImageField(np.ones((1, 3, 2, 1, 1), np.float32), np.asarray([[True, True, False]])),
        "picture": ImageField(np.ones((1, 2, 2, 7), np.float32), np.asarray([[True, False]])),
        "places": places,
    }


def view_of(layout, batch):
    view = clean_view(layout, batch, lambda values: values.reshape(-1, 2, 1))
    return view, layout.spec_of(view.valid["text"], view.places)


@pytest.mark.parametrize("timed", [True, False])
def test_the_mask_of_a_row(timed):
    view, spec = view_of(LAYOUT.timed() if timed else LAYOUT, row())
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
    dense &= there & there[:, None] & np.equal.outer(SEGMENT, SEGMENT)
    assert found == draw(dense)
    place = spec.position[0, :, 0][there]
    assert place.tolist() == [*range(there[:12].sum()), 0, 1]
    assert view.inputs["image"][0, :2].all() and not view.inputs["image"][0, 2].any()
    assert not view.inputs["picture"][0, 1].any()


def test_a_token_is_predicted_from_its_own_example():
    view, spec = view_of(LAYOUT.timed(), row())
    state, exists = LAYOUT.before(jnp.arange(16.0)[None, :, None], spec.segment > 0, view.places)
    assert state[0, 1:, 0].tolist() == list(range(15))
    assert [i for i in range(16) if exists[0, i]] == [*range(1, 12), 14]
    states = LAYOUT.states(jnp.arange(16.0)[None, :, None], view.places, "image")
    assert states[0, :2, :, 0].tolist() == [[2, 3], [5, 6]]


@pytest.mark.parametrize(
    "segments, match",
    [
        ((Segment("text", "text", 8), IMAGE), "need one text segment of that length"),
        ((IMAGE,), "need one text segment"),
        ((Segment("text", "text", 16), Segment("i", "image", 4, "block:2")), "another mode than causal and bidirect"),
    ],
)
def test_refusals(segments, match):
    with pytest.raises(ValueError, match=match):
        Document(segments, slots=16)
    with pytest.raises(KeyError, match="packed rows also need their places"):
        view_of(LAYOUT, {k: v for k, v in row().items() if k != "places"})
