"""EZ-VC (arXiv 2505.16691) on a synthetic voice: what one speaker says, in a new voice.

    python -m src.main --config=configs/ezvc_voice.py --workdir=runs/ezvc_voice

A row is up to 64 log-mel frames. Flow matching fills in 70 to 100 % of them, from the frames beside and the symbols
that are said. The source reads back what was made: symbols, speaker, durations. docs/systems/ez_vc.md has the figures.
Variants: `first` (symbols on the first frames, as published), `published` (sizes of F5-TTS), `debug`.
"""

from configs import common

MEL = {"name": "mel", "frames": 64, "rate": 8000, "window": 256, "hop": 128, "bands": 32, "floor": 1e-3}


def get_config(name: str | None = None):
    """Variants: first, published, debug."""
    config = common.base()
    config.steps, config.batch = 800, 32
    config.model.trunk.update({"width": 64, "depth": 4, "heads": 4, "kv_heads": 4, "mlp_width": 192})
    config.model.trunk.update({"qk_norm": True, "init": "lecun_normal"})
    config.model.time.init = "lecun_normal"
    with config.unlocked():
        config.model.conditioning = {"name": "conditioning:AdaLNPerLayer"}
    config.fields = fields(MEL, shift=-5.0, scale=0.6)
    config.tasks = {
        "speak": {
            "weight": 1.0,
            "source": {"name": "voice", "mel": MEL},
            "template": {"name": "infilling", "span": (0.7, 1.0), "drop_prompt": 0.3, "drop": 0.2},
            "objectives": {"frames": common.diffusion("frames", timesteps="timesteps:Uniform")},
        }
    }
    config.decode.frames = {"name": "blocks", "steps": 16}
    config.optim.update({"lr": 3e-3, "schedule": "cosine", "warmup": 100, "b2": 0.98})
    config.ema.update({"decay": 0.99, "warmup": True})
    config.guidance.scale = 2.0
    grid = lambda steps, sway: {"name": "blocks", "steps": steps, "step": {"name": "gaussian:Euler", "sway": sway}}
    modes = {f"{told}_{steps}": grid(steps, sway) for steps in (4, 16) for told, sway in SWAYS.items()}
    config.eval.evaluators = {"voice": {"name": "judged", "task": "speak", "rows": 100, "modes": modes}}
    config.checkpoint.every = 400
    return common.variant(config, name, first=first, published=published)


SWAYS = {"sway": -1.0, "uniform": 0.0}


def fields(mel: dict, shift: float, scale: float) -> dict:
    """Frames that are made, frames that are known, and symbols."""
    codec = {"host": mel, "device": {"name": "patch", "size": 1, "shift": shift, "scale": scale}}
    frames = {
        "codec": codec,
        "embed": {"name": "patches", "init": "xavier_uniform"},
        "process": common.flow(),
        "head": {"name": "adaln", "init": "zeros", "adaln_init": "zeros"},
        "step": {"name": "gaussian:Euler", "sway": -1.0},
    }
    prompt = {"codec": codec, "embed": {"name": "features", "init": "lecun_normal"}}
    units = {"codec": {"name": "text:Bytes"}, "embed": {"name": "tokens", "init": "normal:0.125"}}
    return {"frames": frames, "prompt": prompt, "units": units}


def first(config):
    """The symbols stand on the first frames, with padding behind."""
    config.tasks.speak.template.place = "first"
    return config


def published(config):
    """F5-TTS's DiT (22 layers, width 1024, 16 heads, feed-forward 2048), 80 bands of 16 kHz, 30 s a row, 32 steps,
    guidance 3. The voice is the synthetic one all the same, and the symbols are its letters."""
    config.steps, config.batch = 1_200_000, 64
    config.model.update(common.dit(width=1024, depth=22, heads=16))
    config.model.trunk.update({"mlp_width": 2048, "rope": True, "remat": "dots"})
    config.model.dtype = "bfloat16"
    mel = {"name": "mel", "frames": 3000, "rate": 16_000, "window": 1024, "hop": 160, "bands": 80, "floor": 1e-5}
    with config.unlocked():
        config.fields = fields(mel, shift=-5.0, scale=0.6)
        config.tasks.speak.source = {"name": "voice", "mel": mel, "voice": 600}
    config.decode.frames.steps, config.guidance.scale = 32, 3.0
    config.optim.update({"lr": 7.5e-5, "schedule": "linear", "warmup": 20_000, "b2": 0.999})
    return first(config)
