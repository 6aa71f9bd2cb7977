"""D-DiT: of a pair only one is noised, both losses are the published ones, and one checkpoint makes both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ddit_digits
from src.build import build_system
from src.common.tree import count_parameters
from src.data.sources.digits import Digits
from src.train.trainer import make_trainer, open_data


@pytest.fixture(scope="module")
def system():
    return build_system(ddit_digits.get_config("debug"))


def test_of_a_pair_one_is_noised_and_all_tokens_see_each_other(system):
    """Words that are given are clean, and so is the image of a caption; nothing is causal."""
    copies = {}
    for name, plan in system.tasks.items():
        parts = {p.segment.name: p for p in plan.layout.parts if p.copy != "lead"}
        copies[name] = {p.copy for p in parts.values()}, [n for n, p in parts.items() if p.copy == "noisy"]
        read, write, group = plan.layout.static_orders()
        sees = (write[None] <= read[:, None]) | (group[None] == group[:, None]) & (group[None] > 0)
        at = lambda part, parts=parts: slice(parts[part].start, parts[part].start + parts[part].length)
        words, image = at("text.prompt" if name == "caption_to_image" else "text.caption"), at("image")
        made, given = (image, words) if name == "caption_to_image" else (words, image)
        assert sees[words, words].all() and sees[image, image].all() and sees[made, given].all()
    assert copies == {
        "caption_to_image": ({"clean", "noisy"}, ["image"]),
        "image_to_caption": ({"clean", "noisy"}, ["text.caption"]),
    }


def test_captions_are_whole_blocks(system):
    """Targets are the words and </s> up to the end of the block; a beginning of a prompt is given."""
    task, codec = system.tasks["image_to_caption"].task, system.fields["text"].codec.host
    row = task.read("test", 0)
    ids, target = row["text.caption/ids"], row["text.caption/target"]
    said = codec.encode(Digits()[1437]["caption"][0])
    assert ids.tolist() == [codec.image_end, *said, *[codec.eos] * (len(ids) - 1 - len(said))]
    assert target.tolist() == [False, *[True] * (len(ids) - 1)] and row["text.caption/valid"].all()
    asked = {"image": Digits()[0]["image"], "prompt": "a handwritten"}
    tokens = task.prompt([asked])[1].tokens["text.caption"]
    assert tokens.value[0, 1:3].tolist() == codec.encode("a handwritten")
    assert tokens.target[0].tolist() == [False] * 3 + [True] * (len(ids) - 3)


def test_the_losses_are_the_published_ones(system):
    """|x_0 - (x_t - t v)|² of a velocity v, and d sigma / (e^sigma - 1) of masked words with sigma = -log(1 - t)."""
    image, words = (next(iter(plan.objectives.values()))[0] for plan in system.tasks.values())
    process = system.fields["image"].process

    @jax.jit
    def both():
        x, n, v = jax.random.normal(jax.random.key(0), (3, 5, *process.field.grid, process.field.features))
        x, n, v = (a.reshape(5, -1, a.shape[-1]) for a in (x, n, v))
        t = jnp.linspace(0.1, 0.9, 5)[:, None]
        c = process.corrupt(x, n, t)
        weight = image.losses["image"].weighting(process.schedule, t, process.parameterization)
        found = weight * ((v - process.targets(c)["velocity"]) ** 2).mean(-1)
        return found, ((x - (c.xt - t[..., None] * v)) ** 2).mean(-1), t, system.fields["text"].process.rate(t)

    found, wanted, t, rate = both()
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    t = np.asarray(t, np.float64)
    np.testing.assert_allclose(rate, 1 / (1 - t) / np.expm1(-np.log1p(-t)), rtol=1e-5)
    assert words.losses["text.caption"].elbo and system.weights["image_to_caption/text"] == 0.2


def trained(variant, steps=120):
    """Means of the last held-out losses by name, after a short run of the small trunk."""
    config = ddit_digits.get_config(variant).unlock()
    config.model.trunk.update({"width": 32, "depth": 2, "heads": 2, "kv_heads": 2, "mlp_width": 64})
    config.steps, config.mesh.data, config.eval.evaluators, config.optim.warmup = steps, 1, {}, 10
    trainer = make_trainer(build_system(config.lock()), jax.devices()[:1])
    state, data, step, found = trainer.init(), open_data(trainer), trainer.compile(), []
    with jax.set_mesh(trainer.mesh):
        for number in range(steps):
            state, measured = step(state, trainer.place(next(data), number))
            found.append({name: float(term.total / term.count) for name, term in measured.terms.items()})
    data.close()
    mean = lambda name, part: np.mean([each[name] for each in part])
    image, words = "caption_to_image/image/mse", "image_to_caption/text/nll"
    return mean(image, found[-30:]), mean(words, found[:10]), mean(words, found[-30:])


@pytest.mark.faults
def test_words_are_learned_beside_images():
    """With the weight 0.2 the bound of the words falls, with 0 it does not; the images' loss stays within 5 %."""
    image, first, last = trained("")
    alone, _, without = trained("unread")
    assert last < 0.2 * first and without > 0.8 * first, (first, last, without)
    assert image < 1.05 * alone, (image, alone)


@pytest.mark.faults
def test_both_directions_sample_from_one_checkpoint(system):
    """What is made goes on behind the beginning of a caption; no mask is left, and images are finite."""
    pipeline = system.pipeline.with_params(jax.jit(system.init)(jax.random.key(0)))
    image, codec = Digits()[3]["image"], system.fields["text"].codec.host
    made = pipeline.values("image_to_caption", [{"image": image, "prompt": "the digit"}] * 3, 0)["text.caption"]
    left = system.tasks["image_to_caption"].layout.segment("text.caption").length - 3
    assert all(len(ids) <= left and max(ids, default=0) < codec.vocab_size for ids in made), made
    images = pipeline.values("caption_to_image", [{"caption": "a handwritten three"}] * 3, 0)["image"]
    assert images.shape == (3, *image.shape) and np.isfinite(images).all()


def test_published_sizes_build():
    """SD3-medium's 2,028,328,000 (counted by its shapes) in two streams: without the modulation of the words' stream
    (23 layers of 1536 x 9216 and one of 1536 x 3072), with the rest of their last block, without the pooled texts' and
    T5's projections, with a table and a head of 32,128 words and a mask in T5's place."""
    system = build_system(ddit_digits.get_config("published"))
    width, affine = 1536, lambda a, b: a * b + b
    count = 2_028_328_000 - 23 * affine(width, 6 * width) - affine(width, 2 * width)
    count += affine(width, width) + affine(width, 4 * width) + affine(4 * width, width)
    count -= affine(2048, width) + affine(width, width) + affine(4096, width)
    count += width * (32_129 + 32_128)
    assert count_parameters(jax.eval_shape(system.init, jax.random.key(0))) == count == 1_805_952_064
