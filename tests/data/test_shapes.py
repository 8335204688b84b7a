import csv
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data import shapes
from opensora_jax.data.media.video import probe, read_frames
from opensora_jax.data.media.video_writer import write_video
from opensora_jax.data.shapes import Shape, caption, identify, parse_caption, render

SIZE, FRAMES = 32, 9
SPECS = shapes.all_specs()
RED_CIRCLE = Shape("circle", "red", "right", "dark")


@pytest.fixture(scope="module")
def decoded(tmp_path_factory) -> list[np.ndarray]:
    """Every scene once, through H.264 and back."""
    folder = tmp_path_factory.mktemp("clips")

    def through_h264(spec: Shape) -> np.ndarray:
        path = write_video(folder / f"{SPECS.index(spec)}.mp4", render(spec, 5, SIZE, FRAMES), 8, crf=12)
        return read_frames(path, probe(path), picks=np.arange(FRAMES))

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(through_h264, SPECS))


def blurred(video: np.ndarray) -> np.ndarray:
    """A Gaussian of one pixel's width."""
    weights = np.exp(-(np.arange(-3, 4) ** 2) / 2)
    weights /= weights.sum()
    padded = np.pad(video.astype(float), ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    rows = sum(w * padded[:, i : i + SIZE] for i, w in enumerate(weights))
    return np.round(sum(w * rows[:, :, i : i + SIZE] for i, w in enumerate(weights))).astype(np.uint8)


def accuracy(videos: list[np.ndarray]) -> dict[str, float]:
    found = [identify(video) for video in videos]
    names = ("shape", "color", "direction", "background")
    return {n: np.mean([f[n] == getattr(s, n) for f, s in zip(found, SPECS, strict=True)]) for n in names}


def test_the_check_is_right_on_clips_that_went_through_h264(decoded):
    right = accuracy(decoded)
    assert right["color"] == right["direction"] == right["background"] == 1
    assert right["shape"] >= 0.98


def test_the_check_is_right_on_blurred_clips(decoded):
    right = accuracy([blurred(video) for video in decoded])
    assert right["color"] == right["direction"] == right["background"] == 1
    assert right["shape"] >= 0.95


def test_the_check_is_right_on_noisy_clips(decoded):
    rng = np.random.default_rng(0)
    noisy = [np.clip(v + rng.normal(0, 10, v.shape), 0, 255).astype(np.uint8) for v in decoded]
    assert min(accuracy(noisy).values()) >= 0.98


def test_a_clip_of_nothing_shows_nothing():
    nothing = {"shape": None, "color": None, "direction": None, "background": "gray"}
    assert identify(np.full((5, 23, 29, 3), 150, np.uint8)) == nothing


def test_a_shape_at_rest_has_no_direction():
    clip = render(RED_CIRCLE, 0, SIZE, FRAMES)
    assert identify(np.repeat(clip[:1], FRAMES, 0)) == {**vars(RED_CIRCLE), "direction": None}


def test_a_clip_played_backwards_shows_the_opposite_direction():
    for way, opposite in (("right", "left"), ("up", "down")):
        clip = render(Shape("square", "blue", way, "gray"), 2, SIZE, FRAMES)
        assert identify(clip[::-1])["direction"] == opposite


def test_rendering_is_a_pure_function_of_spec_and_seed():
    np.testing.assert_array_equal(render(RED_CIRCLE, 3, 32, 5), render(RED_CIRCLE, 3, 32, 5))
    assert (render(RED_CIRCLE, 3, 32, 5) != render(RED_CIRCLE, 4, 32, 5)).any()


def test_shapes_have_the_stated_size_path_and_stay_in_view():
    for spec in SPECS[::5]:
        clip = render(spec, 1, SIZE, FRAMES).astype(int)
        ground = np.array(shapes.BACKGROUNDS[spec.background])
        assert (clip[:, [0, -1]] == ground).all(), spec
        assert (clip[:, :, [0, -1]] == ground).all(), spec
        cover = ((clip - ground) / (np.array(shapes.COLORS[spec.color]) - ground)).mean(-1)
        radius = np.sqrt(cover.sum((1, 2)) / np.pi) / SIZE
        assert ((radius > shapes.RADIUS[0] - 0.005) & (radius < shapes.RADIUS[1] + 0.005)).all(), spec
        y, x = (np.mgrid[:SIZE, :SIZE][i] for i in (0, 1))
        path = np.array([((x * c).sum(), (y * c).sum()) / c.sum() for c in cover]) / SIZE
        moved = path[-1] - path[0]
        along = moved @ np.array(shapes.DIRECTIONS[spec.direction])
        assert shapes.TRAVEL[0] - 0.01 < along < shapes.TRAVEL[1] + 0.01, spec
        assert abs(moved).sum() == pytest.approx(along, abs=0.01), spec


def test_a_triangle_points_up():
    frame = render(Shape("triangle", "red", "up", "dark"), 0, SIZE, 3)[0]
    widths = (frame[..., 0] > 120).sum(1)
    widths = widths[widths > 0]
    assert (np.diff(widths) >= 0).all()
    assert widths[-1] > 3 * widths[0]


def test_held_out_scenes_cover_every_value_evenly():
    held_out = shapes.held_out_specs()
    assert len(SPECS) == len(set(SPECS)) == 144
    assert len(set(held_out)) == 24
    assert set(held_out) <= set(SPECS)
    for name, count in (("shape", 8), ("color", 4), ("direction", 6), ("background", 12)):
        assert set(Counter(getattr(spec, name) for spec in held_out).values()) == {count}


def test_a_caption_says_the_scene():
    assert caption(RED_CIRCLE) == "a red circle moves to the right on a dark background"
    assert [parse_caption(caption(spec)) for spec in SPECS] == SPECS


@pytest.mark.parametrize("text", ["", "a red circle", "a red blue circle moves up on a dark background"])
def test_a_caption_of_another_kind_is_no_scene(text):
    assert parse_caption(text) is None


def test_the_set_holds_out_its_scenes_and_is_reused(tmp_path):
    output = shapes.write_dataset(tmp_path / "set", 7, 16, 3, 8, 0)
    with (output / "captions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(list((output / "videos").iterdir())) == 7
    held_out = set(shapes.held_out_specs())
    assert not held_out & {parse_caption(row["text"]) for row in rows}
    with (output / "held_out.csv").open() as file:
        held = list(csv.DictReader(file))
    assert Counter(parse_caption(row["text"]) for row in held) == dict.fromkeys(held_out, 2)
    assert (output / "prompts.txt").read_text().splitlines() == [caption(s) for s in shapes.held_out_specs()]
    info = probe(output / rows[3]["path"])
    assert (info.num_frames, info.height, info.width, info.fps) == (3, 16, 16, 8)

    stamp = (output / rows[0]["path"]).stat().st_mtime_ns
    shapes.write_dataset(output, 7, 16, 3, 8, 0)
    assert (output / rows[0]["path"]).stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="delete it or choose another"):
        shapes.write_dataset(output, 7, 16, 3, 8, 1)


def test_an_unfinished_set_is_finished_with_the_same_files(tmp_path):
    output = shapes.write_dataset(tmp_path, 2, 16, 3, 8, 0)
    clip = (output / "videos/00001.mp4").read_bytes()
    manifest = json.loads((output / "manifest.json").read_text())
    for name in ("manifest.json", "videos/00001.mp4"):
        (output / name).unlink()
    shapes.write_dataset(tmp_path, 2, 16, 3, 8, 0)
    assert (output / "videos/00001.mp4").read_bytes() == clip
    assert json.loads((output / "manifest.json").read_text()) == manifest


@pytest.mark.parametrize(("size", "frames"), [(47, 9), (8, 9), (48, 1)])
def test_sizes_that_cannot_be_written_are_refused(tmp_path, size, frames):
    with pytest.raises(UserError, match=f"size={size} frames={frames}"):
        shapes.write_dataset(tmp_path, 3, size, frames, 8, 0)
    assert list(tmp_path.iterdir()) == []
