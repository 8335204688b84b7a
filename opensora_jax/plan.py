"""What a config needs and takes on a pod that is not here:
`python -m opensora_jax.plan --config=configs/diffusion/train/stage2.py --topology=v5p:4x4x4`.

Every step of the config (one for each line of `bucket_config`, at the aspect ratio with the most tokens; of a config
that samples the sampler's steps and the decode) is compiled for the topology by its real compiler, without hardware.
What does not fit is a result. Compiling a large model takes minutes; answers are kept, so that the same command again
is instant. `--search` looks for the best mesh, batch size and recomputation of one bucket.
"""

import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from opensora_jax.config.command import run
from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.config.flag import config_flag, require
from opensora_jax.config.machine import CORES, MEMORY, compilers_at_once
from opensora_jax.forecast import report
from opensora_jax.forecast.compile import compile_job
from opensora_jax.forecast.estimate import Forecast, forecast
from opensora_jax.forecast.facts import Facts
from opensora_jax.forecast.job import Job
from opensora_jax.forecast.jobs import Group, Wanted, has_auto, make_groups, missing_text_encoders, parse_lines
from opensora_jax.forecast.search import candidates
from opensora_jax.forecast.timeline import Assumptions
from opensora_jax.forecast.topology import check_compiler, parse_topology
from opensora_jax.forecast.work import Failure, Workplace, end_with_parent, pending

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opensora_jax" / "plan"
GIB = 2**30
BEST = 5  # candidates that a search prints


def main(argv: list[str]) -> None:
    """Prints the forecasts of a config, or does one job for another plan."""
    given = flags.FLAGS
    if given.job:
        end_with_parent()
        compile_job(Job.from_json(Path(given.job).read_text()), workplace().texts, Path(given.answer))
        return
    require("config", "topology")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a compiler ends with its plan
    topology = parse_topology(given.topology)
    check_compiler(topology.chip)
    check_numbers()
    if given.json:
        check_file(Path(given.json))
    groups = make_groups(given.config, topology, parse_lines(given.buckets), compiler_options(given.xla))
    if given.search:
        groups = search(groups)
    for kind, folder in missing_text_encoders(given.config).items():
        print(f"The text encoder {kind} is not counted: there is no folder {folder}.")
    if has_auto(given.config):
        print('Batch sizes "auto" are forecast with 1 sample of a data shard.')
    found = forecasts([wanted.job for group in groups for wanted in group.wanted])
    answers = [(group, [(wanted, found[wanted.job.key]) for wanted in group.wanted]) for group in groups]
    if given.search:
        answers.sort(key=lambda answer: -speed(answer[1][0][1]))
    for line in lines(answers, BEST if given.search else len(answers)):
        print(line)
    if given.json:
        write_json(Path(given.json), as_json(answers))
    failures = [one for one in found.values() if isinstance(one, Failure)]
    if len(failures) == len(found):
        raise UserError(failures[0].reason)
    if failures:
        raise UserError(f"{len(failures)} of {len(found)} programs were not compiled, see above")


def check_numbers() -> None:
    """Raises: UserError for a flag that is no finite number."""
    for name in ("memory", "price"):
        value = getattr(flags.FLAGS, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"--{name} takes a number, as in --{name}=4.2: got {value}")


def check_file(path: Path) -> None:
    """Raises: UserError where no file can be written, before anything is compiled for it."""
    if path.is_dir():
        raise UserError(f"--json is the file to write, such as plan.json: got the folder {path}")
    if not os.access(path.parent, os.W_OK):
        raise UserError(
            f"--json={path}: there is no folder {path.parent} that can be written to: make it, or take another"
        )


Answer = Forecast | Failure
Answers = list[tuple[Group, list[tuple[Wanted, Answer]]]]


def workplace() -> Workplace:
    """Returns where answers are kept."""
    return Workplace(Path(flags.FLAGS.cache), flags.FLAGS.timeout, flags.FLAGS.at_once or compilers_at_once())


def limit_bytes() -> int:
    """Returns the bytes of a device that a program may need."""
    memory = flags.FLAGS.memory
    return parse_topology(flags.FLAGS.topology).chip.usable_bytes if memory is None else int(memory * GIB)


def assumed() -> Assumptions:
    """Returns what the flags take for granted."""
    given = flags.FLAGS
    return Assumptions(kernel_efficiency=given.kernel_efficiency, link_efficiency=given.link_efficiency)


def compiler_options(given: Sequence[str]) -> dict[str, Any]:
    """Returns options "name=value" of the compiler, numbers as such. Raises: UserError for one without a value."""
    for option in given:
        if "=" not in option:
            raise UserError(f"--xla takes name=value, as in --xla=xla_tpu_scoped_vmem_limit_kib=65536: got {option!r}")
    pairs = (option.lstrip("-").partition("=") for option in given)
    return {name: _number(value) for name, _, value in pairs}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def forecasts(jobs: Sequence[Job]) -> dict[str, Answer]:
    """Returns the forecast of each job by its key; those that are not known yet are compiled."""
    place, limit = workplace(), limit_bytes()
    jobs = list({job.key: job for job in jobs}.values())
    found: dict[str, Answer] = {}
    with progress(len(jobs), is_shown=bool(pending(place, jobs))) as bar:
        for job, answer in place.answers(jobs, partial(_say, bar)):
            if isinstance(answer, Facts):
                found[job.key] = forecast(job, answer, place.texts, assumed(), limit)
            else:
                found[job.key] = answer
            bar.update()
    return found


