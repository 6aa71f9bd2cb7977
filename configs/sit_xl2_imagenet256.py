"""SiT-XL/2 on ImageNet 256 x 256 latents (arXiv 2401.08740): 675M parameters, FID 2.06 published with guidance.

    python -m src.main --config=configs/sit_xl2_imagenet256.py --workdir=gs://…/sit

It needs data/sd-vae (as published) and data/imagenet256, the moments of all images' latents, which src.tools.latents
makes (docs/imagenet.md). A step of 256 rows is 65,536 tokens.
Variants: `official` (it also keeps the published model's unused variance outputs and time scale: 675,129,632 numbers
with the fixed position table of 294,912, which is no parameter here), `arrays` (the folder holds images.npy
[n, 32, 32, 4], latents x 0.18215, labels.npy and names.json instead, and images stay latents), `debug`.
"""

from configs import common, papers


def get_config(name: str | None = None):
    """Variants: official, arrays, debug."""
    config = common.base()
    config.steps, config.batch = 7_000_000, 256
    config.model.update(common.dit(width=1152, depth=28, heads=16))
    config.model.dtype = "bfloat16"
    config.model.trunk.update({"init": "xavier_uniform", "remat": "dots"})
    config.fields = {"image": common.image(256, 256, 3), "label": common.label(1000)}
    vae = {"name": "vae_latents", "path": "data/sd-vae", "channels": 4, "factor": 8, "dtype": "float32"}
    config.fields.image.codec.frozen = vae
    config.fields.image.step = {"name": "gaussian:EulerMaruyama", "last_size": 0.04}
    config.tasks = {
        "class_to_image": {
            "weight": 1.0,
            "source": {"name": "records", "folder": "data/imagenet256", "moments": True},
            "template": {"name": "class_label"},
            "objectives": {"diffusion": common.diffusion(timesteps="timesteps:Uniform")},
        }
    }
    config.mesh.update({"data": -1, "fsdp": 16})
    config.decode.image.steps = 250
    config.guidance.scale = 1.5
    config.optim.grad_clip = common.NO_CLIP
    config.checkpoint.every = 50_000
    return common.variant(config, name, official=official, arrays=arrays, debug=debug)


def official(config):
    """Unused variance outputs, patches out in (row, column, channel) order, t read as it is, samples that start at
    t = 1, guidance on 3 channels, an average without warm-up.

    Time runs from data to noise here; the published network reads 1 - t.
    """
    config.ema.warmup = False
    config.guidance.features = 3 * config.fields.image.codec.device.size**2
    with config.unlocked():
        config.fields.image.head.update({"unused_variance": True, "order": "rsc", "channels": 4})
        config.fields.image.process.schedule = {"name": "schedules:Linear", "time_scale": 1.0, "t_max": 1.0}
    return config


def arrays(config):
    """Latents as numpy arrays, as they are, without an autoencoder."""
    config.fields.image.codec = common.image(32, 32, 4)["codec"]
    config.tasks.class_to_image.source = {"name": "arrays", "folder": "data/imagenet256"}
    return config


def debug(config):
    """The same system, tiny."""
    config = common.debug(config)
    return papers.tiny_latents(config) if "frozen" in config.fields.image.codec else config
