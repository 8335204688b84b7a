"""What compiling a job found, as it is written down: bytes, operations, and where the texts of its programs are."""

import gzip
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
UNREADABLE = (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError)  # of files that a crash, or others, left
_REFUSALS = {  # of the TPU's compiler: what needs how much of how much
    "the program": re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) (?:of )?hbm"),
    "temporaries alone": re.compile(
        r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
    ),
}


@dataclass(frozen=True)
class Memory:
    """Bytes of a device that a program needs; `output` counts what does not lie in the place of an argument."""

    arguments: int
    output: int
    temporary: int
    code: int
    host: int

    @property
    def peak(self) -> int:
        """All of it, but for the host's."""
        return self.arguments + self.output + self.temporary + self.code


@dataclass(frozen=True)
class Compiled:
    """A program: how often it runs, the name of its text, its bytes."""

    name: str
    times: int
    text: str
    memory: Memory
    seconds: float  # that compiling took

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Compiled":
        """Returns the program that was written down."""
        return cls(**(dict(value) | {"memory": Memory(**value["memory"])}))

    def read(self, folder: Path) -> str:
        """Returns its text. Raises: one of UNREADABLE where the file is gone or damaged."""
        text = gzip.decompress((folder / f"{self.text}.hlo.gz").read_bytes()).decode()
        if not text:
            raise EOFError(f"{folder}/{self.text}.hlo.gz is empty")
        return text


@dataclass(frozen=True)
class Facts:
    """What is known of a job. With `refusal`, the compiler's words for what does not fit, there are no programs."""

    programs: list[Compiled]
    refusal: str | None
    state: dict[str, int]  # bytes of a device by what they are; networks that lie beside the program's are among them
    peak_bytes: int  # of a device, all of `state` included
    host_bytes: int
    flops: float  # useful ones, on all devices; 0 where no formula says
    executed_flops: float  # with what is computed again
    kernels: list[Any]
    samples: int
    tokens: int
    mesh: dict[str, int]
    device_kind: str
    places: list[list[int]]  # of every device in the network

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Facts":
        """Returns the facts that were written down."""
        return cls(**(dict(value) | {"programs": [Compiled.from_json(one) for one in value["programs"]]}))


def needed_bytes(refusal: str) -> tuple[str, int, int] | None:
    """Returns (what, its bytes, those of a device) from the compiler's refusal, None where it gives none."""
    for what, pattern in _REFUSALS.items():
        if found := pattern.search(refusal):
            needed, unit, available, other = found.groups()
            return what, int(float(needed) * UNITS[unit]), int(float(available) * UNITS[other])
    return None
