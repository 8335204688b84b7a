"""From facts to a forecast: does it fit, how long does it take, what does it cost."""

import gzip
from dataclasses import replace

import pytest

from opensora_jax.forecast import report
from opensora_jax.forecast.estimate import forecast
from opensora_jax.forecast.facts import Compiled, Memory, needed_bytes
from opensora_jax.forecast.job import Job
from opensora_jax.forecast.jobs import Group, Wanted
from opensora_jax.forecast.timeline import Assumptions, Span
from opensora_jax.forecast.work import Failure
from tests.forecast.test_work import FACTS

GIB = 2**30
JOB = Job("train", "32px, 9 frames", "v5e:2x2", {"mesh": {}}, {})
TEXT = """HloModule m, is_scheduled=true

%sine (x: f32[3]) -> f32[3] {
  %x = f32[3]{0} parameter(0)
  ROOT %s = f32[3]{0} sine(%x)
}

ENTRY %main (p: f32[3]) -> f32[3] {
  %p = f32[3]{0} parameter(0)
  %f = f32[3]{0} fusion(%p), kind=kLoop, calls=%sine, metadata={op_name="jit(step)/sin"}, \
backend_config={"estimated_cycles":"1500000000"}
}
"""


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "abc.hlo.gz").write_bytes(gzip.compress(TEXT.encode()))
    return tmp_path


def make(texts, *, memory: int = 63 * GIB // 4, **changes):
    memory_of = Memory(arguments=2 * GIB, output=0, temporary=3 * GIB, code=GIB, host=0)
    facts = replace(FACTS, programs=[Compiled("train", 2, "abc", memory_of, 1.0)], peak_bytes=6 * GIB, **changes)
    return forecast(JOB, facts, texts, Assumptions(), memory)


def test_a_step_takes_all_runs_of_its_programs(texts):
    found = make(texts, flops=4 * 197e12)
    assert found.fits
    assert found.seconds == pytest.approx(2.0)  # cycles of a 1.5 GHz clock
    assert found.mfu == pytest.approx(0.5)
    assert found.dollars(3.0, 1000) == pytest.approx(2000 / 3600 * 4 * 3)
    quicker = replace(found, span=Span(seconds=2.0, products=1.0, fusions=1.0, moving=0.5))
    assert quicker.best_mfu == pytest.approx(0.5 * 2 / 1.5)
    told = found.as_json(3.0)
    assert told["costliest_seconds"] == {"sin": pytest.approx(2.0)}
    assert told["samples_per_second"] == pytest.approx(5.0)
    assert told["programs"][0]["memory"]["peak"] == 6 * GIB
    assert "places" not in told


def test_operations_are_those_counted_where_nothing_says_which_are_useful(texts):
    assert make(texts, flops=0.0, executed_flops=197e12).mfu == pytest.approx(0.125)


def test_more_than_a_device_has_is_a_result(texts):
    found = make(texts, memory=5 * GIB)
    assert not found.fits
    assert found.reason == "it needs 6.00 GiB of a device's 5.00 GiB"
    assert "does not fit   it needs 6.00 GiB" in report.block(found, None)[0]
    assert found.as_json(None)["fits"] is False


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (23.30G) "
            "exceeds available HBM (15.75G).",
            "temporaries alone need 23.30 GiB of a device's 15.75 GiB, says the compiler",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.10G "
            "of 15.75G hbm. Exceeded hbm capacity by 4.35G.\n\nTotal hbm usage >= 20.36G:",
            "the program needs 20.10 GiB of a device's 15.75 GiB, says the compiler",
        ),
        ("RESOURCE_EXHAUSTED: too many\n  of them", "RESOURCE_EXHAUSTED: too many"),
    ],
)
def test_what_the_compiler_refuses_is_a_result(texts, said, reason):
    found = make(texts, refusal=said)
    assert (found.fits, found.reason, found.span) == (False, reason, None)
    assert len(report.block(found, 1.0)) == 2


def test_bytes_in_refusals():
    assert needed_bytes("Used 512.5M of 1.00G hbm") == ("the program", int(512.5 * 2**20), 2**30)
    assert needed_bytes("nothing") is None


def test_a_forecast_in_words(texts):
    one = make(texts, flops=4 * 197e12, kernels=[])
    lines = "\n".join(report.block(one, 3.0))
    assert "6.00 GiB of 15.75 GiB: parameters 0.00 MiB, activations and results 5.00 GiB, code 1.00 GiB" in lines
    assert "time           2.000 s: 5.00 samples/s, 6 tokens/s, MFU 50.0% (at best " in lines
    assert "products 0.00 ms, other fusions 2.000 s (their bytes alone 0.00 ms), waiting for the network 0.00" in lines
    (titles, row) = report.table([("a", one)], 3.0)
    assert titles.split() == ["samples", "GiB", "fits", "step", "s", "MFU", "tokens/s", "$/1000"]
    assert row.split() == ["a", "10", "6.0", "yes", "2.000", "50.0%", "6", "6.67"]
    failed = Failure("no luck", texts / "log")
    assert report.block(failed, None) == [f"  not compiled   no luck ({texts}/log)"]
    group = Group("t", (Wanted(JOB, 3), Wanted(JOB, 1)), videos=2)
    parts = list(zip(group.wanted, (one, one), strict=True))
    assert report.videos(group, parts, None) == [" 2 videos in 8.000 s: 4.000 s each"]
    assert report.videos(group, [(group.wanted[0], failed)], None) == []
    tight = replace(one, reason="it needs more")
    assert report.videos(group, [(group.wanted[0], tight), parts[1]], 3.0) == []  # no price for what does not fit
    assert report.videos(replace(group, is_image=True), parts, None) == [" 2 images in 8.000 s: 4.000 s each"]
