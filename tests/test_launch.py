"""The launch scripts: what they print is what they would run, and what they would run is right. No cloud is needed.

Every program that they could call is replaced by one that notes its arguments, in a copy of the scripts.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.helpers.launch_box import ROOT, Sandbox

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
    assert box.dry("test.sh", "-k", "x y")[-1] == [python, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-k", "x y"]
    lines = box.dry("local_processes.sh", "2", "--config=c", "--workdir=w", PORT="7777", DEVICES_PER_PROCESS="3")
    for number, line in enumerate(lines[-3:-1]):
        assert {f"JAX_PROCESS_ID={number}", "JAX_NUM_PROCESSES=2", "JAX_COORDINATOR_ADDRESS=127.0.0.1:7777"} < {*line}
        assert "XLA_FLAGS=--xla_force_host_platform_device_count=3" in line and line[-1] == "&"
    for action in ("setup", "run", "start", "logs", "status", "stop"):
        flags = ["--config=c"] if action in ("setup", "run", "start") else []
        assert box.dry("worker.sh", action, *flags)
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


def test_commands_of_the_documents_exist(box):
    text = (ROOT / "docs/pods.md").read_text()
    commands = re.findall(r"^(?:[A-Z_]+=\S+ )*bash launch/\S+.*$", text, re.MULTILINE)
    assert len(commands) > 15
    for command in commands:
        script = command.replace("bash launch/", "DRY_RUN=true bash launch/").partition("#")[0]
        code, _, err = box.run("-c", script, **SETTINGS)
        assert code == 0, (command, err)
    assert box.called() == []
