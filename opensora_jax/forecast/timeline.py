"""How long a compiled program takes, and what of it: a walk through its schedule with two clocks, one for each device's
arithmetic and one for its network.

Every instruction takes what the compiler says (`estimated_cycles`), a kernel what its operations take at a stated
efficiency, a collective what its bytes take on the links. Collectives that the compiler starts early run beside the
instructions until they are waited for; the others stop them. Loops count as often as they run.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from opensora_jax.forecast.chips import Chip
from opensora_jax.forecast.hlo import COLLECTIVES, HOST, PRODUCTS, Instruction, Module, fused
from opensora_jax.forecast.moved import device_bytes, moved_bytes
from opensora_jax.forecast.traffic import Collective, Network, axes_of, read_collective

ASIDE = ("async-start", "call-start")  # a computation beside the rest, as on a SparseCore
COPIES = ("copy-start", "dynamic-slice-start", "dynamic-update-slice-start")  # between memories
FREE = {  # neither arithmetic nor memory
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all"),
    *("opt-barrier", "domain", "iota"),
}
MOVES = {  # of instructions without an estimate: compilers leave it out where nothing moves, as in most reshapes
    *("fusion", "copy", "convert", "transpose", "reduce", "broadcast", "concatenate", "pad", "slice", "dot"),
    "dynamic-update-slice",
}
KERNEL = "tpu_custom_call"  # the target of Pallas's kernels


@dataclass(frozen=True)
class Assumptions:
    """What the compiler does not say."""

    kernel_efficiency: float = 0.6  # of a kernel, as a share of the peak operations
    link_efficiency: float = 0.8  # of a link's bandwidth
    memory_efficiency: float = 0.8  # of the memory's bandwidth, where an instruction has no estimate
    product_efficiency: float = 0.6  # of matrix products on GPUs, whose compiler estimates nothing


class Sent(NamedTuple):
    """What all collectives of a kind along an axis add up to in a step; bytes and seconds are those of a device."""

    kind: str
    axis: str
    times: int
    bytes: int
    seconds: float
    overlapped: int  # how many of them run beside other instructions


PARTS = ("products", "fusions", "kernels", "unestimated", "exposed", "host")  # they add up to all of it


@dataclass
class Span:
    """The seconds of a computation and their parts."""

    seconds: float = 0.0
    products: float = 0.0  # the compiler's estimate of fusions with a product of matrices
    fusions: float = 0.0  # its estimate of all others
    moving: float = 0.0  # what the bytes of these others take alone
    kernels: float = 0.0
    unestimated: float = 0.0  # instructions without an estimate, by their bytes
    exposed: float = 0.0  # spent waiting for the network
    host: float = 0.0  # spent waiting for the host's memory
    kernel_calls: int = 0
    unknown: set[str] = field(default_factory=set)  # lengths of loops, operations of kernels, groups of devices
    costs: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # seconds by where they come from
    sent: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0.0, 0]))

    def add(self, other: "Span", times: int) -> None:
        """Adds another span, run so many times."""
        for name in ("seconds", "moving", *PARTS):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.kernel_calls += times * other.kernel_calls
        self.unknown |= other.unknown
        for source, seconds in other.costs.items():
            self.costs[source] += times * seconds
        for key, values in other.sent.items():
            self.sent[key] = [mine + times * value for mine, value in zip(self.sent[key], values, strict=True)]

    def costliest(self, count: int) -> dict[str, float]:
        """Returns the places in the traced program where most of the time goes, and their seconds."""
        return dict(sorted(self.costs.items(), key=lambda item: -item[1])[:count])

    @property
    def traffic(self) -> list[Sent]:
        """What is sent, the longest first."""
        found = [Sent(*key, int(count), int(size), s, int(over)) for key, (count, size, s, over) in self.sent.items()]
        return sorted(found, key=lambda one: -one.seconds)


KernelFlops = Callable[[Instruction], float | None]


@dataclass(frozen=True)
class Timeline:
    """Reads a module; `mesh` has the sizes of its axes, `kernel_flops` the operations of a kernel's call."""

    module: Module
    chip: Chip
    network: Network
    mesh: Mapping[str, int]
    kernel_flops: KernelFlops
    assumed: Assumptions

    def read(self) -> Span:
        """Returns the span of the whole program."""
        return self._span(self.module.entry, {})

    def _span(self, computation: str, known: dict[str, Span]) -> Span:
        if computation not in known:
            known[computation] = _Walk(self, computation, known).run()
        return known[computation]


