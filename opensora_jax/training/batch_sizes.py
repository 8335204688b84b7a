"""Batch sizes that the memory of the devices decides: those of the lines of bucket_config that say "auto".

The step is compiled, and never run, for one sample of a data shard, for two, and for as many as the line through these
says, until the largest number that fits is known. The answer is stored in the workdir: a checkpoint is tied to the
batch sizes of its plan, so a run that goes on keeps them, on other devices too.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.data.plan.auto import BucketConfig, Line, auto_lines
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.parallel.distributed import from_first
from opensora_jax.training.programs import GIB, AbstractBatch, Program, TooLargeError, device_memory, resident_bytes
from opensora_jax.weights.workdir import FOLDER, flatten

FILE = "batch_sizes.json"
CLOSE = 16  # one part in so many is near enough to a size that does not fit

Measure = Callable[[str, AbstractBatch], Program]  # compiles the step for a batch, which has a name


@dataclass(frozen=True)
class AutoBatchConfig:
    """A config's `auto_batch` section: what may be used of a device, and the most samples of a data shard.

    `memory_gib` is all of a device's memory (None: what the device says), `headroom` the share of it to leave free.
    """

    memory_gib: float | None
    headroom: float
    largest: int

    def __post_init__(self):
        """Refuse what leaves no memory or no sample."""
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ValueError(f"memory_gib is above 0, or None for what the device says: got {self.memory_gib}.")
        if not 0 <= self.headroom < 1:
            raise ValueError(f"headroom is a share of the memory, 0 <= headroom < 1: got {self.headroom}.")
        if self.largest < 1:
            raise ValueError(f"largest is at least 1: got {self.largest}.")

    def memory(self, mesh: Mesh) -> int:
        """Returns the bytes of a device. Raises: UserError where neither the config nor the device says."""
        found = device_memory(mesh) if self.memory_gib is None else int(self.memory_gib * GIB)
        if found is None:
            kind = mesh.devices.flat[0].device_kind
            raise UserError(
                f'a batch size "auto" needs to know the memory of a device, which "{kind}" does not say: give it with '
                "--config.auto_batch.memory_gib=, or write numbers in bucket_config"
            )
        return found


@dataclass(frozen=True)
class Choice:
    """The samples of a data shard that were found for a line, the bytes they need, and what that depends on."""

    resolution: str
    num_frames: int
    batch_size: int
    peak_bytes: int
    depends: dict[str, Any]

    @property
    def line(self) -> Line:
        """The line of bucket_config."""
        return self.resolution, self.num_frames


@dataclass(frozen=True)
class BatchSizes:
    """The choice of a run: what `measure` finds for a step decides, and `depends` names what that follows from.

    The mesh, its devices, their memory and the shapes of the batches are named anyway.
    """

    workdir: Path
    config: AutoBatchConfig
    mesh: Mesh
    measure: Measure
    depends: Mapping[str, Any]

    def choose(
        self, bucket_config: BucketConfig, buckets: Sequence[Bucket], examples: Mapping[str, AbstractBatch]
    ) -> dict[Line, int]:
        """Returns the batch size of every line with "auto": found now, or by an earlier start.

        `buckets` are those of a plan with such lines at 1, `examples` has their batches by name. Of a line's buckets
        the one with the most pixels decides; a line without any gets 1. All processes call this together.
        Raises: UserError when the memory of a device is unknown, when one sample does not fit, and when what the
        checkpoints are tied to does not fit or is not known.
        """
        lines, memory = auto_lines(bucket_config), self.config.memory(self.mesh)
        memory, resident, is_tied, text = from_first(
            [memory, resident_bytes(self.mesh), _has_checkpoints(self.workdir), _read(self.workdir / FILE)]
        )
        stored = parse(text, self.workdir / FILE)
        chosen: dict[Line, Choice] = {}
        budget = int(memory * (1 - self.config.headroom)) - resident
        with tqdm(_largest_buckets(buckets, lines).items(), desc="batch sizes", unit="line") as bar:
            for line, bucket in bar:
                search = _Search(bucket, examples[str(bucket)], self.mesh, self.measure, bar)
                depends = self._depends(memory, examples[str(bucket)])
                old = stored.get(line)
                if old and (is_tied or old.depends == depends):
                    if old.depends != depends:
                        search.check_still_fits(old, memory - resident, changes(old.depends, depends), self.workdir)
                    chosen[line] = old
                    continue
                if is_tied:
                    raise UserError(unknown(line, self.workdir))
                if old:
                    logging.info("%s: searched again, for %s", named(line), changes(old.depends, depends))
                size, peak_bytes = search.largest(budget, self.config.largest)
                chosen[line] = Choice(line[0], line[1], size, peak_bytes, depends)
                if jax.process_index() == 0:
                    self.workdir.mkdir(parents=True, exist_ok=True)
                    write(self.workdir / FILE, stored | chosen)  # a killed search goes on at the next line
        logging.info("%s", describe(list(chosen.values()), memory, budget, self.workdir / FILE))
        return dict.fromkeys(lines, 1) | {line: choice.batch_size for line, choice in chosen.items()}

    def _depends(self, memory: int, example: AbstractBatch) -> dict[str, Any]:
        """Returns all that a choice follows from, as JSON gives it back."""
        found = dict(self.depends) | {
            "mesh": dict(self.mesh.shape),
            "device": self.mesh.devices.flat[0].device_kind,
            "auto_batch": asdict(self.config) | {"memory_gib": round(memory / GIB, 3)},
            "batch": {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in sorted(example.items())},
            "jax": jax.__version__,
        }
        return json.loads(json.dumps(found, default=str))


@dataclass(frozen=True)
class _Search:
    """Compiles the step for one bucket, in the same order in all processes: the first one's findings count."""

    bucket: Bucket
    example: AbstractBatch
    mesh: Mesh
    measure: Measure
    bar: tqdm

    def largest(self, budget: int, largest: int) -> tuple[int, int]:
        """Returns the most samples of a data shard that fit into `budget` bytes, and the bytes that they need."""
        found: dict[int, tuple[int | float, str]] = {}

        def peak_bytes(size: int) -> int | float:
            found[size] = self.peak(size)
            return found[size][0]

        size = largest_fitting(peak_bytes, budget, largest)
        if not size:
            raise UserError(
                f"{self.bucket}: one sample of a data shard {found[1][1]}; of a device {budget / GIB:.3f} GiB may be "
                "used (auto_batch.headroom, and what lies there already, taken off). Raise model.grad_ckpt_settings, "
                "mesh.fsdp or mesh.seq, set model.remat_policy=offload, or take the line out of bucket_config"
            )
        return size, int(found[size][0])

    def check_still_fits(self, old: Choice, memory: int, changed: str, workdir: Path) -> None:
        """Says that a choice stays. Raises: UserError when it takes more than all of a device's memory."""
        peak, needs = self.peak(old.batch_size)
        if peak > memory:
            raise UserError(
                f"the checkpoints of {workdir} are tied to {old.batch_size} samples of a data shard for "
                f"{named(old.line)}, but with {changed} that {needs}, of {memory / GIB:.3f} GiB of a device: raise "
                "model.grad_ckpt_settings, or mesh.seq, or mesh.fsdp in place of mesh.data, or give another workdir"
            )
        logging.info(
            "%s: stays at %d, which the checkpoints are tied to, with %s", named(old.line), old.batch_size, changed
        )

    def peak(self, size: int) -> tuple[int | float, str]:
        """Returns the bytes of a device that so many samples of a data shard need, and says it in words."""
        self.bar.set_postfix_str(f"{named((self.bucket.resolution, self.bucket.num_frames))}: {size}?")
        try:
            with jax.set_mesh(self.mesh):
                program = self.measure(str(self.bucket), scaled(self.example, size))
            peak, state = program.peak_bytes / GIB, program.state_bytes / GIB
            found = from_first([program.peak_bytes, f"needs {peak:.3f} GiB, {state:.3f} of them for the state"])
        except TooLargeError as error:
            found = from_first([math.inf, f"is refused by the compiler ({error.reason})"])
        return tuple(found)


