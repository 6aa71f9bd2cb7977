"""Orders and blocks that each row has of its own: the published law of the splits, and tokens there and back."""

import functools

import jax
import numpy as np
import pytest

from src.codecs.chain import encoded
from src.data.orders import Orders, split_chances
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.class_label import ClassLabel
from src.sampling.raw_values import decoded
from src.sequence.layout import FixedLayout
from src.sequence.mask import visible
from src.sequence.segment import Segment
from tests.data.test_buckets import GRIDS
from tests.helpers.family import golden
from tests.helpers.fields import Classes, field, table
from tests.helpers.rows import rows_of
from tests.helpers.small import batch, tokens

IMAGES = np.random.default_rng(0).uniform(-1, 1, (6, 8, 8, 1)).astype(np.float32)


class Examples:
    """Six images of random values."""

    holds = "values"

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, number):
        return {"image": IMAGES[number], "label": number, "caption": "words"}


def task(template=ClassLabel, fields=None, **segment):
    return SourceTask("draw", Examples(), template(segment={"role": "copies"} | segment), fields or table())


@pytest.mark.parametrize("tokens, decay, name", [(8, 0.9, "p_splits_8"), (256, 0.95, "p_splits_256")])
def test_numbers_of_splits_have_the_published_chances(tokens, decay, name):
    wanted = golden("causalfusion/mask_and_weights")[name]
    np.testing.assert_allclose(split_chances(tokens, decay)[: len(wanted)], wanted, rtol=1e-5)


def test_splits_with_a_decay_follow_their_law():
    """Every set of ends is as likely as any other of its size."""
    rng, count = np.random.default_rng(0), 1500
    drawn = [Orders("rows", 0.5).draw(rng, 4)[1] for _ in range(count)]
    found = {}
    for block in drawn:
        assert block[0] == 0 and set(np.diff(block)) <= {0, 1}
        found[tuple(block)] = found.get(tuple(block), 0) + 1 / count
    chances = split_chances(4, 0.5)
    wanted = {1: chances[0], 2: chances[1] / 3, 3: chances[2] / 3, 4: chances[3]}
    assert len(found) == 8
    for block, share in found.items():
        assert abs(share - wanted[block[-1] + 1]) < 0.05


def test_numbers_of_equal_blocks_and_orders_are_drawn_by_row():
    rng = np.random.default_rng(0)
    drawn = [Orders("random", (1, 3, 16)).draw(rng, 16) for _ in range(400)]
    counts = np.array([block[-1] + 1 for _, block in drawn])
    assert all(sorted(order) == list(range(16)) for order, _ in drawn)
    assert {int(c) for c in counts} == {1, 3, 16} and all(abs((counts == c).mean() - 1 / 3) < 0.1 for c in (1, 3, 16))
    assert {tuple(np.bincount(block)) for _, block in drawn} == {(16,), (6, 5, 5), (1,) * 16}
    first = np.array([order[0] for order, _ in drawn])
    assert len(set(first.tolist())) == 16, "every token may be the first"
    assert Orders().draw(rng, 4)[1] is None and Orders().draw(rng, 4)[0].tolist() == [0, 1, 2, 3]


def test_shifted_blocks_and_who_sees_whom():
    """ARDiT: the first block has 1 to n tokens; clean tokens see the blocks up to their own, noisy ones the clean
    blocks before theirs and their own noisy block. By the definition, pair by pair."""
    rng, length = np.random.default_rng(0), 7
    drawn = np.stack([Orders("rows", "shifted:3").draw(rng, length)[1] for _ in range(300)])
    sizes = {tuple(np.bincount(block)) for block in drawn}
    assert sizes == {(1, 3, 3), (2, 3, 2), (3, 3, 1)}
    assert all(abs((np.sum(drawn == 0, axis=1) == first).mean() - 1 / 3) < 0.1 for first in (1, 2, 3))
    block = np.unique(drawn, axis=0)
    layout = FixedLayout((Segment("c", 2, 0), Segment("z", length, role="copies")))
    rows = batch(c=tokens(np.zeros((3, 2), np.int32)), z=tokens(np.zeros((3, length, 1), np.float32), block=block))
    spec = jax.jit(layout.spec)(rows)
    found = np.asarray(visible(*[jax.tree.map(np.asarray, spec)] * 2))
    kinds = ["c"] * 2 + ["z"] * length + ["zt"] * length
    for row in range(3):
        own = np.r_[[0, 0], block[row], block[row]]
        for q, k in np.ndindex(found.shape[1:]):
            what = kinds[q], kinds[k]
            sees = {
                ("c", "c"): True, ("z", "c"): True, ("zt", "c"): True, ("z", "z"): own[k] <= own[q],
                ("zt", "z"): own[k] < own[q], ("zt", "zt"): own[k] == own[q],
            }.get(what, False)  # fmt: skip
            assert found[row, q, k] == sees, (row, what, q, k)


