"""Several averages of one run: closed forms on a known trajectory, any width afterwards, and which one is used."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import common
from src.build import build_system
from src.common.mesh.fsdp import Placement
from src.common.runtime.config_keys import check_keys
from src.common.tree import flatten
from src.models.pretrained.initial_weights import Initial
from src.train.average import AVERAGES, check_chosen, further, name_of, update_further, used_params
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.config_changes import check_config
from src.train.checkpoints.read_params import CheckpointParams
from src.train.posthoc import read_posthoc
from src.train.power_average import combination, distance, exponent_of
from src.train.restored import restore_checkpoint
from src.train.setting import setting_of
from src.train.state import first_state
from src.train.step import make_train_step
from src.train.trainer import make_trainer, open_data
from tests.helpers.numbers import system_of
from tests.helpers.published import run as convert
from tests.helpers.runs import config_of
from tests.train.test_step_by_hand import BATCH, noise

EMA = {"decay": 0.75, "warmup": False, "more": (0.5, 0.9), "power": (0.05, 0.1)}


def power_shares(exponent, steps):
    """The weight of each step in a power average, in closed form: (τ^(γ+1) - (τ-1)^(γ+1)) / t^(γ+1)."""
    edges = (np.arange(steps + 1) / steps) ** (exponent + 1)
    return np.diff(edges)


def test_widths_are_those_of_the_paper():
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.01) and exponent_of(0.1) == pytest.approx(6.94, abs=0.01)
    for width in (0.01, 0.05, 0.1, 0.2, 0.28):
        gamma = exponent_of(width)
        assert width == pytest.approx(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))), rel=1e-9)
        shares = power_shares(gamma, 4000)
        times = (np.arange(4000) + 0.5) / 4000
        assert np.sqrt(shares @ times**2 - (shares @ times) ** 2) == pytest.approx(width, rel=1e-3)
    for width in (0.0, -0.1, 0.29, float("nan")):
        with pytest.raises(ValueError, match="has a width above 0"):
            exponent_of(width)


def test_the_averages_are_the_closed_forms_of_a_known_trajectory():
    """The parameters are a curve of the step; nothing of the initial ones is left in a power average."""
    ema, steps = ConfigDict(EMA | {"warmup": True}), 60
    curve = lambda t: np.stack([np.sin(t / 7), np.sqrt(t), t**2 / 1000]).astype(np.float32)
    averages = {name: {"w": jnp.full(3, 100.0)} for name in further(ema)}
    update = jax.jit(lambda averages, params, step: update_further(averages, params, ema, step))
    for step in range(steps):
        averages = update(averages, {"w": jnp.asarray(curve(step + 1.0))}, step)
    values = curve(np.arange(1.0, steps + 1))
    for width in EMA["power"]:
        wanted = values @ power_shares(exponent_of(width), steps)
        np.testing.assert_allclose(averages[name_of("width", width)]["w"], wanted, rtol=3e-6)
    for decay in EMA["more"]:
        kept, wanted = 1.0, np.zeros(3)
        for step in range(steps):
            d = min(decay, (1 + step) / (10 + step))
            kept, wanted = kept * d, d * wanted + (1 - d) * values[:, step]
        np.testing.assert_allclose(averages[name_of("decay", decay)]["w"], wanted + kept * 100, rtol=1e-5)


def test_any_width_is_made_of_two_that_were_kept():
    steps, kept = 2048, [256 * (n + 1) for n in range(8)]
    gammas = [exponent_of(width) for width in (0.05, 0.1)]
    times = np.arange(1.0, steps + 1)
    curve = np.stack([np.sin(times / 150), np.exp(-times / 700), np.random.default_rng(0).normal(size=steps).cumsum()])
    rows = [(gamma, at) for gamma in gammas for at in kept]
    saved = np.stack([curve[:, :at] @ power_shares(gamma, at) for gamma, at in rows])
    exponents, ats = zip(*rows, strict=True)
    for width, at in ((0.07, 2048), (0.15, 2048), (0.2, 2048), (0.12, 1536)):
        wanted = curve[:, :at] @ power_shares(exponent_of(width), at)
        weights = combination(exponents, ats, exponent_of(width), at)
        same = [number for number, row in enumerate(rows) if row[1] == at]
        assert weights.sum() == pytest.approx(1, abs=1e-9)
        assert np.all(np.abs(weights @ saved - wanted) < np.abs(saved[same] - wanted).min(0) / 5), (width, at)
        few = distance(exponents[1::4], ats[1::4], exponent_of(width), at)
        assert distance(exponents, ats, exponent_of(width), at) < min(few, 0.1)
    one = combination(exponents, ats, gammas[1], 2048)
    np.testing.assert_allclose(one, np.arange(16) == 15, atol=1e-6)
    assert distance(exponents, ats, gammas[1], 2048) < 1e-6


def test_further_averages_follow_the_step_and_change_nothing_else(monkeypatch):
    def trained(ema):
        config = {"accumulate": 1, "ema": ema, "guard": {"spike": 0.0}, "optim": {"lr_multipliers": ((".*", 1.0),)}}
        system = system_of(monkeypatch, ConfigDict(config), lambda params, view, noise: params["w"] * noise, noise)
        optimizer = optax.sgd(0.5)
        step = jax.jit(make_train_step(system, optimizer, system.config, Placement({}, jnp.float32)))
        state, seen = first_state({"w": jnp.asarray(3.0)}, optimizer, 0, averages=further(ema)), []
        for number in range(12):
            if number == 5:  # a step that is not taken
                before, state = state, state.replace(params={"w": jnp.asarray(jnp.nan)})
            state, _ = step(state, BATCH)
            if number == 5:
                assert float(state.extra["guard"]["skipped"]) == 1
                state = state.replace(params=before.params)
                assert jax.tree.all(
                    jax.tree.map(jnp.array_equal, state.extra.get(AVERAGES), before.extra.get(AVERAGES))
                )
            seen.append(float(state.params["w"]))
        return state, seen

    plain, path = trained({"decay": 0.75, "warmup": False})
    state, same = trained(EMA)
    assert path == same and float(plain.ema["w"]) == float(state.ema["w"]) and AVERAGES not in plain.extra
    average = 3.0
    for value in path[:5] + path[6:]:
        average += 0.5 * (value - average)
    assert float(state.extra[AVERAGES]["decay_0_5"]["w"]) == pytest.approx(average, rel=1e-6)


def test_the_config_names_the_average_that_is_used():
    config = common.base()
    config.ema.update(EMA)
    state = first_state({"w": jnp.zeros(())}, optax.sgd(1.0), 0, averages=further(EMA))
    marked = {name: name for name in state.extra[AVERAGES]}
    state = state.replace(ema="usual", params="last", extra=state.extra | {AVERAGES: marked})
    for change, wanted in (({}, "usual"), ({"decay": 0.9}, "decay_0_9"), ({"decay": 0.75}, "usual"),
                           ({"width": 0.1}, "width_0_1"), ({"ema": False, "width": 0.1}, "last")):  # fmt: skip
        config.eval.update({"ema": True, "decay": 0.0, "width": 0.0} | change)
        assert used_params(state, config) == wanted
        told = setting_of(config, {})
        assert {k: told[k] for k in ("decay", "width") if k in told} == {
            k: v for k, v in change.items() if k in ("decay", "width") and wanted not in ("usual", "last")
        }
    for change, said in (({"decay": 0.8}, r"eval.decay=0.8: .* decay 0.5, 0.9, 0.75"),
                         ({"width": 0.2}, r"eval.width=0.2: .* width 0.05, 0.1; others"),
                         ({"width": 0.1, "decay": 0.5}, "name two averages")):  # fmt: skip
        config.eval.update({"ema": True, "decay": 0.0, "width": 0.0} | change)
        with pytest.raises(ValueError, match=said):
            check_chosen(config)
    config.eval.update({"decay": 0.0, "width": 0.2})
    check_chosen(config, afterwards=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"more": (1.5,)}, r"ema.more has 1.5"), ({"more": ("a",)}, "ema.more has 'a'"), ({"more": (0.75,)}, "already"),
        ({"more": (0.5, 0.5)}, "already"), ({"power": (0.4,)}, r"ema.power: .* width"), ({"power": (0,)}, "width"),
    ],
)  # fmt: skip
def test_wrong_averages_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        further(EMA | {"more": (), "power": ()} | change)


def test_runs_from_before_further_averages_go_on():
    new = common.base().to_dict()
    old = common.base().to_dict()
    for name, keys in (("ema", ("more", "power")), ("eval", ("decay", "width"))):
        for key in keys:
            del old[name][key]
    check_config(old, new)
    config = averaged()
    with config.unlocked():
        config.ema = {"decay": 0.9, "warmup": True}
        del config.eval["decay"], config.eval["width"]
    check_keys(config)
    assert not further(config.ema) and used_params(first_state({}, optax.sgd(1.0), 0), config) == {}
    with pytest.raises(ValueError, match=r"ema\.more"):
        check_config(old, new | {"ema": new["ema"] | {"more": (0.5,)}})


def averaged(**changes):
    """Sentences alone, with further averages, on any number of devices."""
    config = config_of(**{"ema.more": (0.5,), "ema.power": (0.05, 0.1), "mesh.data": -1} | changes)
    with config.unlocked():
        del config.tasks["image_to_caption"], config.tasks["caption_to_image"], config.fields["image"]
        config.batch, config.eval.evaluators = 16, {}
    return config


def trained(folder):
    """The state after six steps, with checkpoints of every second one; from the last of them on it is made again."""
    system = build_system(averaged(**{"mesh.data": 1}))
    trainer = make_trainer(system, jax.devices()[:1])
    step, data = trainer.compile(), open_data(trainer)
    batches = [trainer.place(next(data), number) for number in range(6)]
    data.close()
    checkpoints = Checkpointer(folder, keep=1, every=2, keep_every=2)

    def go_on(state):
        for number in range(int(state.step), 6):
            state, _ = step(state, batches[number])
            if number % 2 and number + 1 not in checkpoints.all_steps():
                assert checkpoints.save(number + 1, state, {}, system.identity())
        return jax.device_get(state)

    with jax.set_mesh(trainer.mesh):
        whole = go_on(trainer.init())
        checkpoints.wait()
        again = go_on(checkpoints.restore(trainer.abstract, None, 4)[0])
    checkpoints.close()
    return whole, again


@pytest.mark.faults
def test_a_run_keeps_its_averages_and_makes_others(tmp_path, capsys):
    """Resumed it has the same bits; evaluations and exports take the average that they name."""
    whole, again = trained(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert sorted(whole.extra[AVERAGES]) == ["decay_0_5", "width_0_05", "width_0_1"]

    def used(**changes):
        config = averaged(**{f"eval.{name}": value for name, value in changes.items()})
        return flatten(used_params(restore_checkpoint(build_system(config), str(tmp_path / "whole")), config))

    kept = {name: flatten(each) for name, each in whole.extra[AVERAGES].items()}
    path = "trunk/layers/mlp/up/kernel"
    np.testing.assert_array_equal(used(decay=0.5)[path], kept["decay_0_5"][path])
    np.testing.assert_array_equal(used(width=0.1)[path], kept["width_0_1"][path])
    made, folder = used(width=0.08), tmp_path / "whole" / "checkpoints"
    weights = read_posthoc(tmp_path / "whole", 0.08, 6).weights
    saved = [CheckpointParams(folder / str(s), f"width_{w}") for w in ("0_05", "0_1") for s in (2, 4, 6)]
    by_hand = sum(w * np.float64(list(each.blocks(path))) for w, each in zip(weights, saved, strict=True))
    np.testing.assert_allclose(made[path], by_hand, rtol=1e-5, atol=1e-7)
    for name, flags in (("a", {"decay": 0.5}), ("b", {"width": 0.08})):
        code, _, error = convert(capsys, source=tmp_path / "whole", out=tmp_path / name, initial=True, **flags)
        assert code == 0, error
    np.testing.assert_array_equal(dict(Initial(tmp_path / "a").tensors)[path], kept["decay_0_5"][path])
    np.testing.assert_allclose(dict(Initial(tmp_path / "b").tensors)[path], made[path], rtol=1e-6)
    code, _, error = convert(capsys, source=tmp_path / "whole", out=tmp_path / "c", initial=True, decay=0.6)
    assert code == 1 and "keeps no extra/averages/decay_0_6" in error
