"""The pipeline: which rows with and without their conditions, keys, chunks, devices, places, texts, given tokens."""

import copy
import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from src.codecs.buckets import Buckets
from src.codecs.text import Bytes
from src.common.mesh.sharding import make_mesh
from src.common.rng import stream
from src.common.tree import path_string
from src.corruption.gaussian import Gaussian
from src.corruption.schedules import Linear
from src.data.sources.digits import Digits, load
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.interfaces import Batch, View
from src.models.build import build_architecture
from src.sampling.decoders.blocks import Blocks
from src.sampling.decoders.left_to_right import LeftToRight
from src.sampling.frozen_links import FrozenLinks
from src.sampling.guidance import Guidance
from src.sampling.pipeline import Pipeline, check_times
from src.sampling.raw_values import decoded, row_major
from src.sampling.steps.gaussian import DDIM, Euler
from src.sampling.walk import SamplingPlan
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment
from tests.helpers import small
from tests.helpers.small import MODEL, close, tokens
from tests.helpers.tasks import digit_tasks, fields

ROWS = 6
GROUPS = {
    "text": {"embed": {"name": "tokens", "init": 1.0}, "head": {"name": "categorical", "init": 0.5}},
    "image": {"embed": {"name": "patches"}, "head": {"name": "adaln", "init": 0.3, "adaln_init": 0.3}},
    "label": {"embed": {"name": "classes", "init": 1.0}},
}
DECODERS = {"text": LeftToRight(max_new_tokens=4), "image": Blocks(steps=2)}


