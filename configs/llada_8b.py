"""LLaDA-8B (arXiv 2502.09992): masked diffusion of text at the published size, on packed documents.

    python -m src.main --config=configs/llada_8b.py --workdir=gs://…/llada_8b

8,015,577,088 parameters: the published 8,015,581,184 without the row of the head for the mask id, which is never
predicted. It needs data/texts (documents, docs/documents.md) and data/llada/tokenizer.model, a tokenizer of 126,459
pieces in sentencepiece's form. A row holds as many whole documents as fit into 4,096 tokens, and their noisy copies:
one block for each document, which sees no clean token.

The next-token loss on the clean tokens is ours (weight 0.1; 0 in the publication), so that one checkpoint writes either
way. Arithmetic: 64 rows of 8,192 tokens are a step of 6 · 8.0e9 · 524,288 = 2.5e16 FLOPs. For 64 chips (mesh.fsdp=64).
Variants: `bd3lm` (BD3-LM's size and blocks of 4, arXiv 2503.09573), `debug`.
"""

from configs import common


def get_config(name: str | None = None):
    """Variants: bd3lm, debug."""
    config = common.base()
    config.steps, config.batch = 100_000, 64
    config.model.trunk.update({"width": 4096, "depth": 32, "heads": 32, "kv_heads": 32, "mlp_width": 12_288})
    config.model.trunk.update({"rope_theta": 500_000.0, "remat": "dots"})
    config.model.dtype = "bfloat16"
    config.mesh.update({"data": -1, "fsdp": 64})
    codec = {"name": "text:Llama", "path": "data/llada/tokenizer.model", "pieces": 126_459, "reserved": 0}
    masked = {"name": "categorical", "mask": 1.0, "schedule": {"name": "keep:LinearDecay"}}
    step = {"name": "threshold", "confidence": 0.9}
    config.fields = {"text": common.text(**codec) | {"process": masked, "step": step, "timed": False}}
    noise = common.diffusion("text", timesteps="timesteps:Stratified") | {"per": "block", "given": True}
    noise["loss"] = {"name": "cross_entropy", "elbo": True}
    template = {"name": "packed", "length": 4096, "text_segment": {"role": "copies", "noisy_blocks": 0}}
    config.tasks = {
        "texts": {
            "weight": 1.0,
            "source": {"name": "documents", "folder": "data/texts"},
            "template": template,
            "objectives": {"noise": noise, "next": common.next_token("text", weight=0.1)},
        }
    }
    config.decode.text = {"name": "blocks", "steps": 128}
    config.optim.update({"lr": 4e-4, "schedule": "cosine", "warmup": 2000, "b2": 0.95, "weight_decay": 0.1})
    config.guidance.scale = 1.0
    config.checkpoint.every = 2000
    return common.variant(config, name, bd3lm=bd3lm, debug=debug)


def bd3lm(config):
    """12 blocks of width 768 on rows of 1,024 tokens, GPT-2's vocabulary, blocks of 4. The published network also has
    layers for the time, which it does not use: it is told no time."""
    trunk = {"width": 768, "depth": 12, "heads": 12, "kv_heads": 12, "mlp_width": 3072, "rope_theta": 10_000.0}
    config.model.trunk.update(trunk | {"norm": "layer", "mlp": "gelu"})
    config.fields.text.codec.update({"path": "data/gpt2/tokenizer.model", "pieces": 50_253})
    template = config.tasks.texts.template
    template.length, template.text_segment.noisy_blocks = 1024, 4
    with config.unlocked():
        template.filled = True
    config.decode.text.steps = 4
    config.batch, config.mesh.fsdp = 512, 1
    config.optim.lr = 3e-4
    return config


def debug(config):
    """The same system, tiny."""
    config = common.debug(config)
    with config.unlocked():
        config.fields.text.codec = {"name": "text:Bytes"}
    config.batch, config.tasks.texts.template.length, config.mesh.fsdp = 8, 64, 1
    config.decode.text.steps = 2
    return config
