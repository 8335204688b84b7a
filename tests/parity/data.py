"""Data: sizes by aspect ratio, buckets, the sentences and frame rates of captions, frames of clips and their pixels.

Randomness: the original draws starts of clips from Python's generator, ours follow a mixed seed; what is compared is
that the same start can be drawn and which frames follow from it.
"""

import math
import re
from typing import Any

import numpy as np

from opensora_jax.config.errors import UserError
from opensora_jax.data import text
from opensora_jax.data.media import transforms
from opensora_jax.data.plan import aspect
from opensora_jax.data.plan.buckets import Buckets
from opensora_jax.inference.request import SamplingOption, image_size
from opensora_jax.inference.stage import image_option
from tests.parity.golden import EXACT, Golden, Tolerance, absolute

Column = tuple[Any, ...]


def aspect_ratios(golden: Golden) -> None:
    """Drive `aspect`: sizes of every resolution and ratio, the closest ratio, sizes of sampling."""
    for name, row in golden.rows("get_image_size", ["resolution", "training", "spatial_multiple"]):
        unit = _unit(row["spatial_multiple"])
        pixels = aspect.num_pixels(row["resolution"])
        sizes = aspect.ratio_sizes(pixels, spatial_unit=unit, training=row["training"])
        golden.compare(f"{name}.order_in_dict", list(sizes))
        golden.compare(f"{name}.hw", {ratio: list(sizes[ratio]) if ratio in sizes else None for ratio in row["hw"]})
    for name, row in golden.rows("get_closest_ratio", ["resolution", "h", "w"]):
        ratios = list(aspect.ratio_sizes(aspect.num_pixels(row["resolution"]), spatial_unit=16))
        (best,) = aspect.closest_ratios(np.array([row["h"]]), np.array([row["w"]]), ratios)
        golden.compare(f"{name}.ratio", ratios[best])
    for name, row in golden.rows("sanitize_sampling_option", ["in"]):
        _sampling_size(golden, name, row)
    inputs = ("img_resolution", "aspect_ratio", "resized_resolution")  # the last is the video's resolution
    for name, row in golden.rows("modify_option_to_t2i", inputs):
        shape = {"resolution": row["resized_resolution"], "aspect_ratio": row["aspect_ratio"]}
        image = image_option(SamplingOption(**shape, height=None, width=None, **REST), row["img_resolution"])
        height, width = image_size(image, 16)
        ours = {"height": height, "width": width, "guidance": image.guidance}
        ours |= {"num_frames": image.num_frames, "method": image.method}
        golden.compare_found({f"{name}.{field}": value for field, value in ours.items()}, EXACT)


def _unit(multiple: Any) -> int:
    return 16 if "unset" in str(multiple) else int(multiple)


REST = {  # of the fields that say nothing about the size
    "num_frames": 1,
    "num_steps": 1,
    "shift": True,
    "flow_shift": None,
    "guidance": 1.0,
    "guidance_img": None,
    "text_osci": False,
    "image_osci": False,
    "scale_temporal_osci": False,
    "method": "i2v",
    "seed": None,
}


def _sampling_size(golden: Golden, name: str, row: dict[str, Any]) -> None:
    """Compare a size of sampling; one that the original would round up is refused by us (docs/deviations.md)."""
    given = {side: row["in"].get(side) for side in ("resolution", "aspect_ratio", "height", "width")}
    option = SamplingOption(**given, **REST)
    try:
        size = image_size(option, 16)
    except UserError as error:
        wrong = next(side for side in ("height", "width") if given[side] % 16)
        golden.check(f"{name}: refused with {row[wrong]}", str(row[wrong]) in str(error), True)
        for side in ("height", "width"):
            golden.excuse(f"{name}.{side}", "a size that is not divisible is refused")
        return
    for side, ours in zip(("height", "width"), size, strict=True):
        golden.compare(f"{name}.{side}", ours)


