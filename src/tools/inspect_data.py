"""Says what a file or folder of data is, how many rows it has, what is wrong with the first bad ones, and prints the
lines of a config that read it. No network runs.

python -m src.tools.inspect_data --path=data/pets
python -m src.tools.inspect_data --path=data/chats.jsonl.gz --rows=1000

The path may stand alone, too. Rows are read as `src.tools.prepare` reads them: an example has the values that it needs,
and its images can be decoded.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no network runs

from absl import flags

from src.common.runtime import command, config_flag
from src.tools.datasets.found import Found, block_of, find

SHOWN = 5  # bad rows


def define() -> flags.FlagValues:
    """The flags."""
    values = flags.FlagValues()
    common = {"flag_values": values}
    flags.DEFINE_string("path", None, "The file or folder; it may stand without --path=.", **common)
    flags.DEFINE_integer("rows", 256, "Rows that are read, the first ones.", 1, **common)
    flags.DEFINE_boolean("traceback", False, "Show the whole traceback of an error.", **common)
    return values


def told(found: Found) -> str:
    """What was found, in lines."""
    lines = [f"{found.what}: {found.rows:,} rows, read by the source {found.source['name']}"]
    if found.classes:
        lines.append(f"{len(found.classes):,} classes")
    bad = len(found.bad)
    lines.append(f"of the first {found.seen:,} rows {bad or 'none'} {'are' if bad > 1 else 'is'} bad")
    lines += [f"  {flaw}" for flaw in found.bad[:SHOWN]]
    return "\n".join([*lines, "", block_of(found)])


def main(argv: list[str]) -> int:
    """Exit code: 0, or 1 after an error and where no row that was read is sound."""
    values = define()

    def work() -> int:
        words = [f"--path={word}" if place and not word.startswith("-") else word for place, word in enumerate(argv)]
        config_flag.parse_plain(values, words, "path")
        if not values.path:
            raise ValueError("no data are given: add --path=data/pets (a file or a folder)")
        found = find(values.path, values.rows)
        print(told(found))
        return int(len(found.bad) == found.seen)

    return command.run(work, values)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
