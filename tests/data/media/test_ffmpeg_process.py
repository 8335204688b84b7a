"""ffmpeg that a signal ends runs again; one that fails by itself does not."""

import signal
import subprocess

import ffmpeg
import pytest

from opensora_jax.data.media import ffmpeg_process
from opensora_jax.data.media.ffmpeg_process import binary, run


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Returns a function that puts a script in ffmpeg's place; its first run ends as the given command says."""

    def put(first):
        script = tmp_path / "ffmpeg"
        script.write_text(
            f"#!/bin/sh\necho run >> {tmp_path}/runs\n[ -e {tmp_path}/once ] || {{ touch {tmp_path}/once; {first}; }}\n"
            f'exec {real} "$@"\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("FFMPEG_BINARY", str(script))
        return lambda: len((tmp_path / "runs").read_text().split())

    real = binary()
    return put


GRAPH = ffmpeg.input("color=red:size=4x2:rate=1", f="lavfi").output("pipe:", format="rawvideo", pix_fmt="rgb24", t=1)


@pytest.mark.parametrize("end", ["exit 255", "kill -TERM $$", "kill -KILL $$"])
def test_a_run_that_a_signal_ends_is_made_again(fake, end):
    runs = fake(end)
    status, out, _ = run(GRAPH, "error")
    assert (status, len(out), runs()) == (0, 4 * 2 * 3, 2)


def test_a_run_that_is_late_once_is_made_again(monkeypatch):
    run_once, late = ffmpeg_process._run_once, [subprocess.TimeoutExpired("ffmpeg", 120)]

    def first_late(*arguments):
        if late:
            raise late.pop()
        return run_once(*arguments)

    monkeypatch.setattr(ffmpeg_process, "_run_once", first_late)
    status, out, _ = run(GRAPH, "error")
    assert (status, len(out), late) == (0, 4 * 2 * 3, [])


def test_a_failure_is_not_tried_again(fake):
    runs = fake("exit 1")
    assert run(GRAPH, "error")[0] == 1
    assert runs() == 1


def test_a_real_ffmpeg_tells_of_a_signal_by_its_status():
    with subprocess.Popen(
        [binary(), "-re", "-f", "lavfi", "-i", "color=red", "-f", "null", "-"],
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    ) as process:
        process.stderr.read(1)
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(timeout=30) in (255, -signal.SIGTERM)
