"""Files that PyTorch 2.15 wrote lie in data/; hostile and damaged ones are made here, byte by byte.

`zip.pt` and `legacy.pt` hold the same dict, by torch.save without and with `_use_new_zipfile_serialization=False`: the
state dict of a module with one parameter (so an OrderedDict with `_metadata`), and the tensors of EXPECTED.
`nested.pt` (pickle protocol 4) holds a "state_dict" beside an epoch, a torch.Size, a device, a dtype and an optimizer.
"""

import io
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.weights.torch_file import MAGIC, PROTOCOL, open_torch

DATA = Path(__file__).parent / "data"
BASE = np.arange(35, dtype=np.float32).reshape(5, 7)
EXPECTED = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 4,
    "float32": BASE,
    "bfloat16": (np.arange(11) / 8).astype(ml_dtypes.bfloat16),
    "int64": np.arange(3, dtype=np.int64) - 2**40,
    "transposed": BASE.T,  # of the storage of "float32", as is the next
    "shared": BASE[1:4, 2:5],
    "scalar": np.float16(2.5),
    "parameter": np.arange(5, dtype=np.float64),  # torch.nn.Parameter
    "empty": np.zeros((0, 3), np.float32),
    "bool": np.arange(5) % 2 == 1,
    "uint8": np.arange(13, dtype=np.uint8),
}


class Name:
    """Pickled as a name, module and name apart by |, that need not exist."""

    def __init__(self, name: str):
        self.name = name


class Call:
    """Pickled as a call of a name."""

    def __init__(self, name: str, *arguments):
        self.name, self.arguments = Name(name), arguments


class Reference:
    """Pickled as a persistent id, as torch.save refers to a storage."""

    def __init__(self, *details):
        self.details = details


class Writer(pickle._Pickler):
    def save_name(self, name):
        self.write(pickle.GLOBAL + name.name.replace("|", "\n").encode() + b"\n")

    def save_call(self, call):
        self.save(call.name)
        self.save(call.arguments)
        self.write(pickle.REDUCE)

    def save_reference(self, reference):
        self.save(reference.details)
        self.write(pickle.BINPERSID)

    dispatch = pickle._Pickler.dispatch | {Name: save_name, Call: save_call, Reference: save_reference}


def pickled(value) -> bytes:
    file = io.BytesIO()
    Writer(file, 2).dump(value)
    return file.getvalue()


def tensor(shape, strides, *, count, offset=0, kind="FloatStorage", key="0", view=(), details=()):
    storage = Reference("storage", Name(f"torch|{kind}"), key, "cpu", count, *view)
    hooks = Call("collections|OrderedDict")
    return Call("torch._utils|_rebuild_tensor_v2", storage, offset, shape, strides, False, hooks, *details)


def zip_file(folder: Path, data: bytes, compression=zipfile.ZIP_STORED, **entries: bytes) -> Path:
    """Writes an archive: `data` as the pickle, entries by name, or a storage's number after an underscore."""
    path = folder / "file.pt"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {"data.pkl": data, **entries}.items():
            archive.writestr(f"file/{name.replace('_', 'data/').replace('-', '.')}", content)
    return path


def legacy_file(folder: Path, data: bytes, storages: dict[str, tuple[int, bytes]], little_endian=True) -> Path:
    path = folder / "file.pt"
    head = [pickled(MAGIC), pickled(PROTOCOL), pickled({"little_endian": little_endian}), data, pickled(list(storages))]
    counted = [count.to_bytes(8, "little") + content for count, content in storages.values()]
    path.write_bytes(b"".join(head + counted))
    return path


@pytest.mark.parametrize("file", ["zip.pt", "legacy.pt"])
def test_every_tensor_that_pytorch_wrote_is_read(file):
    found = open_torch(DATA / file)
    assert found.keys() == EXPECTED.keys()
    for key, value in EXPECTED.items():
        assert (found[key].shape, found[key].dtype) == (value.shape, value.dtype), key
        np.testing.assert_array_equal(np.asarray(found[key]), value, err_msg=key)


