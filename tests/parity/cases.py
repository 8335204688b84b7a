"""The cases of goldens folders: found by file, told apart by the prefix of their name, run one by one.

A file that is no part of a case is a case too, one that fails: a typing mistake in a name must not hide a comparison.
"""

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.parity.golden import Golden

Driver = Callable[[Golden], None]


@dataclass(frozen=True)
class Case:
    """A file to run: its name in the table, the key that chooses the driver, and what is wrong with the file."""

    id: str
    key: str
    path: Path
    fault: str | None = None


class Result(NamedTuple):
    """A row of the table: plain values, which pytest-xdist carries to the process that prints them."""

    case: str
    compared: int
    worst: str
    error: float
    limit: float
    verdict: str  # pass, FAIL or pending
    note: str


def discover(folders: Sequence[Path]) -> list[Case]:
    """Returns the cases of all folders, searched recursively, in the order of their names."""
    ids = [path.relative_to(folder) for folder in folders for path in _files(folder)]
    clash = len(set(ids)) < len(ids)
    return [_case(path, folder, clash) for folder in folders for path in _files(folder)]


def manifest_kind(about: Mapping[str, Any]) -> str:
    """Returns which network a manifest describes, by its `type` or by fields that only one config has."""
    signs = {"axes_dim": "mmdit", "d_kv": "t5", "max_position_embeddings": "clip", "caption_channels": "stdit3"}
    found = [kind for field, kind in signs.items() if field in about["config"]]
    return about.get("type") or (found or ["unknown"])[0]


def chosen(key: str, prefixes: Sequence[str]) -> str | None:
    """Returns the longest prefix of a key, None if there is none."""
    return max((prefix for prefix in prefixes if key.startswith(prefix)), key=len, default=None)


def run(
    case: Case, drivers: Mapping[str, Driver], pending: Mapping[str, str], folders: Sequence[Path]
) -> tuple[Result, list[str]]:
    """Returns the row of a case and its faults."""
    prefix = chosen(case.key, [*drivers, *pending])
    if case.fault or prefix is None:
        return _refused(case, case.fault or "no driver knows a case of this name")
    if prefix in pending:
        return Result(case.id, 0, "", 0.0, 0.0, "pending", pending[prefix]), []
    try:
        golden = Golden(case.path, folders)
        drivers[prefix](golden)
    except Exception as error:
        first, *_ = [*str(error).splitlines(), ""]
        return _refused(case, f"{type(error).__name__}: {first}", traceback.format_exc())
    faults, worst = golden.faults(), golden.worst()
    verdict, note = ("FAIL", faults[0]) if faults else ("pass", f"{len(golden.excused)} excused" * bool(golden.excused))
    return Result(case.id, len(golden.comparisons), *worst, verdict, note), faults


def _refused(case: Case, note: str, details: str = "") -> tuple[Result, list[str]]:
    return Result(case.id, 0, "", float("inf"), 0.0, "FAIL", note), [note, details]


def _files(folder: Path) -> list[Path]:
    """Returns the files that stand for a case: tensors beside their json do not."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    return [path for path in files if path.suffix != ".safetensors" or path.with_suffix(".json") not in files]


def _case(path: Path, folder: Path, clash: bool) -> Case:
    name = str(path.relative_to(folder.parent if clash else folder))
    if path.suffix != ".json":
        why = "tensors without a json" if path.suffix == ".safetensors" else "neither json, safetensors nor README.md"
        return Case(name, path.name, path, why)
    try:
        about = json.loads(path.read_text())
    except ValueError as error:
        return Case(name, path.stem, path, f"no json: {error}")
    key = f"manifest:{manifest_kind(about)}" if "state_dict" in about else path.stem
    return Case(name.removesuffix(".json"), key, path)
