"""What was recorded, and must stay as it is. Rows, parameter trees, and the checkpoints of format 2 with the losses
that followed them, are from before fields were rows of a table (parameters.json has the paths of then).

`python -m tests.helpers.recorded` writes losses.json anew, for a change that is meant.
"""

import importlib
import json
import os
import pathlib
import zlib

import jax
import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "recorded"
RUNS = ("digits", "sit_digits")
CONFIGS = {
    "digits": ("", "official", "debug"),
    "digits_canvas": ("", "official", "debug"),
    "imagenet256": ("", "official", "paper", "debug"),
    "journeydb_ultrachat": ("", "official", "paper", "debug"),
    "llava_journeydb": ("", "official", "paper", "debug"),
    "sit_digits": ("", "debug"),
    "sit_xl2_imagenet256": ("", "official", "debug"),
    "tinyllama_finetune": ("", "official", "lora", "debug"),
}
FORMS = [(name, variant) for name, variants in CONFIGS.items() for variant in variants]


def config_of(name, variant="debug"):
    """A config that trains on one device and is not evaluated."""
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    with config.unlocked():
        config.eval.evaluators = {}
        config.mesh.data = 1
        config.log.every = 1
    return config


def losses(name, steps=4):
    """Scalars by step of the first steps of a debug run: losses, norms, and the checksum of each array of a batch."""
    from src.build import build_system
    from src.common.tree import flatten
    from src.train.metrics import Metrics
    from src.train.trainer import make_trainer, open_data

    trainer = make_trainer(build_system(config_of(name)), jax.devices()[:1])
    state, data, step = trainer.init(), open_data(trainer), trainer.compile()
    metrics, lines, sums = Metrics(trainer.system, trainer.schedule), [], []
    with jax.set_mesh(trainer.mesh):
        for number in range(steps):
            rows = next(data)
            arrays = flatten(jax.tree.map(np.asarray, rows))
            sums.append({path: zlib.crc32(np.ascontiguousarray(a).tobytes()) for path, a in arrays.items()})
            state, measured = step(state, trainer.place(rows, number))
            metrics.add(measured)
            scalars = metrics.flush(number + 1)
            lines.append({k: v for k, v in scalars.items() if k.startswith("loss") or k.endswith("norm")})
    data.close()
    return {"losses": lines, "rows": sums}


def shapes(name, variant):
    """Shape by path of all parameters of a config."""
    from src.build import build_system
    from src.common.tree import flatten

    config = importlib.import_module(f"configs.{name}").get_config(variant)
    tree = jax.eval_shape(build_system(config).init, jax.random.key(0))
    return {path: list(leaf.shape) for path, leaf in flatten(tree).items()}


def read(name):
    """A recorded file."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def main():
    runs = {name: losses(name)["losses"] for name in RUNS}
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in runs.items())
    (FOLDER / "losses.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_threefry_partitionable", True)
    main()
