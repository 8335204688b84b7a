"""The compiled steps of a run: one for every shape of batch, made before the first step, so that none stalls later.

Compiling tells how much memory a step takes. What does not fit the devices is refused here with its bytes, not hours
later by the device. A run that continues on the same devices knows that all fit: it begins at once, and they are made
beside it. Not on GPUs, whose compiler tries kernels out on the device, and shares that out between processes.
"""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from opensora_jax.config.errors import UserError
from opensora_jax.config.machine import compilers_at_once
from opensora_jax.parallel.batch import batch_size
from opensora_jax.parallel.distributed import from_first
from opensora_jax.training.state import TrainState

GIB = 2**30

Batch = dict[str, jax.Array]
AbstractBatch = dict[str, jax.ShapeDtypeStruct]
Step = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
CompilerOptions = Mapping[str, Mapping[str, Any]]  # platform -> option -> value
Shapes = tuple[tuple[str, tuple[int, ...], str], ...]


@dataclass(frozen=True)
class Assembled:
    """A model's graph, its state's shapes on the mesh, what creates the state, and the step that moves it.

    `options` are for the compiler, `remedies` a sentence on how a step takes less memory.
    """

    graphdef: Any
    abstract: Any
    init: Callable[[], Any]
    step: Step
    options: CompilerOptions = field(default_factory=dict)
    remedies: str = ""


@dataclass(frozen=True)
class Program:
    """What compiling the step for a bucket found; bytes are for each device."""

    bucket: str
    samples: int
    seconds: float
    peak_bytes: int
    state_bytes: int

    def largest_batch(self, limit: int) -> int:
        """Returns about how many samples of the global batch would fit into `limit` bytes: memory grows with them."""
        each = max(self.peak_bytes - self.state_bytes, 1) / self.samples
        return max(int((limit - self.state_bytes) / each), 0)


class TooLargeError(UserError):
    """The compiler itself refused a step that does not fit a device, as those of TPUs do; `reason` is what it says."""

    def __init__(self, bucket: str, reason: str, remedies: str = ""):
        way_out = ways_out("Lower its batch size", remedies)
        super().__init__(f"{bucket} does not fit into the memory of a device: {reason.rstrip('.')}. {way_out}")
        self.reason = reason


def jit_step(step: Callable, abstract: Any, options: Mapping[str, Any]) -> Any:
    """Returns the step as a function to compile, its state given away; `options` are the compiler's."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=dict(options))


def options_of(mesh: Mesh, options: CompilerOptions) -> dict[str, Any]:
    """Returns the options for the compiler of the mesh's devices."""
    return dict(options.get(mesh.devices.flat[0].platform, {}))


