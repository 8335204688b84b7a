"""What the chips can do: one table, from the makers' pages, and what the name of a topology has to look like.

Memory is what libtpu lets a program have of a device (it says so when it refuses one), of GPUs all there is; operations
are in `training/flops.PEAK_FLOPS`. The bandwidth of a link is that of one direction: the documentation gives the sum
over both directions of all links of a chip (1200 GB/s for the 6 of a v5p).
Sources: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} (memory, bandwidths, sizes, wrapped links); clocks follow from
peak = 2 x MXU cells x MXUs x clock; nvidia.com data sheets of the H100 and H200 SXM, 400 Gb/s of network for each GPU.
"""

from dataclasses import dataclass

from opensora_jax.config.command import GPU_SHARE
from opensora_jax.training.flops import PEAK_FLOPS

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One kind of chip, which is one device or two; links and the memory's bandwidth are those of the whole chip."""

    name: str  # in a topology: "v5p"
    kind: str  # what JAX calls its devices
    devices: int
    memory_gib: float  # of a device
    hbm_gbps: float | int
    link_gbps: float | int  # of a link in one direction; of a GPU all its NVLinks together
    host_gbps: float | int  # between a device and its host, either way
    torus: int  # dimensions of the network; 0: GPUs behind a switch
    wraps: int  # a dimension whose length is a multiple of this is a ring: of a slice made of whole cubes, in 3D
    largest: int  # chips in a slice
    clock_ghz: float = 0.0  # of TPUs, to turn cycles into seconds
    node: int = 0  # GPUs behind one switch
    network_gbps: float | int = 0  # of a GPU to other nodes, in one direction

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 operations per second of a device."""
        return PEAK_FLOPS[self.kind]

    @property
    def memory_bytes(self) -> int:
        """Bytes of a device."""
        return int(self.memory_gib * GIB)

    @property
    def usable_bytes(self) -> int:
        """Bytes of a device that commands take."""
        return int(self.memory_bytes * GPU_SHARE) if self.is_gpu else self.memory_bytes

    @property
    def hbm_bytes_per_second(self) -> float:
        """Of a device."""
        return self.hbm_gbps * 1e9 / self.devices

    @property
    def is_gpu(self) -> bool:
        """Whether CUDA's plugin compiles for it."""
        return not self.torus


# name, kind, devices, GiB of each, HBM GB/s, link GB/s, host GB/s, torus, wraps, largest, GHz
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 1, 30.75, 1228, 50, 16, 3, 4, 4096, 1.05),
        Chip("v5e", "TPU v5 lite", 1, 15.75, 819, 50, 16, 2, 16, 256, 1.5),
        Chip("v5p", "TPU v5", 1, 95.74, 2765, 100, 16, 3, 4, 6144, 1.75),
        Chip("v6e", "TPU v6 lite", 1, 31.25, 1638, 100, 32, 2, 16, 256, 1.75),
        Chip("tpu7x", "TPU7x", 2, 94.75, 7380, 100, 16, 3, 4, 9216, 2.2),
        Chip("h100", "NVIDIA H100 80GB HBM3", 1, 79.6, 3350, 450, 55, 0, 0, 16384, node=8, network_gbps=50),
        Chip("h200", "NVIDIA H200", 1, 139.8, 4800, 450, 55, 0, 0, 16384, node=8, network_gbps=50),
    )
}
