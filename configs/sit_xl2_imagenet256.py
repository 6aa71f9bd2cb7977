"""SiT-XL/2 on ImageNet 256 x 256 latents (arXiv 2401.08740): 675M parameters, FID 2.06 published with guidance.

    python -m src.main --config=configs/sit_xl2_imagenet256.py --workdir=gs://…/sit

The folder (tasks.class_to_image.source.folder) holds images.npy [n, 32, 32, 4] (SD-VAE latents x 0.18215),
labels.npy and names.json. A step of 256 rows is 65,536 tokens.
Variant `official` also keeps the published model's unused variance outputs and time scale (675,129,632 numbers with the
fixed position table of 294,912, which is no parameter here).
"""

from configs import common


def get_config(name: str | None = None):
    """Variants: official, debug."""
    config = common.base()
    config.steps, config.batch = 7_000_000, 256
    config.model.update(common.dit(width=1152, depth=28, heads=16))
    config.model.dtype = "bfloat16"
    config.model.trunk.update({"init": "xavier_uniform", "remat": "dots"})
    config.fields = {"image": common.image(32, 32, 4), "label": common.label(1000)}
    config.fields.image.step = {"name": "gaussian:EulerMaruyama", "last_size": 0.04}
    config.tasks = {
        "class_to_image": {
            "weight": 1.0,
            "source": {"name": "arrays", "folder": "data/imagenet256"},
            "template": {"name": "class_label"},
            "objectives": {"diffusion": common.diffusion(timesteps="timesteps:Uniform")},
        }
    }
    config.mesh.update({"data": -1, "fsdp": 16})
    config.decode.image.steps = 250
    config.guidance.scale = 1.5
    config.optim.grad_clip = common.NO_CLIP
    config.checkpoint.every = 50_000
    return common.variant(config, name, official=official)


def official(config):
    """Unused variance outputs, patches out in (row, column, channel) order, t read as it is, guidance on 3 channels,
    an average without warm-up.

    Time runs from data to noise here; the published network reads 1 - t.
    """
    config.ema.warmup = False
    config.guidance.features = 3 * config.fields.image.codec.device.size**2
    with config.unlocked():
        config.fields.image.head.update({"unused_variance": True, "order": "rsc", "channels": 4})
        config.fields.image.process.schedule = {"name": "schedules:Linear", "time_scale": 1.0}
    return config
