import json
from dataclasses import asdict

import decoder_cases
import pytest
from decoder_models import build
from rich.console import Console
from typer.testing import CliRunner

from gptq_jax import plan
from gptq_jax.cli import app
from gptq_jax.planning import profile as profiles
from gptq_jax.planning.profile import DeviceProfile, profile_path, read_profile, write_profile
from gptq_jax.planning.tables import duration, gigabytes, plan_lines, plan_table
from gptq_jax.spec import QuantSpec, SpecRules
from gptq_jax.storage.base import CheckpointError

CONFIG = {**decoder_cases.CASES["tied_gqa"], "num_hidden_layers": 3}
MODEL = build(CONFIG)
FAST = DeviceProfile(
    device="a card",
    jax="0.10.2",
    measured="2026-01-02",
    dtype="float32",
    flops_per_second=1e12,
    bytes_per_second=1e11,
    solve_flops_per_second=1e11,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No profile that this machine may have."""
    monkeypatch.setenv("GPTQ_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*arguments):
    return CliRunner(env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, [*map(str, arguments)])


def test_llama_7b_by_hand():
    found = plan("llama-2-7b", [QuantSpec()], dtype="bfloat16", length=1024, sequences=2, device_memory=10 * 10**9)
    block = 4 * 4096 * 4096 + 3 * 4096 * 11008
    outer = 2 * 32000 * 4096 + 65 * 4096
    assert found.parameters == 32 * block + outer
    half, packed = found.grids
    assert half.stored_bytes == half.run.weights == 2 * found.parameters
    scales = 4 * 32 * 4096 + 2 * 32 * 11008 + 86 * 4096
    assert packed.stored_bytes == 32 * (block // 2 + 2 * scales) + 2 * outer
    assert packed.bits_per_weight == pytest.approx(4.125)
    assert packed.run.cache == 32 * 2 * 2 * 1024 * 4096 * 2
    assert (half.devices, packed.devices) == (2, 1)
    assert packed.quantizes
    assert half.quantize is None
    assert packed.quantize_seconds is packed.tokens_per_second is None  # nobody measured a device


def test_times_follow_the_profile():
    grids = [QuantSpec(group_size=16)]
    short, long = (plan(MODEL, grids, samples=n, length=128, profile=FAST).grids[1] for n in (16, 160))
    d, f, tokens = 48, 80, 16 * 128
    weights = 2 * d * 48 + 2 * d * 24 + 3 * d * f
    products = 2 * tokens * (weights + 3 * d**2 + f**2) + 6 * d**2 * (96 + 48 + 160) + 6 * f**2 * d
    solved = sum(a**3 // 3 + 2 * a**2 * b for a, b in ((d, 96), (d, 48), (d, 160), (f, d)))
    assert short.quantize_seconds == pytest.approx(3 * (products / 1e12 + solved / 1e11))
    assert long.quantize_seconds > short.quantize_seconds
    assert short.tokens_per_second == pytest.approx(1e11 / (short.run.weights + short.run.cache))


def test_several_kinds_of_grids_and_rules():
    rules = SpecRules(default=QuantSpec(bits=4, group_size=16), skip=("down",))
    found = plan(MODEL, [QuantSpec(bits=2, group_size=16), rules])
    assert [row.grid for row in found.grids] == ["float32", "W2 g16 sym", "W4 g16 sym and rules"]
    sizes = [row.stored_bytes for row in found.grids]
    assert sizes[1] < sizes[2] < sizes[0]


def test_the_tables_name_units_and_limits():
    found = plan(MODEL, profile=FAST, device_memory=10**9)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(plan_table(found))
    shown = captured.get()
    assert "…" not in shown
    for word in ("size", "devices", "tokens/s", "W4 g128 sym", "4.31"):
        assert word in shown
    lines = "\n".join(plan_lines(found))
    assert "a card, one device, measured on 2026-01-02" in lines
    assert "as compiled for cpu" in lines
    assert "no times: this device was never measured" in "\n".join(plan_lines(plan(MODEL)))
    assert [gigabytes(n) for n in (5e5, 1.5e9, 2.34e10, 8.1e11, 2e12)] == [
        "0.5 MB", "1.50 GB", "23.4 GB", "810 GB", "2.00 TB",
    ]  # fmt: skip
    assert [duration(s) for s in (61, 130, 8000, 200000)] == ["61 s", "2.2 min", "2.2 h", "2.3 d"]


def test_a_profile_is_measured_kept_and_used(cache):
    measured = profiles.measure_profile(size=128)
    assert min(measured.flops_per_second, measured.bytes_per_second, measured.solve_flops_per_second) > 1e6
    write_profile(measured, profile_path())
    assert profile_path().parent == cache
    assert read_profile(profile_path()) == measured
    assert plan(MODEL).profile == measured
    assert plan(MODEL, profile=FAST).profile == FAST


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"device": "x"}', json.dumps({**asdict(FAST), "flops_per_second": 0.0}), "{}"]
)
def test_a_profile_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=r"p\.json holds no device profile .* measure it again with --measure"):
        plan(MODEL, profile=tmp_path / "p.json")


def test_a_config_is_enough(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    by_folder, by_file, by_model = plan(str(tmp_path)), plan(str(tmp_path / "config.json")), plan(MODEL)
    assert by_folder.grids == by_file.grids == by_model.grids


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("llama-2-7", {}, FileNotFoundError, "did you mean llama-2-7b"),
        ("zzz", {}, FileNotFoundError, "use one of smollm2-135m, .* or a path"),
        (MODEL, {"dtype": "float16"}, ValueError, "dtype='float16' is not supported: use float32 or bfloat16"),
        (MODEL, {"samples": 0}, ValueError, "samples=0 must be positive"),
        (MODEL, {"length": 0}, ValueError, "length=0 must be positive"),
        (MODEL, {"sequences": -1}, ValueError, "sequences=-1 must be positive"),
        (MODEL, {"device_memory": 0}, ValueError, "device_memory=0 must be positive"),
        (MODEL, {"length": 129}, ValueError, "length=129 is more than the model's context of 128"),
        (MODEL, {"device_memory": 50_000}, ValueError, "cannot hold one block: at W2 .* it has 0.0 MB, and its act"),
        (MODEL, {"grids": [SpecRules(skip=("nowhere",))]}, ValueError, "no layer matches 'nowhere'"),
        (MODEL, {"profile": "no/such.json"}, FileNotFoundError, "no/such.json"),
    ],
)
def test_bad_arguments_are_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        plan(model, **options)


def test_configs_that_describe_nothing_are_named(tmp_path):
    for content, message in (("[]", "is not a JSON object"), ('{"model_type": "mamba"}', "'mamba' is not supported")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            plan(str(tmp_path))


def test_the_command_prints_json_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    options = ("--bits", "4,2", "--group-size", "16,-1", "--asymmetric", "--device-memory", "1GB", "--json")
    result = run("plan", tmp_path, *options)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    grids = [QuantSpec(bits=b, group_size=g, symmetric=False) for b in (4, 2) for g in (16, -1)]
    assert found == json.loads(
        json.dumps({**plan(MODEL, grids, device_memory=10**9).to_json(), "model": str(tmp_path)})
    )
    assert found["grids"][1]["run"]["total"] == sum(
        found["grids"][1]["run"][k] for k in ("weights", "cache", "activations")
    )


def test_the_command_prints_a_table_and_measures(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(profiles, "measure_profile", lambda: FAST)
    result = run("plan", tmp_path, "--measure")
    assert result.exit_code == 0, result.stderr
    assert "parameters in 3 blocks" in result.stdout
    assert "tokens/s" in result.stdout
    assert "wrote" in result.stderr
    assert read_profile(profile_path()) == FAST


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("llama-2-7b", "--bits", "5"), "bits=5 is not supported"),
        (("llama-2-7b", "--bits", "four"), "--bits 'four' is no list of integers"),
        (("llama-2-7b", "--group-size", "1,x"), "--group-size '1,x' is no list of integers"),
        (("llama-2-7b", "--device-memory", "lots"), "'lots' is no size"),
        (("llama-2-7b", "--device-memory", "-3GB"), "'-3GB' is no size"),
        (("llama-9", "--measure"), "llama-9 is no model here and no shape that is known"),
    ],
)
def test_the_command_refuses(options, message):
    result = run("plan", *options)
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert message in result.stderr
