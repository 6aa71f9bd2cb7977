"""What a call of the pipeline takes, and how many rows it computes."""

import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.sampling import pipeline as pipeline_module
from src.sampling.pipeline import Pipeline
from tests.helpers.small import close
from tests.sampling.test_pipeline import DECODERS, ROWS, made


@pytest.fixture(scope="module")
def system():
    pipeline, params = made()
    return pipeline.with_params(params)


@pytest.mark.parametrize(
    "given", ["seven", b"seven", {"caption": "seven"}, ["seven"], [{"caption": "7"}, "seven"], 7, (7,), iter(["seven"])]
)
def test_a_text_in_place_of_a_list_of_examples_is_refused(given):
    """It would be read letter by letter: "seven" as five examples. The tests' own check of types is left out."""
    planned, system = inspect.unwrap(Pipeline._planned), SimpleNamespace(tasks={"caption_to_image": None})
    with pytest.raises(ValueError, match=r"^task caption_to_image completes a list of examples, such as \[{") as told:
        planned(system, "caption_to_image", given, DECODERS)
    assert "\n" not in str(told.value) and len(str(told.value)) < 250


def test_the_rows_of_a_call_are_the_next_power_of_two_and_a_full_chunk_where_several_are_needed():
    rows = lambda count, most: inspect.unwrap(Pipeline.sizes)(SimpleNamespace(batch_size=most), count)
    assert [rows(count, 128) for count in (1, 2, 3, 4, 5, 8, 65)] == [[1], [2], [4], [4], [8], [8], [128]]
    assert rows(128, 128) == [128] and rows(129, 128) == [128, 128] and rows(5, 6) == rows(6, 6) == [6]
    assert rows(1, 1) == [1] and rows(3, 1) == [1, 1, 1]


@pytest.mark.faults
def test_a_call_computes_no_more_rows_than_it_wants(system, monkeypatch):
    """The next power of two, and a full chunk where several are needed; of the noise nothing changes."""
    asked, fill = [], pipeline_module._fill

    def counted(program, name, params, batch, *rest):
        asked.append(len(jax.tree.leaves(batch)[0]))
        return fill(program, name, params, batch, *rest)

    monkeypatch.setattr(pipeline_module, "_fill", counted)
    given = [{"label": number} for number in range(ROWS + 1)]
    whole = system.values("label_to_image", given, 4)["image"]
    sizes = {1: [1], 2: [2], 3: [4], 5: [ROWS], ROWS: [ROWS], ROWS + 1: [ROWS, ROWS]}
    for count in (1, 3):
        asked.clear()
        images = system.values("label_to_image", given[:count], 4)["image"]
        assert asked == sizes[count] and len(images) == count
        close(images, whole[:count], 1e-4)  # rounding of other shapes
    assert {count: system.sizes(count) for count in sizes} == sizes


@pytest.mark.parametrize("name", ["gaussian", "categorical"])
def test_the_noise_of_a_row_does_not_depend_on_the_number_of_rows(name):
    shape = (5, 7)
    draws = {
        "gaussian": lambda rows: jax.random.normal(jax.random.key(3), (rows, *shape)),
        "categorical": lambda rows: jax.random.categorical(jax.random.key(3), jnp.zeros((rows, *shape)), axis=-1),
    }
    np.testing.assert_array_equal(draws[name](2), draws[name](16)[:2])