def largest_fitting(peak_bytes: Callable[[int], int | float], limit: int, largest: int) -> int:
    """Returns the most samples, up to `largest`, that were measured to need at most `limit` bytes; 0 if 1 needs more.

    Few calls: straight lines tell where to look, between the most that fit and the fewest that did not, until these
    are neighbours or near enough. The bytes may rise in steps, and fall here and there.
    """
    peaks: dict[int, int | float] = {}
    low, high, size = 0, largest + 1, 1
    while high - low > max(1, low // CLOSE):
        peaks[size] = peak_bytes(size)
        low, high = (size, high) if peaks[size] <= limit else (low, size)
        size = min(max(_likely(peaks, low, high, limit), low + max(1, low // CLOSE)), high - 1)
    return low


def _likely(peaks: Mapping[int, int | float], low: int, high: int, limit: int) -> int:
    """Returns where the bytes may reach the limit: on the line through two measurements, or else in the middle."""
    if low < 2:
        return 2
    middle, fitting = math.isqrt(low * high), sorted(size for size in peaks if size <= low)
    left, right = (low, high) if peaks.get(high, math.inf) <= 2 * limit else fitting[-2:]
    slope = (peaks[right] - peaks[left]) / (right - left)
    if slope <= 0 or (len(peaks) > 6 and len(peaks) % 2):  # lines may also come nearer by one sample at a time
        return middle
    found = low + int((limit - peaks[low]) / slope)
    return middle if found >= high and high in peaks else found


def scaled(batch: AbstractBatch, size: int) -> AbstractBatch:
    """Returns a batch with `size` times the samples."""
    return {
        name: jax.ShapeDtypeStruct((leaf.shape[0] * size, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)
        if leaf.ndim
        else leaf
        for name, leaf in batch.items()
    }


def parse(text: str | None, path: Path) -> dict[Line, Choice]:
    """Returns the choices in a file's text, none without one. Raises: UserError when it is damaged."""
    if text is None:
        return {}
    try:
        choices = [Choice(**fields) for fields in json.loads(text)["choices"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and the sizes are searched again") from None
    return {choice.line: choice for choice in choices}


def write(path: Path, choices: Mapping[Line, Choice]) -> None:
    """Writes the file."""
    write_json(path, {"choices": [asdict(choice) for choice in choices.values()]})


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns the first fields that differ: "mesh.data = 4 (was 8)"."""
    old, new = flatten(dict(before)), flatten(dict(now))
    names = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    shown = [f"{name} = {new.get(name)!r} (was {old.get(name)!r})" for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def unknown(line: Line, workdir: Path) -> str:
    """Returns the error about checkpoints whose batch size is not on record."""
    return (
        f"{workdir} has checkpoints, tied to their batch sizes, but no {FILE} with the one of {named(line)}: write "
        f'that number in place of "auto" into bucket_config["{line[0]}"][{line[1]}], or give another workdir'
    )


def describe(choices: Sequence[Choice], memory: int, budget: int, path: Path) -> str:
    """Returns the choices as a table for the log."""
    of = f"{budget / GIB:.3f} of {memory / GIB:.3f}"
    title = f"batch sizes by memory, kept in {path}; GiB of each device, which may give {of}:"
    width = max((len(named(choice.line)) for choice in choices), default=0)
    rows = [
        f"  {named(one.line):<{width}}  {one.batch_size:>6} samples of a data shard  {one.peak_bytes / GIB:>8.3f} GiB"
        for one in choices
    ]
    return "\n".join([title, *rows])


def named(line: Line) -> str:
    """Returns a line of bucket_config in words."""
    return f"{line[0]}, {line[1]} frames"


def _largest_buckets(buckets: Sequence[Bucket], lines: Sequence[Line]) -> dict[Line, Bucket]:
    """Returns the bucket with the most pixels of each line that has some."""
    found: dict[Line, Bucket] = {}
    for bucket in sorted(buckets, key=lambda bucket: bucket.height * bucket.width):
        found[bucket.resolution, bucket.num_frames] = bucket
    return {line: found[line] for line in lines if line in found}


def _has_checkpoints(workdir: Path) -> bool:
    folder = workdir / FOLDER
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
