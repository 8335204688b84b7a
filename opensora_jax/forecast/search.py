"""Other meshes, batch sizes, parts and recomputation for one bucket: which of them are worth a compile.

All that the topology and the network allow are put in order by a rough sum of arithmetic and traffic; those whose state
and activations cannot fit are left out. The best few are then compiled: their forecasts count, and the sums do not.
Rules are those of docs/parallel.md: `fsdp` is a part of a slice and not all of it, heads divide by `tensor`, and by
`seq` too or tokens go around a ring.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from opensora_jax.config.build import build
from opensora_jax.forecast import programs
from opensora_jax.forecast.job import Job
from opensora_jax.forecast.topology import Topology
from opensora_jax.models.mmdit import MMDiT, MMDiTConfig
from opensora_jax.training.flops import forward_flops

MOST_TENSOR, MOST_SEQ = 8, 16
ALL = 1000  # blocks: more than any network has
POLICIES = (("full", (ALL, ALL)), ("save_attention", (ALL, ALL)), ("offload", (ALL, ALL)), ("full", (0, 0)))
KEPT = {"full": 1.0, "save_attention": 2.0, "offload": 0.05}  # activations of a block's width that are kept
UNREMATTED = 12.0  # its input, q, k, v, attention, two projections, the MLP's four widths and its result
WORKING = 30.0  # of a block at work, forwards and backwards
COMPUTE, LINKS = 0.55, 0.7  # shares of the peaks that the order of candidates takes for granted
HOST_WAITED = 0.4  # share of the copies to the host and back that compiled steps wait for
MOST_PARTS = 8
PER_MESH = 2  # candidates of one mesh, so that others have their turn


class Candidate(NamedTuple):
    """A way to run a bucket; `settings` are the flags that ask for it."""

    job: Job
    settings: str
    rough_seconds: float  # for a sample
    rough_bytes: float


@dataclass(frozen=True)
class Work:
    """What the rough sums follow from."""

    network: MMDiTConfig
    topology: Topology
    parameters: int
    state_bytes: int  # of a parameter
    video: int  # tokens of a sample
    text: int

    @classmethod
    def of(cls, job: Job, topology: Topology) -> "Work":
        """Returns the work of a training job."""
        sections = build(programs.TrainSections, job.sections, "config")
        network, subject = sections.recipe.network, job.subject
        shapes = nnx.state(nnx.eval_shape(lambda: MMDiT(network, rngs=nnx.Rngs(0))), nnx.Param)
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
        moments = 4 if sections.optim.moments_dtype == "bfloat16" else 8
        each = 4 + moments + (4 if sections.ema_decay is not None else 0) + 4  # and the gradient
        each = each if sections.lora is None else 2
        latent = programs.abstract_autoencoder(sections.ae).latent_shape(
            subject["num_frames"], subject["height"], subject["width"]
        )
        video = int(np.prod(latent)) // network.patch_size**2
        return cls(network, topology, count, each, video, sections.t5.max_length)

    def bytes(self, mesh: Mapping[str, Any], samples: int, policy: str, blocks: tuple[int, int]) -> float:
        """Returns about what a device needs; `samples` are those of a data shard and a part."""
        state = self.parameters * self.state_bytes / (mesh["fsdp"] * mesh["tensor"])
        width = samples * (self.video + self.text) / mesh["seq"] * self.network.hidden_size * 2
        depth = self.network.depth + self.network.depth_single_blocks
        kept = KEPT[policy] if min(blocks) else UNREMATTED
        return state + width * (depth * kept + WORKING / mesh["tensor"])

    def seconds(
        self, mesh: Mapping[str, Any], samples: int, policy: str, blocks: tuple[int, int], parts: int = 1
    ) -> float:
        """Returns about what a step takes for each of its samples, per device: only the order counts.

        `samples` are those of a data shard and a part.
        """
        chip, net = self.topology.chip, self.network
        forward = forward_flops(net, self.video, self.text)
        attention = 4 * (self.video + self.text) ** 2 * net.hidden_size * (net.depth + net.depth_single_blocks)
        again = 0 if not min(blocks) else forward if policy == "full" else forward - attention
        each = self.topology.devices / (mesh["data"] * mesh["fsdp"])  # devices for a sample
        compute = samples * (3 * forward + again) / (each * chip.peak_flops * COMPUTE)
        link = (chip.link_gbps if not chip.is_gpu or self.topology.chips <= chip.node else chip.network_gbps) * 1e9
        ways = 2.0 if not chip.is_gpu else 1.0
        tokens = samples * (self.video + self.text) / mesh["seq"] * net.hidden_size * 2  # bytes of one activation
        depth = net.depth + net.depth_single_blocks
        sent = 0.0
        if mesh["fsdp"] > 1:  # two or three gathers in bfloat16 and a scatter in float32
            sent += self.parameters * (2 * (3 if min(blocks) else 2) + 4) / mesh["tensor"]
        if mesh["data"] > 1:
            sent += 2 * 4 * self.parameters / (mesh["fsdp"] * mesh["tensor"] * parts)
        passes = 4 if min(blocks) and policy == "full" else 3
        if mesh["seq"] > 1:
            around = 4 * (1 - 1 / mesh["seq"]) if mesh["seq_method"] == "ulysses" else 2 * (mesh["seq"] - 1)
            sent += passes * depth * around * tokens
        if mesh["tensor"] > 1:
            sent += passes * depth * 2 * 2 * tokens
        copied = 2 * 2 * depth * tokens if policy == "offload" else 0.0  # input and attention, there and back
        waited = HOST_WAITED * copied / (chip.host_gbps * 1e9)
        return (compute + sent / (link * ways * LINKS) + waited) / (samples * mesh["data"] * mesh["fsdp"])


def candidates(job: Job, topology: Topology, count: int, memory_bytes: int) -> list[Candidate]:
    """Returns the most promising ways to run a training job, the best first."""
    work = Work.of(job, topology)
    rows = job.subject["batch_size"] * job.sections["accumulation_steps"]
    samples = rows * job.sections["mesh"]["data"] * job.sections["mesh"]["fsdp"]
    found = [one for one in _all(job, work, samples) if one.rough_bytes < memory_bytes]
    found.sort(key=lambda one: one.rough_seconds)
    chosen: list[Candidate] = []
    taken: dict[str, int] = {}
    for one in found:
        mesh = str(one.job.sections["mesh"])
        if len(chosen) < count and taken.get(mesh, 0) < PER_MESH:
            taken[mesh] = taken.get(mesh, 0) + 1
            chosen.append(one)
    return chosen


def _all(job: Job, work: Work, samples: int) -> Iterator[Candidate]:
    for mesh in meshes(work.topology, work.network.num_heads):
        shards = mesh["data"] * mesh["fsdp"]
        axes = " x ".join(f"{name} {mesh[name]}" for name in ("data", "fsdp", "seq", "tensor") if mesh[name] > 1)
        method = f" ({mesh['seq_method']})" if mesh["seq"] > 1 else ""
        for wanted in (samples, 2 * samples, samples // 2):
            if not wanted or wanted % shards:
                continue
            for parts, (policy, blocks) in product(_divisors(wanted // shards, MOST_PARTS), POLICIES):
                size = wanted // shards // parts
                if mesh["seq"] > 1 and size % mesh["seq"] == 0:
                    continue  # whole samples along `seq`: a mesh with more `data` does the same
                model = job.sections["model"] | {"remat_policy": policy, "grad_ckpt_settings": blocks}
                sections = job.sections | {"mesh": mesh, "model": model, "accumulation_steps": parts}
                subject = job.subject | {"batch_size": size}
                kept = policy if min(blocks) else "no recomputation"
                settings = f"{axes or 'one device'}{method}, batch size {size} x {parts}, {kept}"
                yield Candidate(
                    replace(job, title=settings, sections=sections, subject=subject),
                    settings,
                    work.seconds(mesh, size, policy, blocks, parts),
                    work.bytes(mesh, size, policy, blocks),
                )


def meshes(topology: Topology, heads: int) -> Iterator[dict[str, Any]]:
    """Yields the meshes of a topology that a network with so many heads can use."""
    devices = topology.devices
    for tensor in _divisors(devices, min(MOST_TENSOR, heads)):
        if heads % tensor:
            continue
        for seq in _divisors(devices // tensor, MOST_SEQ):
            method = "ulysses" if heads % (seq * tensor) == 0 else "ring"
            left = devices // tensor // seq
            for fsdp in _divisors(left, left):
                if fsdp == devices and devices > 1 and not topology.chip.is_gpu:
                    continue  # TPUs make all-reduces of the scatters then
                yield {
                    "data": left // fsdp,
                    "fsdp": fsdp,
                    "seq": seq,
                    "tensor": tensor,
                    "seq_method": method,
                }


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]
