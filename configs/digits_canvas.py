"""MonoFormer on canvases of up to four handwritten digits: "seven left of two" -> image, and back.

    python -m src.main --config=configs/digits_canvas.py --workdir=runs/digits_canvas

Two CPU cores, about six minutes. Expect canvas_accuracy and caption_accuracy 0.98 or more (docs/reproduce.md). An image
of 16 x 16 is 16 tokens, patches of 4 x 4; a step has 48 images to generate and 16 captions.
"""

from configs import common


def get_config(name: str | None = None):
    """Variants: debug, official."""
    config = common.base()
    config.steps, config.batch = 2000, 64
    config.model.trunk.update({"width": 128, "depth": 4, "heads": 4, "kv_heads": 4, "mlp_width": 384})
    config.model.time.init = "lecun_normal"
    config.model.trunk.update({"qk_norm": True, "init": "lecun_normal"})
    config.fields = {"text": common.text("normal:0.1"), "image": common.image(16, 16, 1, patch=4)}
    config.tasks = {
        "caption_to_canvas": {
            "weight": 48,
            "source": {"name": "canvas", "shift": 0},
            "template": {"name": "caption_to_image"},
            "objectives": {"diffusion": common.diffusion()},
        },
        "canvas_to_caption": {
            "weight": 16,
            "source": {"name": "canvas"},
            "template": {"name": "image_to_caption"},
            "objectives": {"text": common.next_token("text.caption", weight=0.1)},
        },
    }
    config.optim.update({"lr": 3e-3, "schedule": "cosine", "warmup": 100, "b2": 0.98})
    config.ema.update({"decay": 0.995, "warmup": True})
    config.eval.evaluators = {
        "canvas": {
            "name": "canvas",
            "draw": "caption_to_canvas",
            "caption": "canvas_to_caption",
            "canvases": 360,
            "captions": 360,
        }
    }
    return common.variant(config, name, official=official)


def official(config):
    """As published; the one channel is guided, and the tokens of a given image are causal."""
    with config.unlocked():
        config.tasks.canvas_to_caption.template.blocks = "causal"
    return common.official(config, channels=1, guided=0)
