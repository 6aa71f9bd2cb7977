"""Packing, for any sizes: every example once, in its order, within the row, and waste told as it is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.sequence.packing import pack

ROOM = (9, 2)
EXAMPLE = st.tuples(st.integers(1, ROOM[0]), st.integers(0, ROOM[1]))


@settings(max_examples=50, deadline=None)
@given(st.lists(EXAMPLE, max_size=60), st.integers(1, 5))
def test_every_example_lies_once_in_a_row_that_has_room_for_it(examples, most_open):
    sizes = np.asarray(examples, np.int64).reshape(-1, 2)
    packs = pack(sizes, ROOM, most_open)
    rows = [packs[r] for r in range(len(packs))]
    assert sorted(packs.order) == list(range(len(sizes)))
    assert all(len(row) and (np.diff(row) > 0).all() and (sizes[row].sum(axis=0) <= ROOM).all() for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    # A row is opened only where none of the last `most_open` before it had room.
    for r, row in enumerate(rows):
        for earlier in rows[max(0, r - most_open) : r]:
            held = sizes[earlier[earlier < row[0]]].sum(axis=0)
            assert (held + sizes[row[0]] > ROOM).any()
    filled = sum(sizes[row][:, 0].sum() for row in rows)
    assert packs.padding == pytest.approx(1 - filled / (len(rows) * ROOM[0]) if rows else 0)


def test_the_first_row_that_has_room_is_taken():
    packs = pack(np.asarray([[5, 0], [6, 1], [3, 2], [3, 1], [1, 0]]), ROOM)
    assert [packs[r].tolist() for r in range(len(packs))] == [[0, 2, 4], [1, 3]]
    assert packs.padding == 0
    with pytest.raises(ValueError, match=r"example 1 takes \[2, 3\], a row has \[9, 2\]"):
        pack(np.asarray([[1, 0], [2, 3]]), ROOM)
