"""Small files of the true forms for `:debug`, where the data and weights that its config names are not on this machine.

They lie in one temporary folder and are made once, so that a run goes on with what it began with. Nothing in them is
real: noise for images, invented sentences for texts, random weights.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from absl import flags, logging

from src.common.files.paths import at_home
from src.common.runtime import config_flag
from src.common.runtime.config_keys import CONFIGS, check_keys

TEXTS = ("Please generate an image of a red fox.", "What is it? A tench.", "Question 3? Answer 3: it is so.")
ROWS = 240
SYNSETS = ("n01440764", "n02012849", "n03126707", "n03710637", "n03710721")


def fill_for(values: flags.FlagValues) -> list[str]:
    """`fill` for a command line whose config is a `:debug` of configs/. What a config elsewhere names is a person's own
    data, and stays."""
    file = os.path.realpath(config_flag.name_of(values).partition(":")[0])
    if "debug" not in config_flag.variants(values) or os.path.dirname(file) != os.path.realpath(CONFIGS):
        return []
    return fill(values["config"].value, config_flag.overrides(values))


def fill(config: Any, given: Collection[str] = ()) -> list[str]:
    """Points every path of a config that is not there to a file of its form, and returns the keys, in order.

    given   keys that the command line set: a path there that is wrong is a mistake

    Tokenizers and autoencoders come first, because initial weights and latents are made with them. Raises
    FileNotFoundError for a missing path in `given`, and ValueError as `check_keys` does.
    """
    check_keys(config)
    made: list[str] = []

    def use(group: Any, key: str, where: str, name: str, make: Callable[[pathlib.Path], Any]) -> None:
        path = os.fspath(group.get(key) or "")
        if not path or "://" in path or os.path.exists(at_home(path)):
            return
        if any(where == each or where.startswith(f"{each}.") for each in given):
            raise FileNotFoundError(f"--config.{where}={path} does not exist: correct it, or leave it out")
        group[key] = str(_once(name, make))
        made.append(where)
        logging.warning("%s=%s does not exist: :debug goes on with invented content in %s", where, path, group[key])

    for row, field in config.fields.items():
        codec = field.codec
        if codec.get("name") == "text:Llama":
            before = codec.path
            use(codec, "path", f"fields.{row}.codec.path", "tokenizer.model", _tokenizer)
            if codec.path != before:
                codec.pieces = _pieces(codec.path)
        frozen = codec.get("frozen")
        if frozen and frozen.name == "vae_latents":
            name = f"autoencoder-{frozen.factor}-{frozen.channels}"
            use(frozen, "path", f"fields.{row}.codec.frozen.path", name, lambda at, f=frozen: _autoencoder(at, f))
    trunk = config.model.trunk
    llama = "text" in config.fields and config.fields.text.codec.get("name") == "text:Llama"
    if llama and config.init_from.path and "init_from.path" not in given:  # a resumed run does not need the folder
        vocabulary = _pieces(config.fields.text.codec.path)
        sizes = "-".join(str(trunk[key]) for key in ("width", "depth", "heads", "kv_heads", "mlp_width"))
        use(config.init_from, "path", "init_from.path", f"llama-{sizes}", lambda at: _llama(at, trunk, vocabulary))
    for name, task in config.tasks.items():
        source, where = task.source, f"tasks.{name}.source"
        if source.name == "records":
            image = config.fields.image.codec
            labels = task.template.name == "class_label" and config.fields.label.codec.count
            base = "classes" if labels or task.template.name == "class_prompt" else "journeydb"
            label = f"{base}{labels or ''}-{image.host.height}-{pathlib.Path(image.frozen.path).name}"
            use(source, "folder", f"{where}.folder", label, lambda at, i=image, b=base, c=labels: _latents(at, i, b, c))
        for key, file, make in FORMS.get(source.name, ()):
            before, label = source.get(key), make.__name__.strip("_")
            use(source, key, f"{where}.{key}", label, make)
            if source.get(key) != before:
                source[key] = str(pathlib.Path(source[key]) / file)
    return made


def _home() -> pathlib.Path:
    return pathlib.Path(tempfile.gettempdir()) / f"monoformer-jax-debug-{os.getuid()}"


def _once(name: str, make: Callable[[pathlib.Path], Any]) -> pathlib.Path:
    """The path of what `make` writes, made under another name first, so that it is there whole or not at all."""
    home = _home()
    home.mkdir(mode=0o700, exist_ok=True)
    if home.stat().st_uid != os.getuid():
        raise OSError(f"{home} belongs to another user: remove it, or set TMPDIR to a folder of your own")
    path = home / name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=home) as draft:
            make(pathlib.Path(draft) / name)
            try:
                os.replace(pathlib.Path(draft) / name, path)
            except OSError:
                if not path.exists():  # or else another process was faster
                    raise
    return path


def _tokenizer(path: pathlib.Path) -> None:
    """A model of Llama's format."""
    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_writer=file, model_type="bpe", vocab_size=340, byte_fallback=True,
        split_digits=True, hard_vocab_limit=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, character_coverage=1.0,
        minloglevel=3, remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    path.write_bytes(file.getvalue())


