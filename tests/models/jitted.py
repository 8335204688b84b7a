"""A method of a network as one compiled program."""

import jax
from flax import nnx


def jitted(model, method):
    """Returns a function of the method's arguments, all of them arrays."""
    graphdef, params = nnx.split(model)
    run = jax.jit(lambda params, *inputs: getattr(nnx.merge(graphdef, params), method)(*inputs))
    return lambda *inputs: run(params, *inputs)
