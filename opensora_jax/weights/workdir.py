"""Our own checkpoints: the Orbax steps of a workdir, whole onto a mesh or tensor by tensor.

`checkpoints/<step>` holds a state (`params`, `ema` where a run kept an average of them, `frozen` for those that did not
learn) and metadata that names the network. A training run writes them step by step; `write` makes a workdir of weights
that came from elsewhere.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from opensora_jax.config.errors import UserError
from opensora_jax.config.files import write_json
from opensora_jax.nn.lora import is_lora

FOLDER = "checkpoints"


def is_workdir(path: Path) -> bool:
    """Says whether a folder is a workdir with checkpoints."""
    return (path / FOLDER).is_dir()


@dataclass(frozen=True)
class Stored:
    """The newest checkpoint of a workdir.

    Of the arrays that are read one by one the last `held` stay in memory: the layers of a stack are asked for one after
    the other, and where layers of several stacks are joined, in turn.
    """

    workdir: Path
    held: int = 1

    @cached_property
    def latest_step(self) -> int | None:
        """The newest finished step, or None."""
        with self._manager() as manager:
            return manager.latest_step()

    @property
    def step(self) -> int:
        """The newest finished step. Raises: UserError when there is none."""
        if self.latest_step is None:
            raise UserError(
                f"{self.workdir / FOLDER} holds no finished checkpoint: let the training run save one first"
            )
        return self.latest_step

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What the checkpoint says of its network and of itself."""
        with self._manager() as manager:
            return manager.restore(self.step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    @property
    def part(self) -> str:
        """The weights to use, of those that learnt: the moving average where there is one."""
        return "ema" if self.meta["ema"] else "params"

    def read(self, abstract: nnx.State) -> nnx.State:
        """Returns the parameters in the tree `abstract`, in its dtypes and shardings."""
        frozen = {path[1:-1] for path in self._leaves if path[0] == "frozen"}
        held, learning = nnx.split_state(abstract, lambda path, _: tuple(map(str, path)) in frozen, ...)
        parts = {self.part: learning} | ({"frozen": held} if frozen else {})
        placed = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), parts)
        return nnx.merge_state(*self._restore(parts, placed).values())

    @cached_property
    def read_array(self) -> Callable[["StoredArray"], np.ndarray]:
        """What returns one parameter in the memory of this host."""
        return lru_cache(self.held)(self._read_array)

    def arrays(self) -> list[tuple[tuple[str, ...], "StoredArray"]]:
        """Returns (path in the module, array) of every parameter; each is read when it is asked for."""
        return [
            (path[1:-1], StoredArray(self, path, tuple(leaf.shape), np.dtype(leaf.dtype)))
            for path, leaf in self._leaves.items()
        ]

    @cached_property
    def _leaves(self) -> dict[tuple[str, ...], Any]:
        """Path in the state -> shape and dtype of every parameter to use; the last key leads to its value."""
        with self._manager() as manager:
            tree = manager.item_metadata(self.step)["state"].tree
        parts = {name: tree[name] for name in (self.part, "frozen") if tree.get(name)}
        leaves = {
            tuple(jax.tree_util.keystr((key,), simple=True) for key in keys): leaf
            for keys, leaf in jax.tree.leaves_with_path(parts)
        }
        if any(is_lora(path[1:-1]) for path in leaves):
            raise UserError(
                f"{self.workdir} holds a LoRA, no model: merge its LoRA into the model it was trained beside"
            )
        return leaves

    def _read_array(self, array: "StoredArray") -> np.ndarray:
        abstract: Any = jax.ShapeDtypeStruct(array.shape, array.dtype)
        for key in reversed(array.path):
            abstract = {key: abstract}
        restored = self._restore(abstract, jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract))
        return jax.tree.leaves(restored)[0]

    def _restore(self, abstract: Any, restore_args: Any) -> Any:
        args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
        largest = max(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in self._leaves.values())
        with self._manager(restore_concurrent_gb=_room(largest)) as manager:
            return manager.restore(self.step, args=ocp.args.Composite(state=args))["state"]

    def _manager(self, *, restore_concurrent_gb: float | None = None) -> ocp.CheckpointManager:
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=restore_concurrent_gb)
        return ocp.CheckpointManager(
            (self.workdir / FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(create=False),
            item_handlers={"state": handler, "meta": ocp.JsonCheckpointHandler()},
        )


@dataclass(frozen=True, eq=False)
class StoredArray:
    """A parameter in a checkpoint, in the dtype that it was stored in; `path` leads to its value."""

    stored: Stored
    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.stored.read_array(self)[index]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.stored.read_array(self), dtype)


def check_new(workdir: Path) -> None:
    """Raises: UserError when a folder has checkpoints already, or is a file."""
    if is_workdir(workdir) and Stored(workdir).latest_step is not None:
        raise UserError(f"{workdir} has checkpoints already; give a new folder, or remove {workdir / FOLDER}.")
    if workdir.is_file():
        raise UserError(f"{workdir} is a file; give a folder for the checkpoint.")


def write(workdir: Path, params: nnx.State, meta: dict[str, Any]) -> None:
    """Makes a workdir whose only checkpoint holds `params`; the checkpoint appears complete or not at all.

    Arrays are written one by one as they are: compressed, or all at once, they would need their memory again.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    largest = max(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=_room(largest), use_compression=False)
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave({"params": params}), meta=ocp.args.JsonSave(meta | {"ema": False})
    )
    with ocp.CheckpointManager(
        (workdir / FOLDER).absolute(),
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        item_handlers={"state": handler, "meta": ocp.JsonCheckpointHandler()},
    ) as manager:
        manager.save(0, args=items)
    write_json(workdir / "import.json", meta)


def check_same(expected: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Raises: UserError naming the first fields in which a checkpoint differs from what is asked for."""
    there = flatten(found)
    different = [
        f"{name} is {there.get(name)!r} there and {value!r} in the config"
        for name, value in flatten(json.loads(json.dumps(expected))).items()
        if there.get(name) != value
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"the checkpoint {where} does not fit the config: {'; '.join(different[:3])}{more}; "
            "use the config it was made with, or another workdir"
        )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _room(largest: int) -> float:
    """Returns the GB that Orbax may have in flight, for arrays of up to `largest` bytes to go one by one."""
    return (1.01 * largest + 1) / 1e9
