"""Block diffusion of text beside next-token prediction, in one transformer (BD3-LM, arXiv 2503.09573).

    python -m src.main --config=configs/text_blocks.py --workdir=runs/text_blocks

Two CPU cores, 283 s of processor time for training. Each row has its clean tokens, which are predicted one by one, and
a noisy copy in blocks of 4, which sees the clean blocks before its own. So one checkpoint writes either way: from left
to right, or block by block with as many steps as a block is hard. The corpus is arithmetic with several right answers,
and sentences about numbers with one. docs/systems/text_blocks.md has the figures.
Variants: `next` (writes from left to right), `wide` (blocks of 8), `whole` (one block: masked diffusion as in MDLM and
LLaDA), `debug`.
"""

from configs import common

LENGTH, BLOCK = 16, 4


def get_config(name: str | None = None):
    """Variants: next, wide, whole, debug."""
    config = common.base()
    config.steps, config.batch = 2000, 64
    config.model.trunk.update({"width": 64, "depth": 4, "heads": 4, "kv_heads": 4, "mlp_width": 192})
    config.model.trunk.update({"qk_norm": True, "init": "lecun_normal"})
    masked = {"name": "categorical", "mask": 1.0, "schedule": {"name": "keep:LinearDecay"}}
    step = {"name": "threshold", "confidence": 0.9, "temperature": 0.0}  # the likeliest tokens
    config.fields = {"text": common.text("normal:0.125") | {"process": masked, "step": step, "timed": False}}
    config.tasks = {"arithmetic": task("arithmetic", 48), "number_sentences": task("numbers", 16)}
    config.decode.text = {"name": "blocks", "steps": BLOCK}
    config.optim.update({"lr": 4e-3, "schedule": "cosine", "warmup": 100, "b2": 0.98, "weight_decay": 0.1})
    config.ema.update({"decay": 0.995, "warmup": True})
    config.guidance.scale = 1.0
    ancestral = lambda steps: {"name": "blocks", "steps": steps, "step": {"name": "ancestral"}}
    sure = lambda **rules: {"name": "blocks", "steps": BLOCK, "step": {"name": "threshold", **rules}}
    modes = {
        "next": {"name": "left_to_right", "choose": {"name": "next_token:Sampled"}},
        "next_greedy": {"name": "left_to_right", "choose": {"name": "next_token:Greedy"}},
        "blocks_16": ancestral(16),
        "blocks_4": ancestral(4),
        "blocks_1": ancestral(1),
        "sure_greedy": sure(confidence=0.9, temperature=0.0),
        "sure": sure(confidence=2.0, entropy=0.1),
    }
    names = ("arithmetic", "number_sentences")
    counts = {"answers": 300, "texts": 100, "draws": 64, "timed": 0}
    config.eval.evaluators = {"text_modes": {"name": "text_modes", "names": names, "modes": modes, **counts}}
    config.checkpoint.every = 500
    return common.variant(config, name, next=from_left_to_right, wide=wide, whole=whole, debug=debug)


def task(source: str, rows: int) -> dict:
    """Texts that are predicted one by one, and denoised in blocks."""
    segment = {"blocks": "causal", "role": "copies", "noisy_blocks": BLOCK}
    noise = common.diffusion("text.sentence", weight=3.0, timesteps="timesteps:Stratified")
    noise |= {"per": "block", "given": True}
    noise["timesteps"]["t_min"] = 0.2  # clipped as in BD3-LM: weights 1/t up to 5
    noise["loss"] = {"name": "cross_entropy", "elbo": True}
    return {
        "weight": rows,
        "source": {"name": source},
        "template": {"name": "text", "length": LENGTH, "given": "prompt", "segment": segment, "filled": True},
        "objectives": {"next": common.next_token("text.sentence"), "noise": noise},
    }


def from_left_to_right(config):
    """Another decoder of the same checkpoint."""
    config.decode.text = {"name": "left_to_right", "choose": {"name": "next_token:Greedy"}}
    return config


def wide(config):
    """Noisy blocks of 8 tokens."""
    return blocks_of(config, 2 * BLOCK)


def whole(config):
    """One noisy block, which sees no clean token: masked diffusion of the whole text."""
    return blocks_of(config, 0)


def blocks_of(config, size: int):
    """Other noisy blocks, of which the sure decoders keep at least one token in each step."""
    for each in config.tasks.values():
        each.template.segment.noisy_blocks = size
    for mode in ("sure", "sure_greedy"):
        config.eval.evaluators.text_modes.modes[mode].steps = size or LENGTH
    if config.decode.text.name == "blocks":
        config.decode.text.steps = size or LENGTH
    return config


def debug(config):
    """The same system, tiny."""
    config = common.debug(config)
    config.eval.evaluators.text_modes.update({"answers": 8, "texts": 2, "draws": 8})
    return config
