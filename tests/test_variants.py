"""Variants of a config compose: in any order the same, every field as one of them says, and which one is in a table."""

import importlib
import itertools

import pytest

from src.train.checkpoints.config_changes import fields, plain

VARIANTS = {
    "imagenet256": ("official", "paper", "pixels", "debug"),
    "journeydb_ultrachat": ("official", "paper", "pixels", "debug"),
    "llava_journeydb": ("official", "paper", "vae", "pixels", "debug"),
    "tinyllama_finetune": ("official", "paper", "lora", "keep", "debug"),
}
TIME = {"model.conditioning.name": "conditioning:AdaLNBeforeTrunk", "model.conditioning.init": "normal:0.02"}
LENGTH = "tasks.caption_to_image.template.length"
# What a pair ends with where both change a field, or one of them makes something else of what the other one made.
ENDS = {
    ("imagenet256", "official", "paper"): TIME,
    ("imagenet256", "official", "debug"): {"batch": 88, "decode.image.steps": 2},
    ("imagenet256", "pixels", "debug"): {},
    ("journeydb_ultrachat", "official", "paper"): TIME,
    ("journeydb_ultrachat", "official", "debug"): {
        "batch": 80, "decode.image.steps": 2, "tasks.chat.source.split": 0, LENGTH: 64
    },
    ("journeydb_ultrachat", "pixels", "debug"): {},
    ("llava_journeydb", "official", "paper"): TIME | {"batch": 1024, "mesh.fsdp": 16},
    ("llava_journeydb", "official", "debug"): {"batch": 64, "mesh.fsdp": 1, "decode.image.steps": 2, LENGTH: 64},
    ("llava_journeydb", "paper", "debug"): {"batch": 64},
    ("llava_journeydb", "vae", "debug"): {
        f"fields.vision.codec.{key}": value for key, value in {
            "host.height": 8, "host.width": 8, "device.size": 2, "frozen.name": "vae_latents", "frozen.factor": 2,
            "frozen.path": "data/sd-vae", "frozen.channels": 4, "frozen.dtype": "float32",
        }.items()
    },
    ("llava_journeydb", "pixels", "debug"): {},
    ("tinyllama_finetune", "official", "paper"): {"optim.grad_clip": 1.0},
    ("tinyllama_finetune", "official", "lora"): {"optim.lr": 2e-4},
    ("tinyllama_finetune", "official", "debug"): {
        "decode.image.steps": 2, "tasks.chat.template.length": 256, "optim.warmup": 0
    },
    ("tinyllama_finetune", "paper", "lora"): {"optim.lr": 2e-4},
    ("tinyllama_finetune", "paper", "debug"): {"optim.warmup": 0},
}  # fmt: skip
PAIRS = [(config, *pair) for config, names in VARIANTS.items() for pair in itertools.combinations(names, 2)]


@pytest.mark.parametrize("config, first, second", PAIRS)
def test_a_pair_of_variants_means_the_same_in_any_order(config, first, second):
    def get(name):
        return fields(plain(importlib.import_module(f"configs.{config}").get_config(name)))

    usual, one, other, both = get(""), get(first), get(second), get(f"{first},{second}")
    assert get(f"{second},{first}") == both
    ends = ENDS.get((config, first, second), {})
    for field in {*usual, *one, *other, *both}:
        was, left, right = (c.get(field) for c in (usual, one, other))
        if field not in ends:
            assert left in (was, right) or right == was, f"{field}: {first} says {left!r}, {second} {right!r}"
        assert both.get(field) == ends.get(field, left if right == was else right), field


@pytest.mark.parametrize("config", VARIANTS)
def test_these_are_all_the_variants(config):
    header = importlib.import_module(f"configs.{config}").__doc__
    assert not [name for name in VARIANTS[config] if f"`{name}`" not in header[header.index("Variants:") :]]
    with pytest.raises(ValueError, match=rf"'none' is unknown; there are {', '.join(VARIANTS[config])}$"):
        importlib.import_module(f"configs.{config}").get_config("none")
