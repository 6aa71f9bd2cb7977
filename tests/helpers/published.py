"""Golden checkpoints in folders of their own, and the tool that converts them."""

import dataclasses
import json
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file

from src.codecs.clip_files import FILE, published_names
from src.common.files.lazy_arrays import LazyArrays, place
from src.common.files.safetensors import SafeTensors
from src.common.files.weight_mapping import export_weights, write_weights
from src.common.tree import flatten, listed, unflatten
from src.models.pretrained.initial_weights import Initial
from src.models.pretrained.llama_weights import Published
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


def write_clip(folder, clip, params):
    """config.json and the weights of a vision tower as transformers' `CLIPVisionModel` reads them."""
    config = dataclasses.asdict(clip.config) | {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    write_weights(folder, FILE, export_weights(params, published_names(params, clip.config.num_hidden_layers)), config)


def read_checkpoint(path, like):
    """Parameters of a safetensors checkpoint in the tree `like` (arrays or abstract arrays), in its dtypes.

    `path` is a file, an index of several, or the folder with one (see `SafeTensors`). Leaves of `like` that have a
    sharding are placed by it. Names, shapes and dtypes are compared before any data is read; then a piece at a time is.
    Raises FileNotFoundError, and ValueError listing every missing, extra or misshaped tensor, or why a file is not
    sound.
    """
    found = Published(SafeTensors(path))
    wanted = flatten(like)
    wrong = found.wrong + [f"{p} is missing" for p in wanted if p not in found.shapes]
    wrong += [f"{p} is not in this model" for p in found.shapes if p not in wanted]
    wrong += [
        f"{p} has shape {found.shapes[p].shape}, the model {leaf.shape}"
        for p, leaf in wanted.items()
        if p in found.shapes and found.shapes[p].shape != leaf.shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit the model: {listed(wrong)}")
    return unflatten({p: place(found, p, leaf.dtype, getattr(leaf, "sharding", None)) for p, leaf in wanted.items()})


def reorder(features, size, source, target):
    """Features of patches of size x size in another order: r row in the patch, s column, c channel, slowest first."""
    sizes = {"r": size, "s": size, "c": features.shape[-1] // size**2}
    x = features.reshape(*features.shape[:-1], *(sizes[letter] for letter in source))
    first = features.ndim - 1
    axes = [first + source.index(letter) for letter in target]
    return x.transpose(*range(first), *axes).reshape(features.shape)
