"""Orbax checkpoints of a run: asynchronous, sharded, one atomic step of state and metadata.

A save that a crash cut short leaves a temporary folder that no restore looks at. Restoring onto another mesh works,
since the abstract state brings a sharding for every leaf.
"""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from opensora_jax.config.errors import UserError
from opensora_jax.weights.workdir import check_same


class Checkpoints:
    """The checkpoints under `<workdir>/checkpoints`, named by the number of finished steps.

    The newest `keep_n_latest` are kept, and those of every `keep_every`-th step (0: none).
    """

    def __init__(self, workdir: Path, keep_n_latest: int, keep_every: int = 0):
        self.folder = (workdir / "checkpoints").absolute()
        kept: list[Any] = [preservation_policy.LatestN(keep_n_latest)]
        kept += [preservation_policy.EveryNSteps(keep_every)] if keep_every else []
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(kept), enable_async_checkpointing=True
            ),
        )
        steps = {int(path.name) for path in self.folder.iterdir() if path.name.isdigit()}
        if any(not (self.folder / str(step) / "meta").is_dir() for step in steps | set(self._manager.all_steps())):
            raise UserError(
                f"{self.folder} holds steps that cannot be read: move them away to start anew or from an older step"
            )

    @property
    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts saving a step in the background; a save still running is waited for first."""
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=arguments)

    def restore(self, abstract: Any, expected: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Returns the newest state, placed as `abstract` says, with its metadata, or None when there is none.

        Raises: UserError when the checkpoint was made with other values than `expected` (a part of its metadata).
        """
        step = self.latest_step
        if step is None:
            return None
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        check_same(expected, meta, f"{self.folder}/{step}")
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return restored["state"], meta

    def close(self) -> None:
        """Waits for the last save to be complete and releases the folder."""
        self._manager.wait_until_finished()
        self._manager.close()
