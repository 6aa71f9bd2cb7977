"""Measures what the codec of a field loses: PSNR, SSIM, and the Fréchet distance of reconstructions (rFID).

python -m src.tools.reconstruct --config=configs/showo_digits.py --network=pixels
python -m src.tools.reconstruct --config=configs/imagenet256.py --images=imagenet/val \\
    --network=inception --weights=pt_inception-2015-12-05-6726825d.pth --json=vae.json

Images of a task's source, or all below a folder, are cut as the codec of the field does it, encoded and decoded,
without noise: of a posterior its mean. No run is needed, because codecs are not trained with the model. Both sides are
8-bit images: what comes back is rounded, as drawn images are (docs/scores.md).
"""

from __future__ import annotations

import json
import sys
from typing import Any

from absl import flags

from src.common.runtime import command, config_flag
from src.common.tree import listed
from src.tools.datasets.sources import flags_of_config


def define() -> flags.FlagValues:
    """The flags."""
    values = flags_of_config("The config whose codec is measured.")
    common = {"flag_values": values}
    flags.DEFINE_string("task", None, "The task whose images are taken, where there are several.", **common)
    flags.DEFINE_string("images", None, "Instead of a task's: a folder of image files, of any sizes.", **common)
    flags.DEFINE_string("field", "image", "The field whose codec is measured.", **common)
    flags.DEFINE_enum("split", "test", ["train", "test"], "Which images.", **common)
    flags.DEFINE_integer("count", 50_000, "Images, at most.", 2, **common)
    flags.DEFINE_enum("network", None, ["inception", "dinov2", "pixels"], "Whose features rFID compares.", **common)
    flags.DEFINE_string("weights", None, "The file of the network.", **common)
    flags.DEFINE_string("json", None, "A file that gets the report.", **common)
    return values


def main(argv: list[str]) -> int:
    """The exit code."""
    values = define()
    return command.run(lambda: run(values, config_flag.parse(values, argv)), values)


def run(values: flags.FlagValues, config: Any) -> None:
    """Prints what is lost. Raises ValueError and OSError, in one sentence, for flags that do not fit."""
    if config is None:
        raise ValueError("give --config, whose codec is measured, as --config=configs/showo_digits.py")
    from src.common.mesh import distributed

    distributed.start()
    from src.build import build_system
    from src.common.runtime.compilation_cache import use_program_cache
    from src.evals.scores import networks, reconstruction
    from src.evals.scores.similarity import window
    from src.tools.datasets import debug_files

    if values.network:
        networks.check_file(values.network, values.weights)
    use_program_cache()
    debug_files.fill_for(values)
    system = build_system(config)
    if values.field not in system.fields:
        raise ValueError(f"there is no field {values.field!r}; this config has {', '.join(system.fields)}")
    field = system.fields[values.field]
    reconstruction.check_codec(field)
    told, source = chosen_source(system, values)
    height, width, _ = field.codec.delivered
    network = networks.open_network(values.network, values.weights, height, width) if values.network else None
    images = reconstruction.source_images(source, field, told["split"], values.count)
    back = reconstruction.through_codec(field)
    found = reconstruction.reconstruction_scores(images, back, network, _teller())
    report = {
        "scores": {key: value for key, value in found.items() if key != "count"},
        "images": told | {"count": int(found["count"])},
        "codec": {"field": values.field, "size": [height, width], **field.codec.fingerprint},
        "network": network and network.about,
        "setting": {"config": config_flag.name_of(values), "ssim_window": window(height, width), "rounding": "nearest"},
    }
    if distributed.is_first():
        _show(values, report)
    distributed.stop()


def chosen_source(system: Any, values: flags.FlagValues) -> tuple[dict[str, Any], Any]:
    """What is told of the images, with their split, and their source: a folder, or that of the task that makes the
    field.

    Raises ValueError where there is no such task, or several, and where it has no images.
    """
    from src.evals.scores import reconstruction
    from src.interfaces import row_of

    if values.images:
        return {"folder": values.images, "split": "train"}, reconstruction.ImageFiles(values.images)
    tasks = {name: plan.task for name, plan in system.tasks.items()}
    making = [name for name, each in tasks.items() if values.field in map(row_of, each.fill)]
    task = values.task or (making[0] if len(making) == 1 else None)
    if task not in making:
        have = listed(making) or "none"
        raise ValueError(f"--task={task} is none that makes the field {values.field} (--field); the config has {have}")
    source = tasks[task].source
    reconstruction.check_source(source, f"tasks.{task}.source")
    return {"task": task, "source": type(source).__name__, "split": values.split}, source


def _show(values: flags.FlagValues, report: dict[str, Any]) -> None:
    for name, value in report["scores"].items():
        print(f"{name:<12}{value:,.4f}")
    for name in ("images", "codec", "network", "setting"):
        print(f"{name:<12}{report[name]}")
    if values.json:
        from src.common.files.store import write_named

        write_named(values.json, (json.dumps(report, indent=2) + "\n").encode(), "report")
        print(f"written to {values.json}")


def _teller() -> Any:
    last = 0

    def told(count: int) -> None:
        nonlocal last
        if count >= last + 1000:
            last = count
            print(f"{count:,} images", file=sys.stderr, flush=True)

    return told


if __name__ == "__main__":
    sys.exit(main(sys.argv))
