"""What goldens do not say of CLIP's text tower (tests/parity has those): its end token, causality, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.clip import CLIPText, CLIPTextConfig, end_of_text


def test_the_end_is_the_first_end_token_or_by_old_configs_the_first_largest_id():
    ids = jnp.asarray([[5, 3, 9, 9, 9], [5, 9, 3, 9, 11]])
    assert end_of_text(ids, 9).tolist() == [2, 1]
    assert end_of_text(ids, 2).tolist() == [2, 4]


def make_config(**changes):
    fields = {"vocab_size": 7, "hidden_size": 6, "intermediate_size": 5, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 3, "max_position_embeddings": 11, "eos_token_id": 1}
    return CLIPTextConfig(**fields | changes)


def test_later_tokens_do_not_change_earlier_outputs():
    model = CLIPText(make_config(num_hidden_layers=2), rngs=nnx.Rngs(0))
    short, _ = model(jnp.asarray([[0, 3, 5, 1]]))
    long, _ = model(jnp.asarray([[0, 3, 5, 1, 6, 6, 2]]))
    np.testing.assert_allclose(short, long[:, :4], atol=1e-5)


@pytest.mark.parametrize(("field", "value"), [("hidden_act", "gelu"), ("num_attention_heads", 4)])
def test_unsupported_configs_are_refused_by_field(field, value):
    with pytest.raises(ValueError, match=field):
        make_config(**{field: value})