class _Walk:
    """One pass through a computation's schedule."""

    def __init__(self, timeline: Timeline, computation: str, known: dict[str, Span]):
        self.t, self.computation, self.known = timeline, computation, known
        self.span, self.network_free, self.host_free = Span(), 0.0, 0.0
        self.instructions = timeline.module[computation]
        self.by_name = {one.name: one for one in self.instructions}
        self.pending: dict[str, float] = {}  # what runs beside: its name and when it ends
        self.copied: dict[str, float] = {}  # the same of copies to the host and from it
        self.chains = self._chains()

    def run(self) -> Span:
        for place, one in enumerate(self.instructions):
            self._step(place, one)
        for ends, part in (self.pending, "exposed"), (self.copied, "host"):
            for end in ends.values():
                self._wait(end, part)
        return self.span

    def _step(self, place: int, one: Instruction) -> None:
        if one.opcode in FREE:
            return
        if one.opcode == "while":
            trips = self.t.module.trips(one, self.computation)
            self.span.unknown |= {f"the length of loop {one.name}"} if trips is None else set()
            self.span.add(self.t._span(one.called_as("body"), self.known), 1 if trips is None else trips)
        elif one.opcode == "conditional":  # the longest: an update that is not left out
            self.span.add(max((self.t._span(name, self.known) for name in one.called), key=lambda s: s.seconds), 1)
        elif one.opcode == "call" or (one.opcode in ASIDE and not list(fused(self.t.module, one))):
            for name in one.called:
                self.span.add(self.t._span(name, self.known), 1)
        elif (kind := one.opcode.removesuffix("-start")) in COLLECTIVES:
            # The products of GPUs have no place in the schedule to hide a collective behind.
            beside = one.opcode != kind and not self.t.chip.is_gpu
            end = self._send(self._read(one, self.by_name), overlapped=beside)
            if beside:
                self.pending[one.name] = end
            else:
                self._wait(end, "exposed")
        elif one.opcode == "async-update":
            self.pending[one.name] = self.pending.pop(one.operands[0], 0.0)
        elif one.opcode in COPIES:
            self._copy(one)
        elif one.opcode.endswith("-done"):
            self._wait(self.pending.pop(one.operands[0], 0.0), "exposed")
            self._wait(self.copied.pop(one.operands[0], 0.0), "host")
        elif inside := list(fused(self.t.module, one)):
            self._fused(place, one, inside)
        else:
            self._compute(one)

    def _chains(self) -> dict[str, tuple[int, int]]:
        """Returns where each collective that is spread over fusions is first and last met."""
        found: dict[str, tuple[int, int]] = {}
        for place, one in enumerate(self.instructions):
            if one.opcode == "fusion":
                for inner in fused(self.t.module, one):
                    if chain := _chain(inner):
                        found[chain] = found.get(chain, (place, place))[0], place
        return found

    def _fused(self, place: int, one: Instruction, inside: list[Instruction]) -> None:
        """A fusion, or an asynchronous call, around collectives: a part of a chain, or one that is alone."""
        self._compute(one, only_estimated=True)
        is_aside = one.opcode in ASIDE
        for inner in inside:
            chain = _chain(inner)
            first, last = self.chains.get(chain, (place, place))
            if place == first:
                operands = {other.name: other for name in one.called for other in self.t.module[name]}
                collective = self._read(inner, operands)
                key = one.name if is_aside else chain
                self.pending[key] = self._send(collective, overlapped=last > first or is_aside)
            if place == last and one.opcode == "fusion":
                self._wait(self.pending.pop(chain, 0.0), "exposed")

    def _read(self, one: Instruction, operands: Mapping[str, Instruction]) -> Collective:
        found = read_collective(one, operands, len(self.t.network.places))
        self.span.unknown |= set() if found.groups else {f"the groups of collective {one.name}"}
        return found

    def _send(self, collective: Collective, *, overlapped: bool) -> float:
        """Puts a collective on the network, after those before it; returns when it ends."""
        if collective.size < 2:
            return self.span.seconds
        seconds = self.t.network.seconds(collective)
        sums = self.span.sent[collective.kind, axes_of(collective.groups, self.t.mesh)]
        for place, value in enumerate((1, collective.sent, seconds, overlapped)):
            sums[place] += value
        self.network_free = max(self.span.seconds, self.network_free) + seconds
        return self.network_free

    def _copy(self, one: Instruction) -> None:
        """Copies to the host and back take their time beside the rest; those within a chip are hidden prefetches."""
        if HOST in one.shape:
            seconds = device_bytes(one.shape) / (self.t.chip.host_gbps * 1e9)
            self.host_free = max(self.span.seconds, self.host_free) + seconds
            self.copied[one.name] = self.host_free

    def _wait(self, end: float, part: str) -> None:
        waited = max(0.0, end - self.span.seconds)
        self.span.seconds += waited
        setattr(self.span, part, getattr(self.span, part) + waited)

    def _compute(self, one: Instruction, *, only_estimated: bool = False) -> None:
        chip, assumed = self.t.chip, self.t.assumed
        part, seconds = "fusions", 0.0
        if one.cycles is not None and chip.clock_ghz:
            seconds = one.cycles / (chip.clock_ghz * 1e9)
            if one.opcode in PRODUCTS or not self.t.module.with_products.isdisjoint(one.called):
                part = "products"
            else:
                self.span.moving += self._moving(one)
        elif one.opcode == "custom-call" and KERNEL in one.attributes:
            part, flops = "kernels", self.t.kernel_flops(one)
            self.span.kernel_calls += 1
            self.span.unknown |= {f"the operations of kernel {one.name}"} if flops is None else set()
            seconds = max((flops or 0) / (chip.peak_flops * assumed.kernel_efficiency), self._moving(one))
        elif one.opcode != "custom-call" and not only_estimated:
            part, seconds = "unestimated", self._moving(one) if one.opcode in MOVES else 0.0
        self.span.seconds += seconds
        self.span.costs[one.source or one.opcode] += seconds
        setattr(self.span, part, getattr(self.span, part) + seconds)

    def _moving(self, one: Instruction) -> float:
        """Returns what reading an instruction's operands and writing its result takes."""
        size = moved_bytes(self.t.module, one, [self.by_name[name] for name in one.operands if name in self.by_name])
        return size / (self.t.chip.hbm_bytes_per_second * self.t.assumed.memory_efficiency)


def _chain(inner: Instruction) -> str:
    """Returns what ties the parts of one asynchronous collective together."""
    if '"async_collective_fusion_config"' not in inner.attributes and "chain_id" not in inner.attributes:
        return ""
    return f"{inner.attribute('frontend_attributes')} {inner.attribute('channel_id')}"
