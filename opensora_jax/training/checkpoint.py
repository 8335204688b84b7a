"""Orbax checkpoints of a run: asynchronous, sharded, one atomic step of state and metadata.

A save that a crash cut short leaves a temporary folder, which no restore looks at and the next start removes. Restoring
onto another mesh works, since the abstract state brings a sharding for every leaf.
"""

import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from opensora_jax.config.errors import UserError
from opensora_jax.config.explain import explain
from opensora_jax.weights.workdir import check_same

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")  # that numbers may depend on


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a run's numbers may depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


class _Manager(ocp.CheckpointManager):
    """Leaves preemption to `Preemption`: JAX stops at the step after the last that anybody asked about."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints under `<workdir>/checkpoints`, named by the number of finished steps.

    The newest `keep_n_latest` are kept, and those of every `keep_every`-th step (0: none). A save that the disk refuses
    (it is full, say) leaves the steps before it whole; it ends the run, or, if the run `goes_on`, is a warning. Only a
    run of one process can go on: other processes would wait for the one that failed.
    """

    def __init__(self, workdir: Path, keep_n_latest: int, keep_every: int = 0, *, goes_on: bool = False):
        self.folder = (workdir / "checkpoints").absolute()
        self._goes_on = goes_on and jax.process_count() == 1
        self._cut_short: set[Path] = set()  # what refused saves had written
        kept: list[Any] = [preservation_policy.LatestN(keep_n_latest)]
        kept += [preservation_policy.EveryNSteps(keep_every)] if keep_every else []
        self._manager = _Manager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
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

    def save(self, step: int, state: Any, meta: dict[str, Any], *, last: bool = False) -> None:
        """Starts saving a step in the background; a save still running is waited for first.

        The metadata gets the versions of packages. Raises: UserError when the disk refuses this save or has refused the
        one before, unless the run goes on; the `last` save of a process has to succeed in any case.
        """
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta | {"versions": versions()})
        )
        with self._saving():
            self._manager.wait_until_finished()
        self._goes_on &= not last
        with self._saving():
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
        others = [f"{name} {old}" for name, old in meta.get("versions", {}).items() if versions().get(name) != old]
        if others:
            logging.info("step %d was saved with %s: losses may differ in their last bits", step, ", ".join(others))
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return restored["state"], meta

    def close(self) -> None:
        """Waits for the last save to be complete and releases the folder.

        Raises: UserError when the disk refuses it: nothing comes after the last save that could make up for it.
        """
        self._goes_on = False
        with self._saving():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()
                self._remove_cut_short()  # threads of a refused save may have written on while it was removed

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Tells of what the disk refuses in one line, with what is left. Raises: UserError, unless the run goes on."""
        try:
            yield
        except Exception as error:
            reason = explain(error)
            if reason is None:
                raise
            steps = [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]
            left = f"the checkpoint of step {max(steps)}" if steps else "no checkpoint yet"
            message = f"{reason}; {self.folder} keeps {left}"
            if not self._goes_on:
                raise UserError(f"{message}, where the same command continues") from error
            logging.warning("%s; training goes on", message)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Does as `refusals`; what a refused save had written is removed, and what it was to replace stays known."""
        with self.refusals():
            try:
                yield
            except Exception as error:
                if explain(error) is not None:
                    self._cut_short |= set(self.folder.glob("*.orbax-checkpoint-tmp"))
                    self._remove_cut_short()
                    self._manager.reload()
                raise

    def _remove_cut_short(self) -> None:
        for folder in self._cut_short:
            shutil.rmtree(folder, ignore_errors=True)
