import json
import os
import random
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_models import TEXT, byte_tokenizer
from tiny_quantization import float_model

from gptq_jax.methods import gptq_solve
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.spec import QuantSpec
from gptq_jax.storage import CheckpointError, directory, load, save, store
from gptq_jax.storage import manifest as manifest_of
from gptq_jax.storage.parts import unpacked
from gptq_jax.tensor import QuantizedTensor


def packed_model(make, *, dtype="float32", case="tied_gqa"):
    """A model of one block whose kernels are `make(kernel)`."""
    model = float_model(layers=1, dtype=dtype, case=case)
    block = {
        part: {
            name: {**layer, "kernel": make(layer["kernel"])} if isinstance(layer, dict) else layer
            for name, layer in entries.items()
        }
        for part, entries in model.params["layers"][0].items()
    }
    return replace(
        model, params={**model.params, "layers": [block]}, report={"layers": [], "kept_float": {"embed": "why"}}
    )


def rounded(bits=4, symmetric=True):
    spec = QuantSpec(bits=bits, group_size=24, symmetric=symmetric, scale_dtype="float16")
    return packed_model(lambda kernel: round_to_nearest(kernel, spec))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "store"
    model = replace(rounded(symmetric=False), tokenizer=byte_tokenizer())
    save(model, path)
    return path


@pytest.fixture
def copy(stored, tmp_path):
    return Path(shutil.copytree(stored, tmp_path / "store"))


def check_same(model, other):
    assert jax.tree.structure(model.params) == jax.tree.structure(other.params)
    for one, two in zip(jax.tree.leaves(model.params), jax.tree.leaves(other.params), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(two).view(np.uint8))
    assert (model.config, model.source, model.report) == (other.config, other.source, other.report)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["tied_gqa", "biases", "head_dim"])
def test_float_models_come_back_bit_for_bit(tmp_path, case, dtype):
    model = float_model(layers=2, case=case, dtype=dtype)
    save(model, tmp_path / "out")
    check_same(model, load(tmp_path / "out"))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantized_models_come_back_bit_for_bit(tmp_path, bits, symmetric):
    model = rounded(bits, symmetric)
    save(model, tmp_path / "out")
    check_same(model, load(tmp_path / "out"))


def test_reordered_groups_come_back(tmp_path):
    spec = QuantSpec(group_size=24, scale_dtype="bfloat16")

    def make(kernel):
        hessian = jnp.diag(jnp.arange(1.0, 1 + kernel.shape[0]))
        return gptq_solve(kernel, hessian, spec, static_groups=False, grid="minmax")

    model = packed_model(make, dtype="bfloat16")
    assert model.params["layers"][0]["mlp"]["up_proj"]["kernel"].group_of_row is not None
    save(model, tmp_path / "out")
    check_same(model, load(tmp_path / "out"))


def test_no_float_copy_is_made_of_packed_kernels(stored, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a kernel was dequantized")

    monkeypatch.setattr(QuantizedTensor, "dequantize", never)
    model = load(stored)
    block = model.params["layers"][0]
    for part in ("self_attn", "mlp"):
        for layer in block[part].values():
            assert isinstance(layer["kernel"], QuantizedTensor)
            assert layer["kernel"].codes.dtype == jnp.uint32
    float_bytes = store.tree_bytes(float_model(layers=1).params["layers"])
    assert store.tree_bytes(model.params["layers"]) < float_bytes / 4


def test_the_tokenizer_comes_back(stored):
    assert load(stored).tokenizer(TEXT)["input_ids"] == byte_tokenizer()(TEXT)["input_ids"]


def test_arrays_are_plain_orbax(stored):
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(stored / "arrays" / "layers.0")
    kernel = load(stored).params["layers"][0]["mlp"]["up_proj"]["kernel"]
    found = tree["mlp"]["up_proj"]["kernel"]
    assert set(found) == {"codes", "scales", "zeros"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, getattr(kernel, name))


def test_disk_size_is_that_of_the_arrays(tmp_path):
    spec = QuantSpec(bits=4, group_size=128, scale_dtype="float16")
    keys = jax.random.split(jax.random.key(0), 7)
    shapes = iter(keys)
    source = {**float_model(layers=1).source, "hidden_size": 768, "intermediate_size": 2048, "num_key_value_heads": 4}
    config = store.architecture_from_config(source)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), config.abstract_params())
    for part in ("self_attn", "mlp"):
        for layer in params["layers"][0][part].values():
            random_kernel = jax.random.normal(next(shapes), layer["kernel"].shape)
            layer["kernel"] = round_to_nearest(random_kernel, spec)
    embedding = params["embed"]["embedding"]
    params["embed"]["embedding"] = jax.random.normal(keys[0], embedding.shape)
    model = replace(float_model(layers=1), config=config, params=params, source=source)
    save(model, tmp_path / "out")
    on_disk = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    arrays = store.tree_bytes(params)
    assert arrays > 3e6
    assert on_disk <= 1.03 * arrays
    specs = dict.fromkeys(store.packed_layers(params), spec)
    dense = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), config.abstract_params())
    planned = store.planned_bytes(replace(model, params=dense), specs)
    assert arrays <= planned <= 1.1 * arrays


