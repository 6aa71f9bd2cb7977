"""Every config builds in every form; published sizes are met without allocating them; nonsense is refused in words."""

import importlib
import pathlib

import jax
import pytest

from configs import (
    backbones,
    digits,
    imagenet256,
    journeydb_ultrachat,
    latentlm,
    llada_8b,
    llava_journeydb,
    showo,
    sit_xl2_imagenet256,
    tinyllama_finetune,
)
from src.build import build_system
from src.common.tree import count_parameters, flatten
from src.data.pipeline.stream import split_batch
from src.models.lora import is_adapter
from src.train.trainable import multipliers

NAMES = sorted(p.stem for p in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
NAMES = [n for n in NAMES if n not in ("__init__", "common", "papers")]
PAPERS = ("imagenet256", "journeydb_ultrachat", "llava_journeydb", "tinyllama_finetune")


LONG = {("copilot4d_digits", "")}  # its codes are learned first
FORMS = [pytest.param(n, v, marks=pytest.mark.faults if (n, v) in LONG else ()) for n in NAMES for v in ("", "debug")]


@pytest.mark.parametrize("name, variant", FORMS)
def test_every_config_builds(name, variant):
    module = importlib.import_module(f"configs.{name}")
    assert "python -m src.main --config=" in module.__doc__
    system = build_system(module.get_config(variant))
    for plan in system.tasks.values():
        fake, spec = plan.task.fake(2, 0), plan.task.element_spec(2)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), fake) == jax.tree.map(lambda a: (a.shape, a.dtype), spec)
    if variant == "debug":
        assert count_parameters(jax.eval_shape(system.init, jax.random.key(0))) < 3_000_000


@pytest.mark.parametrize(
    "config, count",
    [
        (imagenet256.get_config(), 1_121_673_248),
        (imagenet256.get_config("official"), 1_121_673_248),
        (imagenet256.get_config("paper"), 1_121_673_248),
        # the published 675,129,632 hold a fixed table of 256 positions x 1152, which is no parameter here
        (sit_xl2_imagenet256.get_config("official"), 675_129_632 - 256 * 1152),
        # without the row of the head for the mask id
        (llada_8b.get_config(), 8_015_581_184 - 4096),
        # without the layers for the time (a network of 128 numbers, adaLN in 12 blocks and before the head), the biases
        # of the feed-forward layers and the head, the scales of 25 norms, and the head's column for the mask id
        (
            llada_8b.get_config("bd3lm"),
            169_627_218 - 49_408 - 12 * 594_432 - 198_144 - 12 * 3_840 - 50_258 - 25 * 768 - 768,
        ),
        # Phi-1.5 with Show-o's 58,498 ids and norms of queries and keys, 1,448,176,770, without scales and shifts of
        # the norms (shifts alone of those of queries and keys), the text head's biases and the head's mask id
        (showo.get_config(), 1_448_176_770 - 24 * (4096 + 128) - 4096 - 50_305 - 2049),
        # Transformer-XL for vectors of 16 numbers and 1,001 classes, 1,818,806,272 by its shapes, with words and their
        # head for the classes, and scales of 49 norms and biases of the embedding of vectors, which it does not have
        (latentlm.get_config(), 1_818_806_272 - 1001 * 2048 + 2 * 32_004 * 2048 + 49 * 2048 + 2048),
        # without the published model's unused variance outputs
        (sit_xl2_imagenet256.get_config(), 675_129_632 - 256 * 1152 - 16 * 1153),
    ],
)
def test_published_parameter_counts(config, count):
    assert count_parameters(jax.eval_shape(build_system(config).init, jax.random.key(0))) == count