def _pieces(path: str) -> int:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=os.fspath(path)).get_piece_size()


def _autoencoder(folder: pathlib.Path, link: Any) -> None:
    """Stable Diffusion's autoencoder, tiny."""
    import jax

    from src.codecs.vae import Vae, VaeConfig
    from src.codecs.vae_files import write_vae

    levels = (8,) * (int(link.factor).bit_length())
    vae = Vae(VaeConfig(levels, layers_per_block=1, norm_num_groups=4, latent_channels=link.channels))
    write_vae(folder, vae, vae.init(jax.random.key(0)))


def _llama(folder: pathlib.Path, trunk: Any, vocabulary: int) -> None:
    """A Llama of the trunk's sizes as it is published, with random weights, as `src.tools.convert` writes it."""
    from safetensors.numpy import save_file

    from src.tools.conversion import convert

    width, head = trunk.width, trunk.get("head_dim") or trunk.width // trunk.heads
    matrices = {"self_attn.q_proj": (head * trunk.heads, width), "self_attn.k_proj": (head * trunk.kv_heads, width),
                "self_attn.v_proj": (head * trunk.kv_heads, width), "self_attn.o_proj": (width, head * trunk.heads),
                "mlp.gate_proj": (trunk.mlp_width, width), "mlp.up_proj": (trunk.mlp_width, width),
                "mlp.down_proj": (width, trunk.mlp_width), "input_layernorm": (width,),
                "post_attention_layernorm": (width,)}  # fmt: skip
    shapes = {f"model.layers.{i}.{n}.weight": s for i in range(trunk.depth) for n, s in matrices.items()}
    shapes |= {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    shapes |= {"model.norm.weight": (width,)}
    rng = np.random.default_rng(0)
    tensors = {n: (rng.normal(0, 0.02, s) + (len(s) == 1)).astype(np.float32) for n, s in shapes.items()}
    told = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width,
            "intermediate_size": trunk.mlp_width, "num_hidden_layers": trunk.depth,
            "num_attention_heads": trunk.heads, "num_key_value_heads": trunk.kv_heads, "vocab_size": vocabulary,
            "max_position_embeddings": 2048, "rms_norm_eps": trunk.norm_epsilon,
            "rope_theta": trunk.rope_theta}  # fmt: skip
    with tempfile.TemporaryDirectory() as published:
        save_file(tensors, f"{published}/model.safetensors", metadata={"format": "pt"})
        pathlib.Path(published, "config.json").write_text(json.dumps(told))
        for _ in convert.convert(convert.find(published), str(folder), convert.Options()):
            pass


def _latents(folder: pathlib.Path, codec: Any, base: str, classes: int) -> None:
    """Moments of latents, as `src.tools.latents` writes them, of class folders or of JourneyDB's images."""
    from src.tools import latents

    with tempfile.TemporaryDirectory() as place:
        raw = pathlib.Path(place) / "raw"
        words = [
            "latents",
            f"--vae={codec.frozen.path}",
            f"--size={codec.host.height}",
            f"--out={folder}",
            "--batch=64",
        ]
        if base == "classes":
            _imagenet(raw, classes)
            words += ["--source=image_folders", f"--set=folder={raw}/train", f"--set=names={raw}/names.json"]
        else:
            _journeydb(raw)
            words += ["--source=journeydb", f"--set=annotations={raw}/train_anno.jsonl", f"--set=images={raw}/imgs"]
        values = latents.define()
        values(words)
        latents.run(values, None)


