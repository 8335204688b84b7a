"""Encoding a table's clips: whoever does it, and however often it is killed, the files are the same."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.cache.cache_key import Identity
from opensora_jax.data.cache.latent_writer import LatentWriter
from opensora_jax.data.cache.latents import CacheInfo, LatentCache
from opensora_jax.data.clips import ClipDataset
from opensora_jax.data.media.video import VideoError
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.inference.latents import (
    LatentConfig,
    check_sizes,
    finish,
    latents_identity,
    missing,
    write_latents,
)
from tests.environment import free_port
from tests.inference.fakes import BUCKETS, COUNT, Autoencoder, clip_of, clip_table, clip_work

ALONE = (0, 1)


def encode(folder, host=ALONE, **options):
    writer, work = clip_work(folder, **options)
    writer.start()
    return finish(writer, write_latents(writer, work, host))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    encode(folder)
    return folder


def test_every_clip_has_its_latent_and_its_row(whole):
    cache = LatentCache(whole)
    assert cache.index["sample_id"].to_pylist() == list(range(COUNT))
    assert cache.index["num_frames"].to_pylist() == [5] * 14 + [1] * 9
    for row in range(COUNT):
        video = clip_of(row, BUCKETS[row > 13])
        np.testing.assert_allclose(cache.read_latent(row), video[::4, ::4, ::4] / 127.5 - 1, atol=1e-6)
    assert cache.index["fps"].to_pylist()[13] == 8
    assert np.isnan(cache.index["fps"].to_numpy()[14:]).all()


def test_ends_of_clips_are_encoded_alone_where_they_are_wanted(whole, tmp_path):
    cache = encode(tmp_path, ends=("tail",))
    for row in range(COUNT):
        np.testing.assert_array_equal(cache.read_latent(row), LatentCache(whole).read_latent(row))
    last = clip_of(3, BUCKETS[0])[-1:, ::4, ::4] / 127.5 - 1
    np.testing.assert_allclose(cache.read_clip(3)["tail"], last, atol=1e-6)
    assert [cache.read_clip(row).keys() for row in (3, 20)] == [{"latent", "tail"}, {"latent"}]


def test_a_finished_cache_reads_no_clip_again(whole, tmp_path, capsys):
    writer, work = clip_work(whole)
    before = files(whole)
    finish(writer, write_latents(writer, work, ALONE))
    assert work.source.asked == []
    assert files(whole) == before
    assert "23 latents in 6 shards, 0 of them new" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_draw_depends_on_the_seed_and_the_row_alone(batch_size):
    config = LatentConfig(batch_size, "sample", 3, None, 4)
    keys = [config.keys(rows) for rows in ([5, 9], [9])]
    assert keys[0][1] == keys[1][0]
    assert keys[0][0] != keys[0][1]
    assert LatentConfig(batch_size, "sample", 4, None, 4).keys([9])[0] != keys[1][0]
    assert LatentConfig(batch_size, "mode", 3, None, 4).keys([9]) is None


def test_processes_divide_the_shards_and_the_last_one_notices(whole, tmp_path, capsys):
    assert encode(tmp_path, (1, 2)) is None
    assert "3 new shards; 3 of 6 are still to come" in capsys.readouterr().out
    assert encode(tmp_path, (0, 2)) is not None
    assert files(tmp_path) == files(whole)


PROCESS = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
folder, index, address, seconds = sys.argv[1:]
if address:
    jax.distributed.initialize(address, 2, int(index))
from tests.inference.fakes import clip_work
from opensora_jax.inference.latents import finish, this_host, write_latents
writer, work = clip_work(Path(folder), seconds=float(seconds))
writer.start()
finish(writer, write_latents(writer, work, this_host()))
"""


def start(folder, index=0, address="", seconds=0.0):
    line = [sys.executable, "-c", PROCESS, str(folder), str(index), address, str(seconds)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, cwd=Path(__file__).parents[2], text=True, **pipes)


