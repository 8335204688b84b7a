"""What a training run carries from step to step, and the step itself: a pure function ready for `jax.jit`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from opensora_jax.parallel.rules import state_shardings

Batch = dict[str, Array]
Metrics = dict[str, Array]
Loss = Callable[[nnx.Module, Batch, Array], tuple[Array, Metrics]]


class TrainState(NamedTuple):
    """Everything a checkpoint must hold to continue exactly. `ema` is None when no average is kept."""

    step: Array
    params: nnx.State
    ema: nnx.State | None
    opt_state: Any


def plan_state(
    make_model: Callable[[], nnx.Module],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    ema: bool,
    pretrained: Callable[[], nnx.State] | None = None,
) -> tuple[nnx.GraphDef, TrainState, Callable[[], TrainState]]:
    """Returns the model's graph, the state's shapes with their shardings, and a function that creates the state.

    The parameters are those of `make_model`, or what `pretrained` returns, in its tree and already on the mesh.
    Nothing is allocated before that function runs, and it creates every parameter where it belongs: no device and no
    host ever holds a full copy of a sharded one.
    """

    def start(params: nnx.State) -> TrainState:
        # The average starts at the parameters; a copy, since donated buffers must not be shared.
        average = jax.tree.map(jnp.copy, params) if ema else None
        return TrainState(jnp.zeros((), jnp.int32), params, average, tx.init(params))

    def init() -> TrainState:
        return start(nnx.state(make_model(), nnx.Param))

    graphdef = nnx.graphdef(nnx.eval_shape(make_model))
    shapes = jax.eval_shape(init)
    shardings = state_shardings(shapes, shapes.params, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    if pretrained is None:
        return graphdef, abstract, jax.jit(init, out_shardings=shardings)
    adopt = jax.jit(start, donate_argnums=0, out_shardings=shardings)
    return graphdef, abstract, lambda: adopt(pretrained())


def make_train_step(graphdef: nnx.GraphDef, loss: Loss, tx: optax.GradientTransformation, *, ema_decay: float | None):
    """Returns `step(state, batch, key) -> (state, metrics)`; the loss is a mean over the batch."""

    def step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)  # a restarted run draws the same noise
        (value, metrics), grads = jax.value_and_grad(
            lambda params: loss(nnx.merge(graphdef, params), batch, key), has_aux=True
        )(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema if ema_decay is None else optax.incremental_update(params, state.ema, 1 - ema_decay)
        metrics |= {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step
