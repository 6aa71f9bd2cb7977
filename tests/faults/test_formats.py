"""Checkpoints of other versions, configs and tokenizers: read, migrated field by field, or refused in words."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from configs import digits
from src.codecs.text import SentencePiece, train_sentencepiece
from src.train import skip_nonfinite
from src.train.checkpoints import config_changes, metadata
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.config_changes import check_config, plain
from src.train.loop import ELASTIC

ROOT = pathlib.Path(__file__).parents[2]
STATE = {"a": jnp.arange(8.0), "step": jnp.int32(6)}
ABSTRACT = jax.eval_shape(lambda: STATE)


@pytest.fixture
def rewrite(tmp_path):
    """Saves a checkpoint, and writes its JSON again as `change(meta, data)` says, properly sealed."""

    def again(change):
        checkpointer = Checkpointer(tmp_path)
        checkpointer.save(6, STATE, {"next": 60}, {"lr": 1})
        checkpointer.close()
        paths = [tmp_path / "checkpoints" / "6" / item / "metadata" for item in ("meta", "data")]
        meta, data = change(*(json.loads(path.read_text()) for path in paths))
        meta = {k: v for k, v in meta.items() if k != "seal"} | {"data": metadata.checksum(data)}
        for path, value in zip(paths, (meta | {"seal": metadata.checksum(meta)}, data), strict=True):
            path.write_text(json.dumps(value))
        return tmp_path

    return again


def test_a_newer_format_is_refused_and_says_what_reads_it(rewrite):
    number = metadata.FORMAT + 1
    workdir = rewrite(lambda meta, data: (meta | {"format": number, "version": "7.8.9"}, data))
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    with pytest.raises(
        ValueError, match=rf"6 has format {number}, written by version 7\.8\.9 of .* up to {number - 1}: "
    ) as caught:
        Checkpointer(workdir).restore(ABSTRACT)
    assert "\n" not in str(caught.value)
    before.pop(workdir, None)
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before
    title = re.search(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert title[1] == metadata.VERSION


def test_older_formats_are_walked_up_to_the_present_one(rewrite, monkeypatch):
    """As if format -1 kept the rows under another name, and format 0 the config."""
    oldest = metadata.FORMAT - 2

    def old(meta, data):
        meta = {k: v for k, v in meta.items() if k not in ("version", "config")}
        return meta | {"format": oldest, "settings": {"learning_rate": 1}}, {"rows": data["value"]["next"]}

    workdir = rewrite(old)
    for known in ({}, {oldest: lambda meta, data: (meta, data)}):
        monkeypatch.setattr(metadata, "MIGRATIONS", known)
        missing = oldest + len(known)
        with pytest.raises(ValueError, match=f"has format {oldest}, .* cannot read format {missing}: "):
            Checkpointer(workdir).restore(ABSTRACT)
    steps = {
        oldest: lambda meta, data: (meta, {"value": {"next": data["rows"]}}),
        oldest + 1: lambda meta, data: (meta | {"config": {"lr": meta["settings"]["learning_rate"]}}, data),
    }
    monkeypatch.setattr(metadata, "MIGRATIONS", steps)
    _, data, meta = Checkpointer(workdir).restore(ABSTRACT, lambda saved: check_config(saved, {"lr": 1}))
    assert data == {"next": 60} and meta["config"] == {"lr": 1} and meta["format"] == metadata.FORMAT


def test_a_run_of_format_1_goes_on(tmp_path):
    """It had neither seed nor guard in its state, and said nothing of sums between two log lines."""
    state = {"w": jnp.arange(4.0), "extra": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "FORMAT", 1)
        checkpointer = Checkpointer(tmp_path)
        checkpointer.save(6, state, {"images": 60}, {"seed": 7})
        checkpointer.close()
    wanted = jax.eval_shape(lambda: state | {"extra": {"seed": jnp.uint32(0), "guard": skip_nonfinite.new_guard()}})
    found, position, _ = Checkpointer(tmp_path).restore(wanted)
    assert int(found["extra"]["seed"]) == 7 and not found["extra"]["guard"]["norms"].any()
    assert found["w"].tolist() == [0, 1, 2, 3] and found["extra"]["seed"].dtype == jnp.uint32
    counts = {"read": {}, "skipped": {}, "told": {}}
    assert position == {"rows": {"images": 60}, "counts": counts, "meter": {"steps": 0, "taken": 0, "sums": {}}}


def identity(**changes):
    config = digits.get_config("debug").unlock()
    config.update_from_flattened_dict(changes)
    return plain(config) | {"codecs": {"text": {"SentencePiece": "abcd"}}}


def without(config, *names):
    """The config of a version that did not have some fields yet."""
    for name in names:
        *outer, last = name.split(".")
        node = config
        for key in outer:
            node = node[key]
        del node[last]
    return config


def test_a_run_of_yesterday_goes_on(monkeypatch):
    """Fault 32: sections that were added since, whose default is what was done before, do not stop it."""
    old = without(identity(), "checkpoint.best", "checkpoint.keep_every", "optim.moments", "fields.text.head.chunk")
    new = identity() | {"guard": {"skip": 3}, "doctor": {"every": 100}}
    changed = check_config(old, new, ELASTIC)
    assert {"guard.skip", "doctor.every", "optim.moments", "fields.text.head.chunk", "checkpoint.keep_every"} <= set(
        changed
    )
    assert check_config(new, old, ELASTIC).keys() == changed.keys(), "and back again"
    with pytest.raises(
        ValueError, match=r"\(optim\.moments: 'absent' -> 'factored'\): .* --config.optim.moments=full;"
    ):
        check_config(old, identity(**{"optim.moments": "factored"}), ELASTIC)
    for was, said in (
        ({"VaeLatents": "a"}, r"restore the files of fields\.image\.codec"),
        ({}, "the run did not have"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            check_config({"codecs": {"image": was} if was else {}}, {"codecs": {"image": {"VaeLatents": "b"}}})
        assert "--config.codecs" not in str(error.value) and "config file" not in str(error.value)
    moved = identity()
    moved["training"] = {"lr": moved["optim"].pop("lr")}
    with pytest.raises(ValueError, match=r"optim\.lr: 'absent' -> .*; training\.lr: .* -> 'absent'\)"):
        check_config(moved, identity(), ELASTIC)
    monkeypatch.setattr(config_changes, "RENAMED", {"training": "optim"})
    assert check_config(moved, identity(), ELASTIC) == {}


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"optim.lr": 0.5},
            r"\(optim\.lr: 0\.004 -> 0\.5\): to resume it, add --config\.optim\.lr=0\.004; or ",
        ),
        (
            {"optim.lr_multipliers": ((".*", 0.5),)},
            r"set optim\.lr_multipliers back to \[\['\.\*', 1\.0\]\] in the ",
        ),
        ({"model.trunk.width": 64}, r"width: 32 -> 64\): to resume it, add --config\.model\.trunk\.width=32"),
        ({"seed": 1, "batch": 8}, r"batch: 88 -> 8; seed: 0 -> 1\): .*--config\.batch=88, add --config\.seed=0;"),
    ],
)
def test_other_changes_are_refused_field_by_field(changes, said):
    with pytest.raises(ValueError, match=said) as caught:
        check_config(identity(), identity(**changes), ELASTIC)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_named_with_its_file(tmp_path):
    """Fault 31: the fingerprint decides, not the place of the file."""
    words = "one two three four five six seven eight nine zero"
    prints = {}
    for name, text in (("a", words), ("moved/a", words), ("b", words[::-1] * 2)):
        train_sentencepiece([text], 40, tmp_path / f"{name}.model")
        prints[name] = SentencePiece(tmp_path / f"{name}.model").fingerprint()
    codec = lambda name: {"name": "text:SentencePiece", "path": f"{tmp_path}/{name}.model"}
    for where, inner in (("", codec), (".host", lambda name: {"host": codec(name)})):
        at = {
            name: {"fields": {"text": {"codec": inner(name)}}, "codecs": {"text": {"SentencePiece": prints[name]}}}
            for name in prints
        }
        assert list(check_config(at["a"], at["moved/a"])) == [f"fields.text.codec{where}.path"]
        with pytest.raises(ValueError, match=r"codecs\.text\.SentencePiece: ") as caught:
            check_config(at["a"], at["b"])
        places = f"fields.text.codec{where}.path={tmp_path}/b.model have {prints['b']}"
        assert f"the fingerprint {prints['a']} (those at {places})" in str(caught.value)


def test_an_option_that_a_config_lacks_is_what_its_part_takes():
    """Another value, a part's own name and an option that the part does not have are no such thing."""
    scale, name = "fields.image.codec.device.scale", "fields.image.head.name"
    assert list(check_config(without(identity(), scale), identity())) == [scale]
    assert list(check_config(identity(), without(identity(), scale))) == [scale]
    unheard = identity()
    unheard["fields"]["image"]["codec"]["device"]["unheard"] = 1.0
    for old, new, field in (
        (without(identity(), scale), identity(**{scale: 2.0}), scale),
        (without(identity(), name), identity(), name),
        (identity(), unheard, "fields.image.codec.device.unheard"),
    ):
        with pytest.raises(ValueError, match=rf"\({re.escape(field)}: 'absent' -> "):
            check_config(old, new)
