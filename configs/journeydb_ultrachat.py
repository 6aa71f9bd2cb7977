"""MonoFormer on JourneyDB and UltraChat, nine to one: text to image, and chat (arXiv 2409.16280, section 4.2).

    python -m src.main --config=configs/journeydb_ultrachat.py --workdir=gs://…/journeydb_ultrachat

The model is that of imagenet256.py. It needs data/tinyllama, data/sd-vae, data/journeydb256 (moments of latents,
src.tools.latents) and data/ultrachat, a folder of jsonl files (docs/data.md).

Arithmetic: a batch has 1152 rows of 128 prompt + 1 time + 256 image + 2 tail = 387 tokens, and 128 rows of 512 tokens
of chat: 511,360 tokens a step. The rows of each task in a batch are exact: 1280 = 10 · 128 divides nine to one over up
to 128 devices (the paper's 1024 does not). The text head is used on the chats only. For 16 to 128 chips (mesh.fsdp=16).
Expect the diffusion loss of imagenet256, and the chats' loss to start near TinyLlama's and to stay there: the table
`forgetting` of the log shows it.
Variants: `official` (the released scripts), `paper` (adaLN before the trunk), `pixels` (JourneyDB's own files),
`debug`.
"""

from configs import common, papers


def get_config(name: str | None = None):
    """The fixed default: both losses have weight 1, all turns of a chat are read, answers are targets."""
    config = papers.tinyllama(common.base())
    config.steps, config.batch = 500_000, 1280
    config.tasks = {
        "caption_to_image": papers.journeydb(weight=0.9),
        "chat": {
            "weight": 0.1,
            "source": {
                "name": "ultrachat",
                "folder": "data/ultrachat",
                "split": 1536,  # characters of a row, whole questions with answers; 0: a chat is a row
                "held_out": 1000,  # for the held-out losses: what is forgotten
            },
            "template": {"name": "chat", "length": 512, "turns": "all", "train_on_source": False},
            "objectives": {"text": common.next_token("text")},
        },
    }
    others = {"paper": papers.adaln_before_trunk, "pixels": papers.journeydb_pixels}
    return common.variant(papers.text_to_image(config), name, official=official, **others, debug=debug)


def official(config):
    """The released scripts: text loss weighted 0.01, the last pair of turns, loss on questions too.

    Their batch of 128 rows is drawn row by row; 160 is the next that divides nine to one over 16 devices.
    """
    config = papers.released_journeydb(common.official(config))
    config.batch = 160
    config.tasks.chat.source.split = 0
    with config.unlocked():
        config.tasks.chat.template.update({"turns": "last", "train_on_source": True, "question": 128})
    return config


def debug(config):
    """The same system, tiny."""
    config = common.debug(papers.tiny_journeydb(config))
    config.batch, config.tasks.chat.template.length = 80, 64
    config.tasks.chat.source.update({"held_out": 4, "split": min(config.tasks.chat.source.split, 192)})
    return config
