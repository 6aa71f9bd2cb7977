"""What may differ between a checkpoint's config and a run's: defaults that are written out, options for sampling."""

import copy
import re
import sys

import pytest

from configs import blackout_digits, latentlm_digits, showo_digits
from src.common import lookup
from src.train.checkpoints.config_changes import check_config
from src.train.loop import ELASTIC

MODULES = {"showo": showo_digits, "latentlm": latentlm_digits, "blackout": blackout_digits}
IMAGE = "tasks.caption_to_image.objectives.image"


def config(name):
    return MODULES[name].get_config("debug").to_dict()


def changed(values, **options):
    """A copy of a config with other values, by dotted path; a dict takes the place of what was there."""
    values = copy.deepcopy(values)
    for path, value in options.items():
        *outer, last = path.split(".")
        node = values
        for key in outer:
            node = node.setdefault(key, {})
        node.pop(last, None)
        if value is not None:
            node[last] = value
    return values


@pytest.mark.parametrize(
    "name, option, usual, other",
    [
        ("showo", "fields.image.head.bias", True, False),
        ("showo", "fields.image.embed.init", 0.02, 0.5),
        ("showo", "fields.text.embed.init", 0.02, 0.5),
        ("showo", "fields.image.process.masks", 1, 2),
        ("showo", "fields.image.codec.codes.seed", 0, 1),
        ("showo", f"{IMAGE}.loss.elbo", False, True),
        ("showo", f"{IMAGE}.timesteps.t_min", 0.0, 0.1),
        ("showo", f"{IMAGE}.per", "row", "token"),
        ("showo", "model.conditioning.init", "fixed", "official"),
        ("showo", "model.trunk.qk_norm", False, True),
        ("showo", "model.time.features", 256, 64),
        ("latentlm", "fields.image.head.parameterization", "velocity", "eps"),
        ("latentlm", "fields.image.head.schedule", {"name": "schedules:Linear"}, {"name": "schedules:GVP"}),
        ("latentlm", "fields.image.head.timesteps", {"name": "timesteps:Stratified"}, {"name": "timesteps:Uniform"}),
        (
            "latentlm",
            "fields.image.head.timesteps",
            {"name": "timesteps:Stratified", "t_min": 0.0},
            {"name": "timesteps:Stratified", "t_min": 0.1},
        ),
    ],
)
def test_a_default_that_is_written_out_changes_nothing(name, option, usual, other):
    given = changed(config(name), **{option: None})
    found = changed(given, **{option: usual})
    paths = [f"{option}.{key}" for key in usual] if isinstance(usual, dict) else [option]
    assert sorted(check_config(given, found, ())) == sorted(check_config(found, given, ())) == sorted(paths)
    with pytest.raises(ValueError, match=re.escape(f"({paths[0]}: 'absent' -> ") + "|" + re.escape(paths[-1])):
        check_config(given, changed(given, **{option: other}), ())


def test_a_part_inside_a_part_that_has_a_default():
    """Of a loss that weighs by time, written out or not; `loss` by name is looked into as well."""
    loss = {"name": "squared_error"}
    for where, outer in ((f"{IMAGE}.loss", loss), (f"{IMAGE}.loss.image", loss)):
        given = changed(changed(config("showo"), **{f"{IMAGE}.loss": None}), **{where: outer})
        same = changed(given, **{f"{where}.weighting": {"name": "weighting:Constant"}})
        assert list(check_config(given, same, ())) == [f"{where}.weighting.name"]
        with pytest.raises(ValueError, match=r"weighting\.name: 'absent' -> 'weighting:ELBO'"):
            check_config(given, changed(given, **{f"{where}.weighting": {"name": "weighting:ELBO"}}), ())


@pytest.mark.parametrize(
    "name, options",
    [
        ("latentlm", {"fields.image.head.steps": 3}),
        ("latentlm", {"fields.image.head.sampler": "ancestral", "fields.image.head.noise_scale": 0.5}),
        ("blackout", {"fields.image.process.rounding": "nearest"}),
        ("blackout", {"fields.image.process.rounding": None}),
    ],
)
def test_options_that_only_samples_depend_on_may_change(name, options):
    given = config(name)
    assert set(check_config(given, changed(given, **options), ELASTIC)) <= set(options)
    with pytest.raises(ValueError, match="draws"):
        check_config(config("latentlm"), changed(config("latentlm"), **{"fields.image.head.draws": 9}), ELASTIC)


def test_a_head_of_another_package_says_which_of_its_options_are_for_sampling(tmp_path, monkeypatch):
    (tmp_path / "own_of_test").mkdir()
    (tmp_path / "own_of_test" / "__init__.py").touch()
    (tmp_path / "own_of_test" / "head.py").write_text(
        "class Own:\n    SAMPLING = ('beams',)\n    def __init__(self, *, size=1, beams=4): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_of_test", "own_of_test.head"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    of = lambda **options: {"fields": {"image": {"head": {"name": "own_of_test.head"} | options}}}
    assert check_config(of(beams=4), of(beams=8), ()) == {"fields.image.head.beams": (4, 8)}
    assert list(check_config(of(), of(size=1), ())) == ["fields.image.head.size"]
    with pytest.raises(ValueError, match=r"fields\.image\.head\.size: 1 -> 2"):
        check_config(of(size=1), of(size=2), ())


def test_an_option_that_has_another_name_now_may_be_written_out_under_the_old_one():
    of = lambda **options: {"fields": {"image": {"head": {"name": "token_diffusion"} | options}}}
    assert check_config(of(temperature=0.9), of(noise_scale=0.9), ()) == {}
    assert check_config(of(temperature=1.0), of(), ()) == {"fields.image.head.noise_scale": (1.0, "absent")}


def test_the_parameters_of_a_module_are_those_of_its_constructor():
    found = {p.name: p.default for p in lookup.parameters(lookup.lookup("models/heads", "linear"))}
    assert found["bias"] is True and "args" not in found


@pytest.mark.parametrize("schedule", ["Linear", "GVP", "VP"])
def test_the_time_at_which_samples_start_may_change(schedule):
    place = "fields.image.process.schedule"
    of = lambda **options: {"fields": {"image": {"process": {"name": "gaussian:Gaussian", "schedule": options}}}}
    old = of(name=f"schedules:{schedule}", time_scale=1.0)
    assert set(check_config(old, of(name=f"schedules:{schedule}", time_scale=1.0, t_max=0.9))) == {f"{place}.t_max"}
    with pytest.raises(ValueError, match=rf"{place}\.time_scale: 1\.0 -> 2\.0"):
        check_config(old, of(name=f"schedules:{schedule}", time_scale=2.0, t_max=0.9))
