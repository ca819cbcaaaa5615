"""Measurements as tables of a terminal."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from gptq_jax.bench.timing import Yardstick

Rows = Sequence[dict[str, Any]]


def yardstick_line(yardstick: Yardstick) -> str:
    """What the device reaches at most, in a sentence."""
    return (
        f"{yardstick.device}: copies {yardstick.bytes_per_second / 1e9:.4g} GB/s, "
        f"multiplies {yardstick.flops_per_second / 1e12:.3g} TFLOP/s in {yardstick.dtype}"
    )


def kernel_table(rows: Rows) -> Table:
    """One row a product and number of tokens; failures and what ran are told below."""
    table = _table("product", "d_in x d_out", "M", "us", "float", "dequant", "x float", "roofline", "error")
    for row in rows:
        table.add_row(
            row["product"],
            f"{row['d_in']}x{row['d_out']}",
            str(row["tokens"]),
            *(_number(row.get(name)) for name in ("us", "float_us", "dequantize_us", "speedup")),
            f"{row['of_roofline']:.0%}" if "of_roofline" in row else "",
            f"{row['relative_error']:.1e}" if "relative_error" in row else "",
        )
    ran = sorted({row["implementation"] for row in rows if "implementation" in row})
    failed = [f"{row['product']} at {row['tokens']} failed: {row['failed']}" for row in rows if "failed" in row]
    table.caption = "\n".join([f"by {', '.join(ran) or 'nothing'}", *failed])
    return table


def decode_table(rows: Rows) -> Table:
    """One row a kind of weights and batch; says which figures are reckoned from fewer blocks."""
    table = _table("weights", "batch", "ms a step", "tokens/s", "x float", "GB", "by")
    for row in rows:
        mark = "*" if row["extrapolated"] else ""
        table.add_row(
            row["weights"],
            str(row["batch"]),
            _number(row["step_ms"]) + mark,
            _number(row["tokens_per_second"]) + mark,
            _number(row.get("speedup")),
            f"{row['parameter_bytes'] / 1e9:.3g}",
            ", ".join(row["implementations"]),
        )
    parts = {
        f"{row['weights']}: {row['layers_timed']} of {row['layers']} blocks" for row in rows if row["extrapolated"]
    }
    if parts:
        table.caption = f"* reckoned from the blocks that fit this memory ({'; '.join(sorted(parts))})"
    return table


def compare_with_float(rows: Rows) -> list[dict[str, Any]]:
    """The rows of quantized models with `speedup`: over the float model at the same batch, where it was timed."""
    floats = {row["batch"]: row["step_ms"] for row in rows if row["implementations"] == ["xla"]}
    return [
        {**row, "speedup": floats[row["batch"]] / row["step_ms"]}
        if row["batch"] in floats and row["implementations"] != ["xla"]
        else dict(row)
        for row in rows
    ]


def _table(*names: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    for name in names:
        text = name in ("product", "weights", "by")
        table.add_column(name, justify="left" if text else "right", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
