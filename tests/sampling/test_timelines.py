"""Time grids of ids."""

import numpy as np
import pytest

from src.corruption.categorical import Categorical
from src.interfaces import FieldSpec
from src.sampling.steps.ancestral import Ancestral
from tests.helpers.family import golden


@pytest.mark.parametrize("timeline", ["linear", "cosine", "power", "arccos"])
def test_published_reddit_grids(timeline):
    """Theirs end at 1e-5 and are then cleaned up; ours end at 0."""
    times = Ancestral(timeline=timeline).times(Categorical(field=FieldSpec((2,), vocab=3)), 8)
    np.testing.assert_allclose(times, golden("reddit/step_m1")[f"grid_{timeline}"], atol=3e-3)
    assert times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()


def test_refusals():
    for options in ({"timeline": "log"}, {"exponent": 0.0}):
        with pytest.raises(ValueError, match=r"must be one of .*above 0"):
            Ancestral(**options)
