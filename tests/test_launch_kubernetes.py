"""The objects that launch/k8s.sh gives to a cluster: valid by the published schemas, and what they run is right."""

import json
import os
import pathlib
import shlex

import jsonschema
import pytest
import yaml

from tests.helpers.launch_box import Sandbox, wait_for

SCHEMAS = json.loads((pathlib.Path(__file__).parent / "schemas" / "kubernetes.json").read_text())
SETTINGS = {"BUCKET": "gs://my-bucket", "REPOSITORY": "https://example.com/code.git", "RUN_NAME": "trial"}
FLAG = """--prompt=a 'b' "c" $HOME $$ $(HOME) && {d}: #"""  # crosses YAML, Kubernetes and two shells


@pytest.fixture
def box(tmp_path):
    return Sandbox(tmp_path)


def objects(box, *flags, **settings):
    """The objects by kind, each valid."""
    code, out, err = box.run("launch/k8s.sh", "show", *flags, **SETTINGS | settings)
    assert code == 0, err
    found = {each["kind"]: each for each in yaml.safe_load_all(out)}
    for kind, each in found.items():
        jsonschema.Draft202012Validator(SCHEMAS[kind]).validate(each)
    return found


def job(found):
    """(spec of the JobSet, spec of its Job, spec of the pods, the container) of a JobSet or TrainingRuntime."""
    spec = found["JobSet"]["spec"] if "JobSet" in found else found["TrainingRuntime"]["spec"]["template"]["spec"]
    (replicated,) = spec["replicatedJobs"]
    pods = replicated["template"]["spec"]["template"]["spec"]
    return spec, replicated["template"]["spec"], pods, pods["containers"][0]


def line(container):
    """What Kubernetes gives to bash: it makes one dollar of two."""
    (text,) = container["args"]
    assert "$" not in text.replace("$$", "")
    return text.replace("$$", "$")


