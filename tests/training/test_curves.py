import json

import numpy as np
import pytest
from PIL import Image

from opensora_jax.training import curves


def write(path, entries, tail=""):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)
    return path


def test_a_series_leaves_out_entries_without_the_number():
    steps, values = curves.series([{"step": 1, "loss": 2.0}, {"step": 2, "psnr": 9.0}, {"step": 5, "loss": 1}], "loss")
    assert steps.tolist() == [1, 5]
    assert values.tolist() == [2, 1]


def test_the_running_mean_of_a_line_is_the_line_inside():
    line = np.arange(11.0)
    np.testing.assert_allclose(curves.running_mean(line, 3)[1:-1], line[1:-1])
    np.testing.assert_allclose(curves.running_mean(line, 1), line)


def test_a_panel_is_drawn_for_each_run(tmp_path):
    long = write(tmp_path / "a.jsonl", [{"step": i, "loss": 1 / (i + 1)} for i in range(23)])
    broken = write(tmp_path / "b.jsonl", [{"step": 1, "loss": float("nan")}])
    curves.write_curves(tmp_path / "two.png", {"Autoencoder": long, "Diffusion": broken})
    curves.write_curves(tmp_path / "one.png", {"Autoencoder": long})
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "one.png") as one:
        assert two.size == (2 * one.width, one.height)
    assert not list(tmp_path.glob(".*"))


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        curves.write_curves(tmp_path / "x.png", {})
