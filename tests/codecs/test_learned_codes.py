"""Codes and counts of vectors: round trips, what learned codes lose, and what a checkpoint may compare."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.cluster import KMeans as Reference
from sklearn.datasets import load_digits

from src.codecs.bins import Bins
from src.codecs.chain import Link, build_chain
from src.codecs.kmeans import KMeans
from src.codecs.levels import Levels
from src.data.example import BadRow
from src.data.samples import samples_for, values
from src.data.sources.image_folders import ImageFolders
from src.interfaces import FieldSpec


def vectors(grid, features):
    """A link in front whose tokens are vectors."""
    return types.SimpleNamespace(spec=FieldSpec(grid, features=features), shape=(int(np.prod(grid)), features))


def patches():
    """Patches of 2 x 2 pixels of the handwritten digits, [n, 16, 4]."""
    values = (load_digits().images / 8 - 1).astype(np.float32)
    return values.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)


def error(samples, centroids):
    return ((samples[:, None] - centroids) ** 2).sum(-1).min(-1).mean()


def test_learned_codes_lose_no_more_than_those_of_scikit_learn(tmp_path):
    images = patches()
    samples, held_out = images[:1437].reshape(-1, 4), images[1437:].reshape(-1, 4)
    codec = KMeans(64, vectors((4, 4), 4), folder=str(tmp_path)).fit(samples)
    assert isinstance(codec, Link) and codec.spec == FieldSpec((4, 4), vocab=64) and codec.shape == (16,)
    reference = Reference(64, n_init=1, random_state=0).fit(samples).cluster_centers_
    for part in (samples, held_out):
        assert error(part, codec.centroids) < 1.03 * error(part, reference)
    ids = jax.jit(codec.encode)(jnp.asarray(images[1437:]))
    assert ids.shape == (360, 16) and ids.dtype == jnp.int32
    found = np.asarray(codec.decode(ids)).reshape(-1, 4)
    np.testing.assert_allclose(((held_out - found) ** 2).sum(-1).mean(), error(held_out, codec.centroids), rtol=1e-5)
    np.testing.assert_array_equal(codec.encode(codec.decode(ids)), ids)


def test_codes_are_learned_once_and_known_by_their_samples(tmp_path):
    samples = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    make = lambda **options: KMeans(8, vectors((5,), 3), folder=str(tmp_path), **options)
    first = make().fit(samples)
    (path,) = tmp_path.iterdir()
    mark = path.stat().st_mtime_ns
    again, other, seeded = make().fit(samples), make().fit(samples[:200]), make(seed=1).fit(samples)
    assert path.stat().st_mtime_ns == mark and len(list(tmp_path.iterdir())) == 3
    np.testing.assert_array_equal(first.centroids, again.centroids)
    assert first.fingerprint() == again.fingerprint()
    assert len({codec.fingerprint() for codec in (first, other, seeded)}) == 3
    path.unlink()
    assert make().fit(samples).fingerprint() == first.fingerprint()


def test_separate_clusters_are_found_exactly_and_a_bad_start_leaves_no_code_unused(tmp_path):
    centres = np.asarray([[0, 0], [5, 0], [0, 5], [9, 9]], np.float32)
    samples = np.repeat(centres, [400, 3, 3, 3], axis=0)
    codec = KMeans(4, vectors((1,), 2), folder=str(tmp_path)).fit(samples)
    np.testing.assert_array_equal(np.sort(codec.centroids, axis=0), np.sort(centres, axis=0))


def test_what_codes_refuse(tmp_path):
    codec = KMeans(8, vectors((5,), 3), folder=str(tmp_path))
    for use in (codec.fingerprint, lambda: codec.encode(jnp.zeros((1, 5, 3))), lambda: codec.centroids):
        with pytest.raises(ValueError, match="`fit`"):
            use()
    with pytest.raises(ValueError, match="7 different vectors"):
        codec.fit(np.eye(7, 3, dtype=np.float32)[np.arange(7) % 7] + np.arange(7, dtype=np.float32)[:, None])
    for samples in (np.zeros((20, 2), np.float32), np.full((20, 3), np.nan, np.float32)):
        with pytest.raises(ValueError, match="finite vectors of 3"):
            codec.fit(samples)
    for before in (types.SimpleNamespace(spec=None, shape=(8, 8, 1)), types.SimpleNamespace(spec=FieldSpec(vocab=3))):
        for build in (lambda b: KMeans(8, b), lambda b: Levels(8, b)):
            with pytest.raises(ValueError, match="tokens are vectors"):
                build(before)
    with pytest.raises(ValueError, match="levels=1"):
        Levels(1, vectors((5,), 3))


def test_counts_come_back_and_vectors_to_half_a_level():
    codec = Levels(17, vectors((2, 2), 3))
    assert isinstance(codec, Link) and codec.spec == FieldSpec((2, 2), vocab=17, features=3)
    counts = jax.random.randint(jax.random.key(0), (5, 4, 3), 0, 17)
    np.testing.assert_array_equal(codec.encode(codec.decode(counts)), counts)
    values = jax.random.uniform(jax.random.key(1), (5, 4, 3), minval=-1, maxval=1)
    assert np.abs(codec.decode(codec.encode(values)) - values).max() <= 1 / 16 + 1e-6
    np.testing.assert_array_equal(
        codec.encode(jnp.asarray([-7.0, -1, 0, 1, 7])[None, :, None]).ravel(), [0, 0, 8, 16, 16]
    )


CODEC = {
    "host": {"name": "pixels", "height": 8, "width": 8, "channels": 1},
    "device": {"name": "patch", "size": 4},
    "codes": {"name": "kmeans", "codes": 2},
}


class Sorted:
    """More rows than codes learn from, sorted by class: dark ones, then light ones."""

    holds, half, missing = "values", 3000, 7

    def __init__(self, name="image"):
        self.name = name

    def __len__(self):
        return 2 * self.half

    def __getitem__(self, number):
        if number == self.missing:
            raise BadRow("damaged")
        value = -1.0 if number < self.half else 1.0
        return {} if number % 5 == 1 else {self.name: np.full((8, 8, 1), value, np.float32)}


def chain(source, row="image", **options):
    codec = CODEC | {"codes": CODEC["codes"] | options}
    return build_chain(codec, f"fields.{row}.codec", samples_for(row, {"task": source}))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_codes_are_learned_from_rows_of_all_classes(cache):
    """Rows without a value, and bad ones, are left out."""
    np.testing.assert_array_equal(np.sort(chain(Sorted()).links[-1].centroids[:, 0]), [-1, 1])
    with pytest.raises(ValueError, match=r"^fields\.image\.codec learns from values, and no task's source brings any"):
        chain(Sorted("sound"))


@pytest.mark.parametrize("row, name", [("image", "image"), ("picture", "image"), ("picture", "picture")])
def test_a_field_of_any_name_learns_from_what_templates_give_it(cache, row, name):
    """`image` of the examples, unless they have a value with the field's own name."""
    assert chain(Sorted(name), row).fingerprint == chain(Sorted()).fingerprint


