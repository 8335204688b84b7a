"""How many queries and keys a flash kernel holds at a time, per TPU generation and head size.

A grid step multiplies a block of queries with a block of keys, which it goes through in chunks. Large blocks read keys
and values less often from the chip's memory and pay the fixed cost of a step (about 0.3 us) less often; what bounds
them is VMEM: a compiler gives a kernel 16 MiB of it unless told otherwise, for operands twice (the next block is
fetched meanwhile) and for the float32 logits of a chunk.
"""

from typing import NamedTuple

import jax

LANES = 128  # a register has 8 x 128 numbers; block sizes are multiples of its width


class Blocks(NamedTuple):
    """Queries and keys of a grid step, and the keys that are multiplied at once."""

    queries: int
    keys: int
    chunk: int


# Bundles (cycles without stalls) that libtpu 0.0.42 schedules for 1024 x 1024 logits of head size 128 in bfloat16:
# v5p forwards 4045 with chunks of 512, backwards 9257; the matrix units need 4096 and 10240. v6e forwards 2157 with
# chunks of 256, where 512 give 2470; backwards 4863, in chunks of 512. Longer chunks spill more registers.
# A head of 128 has 256 bytes per token in bfloat16 and 512 in float32.
#   bytes up to  forwards                  backwards
TABLE = {
    "128 wide": {
        256: (Blocks(1024, 2048, 512), Blocks(1024, 1024, 512)),
        512: (Blocks(1024, 1024, 512), Blocks(1024, 1024, 512)),
        1024: (Blocks(512, 1024, 512), Blocks(512, 512, 512)),  # 1024 queries would need 17 MiB and more
    },
    "256 wide": {
        256: (Blocks(1024, 2048, 256), Blocks(1024, 1024, 512)),
        512: (Blocks(1024, 1024, 256), Blocks(1024, 1024, 512)),
        1024: (Blocks(512, 1024, 256), Blocks(512, 512, 512)),
    },
}
WIDE = ("TPU v6", "TPU7", "TPU8")  # generations whose matrix units are 256 x 256, by how their `device_kind` begins


def device_kind() -> str:
    """Returns the kind of device that is compiled for, also ahead of time under a mesh: "TPU v5", "NVIDIA H100 ..."."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if described is None else described.device_kind


def largest(head: int, kind: str) -> tuple[Blocks, Blocks]:
    """Returns the blocks for long sequences, forwards and backwards, of heads of so many bytes per token."""
    rows = TABLE["256 wide" if kind.startswith(WIDE) else "128 wide"]
    return rows[min(limit for limit in rows if head <= limit)]


def fit(most: Blocks, queries: int, keys: int, least_steps: int = 1) -> tuple[Blocks, int, int]:
    """Returns blocks no larger than `most` that waste little, and the steps for all queries and for all keys.

    With more than one step of keys there are at least `least_steps` of queries.
    """
    by_keys = _size(keys, most.keys)
    key_steps = -(-keys // by_keys)
    least = 1 if key_steps == 1 else least_steps
    by_queries = _size(queries, min(most.queries, max(LANES, queries // least)))
    chunk = next(size for size in (512, 256, LANES) if size <= most.chunk and by_keys % size == 0)
    return Blocks(by_queries, by_keys, chunk), max(least, -(-queries // by_queries)), key_steps


def _size(length: int, most: int) -> int:
    sizes = range(LANES, most + 1, LANES)
    return min(sizes, key=lambda size: -(-length // size) * (size + LANES))  # a step costs about as much as 128 rows
