"""`gptq-jax bench`: thin commands over the functions of this package."""

import json
from typing import Annotated, Any

import typer

from gptq_jax.options import JsonOption

ShapeOption = Annotated[str, typer.Option(help="llama-7b, llama-13b, llama-70b, qwen-7b, qwen-14b or smollm2.")]
BitsOption = Annotated[int, typer.Option(help="2, 3, 4 or 8.")]
GroupOption = Annotated[int, typer.Option(help="Inputs that share a scale; -1: the whole column.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="Of activations: bfloat16, float16 or float32. [bfloat16; float32 on a CPU]")
]
ImplementationOption = Annotated[
    str | None, typer.Option(help="mosaic_hopper, mosaic_ampere, xla_tiled or reference. [the one that runs here]")
]


def kernels(
    shapes: Annotated[str, typer.Option(help="Models, separated by commas; see bench decode --help.")] = "llama-7b",
    batch: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "1,8,16,64,256,2048",
    bits: BitsOption = 4,
    group_size: GroupOption = 128,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="With a zero point for each group.")] = False,
    dtype: DtypeOption = None,
    implementation: ImplementationOption = None,
    tune_first: Annotated[
        bool, typer.Option("--tune", help="First measure every tiling, and write this device's table.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Time products with packed weights against float ones and against XLA's dequantize-then-multiply."""
    from gptq_jax.bench.kernels import measure_shapes, tune
    from gptq_jax.bench.shapes import products, shape_of
    from gptq_jax.bench.tables import kernel_table, yardstick_line
    from gptq_jax.bench.timing import measure_yardstick
    from gptq_jax.terminal import note, steps_progress

    configs = {name: shape_of(name) for name in shapes.split(",")}
    tokens = numbers(batch, "--batch")
    rows: list[dict[str, Any]] = []
    per_shape = len(tokens) * 4
    with steps_progress("measuring", len(configs) * per_shape) as step:
        step("bandwidth and matmul rate", 0)
        yardstick = measure_yardstick(dtype)
        for name, config in configs.items():
            if tune_first:
                for d_in, d_out in products(config).values():
                    for count in tokens:
                        step(f"tuning {d_in}x{d_out} at {count}", 0)
                        tune(d_in, d_out, count, yardstick, bits=bits, group_size=group_size)
            measured = measure_shapes(
                config,
                tokens,
                yardstick,
                bits=bits,
                group_size=group_size,
                symmetric=not asymmetric,
                implementation=implementation,
            )
            for row in measured:
                rows.append({"shape": name, **row})
                step(f"{name} {row['product']} at {row['tokens']}", 1)
    note(yardstick_line(yardstick))
    _show({"yardstick": vars(yardstick), "rows": rows}, kernel_table(rows), as_json)


def decode(
    shape: ShapeOption = "llama-7b",
    batch: Annotated[str, typer.Option(help="Numbers of sequences, separated by commas.")] = "1,8,32",
    bits: BitsOption = 4,
    group_size: GroupOption = 128,
    dtype: DtypeOption = None,
    implementation: ImplementationOption = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks to time. [as many as fit]")] = None,
    no_float: Annotated[bool, typer.Option("--no-float", help="Leave out the float model.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Tokens per second of a whole decoder of random weights, quantized and float."""
    from gptq_jax.bench.decode import measure_decode
    from gptq_jax.bench.shapes import shape_of
    from gptq_jax.bench.tables import compare_with_float, decode_table
    from gptq_jax.spec import QuantSpec
    from gptq_jax.terminal import steps_progress

    config, batches = shape_of(shape), numbers(batch, "--batch")
    specs = [QuantSpec(bits=bits, group_size=group_size), *([] if no_float else [None])]
    rows: list[dict[str, Any]] = []
    with steps_progress("measuring", len(specs) * len(batches)) as step:
        for spec in specs:
            measured = measure_decode(
                config,
                batches,
                spec,
                dtype=dtype,
                layers=layers,
                implementation=implementation,
                on_row=lambda text: step(text, 0),
            )
            for row in measured:
                rows.append({"shape": shape, **row})
                step("", 1)
    rows = compare_with_float(rows)
    _show({"rows": rows}, decode_table(rows), as_json)


def numbers(text: str, option: str) -> list[int]:
    """Positive integers separated by commas, or ValueError naming the option."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(f"{option} {text!r}: pass positive numbers separated by commas, like 1,8,16.")
    return found


def _show(result: dict[str, Any], table: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
    else:
        from rich.console import Console

        Console().print(table)
