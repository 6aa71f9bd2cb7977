"""D-DiT (arXiv 2501.00289) on handwritten digits: images by flow matching, words by masked diffusion, one transformer.

    python -m src.main --config=configs/ddit_digits.py --workdir=runs/ddit_digits

Words -> image with clean words, and image -> words with the clean image: of a pair only one of the two is noised. All
tokens see each other, and no token is predicted from those before it. The image's velocity is trained by the error of
x_0, the words by the bound of masked diffusion with a weight of 0.2. docs/systems/ddit.md has the figures.
Variants: `next` (captions word by word from left to right, as MonoFormer's: the baseline), `unread` (the words' loss
has weight 0), `streams` (images and words have weights of their own in every block), `published` (SD3-medium's sizes),
`debug`.
"""

from configs import common


def get_config(name: str | None = None):
    """Variants: next, unread, streams, published, debug."""
    image = common.image(8, 8, 1)
    config = common.words_and_digits(common.base(), image, {}, common.diffusion())
    config.model.conditioning = {"name": "conditioning:AdaLNPerLayer"}
    draw, write = config.tasks.caption_to_image, config.tasks.image_to_caption
    masked = {"name": "categorical", "mask": 1.0, "schedule": {"name": "keep:LinearDecay"}}
    words = common.diffusion("text.caption", weight=0.2, timesteps="timesteps:Stratified") | {"given": True}
    words["timesteps"]["t_min"] = 0.001  # as MDLM: the weight 1/t ends at 1,000
    words["loss"] = {"name": "cross_entropy", "elbo": True}
    with config.unlocked():
        config.fields.text.update({"process": masked, "step": {"name": "ancestral"}, "timed": False})
        config.decode.text = {"name": "blocks", "steps": 16}
        draw.template.blocks = "bidirectional"
        draw.objectives.image.loss.weighting.on = "x0"
        write.template.update({"segment": {"blocks": "bidirectional", "role": "noisy"}, "filled": True})
        write.objectives = {"text": words}
    config.steps = 1500
    config.guidance.scale = 1.5
    return common.variant(config, name, next=word_by_word, unread=unread, streams=streams, published=published)


def word_by_word(config):
    """Captions from left to right; words that are drawn from are causal, too."""
    with config.unlocked():
        del config.fields.text["process"], config.fields.text["step"], config.fields.text["timed"]
        config.decode.text = {"name": "left_to_right", "choose": {"name": "next_token:Sampled"}}  # as blocks draw
        del config.tasks.caption_to_image.template["blocks"]
        template = config.tasks.image_to_caption.template
        del template["segment"], template["filled"]
        config.tasks.image_to_caption.objectives = {"text": common.next_token("text.caption", weight=0.2)}
    return config


def unread(config):
    """Images alone are trained: the loss of the words has weight 0."""
    config.tasks.image_to_caption.objectives.text.weight = 0.0
    return config


def streams(config):
    """Tokens of images have all parts of a block for themselves, as in MM-DiT; they meet in attention alone."""
    config.model.trunk.mot = ("attention_norm", "attention", "mlp_norm", "mlp")
    return config


def published(config):
    """SD3-medium's trunk in two streams and latents of 16 channels of images of 512 x 512 pixels, the vocabulary of T5.

    It needs data/images (images with captions), data/sd3-vae and data/t5/tokenizer.model, in sentencepiece's form.
    """
    config = streams(config)
    config.steps, config.batch = 500_000, 512
    config.model.trunk.update({"width": 1536, "depth": 24, "heads": 24, "kv_heads": 24, "mlp_width": 6144})
    config.model.trunk.update({"norm": "layer", "mlp": "gelu", "bias": True, "qk_norm": False, "init": "normal:0.02"})
    config.model.trunk.remat, config.model.dtype, config.mesh.fsdp = "dots", "bfloat16", 16
    latents = {"name": "vae_latents", "path": "data/sd3-vae", "channels": 16, "factor": 8}
    with config.unlocked():
        words = {"path": "data/t5/tokenizer.model", "pieces": 32_000, "reserved": 124}
        config.fields.text.codec = {"name": "text:Llama"} | words
        config.fields.image.codec = common.image(512, 512, 3)["codec"] | {"frozen": latents}
        for task in config.tasks.values():
            task.source = {"name": "captions", "folder": "data/images"}
            task.template.length, task.weight = 64, 1
        config.eval.evaluators = {}
    config.decode.image.steps, config.decode.text.steps, config.guidance.scale = 28, 64, 7.0
    config.optim.update({"lr": 3e-5, "warmup": 1000, "schedule": "constant"})
    return config
