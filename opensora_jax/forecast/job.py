"""A job: one thing to compile, told in JSON, so that a process of its own can do it and its answer can be kept."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
VARIABLES = (
    *("LIBTPU_INIT_ARGS", "XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64", "JAX_DEFAULT_PRNG_IMPL"),
    *("JAX_NUMPY_DTYPE_PROMOTION", "JAX_THREEFRY_PARTITIONABLE"),
)
SOURCES = Path(__file__).parents[1]
DEVICES = ("forecast/topology.py", "forecast/gpus.py")
MAKERS = (  # what programs are made of; the other files of this folder read what was compiled
    *("config", "data", "kernels", "parallel", "nn", "models", "diffusion", "weights", "training", "inference"),
    *("forecast/programs.py", "forecast/parts.py", "forecast/compile.py", "forecast/count.py"),
    *("forecast/chips.py", *DEVICES),
)
UNUSED_FIELDS = ("from_pretrained", "adapter", "rename_keys", "strict_load", "layout")  # of a network's section


@dataclass(frozen=True)
class Job:
    """What to compile: the sections of a config, the part of it (a bucket, or branches of guidance), and for what."""

    kind: Literal["train", "sample", "decode"]
    title: str
    topology: str
    sections: dict[str, Any]
    subject: Any  # train: the fields of a bucket; sample: branches
    options: dict[str, Any] = field(default_factory=dict)  # of the compiler

    @property
    def key(self) -> str:
        """What the answer depends on, as a name."""
        relevant = asdict(self) | {"title": "", "versions": versions(), "sources": sources_digest(MAKERS)}
        relevant["sections"] = {name: without_files(value) for name, value in self.sections.items()}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def to_json(self) -> str:
        """Returns the job as text."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Returns the job of a text."""
        return cls(**json.loads(text))


def without_files(section: Any) -> Any:
    """Returns a section without what tells of files: no program depends on these."""
    if not isinstance(section, dict):
        return section
    return {name: value for name, value in section.items() if name not in UNUSED_FIELDS}


@cache
def versions() -> dict[str, str]:
    """Returns the versions of the packages that make a program, and what the environment tells the compiler."""
    found = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def sources_digest(names: tuple[str, ...]) -> str:
    """Returns a hash of files and folders of the package's sources, as they are when it is first asked for."""
    digest = hashlib.sha256()
    places = [SOURCES / name for name in names]
    for path in sorted(path for place in places for path in ([place] if place.is_file() else place.rglob("*.py"))):
        digest.update(str(path.relative_to(SOURCES)).encode() + path.read_bytes())
    return digest.hexdigest()
