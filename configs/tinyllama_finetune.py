"""TinyLlama fine-tuned on chats alone: the language loss without images (arXiv 2409.16280).

    python -m src.main --config=configs/tinyllama_finetune.py --workdir=gs://…/tinyllama_finetune

1,100,064,768 parameters: TinyLlama 1.1B with four more tokens. It needs data/tinyllama (src.tools.convert) and
data/ultrachat, a folder of jsonl files (docs/data.md).

Arithmetic: a row holds as many whole chats as fit into 2048 tokens; a batch of 128 rows is 262,144 tokens, a step about
6 · 1.1e9 · 262,144 = 1.7e15 FLOPs. For 16 to 128 chips (mesh.fsdp=16).
Expect the loss to start near TinyLlama's own on chats and to fall slowly; benchmarks of common sense are measured
by `src.tools.lm_eval` (docs/scores.md).
Variants: `official` (one chat to a row, as the released code reads them), `paper` (its optimizer), `lora` (adapters of
rank 16 on the trunk, all else frozen), `keep` (held to the initial model by distillation), `debug`.
"""

from configs import common, papers


def get_config(name: str | None = None):
    """The fixed default: chats packed into rows, loss on the answers, a low rate with warmup."""
    config = papers.tinyllama(common.base())
    config.steps, config.batch = 5_000, 128
    config.tasks = {
        "chat": {
            "weight": 1.0,
            "source": {"name": "ultrachat", "folder": "data/ultrachat", "held_out": 1000},
            "template": {"name": "packed", "length": 2048},
            "objectives": {"text": common.next_token("text")},
        }
    }
    config.optim.update({"lr": 2e-5, "schedule": "cosine", "warmup": 100, "grad_clip": 1.0})
    config.decode.text.max_new_tokens = 128
    return common.variant(config, name, official=official, paper=paper, lora=lora, keep=keep, debug=debug)


def official(config):
    """The released code: the last pair of turns, 512 tokens a row, loss on questions too, constant rate of 1e-4."""
    config = common.official(config)
    template = {"name": "chat", "length": 512, "turns": "last", "question": 128, "train_on_source": True}
    with config.unlocked():
        config.tasks.chat.template = template
    return config


def paper(config):
    """The optimizer of the paper: constant rate of 1e-4, the loss with weight 1."""
    config.optim.update(common.optim(lr=1e-4))
    return config


def lora(config):
    """Adapters of rank 16 on the trunk, all else frozen; the rate that goes with them."""
    config.model.lora.rank = 16
    config.optim.lr_multipliers = (("^fields/text", 0.0), (".*", 1.0))
    config.optim.lr = 2e-4
    return config


def keep(config):
    """A second objective holds the answers' distributions to those of the initial model."""
    config.tasks.chat.objectives.keep = common.distill("text", weight=0.5)
    return config


def debug(config):
    """The same system, tiny."""
    config = common.debug(config)
    config.batch, config.tasks.chat.template.length, config.mesh.fsdp = 16, 256, 1
    config.tasks.chat.source.held_out = 4
    return config
