"""The paper's four experiments on small files of the true formats: from downloads to a run that is resumed and used.

The commands are those of docs/imagenet.md and docs/data.md, with smaller sizes.
"""

import io
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import sentencepiece

from src.codecs.vae import Vae, VaeConfig
from src.codecs.vae_files import write_vae
from tests.helpers import formats
from tests.helpers.weights import published

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
ROOT = pathlib.Path(__file__).parents[1]
TINY = VaeConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)  # one latent for 2 x 2 pixels
PIECES = 340
QUIET = " ".join(f"--config.doctor.{name}" for name in ("checks=False", "every=0", "batches=0"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the programs, a tiny TinyLlama with its tokenizer, an autoencoder, and data of all formats."""
    home = tmp_path_factory.mktemp("home")
    for name in ("src", "configs"):
        (home / name).symlink_to(ROOT / name)
    (home / "downloads").mkdir()
    llama = home / "downloads" / "TinyLlama-1.1B-Chat-v1.0"
    model = tokenizer()
    published(llama, vocab_size=sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())
    (llama / "tokenizer.model").write_bytes(model)
    write_vae(home / "data" / "sd-vae", Vae(TINY), Vae(TINY).init(jax.random.key(0)))
    formats.make_imagenet(home / "data" / "imagenet", each=20, height=9, width=12)
    formats.make_journeydb(home / "data" / "journeydb", rows=80)
    formats.make_ultrachat(home / "data" / "ultrachat", rows=40)
    annotations, images = formats.make_llava(home / "data" / "llava", rows=40)
    annotations.rename(annotations.with_name("llava_v1_5_mix665k.json"))
    (images / "coco").rename(home / "data" / "llava" / "coco")
    return home


def tokenizer():
    """A model of Llama's format."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Please generate an image of a red fox.", "What is it? A tench."] * 4),
        model_writer=file, model_type="bpe", vocab_size=PIECES, byte_fallback=True, split_digits=True,
        hard_vocab_limit=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, character_coverage=1.0, minloglevel=3,
        remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    return file.getvalue()


def run(home, command):
    """What a command says, which ends well."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"XDG_CACHE_HOME": str(home / "cache")}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling takes longer than running here
    words = command.split()
    assert words[:2] == ["python", "-m"], command
    done = subprocess.run([sys.executable, *words[1:]], cwd=home, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def pieces(home):
    """How many pieces the tokenizer got."""
    model = str(home / "downloads" / "TinyLlama-1.1B-Chat-v1.0" / "tokenizer.model")
    return sentencepiece.SentencePieceProcessor(model_file=model).get_piece_size()


def train(home, config, variant, workdir, *flags):
    """A run of four steps, then a second start of its command that goes on to eight.

    The doctor, which compiles for longer than a start takes, looks at the first start of `debug` alone.
    """
    small = [
        f"--config.fields.text.codec.pieces={pieces(home)}",
        f"--workdir=runs/{workdir}",
        "--config.mesh.data=1",
        *flags,
    ]
    command = f"python -m src.main --config=configs/{config}.py:{variant} {' '.join(small)}"
    run(home, f"{command} --config.steps=4" + ("" if variant == "debug" else f" {QUIET}"))
    command = f"{command} {QUIET}"
    said = run(home, command)
    assert "resuming from step 4" in said
    lines = [json.loads(line) for line in (home / "runs" / workdir / "log.jsonl").read_text().splitlines()]
    steps = {line["step"] for line in lines}
    losses = [line["loss/total"] if "loss/total" in line else line["loss"] for line in lines if "loss" in line]
    assert max(steps) == 8 and losses and np.isfinite(losses).all()
    return command, said


def documented():
    """The three commands of docs/imagenet.md."""
    text = (ROOT / "docs" / "imagenet.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    commands = re.findall(r"^python -m [^\n]*(?:\n[^\n]+)*?(?=\n\n|\npython|\Z)", "\n".join(blocks), re.MULTILINE)
    joined = [re.sub(r"\s*\\\n\s*", " ", command).strip() for command in commands]
    return [
        next(c for c in joined if f"-m {name}" in c) for name in ("src.tools.convert", "src.tools.latents", "src.main")
    ]


def made(home):
    """TinyLlama's weights and JourneyDB's moments, by prepared shards, once."""
    if not (home / "data" / "tinyllama").exists():
        run(home, documented()[0])
    if not (home / "data" / "journeydb256").exists():
        run(home, "python -m src.tools.prepare --source=journeydb --out=data/journeydb-shards --processes=2"
                  " --set=annotations=data/journeydb/train_anno.jsonl --set=images=data/journeydb/imgs"
                  " --rows=30")  # fmt: skip
        run(home, "python -m src.tools.latents --source=records --set=folder=data/journeydb-shards"
                  " --vae=data/sd-vae --size=8 --out=data/journeydb256 --rows=30")  # fmt: skip


def published_again(home, workdir, architecture):
    """Exports a run, and reads the export back with the same hash however often."""
    out = f"published-{workdir}"
    run(home, f"python -m src.tools.convert --source=runs/{workdir} --out={out} --ema --image_size=8")
    assert architecture in run(home, f"python -m src.tools.convert --source={out} --info")
    assert (home / out / "tokenizer.model").exists()
    hashes = []
    for turn in ("again", "more"):
        run(home, f"python -m src.tools.convert --source={out} --out={turn}-{workdir}")
        hashes.append(json.loads((home / f"{turn}-{workdir}" / "weights.json").read_text())["hash"])
        out = f"back-{workdir}"
        if turn == "again":
            run(home, f"python -m src.tools.convert --source={turn}-{workdir} --out={out}")
    assert hashes[0] == hashes[1]


def test_imagenet_in_the_three_commands_of_its_page(home):
    convert, latents, main = documented()
    assert "--source=downloads/TinyLlama-1.1B-Chat-v1.0" in convert and "--out=data/tinyllama" in convert
    run(home, convert)
    said = run(home, latents.replace("--size=256", "--size=8") + " --rows=30")
    assert "100 rows in 4 shards" in said
    assert "--config=configs/imagenet256.py" in main and "--workdir=runs/imagenet256" in main
    command, said = train(home, "imagenet256", "debug", "imagenet256")
    assert command.startswith(main.split(" --workdir")[0]) and "initial weights" not in said
    for variant in ("official,debug", "paper,debug", "pixels,debug"):
        train(home, "imagenet256", variant, variant.replace(",", "-"))
    run(home, f"{command} --mode=sample --prompt=tench --count=2 --output=fox.png")
    assert (home / "fox.png").stat().st_size > 100
    published_again(home, "imagenet256", "MonoFormerForCausalLM")


def test_journeydb_and_ultrachat(home):
    made(home)
    command, said = train(home, "journeydb_ultrachat", "debug", "mixed")
    assert "caption_to_image 72 (0.900), chat 8 (0.100)" in said, said
    train(home, "journeydb_ultrachat", "official,pixels,debug", "mixed-official")
    train(home, "journeydb_ultrachat", "paper,debug", "mixed-paper")
    run(home, f"{command} --mode=sample --task=caption_to_image --prompt=fox --count=1 --output=fox2.png")
    assert run(home, f"{command} --mode=sample --task=chat --prompt=fox").strip()
    published_again(home, "mixed", "MonoFormerForCausalLM")


def test_journeydb_and_llava(home):
    made(home)
    for variant in ("debug", "vae,debug", "official,pixels,debug", "paper,pixels,debug"):
        command, _ = train(home, "llava_journeydb", variant, f"llava-{variant.replace(',', '-')}")
    picture = home / "data" / "llava" / "coco" / "0.jpg"
    said = run(home, f"{command} --mode=sample --task=picture_chat --image={picture} --prompt=What")
    assert said.strip()
    published_again(home, "llava-debug", "MonoFormerForCausalLM")


def test_chats_alone(home):
    made(home)
    for variant in ("debug", "official,debug", "paper,debug", "lora,debug", "keep,debug"):
        command, _ = train(home, "tinyllama_finetune", variant, f"chats-{variant.replace(',', '-')}")
    assert run(home, f"{command} --mode=sample --task=chat --prompt=fox").strip()
    published_again(home, "chats-lora-debug", "LlamaForCausalLM")
