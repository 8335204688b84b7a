"""Presets, what a request is made of, what is refused before weights are read, and text to image to video."""

import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from opensora_jax import sample
from opensora_jax.config.build import build
from opensora_jax.config.errors import UserError
from opensora_jax.config.flag import load_config
from opensora_jax.diffusion.guidance import count_passes, plan_steps
from opensora_jax.inference import outputs
from opensora_jax.inference.pipeline import Pipeline
from opensora_jax.inference.prompt import TextEncoders
from opensora_jax.inference.prompt_list import Prompt
from opensora_jax.inference.request import Request
from opensora_jax.inference.stage import Stage
from opensora_jax.parallel.mesh import one_device
from opensora_jax.weights.pretrained import AUTOENCODERS, DENOISERS, parse_model
from opensora_jax.weights.rename import published_shapes
from tests.inference.fakes import Autoencoder, encode_text

GOLDENS = Path(__file__).parent / "goldens"
FOLDER = Path("configs/diffusion/inference")
PRESETS = ["demo", "256px", "768px", "t2i2v_256px", "t2i2v_768px", "high_compression"]


def preset(name, **changes):
    """Returns the config of a preset; `section__field` names a field of a section."""
    config = load_config(FOLDER / f"{name}.py").unlock()
    config.mesh = {"data": 1, "fsdp": 1, "seq": 1, "tensor": -1, "seq_method": "ulysses"}
    for path, value in changes.items():
        *sections, field = path.split("__")
        holder = config
        for section in sections:
            holder = holder[section]
        holder[field] = value
    return config


def parsed(name, **changes):
    return build(sample.SampleConfig, preset(name, **changes), "config")


def test_every_file_of_the_folder_is_a_preset_that_builds():
    assert {path.stem for path in FOLDER.glob("*.py")} >= set(PRESETS)
    for name in PRESETS:
        config = parsed(name)
        parse_model(config.model, DENOISERS, "config.model")
        assert config.use_t2i2v == (config.image_stage is not None) == (config.cond_type == "i2v_head")


def abstract_params(section, kinds):
    module, config = parse_model(section, kinds, "config.model")
    return nnx.state(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))), nnx.Param)


@pytest.mark.parametrize(
    ("name", "section", "manifest"),
    [("256px", "model", "opensora_v2_mmdit_11b"), ("t2i2v_256px", "img_flux", "flux1_dev_image_model")],
)
def test_denoisers_have_the_published_shapes(name, section, manifest):
    params = abstract_params(getattr(parsed(name), section), DENOISERS)
    published = json.loads((GOLDENS / f"{manifest}.json").read_text())["state_dict"]
    assert published_shapes("mmdit", params) == {key: tuple(shape) for key, shape in published.items()}


@pytest.mark.parametrize(
    ("name", "section", "kinds", "parameters"),
    [
        ("256px", "model", DENOISERS, 11_891_390_528),
        ("t2i2v_768px", "img_flux", DENOISERS, 11_901_408_320),
        ("high_compression", "model", DENOISERS, 11_891_971_200),
        ("768px", "ae", AUTOENCODERS, 246_478_803),
    ],
)
def test_networks_have_the_published_number_of_parameters(name, section, kinds, parameters):
    params = abstract_params(getattr(parsed(name), section), kinds)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize(("condition", "passes"), [("t2v", 80), ("i2v_head", 110), ("i2v_loop", 110)])
def test_fifty_steps_of_the_preset_need_80_or_110_passes(condition, passes):
    option = parsed("256px").sampling_option
    assert count_passes(plan_steps(option.guidance_config, option.num_steps, condition, latent_frames=33)) == passes


