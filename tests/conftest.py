"""Eight emulated CPU devices for the whole suite, and shapes checked at run time."""

import gc
import logging
import os

import tests.helpers.checking  # noqa: F401  (found by its name below)
from src.common.mesh.emulation import ordered
from tests.helpers.compiling import FLAGS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# With flags of your own, or with `XLA_FLAGS=` none, the programs are compiled as users compile them.
os.environ["XLA_FLAGS"] = ordered(os.environ.get("XLA_FLAGS", FLAGS) + " --xla_force_host_platform_device_count=8")

import pytest

CHECKED = ("interfaces", "structs", "codecs", "corruption", "sequence", "models", "objectives", "sampling", "data")
CHECKED += ("train", "evals")


def pytest_configure(config):
    """Before a test module is imported. A process that hands the tests out to others imports none, nor JAX."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import jaxtyping
    from flax import struct

    plain = struct.dataclass

    def unchecked(cls):
        """A structure whose fields are not checked, since it may hold shapes or shardings in place of arrays; its
        methods are."""
        made = plain(cls)
        made.__no_type_check__ = True
        return made

    struct.dataclass = unchecked
    jaxtyping.install_import_hook([f"src.{name}" for name in CHECKED], "tests.helpers.checking.checked")
    import jax

    jax.config.update("jax_debug_key_reuse", True)
    jax.config.update("jax_threefry_partitionable", True)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longer than running here
    from src.models import transformer

    transformer.UNROLLED = 1  # for the same reason; programs that the tests start unroll


def pytest_collection_finish():
    """Garbage is collected less often, and what was imported is left out: full collections took 7 % of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture(autouse=True)
def log_level():
    """A test that runs a command line in this process leaves no log level behind."""
    logger = logging.getLogger("absl")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture
def bucket(monkeypatch):
    """`gs://` in memory, as a store is: no appending, no renaming in place, no folder without a file in it."""
    import fsspec
    from etils.epath import backend, gpath
    from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

    class Draft(MemoryFile):  # is there once it is closed
        done = False

        def close(self):
            if not self.done:
                self.done = True
                self.commit()

        def __exit__(self, *error):
            self.close()

    class Store(MemoryFileSystem):
        cachable = False
        down = False  # whether the network is away

        @classmethod
        def _strip_protocol(cls, path):
            return os.fspath(path).removeprefix("gs://").removeprefix("gcs://").strip("/")

        def mkdir(self, path, **options):
            pass

        def makedirs(self, path, **options):
            pass

        def rmdir(self, path):
            pass

        def cp_file(self, path1, path2, **options):
            if self.isfile(path1):
                super().cp_file(path1, path2)

        def info(self, path, **options):
            self.check()
            path = self._strip_protocol(path)
            found = super().info(path)
            return found | ({"mtime": self.store[path].modified} if path in self.store else {})

        def _open(self, path, mode="rb", **options):
            self.check()
            if mode not in ("rb", "wb"):
                raise ValueError(f"a store cannot open with mode {mode!r}")
            if mode == "rb":
                return super()._open(path, mode)
            draft = Draft(self, path, options.get("data"))
            if options.get("data"):
                draft.close()
            return draft

        def check(self):
            if self.down:
                raise RuntimeError("the store does not answer")

    store = Store(global_store=False)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(
        backend._FileSystemSpecBackend,
        "_get_filesystem",
        lambda self, name: store if name == "gcs" else fsspec.filesystem(name),
    )
    return store