def bucket_tables(golden: Golden) -> None:
    """Drive `buckets`: the buckets of a config with their shapes, and the bucket of every row."""
    inputs = ("config", "bucket_config", "spatial_multiple", "fps_max")
    for name, row in golden.rows("buckets", inputs):
        config = {r: {int(frames): line for frames, line in lines.items()} for r, lines in row["bucket_config"].items()}
        buckets = Buckets(config, spatial_unit=row["spatial_multiple"], fps_max=row["fps_max"])
        found = _bucket_shapes(buckets, row) | {"num_bucket": len(buckets.buckets)}
        *given, theirs = zip(*golden.take(f"{name}.rows_T_H_W_fps_seed_bucket"), strict=True)
        for i, (ours, expected) in enumerate(zip(_assigned(buckets, *given), theirs, strict=True)):
            golden.check(f"{name}.rows[{i}]", ours, expected)
        golden.compare_found({f"{name}.{field}": value for field, value in found.items()}, EXACT)


def _bucket_shapes(buckets: Buckets, row: dict[str, Any]) -> dict[str, Any]:
    """Returns what a row tells of its buckets, in the original's orders: its own, and that of the config."""
    levels = list(enumerate(buckets.levels))
    every = {(b.resolution, b.num_frames, b.aspect_ratio): b for b in buckets.buckets}
    batch = {(b.resolution, b.num_frames): b.batch_size for b in buckets.buckets}
    lines = [(resolution, int(frames)) for resolution, line in row["bucket_config"].items() for frames in line]
    in_order = [b for line in lines for b in buckets.buckets if (b.resolution, b.num_frames) == line]
    asked = [every.get((resolution, frames, ratio)) for resolution, frames, ratio, *_ in row.get("thw", [])]
    head = row.get("bucket_to_shapes_head", [])
    return {
        "buckets_name_frames_id_prob_batchsize": [
            [level.resolution, level.num_frames, i, level.keep, batch[level.resolution, level.num_frames]]
            for i, level in levels
        ],
        "hw_criteria": {level.resolution: level.pixels for _, level in levels},
        "thw": [b and [b.resolution, b.num_frames, b.aspect_ratio, b.num_frames, b.height, b.width] for b in asked],
        "bucket_to_shapes_head": [[b.batch_size, 3, b.num_frames, b.height, b.width] for b in in_order[: len(head)]],
    }


def _assigned(buckets: Buckets, frames: Column, height: Column, width: Column, fps: Column, seeds: Column) -> list:
    """Returns [resolution, frames, ratio] of the bucket of each row, None where it has none.

    Rows have generators of their own, which the seed of a table does not give: where chance plays a part, every row
    is a table of its own.
    """
    columns = {"num_frames": np.array(frames), "height": np.array(height), "width": np.array(width)}
    columns["fps"] = np.array([math.nan if rate is None else rate for rate in fps])
    if all(level.keep >= 1 and (level.skip is None or level.skip >= 1) for level in buckets.levels):
        return _assign(buckets, columns, 0)
    rows = [{name: column[i : i + 1] for name, column in columns.items()} for i in range(len(seeds))]
    return [one for row, seed in zip(rows, seeds, strict=True) for one in _assign(buckets, row, seed)]


def _assign(buckets: Buckets, table: dict[str, np.ndarray], seed: int) -> list:
    try:
        found = buckets.assign(table, seed=seed)
    except UserError as error:  # a table of which nothing fits is refused
        if "samples fits a bucket" in str(error):
            return [None] * len(table["fps"])
        raise
    chosen = [found.buckets[i] if i >= 0 else None for i in found.bucket]
    return [bucket and [bucket.resolution, bucket.num_frames, bucket.aspect_ratio] for bucket in chosen]


