"""What a training run carries from step to step, and the step itself: a pure function ready for `jax.jit`."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from opensora_jax.parallel.rules import state_shardings
from opensora_jax.training.accumulate import Batch, Metrics, mean_gradient
from opensora_jax.training.optimizer import Optimizer

Path = tuple[Any, ...]  # of a parameter in its module


@runtime_checkable
class Loss(Protocol):
    """A mean over the samples of a batch, with what chance decides drawn apart from what follows from it."""

    def draw(self, batch: Batch, key: Array) -> Any:
        """Returns the draws for a whole batch: arrays with a row for every sample, and 0-d ones for all of them."""

    def __call__(self, model: nnx.Module, batch: Batch, draws: Any) -> tuple[Array, Metrics]:
        """Returns the loss of a batch, or of some of its rows and their draws, with further metrics."""


class TrainState(NamedTuple):
    """Everything a checkpoint must hold to continue exactly.

    `params` are those that learn: they alone have gradients, moments and an average (`ema`, None where none is kept).
    `frozen` are the others, None where there are none. `skipped` counts the updates left out because the loss or the
    gradient was not finite.
    """

    step: Array
    params: nnx.State
    ema: nnx.State | None
    opt_state: Any
    skipped: Array
    frozen: nnx.State | None

    @property
    def model_params(self) -> nnx.State:
        """All parameters of the model as training left them."""
        return join(self.params, self.frozen)

    @property
    def averaged_params(self) -> nnx.State:
        """All parameters of the model, averaged where an average is kept: those to use."""
        return join(self.params if self.ema is None else self.ema, self.frozen)


def divide(params: nnx.State, frozen: Collection[Path]) -> tuple[nnx.State, nnx.State | None]:
    """Returns the parameters that learn, and those at the paths of `frozen`, None where there are none."""
    if not frozen:
        return params, None
    held, learning = nnx.split_state(params, lambda path, _: path in frozen, ...)
    return learning, held


def join(params: nnx.State, frozen: nnx.State | None) -> nnx.State:
    """Returns the tree that `divide` took apart."""
    return params if frozen is None else nnx.merge_state(params, frozen)


def plan_state(
    make_model: Callable[[], nnx.Module],
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    ema: bool,
    pretrained: Callable[[], nnx.State] | None = None,
    frozen: Callable[[nnx.State], Collection[Path]] | None = None,
    frozen_dtype: DTypeLike = jnp.float32,
) -> tuple[nnx.GraphDef, TrainState, Callable[[], TrainState]]:
    """Returns the model's graph, the state's shapes with their shardings, and a function that creates the state.

    The parameters are those of `make_model`; what `pretrained` returns, a part of their tree or all of it, already on
    the mesh, takes their place. `frozen` names those that stay as they are, given the tree of all; they are held in
    `frozen_dtype`, and need no more than the dtype that the model computes in. Nothing is allocated before that
    function runs, and it creates every parameter where it belongs: no device and no host ever holds a full copy of a
    sharded one.
    """
    model = nnx.eval_shape(make_model)
    everything = nnx.state(model, nnx.Param)
    held = frozenset() if frozen is None else frozenset(frozen(everything))

    def start(params: nnx.State) -> TrainState:
        learning, rest = divide(params, held)
        rest = jax.tree.map(lambda leaf: leaf.astype(frozen_dtype), rest)
        # The average starts at the parameters; a copy, since donated buffers must not be shared.
        average = jax.tree.map(jnp.copy, learning) if ema else None
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, learning, average, optimizer.init(learning), jnp.copy(zero), rest)

    def init(given: nnx.State) -> TrainState:
        return start(nnx.merge_state(nnx.state(make_model(), nnx.Param), given))

    shapes = jax.eval_shape(init, nnx.State({}))
    shardings = state_shardings(shapes, everything, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    create = jax.jit(init, donate_argnums=0, out_shardings=shardings)

    def make() -> TrainState:
        if pretrained is None:
            return create(nnx.State({}))
        # Only buffers of the dtype that is wanted can be given away.
        wanted, given = dict(nnx.to_flat_state(abstract.model_params)), nnx.to_flat_state(pretrained())
        cast = [(path, leaf.replace(leaf[...].astype(wanted[path].dtype))) for path, leaf in given]
        return create(nnx.from_flat_state(cast))

    return nnx.graphdef(model), abstract, make


def check_average(ema_decay: float | None) -> None:
    """Raises: ValueError for a decay that is no share of the average: at 1 it would stay what it was at first."""
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay is from 0 to below 1, or None for no average: got {ema_decay}.")


def make_train_step(
    graphdef: nnx.GraphDef, loss: Loss, optimizer: Optimizer, *, ema_decay: float | None, accumulation_steps: int = 1
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]:
    """Returns `step(state, batch, key) -> (state, metrics)`; the loss is a mean over the batch.

    A batch is taken in `accumulation_steps` equal parts, one after the other. What chance decides is drawn before it is
    cut, so that their number changes nothing. If the loss or the norm of the gradients is not finite, the parameters,
    their average and their moments stay as they are; only the step goes on.
    """

    def step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)  # a restarted run draws the same noise

        def objective(params: nnx.State, part: tuple[Batch, Any]) -> tuple[Array, Metrics]:
            return loss(nnx.merge(graphdef, join(params, state.frozen)), *part)

        def update(grads: nnx.State, params: nnx.State, ema: nnx.State | None, opt_state: Any) -> tuple:
            params, opt_state = optimizer.update(grads, norm, opt_state, params, state.step)
            return params, ema if ema_decay is None or ema is None else moved(ema, params, ema_decay), opt_state

        drawn = batch, loss.draw(batch, key)
        value, metrics, grads = mean_gradient(objective, accumulation_steps, state.params, drawn)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        # A choice between the results would keep both: half of the state's memory again, where it is not fused away.
        before = (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.lax.cond(finite, update, lambda _, *old: old, grads, *before)
        skipped = state.skipped + jnp.where(finite, 0, 1)
        rate = jnp.asarray(optimizer.rate(state.step), jnp.float32)
        metrics |= {"loss": value, "grad_norm": norm, "learning_rate": rate, "skipped_steps": skipped}
        return TrainState(state.step + 1, params, ema, opt_state, skipped, state.frozen), metrics

    return step


def moved(average: nnx.State, params: nnx.State, decay: float) -> nnx.State:
    """Returns the average after one more step: `decay` times itself and the rest of the parameters."""
    return optax.incremental_update(params, average, 1 - decay)
