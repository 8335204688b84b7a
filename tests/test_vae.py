"""The vae command on clips and an autoencoder of known results: what it writes, what it makes again, and who does."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pyarrow.csv import read_csv

from opensora_jax import vae
from opensora_jax.config.build import build
from opensora_jax.config.errors import UserError
from opensora_jax.config.flag import load_config
from opensora_jax.data.cache.cache_key import Identity
from opensora_jax.data.cache.latents import LatentCache
from opensora_jax.data.media import video
from opensora_jax.data.plan.buckets import Bucket
from opensora_jax.inference import outputs
from opensora_jax.models.codec import Codec
from opensora_jax.models.lpips import LPIPS, LPIPSConfig
from opensora_jax.parallel.mesh import one_device
from opensora_jax.training.perceptual import FrameDistance
from opensora_jax.weights.pretrained import AUTOENCODERS, parse_model
from tests.inference.fakes import Autoencoder, Clips, clip_of, clip_table

FOLDER = Path("configs/vae/inference")
PRESETS = ("demo", "flux_ae", "hunyuanvideo_vae", "opensora_v12", "video_dc_ae")
ALONE = (0, 1)
SMALL, LARGE = Bucket("8px", "1:1", 5, 8, 8, 1), Bucket("16px", "1:1", 5, 20, 16, 1)
IMAGE = Bucket("16px", "1:1", 1, 16, 16, 1)
ROWS = [(SMALL, 0), (SMALL, 2), (SMALL, 3), (LARGE, 1), (LARGE, 4), (IMAGE, 15), (IMAGE, 16)]
DISTANCE = FrameDistance.on(LPIPS(LPIPSConfig((2, 3, 3, 5, 5)), rngs=nnx.Rngs(0)), one_device())


class Lossy(Autoencoder):
    """Keeps every fourth pixel and frame; what it has of a black clip is infinite."""

    def encode(self, video, keys=None):
        black = (video < -0.99).all((1, 2, 3, 4), keepdims=True)
        return super().encode(video) / jnp.where(black, 0.0, 1.0)


class Some(Clips):
    """Clips of noise, but a black one, row 3."""

    def read(self, sample_id, bucket, seed):
        clip = super().read(sample_id, bucket, seed)["video"]
        return {"video": np.zeros_like(clip) if sample_id == 3 else clip}


def settings(folder, **changes):
    config = load_config(FOLDER / "demo.py").unlock()
    config.save_dir, config.encode.batch_size, config.encode.shard_clips = str(folder), 2, 2
    return replace(build(vae.VAEConfig, config, "config"), **changes)


def make_work(folder, *, rows=ROWS, table=None, distance=None, model="hunyuan_vae", **clips):
    config = settings(folder)
    config = replace(config, model=config.model | {"type": model})
    table = clip_table() if table is None else table
    digests = {"autoencoder weights": "w", "clips": str(rows)}
    identity = Identity(digests, {"dtype": "float32", "encode.posterior": "mode"})
    return vae.Work(config, Codec(Lossy(), one_device()), table, Some(table, **clips), rows, identity, distance)


def made(folder):
    """Returns the files of reconstructions with their times."""
    paths = (folder / "reconstructions").iterdir()
    return {path.name: path.stat().st_mtime_ns for path in paths if path.suffix in (".mp4", ".png")}


def preset(name, folder=None):
    config = load_config(FOLDER / f"{name}.py")
    if folder:
        config.folder = folder
    return build(vae.VAEConfig, config, "config")


def test_every_file_of_the_folder_is_a_preset_whose_weights_lie_in_its_folder():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(PRESETS)
    for name in PRESETS:
        assert preset(name, "elsewhere").model["from_pretrained"].startswith("elsewhere/")


@pytest.mark.parametrize(
    ("name", "parameters", "frames"),
    [
        ("hunyuanvideo_vae", 246_478_803, 25),
        ("flux_ae", 83_819_683, 1),
        ("opensora_v12", 393_341_007, 15),
        ("video_dc_ae", 459_462_147, 24),
    ],
)
def test_presets_have_the_published_number_of_parameters_and_clips_that_come_back(name, parameters, frames):
    config = preset(name)
    module, fields = parse_model(config.model, AUTOENCODERS, "config.model")
    model = nnx.eval_shape(lambda: module(fields, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters
    (lengths,) = config.bucket_config.values()
    assert [model.latent_shape(length, 512, 512)[0] for length in lengths] == [frames]
    assert all(map(model.gives_back, lengths))


def test_reconstructions_stand_beside_their_clips_in_a_table_with_totals(tmp_path, capsys):
    assert vae.reconstruct(make_work(tmp_path, distance=DISTANCE, broken=(4,)), ALONE) == tmp_path
    said = capsys.readouterr()
    assert "reconstruct: 100%" in said.err
    assert "7/7" in said.err
    table = read_csv(tmp_path / "reconstructions.csv")
    assert table["row"].to_pylist() == [0, 1, 2, 15, 16, None, None]
    assert table["path"].to_pylist()[-3:] == ["/clips/16.mp4", "mean", "worst"]
    for measure, missing in (("psnr_db", [False] * 5), ("ssim", [True, False, True, False, False])):
        assert [value is None for value in table[measure].to_pylist()[:5]] == missing  # rows 0 and 2 are small
    assert [value is None for value in table["lpips"].to_pylist()] == [True, False, True, False, False, False, False]
    summary = json.loads((tmp_path / "reconstructions.json").read_text())
    assert (summary["clips"], summary["left_out"]) == (5, 2)
    psnr = table["psnr_db"].to_pylist()
    assert psnr[-2:] == [pytest.approx(summary["psnr_db"]), pytest.approx(summary["psnr_db_worst"])]
    assert psnr[-2:] == [pytest.approx(np.mean(psnr[:5])), min(psnr[:5])]

    header, *lines = said.out.splitlines()
    assert header.split() == ["clip", "frames", "size", "psnr_db", "ssim", "lpips"]
    assert [line.split()[0] for line in lines[:7]] == ["0.mp4", "1.mp4", "2.mp4", "15.mp4", "16.mp4", "mean", "worst"]
    assert "5 clips, source on the left; psnr_db" in lines[7]
    assert lines[8:] == [
        "  left out: 1 of the clips: its latent or its reconstruction is NaN or infinite (/clips/3.mp4)",
        "  left out: 1 of the clips: broken in 0 places (/clips/4.mp4)",
    ]
    clip, image = (tmp_path / "reconstructions" / table["file"][i].as_py() for i in (1, 3))
    info = video.probe(clip)
    assert (info.height, info.width, info.num_frames, info.fps) == (20, 32, 5, 8)
    sides, source = outputs.read(image)[0], clip_of(15, IMAGE)[0]  # a PNG has every bit
    np.testing.assert_array_equal(sides[:, :16], source)
    np.testing.assert_array_equal(sides[:, 16:], source[::4, ::4].repeat(4, 0).repeat(4, 1))


def test_a_second_run_makes_what_is_missing_and_says_the_same(tmp_path, capsys):
    vae.reconstruct(make_work(tmp_path), ALONE)
    before, said = made(tmp_path), capsys.readouterr().out
    work = make_work(tmp_path)
    vae.reconstruct(work, ALONE)
    assert capsys.readouterr().out == said
    assert made(tmp_path) == before
    assert work.source.asked == [3]  # only the one that was left out is tried again
    next((tmp_path / "reconstructions").glob("1_*.mp4")).unlink()
    work = make_work(tmp_path)
    vae.reconstruct(work, ALONE)
    assert sorted(work.source.asked) == [1, 3]
    assert capsys.readouterr().out == said


def test_one_more_clip_another_order_or_another_caption_makes_no_other_clip_again(tmp_path):
    vae.reconstruct(make_work(tmp_path, rows=ROWS[:2]), ALONE)
    work = make_work(tmp_path)  # as with another num_samples
    vae.reconstruct(work, ALONE)
    assert sorted(work.source.asked) == [1, 3, 4, 15, 16]
    table = clip_table().slice(2)  # what were rows 2 and 4 are 0 and 2 now
    table = table.set_column(table.column_names.index("text"), "text", [["new"] * len(table)])
    work = make_work(tmp_path, table=table, rows=[(SMALL, 0), (LARGE, 2)])
    vae.reconstruct(work, ALONE)
    assert work.source.asked == []
    lines = read_csv(tmp_path / "reconstructions.csv")
    assert lines["row"].to_pylist()[:2] == [0, 2]
    assert lines["text"].to_pylist()[:2] == ["new", "new"]


def test_what_a_reconstruction_depends_on_makes_it_again(tmp_path):
    work = make_work(tmp_path)
    key = work.key(*ROWS[3])
    assert make_work(tmp_path, rows=ROWS[3:]).key(*ROWS[3]) == key
    other = Identity({"autoencoder weights": "w", "clips": "x"}, {"dtype": "float32", "encode.posterior": "sample"})
    assert replace(work, identity=other).key(*ROWS[3]) == key
    table = clip_table()
    touched = table.set_column(table.column_names.index("mtime_ns"), "mtime_ns", [[2] * len(table)])
    for changed in (
        make_work(tmp_path, distance=DISTANCE),
        make_work(tmp_path, table=touched),
        replace(work, identity=Identity({"autoencoder weights": "v"}, other.settings)),
        replace(work, identity=Identity(other.digests, {"dtype": "bfloat16"})),
    ):
        assert changed.key(*ROWS[3]) != key
    assert work.key(LARGE, 0) != work.key(SMALL, 0)


@pytest.mark.parametrize("letter", ["x", "雨"])
def test_files_of_a_clip_with_a_long_name_have_a_shorter_one(tmp_path, letter):
    name = (letter * 250).encode()[:250].decode(errors="ignore")
    table = clip_table()
    table = table.set_column(table.column_names.index("path"), "path", [[f"/clips/{name}{row}" for row in range(23)]])
    work = make_work(tmp_path, table=table, rows=ROWS[:2])
    vae.reconstruct(work, ALONE)
    assert work.stem(*ROWS[0]).startswith(letter * (150 // len(letter.encode())) + "_")
    assert len(made(tmp_path)) == 2
    same = make_work(tmp_path).stem(*ROWS[0])
    assert same.startswith("0_")


def test_the_distance_is_measured_when_its_weights_come_later(tmp_path):
    vae.reconstruct(make_work(tmp_path), ALONE)
    assert read_csv(tmp_path / "reconstructions.csv")["lpips"].null_count == 8
    vae.reconstruct(make_work(tmp_path, distance=DISTANCE), ALONE)
    assert read_csv(tmp_path / "reconstructions.csv")["lpips"].null_count == 2


def test_no_reconstruction_at_all_is_an_error_with_the_reasons(tmp_path):
    work = make_work(tmp_path, broken=range(23), rows=ROWS[:3])
    with pytest.raises(UserError, match="none of the 3 clips could be reconstructed: 2 of the clips: broken in 0 "):
        vae.reconstruct(work, ALONE)


@pytest.mark.parametrize("verb", [vae.encode, vae.reconstruct, vae.stats])
def test_processes_share_the_clips_and_the_last_one_finishes(tmp_path, capsys, verb):
    verb(make_work(tmp_path / "whole"), ALONE)
    capsys.readouterr()
    works = [make_work(tmp_path / "shared") for _ in range(2)]
    assert verb(works[1], (1, 2)) is None
    assert "still to come" in capsys.readouterr().out
    assert not list((tmp_path / "shared").glob("*.json"))
    assert verb(works[0], (0, 2)) == tmp_path / "shared"
    asked = [set(work.source.asked) for work in works]
    assert asked[0].isdisjoint(asked[1])
    assert asked[0] | asked[1] == {row for _, row in ROWS}
    if verb == vae.encode:
        return
    for path in (tmp_path / "whole").glob("*.*"):
        shared = (tmp_path / "shared" / path.name).read_text()
        if path.name == "stats.json":
            whole, shared = json.loads(path.read_text()), json.loads(shared)
            assert shared.keys() == whole.keys()
            for name in whole:
                np.testing.assert_allclose(shared[name], whole[name], rtol=1e-6)
        else:
            assert shared == path.read_text()
    said = capsys.readouterr().out
    verb(make_work(tmp_path / "shared"), (1, 2))  # both finish again: nothing waits for another
    assert capsys.readouterr().out == said


def test_encoding_leaves_the_latents_of_the_clips_that_have_any(tmp_path):
    assert vae.encode(make_work(tmp_path), ALONE) == tmp_path
    cache = LatentCache(tmp_path / "latents")
    assert sorted(cache.index["sample_id"].to_pylist()) == [0, 1, 2, 4, 15, 16]
    assert cache.left_out == [("/clips/3.mp4", "its latent is NaN or infinite")]


def latents_of(*pairs):
    """Returns the latents of clips as one array of positions x channels."""
    clips = [clip_of(row, bucket)[::4, ::4, ::4] / 127.5 - 1 for bucket, row in pairs]
    return np.concatenate([clip.reshape(-1, 3) for clip in clips])


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("hunyuan_vae", {"shift_factor", "scale_factor"}),
        ("opensora_vae", {"shift", "scale"}),
        ("dc_ae", {"scaling_factor"}),
    ],
)
def test_statistics_are_exact_over_the_clips_that_have_a_latent(tmp_path, capsys, model, fields):
    assert vae.stats(make_work(tmp_path, broken=(0, 16), model=model), ALONE) == tmp_path
    found = json.loads((tmp_path / "stats.json").read_text())
    assert found.keys() == {"mean", "std", "clips"} | fields
    assert found["clips"] == 4
    latents = latents_of(*(pair for pair in ROWS if pair[1] in (1, 2, 4, 15)))
    np.testing.assert_allclose(found["mean"], latents.mean(0), atol=1e-6)
    np.testing.assert_allclose(found["std"], latents.std(0), rtol=1e-5)
    said = capsys.readouterr()
    assert "latent statistics: 100%" in said.err
    assert "3 channels over 4 clips" in said.out
    assert "left out: 1 of the clips: its latent is NaN or infinite (/clips/3.mp4)" in said.out
    assert "left out: 2 of the clips: broken in 0 places (/clips/0.mp4, /clips/16.mp4)" in said.out


def test_no_latent_at_all_is_an_error_with_the_reasons(tmp_path):
    with pytest.raises(UserError, match="none of the 7 clips has a latent to measure: 4 of the clips: broken in 0 "):
        vae.stats(make_work(tmp_path, broken=range(23)), ALONE)
    assert not (tmp_path / "stats.json").exists()


def test_statistics_continue_from_what_a_killed_run_summed_up(tmp_path, capsys):
    vae.stats(make_work(tmp_path / "whole", broken=(2,)), ALONE)
    said = capsys.readouterr().out

    def dying(sample_id, *rest):
        if sample_id == 15:
            raise KeyboardInterrupt
        return Some.read(work.source, sample_id, *rest)

    work = make_work(tmp_path / "killed", broken=(2,))
    work.source.read = dying
    with pytest.raises(KeyboardInterrupt):
        vae.stats(work, ALONE)
    assert not (tmp_path / "killed" / "stats.json").exists()
    work = make_work(tmp_path / "killed", broken=(2,))
    vae.stats(work, ALONE)
    assert set(work.source.asked) == {15, 16}
    assert (tmp_path / "killed" / "stats.json").read_text() == (tmp_path / "whole" / "stats.json").read_text()
    assert capsys.readouterr().out.replace("killed", "whole") == said
    other = replace(make_work(tmp_path / "killed"), identity=Identity({}, {}))
    vae.stats(other, ALONE)
    assert len(other.source.asked) == 7  # sums of other clips, weights or settings are not continued
