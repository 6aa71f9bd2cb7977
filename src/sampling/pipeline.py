"""Sampling (being rebuilt)."""


def build_pipeline(config, architecture, plans, encoders):
    """Nothing yet."""
