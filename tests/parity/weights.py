"""One network in both published layouts: fused and split weights give the same outputs and turn into each other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opensora_jax.weights.layouts import evens_first, to_fused, to_split
from tests.parity import mmdit
from tests.parity.golden import Golden

OUTPUTS = {"fused": "out/output_fused_interleaved", "split": "out/output_split_liger"}


def layouts(golden: Golden) -> None:
    """Drive `weights_fused_to_split`: each layout with its own weights, then with those converted from the other."""
    weights = {layout: golden.part(f"param_{layout}/") for layout in OUTPUTS}
    heads = golden.about["config_fused"]["num_heads"]
    converted = {"split": to_split(weights["fused"], heads), "fused": to_fused(weights["split"], heads)}
    for layout, name in OUTPUTS.items():
        config = mmdit.config_of(golden.about[f"config_{layout}"])
        given = mmdit.build(config, weights[layout], "float32")
        other = given._replace(params=mmdit.build(config, converted[layout], "float32").params)
        ours, again = _outputs(golden, given, other)
        golden.compare(name, ours, mmdit.OUTPUT)
        golden.check(f"{name}, converted", again, ours)
        _check_tensors(golden, f"to_{layout}", converted[layout], weights[layout])
    vectors = golden.part("in/")["head_vectors"]
    golden.compare("out/head_vectors_rearranged", vectors[..., evens_first(vectors.shape[-1])])


def _outputs(golden: Golden, *networks: mmdit.Network) -> list[np.ndarray]:
    inputs = {name: jnp.asarray(value) for name, value in golden.part("in/").items()}
    run = jax.jit(lambda params: mmdit.tokens(nnx.merge(networks[0].graphdef, params), inputs))
    return [np.asarray(run(network.params)) for network in networks]


def _check_tensors(golden: Golden, label: str, ours: dict[str, Any], theirs: dict[str, np.ndarray]) -> None:
    golden.check(f"{label}: keys", sorted(ours), sorted(theirs))
    for key in sorted(ours.keys() & theirs.keys()):
        golden.check(f"{label}: {key}", np.asarray(ours[key]), theirs[key])
