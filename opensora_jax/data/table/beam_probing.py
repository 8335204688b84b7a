"""Probing on a cluster: the same `describe`, mapped by Apache Beam over a list of clips.

Workers need this package, and the clips and the table's folder under the same paths: lists of clips and rows go
through files there, because a pipeline that holds millions of clips is too large to submit.
"""

import contextlib
import io
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from opensora_jax.config.errors import UserError
from opensora_jax.data.table.probing import Row, describe

BATCH = 1000  # rows read back at a time


def check(options: str) -> None:
    """Raises UserError if Beam is not installed or does not understand its options."""
    _pipeline(options)


def on_beam(clips: pa.Table, folder: Path, options: str, fps: float | int | None = None) -> Iterator[list[Row]]:
    """Yields the rows of all clips, once Beam has found them all; `folder` is made anew and removed after.

    `options` are Beam's own flags in one string, such as "--runner=FlinkRunner --parallelism=64".
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with (folder / "clips.jsonl").open("w") as file:
            for batch in clips.to_batches(max_chunksize=BATCH):
                file.writelines(json.dumps(clip) + "\n" for clip in batch.to_pylist())
        _write_rows(folder, options, fps)
        for path in sorted(folder.glob("rows*.jsonl")):
            with path.open() as file:
                while lines := file.readlines(BATCH << 10):
                    yield [json.loads(line) for line in lines]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_rows(folder: Path, options: str, fps: float | int | None) -> None:
    """Lets Beam write the files of rows. Raises UserError if its runner fails."""
    import apache_beam as beam

    try:
        with _pipeline(options) as pipeline:
            lines = pipeline | "clips" >> beam.io.ReadFromText(str(folder / "clips.jsonl"))
            rows = lines | "spread" >> beam.Reshuffle() | "describe" >> beam.Map(_describe_line, fps)
            _ = rows | "rows" >> beam.io.WriteToText(str(folder / "rows"), ".jsonl")
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"Apache Beam failed: {why}. Mend its runner; --verbosity=1 tells more.") from error


def _describe_line(line: str, fps: float | int | None) -> str:
    return json.dumps(describe(**json.loads(line), fps=fps))


def _pipeline(options: str) -> Any:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("--runner=beam needs Apache Beam: pip install '.[beam]'") from None
    with contextlib.redirect_stderr(io.StringIO()) as said:  # argparse prints its usage and ends the process
        try:
            parsed = PipelineOptions(shlex.split(options))
            parsed.get_all_options()  # else it finds wrong values when it runs
            return beam.Pipeline(options=parsed)
        except (ValueError, SystemExit) as error:
            why = said.getvalue().splitlines()[-1:] or [str(error)]
    raise UserError(f"--beam_options={options}: {why[0].rstrip('.')}. Give Beam's own flags, as --name=value.")
