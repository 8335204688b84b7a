"""How far ffmpeg's scaling is from the original's arithmetic: `python benchmarks/resize.py --folder=DIR`.

Every video and image of the folder is scaled to its ratio's size in a resolution, once by ffmpeg (bicubic,
antialiased; what the loader does) and once at full size into `original_pixels`. The first frame of each video is
compared as an image too. Times are CPU seconds, decoding included. The last lines show aliasing: what is left of the
contrast of stripes that are too fine for the smaller frame, which should be nothing.
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np

from opensora_jax.data.media.transforms import original_pixels, resize_and_crop
from opensora_jax.data.media.video import VideoInfo, probe, read_frames
from opensora_jax.data.media.video_writer import write_video
from opensora_jax.data.plan.aspect import closest_ratios, num_pixels, ratio_sizes

STRIPES = (720, 1280, 3)  # height and width of the video of stripes, and their period in pixels


def bucket_size(info: VideoInfo, resolution: str) -> tuple[int, int]:
    """Returns the size of the resolution whose ratio is the file's."""
    sizes = ratio_sizes(num_pixels(resolution), spatial_unit=16)
    (best,) = closest_ratios(np.array([info.height]), np.array([info.width]), list(sizes))
    return list(sizes.values())[best]


def both(path: Path, info: VideoInfo, picks: np.ndarray, target: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Returns the pixels in 0 .. 255 by ffmpeg and by the original's arithmetic, and the CPU seconds that each took."""
    image = info.num_frames == 1
    size, crop = resize_and_crop(info.height, info.width, target, image=image)
    times = [sum(os.times()[:4])]
    ours = read_frames(path, info, picks=picks, size=size, crop=crop)
    times.append(sum(os.times()[:4]))
    theirs = original_pixels(read_frames(path, info, picks=picks), target, image=image)
    times.append(sum(os.times()[:4]))
    return ours.astype(np.float32), (theirs + 1) * 127.5, np.diff(times)


def report(name: str, path: Path, info: VideoInfo, num_frames: int, resolution: str) -> None:
    """Prints a row."""
    picks, target = np.arange(min(num_frames, info.num_frames)), bucket_size(info, resolution)
    runs = [both(path, info, picks, target) for _ in range(3)]
    error = runs[0][0] - runs[0][1]
    psnr = 10 * np.log10(255**2 / max(float((error**2).mean()), 1e-9))
    fast, slow = np.min([seconds for *_, seconds in runs], axis=0)
    sizes = f"{info.width}x{info.height} -> {target[1]}x{target[0]}"
    row = f"{name:<28}{sizes:>24}{len(picks):>8}{np.abs(error).mean():>8.2f}{psnr:>8.1f}"
    print(f"{row}{fast:>10.3f}{slow:>10.3f}", flush=True)


def compare_file(path: Path, folder: Path, num_frames: int, resolution: str) -> None:
    """Prints the rows of a file; images are written to `folder`."""
    info = probe(path)
    report(path.name, path, info, num_frames, resolution)
    if info.num_frames > 1:
        still = write_video(folder / path.stem, read_frames(path, info, picks=np.array([0])), info.fps)
        report(f"{path.stem}, as an image", still, probe(still), 1, resolution)


def compare_stripes(folder: Path, resolution: str) -> None:
    """Prints how much of the contrast of fine stripes is left in each."""
    height, width, period = STRIPES
    stripes = np.where(np.arange(width) % period == 0, 255, 0).astype(np.uint8)
    frames = np.broadcast_to(stripes[:, None], (5, height, width, 3)).copy()
    print(f"\ncontrast left of upright stripes, {period} pixels apart at {width}x{height}; 0% is right")
    for kind, count in (("video", 5), ("image", 1)):
        path = write_video(folder / f"stripes_{kind}", frames[:count], 8, crf=1)
        info = probe(path)
        target = bucket_size(info, resolution)
        ours, theirs, _ = both(path, info, np.arange(count), target)
        left = [pixels[:, 8:-8, 8:-8].std() / frames.std() for pixels in (ours, theirs)]  # away from the edges
        print(f"{kind:<10}-> {target[1]}x{target[0]}{left[0]:>14.1%} by ffmpeg{left[1]:>10.1%} by the original")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True, type=Path, help="of videos and images")
    parser.add_argument("--resolution", default="256px", help="of a bucket_config")
    parser.add_argument("--frames", default=33, type=int, help="of each clip")
    given = parser.parse_args()
    columns = ("file", "size", "frames", "diff", "PSNR", "ffmpeg s", "original s")
    print("{:<28}{:>24}{:>8}{:>8}{:>8}{:>10}{:>12}".format(*columns))
    with tempfile.TemporaryDirectory() as name:
        for path in sorted(path for path in given.folder.iterdir() if path.suffix in (".mp4", ".mkv", ".png", ".jpg")):
            compare_file(path, Path(name), given.frames, given.resolution)
        compare_stripes(Path(name), given.resolution)


if __name__ == "__main__":
    main()