@pytest.mark.parametrize("variant, count", [("", 596_049_920), ("llama32", 1_235_814_400)])
def test_language_models_have_their_published_parameters_beside_the_images(variant, count):
    """And four words more, whose rows are those of the head too."""
    config = backbones.get_config(variant)
    leaves = flatten(jax.eval_shape(build_system(config).init, jax.random.key(0)))
    own = {path: leaf for path, leaf in leaves.items() if path.startswith(("trunk/", "fields/text/"))}
    assert count_parameters(own) == count + 4 * config.model.trunk.width < count_parameters(leaves)


@pytest.mark.parametrize("variant", ["", "official", "paper"])
@pytest.mark.parametrize("name", PAPERS)
def test_the_rows_of_the_papers_configs_divide_over_their_mesh(name, variant):
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    rows = split_batch(config.batch, {n: task.weight for n, task in config.tasks.items()})
    ways = config.mesh.fsdp * config.accumulate
    assert not {n: count for n, count in rows.items() if count % ways}


@pytest.mark.parametrize("module", [journeydb_ultrachat, tinyllama_finetune])
def test_official_chats_are_the_last_pair_with_a_short_question(module):
    template = module.get_config("official").tasks.chat.template
    wanted = {"turns": "last", "question": 128, "length": 512, "train_on_source": True}
    assert {name: template[name] for name in wanted} == wanted


def test_official_chats_about_pictures_have_short_questions_too():
    template = llava_journeydb.get_config("official").tasks.picture_chat.template
    assert (template.question, template.marks, template.train_on_source) == (128, False, True)


def test_the_variant_lora_trains_adapters_alone():
    config = tinyllama_finetune.get_config("lora,debug")
    shapes = flatten(jax.eval_shape(build_system(config).init, jax.random.key(0)))
    assert all(is_adapter(path) for path, share in multipliers(config, shapes).items() if share)


def test_official_preset_is_bug_for_bug():
    system = build_system(imagenet256.get_config("official"))
    parts = [(p.segment.name, p.copy, p.length) for p in system.tasks["class_prompt_to_image"].layout.parts]
    lead = ("image", "lead", 1)
    assert parts == [("text.prompt", "clean", 32), lead, ("image", "noisy", 256), ("text.tail", "clean", 4)]
    config, image = system.config, system.fields["image"]
    assert (config.guidance.features, config.decode.image.steps, image.process.variance) == (12, 20, "learned_range")
    assert build_system(digits.get_config("official")).weights["number_sentences/text"] == 0.01


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"fields.image.process.name": "gausian"}, r"fields.image.process.*gausian.*gaussian"),
        ({"fields.text.codec.name": "text:Sentence"}, "fields.text.codec.*Sentence"),
        ({"tasks.caption_to_image.objectives.diffusion.name": "denoiser"}, "objectives.diffusion.*denoiser"),
        ({"model.trunk.heads": 3}, "width=32.*heads=3"),
        ({"fields.image.codec.device.size": 3}, "fields.image.codec.device.*3.*8 x 8"),
        ({"fields.image.step.name": "gaussian:Leap"}, "fields.image.step.*Leap"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"model.trunk.depth": 0}, r"model.trunk.depth=0"),
        ({"guidance.features": -1}, "guidance.features=-1"),
        ({"fields.image.colour": 1}, "fields.image.*'colour'"),
        ({"tasks.image_to_caption.template.text": "words"}, "tasks.image_to_caption.*words"),
        ({"tasks.image_to_caption.objectives.text.names": ("title",)}, r"objectives.text.*\['title'\]"),
        ({"tasks.caption_to_image.template.dropp": 1}, "tasks.caption_to_image.template.*'dropp'.*drop"),
        ({"tasks.caption_to_image.source.shiftt": 1}, "tasks.caption_to_image.source.*'shiftt'.*shift"),
    ],
)
def test_what_means_nothing_is_refused(changes, match):
    config = digits.get_config("debug")
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=match):
        build_system(config)


def test_unknown_variant():
    with pytest.raises(ValueError, match=r"'debgu'.* official, debug"):
        digits.get_config("debgu")
