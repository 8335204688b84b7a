"""Compiles a job in this process, and writes its facts down.

Texts of programs are kept by a hash of what goes into the compiler, so that sources which change without changing a
program cost a trace and no compile.
"""

import gzip
import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opensora_jax.config.build import build
from opensora_jax.config.files import replacing, write_json
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.forecast import parts, programs
from opensora_jax.forecast.count import as_json, count
from opensora_jax.forecast.facts import UNREADABLE, Compiled, Facts, Memory
from opensora_jax.forecast.job import DEVICES, Job, sources_digest, versions
from opensora_jax.forecast.topology import parse_topology
from opensora_jax.parallel.mesh import AXES, MeshConfig, make_mesh

BESIDE = ("autoencoder", "denoiser", "text encoders")  # parts of a program's state that it does not use


class _RefusedError(Exception):
    """The compiler says that a program does not fit."""


def compile_job(job: Job, texts: Path, answer: Path) -> None:
    """Writes the facts of a job; texts of programs go to the folder `texts`.

    Raises: UserError for what the networks or the mesh cannot take.
    """
    mesh = make_mesh(MeshConfig(**job.sections["mesh"]), parse_topology(job.topology).load())
    with jax.set_mesh(mesh):
        facts = _Compiling(job, mesh, texts).facts()
    write_json(answer, asdict(facts))


def program_of(job: Job, mesh: Mesh) -> programs.Program:
    """Returns what a job asks for. Raises: UserError for what the networks or the mesh cannot take."""
    if job.kind == "train":
        sections = build(programs.TrainSections, job.sections, "config")
        return programs.training_step(sections, Bucket(**job.subject), mesh)
    sampling = build(programs.SampleSections, job.sections, "config")
    if job.kind == "decode":
        return programs.decode(sampling, mesh)
    return programs.sampling_step(sampling, tuple(job.subject), mesh)


class _Compiling:
    """One job at work."""

    def __init__(self, job: Job, mesh: Mesh, texts: Path):
        self.job, self.mesh, self.texts = job, mesh, texts
        self.places = [[int(n) for n in getattr(one, "coords", [i])] for i, one in enumerate(mesh.devices.flat)]
        self.platform = "cuda" if parse_topology(job.topology).chip.is_gpu else "tpu"
        self.options: dict[str, Any] = {}
        self.kernels: dict[Any, float] = {}
        self.executed: dict[str, float] = {}
        self.compiled: dict[str, Compiled] = {}

    def facts(self) -> Facts:
        program = program_of(self.job, self.mesh)
        self.options = program.options | self.job.options  # the function has the program's, a digest needs both
        state = {name: programs.bytes_on_a_device(tree) for name, tree in program.state.items()}
        counts, peak, refusal = {program.name: 1}, 0, None
        try:
            if self.job.kind == "decode":
                counts, peak = parts.run(program.function, program.arguments, self.mesh, self.compile)
            else:
                self.compile(program.name, program.function, program.arguments)
                peak = self.compiled[program.name].memory.peak
        except _RefusedError as error:
            refusal, self.compiled = str(error), {}
        return Facts(
            programs=[replace(one, times=counts[name]) for name, one in self.compiled.items()],
            refusal=refusal,
            state={name: size for name, size in state.items() if size},
            peak_bytes=peak + sum(state.get(name, 0) for name in BESIDE),
            host_bytes=max((one.memory.host for one in self.compiled.values()), default=0),
            flops=program.flops,
            executed_flops=sum(flops * counts.get(name, 1) for name, flops in self.executed.items()),
            kernels=as_json(self.kernels),
            samples=program.samples,
            tokens=program.tokens,
            mesh=dict(zip(AXES, self.mesh.shape.values(), strict=True)),
            device_kind=self.mesh.devices.flat[0].device_kind,
            places=self.places,
        )

    def compile(self, name: str, function: Any, arguments: Any) -> tuple[list[Any], int]:
        """Compiles a program, unless what it is was kept; returns where its results lie, and the bytes beside these."""
        traced = function.trace(*arguments)
        found = count(traced.jaxpr.jaxpr, self.platform)
        self.kernels |= found.kernels
        self.executed[name] = found.flops
        lowered = traced.lower()
        stored = self.texts / self._digest(lowered)
        one, results = self._kept(name, stored) or self._compiled(name, lowered, stored)
        self.compiled[name] = one
        return results, one.memory.temporary + one.memory.code

    def _compiled(self, name: str, lowered: Any, stored: Path) -> tuple[Compiled, list[Any]]:
        began = time.perf_counter()
        try:
            compiled = lowered.compile(self.job.options or None)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            write_json(stored.with_suffix(".json"), {"refusal": str(error)})
            raise _RefusedError(str(error)) from error
        one = Compiled(name, 1, stored.name, memory_of(compiled), time.perf_counter() - began)
        results = jax.tree.leaves(compiled.output_shardings)
        with replacing(stored.with_suffix(".hlo.gz")) as path:
            path.write_bytes(gzip.compress(compiled.as_text().encode(), 6))
        value = {"refusal": None, "compiled": asdict(one), "results": _specs(results)}
        write_json(stored.with_suffix(".json"), value)
        return one, results

    def _kept(self, name: str, stored: Path) -> tuple[Compiled, list[Any]] | None:
        """Returns a program that was compiled before, and where its results lie: none where a file of it is damaged.

        Raises: _RefusedError if it was refused.
        """
        try:
            kept = json.loads(stored.with_suffix(".json").read_text())
            if kept["refusal"]:
                raise _RefusedError(kept["refusal"])
            one = replace(Compiled.from_json(kept["compiled"]), name=name)
            one.read(self.texts)
            specs = [PartitionSpec(*(tuple(e) if isinstance(e, list) else e for e in spec)) for spec in kept["results"]]
        except UNREADABLE:
            return None
        return one, [NamedSharding(self.mesh, spec) for spec in specs]

    def _digest(self, lowered: Any) -> str:
        devices = sources_digest(DEVICES)
        told = json.dumps([self.job.topology, devices, self.options, versions(), self.places], sort_keys=True)
        return hashlib.sha256(told.encode() + lowered.as_text().encode()).hexdigest()[:32]


def memory_of(compiled: Any) -> Memory:
    """Returns the bytes that a compiled program says it needs."""
    found = compiled.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes - found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
        found.host_argument_size_in_bytes + found.host_temp_size_in_bytes,
    )


def _specs(results: list[Any]) -> list[Any] | None:
    """Returns where results lie on the mesh, as JSON can hold it; None for one that is on no mesh."""
    if not all(isinstance(one, NamedSharding) for one in results):
        return None
    return [list(one.spec) for one in results]
