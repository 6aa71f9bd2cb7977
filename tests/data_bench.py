"""A config over generated files of every format, of the size of real ones, for the bench of the data pipelines.

python -m src.tools.bench_data --config=tests/data_bench.py --seconds=20
"""

import json
import os
import pathlib
import tempfile

import numpy as np

from configs import common
from src.codecs.text import train_sentencepiece
from src.data.prepare import ShardPlan, prepare
from src.data.sources.image_folders import ImageFolders
from src.tools.benchmarks.encoders import photograph
from tests.helpers import formats

FOLDER = pathlib.Path(tempfile.gettempdir(), f"monoformer-jax-data-bench-{os.getuid()}")
IMAGES = 128  # different ones; each file is written under several names
SIZE = 256


def write(folder):
    """All formats below the folder."""
    formats.picture = lambda seed, *size: photograph(seed % IMAGES, 375, 500)
    formats.make_imagenet(folder / "imagenet", each=60)
    formats.make_journeydb(folder / "journeydb", rows=300)
    formats.make_llava(folder / "llava", rows=300)
    formats.make_tars(folder / "tars", each=150)
    formats.make_tfds(folder / "tfds", rows=300)
    rng = np.random.default_rng(0)
    letters = np.array([*"aaabcdeeeefghiiijklmnnooopqrrsstttuuvwxyz"])
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(5000)])
    talk = lambda n: " ".join(words[(5000 * rng.random(n) ** 3).astype(int)])  # some words are frequent
    train_sentencepiece([talk(200) for _ in range(1000)], 4000, folder / "tokenizer.model", byte_fallback=True)
    (folder / "chats").mkdir()
    lines = [json.dumps({"data": [talk(40 if t % 2 == 0 else 200) for t in range(8)]}) for _ in range(3000)]
    (folder / "chats" / "train_0.jsonl").write_text("\n".join(lines) + "\n")
    source = ImageFolders(folder / "imagenet" / "train", names=folder / "imagenet" / "names.json")
    for name, size in (("whole", 0), ("small", SIZE)):
        prepare(source, folder / f"shards-{name}", ShardPlan(size=size))
    (folder / "done").touch()


def get_config(name=None):
    """One task for each format."""
    if not (FOLDER / "done").exists():
        write(FOLDER)
    config = common.base()
    config.fields = {
        "text": common.text(name="text:SentencePiece", path=str(FOLDER / "tokenizer.model")),
        "image": common.image(SIZE, SIZE, 3),
        "vision": common.vision(**common.patches_of_squares(224, patch=14)),
    }
    at = lambda *names: str(FOLDER.joinpath(*names))
    names, journey = at("imagenet", "names.json"), at("journeydb", "train_anno.jsonl")
    prompt, caption = {"name": "class_prompt", "length": 64}, {"name": "caption_to_image", "length": 128}
    data = {
        "ImageNet, folders": ({"name": "image_folders", "folder": at("imagenet", "train"), "names": names}, prompt),
        "ImageNet, shards": ({"name": "records", "folder": at("shards-whole")}, prompt),
        "ImageNet, shards of 256 pixels": ({"name": "records", "folder": at("shards-small")}, prompt),
        "ImageNet, TFDS": (
            {"name": "tfds", "folder": at("tfds", "mini", "1.0.0"), "label": "label", "names": names},
            prompt,
        ),
        "JourneyDB": (
            {
                "name": "journeydb",
                "images": at("journeydb", "imgs"),
                "annotations": journey,
            },
            caption | {"caption": "prompt", "phrase": "Please generate an image of {}"},
        ),
        "tar shards": ({"name": "webdataset", "folder": at("tars")}, caption),
        "LLaVA": (
            {"name": "llava", "annotations": at("llava", "llava_mix665k.json"), "images": at("llava", "images")},
            {"name": "picture_chat", "head_length": 32, "length": 256},
        ),
        "UltraChat": ({"name": "ultrachat", "folder": at("chats")}, {"name": "chat", "length": 2048}),
    }
    for task, (source, template) in data.items():
        text = {"LLaVA": "text.rest", "UltraChat": "text"}.get(task)
        objective = common.next_token(text) if text else common.diffusion("image")
        config.tasks[task] = {"weight": 1.0, "source": source, "template": template, "objectives": {"o": objective}}
    return common.variant(config, name)
