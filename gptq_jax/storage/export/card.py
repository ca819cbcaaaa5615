"""The model card of an export: the recipe and what was measured, nothing else."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

LOADING = {
    "gptq": "GPTQModel, transformers and vLLM load it, and so does gptq-jax:",
    "gptq_v2": "GPTQModel and vLLM load it, and so does gptq-jax:",
    "compressed-tensors": "vLLM and transformers (with compressed-tensors) load it, and so does gptq-jax:",
    "float": "Anything that reads Hugging Face checkpoints loads it, and so does gptq-jax:",
}
# Of the report's settings, in this order; others follow as they come.
SETTINGS = ("model", "method", "calibration", "samples", "length", "seed")


def card(
    report: Mapping[str, Any] | None, format: str, title: str, evaluations: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Markdown with the metadata the Hugging Face Hub reads.

    Args:
        report: of the quantization, or None where there is none.
        format: of the export.
        title: of the card.
        evaluations: each as `gptq-jax eval --json` prints it.
    """
    tags = ["gptq-jax", format] if format != "float" else ["gptq-jax"]
    lines = ["---", "library_name: transformers", "tags:", *(f"- {tag}" for tag in tags), "---", "", f"# {title}", ""]
    lines += [f"Written by gptq-jax {version('gptq-jax')} in the format `{format}`.", ""]
    lines += _recipe(report) + _perplexities(evaluations)
    lines += [LOADING[format], "", f'    model = gptq_jax.load("{title}")', ""]
    return "\n".join(lines)


def _recipe(report: Mapping[str, Any] | None) -> list[str]:
    if not report:
        return ["## Recipe", "", "No record of a quantization came with the model.", ""]
    settings = dict(report.get("settings", {}))
    rows = [(name, settings.pop(name)) for name in SETTINGS if name in settings] + list(settings.items())
    layers = report.get("layers", [])
    grids: dict[str, int] = {}
    for layer in layers:
        label = _grid(layer["spec"])
        grids[label] = grids.get(label, 0) + 1
    rows = [("grid", f"{label} ({count} layers)") for label, count in grids.items()] + rows
    if layers:
        weights = sum(layer["d_in"] * layer["d_out"] for layer in layers)
        rows.append(("bits per weight of these layers", f"{8 * sum(la['nbytes'] for la in layers) / weights:.3f}"))
    fell_back = [layer["path"] for layer in layers if layer["fell_back"]]
    if fell_back:
        rows.append(("could not be solved and were rounded to nearest", ", ".join(fell_back)))
    if kept := report.get("kept_float"):
        rows.append(("left float", ", ".join(kept)))
    return [
        "## Recipe",
        "",
        "| | |",
        "|---|---|",
        *(f"| {_cell(name).replace('_', ' ')} | {_cell(value)} |" for name, value in rows),
        "",
    ]


def _grid(spec: Mapping[str, Any]) -> str:
    groups = "one scale a column" if spec["group_size"] == -1 else f"groups of {spec['group_size']}"
    return f"{spec['bits']} bits, {groups}, {'symmetric' if spec['symmetric'] else 'asymmetric'}"


def _perplexities(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    if not evaluations:
        return ["## Perplexity", "", "None was measured for this card.", ""]
    header = ["text", "tokens of a window", "windows", "perplexity", "of the model compared with", "KL divergence"]
    lines = ["## Perplexity", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for found in evaluations:
        other = ""
        if "against_perplexity" in found:
            other = f"{found['against_perplexity']:.4f} ({_cell(found.get('against', ''))})"
        divergence = f"{found['kl_divergence']:.5f}" if "kl_divergence" in found else ""
        cells = [_cell(found.get(name, "")) for name in ("text", "length", "windows")]
        cells += [f"{found['perplexity']:.4f}", other, divergence]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "Windows do not overlap; each token is scored once, the first of a window never.", ""]


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|") if value is not None else "none"
