"""How fast a run goes: samples, tokens and floating-point operations per second, and the time spent on data."""

import time
from dataclasses import dataclass

import jax

from opensora_jax.training.flops import PEAK_FLOPS


@dataclass(frozen=True)
class Work:
    """What a step or several do, on all devices; `tokens` and `flops` are 0 where they are not counted."""

    samples: int = 0
    tokens: int = 0
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.samples + other.samples, self.tokens + other.tokens, self.flops + other.flops)


class Throughput:
    """Adds up the work of steps between two laps."""

    def __init__(self, devices: int, kind: str):
        self._devices, self._peak = devices, PEAK_FLOPS.get(kind)
        self.start()

    def start(self) -> None:
        """Starts a lap now."""
        self._steps, self._work, self._waited, self._began = 0, Work(), 0.0, time.perf_counter()

    def add(self, work: Work, waited: float) -> None:
        """Counts a step, which waited so many seconds for its batch."""
        self._steps, self._work, self._waited = self._steps + 1, self._work + work, self._waited + waited

    def lap(self) -> dict[str, float]:
        """Returns means of a lap and starts the next; `mfu` is the share of what the devices can do, if it is known."""
        work, steps = self._work, max(self._steps, 1)
        seconds = time.perf_counter() - self._began
        found = {
            "step_seconds": seconds / steps,
            "data_wait_seconds": self._waited / steps,
            "samples_per_second": work.samples / seconds,
        }
        if work.flops:
            flops = work.flops / seconds / self._devices
            found |= {"tokens_per_second": work.tokens / seconds, "tflops_per_device": flops / 1e12}
            found |= {"mfu": flops / self._peak} if self._peak else {}
        self.start()
        return found | peak_memory()


def peak_memory() -> dict[str, float]:
    """Returns the most memory that was in use on a device of this process, in GiB, where the platform counts it."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if found and "peak_bytes_in_use" in found]
    return {"peak_memory_gib": max(peaks) / 2**30} if peaks else {}
