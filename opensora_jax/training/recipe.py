"""The training step of a denoiser, from sections of a config: one for training it and for compiling it ahead."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from opensora_jax.models.mmdit import MMDiTConfig
from opensora_jax.nn.lora import LoRAConfig
from opensora_jax.training.optimizer import OptimConfig, make_optimizer
from opensora_jax.training.programs import Assembled, CompilerOptions
from opensora_jax.training.state import Loss, make_train_step, plan_state
from opensora_jax.weights.lora import base_and_lora, frozen_parameters, with_lora
from opensora_jax.weights.pretrained import DENOISERS, describe, initial_weights, parse_dtype, parse_model

REMEDIES = (
    "Blocks keep less with a higher model.grad_ckpt_settings or model.remat_policy=offload; accumulation_steps makes "
    "up for smaller batches."
)


@dataclass(frozen=True)
class Recipe:
    """What of a config decides the step and its state; fields as in configs/diffusion/train."""

    seed: int
    dtype: str
    model: dict[str, Any]  # type and the fields of that type
    lora: LoRAConfig | None
    optim: OptimConfig
    accumulation_steps: int
    compiler_options: CompilerOptions
    ema_decay: float | None
    num_steps: int

    @cached_property
    def network(self) -> MMDiTConfig:
        """The network's config. Raises: UserError for an unknown type or field."""
        return parse_model(self.model, DENOISERS, "config.model")[1]

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint has to agree with to be continued."""
        found = describe(self.model["type"], self.network) | {"ema": self.ema_decay is not None}
        found |= {"optimizer": self.optim.cls}
        return found | {"freeze": list(self.optim.freeze), "lora": self.lora and asdict(self.lora)}

    @property
    def memory(self) -> dict[str, Any]:
        """What the memory of a step follows from, beside the mesh and the batch."""
        optim = {"cls": self.optim.cls, "moments_dtype": self.optim.moments_dtype, "freeze": self.optim.freeze}
        return {
            "dtype": self.dtype,
            "model": asdict(self.network),
            "lora": self.lora and asdict(self.lora),
            "optim": optim,
            "parts": self.accumulation_steps,
            "compiler_options": self.compiler_options,
            "ema": self.ema_decay is not None,
        }

    def assemble(self, loss: Loss, mesh: Mesh, *, pretrained: bool = True) -> Assembled:
        """Returns the step that lowers a loss, with the state that it moves; nothing is allocated before `init`.

        Without `pretrained` the weights that the model starts from are not looked for.
        Raises: UserError for weights that are not there, and for layers that the model lacks.
        """
        optimizer = make_optimizer(self.optim, self.num_steps)
        make, start = self._model(mesh, pretrained)
        graphdef, abstract, init = plan_state(
            make,
            optimizer,
            mesh,
            ema=self.ema_decay is not None,
            pretrained=start,
            frozen=frozen_parameters(self.model["type"], self.optim.freeze, self.lora),
            frozen_dtype=self._held_dtype,
        )
        step = make_train_step(
            graphdef, loss, optimizer, ema_decay=self.ema_decay, accumulation_steps=self.accumulation_steps
        )
        return Assembled(graphdef, abstract, init, step, self.compiler_options, REMEDIES)

    def _model(self, mesh: Mesh, pretrained: bool) -> tuple[Callable[[], nnx.Module], Callable[[], nnx.State] | None]:
        """Returns what makes the model, with its LoRA where there is one, and what reads the weights it starts from."""
        module, fields = parse_model(self.model, DENOISERS, "config.model")
        kind, start = self.model["type"], None
        if pretrained:
            start = initial_weights(self.model, DENOISERS, "config.model", mesh=mesh, param_dtype=self._held_dtype)

        def make() -> nnx.Module:
            return module(fields, dtype=parse_dtype(self.dtype), rngs=nnx.Rngs(self.seed))

        if self.lora is None:
            return make, start
        started = base_and_lora(start, kind, self.lora, mesh) if pretrained else None
        return with_lora(make, kind, self.lora, self.seed), started

    @property
    def _held_dtype(self) -> DTypeLike:
        """That of parameters which do not learn: beside a LoRA nothing is ever added to them."""
        return jnp.float32 if self.lora is None else parse_dtype(self.dtype)
