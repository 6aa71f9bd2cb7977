"""Scores against closed forms and definitions written out row by row."""

import numpy as np
import pytest

from src.evals.scores.distances import discrepancy, inception_score, kernel_distance, precision_recall
from src.evals.scores.moments import FeatureMoments


def test_moments_of_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1000, 7)) * [1, 1e3, 1e-3, 1, 1, 1, 1] + [1e6, 0, 0, 1, 2, 3, 4]
    parts = [FeatureMoments.of(part) for part in np.split(rows, [1, 10, 11, 500])]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        whole = FeatureMoments.none(7)
        for number in order:
            whole = whole.merge(parts[number])
        assert whole.count == 1000
        np.testing.assert_allclose(whole.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(whole.covariance(), np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-9)
    assert FeatureMoments.of(np.zeros((0, 7))).merge(FeatureMoments.none(7)).count == 0
    with pytest.raises(ValueError, match="at least 2 rows, not 1"):
        FeatureMoments.of(np.ones((1, 3))).covariance()
    with pytest.raises(ValueError, match="of 7 and of 2 features"):
        FeatureMoments.none(7).merge(FeatureMoments.none(2))


def test_the_inception_score_is_1_for_equal_and_k_for_certain_balanced_classes():
    assert inception_score(np.tile([[1.0, 2.0, 3.0]], (20, 1)), 2).mean == pytest.approx(1)
    certain = 1e4 * np.eye(5)[np.arange(100) % 5]
    score = inception_score(certain, 10)
    assert score.mean == pytest.approx(5) and score.std == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="not 3"):
        inception_score(np.zeros((3, 4)), 10)


def test_the_kernel_distance_is_unbiased():
    """Of equal laws it is 0 on average; the mean over all splits of a small set is the formula itself."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 3)), rng.standard_normal((40, 3)) + 0.5
    kernel = lambda a, b: (a @ b / 3 + 1) ** 3
    pairs = lambda rows: np.mean([kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j])
    expected = pairs(x) + pairs(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert discrepancy(x, y) == pytest.approx(expected, rel=1e-12)
    assert kernel_distance(x, y, subsets=3, size=1000).mean == pytest.approx(expected, rel=1e-12), "at most all rows"
    same = [discrepancy(rng.standard_normal((30, 2)), rng.standard_normal((30, 2))) for _ in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 20
    with pytest.raises(ValueError, match="at least 2 rows"):
        kernel_distance(x[:1], y)


def _inside(rows, centres, neighbours):
    """By the definition: whether each row is in a ball around a centre."""
    found = []
    for row in rows:
        for i, centre in enumerate(centres):
            others = sorted(np.linalg.norm(centre - c) for j, c in enumerate(centres) if j != i)
            if np.linalg.norm(row - centre) <= others[neighbours - 1]:
                found.append(1)
                break
        else:
            found.append(0)
    return np.mean(found)


@pytest.mark.parametrize("block", [7, 4096])
def test_precision_and_recall_by_their_definition(block):
    rng = np.random.default_rng(0)
    real, made = rng.standard_normal((50, 4)), 0.6 * rng.standard_normal((40, 4)) + 1
    precision, recall = precision_recall(real, made, block=block)
    assert precision == pytest.approx(_inside(made, real, 3)) and recall == pytest.approx(_inside(real, made, 3))
    assert 0 < recall < precision < 1
    assert precision_recall(real, real) == (1, 1) and precision_recall(real, real + 100) == (0, 0)
    with pytest.raises(ValueError, match="not 50 real and 3 generated"):
        precision_recall(real, made[:3])
