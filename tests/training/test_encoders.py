"""The frozen encoders in front of a step: what training from videos gives is what training from a cache gives."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.data.clip_source import Captions
from opensora_jax.data.clips import ClipDataset
from opensora_jax.data.loader import make_loader
from opensora_jax.data.plan.buckets import Buckets
from opensora_jax.data.plan.plan import Plan
from opensora_jax.diffusion.drawn_conditions import NAMES
from opensora_jax.inference.local_encoders import write_local_encoders
from opensora_jax.inference.prompt import TextEncoderConfig, TextEncoders, Tokenizers, load_encoder
from opensora_jax.models.codec import Codec
from opensora_jax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from opensora_jax.models.posterior import Posterior
from opensora_jax.nn.linear import Linear
from opensora_jax.parallel.batch import abstract_batch, batch_sharding, to_devices
from opensora_jax.parallel.mesh import MeshConfig, make_mesh, one_device
from opensora_jax.parallel.rules import param_shardings
from opensora_jax.training.conditions import CONDITION, ConditionMix
from opensora_jax.training.diffusion import DropoutRatio, FlowConfig, NullText, Objective
from opensora_jax.training.encoders import Encoders, VideoEncoder, in_parts
from tests.inference.fakes import Autoencoder

MIX = ConditionMix.parse({"t2v": 1, "i2v_head": 1, "i2v_loop": 1}, is_causal=True)
VAE = HunyuanVAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=3,
    block_out_channels=(4, 4, 8),
    layers_per_block=1,
    norm_num_groups=2,
    time_compression_ratio=4,
    spatial_compression_ratio=4,
    mid_block_add_attention=False,
    scale_factor=0.7,
    shift_factor=0.1,
)
LENGTH, FRAMES, STEP = 11, 9, 5
EIGHT = MeshConfig(data=2, fsdp=2, seq=2, tensor=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    captions = [f"a synthetic clip, number {i}" for i in range(9)]
    return write_local_encoders(tmp_path_factory.mktemp("encoders") / "text", captions, seed=3, text_length=LENGTH)


@pytest.fixture(scope="module")
def host_batch(folder):
    """Returns a batch of videos and tokens as the loader gives it, with drawn conditions."""
    dataset = ClipDataset(
        "synthetic:64", fps_max=24.0, spatial_unit=8, resize="ffmpeg", cache_bytes=0, max_bad_rate=0.1
    )
    table = dataset.table()
    buckets = Buckets({"32px_ar1:1": {FRAMES: (1.0, 8)}}, spatial_unit=8, fps_max=24.0)
    plan = Plan(table, buckets, seed=0, data_shards=1, small_buckets="drop")
    t5, clip = (load_encoder(kind, section(folder, kind), jnp.float32).tokenizer for kind in ("t5", "clip"))
    source = dataset.source(table, Captions(table["text"], Tokenizers(t5, clip)))
    (batch,) = make_loader(plan, source, start_step=STEP, num_steps=1)
    return MIX.add(batch, seed=0, latent_frames=3)


def section(folder, kind):
    return TextEncoderConfig(str(folder / kind), LENGTH)


class Quick(nnx.Module):
    """An autoencoder that compiles fast: every fourth pixel and frame, mixed over the channels, with noise of 0.1."""

    strides, is_causal, latent_channels = (4, 4, 4), True, 6

    def __init__(self, rngs):
        self.mix = Linear(3, 6, (None, "embed"), rngs=rngs)

    def latent_shape(self, frames, height, width):
        return (frames - 1) // 4 + 1, height // 4, width // 4

    def encode(self, video, keys=None):
        mean = self.mix(video[:, ::4, ::4, ::4])
        return Posterior(mean, jnp.full(mean.shape, 2 * np.log(0.1))).latent(keys)


def make_encoders(folder, mesh, network=Quick):
    graphdef, params = nnx.split(network(rngs=nnx.Rngs(0)))
    codec = Codec(nnx.merge(graphdef, jax.device_put(params, param_shardings(params, mesh))), mesh)
    t5, clip = (load_encoder(kind, section(folder, kind), jnp.float32, mesh) for kind in ("t5", "clip"))
    return Encoders(VideoEncoder(codec, MIX, "mode", seed=0, batch_size=64), t5, clip)


@pytest.fixture(scope="module")
def encoders(folder):
    return make_encoders(folder, one_device())


@pytest.fixture(scope="module")
def encoded(encoders, host_batch):
    return encoders(to_devices(host_batch, one_device()))


def test_the_loss_from_videos_is_the_loss_from_cached_latents_and_texts(folder, host_batch):
    """A cache holds what the codec and `TextEncoders.encode` make."""
    encoders = make_encoders(folder, one_device(), network=partial(HunyuanVAE, VAE))
    encoded = encoders(to_devices(host_batch, one_device()))
    codec, video = encoders.video.codec, host_batch["video"]
    texts = TextEncoders.load(section(folder, "t5"), section(folder, "clip"), jnp.float32)
    captions = [f"a synthetic clip, number {i}" for i in host_batch["sample_id"]]
    cached = dict(zip(("text", "pooled"), texts.encode(captions), strict=True)) | {"latent": codec.encode(video)}
    cached |= {"head": codec.encode(video[:, :1]), "tail": codec.encode(video[:, -1:])}
    cached |= {CONDITION: jnp.asarray(host_batch[CONDITION])}
    null = NullText(*(jnp.asarray(one[0]) for one in texts.encode([""])))
    objective = Objective(FlowConfig("logit_normal", True, None), DropoutRatio(0.3, 0.3), null, MIX, None, True)

    class Model(nnx.Module):
        def __call__(self, x, t, text, pooled, condition, guidance):
            return x + condition.sum(-1, keepdims=True) + text.mean() + pooled.mean()

    draws = objective.draw(cached, jax.random.key(1))
    losses = [objective(Model(), batch, draws)[0] for batch in (encoded, cached)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    for name, value in cached.items():
        np.testing.assert_allclose(encoded[name], value, atol=1e-5, err_msg=name)


def test_few_samples_at_a_time_give_the_same(encoders, host_batch, encoded):
    few = replace(encoders, video=replace(encoders.video, batch_size=3))(to_devices(host_batch, one_device()))
    for name, value in encoded.items():
        np.testing.assert_allclose(few[name], value, atol=1e-5, err_msg=name)


def test_a_batch_keeps_what_the_step_reads_and_loses_what_was_encoded(host_batch, encoded):
    assert encoded.keys() == {"latent", "head", "tail", "text", "pooled", CONDITION, "sample_id", "replaced", "step"}
    np.testing.assert_array_equal(encoded["sample_id"], host_batch["sample_id"])
    assert encoded["latent"].shape == (8, 3, 8, 8, 6)


def test_eight_devices_with_split_networks_give_the_answer_of_one(folder, host_batch, encoded):
    mesh = make_mesh(EIGHT)
    encoders = make_encoders(folder, mesh)
    kernels = [*jax.tree.leaves(encoders.t5.params), *jax.tree.leaves(nnx.state(encoders.video.codec.autoencoder))]
    assert any(not leaf.sharding.is_fully_replicated for leaf in kernels)
    found = encoders(to_devices(host_batch, mesh))
    for name, value in encoded.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)
    expected = encoders.abstract(abstract_batch(host_batch, mesh))
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in expected.items()
    }
    for name, leaf in found.items():  # else the compiled step would not take them
        assert leaf.sharding.is_equivalent_to(expected[name].sharding, leaf.ndim), name


def test_draws_depend_on_seed_step_and_sample_alone(encoders, host_batch, encoded):
    def draw(batch, **options):
        return replace(encoders.video, posterior="sample", **options)(to_devices(batch, one_device()))

    whole = draw(host_batch)
    np.testing.assert_allclose(whole["head"], encoded["head"], atol=1e-6)  # references are modes
    turned = {name: value[::-1] if value.ndim else value for name, value in host_batch.items()}
    np.testing.assert_allclose(draw(turned)["latent"][::-1], whole["latent"], atol=1e-6)
    np.testing.assert_allclose(draw(host_batch, batch_size=3)["latent"], whole["latent"], atol=1e-6)
    others = encoded, draw(host_batch, seed=1), draw(host_batch | {"step": np.asarray(STEP + 1)})
    for other in others:
        assert np.abs(other["latent"] - whole["latent"]).max() > 0.1


def test_parts_hold_equally_many_samples_of_every_shard_and_keep_their_order():
    mesh, sizes = make_mesh(EIGHT), []

    def encode(x, y):
        sizes.append(len(x))
        assert x.sharding.is_equivalent_to(batch_sharding(mesh), x.ndim)
        return x + y

    x = jax.device_put(jnp.arange(48.0).reshape(24, 2), batch_sharding(mesh))
    for batch_size, expected in (24, [24]), (23, [12, 12]), (9, [8, 8, 8]), (1, [4] * 6):
        sizes.clear()
        np.testing.assert_array_equal(in_parts(encode, mesh, batch_size, x, 2 * x), 3 * x)
        assert sizes == expected


CLIPS = np.random.default_rng(0).integers(0, 256, (4, 73, 4, 8, 3), np.uint8)


def shown(weights, drawn, **options):
    """Returns what a fake autoencoder, which keeps every fourth pixel, makes of clips."""
    mix = ConditionMix.parse(weights, options.pop("is_causal", True))
    autoencoder = Autoencoder()
    autoencoder.is_causal = mix.is_causal
    encoder = VideoEncoder(Codec(autoencoder, one_device()), mix, "mode", 0, 64, **options)
    numbers = np.array([NAMES.index(name) for name in drawn], np.int32)
    batch = {"video": CLIPS, CONDITION: numbers, "sample_id": np.arange(4), "step": np.asarray(0)}
    return {name: np.asarray(value) for name, value in encoder(to_devices(batch, one_device())).items()}


def kept(frames):
    return np.asarray(frames, np.float32)[..., ::4, ::4, :] / 127.5 - 1


def test_references_are_encoded_alone_from_the_end_that_each_sample_shows():
    names = ("v2v_head", "v2v_tail", "i2v_head", "v2v_tail_easy")
    found = shown(dict.fromkeys(names, 1), names)
    assert {name: value.shape[1] for name, value in found.items()} == {
        "latent": 19,
        "head": 1,
        "clip9": 9,
        "clip17": 17,
    }
    np.testing.assert_allclose(found["head"], kept(CLIPS[:, :1]), atol=1e-6)
    np.testing.assert_allclose(found["clip9"][0], kept(CLIPS[0, :33:4]), atol=1e-6)
    np.testing.assert_allclose(found["clip9"][1], kept(CLIPS[1, -33::4]), atol=1e-6)
    np.testing.assert_allclose(found["clip17"][3], kept(CLIPS[3, -65::4]), atol=1e-6)


def test_text_to_video_encodes_nothing_but_the_clip():
    assert shown({"t2v": 1}, ["t2v"] * 4).keys() == {"latent"}


def test_padding_repeats_the_shown_image_and_causal_autoencoders_refuse_it():
    names = ("t2v", "i2v_head", "i2v_tail", "i2v_loop")
    found = shown(dict.fromkeys(names, 1), names, is_causal=False, pad_images=True)
    np.testing.assert_allclose(found["latent"][0], kept(CLIPS[0, ::4]), atol=1e-6)
    np.testing.assert_allclose(found["latent"][1, :3], kept(CLIPS[1, [0, 1, 5]]), atol=1e-6)
    np.testing.assert_allclose(found["tail"][2], kept(CLIPS[2, -1:]), atol=1e-6)
    np.testing.assert_allclose(found["tail"][3], kept(CLIPS[3, -7:-6]), atol=1e-6)
    with pytest.raises(ValueError, match="not causal"):
        shown({"i2v_head": 1}, ["i2v_head"] * 4, pad_images=True)