def files(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_a_byte_changed_anywhere_is_named(copy):
    names = files(copy)
    kinds = {"gptq_jax.json", "config.json", "report.json", "tokenizer.json"}
    assert kinds <= set(names)
    assert any(name.startswith("arrays/") for name in names)
    for name in names:
        file = copy / name
        content = file.read_bytes()
        if not content:
            continue
        place = len(content) // 2
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=r"damaged|JSON|version|manifest|no table") as error:
            load(copy)
        assert str(error.value).startswith(f"{file}: ")
        file.write_bytes(content)
    load(copy)


def test_every_place_of_the_manifest_is_guarded(copy):
    file = copy / "gptq_jax.json"
    content = file.read_bytes()
    values = json.loads(content)
    for place in random.Random(0).sample(range(len(content)), 150):
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        file.write_bytes(changed)
        try:
            if json.loads(changed) == values:
                continue  # between tokens
        except ValueError:
            pass
        with pytest.raises(CheckpointError):
            load(copy)


@pytest.mark.parametrize("change", ["truncated", "missing"])
def test_truncated_and_missing_files_are_named(copy, change):
    for name in files(copy):
        file = copy / name
        content = file.read_bytes()
        if change == "missing":
            file.unlink()
        elif content:
            file.write_bytes(content[:-1])
        else:
            continue
        if name == "gptq_jax.json" and change == "missing":
            with pytest.raises(ValueError, match=r"does not fit its config|safetensors"):  # no longer a store
                load(copy)
        elif name == "gptq_jax.json":
            load(copy)  # its last byte is a line's end
            file.write_bytes(content[:-2])
            with pytest.raises(CheckpointError, match="is not JSON"):
                load(copy)
        else:
            with pytest.raises(CheckpointError, match=r"is missing|bytes, but") as error:
                load(copy)
            assert str(error.value).startswith(f"{file}: ")
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)


def resign(path, manifest):
    """Write a manifest with the checksums it should have."""
    for name, entry in manifest["files"].items() if isinstance(manifest.get("files"), dict) else ():
        if isinstance(entry, dict) and (path / name).is_file():
            entry |= {"bytes": (path / name).stat().st_size, "sha256": manifest_of.digest(path / name)}
    manifest.pop("sha256", None)
    manifest["sha256"] = manifest_of.manifest_digest(manifest)
    (path / "gptq_jax.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 3, "is of version 3, but this gptq-jax reads versions 1 to 2"),
        ("version", None, "is of version None"),
        ("format", "other", "is not a manifest"),
        ("files", [], "has no table 'files'"),
        ("files", {}, "does not list config.json"),
    ],
)
def test_other_versions_and_formats(copy, field, value, message):
    manifest = json.loads((copy / "gptq_jax.json").read_text())
    resign(copy, {**manifest, field: value})
    with pytest.raises(CheckpointError, match=message) as error:
        load(copy)
    assert str(error.value).startswith(f"{copy / 'gptq_jax.json'}: ")


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '{"format"', "[" * 100_000, "\udcff"])
def test_what_is_no_manifest_at_all(copy, text):
    (copy / "gptq_jax.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"is not JSON|is not a manifest"):
        load(copy)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "arrays/../../outside.json"])
def test_paths_out_of_the_directory_are_refused(copy, name):
    (copy.parent / "outside.json").write_text("{}")
    manifest = json.loads((copy / "gptq_jax.json").read_text())
    manifest["files"][name] = {"bytes": 2, "sha256": manifest_of.digest(copy.parent / "outside.json")}
    resign(copy, manifest)
    with pytest.raises(CheckpointError, match="lies outside the directory"):
        load(copy)


