"""Language models of today that also make images: Qwen 3 0.6B, or Llama 3.2 1B, on JourneyDB and UltraChat.

    python -m src.main --config=configs/backbones.py --workdir=gs://…/qwen3
    python -m src.main --config=configs/backbones.py:llama32 --workdir=gs://…/llama32

It needs data/qwen3 (or data/llama32), the published weights as src.tools.convert writes them with their tokenizer.json,
the tokenizers library (docs/backbones.md), and data/sd-vae, data/journeydb256 and data/ultrachat as
journeydb_ultrachat.py does.

The language model has its published 596,049,920 (1,235,814,400) parameters, whose head is the embedding, and four words
more. The system is MonoFormer's with straight-line flow: words are predicted, latents of images denoised, a time token
in front of each. Arithmetic: 1152 rows of 387 tokens with images and 128 rows of 512 tokens of chat a step. For 16 to
128 chips (mesh.fsdp=16); `src.tools.aot` says what it needs (docs/backbones.md). It was not trained here.
Variants: `llama32`, `debug`.
"""

from configs import common, papers


def get_config(name: str | None = None):
    """Variants: llama32, debug."""
    config = papers.tinyllama(common.base())
    config.steps, config.batch = 200_000, 1280
    config.tasks = {
        "caption_to_image": papers.journeydb(weight=0.9),
        "chat": {
            "weight": 0.1,
            "source": {"name": "ultrachat", "folder": "data/ultrachat", "split": 1536, "held_out": 1000},
            "template": {"name": "chat", "length": 512, "turns": "all", "train_on_source": False},
            "objectives": {"text": common.next_token("text")},
        },
    }
    config = papers.sd_latents(config)
    with config.unlocked():
        config.fields.image.process, config.fields.image.step = common.flow(), {"name": "gaussian:Euler"}
        config.tasks.caption_to_image.objectives = {"diffusion": common.diffusion()}
    config.optim.update({"lr": 1e-4, "schedule": "cosine", "warmup": 2000, "grad_clip": 1.0})
    config.decode.image.steps, config.guidance.scale = 50, 4.0
    config.checkpoint.every = 10_000
    return common.variant(qwen3(config), name, llama32=llama32, debug=debug)


def qwen3(config):
    """Qwen 3 0.6B: heads of 128 apart from the width, normalised queries and keys, a tied head."""
    words(config, "data/qwen3", pieces=151_669, reserved=267, bos=151_643, eos=151_643)
    config.model.trunk.update({"width": 1024, "depth": 28, "heads": 16, "kv_heads": 8, "mlp_width": 3072})
    config.model.trunk.update({"head_dim": 128, "qk_norm": True, "norm_epsilon": 1e-6, "rope_theta": 1e6})
    return config


def llama32(config):
    """Llama 3.2 1B: rotations scaled from 8,192 tokens, a tied head."""
    words(config, "data/llama32", pieces=128_256, reserved=0, bos=128_000, eos=128_001)
    config.model.trunk.update({"width": 2048, "depth": 16, "heads": 32, "kv_heads": 8, "mlp_width": 8192})
    config.model.trunk.update({"head_dim": 0, "qk_norm": False, "norm_epsilon": 1e-5, "rope_theta": 5e5})
    config.model.trunk.rope_scaling = ("llama3", 32.0, 1.0, 4.0, 8192)
    return config


def words(config, folder: str, **tokens) -> None:
    """Weights and tokenizer of a folder; the head is the embedding."""
    config.init_from.path = folder
    with config.unlocked():
        config.fields.text = common.text(name="tokenizer_json", path=f"{folder}/tokenizer.json", **tokens)
    config.fields.text.head.tied = True


def debug(config):
    """The same system, tiny: a token for each byte, and nothing to begin from."""
    config = common.debug(papers.tiny_journeydb(config))
    config.init_from.path, config.model.trunk.head_dim = "", config.model.trunk.head_dim and 8
    with config.unlocked():
        config.fields.text.codec = {"name": "text:Bytes"}
    config.batch, config.tasks.chat.template.length = 80, 64
    config.tasks.chat.source.update({"held_out": 4, "split": 192})
    return config
