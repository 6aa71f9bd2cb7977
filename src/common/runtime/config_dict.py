"""The config of a run: a ConfigDict whose groups know where they are, and whose parts are replaced whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from src.common.lookup import nearest

# Groups whose keys are names of the user's own.
TABLES = ("tasks", "fields", "decode", "eval.evaluators", "tasks.*.objectives")


class UnknownKeyError(KeyError):
    """A key that a group does not have; the text names the nearest one that it has, and the group."""

    def __str__(self) -> str:
        return str(self.args[0])


class Config(ConfigDict):
    """A ConfigDict, with three differences.

    A group that chooses a part, `{"name": …}`, is replaced by `update` and not merged, so that no option of another
    part stays. A locked config takes no unknown key, except in the tables of `TABLES` and in the options of a part,
    which are checked when they are built. An unknown key raises UnknownKeyError (as an attribute: AttributeError).
    """

    _place: tuple[Config, Any] | None = None  # the group that holds this one, and the key

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(value, Mapping | ConfigDict) and not isinstance(value, Config):
            value = Config(value)
        if key in self:
            try:
                super().__setitem__(key, value)
            except TypeError as error:
                kinds = f"{_kind(value)}, and must be {_kind(self[key])}"
                raise TypeError(f"the config has {join(self._path, key)}={_short(value)}, {kinds}") from error
        elif self.is_locked and not self._is_open():
            raise UnknownKeyError(self._unknown(key))
        else:
            locked = self.is_locked
            object.__setattr__(self, "_locked", False)
            try:
                super().__setitem__(key, value)
            finally:
                object.__setattr__(self, "_locked", locked)
        if isinstance(value, Config):
            object.__setattr__(value, "_place", (self, key))

    def __getitem__(self, key: Any) -> Any:
        if key not in self and not (isinstance(key, str) and "." in key):
            raise UnknownKeyError(self._unknown(key))
        return super().__getitem__(key)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_place"}

    def update(self, *other: Any, **kwargs: Any) -> None:
        """Sets the values of one mapping, and of keywords; groups are merged key by key, parts replaced whole."""
        if len(other) > 1:
            raise TypeError(f"update takes one group, not {len(other)}")
        for group in (*other, kwargs):
            if "name" in group and self.get("name", group["name"]) != group["name"]:
                with self.unlocked():
                    for key in [key for key in self if key not in group]:
                        del self[key]
            for key in group:
                old, new = self.get(key), group[key]
                merges = isinstance(old, Config) and isinstance(new, Mapping | ConfigDict) and "name" not in new
                if merges:
                    old.update(new)
                else:
                    self[key] = new

    def lock(self) -> Config:
        """Locks this group and every group in it."""
        super().lock()
        for key in self:
            if isinstance(self[key], ConfigDict):
                self[key].lock()
        return self

    @property
    def _path(self) -> str:
        """The dotted path of this group, "" of the whole config."""
        return "" if self._place is None else join(self._place[0]._path, self._place[1])

    def _is_open(self) -> bool:
        return "name" in self or any(matches(self._path, table) for table in TABLES)

    def _unknown(self, key: Any) -> str:
        root = self
        while root._place is not None:
            root = root._place[0]
        return f"{key}{suggestion(str(key), self, self._path, root)}"


def suggestion(key: str, choices: Iterable[str], path: str, root: Any) -> str:
    """What may have been meant by an unknown key of the group at `path`, as the end of a sentence.

    choices   the keys of the group
    root      a config, in whose other groups the same key is looked for where none of the group is like it
    """
    choices, place = list(map(str, choices)), f" in {path}" if path else ""
    if near := nearest(key, choices):
        return f"; did you mean {near}{place}?"
    elsewhere = [name for name in _names(root) if name.rpartition(".")[2] == key]
    if elsewhere:
        return f"{place}; did you mean {elsewhere[0]}?"
    return f"{place}; there are {', '.join(choices) or 'none'}"


def matches(path: str, pattern: str) -> bool:
    """Whether a dotted path is one that a pattern stands for; `*` is any one part."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(b in ("*", a) for a, b in zip(parts, wanted, strict=True))


def join(path: str, key: Any) -> str:
    """The dotted path of a key of the group at `path`."""
    return f"{path}.{key}" if path else str(key)


def _names(group: Any, path: str = "") -> Iterator[str]:
    for key in group:
        yield join(path, key)
        if isinstance(group[key], Mapping | ConfigDict):
            yield from _names(group[key], join(path, key))


def _kind(value: Any) -> str:
    return "a group" if isinstance(value, Mapping | ConfigDict) else type(value).__name__


def _short(value: Any) -> str:
    text = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    return text if len(text) < 60 else f"{text[:60]}…"
