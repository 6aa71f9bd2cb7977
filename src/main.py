"""Trains, evaluates and samples a system: flags and dispatch only.

python -m src.main --config=configs/digits.py --workdir=runs/digits
python -m src.main --config=configs/digits.py --workdir=runs/digits --mode=sample --prompt="a handwritten three"
python -m src.main --config=configs/digits.py --workdir=runs/digits --mode=sample --given image=digit.png
python -m src.main --config=configs/digits.py --mode=doctor
"""

import time

STARTED = time.monotonic()

from src.common.runtime import streams  # noqa: E402

streams.keep_open()

import os  # noqa: E402
import sys  # noqa: E402

from absl import flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from src.common.files import store  # noqa: E402
from src.common.runtime import abort_note, background, config_flag, errors, limits, stopping, tracing  # noqa: E402

FLAGS = flags.FLAGS
WARNING = 30
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config file, e.g. configs/digits.py or configs/digits.py:debug."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and samples go.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "sample", "doctor"], "What to do.")
GIVEN = flags.DEFINE_multi_string(
    "given", [], "--mode=sample: a value to start from, name=value, as prompt=…, label=3 or image=a.png; repeatable."
)
PROMPT = flags.DEFINE_string("prompt", None, "--mode=sample: --given prompt=…, the text to draw, or to go on from.")
PROMPTS = flags.DEFINE_string("prompts", None, "--mode=sample: a text file in UTF-8 with a prompt in each line.")
LABEL = flags.DEFINE_integer("label", None, "--mode=sample: --given label=…, the class to draw.")
IMAGE = flags.DEFINE_string("image", None, "--mode=sample: --given image=…, an image file to describe.")
TASK = flags.DEFINE_string("task", None, "--mode=sample: the task to sample from, when it is not the obvious one.")
COUNT = flags.DEFINE_integer("count", None, "--mode=sample: how many of each prompt; 8 images, or 1, unless given.")
GRID = flags.DEFINE_string("grid", None, "--mode=sample: the bucket to draw in, rows x columns of patches, as 8x32.")
STEP = flags.DEFINE_string("step", "latest", "--mode=eval and sample: the checkpoint: a step, latest or best.")
OUTPUT = flags.DEFINE_string("output", None, "--mode=sample: the PNG to write; other files stand beside it.")
FORMAT = flags.DEFINE_list("format", None, "--mode=sample: some of grid,png,npy,json; grid,json unless given.")
CPU_DEVICES = flags.DEFINE_integer("cpu_devices", None, "Devices on a CPU; unless given, one a core, if rows divide.")
PROFILE = flags.DEFINE_string(
    "profile", None, "--mode=train: STEP or STEP:COUNT, the steps to trace; see docs/monitoring.md."
)
TRACEBACK = flags.DEFINE_boolean("traceback", False, "Show the whole traceback of an error.")


def main(argv: list[str]) -> int:
    """Exit code of the run; errors that a person can mend are one sentence on standard error."""
    try:
        _parse(argv)
        if warning := limits.check_memory():
            logging.warning(warning)
        from src.build import rows_of  # after the flags, so that a typo is answered at once
        from src.common.mesh import distributed
        from src.common.runtime import cpu_devices, peers

        training = MODE.value == "train"
        config = FLAGS.config
        told = cpu_devices.start(config, rows_of(config), CPU_DEVICES.value, WORKDIR.value, training)
        distributed.start(stoppable=training)
        peers.start()
        stopping.start(graceful=training, shared=distributed.is_shared())
        if not distributed.is_first():  # one process tells how it goes
            logging.set_verbosity(logging.WARNING)
        if told:
            logging.info("%s", told)
        from src import run
        from src.tools.datasets import debug_files

        debug_files.fill_for(FLAGS)
        modes = {"train": run.train, "eval": run.evaluate, "sample": run.sample, "doctor": run.doctor}
        modes[MODE.value](FLAGS, STARTED)
        distributed.stop()
        peers.close()
        return 0
    except stopping.Stopped as stopped:
        distributed.stop()
        peers.close()
        streams.tell(f"stopped as asked{f' {stopped}'.rstrip()}; the same command goes on from there")
        stopping.note(str(stopped))
        return 0
    except KeyboardInterrupt:
        streams.tell("interrupted; run the same command again to go on from the last checkpoint")
        return 130
    except (ValueError, KeyError, OSError, RuntimeError, FloatingPointError, MemoryError) as error:
        if TRACEBACK.present and TRACEBACK.value:
            raise
        streams.tell(f"error: {_in_words(error)}")
        return 1
    finally:
        stopping.close()
        abort_note.close()


def _in_words(error: BaseException) -> str:
    if type(error).__module__.startswith(("jax", "xla")):
        from src.common.runtime import peers

        if peers.is_lost(error):
            return peers.told(str(error), peers.missing())
    return errors.in_words(error)


def _parse(argv: list[str]) -> None:
    """Reads the flags; raises ValueError in one sentence for what is wrong with them or with the config file."""
    config, workdir = config_flag.parse(FLAGS, argv), WORKDIR.value
    if config is None:
        raise ValueError("no config is given: add --config=configs/digits.py (or another file of configs/)")
    if not (workdir or "").strip() and MODE.value != "doctor":
        raise ValueError("no workdir is given: add --workdir=runs/<name>, where checkpoints and logs will go")
    if workdir:
        try:
            store.check_store(workdir)
        except ValueError as error:
            raise ValueError(f"--workdir={error}") from error
    if STEP.value not in ("latest", "best") and not STEP.value.isdigit():
        raise ValueError(f"--step={STEP.value} is no checkpoint; give a step, latest or best")
    if MODE.value == "train" and STEP.present:
        raise ValueError(f"--step={STEP.value} is for --mode=eval and sample; training goes on from the newest")
    if PROFILE.value is not None:
        if MODE.value != "train":
            raise ValueError(f"--profile={PROFILE.value} is for --mode=train, whose steps it traces")
        tracing.parse_steps(PROFILE.value, config.get("steps"))
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    # Libraries tell of every file that they rename; what they warn of is kept.
    own = os.path.dirname(os.path.abspath(__file__))
    logging.get_absl_handler().addFilter(lambda r: r.levelno >= WARNING or r.pathname.startswith(own))


if __name__ == "__main__":
    background.leave(main(sys.argv))
