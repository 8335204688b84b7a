"""What a training config asks `dataset encode` for; tests/test_dataset.py runs it."""

from dataclasses import replace
from pathlib import Path

import pytest

from opensora_jax.data.clips import ClipDataset
from opensora_jax.inference import encode
from opensora_jax.inference.encode import EncodeConfig, EncodeJob
from opensora_jax.inference.prompt import TextEncoderConfig
from opensora_jax.parallel.distributed import DistributedConfig

TEXT = TextEncoderConfig("text", 7)
DATASET = ClipDataset("clips", fps_max=24.0, spatial_unit=8, resize="ffmpeg", cache_bytes=0, max_bad_rate=0.1)
ENCODE = EncodeConfig(2, "mode", 0, None, 4, 4, False, "")


def job(**condition_config):
    weights = {name: float(weight) for name, weight in condition_config.items()}
    alone = DistributedConfig(None, None, None)
    return EncodeJob("float32", {}, TEXT, TEXT, DATASET, Path("latents"), ENCODE, {}, weights, alone)


def test_the_images_that_conditions_show_are_encoded_alone():
    assert job(t2v=1, v2v_head=1).ends == ()
    assert job(i2v_head=1, i2v_tail=0).ends == ("head",)
    assert job(i2v_tail=1).ends == ("tail",)
    assert job(i2v_loop=1).ends == ("head", "tail")


def test_an_unknown_condition_is_refused_before_anything_is_encoded():
    with pytest.raises(ValueError, match=r"Unknown condition 'i2v_haed'\. Allowed: t2v, i2v_head"):
        job(i2v_haed=1)


def test_a_batch_size_that_training_finds_is_no_matter_here(monkeypatch):
    class ReachedError(Exception):
        pass

    def reach(table, buckets, seed):
        raise ReachedError(buckets.buckets)

    monkeypatch.setattr(encode, "assigned_rows", reach)
    found = []
    for size in ("auto", 1):
        config = {"48px_ar1:1": {9: ((1.0, 0.5), size)}}
        given = replace(job(), dataset=replace(DATASET, data_path="synthetic:3"), bucket_config=config)
        with pytest.raises(ReachedError) as reached:
            encode.run(given)
        found.append(reached.value.args)
    assert found[0] == found[1]
