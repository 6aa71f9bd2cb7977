"""Moved to tests/helpers/formats.py; here until the tests of data name it there."""

from tests.helpers.formats import *  # noqa: F403
