"""Golden checkpoints in folders of their own, and the tool that converts them."""

import json
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file

from src.common.files.lazy_arrays import LazyArrays
from src.models.pretrained.initial_weights import Initial
from src.tools import convert
from src.tools.conversion import convert as conversion

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def run(capsys, **flags):
    """(exit code, standard output, standard error) of the tool."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    code = convert.main(["convert", *words])
    return code, *capsys.readouterr()


def copied(name, folder, change=None, shards=1):
    """A golden checkpoint, in files of an index, as `change(tensors, config)` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(GOLDEN / name / "model.safetensors")
    config = json.loads((GOLDEN / name / "config.json").read_text())
    if change:
        change(tensors, config)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    table = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(table.values()):
        save_file({n: t for n, t in tensors.items() if table[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return tensors


def same(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].tobytes() == tensor.tobytes(), name


def understanding(tensors, config):
    """With the projector of a vision encoder and, as some were saved, its frozen tower."""
    rng = np.random.default_rng(0)
    shapes = {"0.weight": (64, 24), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    tensors |= {f"im_embedder.{n}": rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    tensors["vision_encoder.vision_tower.vision_model.x"] = np.zeros(3, np.float16)


def understanding_clip(tensors, config):
    """As today's official code writes it."""
    understanding(tensors, config)
    encoder = {"vision_encoder": "clip", "vision_encoder_path": "openai/clip-vit-large-patch14"}
    config |= encoder | {"vision_encoder_args": {}}


def as_run(folder, tasks, monkeypatch):
    """The workdir of a run with the weights in a folder of initial weights, which it began from."""
    started = Initial(folder)

    def trained(source, options):
        found = LazyArrays({path: np.asarray(leaf) for path, leaf in started.tensors.items()})
        config = {"fields": {"text": {"codec": {"name": "text:Bytes"}}}, "tasks": tasks}
        config["init_from"] = {"path": str(folder)}
        for name, value in started.meta["about"].items():
            *groups, last = name.split(".")
            node = config
            for group in groups:
                node = node.setdefault(group, {})
            node[last] = value
        if "image" in config["fields"]:
            latents = {"name": "pixels", "height": 8, "width": 8, "channels": 4}
            config["fields"]["image"]["codec"] = {"host": latents, "device": {"name": "patch", "size": 2}}
        found.config = config
        return found

    monkeypatch.setattr(conversion, "find_trained", trained)
    workdir = folder.parent / "run"
    (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
    return workdir