def test_small_sources_give_all_rows(cache):
    class Few(Sorted):
        half = 10

    assert values("image", {"task": Few()}, chain(Few()).host).shape == (20 - 4 - 1, 8, 8, 1)


@pytest.mark.parametrize("stage", ["frozen", 1])
def test_codes_behind_a_frozen_network_are_refused_in_one_sentence_or_given(cache, stage):
    links = {
        "host": {"name": "pixels", "height": 16, "width": 16},
        "frozen": {"name": "vae_latents", "path": ""},
        "device": {"name": "patch", "size": 1},
    }
    make = lambda codes: build_chain(
        links | {"codes": codes} if stage == "frozen" else [*links.values(), codes],
        "fields.image.codec",
        lambda what, link: pytest.fail("data were read"),
    )
    place = r"fields\.image\.codec\.codes" if stage == "frozen" else r"fields\.image\.codec\[3\]"
    with pytest.raises(ValueError, match=rf"^{place} cannot be learned behind the frozen VaeLatents.*path"):
        make({"name": "kmeans", "codes": 3})
    np.save(cache / "codes.npy", np.eye(3, 4, dtype=np.float32))
    found = make({"name": "kmeans", "codes": 3, "path": str(cache / "codes.npy")})
    assert found.spec == FieldSpec((2, 2), vocab=3)
    with pytest.raises(ValueError, match=r"centroids of \(5, 4\), but an array of \(3, 4\)"):
        make({"name": "kmeans", "codes": 5, "path": str(cache / "codes.npy")})
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npy"):
        make({"name": "kmeans", "codes": 5, "path": str(cache / "nowhere.npy")})


