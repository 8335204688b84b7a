"""Shards of latents survive being cut short, and refuse to mix with those of other work."""

import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.latent_shards import LatentShards


def latent(seed):
    return np.random.default_rng(seed).standard_normal((2, 3, 5, 7)).astype(np.float32)


def rows(*numbers):
    return [{"row": number, "path": f"{number}.mp4"} for number in numbers]


def test_latents_come_back_by_shard_and_record(tmp_path):
    shards = LatentShards(tmp_path / "latents", "key")
    shards.write(0, rows(4, 7), [latent(4), latent(7)])
    shards.write(1, rows(9), [latent(9)])
    index = LatentShards(tmp_path / "latents", "key").index().to_pylist()
    assert [(line["row"], line["shard"], line["record"]) for line in index] == [(4, 0, 0), (7, 0, 1), (9, 1, 0)]
    for line in index:
        np.testing.assert_array_equal(shards.read(line["shard"], line["record"]), latent(line["row"]))


def test_a_shard_without_an_index_is_none(tmp_path):
    shards = LatentShards(tmp_path, "key")
    shards.write(0, rows(4), [latent(4)])
    shards.write(1, rows(7), [latent(7)])
    (tmp_path / "latents-00001.parquet").unlink()  # as a crash between the two files leaves it
    assert [shards.is_finished(number) for number in (0, 1, 2)] == [True, False, False]
    shards.write(1, rows(8), [latent(8)])
    assert shards.index()["row"].to_pylist() == [4, 8]


def test_latents_of_other_work_are_not_mixed(tmp_path):
    LatentShards(tmp_path, "key").write(0, rows(4), [latent(4)])
    with pytest.raises(UserError, match="other weights, clips or settings"):
        LatentShards(tmp_path, "another")


def test_an_empty_folder_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match="run `vae encode`"):
        LatentShards(tmp_path, "key").index()
