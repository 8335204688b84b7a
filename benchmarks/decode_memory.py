"""How much memory it takes to decode a video with the published Hunyuan autoencoder, from compiled programs alone.

    python benchmarks/decode_memory.py
    pip install "libtpu==0.0.42.*" && python benchmarks/decode_memory.py --device=v5p

Nothing is run and no weights are needed: each program is compiled for abstract arrays, in a process of its own with a
time limit, and the table has what the compiler reserves for it: parameters, latent, what lies between, and pixels.
`cpu` computes in float32; a TPU, which need not be there, in bfloat16. `whole` is the exact decode, on one device or
split in space over several; `tile` the largest tile of the preset (256 x 256 pixels, all frames), `tile in time` the
same with temporal tiles, of 65 frames. `video` are the pixels in float32, as they leave the network.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from opensora_jax.forecast.topology import ENVIRONMENT, parse_topology

CONFIG = "configs/diffusion/inference/256px.py"
CLIPS = ((33, 192, 336), (65, 192, 336), (129, 192, 336), (129, 576, 1024))  # frames, height, width
TOPOLOGY = "v5p:2x2x1"  # one host's four chips
Clip = tuple[int, int, int]


def works(devices: Sequence[int]) -> list[tuple[str, dict[str, bool], int]]:
    """Returns (name, tiling, devices) of each column."""
    whole = [(f"whole, {n} devices" if n > 1 else "whole", {}, n) for n in devices]
    space = {"use_spatial_tiling": True}
    return [*whole, ("tile", space, 1), ("tile in time", space | {"use_temporal_tiling": True}, 1)]


def measure(device: str, clip: Clip, tiling: dict[str, bool], count: int) -> int:
    """Returns the bytes that each device needs for the largest tile of a decode, which is the whole without tiling."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from opensora_jax.config.flag import load_config
    from opensora_jax.models.hunyuan_vae import HunyuanVAE
    from opensora_jax.nn.tiling import tiled_decode
    from opensora_jax.weights.pretrained import AUTOENCODERS, parse_model

    jax.config.update("jax_enable_compilation_cache", False)
    off = {"use_spatial_tiling": False, "use_temporal_tiling": False}
    _, config = parse_model(load_config(CONFIG).ae.to_dict() | off | tiling, AUTOENCODERS, "config.ae")
    dtype = jnp.bfloat16 if device == "v5p" else jnp.float32
    graph, params = nnx.split(nnx.eval_shape(lambda: HunyuanVAE(config, dtype=dtype, rngs=nnx.Rngs(0))))
    shape = (1, *nnx.merge(graph, params).latent_shape(*clip), config.latent_channels)

    tiles: list[tuple[int, ...]] = []
    t, s, _ = config.strides

    def record(z: jax.Array) -> jax.Array:
        tiles.append(z.shape)
        return jnp.zeros((1, (z.shape[1] - 1) * t + 1, z.shape[2] * s, z.shape[3] * s, 3))

    jax.eval_shape(lambda z: tiled_decode(config.tiling, z, record), jax.ShapeDtypeStruct(shape, jnp.float32))
    devices = parse_topology(TOPOLOGY).load() if device == "v5p" else jax.devices()
    mesh = Mesh(np.asarray(devices[:count]), ("space",), axis_types=(AxisType.Auto,))

    def placed(shape: tuple[int, ...], dtype: jnp.dtype, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    params = jax.tree.map(lambda x: placed(x.shape, dtype), params)
    axis = (None, None, "space") if max(tiles)[2] % count == 0 else (None, None, None, "space")
    z = placed(max(tiles, key=np.prod), jnp.float32, *axis)
    run = jax.jit(lambda params, z: nnx.merge(graph, params).reconstruct(z), out_shardings=z.sharding)
    used = run.lower(params, z).compile().memory_analysis()
    if device == "v5p":  # the largest at any one time
        return used.peak_memory_in_bytes
    return used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes


def measured_apart(device: str, clip: Clip, tiling: dict[str, bool], count: int, limit: float) -> str:
    """Returns the result of `measure` in GB, found by a process of its own, or why there is none."""
    work = json.dumps({"device": device, "clip": clip, "tiling": tiling, "count": count})
    env = os.environ | ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(count)}
    command = ["nice", sys.executable, __file__, f"--one={work}"]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"> {limit:.0f} s"
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), "failed")
        return "does not fit" if "RESOURCE_EXHAUSTED" in reason else reason[:60]
    return f"{int(done.stdout.split()[-1]) / 1e9:.2f}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "v5p"), default="cpu")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 4], help="numbers of devices for the whole")
    parser.add_argument("--clips", nargs="+", default=["x".join(map(str, clip)) for clip in CLIPS])
    parser.add_argument("--limit", type=float, default=900, help="seconds for each program")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(measure(**json.loads(given.one)))
        return
    columns = works(given.devices)
    print(f"GB on each device, {given.device}")
    print(f"{'frames x rows x columns':<24}{'video':>8}" + "".join(f"{name:>18}" for name, *_ in columns), flush=True)
    for text in given.clips:
        frames, height, width = map(int, text.split("x"))
        print(f"{text:<24}{frames * height * width * 12 / 1e9:>8.2f}", end="", flush=True)
        for _, tiling, count in columns:
            found = measured_apart(given.device, (frames, height, width), tiling, count, given.limit)
            print(f"{found:>18}", end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