def test_samples_need_no_training_data(cache):
    """What was learned of the same options is taken again; other options, and other folders, have nothing to take."""
    for label, shade in (("n01", 40), ("n02", 200)):
        (cache / "data" / label).mkdir(parents=True)
        for number in range(3):
            image = Image.fromarray(np.full((8, 8), shade + number, np.uint8))
            image.save(cache / "data" / label / f"{number}.png")
    names = cache / "names.json"
    names.write_text('{"n01": "dark", "n02": "light"}')
    make = lambda folder="data", **options: chain(ImageFolders(cache / folder, names=names), **options)
    first = make().fingerprint
    (cache / "data").rename(cache / "moved")
    assert make().fingerprint == first
    for other in (lambda: make(codes=3), lambda: make("elsewhere")):
        with pytest.raises(FileNotFoundError, match="is no folder"):
            other()
    kept = next((cache / "cache" / "monoformer-jax" / "kmeans").glob("kmeans-*.npy"))
    assert make("elsewhere", path=str(kept)).fingerprint == first


# --------------------------------------------------------------------------- bins


def test_bins_lie_between_the_quantiles_and_come_back_to_half_a_bin(tmp_path):
    """Each dimension has its own limits; numbers beyond them go to the ends; limits are kept like centroids."""
    samples = np.random.default_rng(0).normal(size=(5000, 3)).astype(np.float32) * [1, 10, 0.1] + [0, 5, 0]
    make = lambda **options: Bins(64, vectors((8, 1), 3), folder=str(tmp_path), **options)
    codec = make().fit(np.float32(samples))
    assert isinstance(codec, Link) and codec.spec == FieldSpec((8, 3), vocab=64) and codec.shape == (24,)
    low, high = np.quantile(samples, (0.01, 0.99), axis=0)
    np.testing.assert_allclose(codec.table, np.stack([low, high], axis=-1), rtol=1e-5)
    value = jnp.asarray(samples[:4000].reshape(500, 8, 3), jnp.float32)
    ids = jax.jit(codec.encode)(value)
    assert ids.shape == (500, 24) and ids.min() == 0 and ids.max() == 63
    back, inside = np.asarray(codec.decode(ids)), np.clip(value, low, high)
    assert (np.abs(back - inside) <= (high - low) / 128 * (1 + 1e-4)).all()
    np.testing.assert_array_equal(codec.encode(codec.decode(ids)), ids)
    assert len({each.fit(np.float32(samples)).fingerprint() for each in (make(), make(low=0.0), make(high=1.0))}) == 3
    path = next(tmp_path.glob("bins-*.npy"))
    assert not make(path=str(path)).unfitted


def test_numbers_far_outside_the_quantiles_are_told_at_every_start(tmp_path, caplog):
    samples = np.float32(np.random.default_rng(0).uniform(size=(1000, 2)))
    make = lambda: Bins(8, vectors((5,), 2), folder=str(tmp_path))
    make().fit(samples)
    assert not caplog.text, "what lies just outside is meant to"
    samples[3:5, 1] = 7.0
    for _ in range(2):
        caplog.clear()
        make().fit(samples)
        assert "2 of 1000 numbers of dimension 1 lie far outside its limits" in caplog.text and "as 7:" in caplog.text


def test_what_bins_refuse(tmp_path):
    make = lambda bins=8, **options: Bins(bins, vectors((5,), 2), folder=str(tmp_path), **options)
    np.save(tmp_path / "limits.npy", np.array([[0, 1], [2, 2]], np.float32))
    np.save(tmp_path / "three.npy", np.array([[0, 1]] * 3, np.float32))
    for words, call in [
        ("bins=1", lambda: make(1)),
        ("low=0.5, high=0.5", lambda: make(low=0.5, high=0.5)),
        ("limits are not learned yet", lambda: make().table),
        ("cannot divide dimension 1, whose limits are 3 and 3", lambda: make().fit(np.float32([[0, 3], [1, 3]]))),
        ("cannot divide dimension 1", lambda: make(path=str(tmp_path / "limits.npy"))),
        (r"no finite limits of \(2, 2\), but an array of \(3, 2\)", lambda: make(path=str(tmp_path / "three.npy"))),
        ("tokens are vectors", lambda: Bins(8, types.SimpleNamespace(spec=None, shape=(8, 8, 1)))),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
