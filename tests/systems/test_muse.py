"""Muse: rows of coarse and fine tokens of one image, a given coarse image, and the published grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import muse_digits
from src.build import build_system
from src.common.tree import count_parameters
from src.data.sources.digits import Digits


@pytest.fixture(scope="module")
def system():
    return build_system(muse_digits.get_config("debug"))


def test_the_fine_tokens_see_the_clean_coarse_ones(system):
    """Noise is on the copy of the coarse tokens at the row's end, which sees the words alone, and on the fine ones."""
    plan = system.tasks["caption_to_image"]
    parts = [(p.segment.name, p.copy, p.length) for p in plan.layout.parts]
    assert [p for p in parts if "text" not in p[0]] == [
        ("coarse", "clean", 4), ("image", "noisy", 16), ("coarse", "noisy", 4)
    ]  # fmt: skip
    read, write, group = plan.layout.static_orders()
    sees = (write[None] <= read[:, None]) | (group[None] == group[:, None])
    slots = {(p.segment.name, p.copy): slice(p.start, p.start + p.length) for p in plan.layout.parts}
    words, clean = slots["text.prompt", "clean"], slots["coarse", "clean"]
    fine, copy = slots["image", "noisy"], slots["coarse", "noisy"]
    assert sees[fine, words].all() and sees[fine, clean].all() and sees[fine, fine].all() and not sees[fine, copy].any()
    assert sees[copy, words].all() and sees[copy, copy].all() and not sees[copy, clean].any()
    assert not sees[copy, fine].any()


def test_a_coarse_image_may_be_given(system):
    """A prompt without images makes both; with the coarse one it makes the fine one; with both, nothing is left."""
    task, image = system.tasks["caption_to_image"].task, Digits()[3]["image"]
    for given, targets in [({}, (1, 1)), ({"coarse": image}, (0, 1)), ({"image": image}, (0, 0))]:
        _, batch = task.prompt([{"caption": "a handwritten three"} | given])
        assert tuple(int(batch.tokens[name].target.all()) for name in ("coarse", "image")) == targets
    np.testing.assert_array_equal(batch.tokens["coarse"].value, image[None])


@pytest.mark.faults
def test_given_tokens_stay(system):
    """Super-resolution of a given image leaves its coarse tokens as they are, and follows from both stages' seeds."""
    params = jax.jit(system.init)(jax.random.key(0))
    pipeline = system.pipeline.with_params(params)
    images = np.stack([Digits()[number]["image"] for number in range(4)])
    codec = pipeline.fields["coarse"].codec
    ask = [{"caption": "a handwritten three", "coarse": image} for image in images]
    made = pipeline.values("caption_to_image", ask, 0)
    assert set(made) == {"image"} and made["image"].shape == images.shape
    both = pipeline.values("caption_to_image", [{"caption": "a handwritten three"}] * 4, 0)
    assert set(both) == {"coarse", "image"}
    again = codec.encode(jnp.asarray(both["coarse"]))
    np.testing.assert_allclose(codec.decode(again), both["coarse"], atol=1e-6)  # whole codes, no masks


def test_published_grids_build():
    system = build_system(muse_digits.get_config("published"))
    grids = {name: system.fields[name].process.inputs for name in ("coarse", "image")}
    assert {name: (spec.grid, spec.vocab) for name, spec in grids.items()} == {
        "coarse": ((16, 16), 8193),
        "image": ((64, 64), 8193),
    }
    assert count_parameters(jax.eval_shape(system.init, jax.random.key(0))) == 2_552_827_392
