"""The harness can fail: whatever is wrong with a folder, a file or a number shows as a failure, never as a skip."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.parity.cases import chosen, discover, manifest_kind, run
from tests.parity.golden import Golden, Tolerance, absolute, beyond_bfloat16, bfloat16_steps, relative_l2
from tests.parity.test_parity import DRIVERS, PENDING

ROOT = Path(__file__).parents[2]


def write(folder, name, arrays=None, **about):
    (folder / f"{name}.json").write_text(json.dumps(about))
    if arrays is not None:
        save_file(arrays, folder / f"{name}.safetensors")


def double(golden):
    """A driver for cases of out/y = 2 in/x."""
    golden.compare("out/y", 2 * golden.part("in/")["x"], Tolerance(1e-3))


def verdict(folder, driver=double, pending=()):
    (case,) = discover([folder])
    result, faults = run(case, {"case": driver}, dict(pending), [folder])
    return result.verdict, " ".join(faults)


X = np.arange(1, 8, dtype=np.float32)


def test_equal_tensors_pass_and_their_worst_is_reported(tmp_path):
    write(tmp_path, "case_1", {"in/x": X, "out/y": 2 * X + np.float32(7e-3) * (X == 7)})
    (case,) = discover([tmp_path])
    result, faults = run(case, {"case": double}, {}, [tmp_path])
    assert (result.case, result.compared, result.worst, result.verdict, faults) == ("case_1", 1, "out/y", "pass", [])
    assert {type(value) for value in result} == {str, int, float}  # what pytest-xdist can carry
    assert result.error == pytest.approx(7e-3 / 14.007, rel=1e-3)


@pytest.mark.parametrize("wrong", [1.002, np.nan, np.inf])
def test_a_value_off_by_more_than_the_tolerance_or_not_finite_fails(tmp_path, wrong):
    write(tmp_path, "case", {"in/x": X, "out/y": np.float32(wrong) * 2 * X})
    assert verdict(tmp_path)[0] == "FAIL"


def test_our_own_nan_fails(tmp_path):
    write(tmp_path, "case", {"in/x": X, "out/y": 2 * X})
    assert verdict(tmp_path, lambda golden: golden.compare("out/y", X * np.nan))[0] == "FAIL"


def test_another_shape_fails_even_where_it_would_broadcast(tmp_path):
    write(tmp_path, "case", {"in/x": X, "out/y": 2 * X[None]})
    assert verdict(tmp_path)[0] == "FAIL"


def test_an_output_that_no_driver_compares_fails(tmp_path):
    write(tmp_path, "case", {"in/x": X, "out/y": 2 * X, "grad/w": X})
    assert verdict(tmp_path) == ("FAIL", "grad/w is not compared")


def test_a_driver_that_compares_nothing_fails(tmp_path):
    write(tmp_path, "case", {"in/x": X})
    assert verdict(tmp_path, lambda golden: None) == ("FAIL", "nothing is compared")


def test_a_driver_that_breaks_fails_with_its_error(tmp_path):
    write(tmp_path, "case", {"out/y": X})
    found, faults = verdict(tmp_path)
    assert found == "FAIL"
    assert "KeyError" in faults


def test_tensors_that_the_json_lists_must_be_there(tmp_path):
    write(tmp_path, "case", {"in/x": X, "out/y": 2 * X}, tensors={"in/x": [], "out/y": [], "out/z": []})
    assert "disagree about out/z" in verdict(tmp_path)[1]


@pytest.mark.parametrize("name", ["unheard_of.json", "case.safetensors", "case.json.bak", "notes.txt"])
def test_a_file_of_no_known_case_fails(tmp_path, name):
    (tmp_path / name).write_text("{}")
    assert verdict(tmp_path)[0] == "FAIL"


def test_a_json_that_is_none_fails_and_a_readme_is_no_case(tmp_path):
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "case.json").write_text("{")
    assert verdict(tmp_path)[0] == "FAIL"


def test_a_row_or_a_field_of_a_table_that_is_not_compared_fails(tmp_path):
    write(tmp_path, "case", table=[{"x": 1, "y": 2}, {"x": 3, "y": 6, "z": 0}], other=[1])

    def driver(golden):
        for name, row in golden.rows("table", ["x"]):
            golden.compare(f"{name}.y", 2 * row["x"])

    assert verdict(tmp_path, driver) == ("FAIL", "other is not compared table[1].z is not compared")


def test_words_and_lists_must_be_equal(tmp_path):
    write(tmp_path, "case", a="one", b=[[1, 2], [3]], c=True)

    def driver(golden, word="one"):
        for name, ours in (("a", word), ("b", [[1, 2], [3]]), ("c", True)):
            golden.compare(name, ours)

    assert verdict(tmp_path, driver)[0] == "pass"
    assert verdict(tmp_path, lambda golden: driver(golden, "two"))[0] == "FAIL"


def test_an_output_that_must_differ_fails_if_it_does_not(tmp_path):
    write(tmp_path, "case", {"in/x": X, "out/y": 2 * X})
    for factor, expected in ((2, "FAIL"), (3, "pass")):
        driver = lambda golden, k=factor: golden.differs("out/y", k * X, Tolerance(1e-3))  # noqa: E731
        assert verdict(tmp_path, driver)[0] == expected


def test_a_pending_case_is_not_run_and_the_longest_prefix_decides(tmp_path):
    write(tmp_path, "case_later", {"out/y": X})
    assert verdict(tmp_path, pending=[("case_l", "later")])[0] == "pending"
    assert chosen("mmdit_embeddings", [*DRIVERS, *PENDING]) == "mmdit_embeddings"
    assert chosen("mmdit_other", [*DRIVERS, *PENDING]) == "mmdit_"
    assert not DRIVERS.keys() & PENDING.keys()


def test_weights_of_another_file_are_found_beside_the_case_or_in_another_folder(tmp_path):
    near, far = tmp_path / "near", tmp_path / "far"
    near.mkdir()
    far.mkdir()
    write(far, "other", {"param/w": X})
    write(near, "case", {"in/x": X, "out/y": X}, params_from="other.safetensors, cast to bfloat16")
    golden = Golden(near / "case.json", [near, far])
    assert golden.params()[1].keys() == {"w"}
    with pytest.raises(FileNotFoundError, match=r"needs other\.safetensors"):
        Golden(near / "case.json", [near]).params()


def test_the_same_name_in_two_folders_is_two_cases(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "case")
    assert [case.id for case in discover([tmp_path / "a", tmp_path / "b"])] == ["a/case", "b/case"]
    assert [case.id for case in discover([tmp_path])] == ["a/case", "b/case"]


def test_a_manifest_is_told_by_its_content():
    assert manifest_kind({"config": {"axes_dim": [2, 2, 2]}}) == "mmdit"
    assert manifest_kind({"type": "dc_ae", "config": {}}) == "dc_ae"
    assert manifest_kind({"config": {}}) == "unknown"


def test_measures():
    a, b = np.array([3.0, 4.0]), np.array([3.0, 4.5])
    assert absolute(b, a) == 0.5
    assert relative_l2(b, a) == 0.1
    assert bfloat16_steps(np.array([1.0, -0.0]), np.array([1.0 + 2**-7, 0.0])) == 1
    assert beyond_bfloat16(np.array([1.0 + 2**-7, 0.0]), np.array([1.0, 2e-4])) == pytest.approx(2e-4, rel=0.01)


def test_bfloat16_tensors_are_read(tmp_path):
    write(tmp_path, "case", {"in/x": np.asarray(jnp.asarray(X, jnp.bfloat16)), "out/y": 2 * X})
    assert verdict(tmp_path)[0] == "pass"


@pytest.mark.parametrize("made", [False, True])
def test_a_goldens_folder_that_is_missing_or_empty_is_an_error(tmp_path, pytestconfig, made):
    if made:
        (tmp_path / "goldens").mkdir()
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    given = SimpleNamespace(
        option=SimpleNamespace(goldens=["goldens"]), invocation_params=SimpleNamespace(dir=tmp_path)
    )
    with pytest.raises(pytest.UsageError, match="holds no case" if made else "is not a folder"):
        conftest.pytest_configure(given)


def test_the_table_is_printed_by_all_processes_and_a_failure_fails_the_run(tmp_path):
    write(tmp_path, "gan_losses", curves=[])
    write(tmp_path, "unheard_of")
    line = [sys.executable, "-m", "pytest", "tests/parity/test_parity.py", "-n", "1", "--goldens", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert re.search(r"gan_losses .*pending: GAN", done.stdout)
    assert re.search(r"unheard_of .*FAIL: no driver knows", done.stdout)
    assert "2 cases: 0 pass, 1 FAIL, 1 pending; 0 comparisons" in done.stdout
