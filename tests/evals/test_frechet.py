import numpy as np
import pytest
import scipy.linalg

from src.evals.frechet import frechet_distance, frechet_of_moments


def gaussian_sample(rng, mean, covariance, count):
    """A sample whose mean and unbiased covariance are exactly those given."""
    noise = rng.standard_normal((count, len(mean)))
    noise -= noise.mean(0)
    white = np.linalg.solve(np.linalg.cholesky(np.cov(noise, rowvar=False)), noise.T)
    return mean + (np.linalg.cholesky(covariance) @ white).T


def test_closed_form_and_matrix_root():
    rng = np.random.default_rng(0)
    # Commuting covariances: |Δμ|² + Σ (σ - τ)².
    mean, s, t = np.array([1.0, -2.0, 0.5]), np.array([1.0, 2.0, 0.1]), np.array([3.0, 0.5, 0.1])
    x = gaussian_sample(rng, np.zeros(3), np.diag(s**2), 50)
    y = gaussian_sample(rng, mean, np.diag(t**2), 70)
    assert frechet_distance(x, y) == pytest.approx(5.25 + np.sum((s - t) ** 2), rel=1e-9)
    # General covariances, against the textbook formula.
    a, b = (m @ m.T for m in rng.standard_normal((2, 6, 6)))
    root = scipy.linalg.sqrtm(a @ b).real
    expected = 6 * 0.25 + np.trace(a + b - 2 * root)
    assert frechet_of_moments(np.zeros(6), np.full(6, 0.5), a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [12, 60])
def test_ill_conditioned_and_singular_covariances_against_scipy(size):
    """Eigenvalues from 1e-12 to 1e3, along the same axes (a closed form) and others; and fewer rows than features."""
    rng, zero = np.random.default_rng(3), np.zeros(size)
    axes, others = (np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(2))
    values = np.logspace(-12, 3, size)
    mixed = rng.permutation(values)
    turned = lambda values, axes: axes * values @ axes.T
    found = frechet_of_moments(zero, zero, turned(values, axes), turned(mixed, axes))
    assert found == pytest.approx(np.sum((values**0.5 - mixed**0.5) ** 2), rel=1e-9)
    few = [np.cov(rng.standard_normal((size // 2, size)), rowvar=False) for _ in range(2)]
    for a, b in ((turned(values, axes), turned(values, others)), few):
        expected = np.trace(a + b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real
        assert frechet_of_moments(zero, zero, a, b) == pytest.approx(expected, rel=1e-6)


def test_zero_for_equal_even_if_singular_and_never_negative():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 45)) * 1e3  # 5 rows: the covariance has rank 4
    assert 0 <= frechet_distance(x, x[::-1]) < 1e-6
    flat = np.ones((4, 3))
    assert frechet_distance(flat, flat) == 0
    assert frechet_distance(rng.standard_normal((9, 1)), rng.standard_normal((9, 1))) >= 0


def test_what_cannot_be_compared():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((5, 3))
    assert np.isnan(frechet_distance(np.where(x > 1, np.nan, x) * np.array([1, 1, np.inf]), x))
    with pytest.raises(ValueError, match=r"needs features .* not \(1, 3\) and \(5, 3\)"):
        frechet_distance(x[:1], x)
