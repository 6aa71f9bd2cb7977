"""MonoFormer on JourneyDB and LLaVA's mix665k: text to image, and answers about images (arXiv 2409.16280, section 4.3).

    python -m src.main --config=configs/llava_journeydb.py --workdir=gs://…/llava_journeydb

The model is that of imagenet256.py and a projector of 6.3M parameters for the features of CLIP's vision tower. It needs
data/tinyllama, data/sd-vae, data/clip-vit-large-patch14 (as published), data/journeydb256 (moments of latents)
and data/llava with llava_v1_5_mix665k.json and the images (docs/data.md).

Arithmetic: a batch has 224 rows of 387 tokens (see journeydb_ultrachat.py) and 32 rows of 64 head + 1 time + 256
image + 448 rest = 769 tokens: 111,296 tokens a step. Seven to one is about the ratio of the two data sets (4.2
million to 665,000), which the released script joins. Images are encoded by CLIP (303,179,776 frozen parameters) in
every step. For 16 or 32 devices, over which the rows divide (8: --config.mesh.fsdp=8).
Expect the diffusion loss of imagenet256, and the answers' loss to fall as the projector learns.
The paper proposes this task without data, shares or steps of a run; 100,000 steps are ours.
Variants: `official` (the released scripts), `paper` (adaLN before the trunk, the paper's 1024 rows), `vae` (images
are read as latents in a square with black borders, not as CLIP's features), `pixels` (JourneyDB's own files), `debug`.
"""

from configs import common, papers


def get_config(name: str | None = None):
    """The fixed default: <|im_start|> and <|im_end|> stand around images, in training as in sampling."""
    config = papers.tinyllama(common.base())
    config.steps, config.batch = 100_000, 256
    config.tasks = {
        "caption_to_image": papers.journeydb(weight=0.875),
        "picture_chat": {
            "weight": 0.125,
            "source": {
                "name": "llava",
                "annotations": "data/llava/llava_v1_5_mix665k.json",
                "images": "data/llava",
                "held_out": 1000,  # for the held-out losses: what is forgotten
            },
            "template": {
                "name": "picture_chat",
                "head_length": 64,
                "length": 448,
                "marks": True,
                "train_on_source": False,
            },
            "objectives": {"text": common.next_token("text.rest")},
        },
    }
    config = papers.text_to_image(config)
    with config.unlocked():
        clip = {"name": "clip_vision", "path": "data/clip-vit-large-patch14", "dtype": "float32"}
        config.fields.vision = common.vision(frozen=clip)
    config.decode.text.max_new_tokens = 128
    config.eval.evaluators = {"answers": {"name": "answers", "task": "picture_chat", "rows": 1000}}
    others = {"paper": paper, "vae": vae, "pixels": papers.journeydb_pixels}
    return common.variant(config, name, official=official, **others, debug=debug)


def official(config):
    """The released scripts: text loss weighted 0.01 and on questions too, no tokens around images, batch 16.

    Questions are cut to 128 tokens. There a row has 512 tokens with its image; here its text alone has as many.
    """
    config = papers.released_journeydb(common.official(config))
    config.batch, config.mesh.fsdp = 16, 2  # 14 rows and 2, on two devices
    with config.unlocked():
        config.tasks.picture_chat.template.update({"marks": False, "train_on_source": True, "question": 128})
    config.tasks.picture_chat.objectives.text.names = ("text.head", "text.rest")
    return config


def paper(config):
    """The paper's text: adaLN with the time before the trunk, instead of a token, and 1024 rows."""
    config.batch, config.mesh.fsdp = 1024, 16  # 896 and 128
    return papers.adaln_before_trunk(config)


def vae(config):
    """Images that are read are latents of the autoencoder."""
    with config.unlocked():
        config.fields.vision.codec = common.patches_of_squares(256) | {"frozen": config.fields.image.codec.frozen}
    return config


def debug(config):
    """The same system, tiny; images are read as patches of pixels, with `vae` as latents."""
    config = common.debug(papers.tiny_journeydb(config))
    config.batch = 64
    config.tasks.picture_chat.template.update({"head_length": 48, "length": 64})
    config.tasks.picture_chat.source.held_out = 4
    vision = config.fields.vision
    with config.unlocked():
        if "device" in vision.codec:
            vision.codec.host.update({"height": 8, "width": 8})
            vision.codec.frozen.factor = 2
        else:
            vision.codec = common.patches_of_squares(8, patch=4)
    return config
