"""Published figures of the TPU generations, per chip, and what a slice of them can be asked for."""

from __future__ import annotations

import dataclasses

from src.common.mesh.peaks import bf16_peak

GIB = 2**30
DOCS = "docs.cloud.google.com/tpu/docs"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    flops    peak bf16 operations a second
    hbm      bytes of main memory, and `hbm_rate` its bytes a second
    link     bytes a second of one link to a neighbour, in one direction; a chip has two links in each dimension
    dcn      bytes a second between slices (data centre network), per chip; None where none is published
    ring     `full`: a dimension is closed to a ring when 16 long; `cube`: when all are multiples of 4
    source   where the figures are from
    options  what `get_topology_desc` needs besides the name
    """

    name: str
    flops: float
    hbm: float
    hbm_rate: float
    link: float
    dcn: float | None
    ring: str
    source: str
    options: tuple[tuple[str, str], ...] = ()

    def closed(self, sizes: tuple[int, ...], dimension: int) -> bool:
        """Is this dimension of a slice of these sizes a ring?"""
        return sizes[dimension] == 16 if self.ring == "full" else all(size % 4 == 0 for size in sizes)


# A published bidirectional rate per chip is divided by its links (4 in 2-D, 6 in 3-D) and by 2 for the directions.
CHIPS = {
    chip.name: chip
    for chip in (
        # links: 50 GB/s each (Jouppi et al. 2023, arXiv 2304.01433, table 4); "megacore" joins the two cores
        Chip(
            "v4",
            bf16_peak("TPU v4"),
            32 * GIB,
            1200e9,
            50e9,
            None,
            "cube",
            f"{DOCS}/v4",
            (("chip_config_name", "megacore"),),
        ),
        # 400 GB/s bidirectional; 6.4 Tb/s between pods of 256
        Chip("v5e", bf16_peak("TPU v5e"), 16 * GIB, 819e9, 400e9 / 8, 6.4e12 / 8 / 256, "full", f"{DOCS}/v5e"),
        # 1200 GB/s bidirectional; 50 Gb/s between slices
        Chip("v5p", bf16_peak("TPU v5p"), 95 * GIB, 2765e9, 1200e9 / 12, 50e9 / 8, "cube", f"{DOCS}/v5p"),
        # 800 GB/s bidirectional; 100 Gb/s between slices
        Chip("v6e", bf16_peak("TPU v6e"), 32 * GIB, 1638e9, 800e9 / 8, 100e9 / 8, "full", f"{DOCS}/v6e"),
        # 1200 GB/s bidirectional; 100 Gb/s between slices; a chip is two devices
        Chip("tpu7x", 2 * bf16_peak("TPU7x"), 192 * GIB, 7380e9, 1200e9 / 12, 100e9 / 8, "cube", f"{DOCS}/tpu7x"),
    )
}
