"""Where parameters lay before fields were rows of a table: in checkpoints of format 2, initial weights of format 1."""

from __future__ import annotations

# What a path begins with: then, and now. Paths of other parameters have stayed.
MOVED = (
    ("trunk/layers/image/", "trunk/layers/mot/"),
    ("text_head/", "fields/text/head/"),
    ("text/", "fields/text/embed/"),
    ("image_head/", "fields/image/head/"),
    ("image/", "fields/image/embed/"),
    ("vision/", "fields/vision/embed/"),
    ("labels/", "fields/label/embed/"),
)


def path_now(path: str) -> str:
    """The path of a parameter whose path was this one."""
    for then, now in MOVED:
        if path.startswith(then):
            return now + path.removeprefix(then)
    return path
