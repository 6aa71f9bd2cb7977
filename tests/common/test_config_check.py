"""Numbers that mean nothing are refused by their dotted name."""

import pytest
from ml_collections import ConfigDict

from src.common.runtime.config_check import AT_LEAST_ONE, AT_LEAST_ZERO, check_numbers


@pytest.fixture
def config():
    """Every number that is checked, at its least."""
    flat = dict.fromkeys(AT_LEAST_ONE, 1) | dict.fromkeys(AT_LEAST_ZERO, 0)
    flat |= {name.replace("*", "text"): flat.pop(name) for name in list(flat) if "*" in name}
    config = ConfigDict({"decode": {"image": {"name": "blocks"}, "text": {}}})
    with config.unlocked():
        for name, value in flat.items():
            group = config
            *groups, last = name.split(".")
            for part in groups:
                if part not in group:
                    group[part] = {}
                group = group[part]
            group[last] = value
    return config


def test_the_least_numbers_are_taken(config):
    check_numbers(config)
    check_numbers(config.to_dict())
    config.optim.unlock()
    config.optim.grad_clip = None
    config.decode = {}
    check_numbers(config)


@pytest.mark.parametrize("name, least", [(n, 1) for n in AT_LEAST_ONE] + [(n, 0) for n in AT_LEAST_ZERO])
def test_smaller_ones_and_words_are_refused_by_name(config, name, least):
    path = name.replace("*", "text")
    *groups, last = path.split(".")
    group = config
    for part in groups:
        group = group[part]
    for value, words in ((least - 1, f"{path}={least - 1}; it must be at least {least}"), ("x", f"{path}='x'")):
        with group.ignore_type():
            group[last] = value
        with pytest.raises(ValueError) as told:
            check_numbers(config)
        assert words in str(told.value)
    del group[last]
    if "*" in name:
        check_numbers(config)
    else:
        with pytest.raises(ValueError, match=f"has no {path};"):
            check_numbers(config)


def test_a_seed_has_32_bits(config):
    config.seed = 2**32 - 1
    check_numbers(config)
    config.seed += 1
    with pytest.raises(ValueError, match=r"seed=4294967296; it must be below"):
        check_numbers(config)