def text_and_frames(golden: Golden) -> None:
    """Drive `text_and_frames`: caption suffixes, frame rates, and the frames of a clip."""
    for name, row in golden.rows("add_fps_info_to_text", ["text", "fps"]):
        golden.compare(f"{name}.out", text.add_fps(row["text"], row["fps"]))
    for name, row in golden.rows("add_motion_score_to_text", ["text", "motion_score"]):
        golden.compare(f"{name}.out", text.add_motion_score(row["text"], row["motion_score"]))
    for table in [table for table in golden.values if CHAIN.fullmatch(table)]:
        fps, motion = map(int, CHAIN.fullmatch(table).groups())
        for name, row in golden.rows(table, ["text"]):
            golden.compare(f"{name}.out", text.sampling_text(row["text"], fps=fps, motion_score=motion))
    for name, row in golden.rows("check_fps_added", ["text"]):
        golden.compare(f"{name}.out", text.ends_with_fps(row["text"]))
    _training_text(golden)
    for name, row in golden.rows("map_target_fps", ["fps", "max_fps"]):
        golden.compare(f"{name}.out", list(transforms.target_fps(_rate(row["fps"]), row["max_fps"])))
    inputs = ("total", "num_frames", "interval", "python_random_seed")
    for name, row in golden.rows("temporal_random_crop", inputs):
        _frame_indices(golden, name, row)


CHAIN = re.compile(r"inference_chain_fps(\d+)_motion(\d+)")
NO_LIMIT = 999_999_999  # of the frame rate, as the original writes it


def _rate(fps: float | None) -> float:
    return math.nan if fps is None else fps


def _training_text(golden: Golden) -> None:
    inputs = ("fps", "score_vmafmotion", "fps_max", "vmaf", "text_in")
    for name, row in golden.rows("training_text_dataset", inputs):
        fps, fps_max = _rate(row["fps"]), NO_LIMIT if row["fps_max"] is None else row["fps_max"]
        score = row["score_vmafmotion"] if row["vmaf"] else None
        ours = text.training_text(row["text_in"], fps=fps, fps_max=fps_max, motion_score=score)
        golden.compare(f"{name}.text_out", ours)
        golden.compare(f"{name}.sampling_interval", transforms.target_fps(fps, fps_max)[1])


def _frame_indices(golden: Golden, name: str, row: dict[str, Any]) -> None:
    """Compare the frames of a clip from the start that the original drew."""
    total, count, interval = row["total"], row["num_frames"], row["interval"]
    theirs = row["frame_indices"][0]
    start = transforms.frame_start(total, count, interval, theirs)
    golden.check(f"{name}: start", start, theirs)  # inside the range of starts
    golden.compare(f"{name}.frame_indices", transforms.frame_picks(start, count, interval, total).tolist())


VIDEO_ATOL = Tolerance(1e-5, absolute)  # that of the goldens' README; images are made by Pillow, hence exact


def pixels(golden: Golden) -> None:
    """Drive `transforms`: images and videos scaled and cut to a size, in numbers."""
    for case in golden.about["cases"]:
        name, target = f"out/img{case['img']}", tuple(case["target_hw"])
        image = golden.tensors[f"in/img{case['img']}"]
        clip = np.stack([image, image[::-1], image[:, ::-1]])
        still = transforms.original_pixels(image[None], target, image=True)[0]
        video = transforms.original_pixels(clip, target, image=False)
        golden.compare(f"{name}_pil_resize_crop_uint8", np.round((still + 1) * 127.5).astype(np.uint8))
        golden.compare(f"{name}_transforms_image", _planes(still))
        golden.compare(f"{name}_transforms_video", _planes(video), VIDEO_ATOL)
        golden.compare(f"{name}_video_resize_crop_float", _planes((video + 1) / 2), VIDEO_ATOL)
        if target[0] == target[1]:
            still = transforms.original_center_pixels(image[None], target[0], image=True)[0]
            video = transforms.original_center_pixels(clip, target[0], image=False)
            golden.compare(f"{name}_center_crop_image", _planes(still))
            golden.compare(f"{name}_center_crop_video", _planes(video), VIDEO_ATOL)


def _planes(pixels: np.ndarray) -> np.ndarray:
    return np.moveaxis(pixels, -1, -3)
