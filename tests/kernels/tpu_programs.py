"""Compiles attention for TPUs that are not here: `python -m tests.kernels.tpu_programs v5p:2x2x1 NAME...` prints JSON.

For each program it prints the kernels in the compiled text, the bytes of temporaries on a device, and the bytes that
its logits in float32 would take. test_tpu_programs.py runs it in a process of its own, since libtpu prints to the
console and holds memory.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from opensora_jax.forecast.topology import parse_topology
from opensora_jax.kernels.attention import attention
from opensora_jax.kernels.flash import ATTENTION, STATISTICS
from opensora_jax.nn.norm import RMSNorm
from opensora_jax.nn.prologue import normed_and_rotated
from opensora_jax.nn.rope import rope_table, rotate_half
from opensora_jax.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh
from opensora_jax.parallel.sequence import attend, per_device

TEXT, VIDEO, LENGTH = 77, 16_001, 8_001  # no mesh and no block divides them


def layers(devices, *sizes, heads, channels=128):
    """Returns the gradient of three layers of attention on a mesh, in a rematerialised scan, and its logits.

    One sample, so that `seq` splits tokens.
    """
    mesh = make_mesh(MeshConfig(*sizes), devices)

    def model(module, text, video, gain, shared):
        def layer(x, _):
            q = x.reshape(*x.shape[:2], -1, channels)
            return x + attend(q, 2 * q, q - 1, shared).reshape(x.shape) * gain[:, None, None], None

        keep = jax.checkpoint_policies.save_only_these_names(ATTENTION, STATISTICS)
        joint = jnp.concatenate([text, video], axis=1)
        joint, _ = jax.lax.scan(jax.checkpoint(layer, policy=keep, prevent_cse=False), joint, length=3)
        return joint[:, text.shape[1] :]

    def measure(text, video, gain):
        return jnp.mean(per_device(model, nnx.Module(), text, video, gain).astype(jnp.float32) ** 2)

    split = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    tokens = [jax.ShapeDtypeStruct((1, n, heads * channels), jnp.bfloat16, sharding=split) for n in (TEXT, VIDEO)]
    gain = jax.ShapeDtypeStruct((1,), jnp.bfloat16, sharding=split)
    shards, ring = sizes[2] * sizes[3], len(sizes) > 4
    logits = heads // (sizes[3] if ring else shards) * ((TEXT + VIDEO) // (sizes[2] if ring else 1)) ** 2
    return mesh, jax.value_and_grad(measure, (0, 1)), (*tokens, gain), logits


def alone(devices, channels, dtype):
    """Returns attention on one device with its gradients, and its logits."""
    mesh = make_mesh(MeshConfig(1, 1, 1, 1), devices[:1])
    whole = NamedSharding(mesh, PartitionSpec())
    q = jax.ShapeDtypeStruct((1, LENGTH, 1, channels), dtype, sharding=whole)
    return mesh, lambda q, k, v, g: jax.vjp(attention, q, k, v)[1](g), (q,) * 4, LENGTH**2


def prologue(devices, channels, dtype):
    """Returns the preparation of queries on one device with its gradients, and what they would take as logits."""
    mesh = make_mesh(MeshConfig(1, 1, 1, 1), devices[:1])
    whole = NamedSharding(mesh, PartitionSpec())
    graph, params = nnx.split(RMSNorm(channels, rngs=nnx.Rngs(0)))

    def run(q, params, g):
        table = rope_table(jnp.arange(3 * LENGTH).reshape(LENGTH, 3), (channels // 2, channels // 2, 0), 10_000)
        prepare = lambda q, params: normed_and_rotated(q, nnx.merge(graph, params), table, rotate_half)  # noqa: E731
        out, vjp = jax.vjp(prepare, q, params)
        return out, vjp(g)

    q = jax.ShapeDtypeStruct((1, LENGTH, 3, channels), dtype, sharding=whole)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params)
    return mesh, run, (q, params, q), LENGTH**2


PROGRAMS = {
    "ulysses": lambda devices: layers(devices, 1, 1, 2, 2, heads=4),
    "ring": lambda devices: layers(devices, 1, 1, 2, 2, "ring", heads=4),
    "ring 256": lambda devices: layers(devices, 1, 1, 2, 2, "ring", heads=2, channels=256),
    "tensor alone": lambda devices: layers(devices, 1, 1, 1, 4, heads=4),
    "64 bfloat16": lambda devices: alone(devices, 64, jnp.bfloat16),
    "128 bfloat16": lambda devices: alone(devices, 128, jnp.bfloat16),
    "256 bfloat16": lambda devices: alone(devices, 256, jnp.bfloat16),
    "256 float32": lambda devices: alone(devices, 256, jnp.float32),
    "prologue 128 bfloat16": lambda devices: prologue(devices, 128, jnp.bfloat16),
    "prologue 256 float32": lambda devices: prologue(devices, 256, jnp.float32),
}


def compiled(topology, name):
    """Returns what the compiler says of a program."""
    devices = parse_topology(topology).load()
    mesh, function, inputs, logits = PROGRAMS[name](devices)
    with jax.set_mesh(mesh):
        program = jax.jit(function).lower(*inputs).compile()
    kernels = re.findall(r'%(\w+?)[.\d]* = [^=]*custom-call\(.*custom_call_target="tpu_custom_call"', program.as_text())
    return {"kernels": kernels, "temporary": program.memory_analysis().temp_size_in_bytes, "logits": 4 * logits}


if __name__ == "__main__":
    print(json.dumps({name: compiled(sys.argv[1], name) for name in sys.argv[2:]}))
