"""Slices of TPUs and nodes of GPUs that are not here: by name to devices that programs can be compiled for.

`v5p:4x4x4` is a slice of TPUs, its chips along each dimension of the network; `h100x8` are eight GPUs. Compilers come
in packages of their own, which need no hardware: libtpu, and the plugin of CUDA.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from opensora_jax.config.errors import UserError
from opensora_jax.forecast.chips import CHIPS, Chip

HOST = (2, 2, 1)  # chips of a host along each dimension, where a slice has as many
ENVIRONMENT = {  # of a process that compiles without hardware: what else would look for some
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any: it says so only to be asked no more
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # the lock of plans is theirs (work.py); no chip is taken
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Topology:
    """Chips of one kind; `shape` has their number along each dimension of the network, or the number of GPUs."""

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        if self.chip.is_gpu:
            return f"{self.chip.name}x{self.shape[0]}"
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Chips, which are what one pays for."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Devices, which are what a mesh is made of."""
        return self.chips * self.chip.devices

    @property
    def rings(self) -> tuple[bool, ...]:
        """Which dimensions of the network are rings, the others being lines; of three all are, or none."""
        if self.chip.torus == 3 and any(size % self.chip.wraps for size in self.shape):
            return (False,) * 3
        return tuple(size > 1 and size % self.chip.wraps == 0 for size in self.shape)

    def load(self) -> Sequence[Any]:
        """Returns the devices, in JAX's order. Raises: UserError without the compiler's package."""
        check_compiler(self.chip)
        from jax.experimental import topologies

        os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
        if self.chip.is_gpu:
            from opensora_jax.forecast.gpus import target_config

            nodes = -(-self.chips // self.chip.node)
            shape = f"1x{nodes}x{self.chips // nodes}"
            return topologies.get_topology_desc(
                "", "cuda", topology=shape, target_config=target_config(self.chip)
            ).devices
        hosts = HOST[: len(self.shape)] + (1,) * (3 - len(self.shape))
        sizes = (*self.shape, *(1,) * (3 - len(self.shape)))
        options: dict[str, Any] = {}
        if any(size % host for size, host in zip(sizes, hosts, strict=True)):
            options["chips_per_host_bounds"] = sizes if self.chips <= 8 else (1, 1, 1)
        if self.chip.name == "v4":
            options["chip_config_name"] = "megacore"  # both cores as one device, as on the machines
        return topologies.get_topology_desc(platform="tpu", topology_name=str(self), **options).devices


def parse_topology(name: str) -> Topology:
    """Returns the topology of a name. Raises: UserError for one that is not known, listing those that are."""
    found = re.fullmatch(r"([a-z]+\d+[a-z]*):(\d+(?:x\d+)*)", name) or re.fullmatch(r"([a-z]+\d+)x(\d+)", name)
    if found is None:
        raise UserError(f"topology {name!r} is no topology: {known()}")
    kind, sizes = found[1], tuple(map(int, found[2].split("x")))
    if kind not in CHIPS:
        raise UserError(f"topology {name!r} is not known: {known()}")
    chip = CHIPS[kind]
    if chip.is_gpu == (":" in name):
        raise UserError(f"topology {name!r}: {kind} is written as in {example(chip)}")
    allowed = (1,) if chip.is_gpu else ((2, 3) if chip.torus == 2 else (3,))
    if min(sizes) < 1:
        raise UserError(f"topology {name!r}: a slice has at least 1 chip along each dimension, as in {example(chip)}")
    if len(sizes) not in allowed or (chip.torus == 2 and sizes[2:] not in ((), (1,))):
        raise UserError(f"topology {name!r}: {kind} has {chip.torus} dimensions, as in {example(chip)}")
    sizes = sizes[: chip.torus] if chip.torus == 2 else sizes
    if math.prod(sizes) > chip.largest:
        raise UserError(f"topology {name!r} has {math.prod(sizes)} chips: a slice of {kind} has at most {chip.largest}")
    if chip.is_gpu and sizes[0] > chip.node and sizes[0] % chip.node:
        raise UserError(f"topology {name!r}: more than {chip.node} GPUs are a multiple of {chip.node}")
    return Topology(chip, sizes)


def known() -> str:
    """Returns the topologies there are, in words."""
    return f"use one such as {', '.join(example(chip) for chip in CHIPS.values())}"


def example(chip: Chip) -> str:
    """Returns the name of a topology of a chip."""
    if chip.is_gpu:
        return f"{chip.name}x8"
    return f"{chip.name}:{'4x4x4' if chip.torus == 3 else '16x16'}"


def check_compiler(chip: Chip) -> None:
    """Raises: UserError unless the package is there that compiles for a chip."""
    if chip.is_gpu:
        if not any(_is_there(f"jax_plugins.xla_cuda{version}") for version in (12, 13)):
            raise UserError(
                f"compiling for {chip.name} needs the plugin of CUDA, which is not installed: "
                'pip install ".[gpu]" (or pip install -r requirements-gpu.txt); it needs no GPU'
            )
    elif not _is_there("libtpu"):
        raise UserError(
            f"compiling for {chip.name} needs libtpu, which is not installed: "
            f'pip install "{_libtpu()}"; it needs no TPU'
        )


def _libtpu() -> str:
    """Returns the release of libtpu that the installed JAX asks for: others may compile its programs otherwise."""
    asked = (line.partition(";")[0].strip() for line in metadata.requires("jax") or [])
    return next((line for line in asked if line.startswith("libtpu")), "libtpu")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
