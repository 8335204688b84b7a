"""What a program sends between devices: the groups of its collectives, the mesh axes they run along, bytes, seconds.

Seconds are those of the busiest link, from the place of each device in the network: a gather or a scatter over a box of
chips uses the links of all dimensions of the box, both ways where a dimension is a ring; an exchange is bound by the
links that cross the middle of its longest side; messages to neighbours take the shortest way, one dimension after the
other. Groups that lie between each other's chips share the links.
Source: the costs of collectives on a torus as in "How to Scale Your Model" (jax-ml.github.io/scaling-book, sharding).
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from opensora_jax.forecast.hlo import Instruction, array_shapes, shape_bytes
from opensora_jax.forecast.topology import Topology

EXCHANGES = ("all-to-all", "ragged-all-to-all")
HOP_SECONDS = 1e-6  # from one chip to the next
Groups = tuple[tuple[int, ...], ...]


class Collective(NamedTuple):
    """One collective: its kind, the devices of each group, and the bytes of what a device gives and gets."""

    kind: str
    groups: Groups  # of a permutation: (source, target)
    given: int
    gotten: int

    @property
    def size(self) -> int:
        """Devices of a group."""
        return len(self.groups[0]) if self.groups else 1

    @property
    def sent(self) -> int:
        """Bytes that a device sends at least, whichever way."""
        if self.kind == "collective-permute":
            return self.given
        others = self.size - 1
        if self.kind == "all-gather":
            return self.gotten * others // self.size
        return (2 if self.kind == "all-reduce" else 1) * self.given * others // self.size


def read_collective(instruction: Instruction, operands: Mapping[str, Instruction], devices: int) -> Collective:
    """Returns the collective of an instruction; `operands` has the others of its computation by name."""
    kind = instruction.opcode.removesuffix("-start")
    given = sum(operands[name].bytes for name in instruction.operands if name in operands)
    gotten = instruction.bytes
    if instruction.opcode.endswith("-start"):  # its result holds its operands, and words of bookkeeping
        gotten = _results(instruction, kind)
    text = instruction.attribute("source_target_pairs" if kind == "collective-permute" else "replica_groups")
    return Collective(kind, read_groups(text or "", devices), given, gotten)


def _results(instruction: Instruction, kind: str) -> int:
    if kind == "all-reduce":
        return instruction.bytes
    sizes = [shape_bytes(f"{dtype}[{','.join(map(str, dims))}]") for dtype, dims in array_shapes(instruction.shape)]
    count = len(instruction.operands)
    return sum(sizes[count : 2 * count])


@lru_cache(maxsize=1024)
def read_groups(text: str, devices: int) -> Groups:
    """Returns the groups of a `replica_groups` in any of its three forms, or of `source_target_pairs`.

    {{0,1},{2,3}}; [2,2]<=[4] or [2,2]<=[2,2]T(1,0); mesh['a'=2,'b'=2] {'b'}, whose devices may follow in an order of
    their own: mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}. Empty groups mean all devices; a form that is not
    known gives none.
    """
    if not text.strip("{}"):
        return (tuple(range(devices)),)
    if text.startswith("{{"):
        return tuple(map(_numbers, re.findall(r"\{([\d,]+)\}", text)))
    if found := re.fullmatch(r"\[([\d,]+)\]<=(\[.*)", text):
        ids = _ordered(found[2])
        return () if ids is None else _rows(ids.reshape(_numbers(found[1])))
    if found := re.fullmatch(r"mesh\[(.*?)\](?:, device_ids=\((.*)\))? \{(.*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        chosen = [place for place, name in enumerate(sizes) if f"'{name}'" in found[3]]
        ids = _ordered(found[2] or f"[{math.prod(sizes.values())}]")
        if ids is not None and ":" not in found[3]:  # which would be a part of an axis
            ids = ids.reshape(tuple(sizes.values()))
            width = math.prod(ids.shape[place] for place in chosen)
            return _rows(np.moveaxis(ids, chosen, range(-len(chosen), 0)).reshape(-1, width))
    return ()


def _ordered(text: str) -> np.ndarray | None:
    """Returns the devices of "[2,3]T(1,0)", counted in two dimensions and then transposed, or of a list, "0,2,1"."""
    if found := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims = _numbers(found[1])
        ids = np.arange(math.prod(dims)).reshape(dims)
        return ids.transpose(_numbers(found[2])) if found[2] else ids
    return np.array(_numbers(text)) if re.fullmatch(r"[\d,]+", text) else None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _rows(ids: np.ndarray) -> Groups:
    return tuple(map(tuple, ids.tolist()))


def axes_of(groups: Groups, mesh: Mapping[str, int]) -> str:
    """Returns the mesh axes along which the devices of a group differ: "fsdp", "data+fsdp"; "-" for none."""
    pairs = np.array([(group[0], other) for group in groups for other in group[1:]])
    if not len(pairs):
        return "-"
    first, second = (np.array(np.unravel_index(pairs[:, n], tuple(mesh.values()))) for n in (0, 1))
    return "+".join(name for name, differs in zip(mesh, (first != second).any(1), strict=True) if differs) or "-"


@dataclass(frozen=True)
class Network:
    """The links between the devices of a mesh, in the order of their numbers; `places` are coordinates of chips."""

    topology: Topology
    places: tuple[tuple[int, ...], ...]
    efficiency: float  # of a link's bandwidth

    def seconds(self, collective: Collective) -> float:
        """Returns how long a collective takes with the network to itself."""
        if collective.size < 2 or not collective.sent:
            return 0.0
        if self.topology.chip.is_gpu:
            return self._between_gpus(collective)
        if collective.kind == "collective-permute":
            return self._to_neighbours(collective)
        sides = [self._side(dimension, collective.groups[0]) for dimension in range(len(self.topology.shape))]
        sides = [side for side in sides if side.size > 1]
        hops = sum(side.size // (2 if side.is_ring else 1) for side in sides)
        if not sides:  # both devices of a chip
            return collective.sent / self.topology.chip.hbm_bytes_per_second
        if collective.kind in EXCHANGES:  # of every device's own bytes: those of a chip share its links
            share = collective.given * self.topology.chip.devices
            seconds = max(share * side.size / (4 * side.ways) for side in sides) / self._link
        else:
            ways = sum(side.ways for side in sides)
            seconds = collective.sent * self._sharing(collective.groups[0]) / ways / self._link
        return seconds + hops * HOP_SECONDS

    @cached_property
    def _link(self) -> float:
        return self.topology.chip.link_gbps * 1e9 * self.efficiency

    def _sharing(self, group: tuple[int, ...]) -> int:
        """Returns how many groups send through the links of a chip: both devices of a chip may belong to others."""
        return max(1, self.topology.chip.devices * len({self.places[n] for n in group}) // len(group))

    def _side(self, dimension: int, group: tuple[int, ...]) -> "Side":
        length, is_ring = self.topology.shape[dimension], self.topology.rings[dimension]
        found = sorted({self.places[device][dimension] for device in group})
        if len(found) < 2:
            return Side(len(found), 0.0, False)
        gap = min(right - left for left, right in pairwise(found))
        closes = is_ring and len(found) * gap == length
        return Side(len(found), (2 if closes else 1) / gap, closes)

    def _to_neighbours(self, collective: Collective) -> float:
        loads: Counter[tuple] = Counter()
        longest = 0
        for source, target in collective.groups:
            way = list(self._way(self.places[source], self.places[target]))
            longest = max(longest, len(way))
            loads.update(way)
        return max(loads.values(), default=0) * collective.given / self._link + longest * HOP_SECONDS

    def _way(self, place: tuple[int, ...], end: tuple[int, ...]):
        """Yields the links (chip, dimension, direction) from one chip to another."""
        here = list(place)
        for dimension, size in enumerate(self.topology.shape):
            ahead = (end[dimension] - here[dimension]) % size
            back = self.topology.rings[dimension] and ahead > size // 2
            back = back or (not self.topology.rings[dimension] and end[dimension] < here[dimension])
            while here[dimension] != end[dimension]:
                yield (*here, dimension, back)
                here[dimension] = (here[dimension] + (-1 if back else 1)) % size

    def _between_gpus(self, collective: Collective) -> float:
        """GPUs of a node reach each other through a switch, other nodes through a network of their own."""
        chip, count = self.topology.chip, len({device // self.topology.chip.node for device in collective.groups[0]})
        local = max(1, collective.size // count)
        network, link = chip.network_gbps * 1e9 * self.efficiency, chip.link_gbps * 1e9 * self.efficiency
        if collective.kind == "collective-permute":
            crossing = any(source // chip.node != target // chip.node for source, target in collective.groups)
            seconds = collective.sent / (network if crossing else link)
        elif count == 1:
            seconds = collective.sent / link
        elif collective.kind in EXCHANGES:  # what is for other nodes goes through the network of each GPU
            away, near = 1 - 1 / count, (local - 1) / collective.size
            seconds = collective.given * max(away / network, near / link)
        else:  # what a node needs comes in once, over the networks of all its GPUs in the group
            seconds = collective.sent / min(link, network * local)
        return seconds + HOP_SECONDS * count


class Side(NamedTuple):
    """A dimension of a group's box: its chips, the links of one chip along it that the group may use, and its form."""

    size: int
    ways: float
    is_ring: bool
