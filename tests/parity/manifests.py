"""Full-size manifests: every published key is one of our tensors with its shape, and the counts agree.

Published buffers are copies of tied tensors, running statistics, or constants that we do not store: those that exports
have are ours, with their shapes. Nothing is allocated. The comparison of `convert verify` must find no fault, and each
key is looked up here once more.
"""

import math

from flax import nnx

from opensora_jax.weights import manifest
from opensora_jax.weights.constants import constants
from opensora_jax.weights.pretrained import MODELS
from opensora_jax.weights.rename import NAMES, published_shapes
from tests.parity.golden import Golden

DESCRIPTION = {"name", "type", "config", "config_file", "effective_defaults"}  # what the network is built from


def published(golden: Golden) -> None:
    """Drive a manifest; the copy of a tied tensor has its original's shape and counts once."""
    found = manifest.read_manifest(golden.path)
    match = manifest.compare(found.kind, found.config, found.shapes, found.parameters)
    golden.check("faults of convert verify", list(match.faults), [])
    module, tied = MODELS[found.kind][1], NAMES[found.kind].tied
    model = nnx.eval_shape(lambda: module(found.config, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    ours = published_shapes(found.kind, nnx.state(model))
    ours |= {copy: ours[original] for copy, original in tied}
    theirs = golden.take("state_dict")
    buffers = {*ours} - {*published_shapes(found.kind, params)} | {copy for copy, _ in tied}
    exported = {key: value.shape for key, value in constants(found.config).items()}
    left_out = exported or {key: tuple(theirs[key]) for key in golden.about.get("buffers", []) if key not in ours}
    ours |= left_out
    for key in sorted(ours.keys() | theirs.keys()):
        golden.check(key, list(ours.get(key, ("missing",))), theirs.get(key, ["unknown"]))
    once = sum(math.prod(leaf.shape) for _, leaf in nnx.to_flat_state(params))
    found = {"total_parameters": once, "buffers": [key for key in theirs if key in buffers | left_out.keys()]}
    found |= dict.fromkeys(("num_keys", "n_state_dict_keys"), len(ours))
    elements = sum(math.prod(shape) for shape in ours.values())
    found |= dict.fromkeys(("total_elements_in_state_dict", "total_state_dict_elements"), elements)
    for name in found.keys() & golden.left:
        golden.compare(name, found[name])
    golden.left -= DESCRIPTION