def test_tpus_of_a_jobset(box):
    found = objects(box, ACCELERATOR="v5p-128", SLICES="2", QUEUE="team", SPOT="true", GRACE="90", RETRIES="4")
    assert [*found] == ["JobSet"] and found["JobSet"]["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    assert "cloud.google.com/gke-nodepool" in found["JobSet"]["metadata"]["annotations"].values()
    spec, batch, pods, container = job(found)
    assert spec["failurePolicy"]["maxRestarts"] == 4 and spec["replicatedJobs"][0]["replicas"] == 2
    assert (batch["completions"], batch["parallelism"], batch["backoffLimit"]) == (16, 16, 0)
    assert pods["terminationGracePeriodSeconds"] == 90 and pods["restartPolicy"] == "Never"
    assert pods["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4} and "env" not in container
    words = shlex.split(line(container))
    assert {"JAX_DISTRIBUTED=auto", "REQUIREMENTS=requirements-tpu.txt", "RETRIES=0"} < {*words}
    # A machine that is taken away fails the job for a reason that restarts it without counting.
    (rule,), (pattern,) = spec["failurePolicy"]["rules"], batch["podFailurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert pattern["action"] == "FailJob" and pattern["onPodConditions"][0]["type"] == "DisruptionTarget"


@pytest.mark.parametrize(
    ("accelerator", "settings", "label", "topology", "chips", "hosts"),
    [
        ("v4-32", {}, "tpu-v4-podslice", "2x2x4", 4, 4),
        ("v5litepod-4", {}, "tpu-v5-lite-podslice", "2x2", 4, 1),
        ("v5litepod-256", {}, "tpu-v5-lite-podslice", "16x16", 4, 64),
        ("v6e-8", {"CHIPS_PER_NODE": "8"}, "tpu-v6e-slice", "2x4", 8, 1),
        ("v6e-1", {}, "tpu-v6e-slice", "1x1", 1, 1),
        ("tpu7x-4x4x8", {}, "tpu7x", "4x4x8", 4, 32),
    ],
)
def test_slices(box, accelerator, settings, label, topology, chips, hosts):
    found = objects(box, ACCELERATOR=accelerator, **settings)
    _, batch, pods, container = job(found)
    assert [*pods["nodeSelector"].values()] == [label, topology] and batch["completions"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert ("JAX_DISTRIBUTED=auto" in line(container)) == (hosts > 1) == ("annotations" in found["JobSet"]["metadata"])


def test_gpus_of_a_jobset_are_told_who_they_are(box):
    found = objects(box, ACCELERATOR="gpu-32", NODE_SELECTOR="a/b=c d=e", SERVICE_ACCOUNT="writer")
    _, batch, pods, container = job(found)
    assert batch["completions"] == 4 and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pods["nodeSelector"] == {"a/b": "c", "d": "e"} and pods["serviceAccountName"] == "writer"
    env = {each["name"]: each.get("value") or each["valueFrom"]["fieldRef"]["fieldPath"] for each in container["env"]}
    assert env == {
        "JAX_COORDINATOR_ADDRESS": "trial-node-0-0.trial:8476",  # jobset, replicated job, job and pod; subdomain
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "metadata.annotations['batch.kubernetes.io/job-completion-index']",
    }
    assert {"JAX_DISTRIBUTED=", "REQUIREMENTS=requirements-gpu.txt"} < {*shlex.split(line(container))}


@pytest.mark.parametrize(("accelerator", "hosts"), [("gpu-16", 2), ("v5litepod-16", 4)])
def test_a_train_job_with_a_runtime_of_its_own(box, accelerator, hosts):
    found = objects(box, KIND="trainjob", ACCELERATOR=accelerator, QUEUE="team")
    runtime, train = found["TrainingRuntime"], found["TrainJob"]
    assert train["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": runtime["metadata"]["name"],
    }  # fmt: skip
    assert train["spec"]["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"] == hosts
    assert train["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    assert runtime["spec"]["mlPolicy"]["jax"] == {}  # Kubeflow gives the processes their names
    spec, _, _, container = job(found)
    labels = spec["replicatedJobs"][0]["template"]["metadata"]["labels"]
    assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"} and container["name"] == "node"
    assert "env" not in container and "JAX_DISTRIBUTED=" in shlex.split(line(container))


def test_what_a_container_runs(box):
    """The flags come through, and a stop reaches the training, whose container then ends as one that was stopped."""
    stop = "trap 'echo why >$STOP_NOTE; kill $!; exit' TERM; sleep 30 & wait"  # as src.main that saves and ends with 0
    box.python(f'printf "%s\\n" "${{@:3}}" >{box.folder}/flags\n{stop}')
    (box.folder / "code/trial/.git").mkdir(parents=True)
    for name in ("launch", *(file.name for file in (box.folder / "code").glob("requirements*"))):
        (box.folder / "code/trial" / name).symlink_to(box.folder / "code" / name)
    _, _, _, container = job(objects(box, FLAG, RUN_ENV="A=1"))
    assert container["command"] == ["bash", "-c"]
    process = box.start("-c", line(container))
    flags = box.folder / "flags"
    wait_for(lambda: flags.exists() and flags.read_text().count("\n") == 3)
    assert flags.read_text().splitlines() == ["--config=configs/imagenet256.py", "--workdir=gs://my-bucket/trial", FLAG]
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 143


def test_what_is_printed_is_what_runs(box):
    for kind in ("jobset", "trainjob"):
        for action in ("run", "status", "logs", "stop"):
            code, out, err = box.run("launch/k8s.sh", "--dry-run", action, **SETTINGS, KIND=kind)
            assert code == 0 and not box.called(), err
            assert box.run("-c", out)[0] == 0
            pasted = box.called()
            assert box.run("launch/k8s.sh", action, **SETTINGS, KIND=kind)[0] == 0
            assert box.called() == pasted != []
            assert all(call[:2] == ["kubectl", "--namespace=default"] for call in pasted)
    shown = box.run("launch/k8s.sh", "show", **SETTINGS)[1]
    assert shown in box.run("launch/k8s.sh", "--dry-run", "run", **SETTINGS)[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"KIND": "job"}, "KIND is 'job'"),
        ({"ACCELERATOR": "v5litepod-12"}, "give its topology, like v5litepod-4x4"),
        ({"ACCELERATOR": "h100"}, "use v4-N, v5litepod-N"),
        ({"ACCELERATOR": "gpu-12"}, "choose a multiple of the 8"),
        ({"ACCELERATOR": "gpu-x"}, "write it like gpu-16"),
        ({"ACCELERATOR": "gpu-16", "SLICES": "2"}, "GPUs have no slices"),
        ({"KIND": "trainjob", "SLICES": "2"}, "a TrainJob is one slice"),
        ({"CHIPS_PER_NODE": "all"}, "set GPUS_PER_NODE or CHIPS_PER_NODE"),
        ({"GRACE": "1m"}, "GRACE is '1m'"),
        ({"WORKDIR": "runs/x"}, "give a gs:// path"),
        ({"REPOSITORY": ""}, "REPOSITORY is empty"),
        ({"RUN_ENV": "A=1\nB=2"}, "has a line break"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_sentence(box, settings, words):
    for action in ("show", "run"):
        code, out, err = box.run("launch/k8s.sh", action, **SETTINGS | settings)
        assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("error: ") and words in err, err
    assert not box.called() and os.listdir(box.folder / "code")


def test_the_schemas_are_strict(box):
    """A key or value that the published ones do not have is refused, however deep."""
    found = objects(box)["JobSet"]
    for spoil in (
        lambda pods: pods.update(terminationGracePeriod=3),
        lambda pods: pods.update(terminationGracePeriodSeconds="3"),
        lambda pods: pods["containers"][0].pop("name"),
        lambda pods: pods["containers"][0]["resources"]["limits"].update({"google.com/tpu": "four"}),
    ):
        spoilt = json.loads(json.dumps(found))
        spoil(job({"JobSet": spoilt})[2])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoilt, SCHEMAS["JobSet"])
