"""Flags that name a language model, for the programs that score texts."""

from __future__ import annotations

from typing import Any

from absl import flags

from src.common.runtime import config_flag
from src.tools.datasets.sources import flags_of_config


def define_model() -> flags.FlagValues:
    """The flags."""
    values = flags_of_config("The config of the run.")
    common = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "The run.", **common)
    flags.DEFINE_string("step", "latest", "Its checkpoint: a step, latest or best.", **common)
    flags.DEFINE_boolean("ema", None, "Averaged parameters, or not; as eval.ema of the config.", **common)
    flags.DEFINE_string("field", "", "The field of the texts, where there are several.", **common)
    flags.DEFINE_string("weights", None, "Instead of a run: a folder of published or converted weights.", **common)
    flags.DEFINE_string("tokenizer", "", "--weights: tokenizer.model, where it is not in the folder.", **common)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "--weights: of the computation.", **common)
    ways = ["exact", "elbo"]
    flags.DEFINE_enum("likelihood", "exact", ways, "Next-token prediction, or a bound under diffusion.", **common)
    flags.DEFINE_integer("draws", 64, "--likelihood=elbo: draws of each bound.", 8, **common)
    flags.DEFINE_integer("batch_size", 8, "Rows of one call.", 1, **common)
    flags.DEFINE_integer("cpu_devices", None, "Devices on a CPU; unless given, one a core.", **common)
    flags.DEFINE_integer("max_length", None, "Tokens of a row; as the config has them.", 1, **common)
    return values


def check_model(values: flags.FlagValues) -> None:
    """Raises ValueError unless the flags name one model."""
    run = bool(values["config"].value and values.workdir)
    if values.likelihood == "elbo" and (values.weights or values.draws % 4):
        raise ValueError(
            f"--likelihood=elbo with --draws={values.draws} is not possible: give a run that was trained by diffusion"
            " (--config, --workdir), and a multiple of 4 draws"
        )
    if run == bool(values.weights):
        raise ValueError(
            "give a run, --config=… and its --workdir=…, or --weights, a folder of published or converted weights"
        )


def start(values: flags.FlagValues, config: Any) -> None:
    """Sets the devices of a run on a CPU, starts the processes, and opens the cache of compiled programs."""
    from src.build import rows_of
    from src.common.mesh import distributed
    from src.common.runtime import cpu_devices, streams
    from src.common.runtime.compilation_cache import use_program_cache

    if config is not None and (told := cpu_devices.start(config, rows_of(config), values.cpu_devices)):
        streams.tell(told)
    distributed.start()
    use_program_cache()


def open_model(values: flags.FlagValues, config: Any, add_bos: bool = True) -> Any:
    """The `TextModel` that the flags name; its `about` also has the config's name. Raises as `opened.py` does."""
    from src.tools.language.opened import open_run, open_weights

    shared = {"length": values.max_length, "batch_size": values.batch_size, "add_bos": add_bos}
    if values.weights:
        return open_weights(values.weights, tokenizer=values.tokenizer, dtype=values.dtype, **shared)
    draws = values.draws if values.likelihood == "elbo" else 0
    model = open_run(config, values.workdir, values.step, ema=values.ema, field=values.field, draws=draws, **shared)
    model.about["config"] = config_flag.name_of(values)
    return model