@pytest.mark.parametrize("file", ["zip.pt", "legacy.pt"])
def test_a_part_of_a_transposed_view_of_a_shared_storage_is_read(file):
    part = open_torch(DATA / file)["transposed"][2:5, 1]
    np.testing.assert_array_equal(part, BASE.T[2:5, 1])
    assert part.flags.c_contiguous


def test_the_state_dict_is_found_beside_epoch_and_optimizer():
    found = open_torch(DATA / "nested.pt")
    assert found.keys() == {"a", "f8"}
    np.testing.assert_array_equal(np.asarray(found["a"]), np.arange(3, dtype=np.float32))
    np.testing.assert_array_equal(np.asarray(found["f8"]), (np.arange(5) / 2).astype(ml_dtypes.float8_e4m3fn))


def test_a_part_is_chosen_by_name_where_there_are_several(tmp_path):
    saved = {
        "model": {"w": tensor((2,), (1,), count=3)},
        "ema": {"w": tensor((2,), (1,), count=3, offset=1)},
        "step": 7,
    }
    path = zip_file(tmp_path, pickled(saved), _0=np.arange(3, dtype=np.float32).tobytes())
    with pytest.raises(UserError, match=r"file\.pt has tensors in several parts: 'model', 'ema'; .*part='model'"):
        open_torch(path)
    np.testing.assert_array_equal(np.asarray(open_torch(path, part="ema")["w"]), [1, 2])
    with pytest.raises(UserError, match=r"no part 'step' with tensors; .*'model', 'ema'"):
        open_torch(path, part="step")


def test_a_part_comes_before_stray_tensors_at_the_top(tmp_path):
    saved = {"w": tensor((2,), (1,), count=2), "inner": {"v": tensor((1,), (1,), count=2)}, 5: [None, 0.5, "text"]}
    path = zip_file(tmp_path, pickled(saved), _0=bytes(8))
    assert open_torch(path).keys() == {"v"}


def test_a_dict_of_python_2_and_a_view_of_a_storage_are_read(tmp_path):
    inner = tensor((2,), (1,), count=7, offset=1, kind="LongStorage", view=(("view", 3, 4),))
    data = pickled(Call("collections|OrderedDict", [["w", inner]]))
    path = legacy_file(tmp_path, data, {"0": (7, np.arange(7).tobytes())})
    np.testing.assert_array_equal(np.asarray(open_torch(path)["w"]), [4, 5])


