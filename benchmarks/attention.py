"""Attention by every backend that runs here, beside a matrix product and, where torch is installed, beside its SDPA.

    python benchmarks/attention.py                                                  # sizes that suit the device
    python benchmarks/attention.py --lengths 33280 76800 --heads 24 --head_size 128 --dtypes bfloat16 --batch 1

A row has the median time of the forward pass and of both passes, the operations per second that these are (two
products of queries with keys forwards, five more backwards), and their share of what a product of two large matrices
reaches in the same dtype and run. `attention` is what models call; it takes one of the others. The reference is left
out where its logits would not fit.
"""

import argparse
import importlib.util
import os
from collections.abc import Callable, Iterator

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory of a GPU to torch

import jax

from benchmarks.in_turn import matmul_flops, median_seconds
from opensora_jax.kernels import chunked, reference
from opensora_jax.kernels.attention import attention

LOGITS_BYTES = 4 * 2**30  # the reference holds at most
Shape = tuple[int, int, int, int]
Passes = tuple[Callable[[], object], Callable[[], object]]  # forwards; forwards and backwards


def in_chunks(scale: float, dtype: str) -> tuple[Callable, Callable]:
    """Returns attention by XLA in chunks, whatever the device: of q, k, v, and gradients of q, k, v and a gradient."""
    options = {"scale": scale, "dtype": dtype}

    def both(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        return chunked.backward(q, k, v, None, gradient, *chunked.forward(q, k, v, None, **options), **options)

    return lambda q, k, v: chunked.forward(q, k, v, None, **options)[0], both


def differentiated(function: Callable) -> tuple[Callable, Callable]:
    """Returns the same of a function that JAX differentiates."""
    return function, lambda q, k, v, gradient: jax.vjp(function, q, k, v)[1](gradient)


def ours(shape: Shape, dtype: str) -> Iterator[tuple[str, Passes]]:
    """Yields backends that run here, with the work of both passes."""
    B, L, N, K = shape
    backends = {"attention": differentiated(attention), "chunks": in_chunks(K**-0.5, dtype)}
    if 4 * B * N * L * L <= LOGITS_BYTES:
        backends["reference"] = differentiated(reference.attention)
    q, k, v, gradient = (jax.random.normal(jax.random.key(i), shape, dtype) for i in range(4))
    for name, passes in backends.items():
        forwards, both = map(jax.jit, passes)
        yield (
            name,
            (
                lambda run=forwards: jax.block_until_ready(run(q, k, v)),
                lambda run=both: jax.block_until_ready(run(q, k, v, gradient)),
            ),
        )


def theirs(shape: Shape, dtype: str) -> Passes:
    """Returns the work of both passes by torch's scaled_dot_product_attention, which takes heads before tokens."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, L, N, K = shape
    q, k, v, gradient = (torch.randn(B, N, L, K, dtype=getattr(torch, dtype), device=device) for _ in range(4))
    for part in (q, k, v):
        part.requires_grad_()

    def done() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def forwards() -> None:
        with torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
        done()

    def both() -> None:
        torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(q, k, v), (q, k, v), gradient)
        done()

    return forwards, both


def main() -> None:
    """Prints the table."""
    small = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1152, 2304] if small else [4608, 33280, 76800])
    parser.add_argument("--heads", type=int, default=8 if small else 24)
    parser.add_argument("--head_size", type=int, default=64 if small else 128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32"] if small else ["bfloat16"])
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    columns = ("batch, length, heads, size", "dtype", "backend", "fwd ms", "TFLOP/s", "share")
    print("{:<28}{:<10}{:<11}{:>10}{:>9}{:>7}{:>13}{:>9}{:>7}".format(*columns, "fwd+bwd ms", *columns[4:]))
    for dtype in given.dtypes:
        top = matmul_flops(dtype)
        print(f"{'product of matrices':<28}{dtype:<10}{'XLA':<11}{'':>10}{top / 1e12:>9.2f}{1:>7.0%}", flush=True)
        for length in given.lengths:
            shape = (given.batch, length, given.heads, given.head_size)
            work = list(ours(shape, dtype))
            if importlib.util.find_spec("torch"):
                work.append(("torch", theirs(shape, dtype)))
            for name, (forwards, both) in work:
                row = f"{shape!s:<28}{dtype:<10}{name:<11}"
                for run, products, width in ((forwards, 2, 10), (both, 7, 13)):
                    (took,) = median_seconds([run], given.runs)
                    rate = 2 * products * shape[0] * shape[2] * shape[3] * length**2 / took
                    row += f"{took * 1e3:>{width}.1f}{rate / 1e12:>9.2f}{rate / top:>7.0%}"
                print(row, flush=True)


if __name__ == "__main__":
    main()
