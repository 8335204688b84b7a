"""Where prompts come from: the command line, a text file with one a line, or a table with a `text` column."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from opensora_jax.config.errors import UserError

TEXTS = "text", "ref", "neg"  # columns of a table


@dataclass(frozen=True)
class Prompt:
    """A prompt as the user wrote it, its position in the whole list and its references."""

    text: str
    index: int
    references: tuple[Path, ...] = ()
    negative: str = ""


def from_source(texts: list[str], file: str | None, table: str | None, reference: str | None) -> list[Prompt]:
    """Returns the prompts of the one source that is given; `texts` and `file` go before `table`.

    Raises: UserError for no source, for two, or for a `reference` without `texts`.
    """
    if texts and file:
        raise UserError("Both --prompt and --prompts are given. Use one of them.")
    if reference and not texts:
        raise UserError("--ref goes with --prompt. In a table, give references in its column 'ref'.")
    prompts: list[Prompt] = []
    if texts:
        prompts = from_strings(texts, reference)
    elif file:
        prompts = from_file(Path(file))
    elif table:
        prompts = from_table(Path(table))
    if not prompts:
        raise UserError('There is no prompt. Give --prompt="..." (repeatable), --prompts=FILE or dataset.data_path.')
    return prompts


def from_strings(texts: list[str], reference: str | None) -> list[Prompt]:
    """Returns the prompts of the command line, all with the same references ("head.png;tail.png")."""
    paths = tuple(Path(part) for part in (reference or "").split(";") if part)
    return [Prompt(text.strip(), i, paths) for i, text in enumerate(texts) if text.strip()]


def from_file(path: Path) -> list[Prompt]:
    """Returns a prompt for each line that is not blank.

    Raises: UserError for a file that is missing, empty or no UTF-8 text.
    """
    if not path.is_file():
        raise UserError(f"The prompt list {path} does not exist. Give a text file with one prompt a line.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"The prompt list {path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    lines = [line.strip() for line in text.split("\n")]  # splitlines() also cuts inside a line, at U+2028 and others
    prompts = [Prompt(line, i) for i, line in enumerate(filter(None, lines))]
    if not prompts:
        raise UserError(f"The prompt list {path} is empty. Write one prompt a line.")
    return prompts


def from_table(path: Path) -> list[Prompt]:
    """Returns a prompt for each row of a .csv or .parquet with `text` and, if wanted, `ref` and `neg`.

    Rows that `dataset meta` marked as bad are left out.

    `ref` lists paths separated by ";", relative to the table's folder or else to the working directory.
    Raises: UserError for a missing file, an empty table or one without prompts.
    """
    columns = _read(path).to_pydict()
    if "text" not in columns:
        raise UserError(f"{path} has no column 'text', only {', '.join(columns)}. Add one with the prompts.")
    count = len(columns["text"])
    blank = [""] * count
    names = ("ref", "neg", "status")
    rows = zip(columns["text"], *(columns.get(name, blank) for name in names), strict=True)
    prompts = [
        Prompt(text.strip(), i, _references(ref or "", path.parent), neg or "")
        for i, (text, ref, neg, status) in enumerate(rows)
        if text and text.strip() and status != "bad"
    ]
    if not prompts:
        raise UserError(f"{path} holds no prompts. Fill its column 'text'.")
    return prompts


def select(prompts: list[Prompt], start_index: int, num_samples: int | None) -> list[Prompt]:
    """Returns `num_samples` prompts (None for the rest) from `start_index` on.

    Raises: UserError if that leaves none.
    """
    chosen = prompts[start_index:][:num_samples] if start_index >= 0 and (num_samples or 1) > 0 else []
    if not chosen:
        raise UserError(
            f"start_index {start_index} with num_samples {num_samples} picks none of {len(prompts)} prompts. "
            f"Use a start_index in 0 .. {len(prompts) - 1}, and at least 1 or None (the rest) for num_samples."
        )
    return chosen


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise UserError(f"The prompt table {path} does not exist. Give a .csv or .parquet with a column 'text'.")
    try:
        if path.suffix == ".parquet":
            table = pa.parquet.read_table(path)
            for number, name in enumerate(table.column_names):
                if name in TEXTS:
                    table = table.set_column(number, name, table[name].cast(pa.string()))
            return table
        text = pa.csv.ConvertOptions(column_types={name: pa.string() for name in TEXTS})
        return pa.csv.read_csv(path, convert_options=text, parse_options=pa.csv.ParseOptions(newlines_in_values=True))
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as a table: {reason}. Give a .csv or .parquet.") from error


def _references(listed: str, folder: Path) -> tuple[Path, ...]:
    paths = [Path(part.strip()) for part in listed.split(";") if part.strip()]
    return tuple(folder / path if (folder / path).exists() else path for path in paths)
