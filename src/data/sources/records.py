"""Shards that `tools.prepare` or `tools.latents` made of another source."""

from __future__ import annotations

import os

from src.data.example import Example
from src.data.files.latent_shards import Moments
from src.data.files.left_out import warn_beside
from src.data.files.shards import MANIFEST, Shards
from src.data.sources._classes import distinct, read_names
from src.data.sources._files import FileSource

SKIPPED = "skipped.jsonl"  # the list of bad rows of the other source


class Records(FileSource):
    """The examples of the other source.

    moments     the shards hold moments of latents (`tools.latents`), not images
    held_out    how many rows are "test": the last ones, or, of classes, some all over them. Of a chat that is split
                into several rows all are "test" when one is, which may be a few more
    names       a file that names the classes anew; `ambiguous` as `image_folders` has it
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        moments: bool = False,
        held_out: int = 0,
        names: str | os.PathLike[str] = "",
        ambiguous: str = "words",
    ):
        super().__init__(held_out)
        self.folder, self.names, self.ambiguous = folder, names, ambiguous
        self.holds = "moments" if moments else "pixels"

    def open(self) -> Shards:
        """The shards. Raises FileNotFoundError without a manifest, ValueError naming every damaged shard."""
        shards = Shards(self.path("folder"))
        warn_beside(shards.folder, (MANIFEST, SKIPPED, *shards.names))
        return shards

    @property
    def kind(self) -> str:
        """What the examples are."""
        return self.files.kind

    @property
    def spread(self) -> bool:
        """Rows of classes are sorted."""
        return self.kind == "classes"

    @property
    def moments(self) -> Moments | None:
        """What the manifest says of moments."""
        return self.files.moments

    @property
    def cut(self) -> int | None:
        """Pixels of the squares that the images were cut to."""
        return self.files.cut

    @property
    def classes(self) -> list[dict[str, str]]:
        """The classes of the manifest, with the names of the file `names`. Raises ValueError."""
        classes = self.files.classes
        if not os.fspath(self.names):
            return classes
        words = read_names(self.names)
        words = words if self.ambiguous == "keep" else distinct(words)
        return [{"id": c["id"], "name": words.get(c["id"], c["name"])} for c in classes]

    def identity(self) -> list[str]:
        """What changes when the rows do."""
        return self.files.identity()

    def goes_on(self, number: int) -> bool:
        """Whether earlier rows are of the same chat. Raises BadRow."""
        return self.kind == "chats" and bool(self[number].get("before"))

    def __getitem__(self, number: int) -> Example:
        return self.files[number]
