"""Sums a demo folder up: `python -m opensora_jax.report --folder=outputs/demo --wall_seconds=812`.

Writes loss_curves.png, contact_sheet.png and summary.json into the folder and prints what was measured, where
things are and how to go on. A part that is missing is named, and the rest is reported.
"""

import json
import os
import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from opensora_jax.config.command import run
from opensora_jax.config.errors import UserError
from opensora_jax.config.files import replacing, write_json
from opensora_jax.data import shapes
from opensora_jax.data.media.video import VideoError
from opensora_jax.data.table import sources
from opensora_jax.inference import outputs
from opensora_jax.training.curves import series, write_curves
from opensora_jax.training.metrics import read_metrics

DEFAULT_FOLDER = "outputs/demo"
RUNS = {"autoencoder": "vae", "diffusion": "diffusion"}  # name in the summary -> workdir inside the folder
ATTRIBUTES = ("color", "direction", "background", "shape")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class MissingPartError(Exception):
    """A part of the folder is not there; the message says which."""


def main(argv: list[str]) -> None:
    """Writes the pictures and the summary, then prints them."""
    folder = Path(flags.FLAGS.folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Give the output folder of the demo.")
    summary = summarize(folder, flags.FLAGS.wall_seconds)
    write_json(folder / "summary.json", summary)
    print(table(summary))
    print(directions(folder))


def summarize(folder: Path, wall_seconds: float | None) -> dict[str, Any]:
    """Returns the content of summary.json and writes both pictures; `missing` lists what was not found."""
    missing: list[str] = []

    def part(make: Callable[[Path], Any]) -> Any:
        try:
            return make(folder)
        except MissingPartError as error:
            missing.append(str(error))
            return None

    commands = part(command_times) or []
    summary = {
        "wall_seconds": wall_seconds,
        "commands": commands,
        "peak_memory_bytes": max((command["peak_memory_bytes"] for command in commands), default=None),
        "autoencoder": {"training": part(lambda f: training(f / "vae")), "validation": part(validation)},
        "diffusion": {"training": part(lambda f: training(f / "diffusion"))},
        "prompt_following": part(prompt_following),
        "device": device(),
        "versions": {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
    part(draw_curves)
    part(copy_contact_sheet)
    return summary | {"missing": missing}


def command_times(folder: Path) -> list[dict[str, Any]]:
    """Returns runs, seconds together and largest peak memory of each command, in order of first use."""
    lines = [line for file in sorted(folder.rglob("runs.jsonl")) for line in _json_lines(file)]
    if not lines:
        raise MissingPartError("runs.jsonl (no command has finished)")
    grouped: dict[str, list[dict]] = {}
    for line in sorted(lines, key=lambda line: line["date"]):
        grouped.setdefault(line["command"], []).append(line)
    return [
        {
            "command": name,
            "runs": len(runs),
            "seconds": round(sum(run["seconds"] for run in runs), 1),
            "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        }
        for name, runs in grouped.items()
    ]


def read(file: Path) -> outputs.Frames:
    """Returns a video's frames. Raises: MissingPartError for one that is missing or damaged."""
    try:
        return outputs.read(file)
    except VideoError as error:
        raise MissingPartError(f"{file} ({error})") from error


def training(workdir: Path) -> dict[str, float | int]:
    """Returns steps, first and last loss, mean loss of the last tenth, and median seconds of a step."""
    metrics = read_metrics(workdir / "metrics.jsonl")
    steps, losses = series(metrics, "loss")
    kept = np.isfinite(losses)  # those of skipped updates are not
    if not kept.any():
        raise MissingPartError(f"{workdir}/metrics.jsonl")
    steps, losses = steps[kept], losses[kept]
    _, seconds = series(metrics, "step_seconds")
    tenth = losses[steps > steps[-1] - 0.1 * (steps[-1] - steps[0] + 1)]
    return {
        "steps": int(steps[-1]),
        "loss_first": float(losses[0]),
        "loss_last": float(losses[-1]),
        "loss_mean_of_last_tenth": float(tenth.mean()),
        **({"median_step_seconds": float(np.median(seconds))} if len(seconds) else {}),
    }


def validation(folder: Path) -> dict[str, Any]:
    """Returns what train_vae measured on held-out clips, and the share of them whose shape can still be told."""
    path, captions = folder / "vae" / "validation.json", folder / "vae" / "reconstructions" / "captions.csv"
    if not path.is_file():
        raise MissingPartError(str(path))
    found = json.loads(path.read_text())
    if not found["clips"]:
        raise MissingPartError(f"reconstructions (no held-out clip could be read, says {path})")
    if captions.is_file():
        rows = sources.list_clips(captions).clips.to_pylist()
        pairs = [(Path(row["path"]), shapes.parse_caption(row["text"])) for row in rows]
        right = [shapes.identify(read(file))["shape"] == spec.shape for file, spec in pairs if spec]
        found |= {"shape_accuracy": float(np.mean(right))} if right else {}
    return found


def prompt_following(folder: Path) -> dict[str, Any]:
    """Returns the share of samples that show the colour, direction, background and shape of their prompt."""
    path = folder / "samples" / "samples.json"
    if not path.is_file():
        raise MissingPartError(str(path))
    asked = [(folder / "samples" / s["file"], shapes.parse_caption(s["prompt"])) for s in _samples(path)]
    checked = [(file, spec) for file, spec in asked if spec is not None and file.suffix == ".mp4" and file.is_file()]
    if not checked:
        raise MissingPartError("prompt following (the prompts are not captions of the demo set, so nothing to compare)")
    shown = [(shapes.identify(read(file)), spec) for file, spec in checked]
    right = {name: [seen[name] == getattr(spec, name) for seen, spec in shown] for name in ATTRIBUTES}
    return {"samples": len(shown)} | {f"{name}_accuracy": float(np.mean(right[name])) for name in ATTRIBUTES}


def draw_curves(folder: Path) -> None:
    """Writes loss_curves.png with a panel for each run that is there."""
    files = {name.capitalize(): folder / workdir / "metrics.jsonl" for name, workdir in RUNS.items()}
    there = {title: file for title, file in files.items() if file.is_file()}
    if not there:
        raise MissingPartError("loss curves (no run has metrics)")
    write_curves(folder / "loss_curves.png", there)


def copy_contact_sheet(folder: Path) -> None:
    """Puts the sheet of the samples at the top of the folder."""
    sheet = folder / "samples" / "contact_sheet.png"
    if not sheet.is_file():
        raise MissingPartError(str(sheet))
    with replacing(folder / "contact_sheet.png") as temporary:
        shutil.copyfile(sheet, temporary)


def device() -> dict[str, Any]:
    """Returns what JAX computes on, and the CPU cores beside it."""
    first = jax.devices()[0]
    return {"kind": first.device_kind, "count": jax.device_count(), "cpu_cores": os.cpu_count()}


def table(summary: dict[str, Any]) -> str:
    """Returns the measured numbers as aligned lines; what is missing has no line but is named at the end."""
    rows: list[tuple[str, str]] = []
    for name in RUNS:
        run = summary[name]["training"]
        if run:
            speed = f", {run['median_step_seconds']:.3f} s a step" if "median_step_seconds" in run else ""
            losses = f"loss {run['loss_first']:.4f} -> {run['loss_mean_of_last_tenth']:.4f}"
            rows.append((name.capitalize(), f"{losses} in {run['steps']} steps{speed}"))
    if summary["autoencoder"]["validation"]:
        rows += _validation_rows(summary["autoencoder"]["validation"])
    if summary["prompt_following"]:
        found = summary["prompt_following"]
        shares = ", ".join(f"{name} {found[f'{name}_accuracy']:.0%}" for name in ATTRIBUTES)
        rows.append(("Prompts followed", f"{shares} ({found['samples']} samples)"))
    rows += [(command["command"], f"{command['seconds']:.0f} s") for command in summary["commands"]]
    if summary["wall_seconds"] is not None:
        rows.append(("All together", f"{summary['wall_seconds']:.0f} s"))
    if summary["peak_memory_bytes"]:
        rows.append(("Peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"))
    rows += [("Missing", part) for part in summary["missing"]]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def directions(folder: Path) -> str:
    """Returns where the results are and what to run next."""
    names = {
        "contact_sheet.png": "all samples at a glance",
        "samples": "the videos",
        "loss_curves.png": "both trainings",
        "summary.json": "these numbers",
    }
    there = [f"  {folder / name}  {what}" for name, what in names.items() if (folder / name).exists()]
    elsewhere = "" if folder == Path(DEFAULT_FOLDER) else f"--config.folder={folder} "
    own = "a cyan triangle moves to the left on a gray background"
    return "\n".join(
        [
            "Look at:",
            *there,
            "Go on with:",
            "  source launch/env.sh",
            "  python -m opensora_jax.sample --config=configs/diffusion/inference/demo.py "
            f"{elsewhere}--config.save_dir={folder / 'mine'} --prompt={own!r}",
            f"  pip install tensorboard && tensorboard --logdir={folder}",
        ]
    )


def _validation_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    shape = found.get("shape_accuracy")
    told = "" if shape is None else f", shapes told apart {shape:.0%}"
    return [("Reconstruction", f"{found['psnr_db']:.2f} dB PSNR{told} ({found['clips']} held-out clips)")]


def _samples(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["samples"]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # a full disk may cut a line short
            continue
    return lines


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("folder", DEFAULT_FOLDER, "output folder of the demo")
    flags.DEFINE_float("wall_seconds", None, "seconds that everything took together, as the launch script measured")


if __name__ == "__main__":
    define_flags()
    run(main)
