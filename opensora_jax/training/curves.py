"""Loss curves as one picture, from the metrics.jsonl files that training writes: a panel for each run."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opensora_jax.config.files import replacing
from opensora_jax.training.metrics import read_metrics

SMOOTHING = 0.05  # share of a run that the running mean covers


def series(metrics: list[dict], name: str) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """Returns (steps, values) of the entries that hold a number called `name`."""
    pairs = [(m["step"], m[name]) for m in metrics if isinstance(m.get(name), int | float)]
    steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    return steps, values


def running_mean(values: Float[np.ndarray, "N"], window: int) -> Float[np.ndarray, "N"]:
    """Returns the mean over `window` values around each, over fewer at the ends."""
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def write_curves(path: Path, runs: Mapping[str, Path], name: str = "loss") -> None:
    """Write a PNG with a panel per run (title -> metrics.jsonl): every step in pale, the running mean on top.

    Raises: ValueError if there is no run.
    """
    if not runs:
        raise ValueError("Loss curves need at least one metrics.jsonl.")
    figure = Figure(figsize=(6.4 * len(runs), 4), dpi=110, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(runs)))
    for axes, (title, file) in zip(panels, runs.items(), strict=True):
        _panel(axes, title, name, *series(read_metrics(file), name))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _panel(axes: Axes, title: str, name: str, steps: np.ndarray, values: np.ndarray) -> None:
    axes.set(title=title, xlabel="step", ylabel=name)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    kept = np.isfinite(values)
    if not kept.any():
        return
    mean = running_mean(values[kept], max(1, round(SMOOTHING * kept.sum())))
    axes.plot(steps[kept], values[kept], color="#9db8d9", linewidth=0.8)
    axes.plot(steps[kept], mean, color="#1f4e8c", linewidth=1.8)
    if (values[kept] > 0).all():
        axes.set_yscale("log")