def made(tasks=None, scale=1.0, rows=ROWS):
    """(pipeline without parameters, parameters) of a small random system of the digits' tasks."""
    table = fields()
    spec = table["image"].spec
    process = Gaussian(field=spec, schedule=Linear(), parameterization="velocity")
    table["image"] = dataclasses.replace(table["image"], process=process, step=Euler(), time_token=True)
    architecture, init = build_architecture(MODEL, GROUPS, table)
    tasks = tasks or digit_tasks()
    leads = {(name, s.name): int(s.name == "image") for name, t in tasks.items() for s in t.layout.segments}
    frozen = FrozenLinks({})
    guidance = Guidance(scale=scale)
    pipeline = Pipeline(
        architecture.bind, architecture.table, tasks, leads, DECODERS, guidance, rows, jnp.float32, frozen
    )
    leaves, structure = jax.tree.flatten(init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = [a + 0.2 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return pipeline, jax.tree.unflatten(structure, params)


@pytest.fixture(scope="module")
def system():
    pipeline, params = made()
    return pipeline.with_params(params)


# --------------------------------------------------------------------------- rows


def rows_of(pipeline, task, given, scale=None):
    """What a call would complete: (batch, null, layout)."""
    request = pipeline._request(task, given, scale, None)
    return request.batch, request.null, request.program.layout


def test_words_are_guided_away_from_the_empty_prompt(system):
    codec, words = Bytes(), ["a handwritten three", "7", "the digit one"]
    given = [{"caption": text} for text in words]
    batch, null, layout = rows_of(system, "caption_to_image", given, 2.0)
    prompt = batch.tokens["text.prompt"]
    for row, valid, said in zip(prompt.value, prompt.valid, words, strict=True):
        assert row[valid].tolist() == [codec.bos, *codec.encode(said), codec.image_start]
    free = null.tokens["text.prompt"]
    assert [row[valid].tolist() for row, valid in zip(free.value, free.valid, strict=True)] == [
        [codec.bos, codec.image_start]
    ] * 3
    assert [s.name for s in layout.segments] == ["text.prompt", "image"], "what follows the image is not walked"
    assert layout.segments[1].lead == 1
    assert rows_of(system, "caption_to_image", given)[1] is None, "without guidance, nothing runs twice"


def test_labels_are_guided_away_from_the_class_after_the_last(system):
    batch, null, _ = rows_of(system, "label_to_image", [{"label": 7}, {"label": 0}], 2.0)
    assert batch.cond["label"].tolist() == [7, 0] and null.cond["label"].tolist() == [10, 10]


def test_what_has_nothing_to_be_guided_away_from_is_not_guided(system):
    images = [{"image": image} for image in load("test").values[:2]]
    assert rows_of(system, "image_to_caption", images, 2.0)[1] is None


def test_texts_get_as_many_tokens_as_the_decoder_says(system):
    batch, _, layout = rows_of(system, "number_sentences", [{"prompt": "3 plus 4 is"}, {"prompt": "after 3"}])
    sentence, begins = batch.tokens["text.sentence"], [12, 8]
    assert layout.segments[0].length == 12 + 4
    assert (sentence.valid & ~sentence.target).sum(1).tolist() == begins
    assert sentence.target.sum(1).tolist() == [4, 4] and sentence.valid.sum(1).tolist() == [16, 12]


def test_every_row_of_every_chunk_has_its_own_noise(system):
    given = [{"label": 3}] * (2 * ROWS + 1)
    images = system.values("label_to_image", given, seed=0)["image"]
    assert images.shape == (2 * ROWS + 1, 8, 8, 1) and np.isfinite(images).all()
    assert len({image.tobytes() for image in images}) == len(images)
    fewer = system.values("label_to_image", given[: 2 * ROWS], seed=0)["image"]
    np.testing.assert_array_equal(fewer, images[: 2 * ROWS])
    other = system.values("label_to_image", given[:1], seed=1)["image"]
    assert other[0].tobytes() not in {image.tobytes() for image in images}


def test_keys_are_those_of_the_seed_the_name_and_the_first_row(system):
    """As before fields were rows of a table: stream(key(seed), name, start), then the name again, then a split."""
    net = system.bind(system.params, None)
    given = [{"label": 1}] * (ROWS + 1)
    keep = dataclasses.replace(DECODERS["image"], steps=1)
    out = system.values("label_to_image", given, 5, decoders={"image": keep})["image"]
    key = stream(stream(jax.random.key(5), "image", ROWS), "image")
    xt = net.field("image").process.prior(jax.random.split(key)[0], (ROWS, 16))
    batch, _, layout = rows_of(system, "label_to_image", given)
    rows = jax.tree.map(lambda a: jnp.asarray(np.resize(a[-1:], (ROWS, *a.shape[1:]))), batch)
    process, step = net.field("image").process, net.field("image").field.step
    times = step.times(process, 1)
    time = process.network(xt, jnp.broadcast_to(times[0], (ROWS, 1)))[1]
    view = View(rows.replace(tokens={"image": rows.tokens["image"].replace(value=xt)}), layout)
    hidden = net.hidden({"": view.replace(noisy={"image": xt}, times={"image": time})})[""]
    estimate = process.estimate(net.field("image")(hidden.of("image"), hidden.vectors["image"]), xt, times[0])
    wanted, _ = step.step(process, key, estimate, xt, times[0], times[1], (), lambda x, t: estimate)
    close(out[-1], system.fields["image"].codec.decode(wanted)[0], 1e-4)


# --------------------------------------------------------------------------- devices


def placed(params, mesh, cut=()):
    """Parameters on a mesh; those whose path has one of `cut` are split over fsdp along their last axis."""

    def put(path, leaf):
        path = path_string(path)
        split = any(part in path for part in cut) and leaf.shape[-1] % mesh.shape["fsdp"] == 0
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), "fsdp") if split else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(put, params)


