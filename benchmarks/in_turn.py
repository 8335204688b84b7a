"""Two ways of doing the same work, measured in turn, so that both meet the same noise of the machine."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Row(NamedTuple):
    """A piece of work: seconds of ours and of the peer, and its operations."""

    name: str
    ours: float
    theirs: float
    flops: float


def median_seconds(runs: Sequence[Callable[[], object]], count: int) -> list[float]:
    """Returns the median seconds of each of `runs`, all called once before and then `count` times in turn."""
    seconds: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()  # compiles, warms up
    for _ in range(count):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def matmul_flops(dtype: str, size: int | None = None) -> float:
    """Returns the operations per second of a large square matrix product: what the device gives at most."""
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    left = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b))
    (seconds,) = median_seconds([lambda: jax.block_until_ready(product(left, left))], 10)
    return 2 * size**3 / seconds


def print_table(rows: Sequence[Row], ceiling: float) -> None:
    """Prints the rows, with the share of the ceiling that each side reaches."""
    print(f"{'work':<24}{'ours s':>10}{'theirs s':>10}{'ratio':>8}{'ours TFLOP/s':>14}{'share':>8}{'theirs':>8}")
    for name, ours, theirs, flops in rows:
        shares = [f"{flops / seconds / ceiling:.0%}" for seconds in (ours, theirs)]
        speed = f"{flops / ours / 1e12:>14.3f}{shares[0]:>8}{shares[1]:>8}" if flops else ""
        print(f"{name:<24}{ours:>10.4f}{theirs:>10.4f}{ours / theirs:>8.2f}{speed}", flush=True)
