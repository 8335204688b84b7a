import sys

import numpy as np
import pyarrow as pa
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.data.media.video_writer import write_video
from opensora_jax.data.table.beam_probing import check, on_beam
from opensora_jax.data.table.probing import describe


def test_without_beam_the_way_to_get_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install '\.\[beam\]'"):
        check("")


def test_beam_finds_what_a_process_finds(tmp_path):
    pytest.importorskip("apache_beam", reason="the extra `beam` is not installed")
    path = str(write_video(tmp_path / "clip.mp4", np.zeros((5, 34, 46, 3), np.uint8), 8))
    paths = [path, str(tmp_path / "none.mp4"), "https://x.org/a.mp4", ""]
    clips = pa.table({"path": paths, "shard": [""] * 4, "record": [0] * 4})
    found = [row for rows in on_beam(clips, tmp_path / "work", "--runner=DirectRunner") for row in rows]
    by_path = {row["path"]: row for row in found}
    np.testing.assert_equal(by_path, {path: describe(path) for path in paths})
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("options", ["--runner=Nonsense", "--direct_num_workers=many", "--runner='x"])
def test_options_that_beam_does_not_understand_are_told_before_the_work(options):
    pytest.importorskip("apache_beam", reason="the extra `beam` is not installed")
    with pytest.raises(UserError, match=r"--beam_options=.*Give Beam's own flags") as caught:
        check(options)
    assert "\n" not in str(caught.value)
