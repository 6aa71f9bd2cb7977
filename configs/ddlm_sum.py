"""Discrete diffusion of summaries (DDLM-Sum): a text is given, and important words of its summary are masked last.

    python -m src.main --config=configs/ddlm_sum.py --workdir=runs/ddlm_sum

A text names three animals; its summary says what one of them does, whichever. Rare words are important (an idf in place
of the publication's attention): the animal, which decides the rest, is masked last and so generated first, then the
place, the verb, and at last the word between.
docs/systems/ddlm_sum.md has the figures.
Variants: `plain` (every word by the same schedule: absorbing diffusion, the baseline), `cnndm` (the size of BERT-base,
texts of 512 tokens), `debug`.
"""

from configs import common

STEPS = (1, 2, 4, 8, 16)
# By id, in the order of frequency: 0 of "in", log 4 / log 16 of 4 verbs, log 8 / log 16 of 8 places, 1 of 16 animals.
IMPORTANCE = (0.0,) * 8 + (0.5,) * 23 + (0.75,) * 23 + (1.0,) * 96


def get_config(name: str | None = None):
    """Variants: plain, cnndm, debug."""
    config = common.base()
    config.steps, config.batch = 1000, 64
    config.model.trunk.update({"width": 64, "depth": 4, "heads": 4, "kv_heads": 4, "mlp_width": 192})
    config.model.trunk.update({"qk_norm": True, "init": "lecun_normal", "bias": True})
    text = common.text("normal:0.125")
    text["codec"]["vocab_size"] = 150
    text |= {"process": {"name": "by_id", "importance": IMPORTANCE}, "step": {"name": "ancestral"}, "timed": False}
    config.fields = {"text": text}
    noise = common.diffusion("text.sentence", timesteps="timesteps:Stratified") | {"given": True}
    noise["loss"] = {"name": "cross_entropy"}
    segment = {"blocks": "bidirectional", "role": "noisy"}
    config.tasks = {
        "summaries": {
            "weight": 1.0,
            "source": {"name": "summaries"},
            "template": {"name": "text", "length": 17, "given": "prompt", "segment": segment},
            "objectives": {"summary": noise},
        }
    }
    config.decode.text = {"name": "blocks", "steps": 8}
    config.optim.update({"lr": 4e-3, "schedule": "cosine", "warmup": 100, "b2": 0.98})
    config.ema.update({"decay": 0.99, "warmup": True})
    config.guidance.scale = 1.0
    modes = {f"steps_{steps}": {"name": "blocks", "steps": steps} for steps in STEPS}
    config.eval.evaluators = {"summaries": {"name": "judged", "task": "summaries", "rows": 500, "modes": modes}}
    config.checkpoint.every = 500
    return common.variant(config, name, plain=plain, cnndm=cnndm)


def plain(config):
    """One schedule for all words."""
    config.fields.text.process.importance = ()
    return config


def cnndm(config):
    """BERT-base's trunk and a vocabulary of 32,000 whose ids are in the order of frequency; 512 tokens of a text, 128
    of its summary. The texts are generated all the same."""
    config.steps, config.batch = 100_000, 128
    config.model.trunk.update({"width": 768, "depth": 12, "heads": 12, "kv_heads": 12, "mlp_width": 3072})
    config.model.trunk.update({"norm": "layer", "mlp": "gelu"})
    config.model.dtype = "bfloat16"
    with config.unlocked():
        config.fields.text.codec = {"name": "text:Llama", "path": "data/llama/tokenizer.model", "pieces": 32_000}
        config.fields.text.process = {"name": "by_id", "importance": "rank"}
        config.tasks.summaries.template.length = 640
    return config
