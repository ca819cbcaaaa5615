import struct

import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization

from gptq_jax.storage.base import CheckpointError
from gptq_jax.storage.flax_msgpack import CHUNKED, read_arrays

TREE = {
    "a": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "empty": {}},
    "b": np.arange(6).astype(ml_dtypes.bfloat16),
    "c": np.float16(1.5),
    "d": np.ones((2, 0, 3), np.int32),
    "e": np.asarray(True),
    "ü": {"0": np.zeros(70000, np.uint8)},
}


def array(shape, dtype, content):
    """An array as flax writes it, or not."""
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, content), use_bin_type=True))


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else msgpack.packb(content))
    return path


def test_what_flax_wrote(tmp_path):
    arrays = read_arrays(written(tmp_path / "m", serialization.to_bytes(TREE)))
    assert list(arrays) == ["a/kernel", "b", "c", "d", "e", "ü/0"]
    for name, expected in (("a/kernel", TREE["a"]["kernel"]), ("ü/0", TREE["ü"]["0"]), *list(TREE.items())[1:5]):
        assert arrays[name].shape == expected.shape
        assert arrays[name].dtype == expected.dtype
        np.testing.assert_array_equal(arrays[name].read(name), expected)


@pytest.mark.parametrize(("head", "entries"), [(b"\x8f", 15), (b"\xde\x00\x10", 16), (b"\xdf\x00\x00\x00\x11", 17)])
def test_maps_of_every_length(tmp_path, head, entries):
    value = msgpack.packb({"": msgpack.ExtType(3, array((), "float32", np.float32(1.5).tobytes()).data)})[2:]
    content = head + b"".join(msgpack.packb(str(index)) + value for index in range(entries))
    arrays = read_arrays(written(tmp_path / "m", content))
    assert list(arrays) == [str(index) for index in range(entries)]
    assert arrays[str(entries - 1)].read("last") == 1.5


def test_arrays_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 20)
    content = serialization.to_bytes(TREE)
    assert CHUNKED.encode() in content
    found = read_arrays(written(tmp_path / "m", content))["a/kernel"]
    assert len(found.pieces) == 3
    np.testing.assert_array_equal(found.read("a/kernel"), TREE["a"]["kernel"])


def test_a_file_changed_after_it_was_opened(tmp_path):
    path = written(tmp_path / "m", serialization.to_bytes({"a": np.ones(1000, np.float32)}))
    found = read_arrays(path)["a"]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="array 'a' is cut off: the file was changed"):
        found.read("a")


ONE = array((1,), "float32", bytes(4))
PIECES = {CHUNKED: True, "shape": {"0": 2}, "chunks": {"0": ONE, "1": ONE}}
BROKEN = {
    "is empty": b"",
    "is a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "does not begin with a map": 7,
    "'a' is the number 7, not an array": {"a": 7},
    "'a' is a list, not an array": {"a": [1]},
    "'a' is a nil, not an array": {"a": None},
    "'a' is a float, not an array": {"a": 1.5},
    "'a' is a str, not an array": {"a": "text"},
    "'a' is a bin, not an array": {"a": bytes(4)},
    "holds a int where a name should be": {7: ONE},
    "holds a long name": {"x" * 2000: ONE},
    "'a/b' occurs twice": {"a": {"b": ONE}, "a/b": ONE},
    "'a' occurs twice": b"\x82" + 2 * (msgpack.packb("a") + msgpack.packb(ONE)),
    "'a' is a complex number": {"a": msgpack.ExtType(2, msgpack.packb((1.0, 2.0)))},
    "'a' is of msgpack's extension type 9": {"a": msgpack.ExtType(9, b"\x80\x04.")},
    "'a' is not a shape, a dtype and bytes": {"a": msgpack.ExtType(1, msgpack.packb([1, 2]))},
    "'a' has no shape": {"a": array(3, "float32", bytes(4))},
    "'a' has a shape that is not of sizes": {"a": array((-1,), "float32", bytes(4))},
    "'a' has the dtype 'object'": {"a": array((1,), "object", bytes(8))},
    r"'a' has shape \(2,\) and dtype float32, but not the bytes": {"a": array((2,), "float32", bytes(4))},
    r"'a' has shape \(1073741824, 1073741824\)": {"a": array((2**30, 2**30), "float32", bytes(4))},
    "bytes after its end": msgpack.packb({"a": ONE}) + b"\x00",
    "begins with byte 0xc1, which is no msgpack": b"\x81\xa1a\xc1",
    "'a' is cut off: it has 4294967295 bytes": b"\x81\xa1a\xc9" + struct.pack(">IB", 2**32 - 1, 1),
    "is cut off by the end of the file": b"\xdf\xff\xff\xff\xff",
    "holds a name that is no UTF-8": b"\x81\xa1\xff\x00",
    "goes beyond a depth of 32": b"\x81\xa1a" * 40,
    "is an array in pieces that do not make up its shape": {"a": {**PIECES, "shape": {"0": 3}}},
    r"pieces that do not make up its shape \[\]": {"a": {**PIECES, "shape": 3}},
    r"pieces that do not make up its shape \[2\]": {"a": {**PIECES, "chunks": {"0": ONE, "2": ONE}}},
}


@pytest.mark.parametrize("problem", BROKEN)
def test_what_flax_does_not_write(tmp_path, problem):
    with pytest.raises(CheckpointError, match=problem) as error:
        read_arrays(written(tmp_path / "m.msgpack", BROKEN[problem]))
    assert str(error.value).startswith(f"{tmp_path / 'm.msgpack'}: ")


def test_every_truncation_is_seen(tmp_path):
    content = serialization.to_bytes({key: TREE[key] for key in "abcd"})
    for length in range(len(content)):
        with pytest.raises(CheckpointError, match=r"cut off|is empty"):
            read_arrays(written(tmp_path / "m", content[:length]))


def test_nothing_is_made_of_numbers_that_only_the_file_claims(tmp_path, monkeypatch):
    monkeypatch.setattr("gptq_jax.storage.flax_msgpack.NODES", 100)
    with pytest.raises(CheckpointError, match="beyond a depth of 32 or 100 entries"):
        read_arrays(written(tmp_path / "m", {str(index): {} for index in range(101)}))
