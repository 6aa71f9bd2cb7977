"""The published settings, word for word: a table that nothing but a finding about the publication may change."""

import pytest

from configs import digits, imagenet256

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
    "optim.max_norm": 2.0,
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
        if objective["name"] == "denoise":
            assert (objective["weight"], objective["times"]) == (1.0, {"name": "times:Grid"})
        else:
            assert (objective["name"], objective["weight"]) == ("next_token", 0.01)