HOSTILE = {
    "posix.system": lambda command: Call("posix|system", command),
    "os.system": lambda command: Call("os|system", command),
    "builtins.eval": lambda command: Call("builtins|eval", f"__import__('os').system({command!r})"),
    "torch.load": lambda command: Call("torch|load", command),
    "torch.serialization.os.system": lambda command: Call("torch|serialization.os.system", command),
    "torch.FloatStorage.__class__": lambda command: Call("torch|FloatStorage.__class__", command),
    "collections.OrderedDict.fromkeys": lambda command: Call("collections|OrderedDict.fromkeys", command),
    "builtins.getattr": lambda command: Call("builtins|getattr", Name("torch|Size"), "__globals__"),
    "numpy.core.multiarray.scalar": lambda command: Name("numpy.core.multiarray|scalar"),
    "argparse.Namespace": lambda command: Name("argparse|Namespace"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("form", ["zip", "legacy", "first pickle"])
def test_a_name_that_is_no_part_of_a_tensor_is_refused_and_not_called(tmp_path, name, form):
    sentinel = tmp_path / "sentinel"
    data = pickled({"w": HOSTILE[name](f"touch {sentinel}")})
    path = zip_file(tmp_path, data) if form == "zip" else legacy_file(tmp_path, data, {})
    if form == "first pickle":
        path.write_bytes(data)
    with pytest.raises(UserError, match=rf"file\.pt names '{name}', and only weights.*safetensors") as refused:
        open_torch(path)
    assert "\n" not in str(refused.value)
    assert not sentinel.exists()


class Attack:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_calls_the_system_does_not_run_in_any_protocol(tmp_path, protocol):
    sentinel = tmp_path / "sentinel"
    path = zip_file(tmp_path, pickle.dumps({"w": Attack(f"touch {sentinel}")}, protocol))
    with pytest.raises(UserError, match=r"file\.pt"):
        open_torch(path)
    assert not sentinel.exists()


SIZE = b"ctorch\nSize\n"
RAW = {
    "INST": b"(S'touch SENTINEL'\nios\nsystem\n.",
    "OBJ": b"(" + SIZE + b"K\x01o.",
    "NEWOBJ": SIZE + b")\x81.",
    "NEWOBJ_EX": SIZE + b")}\x92.",
    "EXT1": b"\x82\x01.",
    "attributes of a function": SIZE + b"N}U\x0c__defaults__K\x01\x85s\x86b.",
    "attributes of a type": b"ctorch\nFloatStorage\n}U\x05dtypeK\x01sb.",
    "a call of a type": b"ctorch\nFloatStorage\n)R.",
    "a call of a dtype": b"ctorch\nfloat32\n)R.",
    "a call of text": b"U\x01a)R.",
    "a call without arguments": SIZE + b"R.",
    "a call with arguments that do not fit": b"ctorch._utils\n_rebuild_tensor_v2\nK\x01\x85R.",
    "a name of numbers": b"K\x01K\x02\x93.",
    "a reference that is text": b"U\x01aQ.",
    "a reference to a module": pickled(Reference("module", "storage")),
    "a reference to no storage": pickled(Reference("storage", "FloatStorage", "0", "cpu", 3)),
    "a text reference": b"Pstorage\n.",
    "items for a tuple": b")K\x01a.",
    "keys for a list": b"]K\x01K\x02s.",
    "an odd number of entries": b"}(K\x01u.",
    "something from below a mark": b"K\x01(\x85.",
    "nothing": b".",
    "more than one value": b"K\x01K\x02.",
    "an unknown memory": b"h\x07.",
    "text of a terabyte": b"\x8d" + (1 << 40).to_bytes(8, "little") + b"a.",
    "bytes of an exabyte": b"\x8e" + (1 << 60).to_bytes(8, "little") + b"a.",
    "a buffer of a terabyte": b"\x96" + (1 << 40).to_bytes(8, "little") + b"a.",
    "a number of a gigabyte": b"\x8b" + (1 << 30).to_bytes(4, "little") + b"a.",
    "a far memory": b"K\x01r" + b"\xff\xff\xff\x7f" + b".",
    "a key that takes for ever to hash": b"})" + b"q\x00h\x00\x86" * 100 + b"K\x01s.",
    "lists in lists": b"]" * 5_000 + b"a" * 4_999 + b".",
    "no end": b"]",
}


@pytest.mark.parametrize("name", RAW)
def test_an_instruction_that_makes_no_weights_is_refused_in_little_memory(tmp_path, name):
    sentinel = tmp_path / "sentinel"
    path = zip_file(tmp_path, b"\x80\x02" + RAW[name].replace(b"SENTINEL", bytes(sentinel)))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"file\.pt (is not a whole|holds a)") as refused:
        open_torch(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(refused.value)
    assert peak_bytes < 32 << 20
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "claim",
    [
        tensor((4,), (1,), count=3),
        tensor((2,), (1,), count=3, offset=2),
        tensor((2, 2), (2, 1), count=3),
        tensor((2,), (1,), count=1 << 40),
        tensor((1 << 40,), (0,), count=3),  # one value that is repeated
        tensor((0, 1 << 62), (1, 1), count=3),
        tensor((1,) * 40, (1,) * 40, count=3),
        tensor((-1,), (1,), count=3),
        tensor((2,), (-1,), count=3, offset=1),
        tensor((2,), (1,), count=3, offset=-1),
        tensor((1 << 70,), (1,), count=3),
        tensor((2, 1), (1,), count=3),
        tensor((2.0,), (1,), count=3),
        tensor([2], [1], count=3),
        tensor("2", "1", count=3),
        tensor((2,), (1,), count=-3),
        tensor((2,), (1,), count=3, key="1"),
        tensor((2,), (1,), count=3, key=7),
        tensor((2,), (1,), count=3, details=({"neg": True},)),
        Call("torch._utils|_rebuild_tensor_v2", Name("torch|float32"), 0, (2,), (1,), False, None),
        Call("torch._utils|_rebuild_tensor_v3", Name("torch|float32"), 0, (2,), (1,), False, None, 5),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(tmp_path, claim):
    path = zip_file(tmp_path, pickled({"w": claim}), _0=bytes(12))
    with pytest.raises(UserError, match=r"file\.pt is not a whole PyTorch checkpoint"):
        open_torch(path)


@pytest.mark.parametrize("file", ["zip.pt", "legacy.pt"])
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path, file):
    whole = (DATA / file).read_bytes()
    path = tmp_path / "cut.pt"
    for size in range(0, len(whole) - 1, 29):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.pt is not a whole PyTorch checkpoint"):
            open_torch(path)


@pytest.mark.parametrize("file", ["zip.pt", "legacy.pt"])
@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # by pickletools, of a wrong name
def test_a_file_with_wrong_bytes_is_refused_or_read_but_never_fails_otherwise(tmp_path, file):
    whole = np.fromfile(DATA / file, np.uint8)
    path = tmp_path / "wrong.pt"
    draw = np.random.default_rng(5)
    for _ in range(150):
        wrong = whole.copy()
        wrong[draw.integers(len(whole), size=3)] = draw.integers(256, size=3)
        wrong.tofile(path)
        try:
            found = open_torch(path)
        except UserError as error:
            assert "wrong.pt" in str(error)  # noqa: PT017 - either is right
            continue
        for value in found.values():
            np.asarray(value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "it is empty"),
        (b"some text\n" * 40, "does not begin as those do"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer.*`git lfs pull`"),
        (pickle.dumps({"w": 1}), "does not begin as those do"),
        (b"PK\x03\x04 and no more", "File is not a zip file"),
    ],
)
def test_a_file_of_another_kind_is_told_in_one_line(tmp_path, content, complaint):
    path = tmp_path / "other.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"other\.bin .*{complaint}"):
        open_torch(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match=f"{path} does not exist"):
            open_torch(path)


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ({"constants-pkl": b""}, "TorchScript program"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"compression": zipfile.ZIP_DEFLATED}, "compressed"),
    ],
)
def test_an_archive_of_another_kind_is_refused(tmp_path, entries, complaint):
    path = zip_file(tmp_path, pickled({"w": tensor((2,), (1,), count=3)}), _0=bytes(12), **entries)
    with pytest.raises(UserError, match=rf"file\.pt .*{complaint}"):
        open_torch(path)


def test_an_archive_without_a_pickle_is_refused(tmp_path):
    path = tmp_path / "file.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("file/readme", "text")
    with pytest.raises(UserError, match=r"file\.pt .*without data\.pkl"):
        open_torch(path)


def test_a_legacy_file_of_a_big_endian_machine_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"file\.pt .*big-endian"):
        open_torch(legacy_file(tmp_path, pickled({}), {}, little_endian=False))


def test_a_legacy_list_of_storages_that_nobody_named_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"file\.pt .*list of storages"):
        open_torch(legacy_file(tmp_path, pickled({}), {"7": (1, bytes(4))}))


@pytest.mark.parametrize(
    ("saved", "complaint"),
    [
        ({}, "holds no tensors"),
        ({"state_dict": {}, "epoch": 3}, "holds no tensors"),
        ([tensor((2,), (1,), count=3)], "holds a list; save a state dict"),
        (tensor((2,), (1,), count=3), "holds a StoredTensor; save a state dict"),
    ],
)
def test_a_file_without_named_tensors_is_refused(tmp_path, saved, complaint):
    path = zip_file(tmp_path, pickled(saved), _0=bytes(12))
    with pytest.raises(UserError, match=rf"file\.pt {complaint}"):
        open_torch(path)
