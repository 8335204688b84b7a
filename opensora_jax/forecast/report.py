"""Forecasts as text: a block for each, a table of all, and what was assumed."""

from collections.abc import Sequence

from opensora_jax.forecast.estimate import Forecast
from opensora_jax.forecast.jobs import Group, Wanted
from opensora_jax.forecast.timeline import Assumptions
from opensora_jax.forecast.topology import Topology
from opensora_jax.forecast.traffic import HOP_SECONDS
from opensora_jax.forecast.work import Failure

GIB = 2**30
SHOWN = 8  # kinds of collectives
WHAT = {"train": "steps", "sample": "steps", "decode": "decodes"}


def block(one: Forecast | Failure, price: float | None) -> list[str]:
    """Returns the lines of a forecast."""
    if isinstance(one, Failure):
        return [f"  not compiled   {one.reason} ({one.log})"]
    facts, span = one.facts, one.span
    lines = [] if one.fits else [f"  does not fit   {one.reason}"]
    lines.append(f"  memory         {memory(one)}")
    if span is None or not span.seconds:
        return lines
    cost = "" if price is None else f", ${one.dollars(price, 1000):,.2f} for 1000 {WHAT[one.job.kind]}"
    tokens = f"{facts.tokens / span.seconds:,.0f} tokens/s, " if facts.tokens else ""
    lines += [
        f"  time           {seconds(span.seconds)}: {facts.samples / span.seconds:,.2f} samples/s, {tokens}"
        f"MFU {one.mfu:.1%} (at best {one.best_mfu:.1%}){cost}",
        f"  of which       {parts(one)}",
        f"  arithmetic     {arithmetic(one)}",
    ]
    for number, sent in enumerate(span.traffic[:SHOWN]):
        beside = f", {sent.overlapped:,} of them beside arithmetic" if sent.overlapped else ""
        lines.append(
            f"  {'' if number else 'network':<14} {sent.kind} over {sent.axis}: {sent.times:,} x, {size(sent.bytes)}, "
            f"{seconds(sent.seconds)}{beside}"
        )
    if span.unknown:
        lines.append(f"  not counted    {', '.join(sorted(span.unknown)[:SHOWN])}")
    return lines


def videos(group: Group, parts: Sequence[tuple[Wanted, Forecast | Failure]], price: float | None) -> list[str]:
    """Returns the line of what a batch of videos, or of images, takes; none where a part of it does not run."""
    known = [(wanted.times, one) for wanted, one in parts if isinstance(one, Forecast) and one.fits]
    if not group.videos or len(known) < len(parts):
        return []
    total = sum(times * one.seconds for times, one in known)
    cost = "" if price is None else f", ${sum(one.dollars(price, times) for times, one in known) / group.videos:.4f}"
    single, several = ("an image", "images") if group.is_image else ("a video", "videos")
    what = single if group.videos == 1 else f"{group.videos} {several}"
    return [f" {what} in {seconds(total)}: {seconds(total / group.videos)}{cost} each"]


def memory(one: Forecast) -> str:
    """Returns the bytes of a device in words: those that lie there, and what the program needs beside them."""
    facts = one.facts
    found = [f"{name} {size(count)}" for name, count in facts.state.items()]
    if not facts.programs:
        return ", ".join(found)
    code = max(program.memory.code for program in facts.programs)
    rest = max(0, facts.peak_bytes - code - sum(facts.state.values()))
    found += [f"activations and results {size(rest)}", f"code {size(code)}"]
    found += [f"on the host {size(facts.host_bytes)}"] if facts.host_bytes else []
    return f"{size(facts.peak_bytes)} of {size(one.limit_bytes)}: {', '.join(found)}"


def parts(one: Forecast) -> str:
    """Returns the parts of a step's time in words."""
    span = one.span
    assert span is not None
    sent = sum(kind.seconds for kind in span.traffic)
    found = [f"products {seconds(span.products)}"]
    if not one.topology.chip.is_gpu:
        found.append(f"other fusions {seconds(span.fusions)} (their bytes alone {seconds(span.moving)})")
    if span.kernel_calls:
        found.append(f"{span.kernel_calls:,} kernels {seconds(span.kernels)}")
    found.append(f"waiting for the network {seconds(span.exposed)} (of {seconds(sent)})")
    if span.host:
        found.append(f"waiting for the host {seconds(span.host)}")
    if span.unestimated > 0.001 * span.seconds:
        found.append(f"other instructions {seconds(span.unestimated)}")
    return ", ".join(found)


def arithmetic(one: Forecast) -> str:
    """Returns the operations in words."""
    facts = one.facts
    each = one.flops / one.topology.devices
    if not facts.flops:
        return f"{one.flops:.3g} operations, counted in the traced program; {each:.3g} on each device"
    again = facts.executed_flops / facts.flops
    return f"{facts.flops:.3g} useful operations, {each:.3g} on each device; {again:.2f} times as many are executed"


def table(rows: Sequence[tuple[str, Forecast]], price: float | None) -> list[str]:
    """Returns one line for each training step."""
    titles = ("", "samples", "GiB", "fits", "step s", "MFU", "tokens/s", *(() if price is None else ("$/1000",)))
    cells: list[tuple[str, ...]] = [titles]
    for title, one in rows:
        facts, span = one.facts, one.span
        timed = (
            [f"{span.seconds:.3f}", f"{one.mfu:.1%}", f"{facts.tokens / span.seconds:,.0f}" if facts.tokens else "-"]
            if span
            else ["-"] * 3
        )
        cost = [] if price is None else [f"{one.dollars(price, 1000):,.2f}" if span else "-"]
        peak = f"{facts.peak_bytes / GIB:.1f}" if facts.programs else "-"
        cells.append((title, f"{facts.samples:,}", peak, "yes" if one.fits else "no", *timed, *cost))
    widths = [max(len(row[n]) for row in cells) for n in range(len(titles))]
    return [
        "  ".join(
            cell.ljust(width) if not n else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def assumptions(topology: Topology, assumed: Assumptions) -> list[str]:
    """Returns what a forecast takes for granted."""
    chip = topology.chip
    if chip.is_gpu:
        compute = f"products of matrices reach {assumed.product_efficiency:.0%} of {chip.peak_flops / 1e12:.0f} TFLOP/s"
    else:
        compute = (
            f"fusions take the cycles that the compiler estimates, at {chip.clock_ghz} GHz; kernels reach "
            f"{assumed.kernel_efficiency:.0%} of {chip.peak_flops / 1e12:.0f} TFLOP/s"
        )
    return [
        f"Assumed: {compute}; links reach {assumed.link_efficiency:.0%} of {chip.link_gbps:.0f} GB/s, each way, and a "
        f"hop takes {HOP_SECONDS * 1e6:.0f} us; collectives run one after the other, beside arithmetic only where the "
        f"compiler starts them early; the host's memory is reached at {chip.host_gbps:.0f} GB/s. Nothing was measured."
    ]


def size(count: int) -> str:
    """Returns bytes in words."""
    return f"{count / GIB:.2f} GiB" if count >= 0.01 * GIB else f"{count / 2**20:.2f} MiB"


def seconds(value: float | int) -> str:
    """Returns a time in words."""
    return f"{value:.3f} s" if value >= 0.1 else f"{value * 1e3:.2f} ms"