def places(value, path=()):
    """The path of every value in a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = changed(copied[path[0]], path[1:], new)
    return copied


ODD = [None, -1, 2.5, "x", [], {}, {"x": 1}, True, [3], 10**30]


def test_manifests_with_wrong_values_give_checkpoint_errors_only(copy, monkeypatch):
    monkeypatch.setattr(store, "_tokenizer", lambda *_: None)
    content = (copy / "gptq_jax.json").read_text()
    manifest = json.loads(content)
    chosen = random.Random(1)
    refused = 0
    for path in chosen.sample([path for path in places(manifest) if path], 60):
        document = changed(manifest, path, chosen.choice(ODD))
        resign(copy, document)
        for read in (lambda: store.read_shapes(copy), lambda: load(copy)):
            try:
                read()
            except CheckpointError as error:
                refused += 1
                assert str(copy) in str(error)  # noqa: PT017  (there may be none)
    assert refused > 20


def test_configs_with_wrong_values_give_checkpoint_errors_only(copy):
    manifest = json.loads((copy / "gptq_jax.json").read_text())
    config = json.loads((copy / "config.json").read_text())
    refused = 0
    for path in [(), *([key] for key in config)]:
        for new in ("x", None, [1], {"x": 1}, -1, 0):
            (copy / "config.json").write_text(json.dumps(changed(config, path, new)))
            resign(copy, manifest)
            try:
                store.read_shapes(copy)
            except CheckpointError as error:
                refused += 1
                assert str(copy) in str(error)  # noqa: PT017  (there may be none)
    assert refused > 30


def test_grids_that_fit_no_layer_are_refused(copy):
    manifest = json.loads((copy / "gptq_jax.json").read_text())
    manifest["quantized"]["layers.0.input_layernorm"] = manifest["quantized"]["layers.0.mlp.up_proj"]
    resign(copy, manifest)
    with pytest.raises(CheckpointError, match=r"grids of \['layers.0.input_layernorm'\], which are no layers"):
        load(copy)


def test_other_bits_than_were_stored_are_refused(copy):
    manifest = json.loads((copy / "gptq_jax.json").read_text())
    manifest["quantized"]["layers.0.mlp.up_proj"]["bits"] = 8
    resign(copy, manifest)
    with pytest.raises(CheckpointError, match=r"layers\.0: cannot be restored"):
        load(copy)


def contents(path):
    return {name: (path / name).read_bytes() for name in files(path)}


def test_an_existing_directory_is_kept_unless_it_may_be_replaced(copy):
    before = contents(copy)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(float_model(layers=1), copy)
    assert contents(copy) == before
    model = float_model(layers=1, seed=5)
    save(model, copy, overwrite=True)
    check_same(model, load(copy))
    assert os.listdir(copy.parent) == ["store"]


def test_directories_of_others_are_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("mine", "file"):
        with pytest.raises(FileExistsError, match="was not written by gptq-jax"):
            save(float_model(layers=1), tmp_path / name, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    save(float_model(layers=1), tmp_path / "empty", overwrite=True)
    load(tmp_path / "empty")


def test_the_parent_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: create it"):
        save(float_model(layers=1), tmp_path / "nowhere" / "out")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["write_json", "digest", "sync", "_exchange", "os.rename"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_save_cut_short_leaves_everything_as_it_was(copy, monkeypatch, at, error, existing):
    target = copy if existing or at == "_exchange" else copy.parent / "new"
    before = contents(copy)
    calls = 0
    modules = {"digest": manifest_of, "sync": directory, "_exchange": directory, "os.rename": os}
    module, name = modules.get(at, store), at.removeprefix("os.")
    real = getattr(module, name)

    def fails(*args):
        nonlocal calls
        calls += 1
        # The rename that counts is the one that gives the new directory its name.
        is_last = str(args[0]).endswith(".partial") and args[-1] == target
        if is_last if at in ("os.rename", "_exchange") else calls == 2:
            raise error
        return real(*args)

    monkeypatch.setattr(module, name, fails)
    if at == "os.rename":
        monkeypatch.setattr(directory, "_exchange", lambda *_: False)
    with pytest.raises(type(error)):
        save(rounded(), target, overwrite=True)
    monkeypatch.undo()
    assert os.listdir(copy.parent) == ["store"]
    assert contents(copy) == before


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 70 * 2**20))
    monkeypatch.setattr(store, "write_part", lambda *_: pytest.fail("work was done"))
    store.check_target(tmp_path / "out", overwrite=False, nbytes=5 * 2**20)
    with pytest.raises(OSError, match="has 70 MiB free, but 84 are needed"):
        store.check_target(tmp_path / "out", overwrite=False, nbytes=20 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 2**20))
    with pytest.raises(OSError, match="has 1 MiB free"):
        save(float_model(layers=1), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_two_saves_are_the_same_bytes(stored, tmp_path, monkeypatch):
    import time

    monkeypatch.setattr(time, "time", lambda: 1e9)
    model = replace(rounded(symmetric=False), tokenizer=byte_tokenizer())
    save(replace(model, report={**model.report, "seconds": {"solve": 3.0}, "peak_bytes": 5}), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(stored)


def test_sharded_arrays_make_the_same_bytes(tmp_path):
    model = float_model(layers=1)
    save(model, tmp_path / "one")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",))
    over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    save(replace(model, params=jax.device_put(model.params, over)), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_stores_of_version_1_are_read(tmp_path):
    """All arrays in one checkpoint, as Orbax's own Checkpointer writes it."""
    import orbax.checkpoint as ocp

    model = rounded(symmetric=False)
    save(model, tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "arrays")
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old" / "arrays", unpacked(model.params))
    manifest = json.loads((tmp_path / "old" / "gptq_jax.json").read_text())
    arrays = [file for file in (tmp_path / "old" / "arrays").rglob("*") if file.is_file()]
    entries = {name: entry for name, entry in manifest["files"].items() if not name.startswith("arrays/")}
    manifest |= {"version": 1, "files": {**entries, **manifest_of.file_entries(arrays, tmp_path / "old")}}
    resign(tmp_path / "old", manifest)
    check_same(model, load(tmp_path / "old"))