@pytest.mark.parametrize("template", [ClassLabel, functools.partial(CaptionToImage, 12)], ids=["class", "words"])
def test_rows_of_training_in_another_order_are_the_same_images(template):
    """The tokens lie in the order of their places, and decoding puts them back."""
    made, images = task(template, order="random", splits=0.9), table()["image"]
    uniforms = np.random.default_rng(1).random((len(IMAGES), made.draws))
    rows = [made.read("train", number, uniforms[number]) for number in range(len(IMAGES))]
    again = made.read("train", 2, uniforms[2])
    assert all(np.array_equal(again[name], rows[2][name]) for name in again), "a row follows from its numbers"
    batch = made.build({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    tokens = jax.jit(lambda t: encoded(images.codec, t))(batch.tokens["image"])
    plain = encoded(images.codec, batch.tokens["image"].replace(place=None))
    assert (np.asarray(tokens.value) != np.asarray(plain.value)).any()
    numbers = np.asarray(tokens.place) @ [4, 1]
    np.testing.assert_array_equal(tokens.value, np.take_along_axis(np.asarray(plain.value), numbers[..., None], 1))
    back = decoded(images, np.asarray(tokens.value), batch.tokens["image"], lambda name, values: values)
    np.testing.assert_array_equal(back, IMAGES)
    assert len({tuple(row["image/order"]) for row in rows}) == len(rows) and tokens.block.max() > 0


def test_a_prompt_has_an_order_and_no_blocks_and_so_has_its_null_row():
    made = task(order="random", splits=(1, 4, 16))
    layout, batch = made.prompt([{"label": 3}, {"label": 4}])
    _, null = made.prompt([{"label": 3}, {"label": 4}], null=True)
    tokens = batch.tokens["image"]
    assert tokens.block is None and isinstance(layout, FixedLayout)
    assert (tokens.place[0] != tokens.place[1]).any(), "each row has its own"
    np.testing.assert_array_equal(tokens.place, null.tokens["image"].place)
    assert "image/block" in made.read("train", 1), "rows of the ordered pass have blocks"
    rows_of(made)


def test_buckets_have_orders_too():
    template = ClassLabel(segment={"order": "random"}, buckets=GRIDS)
    made = SourceTask("draw", Examples(), template, table())
    tokens = made.fake(3, 0).tokens["image"]
    for grid, place in zip(GRIDS, tokens.place, strict=True):
        assert sorted((place @ [grid[1], 1]).tolist()) == list(range(16)) and (place.max(0) + 1).tolist() == list(grid)


def test_a_class_may_be_tokens_in_front():
    """Ids of its own for each class and for none; they see each other and nothing else."""
    fields = table(label=field("label", Classes(10, tokens=3)))
    assert fields["label"].spec.vocab == 33
    made = task(fields=fields, blocks=16)
    layout, batch = made.prompt([{"label": 3}, {"label": 0}])
    _, null = made.prompt([{"label": 3}, {}], null=True)
    label = batch.tokens["label"]
    assert label.value.tolist() == [[9, 10, 11], [0, 1, 2]] and not batch.cond and not label.target.any()
    assert null.tokens["label"].value.tolist() == [[30, 31, 32]] * 2
    spec = jax.tree.map(np.asarray, jax.jit(layout.spec)(batch))
    sees = visible(spec, spec)
    sees = sees[0] if sees.ndim == 3 else sees
    assert sees[:3, :3].all() and not sees[:3, 3:].any() and sees[3:, :3].all()
    given = SourceTask("draw", Examples(), ClassLabel(given=8), fields)
    image = given.prompt([{"label": 3, "past": IMAGES[3][:4]}])[1].tokens["image"]
    assert image.target[0].tolist() == [False] * 8 + [True] * 8, "frames may be given, too"
    assert given.template.invented_question()["past"].shape == (4, 8, 1)


@pytest.mark.parametrize(
    "segment, words",
    [
        ({"order": "columns"}, "order='columns'"),
        ({"splits": (1, 17)}, r"tasks.draw.template: splits=\(1, 17\)"),
        ({"splits": 1.5}, "splits=1.5"),
        ({"splits": (0,)}, "splits="),
        ({"splits": 4}, "splits=4"),
        ({"splits": "shift:4"}, "splits='shift:4'"),
        ({"splits": "shifted:17"}, "splits='shifted:17'"),
        ({"ordr": "random"}, "'ordr'.*order"),
    ],
)
def test_refusals(segment, words):
    with pytest.raises(ValueError, match=words):
        task(**segment)
