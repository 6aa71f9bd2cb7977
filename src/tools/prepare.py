"""Turns data in files into ArrayRecord shards with a manifest.

python -m src.tools.prepare --config=configs/mine.py --task=class_prompt_to_image --out=data/imagenet-shards
python -m src.tools.prepare --source=image_folders --set=folder=data/train --set=names=data/names.json \\
    --size=256 --processes=16 --out=data/imagenet-256

With a config the source is that of the task; `--source` names one of src/data/sources and `--set` its options. Rows
that cannot be used are left out and listed in `skipped.jsonl`; too many stop the run. The same command goes on where it
was stopped. A task reads the shards with the source `records` and its `folder`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed

from absl import flags

from src.tools.datasets import sources


def define() -> flags.FlagValues:
    """The flags."""
    values = sources.define()
    common = {"flag_values": values}
    flags.DEFINE_integer("size", 0, "Cut images to so many pixels and store PNG; 0: as they are.", 0, **common)
    flags.DEFINE_boolean("check", True, "Decode the images, to leave out what cannot be read.", **common)
    flags.DEFINE_integer("processes", os.cpu_count() or 1, "Processes that read and write.", 1, **common)
    return values


def run(values: flags.FlagValues, config: Any) -> None:
    """Prepares what the flags say."""
    from src.data.prepare import ShardPlan

    sources.write(values, config, ShardPlan(values.rows, values.size, values.check), values.processes)


def main(argv: list[str]) -> int:
    """The exit code."""
    return sources.main(argv, define(), run)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
