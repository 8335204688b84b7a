"""How long a checkpoint holds training up: `python benchmarks/checkpoint.py --gigabytes=1`.

Steps that overwrite their whole state, as training does, with saves between them through what the loop uses. A save
blocks while its values are copied away from the devices; the disk is written behind the next steps. The first save
makes threads and folders and is left out.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
from tqdm import tqdm

from opensora_jax.training.checkpoint import Checkpoints


def measure(folder: Path, gigabytes: float, arrays: int, saves: int) -> list[tuple[float, float]]:
    """Returns for each save the seconds that it blocked, and those until it was complete."""
    size = int(gigabytes * 1e9 / 4 / arrays)
    state = {str(number): jnp.full(size, float(number)) for number in range(arrays)}
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 1.001 + 1, state), donate_argnums=0)
    checkpoints, found = Checkpoints(folder, keep_n_latest=1), []
    for number in tqdm(range(1, saves + 2), desc="checkpoint", unit="save"):
        state = jax.block_until_ready(step(state))
        before = time.perf_counter()
        checkpoints.save(number, state, {})
        blocked = time.perf_counter() - before
        state = jax.block_until_ready(step(state))  # gives the saved buffers away
        checkpoints._manager.wait_until_finished()
        found.append((blocked, time.perf_counter() - before))
    checkpoints.close()
    return found[1:]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--arrays", type=int, default=64, help="the state is cut into so many")
    parser.add_argument("--saves", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = measure(Path(folder), given.gigabytes, given.arrays, given.saves)
    print("| State | Blocks a step (median) | at most | Complete after |\n| --- | --- | --- | --- |")
    blocked, complete = zip(*times, strict=True)
    print(f"| {given.gigabytes:g} GB | {median(blocked):.3f} s | {max(blocked):.3f} s | {median(complete):.1f} s |")


if __name__ == "__main__":
    main()
