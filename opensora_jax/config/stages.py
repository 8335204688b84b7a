"""A config of several stages: sections of one config, each a config of its own, which `stages` names in their order."""

from ml_collections import ConfigDict

from opensora_jax.config.errors import UserError


def stage_names(config: ConfigDict) -> tuple[str, ...]:
    """Returns the names of a config's stages. Raises: UserError for a name without a section, and for none."""
    sections = sorted(name for name in config if name != "stages")
    if not config.stages or not set(config.stages) <= set(sections):
        raise UserError(f"config.stages names some of {', '.join(sections)}, in their order: got {config.stages}")
    return tuple(config.stages)
