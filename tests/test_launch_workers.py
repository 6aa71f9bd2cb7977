"""What the launchers start on a machine: restarts, background, data, and several processes that end together."""

import os
import signal
import sys

import pytest

from tests.helpers.launch_box import Sandbox, alive, wait_for


@pytest.fixture
def box(tmp_path):
    return Sandbox(tmp_path)


def test_worker_starts_again_a_bounded_number_of_times(box):
    box.python(f'echo "$@" >>{box.folder}/runs; (( $(wc -l <{box.folder}/runs) > 2 )) || exit 3')
    code, _, err = box.run("launch/worker.sh", "run", "--a=b c", RETRIES="1", RETRY_WAIT="0")
    assert code == 3 and (box.folder / "runs").read_text() == 2 * "-m src.main --a=b c\n"
    assert "restart 1 of at most 1" in err
    (box.folder / "runs").unlink()
    assert box.run("launch/worker.sh", "run", RETRIES="2", RETRY_WAIT="0")[0] == 0
    assert len((box.folder / "runs").read_text().splitlines()) == 3


def test_an_abort_by_jax_names_process_0(box):
    """Without process 0 JAX aborts the others before Python can say anything."""
    box.python("exit 134")
    code, _, err = box.run("launch/worker.sh", "run", RETRIES="0", JAX_DISTRIBUTED="auto")
    assert code == 134 and "process 0, which runs its service, ended or cannot be reached" in err
    assert "process 0" not in box.run("launch/worker.sh", "run", RETRIES="0")[2], "alone it is another abort"


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


def test_worker_in_the_background(box):
    at = box.folder
    note = f"echo $$ >{at}/x; mv {at}/x {at}/pid"
    box.python(f"trap 'echo asked >{at}/asked; exit 1' TERM; {note}; while :; do sleep 0.05; done")
    assert box.run("launch/worker.sh", "start", RETRY_WAIT="0")[0] == 0
    wait_for((box.folder / "pid").exists)
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
    note = (
        f'env | grep -E "^(JAX|XLA)_" | sort >{at}/env{rank}; echo $$ >{at}/x{rank}; mv {at}/x{rank} {at}/pid{rank}\n'
    )
    box.python(f"{note}echo I am $JAX_PROCESS_ID")
    code, out, _ = box.run("launch/local_processes.sh", "3")
    assert (code, out) == (0, "I am 0\n")
    assert (box.folder / "code/runs/processes/2.log").read_text() == "I am 2\n"
    seen = [dict(line.split("=", 1) for line in (box.folder / f"env{i}").read_text().splitlines()) for i in range(3)]
    assert [s.pop("JAX_PROCESS_ID") for s in seen] == ["0", "1", "2"] and seen[0] == seen[1] == seen[2]
    assert seen[0]["JAX_NUM_PROCESSES"] == "3" and seen[0]["JAX_COORDINATOR_ADDRESS"].startswith("127.0.0.1:")
    assert seen[0]["XLA_FLAGS"] == "--xla_force_host_platform_device_count=4"

    # One fails after all have begun: the others end, and its code is the answer.
    gone = f"until (( $(ls {at}/pid? | wc -l) == 3 )); do sleep 0.02; done; [[ {rank} != 1 ]] || exit 7\n"
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
    wait_for(lambda: len([*box.folder.glob("pid?")]) == 3)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert not any(alive(file.read_text().strip()) for file in box.folder.glob("pid?"))


def test_a_run_that_was_asked_to_stop_is_started_again(box):
    """Exit code 0 with a note is not the end; it counts as no failure, and without restarts it is told by its code."""
    runs = box.folder / "runs"
    box.python(f'echo x >>{runs}; (( $(wc -l <{runs}) > 3 )) || {{ echo step 5 >"$STOP_NOTE"; }}')
    code, _, err = box.run("launch/worker.sh", "run", RETRIES="1", RETRY_WAIT="0")
    assert code == 0 and runs.read_text() == 4 * "x\n" and err.count("asked to stop, not by this launcher") == 3
    runs.unlink()
    assert box.run("launch/worker.sh", "run", RETRIES="0")[0] == 143
    assert runs.read_text() == "x\n"
