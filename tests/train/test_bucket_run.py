"""The whole path of buckets with an autoencoder: pictures or their moments, training, resuming, drawing in a bucket."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_dict
from PIL import Image

from src.build import build_system
from src.codecs.buckets import Buckets
from src.codecs.vae_files import read_vae
from src.common.rng import step_key, stream
from src.tools import latents, show_batch
from src.train.system import draw
from src.train.trainer import make_trainer, open_data
from tests.helpers.autoencoder import write_tiny
from tests.helpers.compiling import ENVIRONMENT

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
ROOT = pathlib.Path(__file__).parents[2]
GRIDS = ((4, 4), (2, 8), (8, 2))
PIXELS, LATENTS = Buckets(GRIDS, 4), Buckets(GRIDS, 2)
SIDES = [(20, 18), (9, 35), (40, 9), (17, 16), (8, 40), (33, 8), (16, 16), (12, 40)]
CONFIG = f"""
from configs import common
def get_config(name=""):
    config = common.base()
    image = common.image(16, 16, 3)
    image["codec"]["frozen"] = {{"name": "vae_latents", "path": "vae", "factor": 2}}
    sources = {{"draw": {{"name": "captions", "folder": "pictures"}}}}
    sources["packed"] = {{"name": "documents", "folder": "documents"}}
    if "moments" in name:
        sources["draw"] = {{"name": "records", "folder": "moments", "moments": True}}
        sources["packed"] = {{"name": "records", "folder": "documents-moments", "moments": True}}
    templates = {{"draw": {{"name": "caption_to_image", "length": 16, "drop": 0.0, "buckets": {GRIDS}}}}}
    templates["packed"] = {{"name": "packed", "length": 64, "images": 2, "buckets": {GRIDS}}}
    with config.unlocked():
        config.fields = {{"text": common.text(name="text:Bytes"), "image": image}}
        config.tasks = {{
            task: {{
                "weight": 1.0,
                "source": sources[task],
                "template": templates[task],
                "objectives": {{"diffusion": common.diffusion()}},
            }}
            for task in sources
        }}
    config = common.debug(config)
    config.batch, config.checkpoint.every = 16, 2
    config.mesh.data = 1 if "one" in name else 8
    return config.lock()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny autoencoder, eight pictures of three ratios in captions and documents, and the moments of
    both."""
    home = tmp_path_factory.mktemp("buckets")
    for name in ("src", "configs"):
        (home / name).symlink_to(ROOT / name)
    write_tiny(home / "vae")
    for folder, file in (("pictures", "captions.jsonl"), ("documents", "documents.jsonl")):
        (home / folder).mkdir()
        lines = []
        for i, (height, width) in enumerate(SIDES):
            pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / folder / f"{i}.png")
            parts = [{"text": f"{i}"}, {"image": f"{i}.png"}, {"image": f"{(i + 1) % 8}.png"}][: 2 + i % 2]
            lines.append({"image": f"{i}.png", "caption": f"{i}"} if folder == "pictures" else {"parts": parts})
        (home / folder / file).write_text("\n".join(map(json.dumps, lines)))
    (home / "buckets.py").write_text(CONFIG)
    here = pathlib.Path.cwd()
    os.chdir(home)
    yield home
    os.chdir(here)


def config_of(name):
    space = {}
    exec(CONFIG, space)
    return config_dict.ConfigDict(space["get_config"](name))


def placed(name, devices):
    """The first rows of both tasks, as data deliver them and as the step gets them."""
    trainer = make_trainer(build_system(config_of(name)), jax.devices()[:devices])
    data = open_data(trainer)
    rows = next(data)
    data.close()
    return trainer.system, rows, trainer.place(rows, 3)


def grids_of(tokens):
    """Rows and columns of each image."""
    return tokens.place.max(axis=-2) + 1


def moments(home, image):
    """Of one picture `[h, w, 3]` by itself, in its own shape."""
    vae, params = read_vae(home / "vae")
    return np.concatenate(vae.moments(params, jnp.asarray(image)[None]), axis=-1)[0]


def test_pictures_and_their_moments_are_the_same_latents_on_any_number_of_devices(home):
    common = ["--vae=vae", "--batch=1"]
    flags = [*common, f"--config={home}/buckets.py", "--task=draw", "--out=moments"]
    assert latents.main(["latents", *flags]) == 0
    flags = [*common, "--source=documents", "--set=folder=documents", "--out=documents-moments"]
    assert latents.main(["latents", *flags, "--size=16", "--buckets=16x16,8x32,32x8"]) == 0
    system, rows, first = placed("one", 1)
    for task in ("draw", "packed"):
        tokens, found = rows[task].tokens["image"], np.asarray(first[task].tokens["image"].value)
        assert {tuple(grid) for grid in grids_of(tokens).reshape(-1, 2).tolist()} == set(GRIDS)
        assert found.shape == (*tokens.value.shape[:-3], 8, 8, 4)
        wanted = np.zeros((*found.shape[:-1], 8), np.float32)
        for at in np.ndindex(found.shape[:-3]):
            if tokens.valid[at].any():
                grid = tuple(grids_of(tokens)[at].tolist())
                wanted[at] = LATENTS.fold(moments(home, PIXELS.unfold(tokens.value[at], grid)), grid)
        key = stream(step_key(np.uint32(system.config.seed), np.int32(3)), f"{task}/image/codec")
        net = system.encoders.nets["image"]
        drawn = net.draw(jnp.asarray(wanted.reshape(-1, 8, 8, 8)), key).reshape(found.shape)
        np.testing.assert_allclose(found, drawn, atol=1e-5)
    for name, devices, far in (("eight", 8, 1e-5), ("moments,one", 1, 3e-3), ("moments,eight", 8, 3e-3)):
        _, other, second = placed(name, devices)
        for task in ("draw", "packed"):
            tokens = rows[task].tokens["image"]
            np.testing.assert_array_equal(tokens.place, other[task].tokens["image"].place)
            a, b = (np.asarray(batch[task].tokens["image"].value)[tokens.valid.any(-1)] for batch in (first, second))
            np.testing.assert_allclose(a, b, atol=far)
    config = config_of("moments,one")
    config.tasks.draw.template.buckets = GRIDS[:2]
    with pytest.raises(ValueError, match="hold moments of the buckets 8 x 8, 4 x 16, 16 x 4, and the task reads"):
        open_data(make_trainer(build_system(config), jax.devices()[:1]))


def run(home, *words):
    """What a command says, which ends well."""
    env = os.environ | ENVIRONMENT | {"XDG_CACHE_HOME": str(home / "cache")}
    done = subprocess.run([sys.executable, *words], cwd=home, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_a_run_is_resumed_and_draws_in_a_bucket(home):
    command = ["-m", "src.main", "--config=buckets.py:one"]
    logs = {}
    for name in ("whole", "parts"):
        if name == "parts":
            run(home, *command, f"--workdir={name}", "--config.steps=2")
        said = run(home, *command, f"--workdir={name}", "--config.steps=4")
        assert ("resuming from step 2" in said) == (name == "parts")
        lines = [json.loads(line) for line in (home / name / "log.jsonl").read_text().splitlines()]
        logs[name] = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert logs["whole"] == logs["parts"] and 4 in logs["whole"] and np.isfinite(list(logs["whole"].values())).all()
    sizes = {}
    for task in ("draw", "packed"):
        for grid in ("2x8", "8x2"):
            flags = ["--mode=sample", "--prompt=1", "--count=2", f"--task={task}", f"--grid={grid}"]
            run(home, *command, "--workdir=whole", "--config.steps=4", *flags, f"--output={task}-{grid}.png")
            sizes[grid] = Image.open(home / f"{task}-{grid}.png").size
        assert sizes["2x8"][1] < sizes["8x2"][1], "wide pictures, then high ones"


def test_a_batch_is_shown_in_its_buckets(home):
    system, rows, ready = placed("one", 1)
    tokens, views = ready["draw"].tokens["image"], draw(system, ready, jax.random.key(0))[0]
    grids = [tuple(grid) for grid in grids_of(rows["draw"].tokens["image"]).tolist()]
    vae, params = read_vae(home / "vae")
    shown = show_batch.images_of(system, "image", views["draw"].batch.tokens["image"].value, tokens)
    for i, image in enumerate(shown):
        own = LATENTS.unfold(np.asarray(tokens.value)[i], grids[i])
        np.testing.assert_allclose(image, np.clip(vae.decode(params, jnp.asarray(own)[None])[0], -1, 1), atol=1e-5)
    assert show_batch.main(["show_batch", f"--config={home}/buckets.py", "--task=draw", f"--out={home}/seen"]) == 0
    files = {path.name for path in (home / "seen").glob("draw*x3.png")}
    assert len(files) in (1, 2) and files < {f"draw-{h}x{w}x3.png" for h, w in map(PIXELS.pixels, GRIDS)}