class Programs:
    """Calls the step `(state, batch, key) -> (state, metrics)` in the form that was compiled for the batch's shapes.

    As many compilers run at a time as the machine holds, on GPUs one. Steps have to fit into what is free on a device
    at the start: what lies there already, stays.
    """

    def __init__(self, assembled: Assembled, mesh: Mesh):
        self.mesh, self._abstract, self._remedies = mesh, assembled.abstract, assembled.remedies
        self._options = options_of(mesh, assembled.options)
        self._step = jit_step(assembled.step, assembled.abstract, self._options)
        self._on_gpus = mesh.devices.flat[0].platform == "gpu"
        self._pool = ThreadPoolExecutor(1 if self._on_gpus else compilers_at_once(), thread_name_prefix="compile")
        limit = device_memory(mesh)
        self._room: int | None = from_first(limit and limit - resident_bytes(mesh))
        self._ahead: dict[Shapes, _Ahead] = {}
        self._compiled: dict[Shapes, Any] = {}

    @property
    def devices(self) -> dict[str, Any]:
        """What besides the config decides whether programs fit, as JSON has it."""
        kind, memory = self.mesh.devices.flat[0].device_kind, device_memory(self.mesh)
        return {"mesh": dict(self.mesh.shape), "kind": kind, "memory": memory, "jax": jax.__version__}

    def prepare(self, examples: Mapping[str, AbstractBatch], *, known_to_fit: bool) -> None:
        """Compiles for all of these before it returns, or, where they are known to fit, beside what follows.

        Raises: UserError when one does not fit into the memory of a device.
        """
        if known_to_fit and not self._on_gpus:
            logging.info("%d steps are compiled beside the run, each at the latest when it is due", len(examples))
            self.begin(examples)
        else:
            self.compile(examples)

    def begin(self, examples: Mapping[str, AbstractBatch]) -> None:
        """Begins to compile for batches of these shapes and shardings, which have a name each, beside what follows."""
        for name, batch in examples.items():
            self._ahead[shapes_of(batch)] = _Ahead(name, batch, self._pool.submit(self._compile, name, batch))

    def compile(self, examples: Mapping[str, AbstractBatch]) -> list[Program]:
        """Returns what was compiled for all of these, once it is.

        Raises: UserError when one does not fit into the memory of a device.
        """
        self.begin(examples)
        ahead = {shapes: self._ahead[shapes].made for shapes in map(shapes_of, examples.values())}
        try:
            for made in tqdm(as_completed(ahead.values()), total=len(ahead), desc="compile", unit="bucket"):
                made.result()
        finally:
            self.close()
        found = [made.result()[0] for made in ahead.values()]
        logging.info("%s", describe(found, self._room))
        self._check_memory(found)
        self._compiled |= {shapes: made.result()[1] for shapes, made in ahead.items()}
        return found

    def measure(self, name: str, batch: AbstractBatch) -> Program:
        """Returns what compiling for a batch finds, and keeps no program. Raises: TooLargeError."""
        return self._compile(name, batch)[0]

    def __call__(self, state: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        """Returns the next state and the metrics; what is not compiled yet is now.

        Raises: UserError when a step that was begun ahead does not fit into the memory of a device.
        """
        return self._program(shapes_of(batch))(state, batch, key)

    def bucket(self, batch: Mapping[str, Any]) -> str:
        """Returns the name under which batches of these shapes are known, "" for none."""
        shapes = shapes_of(batch)
        return self._ahead[shapes].name if shapes in self._ahead else ""

    def key(self, seed: int) -> jax.Array:
        """Returns the run's random key, on all devices."""
        return jax.device_put(jax.random.key(seed), NamedSharding(self.mesh, PartitionSpec()))

    def close(self) -> None:
        """Begins nothing more; what is being compiled comes to its end, and Python waits for it when it ends."""
        for one in self._ahead.values():
            one.made.cancel()
        if running := sum(one.made.running() for one in self._ahead.values()):
            logging.info("%d steps are still being compiled, and the process ends after them", running)

    def _program(self, shapes: Shapes) -> Any:
        if shapes not in self._compiled:
            if shapes not in self._ahead:
                return self._step
            name, batch, made = self._ahead[shapes]
            found, compiled = self._compile(name, batch) if made.cancel() else made.result()
            self._check_memory([found])
            self._compiled[shapes] = compiled
        return self._compiled[shapes]

    def _check_memory(self, found: list[Program]) -> None:
        too_big = [program for program in found if self._room and program.peak_bytes > self._room]
        if self._room and too_big:
            raise UserError(too_large(too_big, self._room, self._remedies))

    def _compile(self, name: str, batch: AbstractBatch) -> tuple[Program, Any]:
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))
        before = time.perf_counter()
        try:
            with jax.set_mesh(self.mesh):  # of this thread
                compiled = self._step.lower(self._abstract, batch, key).compile()
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            if "RESOURCE_EXHAUSTED" in str(error):
                raise TooLargeError(name, reason, self._remedies) from error
            if any(option in reason for option in self._options):
                raise UserError(f"{reason.rstrip('.')}: change config.compiler_options") from error
            raise
        memory: Any = compiled.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        program = Program(
            name,
            batch_size(batch),
            time.perf_counter() - before,
            peak - memory.alias_size_in_bytes,
            sum(_bytes_on_a_device(leaf) for leaf in jax.tree.leaves(self._abstract)),
        )
        return program, compiled


class _Ahead(NamedTuple):
    """A program that is made, or will be: the name of its bucket, the shapes, what becomes of it."""

    name: str
    batch: AbstractBatch
    made: Future[tuple[Program, Any]]


def _bytes_on_a_device(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def shapes_of(batch: Mapping[str, Any]) -> Shapes:
    """Returns what tells batches apart that need programs of their own."""
    return tuple((name, batch[name].shape, str(batch[name].dtype)) for name in sorted(batch))


def device_memory(mesh: Mesh) -> int | None:
    """Returns the bytes that a program may use on a device; None where the platform does not say (CPUs)."""
    stats = mesh.local_devices[0].memory_stats()
    return stats["bytes_limit"] if stats and "bytes_limit" in stats else None


def resident_bytes(mesh: Mesh) -> int:
    """Returns what lies on a device already, beside the state that is still to come: encoders."""
    stats = mesh.local_devices[0].memory_stats()
    return stats.get("bytes_in_use", 0) if stats else 0


def describe(programs: list[Program], limit: int | None) -> str:
    """Returns the programs as a table for the log."""
    of = f" of {limit / GIB:.1f} free ones" if limit else ""
    lines = [f"compiled {len(programs)} steps; GiB on each device{of}:"]
    width = max((len(program.bucket) for program in programs), default=0)
    lines += [
        f"  {one.bucket:<{width}}  {one.samples:>6} samples  {one.peak_bytes / GIB:>8.3f} GiB  {one.seconds:>6.1f} s"
        for one in programs
    ]
    return "\n".join(lines)


def ways_out(smaller: str, remedies: str) -> str:
    """Returns what can be done about a step that does not fit."""
    return f"{smaller}, or raise mesh.fsdp or mesh.seq. {remedies}".strip().rstrip(".")


def too_large(programs: list[Program], limit: int, remedies: str) -> str:
    """Returns the error about steps that do not fit, with what would."""
    worst = max(programs, key=lambda program: program.peak_bytes)
    fitting = worst.largest_batch(limit)
    smaller = f"Lower its batch size (about {fitting} samples in all devices fit)" if fitting else "Split it further"
    return (
        f"{len(programs)} bucket(s) do not fit into the {limit / GIB:.1f} GiB that are free on a device: "
        f"{worst.bucket} needs {worst.peak_bytes / GIB:.1f} GiB for {worst.samples} samples, "
        f"{worst.state_bytes / GIB:.1f} of them for the state. {ways_out(smaller, remedies)}"
    )
