"""Checkpoints of the Hugging Face hub, through `huggingface_hub` where it is installed."""

from __future__ import annotations

import re
from typing import Any

from etils import epath

from src.common.files.paths import shown
from src.common.runtime.errors import brief

NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
WANTED = ("*.json", "*.safetensors", "tokenizer.model", "ema/*.json", "ema/*.safetensors")


def is_hub_name(text: str) -> bool:
    """Whether this may be `owner/name`."""
    return NAME.fullmatch(text) is not None and not text.startswith(".")


def download(name: str, revision: str | None = None) -> epath.Path:
    """The folder of a repository, in the hub's cache; only configs, safetensors and tokenizer files are fetched.

    Raises ImportError when `huggingface_hub` is not installed, OSError when it cannot be reached or has no such
    repository, in one sentence that says what to do.
    """
    hand = f"fetch its files in another way and give their folder (git clone https://huggingface.co/{name})"
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"{shown(name)} is no folder here, and to fetch it from the Hugging Face hub huggingface_hub is needed: "
            f"pip install huggingface_hub, or {hand}"
        ) from None
    options: dict[str, Any] = {"revision": revision, "allow_patterns": list(WANTED)}
    try:
        return epath.Path(huggingface_hub.snapshot_download(name, **options))
    except Exception as error:  # of its client and of that client's client
        raise OSError(
            f"{shown(name)} is no folder here and did not come from the Hugging Face hub ({brief(error)}): correct the "
            f"name, log in where it is not public, or where there is no network {hand}"
        ) from error
