"""The published settings, word for word: a table that nothing but a finding about the publication may change."""

import jax
import numpy as np
import pytest
from flax import nnx

from configs import digits, imagenet256, journeydb_ultrachat, llava_journeydb
from src.build import build_field
from src.codecs.text import Bytes
from src.common.lookup import build as build_part
from src.common.tree import flatten
from src.data.example import Example
from src.data.task import SourceTask
from src.data.templates._base import Request
from src.models import build
from src.models.transformer import Transformer
from tests.helpers.fields import table

PUBLISHED = {
    "fields.image.process": {
        "name": "gaussian:Gaussian",
        "schedule": {"name": "schedules:LinearBetas"},
        "parameterization": "eps",
        "variance": "learned_range",
    },
    "model.conditioning": {"name": "conditioning:TimeToken", "init": "official"},
    "fields.image.embed": {"name": "patches", "init": "zeros"},
    "fields.image.step": {"name": "ancestral"},
    "decode.image.steps": 20,
    "ema.decay": 0.9999,
    "ema.warmup": False,
    "ema.more": (),
    "ema.power": (),
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
    "module, channels, guided, objectives", [(imagenet256, 4, 12, 1), (digits, 1, 0, 3)], ids=["imagenet", "digits"]
)
def test_the_official_preset_is_the_published_one(module, channels, guided, objectives):
    config = module.get_config("official").to_dict()
    assert {path: at(config, path) for path in PUBLISHED} == PUBLISHED
    head = {"name": "adaln", "init": "normal:0.02", "adaln_init": "normal:0.02", "order": "rsc", "channels": channels}
    assert config["fields"]["image"]["head"] == head and config["guidance"]["features"] == guided
    found = [o for task in config["tasks"].values() for o in task["objectives"].values()]
    assert len(found) == objectives
    for objective in found:
        if objective["name"] == "diffusion":
            assert (objective["weight"], objective["timesteps"]) == (1.0, {"name": "timesteps:Grid"})
        else:
            assert (objective["name"], objective["weight"]) == ("next_token", 0.01)


@pytest.mark.parametrize("module", [journeydb_ultrachat, llava_journeydb])
def test_long_prompts_of_journeydb_are_cut_where_the_released_scripts_cut_them(module):
    template = module.get_config("official").tasks.caption_to_image.template.to_dict()
    template = build_part("data/templates", template)
    codec, image = Bytes(), np.zeros((8, 8, 3), np.uint8)
    SourceTask("t", [{}], template, table(codec, (8, 8, 3)))
    row = template.row(Example({"prompt": "x" * 300, "image": image}), Request())
    ids = row["text.prompt/ids"][row["text.prompt/valid"]]
    words = "Please generate an image of " + "x" * 300
    assert ids.tolist() == [*[codec.bos, *codec.encode(words)][:128], codec.image_start]
    tail = row["text.tail/ids"][row["text.tail/valid"]]
    assert tail.tolist() == [codec.image_end, *codec.encode("\n"), codec.eos]


def test_every_part_begins_as_published(monkeypatch):
    """By the law of its elements: the deviation of a normal one, the bound of a uniform one, or zero."""
    config = llava_journeydb.get_config("official,debug").unlock()
    config.model.trunk.width = 256
    config.fields.text.codec = {"name": "text:Bytes"}
    monkeypatch.setattr(build, "Transformer", Nothing)  # its weights are those that init_from brings
    fields = {n: build_field(n, group, lambda what, link: ()) for n, group in config.fields.items()}
    model = build.build_model(config.model.to_dict(), config.fields.to_dict(), fields, jax.random.key(0))
    leaves = flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    leaves = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    normal = ("fields/text/embed/table/embedding", "fields/text/head/linear/kernel", "time/first/kernel",
              "time/second/kernel", "fields/image/head/linear/kernel", "fields/image/head/adaln/kernel")  # fmt: skip
    for path in normal:
        x = leaves.pop(path)
        assert abs(x.std() / 0.02 - 1) < 0.06 and np.abs(x).max() > 0.05, path
    inputs = {"first": fields["vision"].spec.features, "second": 256}
    for layer, count in inputs.items():
        for leaf, near in (("kernel", 0.03), ("bias", 0.2)):
            x = leaves.pop(f"fields/vision/embed/{layer}/{leaf}") * count**0.5  # in [-1, 1], evenly
            assert 0.9 < np.abs(x).max() <= 1 and abs(x.std() * 3**0.5 - 1) < near, (layer, leaf)
    assert not [path for path, leaf in leaves.items() if leaf.any()]
    found = {"fields/image/embed/linear/kernel", "conditioning/first/kernel", "conditioning/second/kernel"}
    assert found < set(leaves)


class Nothing(Transformer):
    """No trunk."""

    mot = ()

    def __init__(self, **options):
        pass