def test_prompts_of_the_preset_end_as_the_published_weights_know_them():
    config = parsed("256px", num_sample=2, sampling_option__seed=0)
    (first, stem, prompt), (second, second_stem, _) = sample.make_requests(config, [Prompt("raining, sea", 3)])
    assert first == Request("raining, sea. 24 FPS. 4 motion score.", index=3, seed=0)
    assert (stem, prompt) == ("0003_raining-sea", "raining, sea")
    assert (second.seed, second_stem) == (1, "0003_raining-sea_1")
    config = parsed("256px", fps_save=23.976)
    assert " 23.976 FPS." in sample.make_requests(config, [Prompt("x", 0)])[0][0].prompt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"motion_score": "dynamic"}, r"motion_score is a whole number from 1 to 15, or None: got 'dynamic'"),
        ({"motion_score": "0"}, "motion_score"),
        ({"num_sample": 0}, "num_sample is at least 1"),
        ({"fps_save": 0.0}, "fps_save above 0"),
        ({"use_t2i2v": True}, "use_t2i2v needs img_flux, img_flux_ae and img_resolution"),
        ({"sampling_option__resolution": "256px_ar16:9"}, r"resolution takes no '_ar16:9'.*Use 256px"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        parsed("256px", **changes)


def test_text_to_image_to_video_has_one_condition():
    with pytest.raises(UserError, match="cond_type is i2v_head then: got 't2v'"):
        parsed("t2i2v_256px", cond_type="t2v")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cond_type": "v2v_head_half"}, r"Unknown cond_type 'v2v_head_half'.* nearest first: v2v_head"),
        ({"cond_type": "i2v_head", "sampling_option__guidance_img": None}, "needs guidance_img"),
        ({"cond_type": "i2v_head", "sampling_option__num_frames": 1}, "an image has no frames to be given"),
        ({"cond_type": "v2v_head_easy", "sampling_option__num_frames": 33}, "gives 17 latent frames, the video has 9"),
        ({"cond_type": "i2v_head", "model__cond_embed": False}, "config.model.cond_embed is False"),
        ({"cond_type": "i2v_head"}, r"i2v_head needs a reference: 'a' has none"),
        ({"sampling_option__num_frames": 128}, r"1 \+ 4 n frames: got 128: use 125 or 129"),
        ({"sampling_option__aspect_ratio": "7:5"}, r'no aspect ratio "7:5"'),
        ({"model__in_channels": 128}, r"in_channels is 128, but the latents of config.ae need 64"),
        ({"batch_size": 0}, "batch_size"),
        ({"dtype": "bf16"}, "dtype is one of float32, bfloat16: got 'bf16'"),
        ({}, r"config.model.from_pretrained: there is no file or folder './ckpts/Open_Sora_v2.safetensors'"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        sample.check(parsed("256px", **changes), [Request("a", 0, 0)])
    assert "\n" not in str(caught.value)


def test_an_unknown_autoencoder_is_refused_with_those_that_there_are():
    config = preset("256px")
    config.ae.type = "vae"
    with pytest.raises(
        UserError, match=r"config\.ae\.type is one of hunyuan_vae, flux_ae, dc_ae, opensora_vae: got 'vae'"
    ):
        sample.check(build(sample.SampleConfig, config, "config"), [Request("a", 0, 0)])


@dataclass(frozen=True)
class Config:
    patch_size: int = 2
    cond_embed: bool = True
    guidance_embed: bool = False


class Denoiser(nnx.Module):
    """A velocity that depends on the text and on the mask."""

    def __init__(self):
        self.config = Config()
        self.gain = nnx.Param(jnp.float32(0.5))

    def __call__(self, x, t, text, pooled, condition, guidance):
        mask = condition[..., :1] * text.sum((1, 2))[:, None, None, None, None]
        return self.gain[...] * jnp.sin(x + pooled.sum(1)[:, None, None, None, None] + mask)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Returns `run(**changes)`: text to image to video of two prompts, and the networks that it loaded."""
    (tmp_path / "weights").mkdir()
    loaded = []
    mesh = one_device()

    def load(stage, encode, _, dtype, sizes):
        assert all(network() is None for _, network in loaded), "two networks are in memory"
        pipeline = Pipeline(Denoiser(), Autoencoder(), encode, mesh, *sizes)
        loaded.append((stage.denoiser.name, weakref.ref(pipeline.denoiser)))
        return pipeline

    monkeypatch.setattr(Stage, "load", load)
    monkeypatch.setattr(TextEncoders, "load", lambda *_: SimpleNamespace(encode=encode_text))
    monkeypatch.setattr(sample, "read_shape", lambda *_: SimpleNamespace(width=64))

    def run(prompts=("a red circle", "a blue square"), ref=None, **changes):
        config = preset("demo", save_dir=str(tmp_path / "samples"), add_fps_to_text=True, batch_size=2)
        for name in ("model", "ae", "t5", "clip"):
            config[name].from_pretrained = str(tmp_path / "weights")
        config.sampling_option.num_steps, config.sampling_option.guidance_img = 3, 2.0
        config.cond_type, config.use_t2i2v, config.img_resolution = "i2v_head", True, "32px"
        config.img_flux, config.img_flux_ae = config.model.to_dict(), config.ae.to_dict()
        config.update(changes)
        given = SimpleNamespace(config=config, prompt=list(prompts), prompts=None, ref=ref)
        monkeypatch.setattr(sample, "flags", SimpleNamespace(FLAGS=given))
        loaded.clear()
        folder = sample.main([])
        return folder, [name for name, _ in loaded]

    return run


def read(folder, name):
    return outputs.read(folder / name).astype(int)


def test_every_video_begins_with_the_image_of_its_prompt(command):
    folder, loaded = command()
    assert loaded == ["img_flux", "model"]
    for stem in ("0000_a-red-circle", "0001_a-blue-square"):
        (image,) = read(folder, f"{stem}_image.png")
        video = read(folder, f"{stem}.mp4")
        assert image.std() > 50  # blocks of many colours, which H.264 keeps at half their resolution
        assert 4 * abs(video[0] - image).mean() < abs(video[-1] - image).mean()
    records = json.loads((folder / "samples.json").read_text())["samples"]
    assert [record["file"] for record in records] == ["0000_a-red-circle.mp4", "0001_a-blue-square.mp4"]
    assert records[0]["text"] == "a red circle. 8 FPS."
    assert json.loads((folder / "0000_a-red-circle_image.json").read_text())["text"] == "a red circle"


def test_text_to_image_to_video_is_the_same_in_any_batch(command, tmp_path):
    large, _ = command()
    small, _ = command(batch_size=1, save_dir=str(tmp_path / "small"))
    for name in ("0000_a-red-circle", "0001_a-blue-square"):
        assert abs(read(large, f"{name}_image.png") - read(small, f"{name}_image.png")).max() <= 1
        assert abs(read(large, f"{name}.mp4") - read(small, f"{name}.mp4")).mean() < 1


def test_a_second_run_makes_what_is_missing_or_was_made_otherwise(command):
    folder, _ = command()
    assert command()[1] == []
    (folder / "0001_a-blue-square.mp4").unlink()
    assert command()[1] == ["model"]
    (folder / "0001_a-blue-square_image.png").unlink()
    assert command()[1] == []  # nothing is missing that was asked for
    assert command(motion_score="7")[1] == ["img_flux", "model"]  # one image is gone
    assert command(motion_score="8")[1] == ["model"]
    before = json.loads((folder / "0000_a-red-circle.json").read_text())["key"]
    assert command(motion_score="8", img_resolution="40px")[1] == ["img_flux", "model"]
    assert json.loads((folder / "0000_a-red-circle.json").read_text())["key"] != before


def test_text_to_image_to_video_takes_no_reference_and_no_size_in_pixels(command, tmp_path):
    image = tmp_path / "a.png"
    image.touch()
    with pytest.raises(UserError, match="makes the first frame: leave out --ref"):
        command(ref=str(image))
    by_size = {"resolution": None, "aspect_ratio": None, "height": 32, "width": 32}
    with pytest.raises(UserError, match=r"use_t2i2v needs sampling_option.resolution and aspect_ratio"):
        command(sampling_option=by_size)
    assert not (tmp_path / "samples").exists()
