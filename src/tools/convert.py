"""Published weights into a folder that a run can start from, and a trained run back into what others read.

python -m src.tools.convert --source=TinyLlama/TinyLlama-1.1B-Chat-v1.0 --out=data/tinyllama
python -m src.tools.convert --source=downloads/MonoFormer_ImageNet_256 --out=data/monoformer
python -m src.tools.convert --source=downloads/SiT-XL-2 --out=data/sit --network=sit
python -m src.tools.convert --source=runs/imagenet256 --out=published --ema --step=best
python -m src.tools.convert --source=runs/text --out=data/text --initial --ema
python -m src.tools.convert --source=data/tinyllama --info

What --source is decides: a published Llama, Mistral, Qwen 2, Qwen 3 or MonoFormer (a folder, or a name of the Hugging
Face hub), DiT or SiT becomes initial weights for `config.init_from`; initial weights, or the workdir of a run, become a
checkpoint that transformers and the official MonoFormer read. With --initial a run, of any model, becomes initial
weights of another one. Needs neither torch nor transformers, no accelerator, and the memory of one block.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from absl import flags

from src.common.runtime import command, config_flag


def define() -> flags.FlagValues:
    """The flags."""
    values = flags.FlagValues()
    common = {"flag_values": values}
    flags.DEFINE_string("source", None, "A folder (also in a store) or owner/name of the Hugging Face hub.", **common)
    flags.DEFINE_string("out", None, "The folder to write; it must be new or empty.", **common)
    flags.DEFINE_boolean("info", False, "Say what --source holds, and write nothing.", **common)
    flags.DEFINE_integer("new_words", None, "Words to add to the vocabulary (Llama: 4, the special tokens; else 0).",
                         lower_bound=0, upper_bound=2**16, **common)  # fmt: skip
    flags.DEFINE_enum("new_rows", "normal", ["normal", "mean"], "Their rows: N(0, 0.02^2), or the mean row.", **common)
    flags.DEFINE_integer("seed", 0, "Of --new_rows=normal.", lower_bound=0, **common)
    flags.DEFINE_string("step", "latest", "Of a run, the checkpoint: a step, latest or best.", **common)
    flags.DEFINE_boolean("ema", False, "Of a run, the moving average of the parameters.", **common)
    flags.DEFINE_float("decay", 0.0, "Of a run, the average of this decay, one of its ema.more.", **common)
    flags.DEFINE_float("width", 0.0, "Of a run, the average of this width (ema.power).", **common)
    flags.DEFINE_boolean("initial", False, "Of a run, weights for config.init_from, of any model.", **common)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of exported tensors; as they are.", **common)
    flags.DEFINE_integer("image_size", None, "Exported: pixels of a side, 8 times that of the latents.", **common)
    flags.DEFINE_string("tokenizer", None, "Exported: the folder whose tokenizer files are copied.", **common)
    flags.DEFINE_enum("network", None, ["dit", "sit"], "Of a DiT or SiT, whose files are alike: which.", **common)
    flags.DEFINE_integer("heads", None, "Of a DiT or SiT of no published width: heads.", lower_bound=1, **common)
    flags.DEFINE_integer("shard_mb", 5000, "Most of one file, in 10^6 bytes.", lower_bound=1, **common)
    flags.DEFINE_string("revision", None, "Of a name of the hub: a branch, tag or commit.", **common)
    flags.DEFINE_boolean("traceback", False, "Show the whole traceback of an error.", **common)
    return values


def main(argv: list[str]) -> int:
    """The exit code; errors that a person can mend are one sentence on standard error."""
    values = define()
    return command.run(lambda: _run(values, argv), values)


def _run(values: flags.FlagValues, argv: list[str]) -> None:
    config_flag.parse_plain(values, argv, "source")
    if not values.source:
        raise ValueError("give --source, a folder or a name of the Hugging Face hub, and --out or --info")
    if not values.info and not values.out:
        raise ValueError("give --out, the folder to write, or --info to look only")
    run(values)


def run(values: flags.FlagValues) -> None:
    """What was asked for; prints what was done."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed but checksums
    from src.tools.conversion import convert  # imports JAX

    began = time.monotonic()
    source = convert.find(values.source, values.revision)
    if values.info:
        print(convert.info(source))
        return
    convert.check_empty(values.out)
    for line in convert.convert(source, values.out, _options(values)):
        print(line, flush=True)
    print(f"written to {values.out} in {time.monotonic() - began:.1f} s")


def _options(values: flags.FlagValues) -> Any:
    from src.tools.conversion.convert import Options

    names = ("new_words", "new_rows", "seed", "step", "ema", "dtype", "image_size", "tokenizer", "network", "heads")
    names += ("initial", "decay", "width")
    return Options(shard_bytes=values.shard_mb * 10**6, **{name: values[name].value for name in names})


if __name__ == "__main__":
    sys.exit(main(sys.argv))