def test_rows_are_split_over_the_devices_and_results_are_those_of_one():
    pipeline, params = made(scale=2.0)
    mesh = make_mesh({"data": 4, "fsdp": 2})
    alone = pipeline.with_params(placed(params, make_mesh({"data": 1}, jax.devices()[:1])))
    eight = pipeline.with_params(placed(params, mesh, cut=("mlp", "attention")))
    images = [{"caption": text} for text in ("a handwritten three", "7", "the digit one")]
    one, many = (each.values("caption_to_image", images, 3)["image"] for each in (alone, eight))
    close(one, many, 1e-3)
    said = [{"prompt": "3 plus"}, {"prompt": "after 3"}]
    assert alone("number_sentences", said, 3) == eight("number_sentences", said, 3)
    one, many = (each.lower("caption_to_image", images).compile() for each in (alone, eight))
    # ROWS = 6 and 2 that fill up, twice for guidance: each of the 8 devices has 2 of 16
    slots = alone._request("caption_to_image", images, None, None).program.layout.length
    assert rows_a_device(many, slots) == {2} and rows_a_device(one, slots) == {2 * ROWS}
    assert many.cost_analysis()["flops"] < 0.3 * one.cost_analysis()["flops"]


def rows_a_device(compiled, slots):
    """Rows of the cache [layers, rows, heads, slots, size] in the program of one device."""
    return {int(rows) for rows in re.findall(rf"f32\[2,(\d+),2,{slots},8\]", compiled.as_text())}


def test_frozen_links_work_on_every_device():
    class Doubling:
        rows, params = 2, {"scale": np.float32(2)}

        def compute(self, params, values):
            assert values.shape[0] in (2, 16)
            return values * params["scale"]

        def draw(self, values, key):
            return values

        def decode(self, params, values):
            return values / params["scale"]

    values = np.arange(21, dtype=np.float32)[:, None]
    for mesh in (None, make_mesh({"data": 4, "fsdp": 2})):
        links = FrozenLinks({"image": Doubling()})
        np.testing.assert_array_equal(links.encode("image", values, mesh), 2 * values)
        np.testing.assert_array_equal(links.decode("image", values, mesh), values / 2)
        assert links.encode("text", values, mesh) is values


def test_equal_values_of_guided_rows_are_encoded_once():
    """Those of the rows without conditions; what is to be made is not encoded at all."""

    class Counting:
        def encode(self, row, values, mesh):
            asked.append(row)
            return 2 * values

    asked, images = [], np.arange(8.0).reshape(2, 4, 1)
    rows = Batch({"vision": tokens(images), "image": tokens(images, target=True), "text": tokens(images)})
    null = Batch(rows.tokens | {"text": tokens(0 * images)})
    pipeline, plan = SimpleNamespace(frozen=Counting()), SamplingPlan(("image",))
    first = Pipeline._encoded(pipeline, rows, plan, None)
    found = Pipeline._encoded(pipeline, null, plan, None, (rows, first))
    assert asked == ["vision", "text", "text"] and found.tokens["image"].value.shape == (2, 0)
    for name, value in (("vision", 2 * images), ("text", 0 * images)):
        np.testing.assert_array_equal(found.tokens[name].value, value)


# --------------------------------------------------------------------------- back to values


def test_people_get_pixels_and_texts(system):
    three, seven = system("caption_to_image", [{"caption": "3"}, {"caption": "7"}], seed=0)
    assert three["image"].shape == (8, 8, 1) and three["image"].dtype == np.uint8
    assert (three["image"] != seven["image"]).any()
    (said,) = system("image_to_caption", [{"image": load("test").values[0]}], seed=0)
    assert set(said) == {"text.caption"} and isinstance(said["text.caption"], str)
    assert len(said["text.caption"]) <= 4


def test_a_text_is_what_follows_its_beginning_up_to_its_end():
    field = fields()["text"]
    value = np.array([[1, 65, 66, 67, Bytes.eos, 68], [1, 65, 66, 67, 68, 69]])
    same = lambda row, values: values
    given = np.array([[True, True, False, False, False, False], [True] * 3 + [False] * 3])
    assert decoded(field, value, tokens(value, target=~given), same) == [[66, 67], [67, 68, 69]]


