"""The launch scripts: what they print is what they would run, and what they would run is right. No cloud is needed.

Every program that they could call is replaced by one that notes its arguments, in a copy of the scripts.
"""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = "gcloud xpk kubectl srun git curl python3 pip ssh"
SETTINGS = {
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "BUCKET": "gs://my-bucket",
    "REPOSITORY": "https://example.com/code.git",
    "RUN_NAME": "trial",
}
FLAG = """--prompt=a 'b' "c" $HOME && {d}"""  # crosses two shells
CLOUD = {
    "tpu_vm.sh": ("create", "status", "setup", "run", "logs", "stop", "delete"),
    "gce_mig.sh": ("create", "status", "setup", "run", "logs", "stop", "delete"),
    "gke_xpk.sh": ("create", "run", "status", "logs", "stop", "delete"),
}


class Sandbox:
    """A copy of the scripts, with recording programs first in the path and a Python that obeys the test."""

    def __init__(self, folder):
        self.folder, self.calls = folder, folder / "calls"
        shutil.copytree(ROOT / "launch", folder / "code/launch")
        for file in ROOT.glob("requirements*.txt"):
            shutil.copy(file, folder / "code")
        (folder / "bin").mkdir()
        for name in PROGRAMS.split():
            self.program(
                f"bin/{name}",
                # One write a line, as calls may come side by side.
                f'line=$(printf %s {name}; printf "\\x1f%s" "$@"); echo "$line" >>{self.calls}\n'
                '[[ "$*" == *"list-instances"*"value(name)"* ]] && printf "trial-a\\ntrial-b\\n"; true',
            )
        keep = {"HOME": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}", "LANG": "C.UTF-8"}
        self.environment = keep | {"VENV": str(folder / "venv")}

    def program(self, path, text):
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"#!/usr/bin/env bash\n{text}\n")
        target.chmod(0o755)

    def python(self, text):
        """The environment's Python: it accepts every check, and `text` is what `-m src.main` does."""
        self.program("venv/bin/python", f'[[ "$1 $2" == "-m src.main" ]] || exit 0\n{text}')
        self.program("venv/bin/pip", "true")

    def start(self, *words, **environment):
        return subprocess.Popen(
            ["bash", *words], cwd=self.folder / "code", env=self.environment | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def run(self, *words, **environment):
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def called(self):
        """What was called since the last question: a sorted list of words, as some run side by side."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return sorted(line.split("\x1f") for line in lines)

    def dry(self, script, *words, **environment):
        """The lines that --dry-run prints, as words; nothing was called or written, and bash can read them."""
        before = sorted(self.folder.rglob("*"))
        code, out, err = self.run(f"launch/{script}", "--dry-run", *words, **environment)
        assert code == 0, err
        assert self.called() == []
        assert sorted(self.folder.rglob("*")) == before
        assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0, out
        self.text = out
        return [shlex.split(line) for line in out.splitlines()]


@pytest.fixture
def box(tmp_path):
    return Sandbox(tmp_path)


def remote(words):
    """The command that is sent to a machine."""
    return next(w.removeprefix("--command=") for w in words if w.startswith("--command="))


def test_shellcheck():
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("shellcheck", path=path)
    assert program, "shellcheck is missing: install requirements-test.txt"
    scripts = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "launch").iterdir())
    found = subprocess.run([program, "-x", *scripts, ".ci/run"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("script", CLOUD)
def test_what_is_printed_is_what_runs(box, script):
    for action in CLOUD[script]:
        flags = [FLAG] if action == "run" else []
        for line in box.dry(script, action, *flags, **SETTINGS):
            for start in [i for i, word in enumerate(line) if word in ("gcloud", "xpk")]:
                assert "--project=my-project" in line[start:], line
                assert {"--zone=us-west4-a", "--region=us-west4", "--location=us-west4"} & {*line[start:]} or (
                    "--instance-template-region=us-west4" in line[start:]
                ), line
        assert box.run("-c", box.text)[0] == 0
        pasted = box.called()
        code, _, err = box.run(f"launch/{script}", action, *flags, **SETTINGS)
        assert (code, err) == (0, "")
        assert box.called() == pasted != []


def test_tpu_vm(box):
    (create,) = box.dry(
        "tpu_vm.sh", "create", **SETTINGS, ACCELERATOR="v5p-128", SPOT="true", CREATE_FLAGS="--network=n"
    )
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "trial"]
    wanted = {
        "--node-id=trial",
        "--accelerator-type=v5p-128",
        "--runtime-version=v2-alpha-tpuv5",
        "--spot",
        "--network=n",
    }
    assert wanted < {*create}
    versions = {"v4-8": "tpu-ubuntu2204-base", "v5litepod-16": "v2-alpha-tpuv5-lite", "v6e-64": "v2-alpha-tpuv6e"}
    for accelerator, version in versions.items():
        (create,) = box.dry("tpu_vm.sh", "create", **SETTINGS, ACCELERATOR=accelerator, QUEUED="false")
        assert create[3:6] == ["tpu-vm", "create", "trial"] and f"--version={version}" in create
    (create,) = box.dry("tpu_vm.sh", "create", **SETTINGS, SLICES="2")
    assert {"--node-count=2", "--node-prefix=trial"} < {*create} and "--spot" not in create
    (stop,) = box.dry("tpu_vm.sh", "stop", **SETTINGS, SLICES="2")
    assert stop[3:6] == ["queued-resources", "ssh", "trial"] and {"--node=all", "--worker=all"} < {*stop}
    for action in ("status", "setup", "run", "stop"):
        assert "--worker=all" in box.dry("tpu_vm.sh", action, **SETTINGS)[-1]
    (logs,) = box.dry("tpu_vm.sh", "logs", **SETTINGS, WORKER="3")
    assert logs[3:6] == ["tpu-vm", "ssh", "trial"] and "--worker=3" in logs
    (setup,) = box.dry("tpu_vm.sh", "setup", **SETTINGS, BRANCH="dev", DATA="gs://my-bucket/data")
    words = shlex.split(remote(setup))
    assert "https://example.com/code.git" in words and words[words.index("fetch") + 1 :][:2] == ["origin", "dev"]
    assert words[-3:] == ["bash", "launch/worker.sh", "setup"]
    assert {"REQUIREMENTS=requirements-tpu.txt", "DATA=gs://my-bucket/data"} < {*words}


def test_flags_and_environment_reach_the_workers(box):
    """Through two shells on TPU machines and in a container: the words that src.main gets are those that were given."""
    for script in CLOUD:
        line = box.dry(script, "run", FLAG, "--config=c.py:debug", **SETTINGS, RUN_ENV="A=1 B=2", RETRIES="4")[-1]
        words = shlex.split(remote(line))
        environment = words[len(words) - words[::-1].index("env") : -6]
        assert {"JAX_DISTRIBUTED=auto", "A=1", "B=2"} < {*environment}
        assert words[-6:-3] == ["bash", "launch/worker.sh", "run" if script == "gke_xpk.sh" else "start"]
        assert words[-3:] == ["--workdir=gs://my-bucket/trial", FLAG, "--config=c.py:debug"]
        # Kubernetes restarts the whole workload; elsewhere each machine starts its own process again.
        restarts = ("--max-restarts=4" in line, "RETRIES=4" in environment, "RETRIES=0" in environment)
        assert restarts == ((True, False, True) if script == "gke_xpk.sh" else (False, True, False))


def test_gce_mig(box):
    policy, template, group, wait = box.dry("gce_mig.sh", "create", **SETTINGS, RESERVATION="mine")
    assert policy[1:5] == ["compute", "resource-policies", "create", "workload-policy"]
    assert {"--type=HIGH_THROUGHPUT", "--accelerator-topology=4x4x4"} < {*policy}
    assert {"--machine-type=tpu7x-standard-4t", "--reservation=mine", "--maintenance-policy=TERMINATE"} < {*template}
    assert "--image-family=ubuntu-accel-2404-amd64-tpu-tpu7x" in template
    where = "projects/my-project/regions/us-west4"
    assert {"--size=16", f"--template={where}/instanceTemplates/trial", "--target-size-policy-mode=bulk"} < {*group}
    assert f"--workload-policy={where}/resourcePolicies/trial" in group and wait[4] == "wait-until"
    single = {"MACHINE_TYPE": "ct6e-standard-8t", "TOPOLOGY": "2x4", "SPOT": "true"}
    template, group, wait = box.dry("gce_mig.sh", "create", **SETTINGS, **single)
    assert "--provisioning-model=SPOT" in template and "--size=1" in group
    box.run("launch/gce_mig.sh", "stop", **SETTINGS)
    assert [call[3] for call in box.called() if call[2] == "ssh"] == ["trial-a", "trial-b"]
    box.run("launch/gce_mig.sh", "logs", **SETTINGS, WORKER="1")
    assert [call[3] for call in box.called() if call[2] == "ssh"] == ["trial-b"]


def test_gke_xpk(box):
    (create,) = box.dry("gke_xpk.sh", "create", **SETTINGS, ACCELERATOR="tpu7x-4x4x4", SLICES="2", CLUSTER="big")
    assert create[:3] == ["xpk", "cluster", "create"]
    assert {"--cluster=big", "--tpu-type=tpu7x-4x4x4", "--num-slices=2", "--on-demand"} < {*create}
    (run,) = box.dry("gke_xpk.sh", "run", **SETTINGS, ACCELERATOR="tpu7x-4x4x4", SLICES="2", CLUSTER="big")
    assert {"--workload=trial", "--cluster=big", "--tpu-type=tpu7x-4x4x4", "--num-slices=2"} < {*run}


def test_slurm(box):
    setup, train = box.dry("slurm.sbatch", "--config.steps=5", GPUS_PER_NODE="4", RUN_ENV="A=1")
    assert setup[:3] == ["srun", "--nodes=1", "--ntasks=1"] and setup[-1] == "setup"
    assert {"--ntasks-per-node=4", "JAX_DISTRIBUTED=auto", "A=1", f"VENV={box.folder}/venv"} < {*train}
    assert "REQUIREMENTS=requirements-gpu.txt" in train
    assert train[-4:] == ["run", "--config=configs/imagenet256.py", "--workdir=runs/imagenet256", "--config.steps=5"]
    _, train = box.dry("slurm.sbatch", GPUS_PER_NODE="4", PROCESSES="node", NETWORK="slingshot", XLA_FLAGS="--mine")
    assert {"--ntasks-per-node=1", "JAX_LOCAL_DEVICE_IDS=0,1,2,3", "NCCL_NET=AWS Libfabric"} < {*train}
    flags = next(word for word in train if word.startswith("XLA_FLAGS="))
    assert flags.startswith("XLA_FLAGS=--xla_gpu_") and flags.endswith(" --mine")  # the last of two counts
    # XLA aborts at a flag that it does not know, so each must exist in this jaxlib.
    environment = os.environ | {"XLA_FLAGS": flags[len("XLA_FLAGS=") : -len("--mine")], "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, check=True)


def test_dry_runs_on_this_machine(box):
    python = f"{box.folder}/venv/bin/python"
    _, install, train = box.dry("local.sh", "--config.steps=5")
    assert install == [python, "-m", "pip", "install", "-r", "requirements.txt"]
    assert train == [
        python,
        "-m",
        "src.main",
        "--config=configs/digits.py",
        "--workdir=runs/digits",
        "--config.steps=5",
    ]
    assert box.dry("test.sh", "-k", "x y")[-1] == [python, "-m", "pytest", "-k", "x y"]
    lines = box.dry("local_processes.sh", "2", "--config=c", "--workdir=w", PORT="7777", DEVICES_PER_PROCESS="3")
    for number, line in enumerate(lines[-3:-1]):
        assert {f"JAX_PROCESS_ID={number}", "JAX_NUM_PROCESSES=2", "JAX_COORDINATOR_ADDRESS=127.0.0.1:7777"} < {*line}
        assert "XLA_FLAGS=--xla_force_host_platform_device_count=3" in line and line[-1] == "&"
    for action in ("setup", "run", "start", "logs", "status", "stop"):
        assert box.dry("worker.sh", action, "--config=c")
    for script in (box.folder / "code/launch").glob("*"):
        if script.name not in ("cluster.env", "common.sh", "setup_env.sh"):
            code, out, _ = box.run(f"launch/{script.name}", "--help")
            assert code == 0 and f"launch/{script.name}" in out and "set -euo" not in out


WRONG = [
    ("tpu_vm.sh create", {"PROJECT": ""}, "PROJECT is empty"),
    ("gce_mig.sh create", {"ZONE": ""}, "ZONE is empty"),
    ("gke_xpk.sh run", {"REPOSITORY": ""}, "REPOSITORY is empty"),
    ("tpu_vm.sh setup", {"REPOSITORY": ""}, "REPOSITORY is empty"),
    ("tpu_vm.sh run", {"BUCKET": ""}, "BUCKET is empty"),
    ("gce_mig.sh run", {"WORKDIR": "runs/x"}, "give a gs:// path"),
    ("tpu_vm.sh create", {"ACCELERATOR": "tpu7x-128"}, "use v4-N"),
    ("tpu_vm.sh create", {"SPOT": "yes"}, "set it to true or false"),
    ("tpu_vm.sh create", {"SPOT": "true", "RESERVATION": "r"}, "one or the other"),
    ("tpu_vm.sh start", {}, "there is no action 'start'"),
    ("tpu_vm.sh run", {"RETRIES": "many"}, "RETRIES is 'many'"),
    ("tpu_vm.sh run", {"RUN_NAME": "a_b; rm"}, "RUN_NAME is 'a_b; rm'"),
    ("gce_mig.sh create", {"TOPOLOGY": "3x3"}, "9 chips"),
    ("gce_mig.sh create", {"TOPOLOGY": "big"}, "TOPOLOGY is 'big'"),
    ("gce_mig.sh create", {"MACHINE_TYPE": "n1-standard-4t"}, "MACHINE_TYPE is"),
    ("gke_xpk.sh create", {"CLUSTER_ENV": "nowhere"}, "no settings file nowhere"),
    ("slurm.sbatch", {"PROCESSES": "two"}, "PROCESSES is 'two'"),
    ("slurm.sbatch", {"NETWORK": "x"}, "NETWORK is 'x'"),
    ("local_processes.sh two", {}, "'two' is not a number"),
    ("worker.sh run", {"RETRIES": ""}, None),  # an empty setting is the default
]


def test_a_wrong_setting_is_one_sentence(box):
    for command, settings, words in WRONG:
        for mode in ["--dry-run"] if words is None else ["--dry-run", ""]:
            script, *action = command.split()
            arguments = [f"launch/{script}", *action, *mode.split()]
            code, out, err = box.run(*arguments, **SETTINGS | {"CLUSTER": "c"} | settings)
            if words is None:
                assert code == 0
                continue
            assert (code, out, err.count("\n")) == (1, "", 1), (command, settings, out, err)
            assert err.startswith("error: ") and words in err
            assert box.called() == []


def test_worker_starts_again_a_bounded_number_of_times(box):
    box.python(f'echo "$@" >>{box.folder}/runs; (( $(wc -l <{box.folder}/runs) > 2 )) || exit 3')
    code, _, err = box.run("launch/worker.sh", "run", "--a=b c", RETRIES="1", RETRY_WAIT="0")
    assert code == 3 and (box.folder / "runs").read_text() == 2 * "-m src.main --a=b c\n"
    assert "restart 1 of at most 1" in err
    (box.folder / "runs").unlink()
    assert box.run("launch/worker.sh", "run", RETRIES="2", RETRY_WAIT="0")[0] == 0
    assert len((box.folder / "runs").read_text().splitlines()) == 3


def test_worker_copies_data_once(box):
    source = box.folder / "bucket/tinyllama"
    source.mkdir(parents=True)
    (source / "tokenizer.model").write_text("x")
    box.program("venv/bin/python", f'[[ "$2" != *fsspec* ]] || exec {sys.executable} "$@"')
    box.program("venv/bin/pip", "true")
    for _ in range(2):
        assert box.run("launch/worker.sh", "setup", DATA=f"file://{box.folder}/bucket")[0] == 0
        copied = box.folder / "code/data/tinyllama/tokenizer.model"
        assert copied.read_text() == "x"
        (source / "tokenizer.model").write_text("y")


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "this took too long"
        time.sleep(0.02)


def alive(pid):
    """Whether the process exists and is not a zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_worker_in_the_background(box):
    box.python(
        f"trap 'echo asked >{box.folder}/asked; exit 1' TERM; echo $$ >{box.folder}/pid; while :; do sleep 0.05; done"
    )
    assert box.run("launch/worker.sh", "start", RETRY_WAIT="0")[0] == 0
    wait_for((box.folder / "pid").exists)
    wait_for(lambda: (box.folder / "pid").read_text())
    pid = int((box.folder / "pid").read_text())
    assert "runs (process" in box.run("launch/worker.sh", "status")[1]
    code, _, err = box.run("launch/worker.sh", "start")
    assert code == 1 and "stop it first" in err
    assert box.run("launch/worker.sh", "stop")[0] == 0
    assert (box.folder / "asked").exists() and not alive(pid)
    assert "starting again" not in (box.folder / "code/runs/worker/log").read_text()
    assert box.run("launch/worker.sh", "status")[1].startswith("does not run")


def test_local_processes(box):
    at, rank = box.folder, "$JAX_PROCESS_ID"
    note = f'env | grep -E "^(JAX|XLA)_" | sort >{at}/env{rank}; echo $$ >{at}/pid{rank}\n'
    box.python(f"{note}echo I am $JAX_PROCESS_ID")
    code, out, _ = box.run("launch/local_processes.sh", "3")
    assert (code, out) == (0, "I am 0\n")
    assert (box.folder / "code/runs/processes/2.log").read_text() == "I am 2\n"
    seen = [dict(line.split("=", 1) for line in (box.folder / f"env{i}").read_text().splitlines()) for i in range(3)]
    assert [s.pop("JAX_PROCESS_ID") for s in seen] == ["0", "1", "2"] and seen[0] == seen[1] == seen[2]
    assert seen[0]["JAX_NUM_PROCESSES"] == "3" and seen[0]["JAX_COORDINATOR_ADDRESS"].startswith("127.0.0.1:")
    assert seen[0]["XLA_FLAGS"] == "--xla_force_host_platform_device_count=4"

    # One fails after all have begun: the others end, and its code is the answer.
    gone = (
        f"until (( $(ls {box.folder}/pid? | wc -l) == 3 )); do sleep 0.02; done; [[ $JAX_PROCESS_ID != 1 ]] || exit 7\n"
    )
    for file in box.folder.glob("pid?"):
        file.unlink()
    box.python(f"{note}{gone}exec sleep 60")
    code, _, err = box.run("launch/local_processes.sh", "3")
    assert code == 7 and "process 1 ended with exit code 7" in err
    assert not any(alive(file.read_text().strip()) for file in box.folder.glob("pid?"))

    # Ctrl-C
    for file in box.folder.glob("pid?"):
        file.unlink()
    box.python(f"{note}exec sleep 60")
    process = box.start("launch/local_processes.sh", "3")
    wait_for(lambda: len([f for f in box.folder.glob("pid?") if f.read_text()]) == 3)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert not any(alive(file.read_text().strip()) for file in box.folder.glob("pid?"))


def test_commands_of_the_documents_exist(box):
    text = (ROOT / "docs/pods.md").read_text()
    commands = re.findall(r"^(?:[A-Z_]+=\S+ )*bash launch/\S+.*$", text, re.MULTILINE)
    assert len(commands) > 15
    for command in commands:
        script = command.replace("bash launch/", "DRY_RUN=true bash launch/").partition("#")[0]
        code, _, err = box.run("-c", script, **SETTINGS)
        assert code == 0, (command, err)
    assert box.called() == []
