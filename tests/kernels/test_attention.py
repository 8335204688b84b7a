import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.kernels.attention import attention


def test_attention_is_a_softmax_average_head_by_head():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, length, 3, 4)) for i, length in enumerate((5, 7, 7)))
    mask = jnp.tril(jnp.ones((5, 7), bool))[None, None]
    out = np.asarray(attention(q, k, v, mask=mask))
    for b, n, i in np.ndindex(2, 3, 5):
        logits = np.asarray(k[b, : i + 1, n] @ q[b, i, n]) / 2.0
        weights = np.exp(logits - logits.max())
        np.testing.assert_allclose(out[b, i, n], weights / weights.sum() @ v[b, : i + 1, n], rtol=2e-5, atol=1e-6)


def test_a_bias_is_added_to_the_logits_before_the_softmax():
    q = k = jnp.zeros((1, 2, 1, 4))
    v = jnp.asarray([1.0, 5.0])[None, :, None, None] * jnp.ones(4)
    bias = jnp.log(jnp.asarray([[1.0, 3.0], [1.0, 1.0]]))[None, None]
    np.testing.assert_allclose(attention(q, k, v, bias=bias)[0, :, 0, 0], [4.0, 3.0], rtol=1e-6)
