"""From facts to a forecast: whether a job fits, how long it takes, what it costs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opensora_jax.forecast.count import flops_of_call, from_json
from opensora_jax.forecast.facts import Compiled, Facts, needed_bytes
from opensora_jax.forecast.hlo import Module
from opensora_jax.forecast.job import Job
from opensora_jax.forecast.timeline import PARTS, Assumptions, Span, Timeline
from opensora_jax.forecast.topology import Topology, parse_topology
from opensora_jax.forecast.traffic import Network

COSTLIEST = 30  # places in the traced program that are told apart in JSON


@dataclass(frozen=True)
class Forecast:
    """What to expect of a job; `reason` says why it does not run. Of what the compiler refuses no time is known."""

    job: Job
    facts: Facts
    limit_bytes: int  # of a device
    reason: str | None
    span: Span | None = None

    @property
    def fits(self) -> bool:
        """Whether it compiled, into the memory of a device."""
        return self.reason is None

    @property
    def topology(self) -> Topology:
        """The devices."""
        return parse_topology(self.job.topology)

    @property
    def flops(self) -> float:
        """Useful operations on all devices, or those that were counted where nothing says which are."""
        return self.facts.flops or self.facts.executed_flops

    @property
    def seconds(self) -> float:
        """Of a step."""
        assert self.span is not None
        return self.span.seconds

    @property
    def mfu(self) -> float:
        """Share of the peak operations that is useful."""
        return self.flops / (self.seconds * self.topology.devices * self.topology.chip.peak_flops)

    @property
    def best_mfu(self) -> float:
        """The same if fusions without a product took no more than their bytes do: the compiler is cautious there."""
        assert self.span is not None
        left = self.seconds - max(0.0, self.span.fusions - self.span.moving)
        return self.mfu * self.seconds / left if left else self.mfu

    def dollars(self, price: float, steps: float | int) -> float:
        """Returns what so many steps cost at a price for an hour of a chip."""
        return self.seconds * steps / 3600 * self.topology.chips * price

    def as_json(self, price: float | None) -> dict[str, Any]:
        """Returns all of it."""
        found: dict[str, Any] = {"kind": self.job.kind, "title": self.job.title, "topology": self.job.topology}
        found |= {"fits": self.fits, "reason": self.reason, "memory_bytes": self.limit_bytes}
        facts, span = self.facts, self.span
        found |= {name: value for name, value in asdict(facts).items() if name not in ("places", "kernels")}
        for program, one in zip(found["programs"], facts.programs, strict=True):
            program["memory"]["peak"] = one.memory.peak
        if facts.refusal is not None:
            found["peak_bytes"] = None  # nobody knows
        if span is None or not span.seconds:
            return found
        found |= {
            "step_seconds": span.seconds,
            "parts_seconds": {name: getattr(span, name) for name in PARTS},
            "moving_seconds": span.moving,
            "costliest_seconds": span.costliest(COSTLIEST),
            "collectives": [one._asdict() for one in span.traffic],
            "not_counted": sorted(span.unknown),
            "mfu": self.mfu,
            "best_mfu": self.best_mfu,
            "samples_per_second": facts.samples / span.seconds,
            "tokens_per_second": facts.tokens / span.seconds,
        }
        return found | ({} if price is None else {"dollars_per_1000_steps": self.dollars(price, 1000)})


def forecast(job: Job, facts: Facts, texts: Path, assumed: Assumptions, limit: int) -> Forecast:
    """Returns the forecast of a job for devices with so many bytes."""
    topology = parse_topology(job.topology)
    if facts.refusal is not None:
        return Forecast(job, facts, limit, refused(facts.refusal))
    reason = None
    if facts.peak_bytes > limit:
        reason = f"it needs {facts.peak_bytes / 2**30:.2f} GiB of a device's {limit / 2**30:.2f} GiB"
    total = Span()
    for program in facts.programs:
        total.add(read_span(program, facts, texts, topology, assumed), program.times)
    if topology.chip.is_gpu:  # whose compiler estimates nothing
        peak = topology.devices * topology.chip.peak_flops * assumed.product_efficiency
        total.products += facts.executed_flops / peak
        total.seconds += facts.executed_flops / peak
    return Forecast(job, facts, limit, reason, total)


def read_span(program: Compiled, facts: Facts, texts: Path, topology: Topology, assumed: Assumptions) -> Span:
    """Returns the times of a compiled program."""
    kernels = from_json(facts.kernels)
    network = Network(topology, tuple(map(tuple, facts.places)), assumed.link_efficiency)
    module = Module(program.read(texts))
    line = Timeline(module, topology.chip, network, facts.mesh, lambda call: flops_of_call(kernels, call), assumed)
    return line.read()


def refused(text: str) -> str:
    """Returns the compiler's refusal in one line."""
    found = needed_bytes(text)
    if found is None:
        return " ".join(text.split("\n")[0].split())
    what, needed, available = found
    need = "need" if what.endswith("alone") else "needs"
    return f"{what} {need} {needed / 2**30:.2f} GiB of a device's {available / 2**30:.2f} GiB, says the compiler"