def test_two_processes_share_the_work_and_give_the_files_of_one(whole, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    processes = [start(tmp_path, index, address) for index in range(2)]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert any("23 latents in 6 shards, 3 of them new" in out for out, _ in said)
    assert files(tmp_path) == files(whole)


def test_killed_and_continued_is_uninterrupted_byte_for_byte(whole, tmp_path):
    with start(tmp_path, seconds=0.1) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("*.parquet")) or not list(tmp_path.glob(".latents-*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("latents-*.parquet")}
    assert 0 < len(kept) < 6
    encode(tmp_path)
    assert files(tmp_path) == files(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_what_is_left_counts_the_clips_of_this_process(tmp_path):
    writer, work = clip_work(tmp_path)
    assert missing(writer.latents, ALONE) == ([0, 1, 2, 3, 4, 5], 0)
    writer.start()
    write_latents(writer, work, (1, 2))
    assert missing(writer.latents, ALONE) == ([0, 2, 4], 4 + 4 + 3)
    assert missing(writer.latents, (1, 2)) == ([], 11)


def test_clips_that_cannot_be_read_are_left_out_and_told_by_reason_until_they_can(whole, tmp_path, capsys):
    cache = encode(tmp_path, broken=(2, 4, 5, 6, 7, 9))  # one whole shard among them
    assert cache.index["sample_id"].to_pylist() == [row for row in range(COUNT) if row not in (2, 4, 5, 6, 7, 9)]
    assert cache.read_latent(2).shape == cache.read_latent(3).shape
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("17 latents in 6 shards, 6 of them new")
    assert lines[1:] == [
        "  left out: 3 of the clips: broken in 0 places (/clips/2.mp4, /clips/4.mp4, /clips/6.mp4)",
        "  left out: 3 of the clips: broken in 1 places (/clips/5.mp4, /clips/7.mp4, /clips/9.mp4)",
    ]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("latents-*")}
    encode(tmp_path, broken=(2, 4, 5, 6, 7, 9))
    again = capsys.readouterr().out.splitlines()
    assert again[0].endswith("17 latents in 6 shards, 0 of them new")
    assert again[1:] == lines[1:]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    encode(tmp_path, broken=(2, 4, 5, 6))
    again = capsys.readouterr().out.splitlines()
    assert again[0].endswith("19 latents in 6 shards, 2 of them new")
    assert again[1].endswith("left out: 3 of the clips: broken in 0 places (/clips/2.mp4, /clips/4.mp4, /clips/6.mp4)")
    encode(tmp_path)
    assert files(tmp_path) == files(whole)


def test_a_disk_that_goes_away_ends_the_run_and_the_next_one_has_all_clips(whole, tmp_path):
    with pytest.raises(UserError, match=r"more than max_bad_rate = 0\.05"):
        encode(tmp_path, broken=range(6, 23), max_bad_rate=0.05)
    kept = LatentWriter(tmp_path, clip_work(tmp_path)[0].info).latents.info()
    assert kept[1].notes["left_out"] == [[f"/clips/{row}.mp4", f"broken in {row % 2} places"] for row in (6, 7)]
    encode(tmp_path)
    assert files(tmp_path) == files(whole)


def test_another_process_makes_its_own_shards_again(tmp_path):
    encode(tmp_path, broken=(2, 6, 9))
    writer, work = clip_work(tmp_path)
    assert write_latents(writer, work, (1, 2)) == 1
    assert LatentCache(tmp_path).left_out == [(f"/clips/{row}.mp4", f"broken in {row % 2} places") for row in (2, 9)]


def test_a_clip_with_a_use_that_is_still_bad_is_left_out_as_before(tmp_path):
    _, work = clip_work(tmp_path)
    rows = [(BUCKETS[0], 3), (BUCKETS[1], 3), (BUCKETS[0], 5)]
    writer = LatentWriter(tmp_path, CacheInfo("dataset encode", Identity({}, {}), "float32", 3, 3, 0, 1))
    writer.start()
    read = work.source._video

    def short(row, bucket, seed):
        if row == 3 and bucket == BUCKETS[0]:
            raise VideoError("too short")
        return read(row, bucket, seed)

    work.source._video = short
    assert [write_latents(writer, replace(work, rows=rows), ALONE) for _ in range(2)] == [1, 0]


def test_a_clip_may_stand_in_several_buckets(tmp_path):
    _, work = clip_work(tmp_path)
    rows = [(BUCKETS[0], 3), (BUCKETS[0], 5), (BUCKETS[1], 3), (BUCKETS[1], 4)]
    writer = LatentWriter(tmp_path, CacheInfo("dataset encode", Identity({}, {}), "float32", 4, 4, 0, 1))
    writer.start()
    write_latents(writer, replace(work, rows=rows), ALONE)
    cache = LatentCache(tmp_path)
    assert list(zip(*(cache.index[name].to_pylist() for name in ("sample_id", "height")), strict=True)) == [
        (3, 8),
        (5, 8),
        (3, 12),
        (4, 12),
    ]
    assert [cache.read_latent(row).shape for row in (0, 2)] == [(2, 2, 2, 3), (1, 3, 2, 3)]


def test_too_many_bad_clips_end_the_run_and_keep_what_is_finished(tmp_path):
    writer, work = clip_work(tmp_path, broken=range(6, 15), max_bad_rate=0.05)
    writer.start()
    with pytest.raises(UserError, match=r"more than max_bad_rate = 0\.05"):
        write_latents(writer, work, ALONE)
    assert missing(writer.latents, ALONE)[0] == [2, 3, 4, 5]
    assert not [name for name in files(tmp_path) if name.startswith(".")]


def test_no_clip_at_all_is_an_error_with_the_reasons(tmp_path):
    with pytest.raises(UserError, match="none of the 23 clips could be encoded: 12 of the clips: broken in 0 places"):
        encode(tmp_path, broken=range(COUNT))


def test_a_latent_that_is_no_number_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(Autoencoder, "encode", lambda self, video, keys: video[:, ::4, ::4, ::4] / (video.shape[1] - 1))
    cache = encode(tmp_path)
    assert write_latents(*clip_work(tmp_path), ALONE) == 0  # their frames can be read, which helps nothing
    assert cache.index["sample_id"].to_pylist() == list(range(14))  # the images are divided by zero
    assert cache.left_out == [(f"/clips/{row}.mp4", "its latent is NaN or infinite") for row in range(14, COUNT)]


def test_the_identity_names_what_changed():
    dataset = ClipDataset(data_path="a", fps_max=24.0, spatial_unit=4, resize="ffmpeg", cache_bytes=0, max_bad_rate=0.1)
    rows = [(BUCKETS[0], row) for row in range(5)]

    def identity(dtype="float32", config=("mode", 0, None), model=None, table=clip_table, rows=rows, **changes):
        settings = LatentConfig(2, *config, 4)
        fields = {name: getattr(dataset, name) for name in ClipDataset.__dataclass_fields__} | changes
        return latents_identity(model or Autoencoder(), dtype, settings, ClipDataset(**fields), table(), rows)

    def other():
        model = Autoencoder()
        model.gain[...] = 2.0
        return model

    same = identity()
    assert identity(data_path="elsewhere", cache_bytes=7, max_bad_rate=0.2) == same
    assert identity(config=("mode", 1, None)) == same  # no draw, so no seed
    larger = [(Bucket(*list(vars(BUCKETS[0]).values())[:-1], 9), row) for row in range(5)]
    assert identity(rows=larger) == same
    for changed, told in (
        (identity(fps_max=16.0), "dataset.fps_max = 24.0 (now 16.0)"),
        (identity(dtype="bfloat16"), "dtype = 'float32' (now 'bfloat16'), encode.dtype = 'float32' (now 'bfloat16')"),
        (identity(config=("sample", 1, None)), "encode.posterior = 'mode' (now 'sample'), encode.seed = None (now 1)"),
        (identity(config=("mode", 0, "bfloat16")), "encode.dtype = 'float32' (now 'bfloat16')"),
        (identity(model=other()), "other autoencoder weights"),
        (identity(rows=rows[1:]), "other clips, other buckets"),
        (identity(rows=[(BUCKETS[1], row) for row in range(5)]), "other buckets"),
    ):
        assert same.differences(changed) == told
        assert changed.key != same.key


def test_sizes_that_the_autoencoder_cannot_take_name_the_line():
    class Odd(Autoencoder):
        def latent_shape(self, frames, height, width):
            raise ValueError("takes none")

    with pytest.raises(UserError, match="bucket_config 8px, 5 frames: takes none"):
        check_sizes(Odd(), [(BUCKETS[0], 3)])


@pytest.mark.parametrize("sizes", [(0, 4), (2, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="batch_size and shard_clips are at least 1"):
        LatentConfig(sizes[0], "mode", 0, None, sizes[1])
