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
from src.data.prepare import Plan, prepare
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
    for name, size in (("whole", 0), ("small", SIZE)):
        from etils import epath

        from src.data.imagenet import ImageFolders

        source = lambda: ImageFolders(epath.Path(folder / "imagenet" / "train"), folder / "imagenet" / "names.json")
        prepare(source, folder / f"shards-{name}", Plan(size=size))
    (folder / "done").touch()


def get_config(name=None):
    """One task for each format."""
    if not (FOLDER / "done").exists():
        write(FOLDER)
    config = common.base()
    config.text_codec.update({"name": "text:SentencePiece", "path": str(FOLDER / "tokenizer.model")})
    with config.unlocked():
        config.vision = {"name": "vision:Pixels", "size": 224, "patch": 14}
    names = str(FOLDER / "imagenet" / "names.json")
    tfds = {"name": "tfds:ClassPromptToImage", "folder": str(FOLDER / "tfds" / "mini" / "1.0.0")}
    prompt = {"name": "imagenet:ClassPromptToImage", "size": SIZE, "prompt_length": 64, "names": names}
    caption = {"size": SIZE, "length": 128}
    chat = {"name": "chats:ChatToText", "length": 2048, "folder": str(FOLDER / "chats")}
    data = {
        "ImageNet, folders": prompt | {"folder": str(FOLDER / "imagenet" / "train")},
        "ImageNet, shards": prompt | {"records": str(FOLDER / "shards-whole")},
        "ImageNet, shards of 256 pixels": prompt | {"records": str(FOLDER / "shards-small")},
        "ImageNet, TFDS": prompt | tfds,
        "JourneyDB": caption | {"name": "journeydb:CaptionToImage", "images": str(FOLDER / "journeydb" / "imgs"),
                                "annotations": str(FOLDER / "journeydb" / "train_anno.jsonl")},
        "tar shards": caption | {"name": "tars:CaptionToImage", "folder": str(FOLDER / "tars")},
        "LLaVA": {"name": "llava:PictureChatToText", "annotations": str(FOLDER / "llava" / "llava_mix665k.json"),
                  "images": str(FOLDER / "llava" / "images"), "head_length": 32, "length": 256},
        "UltraChat": chat,
    }  # fmt: skip
    for task, options in data.items():
        drawn = task not in ("LLaVA", "UltraChat")
        text = common.next_token("text" if task == "UltraChat" else "rest")
        config.tasks[task] = {"share": 1.0, "data": options, "objectives": {"o": common.diffusion() if drawn else text}}
    return common.variant(config, name)
