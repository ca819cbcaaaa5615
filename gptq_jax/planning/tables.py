"""A plan as a table for a terminal of 80 columns, and the lines around it."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from gptq_jax.planning.plan import Plan


def plan_table(plan: Plan) -> Table:
    """A row a grid."""
    with_devices, with_times = plan.device_memory is not None, plan.profile is not None
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ["grid", "bits", "size", "quantize", "run"]
    columns += ["devices"] if with_devices else []
    columns += ["time", "tokens/s"] if with_times else []
    for name in columns:
        table.add_column(name, justify="left" if name == "grid" else "right", no_wrap=True)
    for row in plan.grids:
        made = row.quantize
        cells = [row.grid, f"{row.bits_per_weight:.2f}", gigabytes(row.stored_bytes)]
        cells += ["" if made is None else gigabytes(made.total), gigabytes(row.run.total)]
        if with_devices:
            cells.append("-" if row.devices is None else str(row.devices))
        if with_times:
            cells.append("" if row.quantize_seconds is None else duration(row.quantize_seconds))
            cells.append("" if row.tokens_per_second is None else f"<{row.tokens_per_second:.2g}")
        table.add_row(*cells)
    return table


def plan_lines(plan: Plan) -> list[str]:
    """What the table's columns mean here, and what limits them."""
    run = plan.grids[0].run
    lines = [
        "size: of the arrays stored, before Orbax compresses them: codes by little, floats that had 16 bits by half",
        f"to run: {plan.sequences} x {plan.length} tokens; the cache takes {gigabytes(run.cache)}, activations "
        f"{gigabytes(run.activations)} as compiled for {plan.platform}",
        f"to quantize: block by block, {plan.samples} windows of {plan.length} tokens, {plan.batch_size} at a time",
    ]
    made = [row.quantize for row in plan.grids if row.quantize is not None]
    if made:
        most = max(made, key=lambda memory: memory.block)
        lines.append(f"  of that one block takes {gigabytes(most.block)}, which one device must hold")
        if plan.device_memory is not None and most.block > plan.device_memory:
            lines[-1] += f": {gigabytes(plan.device_memory)} are too few"
    if plan.profile is None:
        lines.append("no times: this device was never measured; --measure does that, once")
    else:
        lines.append(f"times are of {plan.profile.device}, one device, measured on {plan.profile.measured}")
    return lines


def gigabytes(nbytes: int | float) -> str:
    """Bytes in TB, GB or MB, of powers of ten, three digits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if nbytes >= size:
            return f"{nbytes / size:.{2 if nbytes < 10 * size else 1 if nbytes < 100 * size else 0}f} {unit}"
    return f"{nbytes / 1e6:.1f} MB"


def duration(seconds: int | float) -> str:
    """Seconds, minutes, hours or days, whichever reads best."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