def test_tokens_go_back_to_their_places(system):
    field, images = system.fields["image"], load("test").values[:3]
    value = np.asarray(field.codec.encode(jnp.asarray(images)))
    order = np.stack([np.random.default_rng(i).permutation(16) for i in range(3)])
    place = np.stack([order // 4, order % 4], axis=-1)
    shuffled = np.take_along_axis(value, order[..., None], axis=1)
    np.testing.assert_array_equal(row_major(shuffled, place, (4, 4)), value)
    rows = tokens(shuffled, target=True, place=place)
    same = lambda row, values: values
    np.testing.assert_allclose(decoded(field, shuffled, rows, same), images, atol=1e-6)


@pytest.mark.faults
def test_images_of_buckets_come_out_in_their_own_shape():
    table = fields()
    template = CaptionToImage(buckets=((4, 4), (2, 8), (8, 2)))
    tasks = {"draw": SourceTask("draw", Digits(), template, table)}
    pipeline, params = made(tasks)
    pipeline = pipeline.with_params(params)
    given = [{"caption": "3", "grid": (2, 8)}, {"caption": "3"}, {"caption": "3", "grid": (8, 2)}]
    images = pipeline.values("draw", given, 0)["image"]
    assert [image.shape for image in images] == [(4, 16, 1), (8, 8, 1), (16, 4, 1)]
    wide = pipeline.values("draw", given[:1], 0)["image"]
    close(wide[0], images[0])
    field = pipeline.fields["image"]
    folded = Buckets(((4, 4), (2, 8)), 2).fold(wide, (2, 8))
    again = field.codec.encode(jnp.asarray(folded))
    batch, _, _ = rows_of(pipeline, "draw", given[:1])
    close(decoded(field, np.asarray(again), batch.tokens["image"], lambda row, v: v), wide)


def test_a_part_of_an_image_can_be_given(system):
    """A task whose images are partly given: these tokens come back as they are, and the others change with them."""
    image = load("test").values[:2]
    task = system.tasks["label_to_image"]

    def prompt(examples, null=False):
        layout, batch = task.prompt(examples, null)
        target = np.arange(16)[None] >= np.array([[8], [4]])
        tokens = {"image": dataclasses.replace(batch.tokens["image"], value=image, target=target)}
        return layout, batch.replace(tokens=tokens)

    half = copy.copy(task)
    half.prompt = prompt
    pipeline = dataclasses.replace(system, tasks={"half": half}, leads={("half", "image"): 1})
    out = pipeline.values("half", [{"label": 3}, {"label": 1}], 0)["image"]
    np.testing.assert_allclose(out[0, :4], image[0, :4], atol=1e-6)
    np.testing.assert_allclose(out[1, :2], image[1, :2], atol=1e-6)
    assert np.abs(out[:, 4:] - image[:, 4:]).max() > 0.1


# --------------------------------------------------------------------------- refusals


def test_mistakes_are_told_before_anything_is_compiled():
    pipeline, _ = made()
    image = load("test").values[0]
    for task, given, match in (
        ("poems", [{}], "there is no task 'poems'"),
        ("label_to_image", [], "no examples"),
        ("label_to_image", [{"label": 3, "image": image}], "the examples have it all"),
        ("image_to_caption", [{}], "tasks.image_to_caption: prompt 0"),
        ("label_to_image", [{"label": 12}], "label is no class"),
    ):
        with pytest.raises(ValueError, match=match):
            pipeline.check(task, given)
    without = dataclasses.replace(pipeline, decoders={})
    with pytest.raises(ValueError, match=r"config\.decode has no decoder for image"):
        without.check("label_to_image", [{"label": 3}])


def test_fields_on_the_same_tokens_share_their_times():
    def check(end=1.0, **options):
        box = small.vector_field("box", step=DDIM(**options))
        process = dataclasses.replace(box.process, schedule=Linear(t_max=end))
        rows = {"box": dataclasses.replace(box, process=process), "image": small.vector_field("image")}
        check_times(rows, {"t": FixedLayout((Segment(("image", "box"), 4, 0, "noisy"),))})

    check()  # 1 and 0.999
    told = r"tasks\.t: image and box .*fields\.image\.step and fields\.box\.step differ"
    for options in ({"shift": 3.0}, {"end": 0.5}):
        with pytest.raises(ValueError, match=told):
            check(**options)