def progress(total: int, is_shown: bool, seconds: float | None = None) -> tqdm:
    """Returns the bar of programs; `seconds` pass between its lines: half of one in a terminal, 20 in a log file.

    With no fewest steps between lines, as tqdm learns them else, a program that takes long is seen to be at work.
    """
    often = seconds if seconds is not None else (0.5 if sys.stderr.isatty() else 20)
    return tqdm(total=total, desc="compile", unit="program", disable=not is_shown, mininterval=often, miniters=0)


def _say(bar: tqdm, text: str) -> None:
    bar.set_postfix_str(text, refresh=False)
    bar.update(0)


def search(groups: Sequence[Group]) -> list[Group]:
    """Returns the most promising ways to run the bucket with the most tokens among the groups.

    Raises: UserError for a config that does not train, and when nothing can fit.
    """
    jobs = [group.wanted[0].job for group in groups]
    if any(job.kind != "train" for job in jobs):
        raise UserError("--search is for configs that train: give one of configs/diffusion/train")
    job = max(jobs, key=lambda job: job.subject["num_frames"] * job.subject["height"] * job.subject["width"])
    topology = parse_topology(job.topology)
    chosen = candidates(job, topology, flags.FLAGS.compiles, limit_bytes())
    if not chosen:
        raise UserError(f"{job.title}: no mesh of {topology} can hold the state and activations of one sample")
    print(f"{job.title}: {len(chosen)} candidates for {topology}, the rough sum's best first, are compiled")
    return [Group(one.settings, (Wanted(one.job, 1),)) for one in chosen]


def speed(one: Answer) -> float:
    """Returns the samples a second of what fits, 0 for the others."""
    if isinstance(one, Failure) or not one.fits or one.span is None:
        return 0.0
    return one.facts.samples / one.seconds


def lines(answers: Answers, shown: int) -> Iterator[str]:
    """Yields what is printed: the first few forecasts and every failure, a table of all, and what they assume."""
    price, topology = flags.FLAGS.price, parse_topology(flags.FLAGS.topology)
    rows: list[tuple[str, Forecast]] = []
    for number, (group, parts) in enumerate(answers):
        is_alone = len(parts) == 1
        in_full = number < shown or any(isinstance(one, Failure) for _, one in parts)
        if in_full:
            yield group.title
        for wanted, one in parts:
            if in_full:
                yield from () if is_alone else (f" {wanted.job.title}, {wanted.times} x",)
                yield from report.block(one, price)
            if isinstance(one, Forecast):
                rows.append((group.title if is_alone else f"{group.title}: {wanted.job.title}", one))
        yield from report.videos(group, parts, price)
    if len(rows) > 1:
        yield from report.table(rows, price)
    yield from report.assumptions(topology, assumed())


def as_json(answers: Answers) -> dict[str, Any]:
    """Returns the forecasts as JSON can hold them."""
    price, topology = flags.FLAGS.price, parse_topology(flags.FLAGS.topology)

    def program(wanted: Wanted, one: Answer) -> dict[str, Any]:
        found = {"times": wanted.times, "mesh": wanted.job.sections["mesh"], "subject": wanted.job.subject}
        if isinstance(one, Failure):
            return {"title": wanted.job.title, "fits": False, "reason": one.reason} | found
        return one.as_json(price) | found

    return {
        "topology": str(topology),
        "chips": topology.chips,
        "devices": topology.devices,
        "memory_bytes_per_device": limit_bytes(),
        "peak_flops_per_device": topology.chip.peak_flops,
        "price": price,
        "assumptions": asdict(assumed()),
        "groups": [
            {"title": group.title, "videos": group.videos, "programs": [program(*part) for part in parts]}
            for group, parts in answers
        ],
    }


def define_flags() -> None:
    """Defines the flags of this command."""
    config_flag(required=False)
    flags.DEFINE_string("topology", None, "such as v5p:4x4x4, v6e:16x16 or h100x8")
    flags.DEFINE_multi_string("buckets", [], "resolution,frames of a line of bucket_config, or to sample; repeatable")
    flags.DEFINE_string("json", None, "file to write all of it to")
    flags.DEFINE_float("price", None, "dollars for an hour of a chip", lower_bound=0)
    flags.DEFINE_float("memory", None, "GiB of a device, in place of what the chip has", lower_bound=0)
    flags.DEFINE_bool("search", False, "try other meshes, batch sizes and recomputation for one bucket")
    flags.DEFINE_integer("compiles", 8, "how many of these are compiled", lower_bound=1)
    flags.DEFINE_multi_string("xla", [], "name=value of a compiler option; repeatable")
    for name, what in ("kernel_efficiency", "the peak that kernels reach"), ("link_efficiency", "links' bandwidth"):
        flags.DEFINE_float(name, getattr(Assumptions, name), f"share of {what}", lower_bound=0.01, upper_bound=1.0)
    flags.DEFINE_float("timeout", 1800, "seconds that compiling a program may take", lower_bound=1)
    flags.DEFINE_integer(
        "at_once",
        None,
        f"compilers that run; one for each {CORES} cores and {MEMORY // GIB} GiB of memory without",
        lower_bound=1,
    )
    flags.DEFINE_string("cache", str(CACHE), "folder of answers")
    flags.DEFINE_string("job", None, "a job of another plan, to be done in this process")
    flags.DEFINE_string("answer", None, "where to write its answer")


if __name__ == "__main__":
    define_flags()
    run(main)
