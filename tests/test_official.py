"""The published settings, word for word: a table that nothing but a finding about the publication may change."""

import numpy as np
import pytest
from flax import nnx

from configs import digits, imagenet256, llava_journeydb
from src.common.tree import flatten
from src.models import build
from src.models.build import Fields
from src.models.transformer import Transformer

PUBLISHED = {
    "process": {
        "name": "gaussian:Gaussian",
        "schedule": {"name": "schedules:LinearBetas"},
        "parameterization": "eps",
        "variance": "learned_range",
    },
    "model.conditioning": {"name": "conditioning:TimeToken", "init": "official"},
    "model.image": {"init": "zeros"},
    "model.image_head": {"init": "normal:0.02", "adaln_init": "normal:0.02", "variance": "learned", "order": "rsc"},
    "sample.image.sampler": {"name": "gaussian:Ancestral"},
    "sample.image.steps": 20,
    "ema": {"decay": 0.9999, "warmup": False},
    "model.trunk.qk_norm": False,
    "model.trunk.init": "normal:0.02",
    "model.time.init": "normal:0.02",
    "optim.lr": 1e-4,
    "optim.schedule": "constant",
    "optim.b2": 0.999,
    "optim.weight_decay": 0.0,
    "optim.grad_clip": 2.0,
}


def at(config, path):
    for key in path.split("."):
        config = config[key]
    return config


@pytest.mark.parametrize(
    "module, channels, objectives", [(imagenet256, 3, 1), (digits, 0, 3)], ids=["imagenet", "digits"]
)
def test_the_official_preset_is_the_published_one(module, channels, objectives):
    config = module.get_config("official").to_dict()
    assert {path: at(config, path) for path in PUBLISHED} == PUBLISHED
    assert (config["sample"]["image"]["guidance"]["channels"] or 0) == channels
    found = [o for task in config["tasks"].values() for o in task["objectives"].values()]
    assert len(found) == objectives
    for objective in found:
        if objective["name"] == "diffusion":
            assert (objective["weight"], objective["times"]) == (1.0, {"name": "timesteps:Grid"})
        else:
            assert (objective["name"], objective["weight"]) == ("next_token", 0.01)


def test_every_part_begins_as_published(monkeypatch):
    """By the law of its elements: the deviation of a normal one, the bound of a uniform one, or zero."""
    config = llava_journeydb.get_config("official").model.unlock()
    config.trunk.width = 256
    fields = Fields(vocab=256, patch_features=16, channels=4, grid=(4, 4), vision_features=128)

    monkeypatch.setattr(build, "Transformer", Nothing)  # its weights are those that init_from brings
    model = nnx.state(build.build_model(config.to_dict(), fields, nnx.Rngs(0)), nnx.Param)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(nnx.to_pure_dict(model)).items()}
    normal = ("text/table/embedding", "text_head/linear/kernel", "time/first/kernel", "time/second/kernel",
              "image_head/linear/kernel", "image_head/adaln/kernel")  # fmt: skip
    for path in normal:
        x = leaves.pop(path)
        assert abs(x.std() / 0.02 - 1) < 0.06 and np.abs(x).max() > 0.05, path
    for path, inputs in (("vision/first", 128), ("vision/second", 256)):
        for leaf, near in (("kernel", 0.03), ("bias", 0.2)):
            x = leaves.pop(f"{path}/{leaf}") * inputs**0.5  # in [-1, 1], evenly
            assert 0.9 < np.abs(x).max() <= 1 and abs(x.std() * 3**0.5 - 1) < near, (path, leaf)
    assert not [path for path, leaf in leaves.items() if leaf.any()]
    assert {"image/linear/kernel", "conditioning/first/kernel", "conditioning/second/kernel"} < set(leaves)


class Nothing(Transformer):
    """No trunk."""

    def __init__(self, **options):
        pass
