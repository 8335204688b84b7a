from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import opensora_jax.weights.tensor as tensor_module
from opensora_jax.config.errors import UserError
from opensora_jax.weights.tensor import FileTensor

VALUES = np.arange(3 * 5 * 7, dtype=np.int32).reshape(3, 5, 7)


def stored(folder: Path, values: np.ndarray, order: tuple[int, ...] | None = None) -> FileTensor:
    """Writes values after 11 bytes of something else; `order` transposes the view, not the file."""
    path = folder / "values.bin"
    path.write_bytes(b"elevenbytes" + values.tobytes())
    view = values if order is None else values.transpose(order)
    return FileTensor(path, 11, values.dtype, view.shape, None if order is None else view.strides)


@pytest.mark.parametrize("piece_bytes", [1, 50, 1 << 20])
@pytest.mark.parametrize("order", [None, (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize(
    "index",
    [
        slice(None),
        1,
        -1,
        np.int64(2),
        slice(1, 3),
        slice(4, 1),
        slice(None, None, -2),
        (slice(None), slice(1, 2)),
        (0, slice(2, None, 3), -2),
        (slice(0, 2), 1, slice(None, None, -1)),
        (2, 1, 0),
        (),
    ],
)
def test_a_part_is_what_numpy_gives(tmp_path, monkeypatch, piece_bytes, order, index):
    monkeypatch.setattr(tensor_module, "PIECE", piece_bytes)
    part = stored(tmp_path, VALUES, order)[index]
    expected = (VALUES if order is None else VALUES.transpose(order))[index]
    assert type(part) is np.ndarray
    assert part.flags.c_contiguous
    assert part.flags.owndata
    np.testing.assert_array_equal(part, expected)
    assert part.shape == expected.shape


def test_all_values_are_read_in_the_dtype_asked_for(tmp_path):
    tensor = stored(tmp_path, VALUES)
    np.testing.assert_array_equal(np.asarray(tensor), VALUES)
    assert np.asarray(tensor).dtype == np.int32
    assert np.asarray(tensor, np.float32).dtype == np.float32
    assert (tensor.shape, tensor.nbytes) == ((3, 5, 7), VALUES.nbytes)


def test_a_view_without_a_copy_cannot_be_had(tmp_path):
    with pytest.raises(ValueError, match="only be copied"):
        np.array(stored(tmp_path, VALUES), copy=False)


def test_bfloat16_at_an_odd_byte_comes_out_right(tmp_path):
    values = (np.arange(13) / 8).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(stored(tmp_path, values)), values)


@pytest.mark.parametrize("shape", [(), (0,), (5, 0, 3), (1, 1)])
def test_a_tensor_of_one_value_or_none_is_read(tmp_path, shape):
    values = np.full(shape, 2.5, np.float16)
    np.testing.assert_array_equal(np.asarray(stored(tmp_path, values)), values)
    assert stored(tmp_path, values)[()].shape == shape


@pytest.mark.parametrize("index", [3, -4, (0, 5), (0, 0, 0, 0)])
def test_an_index_outside_the_shape_is_an_index_error(tmp_path, index):
    with pytest.raises(IndexError):
        stored(tmp_path, VALUES)[index]


def test_a_file_that_is_gone_or_cut_is_named(tmp_path):
    tensor = stored(tmp_path, VALUES)
    tensor.path.write_bytes(tensor.path.read_bytes()[:-1])
    np.testing.assert_array_equal(tensor[:2], VALUES[:2])
    with pytest.raises(UserError, match=r"values\.bin was opened"):
        tensor[2]
    tensor.path.write_bytes(b"")
    with pytest.raises(UserError, match=r"values\.bin was opened"):
        tensor[0]
    tensor.path.unlink()
    with pytest.raises(UserError, match=r"values\.bin was opened"):
        np.asarray(tensor)


def test_reading_leaves_no_part_of_the_file_mapped(tmp_path):
    tensor = stored(tmp_path, VALUES)
    values = np.asarray(tensor)
    assert str(tensor.path) not in Path("/proc/self/maps").read_text()
    np.testing.assert_array_equal(values, VALUES)
