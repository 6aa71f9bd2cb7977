"""Fault 34: a damaged or missing cache of compiled programs costs time, and nothing else."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import jax, jax.numpy as jnp
from src.common.runtime.compilation_cache import use_program_cache
use_program_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
print(float(jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.ones((8, 8)))), sum("cache_hits" in hit for hit in hits))
"""
KINDS = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "garbage": lambda data: bytes(range(256)),
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
}


def start(place):
    """(result, number of programs read from the cache, what was warned) of a fresh process."""
    env = os.environ | {"XDG_CACHE_HOME": str(place)}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result, hits = done.stdout.split()
    return result, int(hits), done.stderr


@pytest.mark.faults
def test_damaged_entries_are_compiled_once_more(tmp_path):
    result, hits, _ = start(tmp_path)
    assert hits == 0
    _, every, warned = start(tmp_path)
    assert every > 0 and "Damaged" not in warned
    for kind, damage in KINDS.items():
        for path in tmp_path.rglob("*-cache"):
            path.write_bytes(damage(path.read_bytes()))
        again, hits, warned = start(tmp_path)
        assert (again, hits) == (result, 0), kind
        assert "Damaged compilation cache in" in warned and str(tmp_path) in warned
        again, hits, warned = start(tmp_path)
        assert (again, hits) == (result, every) and "Damaged" not in warned, f"{kind}: it is sound again"


@pytest.mark.faults
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", "/proc/nowhere"):
        _, hits, warned = start(place)
        assert hits == 0 and f"Programs are compiled at every start: {place}" in warned
        assert "UserWarning" not in warned, "it is said once"


NAMES = """
import sys
import jax, jax.numpy as jnp
from src.common.runtime.compilation_cache import use_program_cache
use_program_cache(named=sys.argv[1] == "named")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
told = []
jax.monitoring.register_event_listener(lambda event, **_: told.append(event) if event.endswith("_hits") else None)
def f(x):
    with jax.named_scope(sys.argv[2]):
        return jnp.sin(x) @ x
text = jax.jit(f).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile().as_text()
print(*(name for name in ("old", "new") if f"/{name}/" in text), len(told))
"""


@pytest.mark.faults
def test_a_traced_run_does_not_take_a_program_with_the_names_of_before(tmp_path):
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}

    def said(*arguments):
        command = [sys.executable, "-c", NAMES, *arguments]
        return subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout.split()

    assert said("plain", "old") == ["old", "0"]
    assert said("plain", "new") == ["old", "1"], "otherwise the distinction is needless"
    assert said("named", "new") == ["new", "0"] and said("named", "new") == ["new", "1"]
