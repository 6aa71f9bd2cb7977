"""Eight emulated CPU devices for the whole suite, and shapes checked at run time."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jaxtyping

FOLDERS = ("codecs", "corruption", "sequence", "models", "sampling", "objectives", "evals")
jaxtyping.install_import_hook([f"src.{folder}" for folder in FOLDERS], "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_threefry_partitionable", True)
jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longer than running here
