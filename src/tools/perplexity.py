"""Perplexity and bits per byte of a text file under next-token prediction, or a bound under masked diffusion.

python -m src.tools.perplexity --config=configs/tinyllama_finetune.py --workdir=runs/tinyllama --text=wiki.txt
python -m src.tools.perplexity --weights=data/tinyllama --text=wiki.txt --context=1024 --json=wiki.json

The file is one text; with --lines each line that is not empty is one. Each text is read behind <s>, in windows of at
most --max_length tokens, and each of its tokens is predicted once, from at least --context tokens before it (behind the
first window). A larger context is slower and gives lower numbers, so name it beside them.

--likelihood=elbo measures the bound of masked diffusion, with its standard error, in place of next-token prediction.

perplexity = exp(nats / tokens), bits per byte = nats / (bytes · ln 2); tokens are those of the tokenizer without <s>,
bytes those of the texts in UTF-8.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from absl import flags

from src.common.runtime import command, config_flag
from src.tools.language import model_flags

MOST = 256 << 20  # bytes of a file


def define() -> flags.FlagValues:
    """The flags."""
    values = model_flags.define_model()
    common = {"flag_values": values}
    flags.DEFINE_string("text", None, "The file, in UTF-8.", **common)
    flags.DEFINE_boolean("lines", False, "Each line is a text of its own.", **common)
    flags.DEFINE_integer("context", 1, "Tokens that are at least read before a predicted one.", 1, **common)
    flags.DEFINE_string("json", None, "A file that gets the numbers.", **common)
    return values


def main(argv: list[str]) -> int:
    """The exit code."""
    values = define()
    return command.run(lambda: run(values, config_flag.parse(values, argv)), values)


def run(values: flags.FlagValues, config: Any) -> None:
    """Prints the numbers. Raises ValueError and OSError, in one sentence, for flags and files that do not fit."""
    model_flags.check_model(values)
    if not values.text:
        raise ValueError("give --text, the file that is measured")
    texts = read_texts(values.text, values.lines)
    model_flags.start(values, config)
    from src.common.mesh import distributed

    model = model_flags.open_model(values, config)
    report = measure(model, texts, values.context)
    setting = {"text": values.text, "lines": values.lines, "context": values.context}
    if distributed.is_first():
        _show(report, setting, model.about)
        if values.json:
            from src.common.files.store import write_named

            told = report | {"setting": setting, "model": model.about}
            write_named(values.json, (json.dumps(told, indent=2, default=float) + "\n").encode(), "report")
            print(f"written to {values.json}")
    distributed.stop()


def read_texts(path: str, lines: bool) -> list[str]:
    """The file as one text, or its lines without their ends and without empty ones.

    Raises OSError, and ValueError for a file that is not UTF-8, larger than 256 MB, or empty.
    """
    from src.common.files.paths import read_bounded

    try:
        text = read_bounded(path, MOST, "text").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start:,}): write it anew as UTF-8") from error
    texts = [line for line in text.split("\n") if line.strip()] if lines else [text] if text.strip() else []
    if not texts:
        raise ValueError(f"{path} has no text: give another file")
    return texts


def measure(model: Any, texts: list[str], context: int = 1) -> dict[str, Any]:
    """nats, tokens, bytes, perplexity and bits per byte of texts under a `TextModel`.

    `lost` is the number of texts that their own ids do not give back, such as those whose spaces the tokenizer joins:
    the bits of these are of fewer bytes than are counted. Raises ValueError for characters that the tokenizer lacks.
    """
    ids = [model.encode_plain(text) for text in texts]
    found = model.whole(ids, context)
    nats, tokens = -math.fsum(total for total, _ in found), sum(count for _, count in found)
    size = sum(len(text.encode()) for text in texts)
    return {
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / size / math.log(2),
        "nats": nats,
        "tokens": tokens,
        "bytes": size,
        "texts": len(texts),
        **model.uncertainty(),
        "lost": sum(model.codec.decode(part) != text for part, text in zip(ids, texts, strict=True)),
    }


def _show(report: dict[str, Any], setting: dict[str, Any], about: dict[str, Any]) -> None:
    print(f"perplexity     {report['perplexity']:,.4f}\nbits per byte  {report['bits_per_byte']:.4f}")
    print(f"nats           {report['nats']:,.4f} of {report['tokens']:,} tokens, {report['bytes']:,} bytes, "
          f"{report['texts']:,} texts")  # fmt: skip
    print(f"setting        {setting}\nmodel          {about}")
    if "standard_error" in report:
        error = report["standard_error"] * report["bounds"] ** 0.5
        draws = f"{report['bounds']:,} windows of {report['draws']} draws"
        print(f"an upper bound, with a standard error of {error:.4f} nats ({draws})")
    if report["lost"]:
        print(
            f"warning: {report['lost']:,} texts do not come back from their ids as they were (white space that the"
            " tokenizer joins, for example), and their bytes are counted as they were"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
