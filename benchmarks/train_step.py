"""The training step of a config on the devices that are here: seconds, operations a second, share of a matrix product.

    python benchmarks/train_step.py                                                       # CPU: the demo's config
    python benchmarks/train_step.py --config=configs/diffusion/train/stage1.py --depth=2 --single=4 \\
        --buckets=256px,129 256px,33 --batch_size=1 --fsdp=1                              # one GPU

It is the step that `train` runs, on random latents and texts: draws of times and noise, conditions, dropout, both
passes, clipping, the optimiser and the average. `--depth` and `--single` cut the network so that it fits. Operations
are the useful ones (training/flops.py). Where torch and diffusers are installed, their Flux with as many layers and
tokens takes a step of AdamW on as many samples beside it.
"""

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.in_turn import Row, matmul_flops, median_seconds, print_table
from opensora_jax.config.build import build
from opensora_jax.config.flag import load_config
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.forecast import programs
from opensora_jax.forecast.jobs import largest_buckets, parse_lines, picked
from opensora_jax.parallel.mesh import make_mesh
from opensora_jax.training.flops import training_flops
from opensora_jax.training.programs import Programs


def sections_of(given: argparse.Namespace) -> programs.TrainSections:
    """Returns the sections of the config that decide the step, with what the flags change."""
    config = load_config(given.config)
    model = {"depth": given.depth, "depth_single_blocks": given.single}
    config.model.update({name: value for name, value in model.items() if value is not None})
    if given.fsdp is not None:
        config.mesh.fsdp = given.fsdp
    if given.dtype is not None:
        config.dtype = given.dtype
    return build(programs.TrainSections, picked(config.to_dict(), programs.TrainSections), "config")


def ours(sections: programs.TrainSections, bucket: Bucket) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Returns a function that takes a step on a batch of a bucket, and the batch's shapes."""
    mesh = make_mesh(sections.mesh)
    objective, shapes = programs.training_inputs(sections, bucket, mesh)
    with jax.set_mesh(mesh):
        assembled = sections.recipe.assemble(objective, mesh, pretrained=False)
        runs, held = Programs(assembled, mesh), [assembled.init()]
        key = runs.key(sections.seed)
        batch = {name: jax.device_put(_random(shape), shape.sharding) for name, shape in shapes.items()}
        runs.compile({str(bucket): shapes})

    def move() -> None:
        with jax.set_mesh(mesh):
            held[0], metrics = runs(held[0], batch, key)
            jax.block_until_ready(metrics)

    return move, shapes


def _random(shape: jax.ShapeDtypeStruct) -> jax.Array:
    if not jnp.issubdtype(shape.dtype, jnp.floating):
        return jnp.zeros(shape.shape, shape.dtype)
    return jax.random.normal(jax.random.key(0), shape.shape, shape.dtype)


def theirs(sections: programs.TrainSections, video: int, words: int, samples: int) -> Callable[[], Any]:
    """Returns a function that takes a step of the peer."""
    from benchmarks.mmdit import Work

    network = sections.recipe.network
    work = Work(
        argparse.Namespace(
            width=network.hidden_size,
            heads=network.num_heads,
            depth=network.depth,
            single=network.depth_single_blocks,
            video=video,
            text=words,
            batch=samples,
            dtype=sections.dtype,
        )
    )
    return work.theirs()[2]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/diffusion/train/demo.py")
    parser.add_argument("--buckets", nargs="+", default=[], help="resolution,frames; all lines without it")
    parser.add_argument("--batch_size", type=int, help="samples of a data shard, in place of the config's")
    parser.add_argument("--depth", type=int, help="double blocks")
    parser.add_argument("--single", type=int, help="single blocks")
    parser.add_argument("--fsdp", type=int, help="in place of the config's mesh.fsdp")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--runs", type=int, default=5, help="of each, in turn")
    given = parser.parse_args()
    sections, wanted = sections_of(given), parse_lines(given.buckets)
    ceiling = matmul_flops(sections.dtype) * jax.device_count()
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {sections.dtype}")
    print(f"matrix product: {ceiling / 1e12:.3f} TFLOP/s", flush=True)
    has_peer = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))
    rows = []
    for bucket in largest_buckets(sections):
        if wanted and (bucket.resolution, bucket.num_frames) not in wanted:
            continue
        if given.batch_size is not None:
            bucket = replace(bucket, batch_size=given.batch_size)
        move, shapes = ours(sections, bucket)
        samples, words = shapes["text"].shape[:2]
        video = programs.video_tokens(shapes["latent"].shape, sections.recipe.network)
        work = [move, theirs(sections, video, words, samples)] if has_peer else [move]
        seconds = [*median_seconds(work, given.runs), float("nan")][:2]
        flops = samples * training_flops(sections.recipe.network, video, words)
        rows.append(Row(f"{bucket.resolution},{bucket.num_frames} x {samples}", *seconds, flops))
    print_table(rows, ceiling)


if __name__ == "__main__":
    main()