def _imagenet(folder: pathlib.Path, classes: int = 0) -> None:
    """`train/<wnid>/*.JPEG` and `names.json`, of so many classes, 0: some of ImageNet."""
    wnids = [f"n{number:08d}" for number in range(classes)] or SYNSETS
    for number, wnid in enumerate(wnids):
        (folder / "train" / wnid).mkdir(parents=True)
        for i in range(max(1, ROWS // len(wnids))):
            (folder / "train" / wnid / f"{wnid}_{i}.JPEG").write_bytes(_jpeg(100 * number + i))
    (folder / "names.json").write_text(json.dumps({wnid: f"thing {i}" for i, wnid in enumerate(wnids)}))


def _journeydb(folder: pathlib.Path) -> None:
    """`train_anno.jsonl` and `imgs/000/<i>.jpg`."""
    (folder / "imgs" / "000").mkdir(parents=True)
    for i in range(ROWS):
        (folder / "imgs" / "000" / f"{i}.jpg").write_bytes(_jpeg(i))
    rows = [
        {"img_path": f"./000/{i}.jpg", "prompt": f"a red fox {i}", "Task2": {"Caption": f"A fox {i}."}}
        for i in range(ROWS)
    ]
    _lines(folder / "train_anno.jsonl", rows)


def _ultrachat(folder: pathlib.Path) -> None:
    """`train_0.jsonl` of chats."""
    folder.mkdir()
    chats = [
        [f"Question {i}.{t}?" if t % 2 == 0 else f"Answer {i}: it is so." for t in range(2 + 2 * (i % 2))]
        for i in range(ROWS)
    ]
    _lines(folder / "train_0.jsonl", [{"id": str(i), "data": chat} for i, chat in enumerate(chats)])


def _llava(folder: pathlib.Path) -> None:
    """`llava_v1_5_mix665k.json` and `coco/<i>.jpg`; every fourth row is without an image."""
    (folder / "coco").mkdir(parents=True)
    rows = []
    for i in range(ROWS):
        talk = [
            {"from": "human", "value": "<image>\nWhat is it?" if i % 4 else "Why?"},
            {"from": "gpt", "value": f"A {i}."},
        ]
        rows.append({"id": str(i), "conversations": talk} | ({"image": f"coco/{i}.jpg"} if i % 4 else {}))
        (folder / "coco" / f"{i}.jpg").write_bytes(_jpeg(i))
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))


# By source: the option that is a path, the file of a form, and what makes the form
def _documents(folder: pathlib.Path) -> None:
    """`documents.jsonl` of texts."""
    folder.mkdir()
    _lines(
        folder / "documents.jsonl", [{"parts": [{"text": f"Page {i}: {TEXTS[i % len(TEXTS)]}"}]} for i in range(ROWS)]
    )


def _captions(folder: pathlib.Path) -> None:
    """`captions.jsonl` and `<i>.jpg`."""
    folder.mkdir()
    for i in range(ROWS):
        (folder / f"{i}.jpg").write_bytes(_jpeg(i))
    _lines(folder / "captions.jsonl", [{"image": f"{i}.jpg", "caption": f"a red fox {i}"} for i in range(ROWS)])


FORMS: dict[str, tuple[tuple[str, str, Callable[[pathlib.Path], None]], ...]] = {
    "image_folders": (("folder", "train", _imagenet), ("names", "names.json", _imagenet)),
    "journeydb": (("annotations", "train_anno.jsonl", _journeydb), ("images", "imgs", _journeydb)),
    "documents": (("folder", "", _documents),),
    "captions": (("folder", "", _captions),),
    "ultrachat": (("folder", "", _ultrachat),),
    "llava": (("annotations", "llava_v1_5_mix665k.json", _llava), ("images", "", _llava)),
}


def _lines(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _jpeg(seed: int) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((12, 9)).save(file, "JPEG", quality=95)
    return file.getvalue()
