import json

import numpy as np
import pytest
from PIL import Image

from opensora_jax import report
from opensora_jax.data import shapes
from opensora_jax.inference import outputs
from opensora_jax.inference.contact_sheet import write_contact_sheet

RIGHT = shapes.Shape("circle", "red", "right", "dark")
LEFT = shapes.Shape("circle", "red", "left", "dark")


def run_line(command, seconds, date):
    line = {"command": command, "argv": [], "seconds": seconds, "peak_memory_bytes": int(seconds * 2**20)}
    return json.dumps(line | {"date": date}) + "\n"


@pytest.fixture
def demo(tmp_path):
    for name in ("vae", "diffusion", "samples"):
        (tmp_path / name).mkdir()
    losses = [{"step": i, "loss": 20.0 - i, "step_seconds": 0.5} for i in range(1, 20)]
    lines = "".join(json.dumps(line) + "\n" for line in losses)
    (tmp_path / "vae" / "metrics.jsonl").write_text(lines)
    (tmp_path / "diffusion" / "metrics.jsonl").write_text(lines + '{"step": 20, "lo')
    first, second = run_line("train_vae", 60.0, "2026-01-01"), run_line("train_vae", 3.0, "2026-01-02")
    (tmp_path / "vae" / "runs.jsonl").write_text(first + second)
    (tmp_path / "diffusion" / "runs.jsonl").write_text(run_line("train", 90.0, "2026-01-01T01"))
    validation = {"psnr_db": 27.5, "clips": 48, "shape_accuracy": 0.75}
    (tmp_path / "vae" / "validation.json").write_text(json.dumps(validation))
    clip = shapes.render(RIGHT, 0, 48, 9)
    records = [
        outputs.save(tmp_path / "samples", f"{i}", clip, 8.0, {"key": "", "prompt": shapes.caption(spec)})
        for i, spec in enumerate((RIGHT, LEFT))
    ]
    (tmp_path / "samples" / "samples.json").write_text(json.dumps({"samples": records}))
    write_contact_sheet(tmp_path / "samples" / "contact_sheet.png", [clip, clip], ["a", "b"])
    return tmp_path


def test_the_summary_holds_what_was_measured(demo):
    summary = report.summarize(demo, 812.0)
    assert summary["missing"] == []
    assert summary["wall_seconds"] == 812.0
    assert summary["autoencoder"]["validation"]["psnr_db"] == 27.5
    expected = {"steps": 19, "loss_first": 19.0, "loss_last": 1.0, "loss_mean_of_last_tenth": 1.5}
    assert summary["diffusion"]["training"] == expected | {"median_step_seconds": 0.5}
    assert summary["peak_memory_bytes"] == 90 * 2**20
    seconds = {command["command"]: (command["seconds"], command["runs"]) for command in summary["commands"]}
    assert seconds == {"train_vae": (63.0, 2), "train": (90.0, 1)}
    json.dumps(summary)


def test_the_loss_of_a_skipped_update_counts_nowhere(demo):
    with (demo / "vae" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "loss": float("nan")}) + "\n")
    found = report.summarize(demo, None)["autoencoder"]["training"]
    assert (found["loss_last"], found["loss_mean_of_last_tenth"]) == (1.0, 1.5)


def test_prompt_following_counts_each_attribute_on_its_own(demo):
    found = report.summarize(demo, None)["prompt_following"]
    assert found == {
        "samples": 2,
        "color_accuracy": 1.0,
        "direction_accuracy": 0.5,
        "background_accuracy": 1.0,
        "shape_accuracy": 1.0,
    }


def test_both_pictures_are_at_the_top_of_the_folder(demo):
    report.summarize(demo, None)
    for name in ("loss_curves.png", "contact_sheet.png"):
        with Image.open(demo / name) as picture:
            picture.load()
    assert not list(demo.glob(".*"))


def test_an_empty_folder_gives_a_report_that_names_what_is_missing(tmp_path):
    summary = report.summarize(tmp_path, None)
    named = " ".join(summary["missing"])
    for part in (
        "runs.jsonl",
        "vae/metrics.jsonl",
        "validation.json",
        "samples.json",
        "loss curves",
        "contact_sheet",
    ):
        assert part in named
    assert "Missing" in report.table(summary)


def test_a_damaged_video_is_named_and_the_rest_is_reported(demo):
    video = next((demo / "samples").glob("*.mp4"))
    video.write_bytes(video.read_bytes()[:100])
    summary = report.summarize(demo, None)
    assert any(str(video) in part for part in summary["missing"])
    assert summary["prompt_following"] is None
    assert summary["diffusion"]["training"]["steps"]


def test_prompts_that_are_no_captions_of_the_demo_set_are_not_judged(demo):
    clip = np.zeros((3, 16, 16, 3), np.uint8)
    record = outputs.save(demo / "samples", "cat", clip, 8.0, {"key": "", "prompt": "a cat in the rain"})
    (demo / "samples" / "samples.json").write_text(json.dumps({"samples": [record]}))
    summary = report.summarize(demo, None)
    assert summary["prompt_following"] is None
    assert any("nothing to compare" in part for part in summary["missing"])


def test_the_table_shows_the_numbers_and_the_directions_the_next_command(demo):
    text = report.table(report.summarize(demo, 812.0))
    for part in ("27.50 dB", "direction 50%", "812 s", "19 steps", "0.09 GiB", "train_vae"):
        assert part in text
    following = report.directions(demo)
    assert "opensora_jax.sample" in following
    assert "tensorboard --logdir" in following
