"""Our MMDiT beside diffusers' Flux transformer on PyTorch, in one process: forward, backward, training step.

    python benchmarks/mmdit.py                                            # CPU, float32, 2 threads
    python benchmarks/mmdit.py --width=3072 --heads=24 --depth=1 --single=2 --video=75776 --dtype=bfloat16     # a GPU

Both hold the same weights in the Flux layout and do the same work in turn; the table has the median of each, what it
reaches of the device's own matrix product, and the largest difference of the results. Needs torch and diffusers.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from diffusers import FluxTransformer2DModel
from flax import nnx

from benchmarks.in_turn import Row, matmul_flops, median_seconds, print_table
from opensora_jax.models.mmdit import MMDiT, MMDiTConfig
from opensora_jax.training.flops import forward_flops, training_flops
from opensora_jax.weights.params import load_params

TEXT_WIDTH, POOLED_WIDTH, CHANNELS = 512, 256, 64
PARTS = {  # ours in the Flux layout: theirs, whose weights are joined along the outputs
    "double": {
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
    },
    "single": {
        "modulation.lin": ("norm.linear",),
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
    },
    "ends": {
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
    },
}
SCALES = {
    "double": {
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
    },
    "single": {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"},
}


def published(peer: FluxTransformer2DModel, depth: int, single: int) -> dict[str, np.ndarray]:
    """Returns the peer's weights under the names of Flux's own repository."""
    theirs = {name: tensor.detach().float().numpy() for name, tensor in peer.state_dict().items()}
    found: dict[str, np.ndarray] = {}

    def join(kind: str, ours: str, their: str) -> None:
        for name, parts in PARTS[kind].items():
            for value in ("weight", "bias"):
                found[f"{ours}{name}.{value}"] = np.concatenate([theirs[f"{their}{part}.{value}"] for part in parts])
        for name, part in SCALES.get(kind, {}).items():
            found[f"{ours}{name}.scale"] = theirs[f"{their}{part}.weight"]

    for number in range(depth):
        join("double", f"double_blocks.{number}.", f"transformer_blocks.{number}.")
    for number in range(single):
        join("single", f"single_blocks.{number}.", f"single_transformer_blocks.{number}.")
    join("ends", "", "")
    for value in ("weight", "bias"):  # theirs has scale before shift
        scale, shift = np.split(theirs[f"norm_out.linear.{value}"], 2)
        found[f"final_layer.adaLN_modulation.1.{value}"] = np.concatenate([shift, scale])
    return found


class Work:
    """The two networks, their inputs, and the functions to be compared."""

    def __init__(self, given: argparse.Namespace):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[given.dtype]
        head = given.width // given.heads
        axes = (head - 2 * (head * 7 // 16 // 2 * 2), *[head * 7 // 16 // 2 * 2] * 2)
        self.config = MMDiTConfig(
            in_channels=CHANNELS,
            vec_in_dim=POOLED_WIDTH,
            context_in_dim=TEXT_WIDTH,
            hidden_size=given.width,
            mlp_ratio=4.0,
            num_heads=given.heads,
            depth=given.depth,
            depth_single_blocks=given.single,
            axes_dim=axes,
            theta=10_000,
            qkv_bias=True,
            guidance_embed=False,
            cond_embed=False,
            fused_qkv=True,
            use_liger_rope=False,
            patch_size=2,
            grad_ckpt_settings=(0, 0),
            remat_policy="full",
        )
        torch.manual_seed(0)
        self.peer = FluxTransformer2DModel(
            in_channels=CHANNELS,
            num_layers=given.depth,
            num_single_layers=given.single,
            attention_head_dim=head,
            num_attention_heads=given.heads,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=POOLED_WIDTH,
            guidance_embeds=False,
            axes_dims_rope=axes,
        )
        weights = published(self.peer, given.depth, given.single)
        self.peer.to(self.device, self.dtype)
        abstract = nnx.eval_shape(lambda: MMDiT(self.config, dtype=given.dtype, rngs=nnx.Rngs(0)))
        self.graph, shapes = nnx.split(abstract)
        self.params = jax.tree.map(
            lambda leaf: leaf.astype(given.dtype) if given.dtype != "float32" else leaf,
            load_params("mmdit", weights, shapes),
        )
        rng = np.random.default_rng(0)
        side = math.isqrt(given.video)
        grid = np.stack(np.unravel_index(np.arange(given.video), (-(-given.video // side), side)), -1)
        self.arrays = {
            "img": rng.standard_normal((given.batch, given.video, CHANNELS)),
            "txt": rng.standard_normal((given.batch, given.text, TEXT_WIDTH)),
            "pooled": rng.standard_normal((given.batch, POOLED_WIDTH)),
            "t": np.full(given.batch, 0.5),
        }
        self.ids = np.concatenate([np.zeros((given.text, 3)), np.pad(grid, ((0, 0), (1, 0)))]).astype(np.int32)
        self.flops = given.batch * forward_flops(self.config, given.video, given.text)
        self.trained = given.batch * training_flops(self.config, given.video, given.text)

    def ours(self) -> tuple[Callable, Callable, Callable]:
        """Returns functions without arguments, forward, gradient and step, and what they give."""
        arrays = {name: jnp.asarray(value, self.config_dtype) for name, value in self.arrays.items()}
        ids = jnp.asarray(self.ids)

        def velocity(params: Any) -> jax.Array:
            model = nnx.merge(self.graph, params)
            a = arrays
            return model.tokens(a["img"], ids, a["txt"], a["t"].astype(jnp.float32), a["pooled"], None, None)

        def loss(params: Any) -> jax.Array:
            return jnp.mean(jnp.square(velocity(params).astype(jnp.float32)))

        adam = optax.adamw(1e-5)

        def step(params: Any, state: Any) -> tuple[Any, Any]:
            updates, state = adam.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        forward, gradient = jax.jit(velocity), jax.jit(jax.grad(loss))
        stepped = jax.jit(step, donate_argnums=(0, 1))
        held = [jax.tree.map(jnp.copy, self.params), adam.init(self.params)]

        def move() -> None:
            held[:] = jax.block_until_ready(stepped(*held))

        return (
            lambda: np.asarray(forward(self.params).astype(jnp.float32)),
            lambda: jax.block_until_ready(gradient(self.params)),
            move,
        )

    @property
    def config_dtype(self) -> Any:
        """The dtype of the inputs, as JAX has it."""
        return jnp.bfloat16 if self.dtype == torch.bfloat16 else jnp.float32

    def theirs(self) -> tuple[Callable, Callable, Callable]:
        """Returns the same of the peer."""
        a = {name: torch.tensor(value, dtype=self.dtype, device=self.device) for name, value in self.arrays.items()}
        ids = torch.tensor(self.ids, dtype=torch.float32, device=self.device)
        text = a["txt"].shape[1]
        adam = torch.optim.AdamW(self.peer.parameters(), lr=1e-5, weight_decay=1e-4)

        def velocity() -> torch.Tensor:
            return self.peer(
                hidden_states=a["img"],
                encoder_hidden_states=a["txt"],
                pooled_projections=a["pooled"],
                timestep=a["t"],
                img_ids=ids[text:],
                txt_ids=ids[:text],
            ).sample

        def forward() -> np.ndarray:
            with torch.inference_mode():
                return velocity().float().cpu().numpy()

        def gradient() -> None:
            self.peer.zero_grad(set_to_none=True)
            velocity().float().square().mean().backward()
            if self.device == "cuda":
                torch.cuda.synchronize()

        def move() -> None:
            gradient()
            adam.step()
            if self.device == "cuda":
                torch.cuda.synchronize()

        return forward, gradient, move


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (
        ("width", 512),
        ("heads", 8),
        ("depth", 4),
        ("single", 8),
        ("video", 1024),
        ("text", 128),
        ("batch", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--runs", type=int, default=7, help="of each, in turn")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch on a CPU; ours uses all cores")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    work = Work(given)
    ours, theirs = work.ours(), work.theirs()
    apart = np.abs(ours[0]() - theirs[0]()).max() / np.abs(theirs[0]()).max()
    ceiling = matmul_flops(given.dtype)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}, {given}")
    print(f"matrix product: {ceiling / 1e9:.0f} GFLOP/s; largest difference of the results {apart:.1e}")
    rows = []
    names = ("forward", "forward and backward", "step with AdamW")  # the last changes the weights
    for name, mine, peer, flops in zip(names, ours, theirs, (work.flops, work.trained, work.trained), strict=True):
        rows.append(Row(name, *median_seconds((mine, peer), given.runs), flops))
    print_table(rows, ceiling)


if __name__ == "__main__":
    main()
