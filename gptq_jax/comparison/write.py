"""The files that a comparison leaves: a table for each kind of reader, plots, and a page with all of it."""

import json
import os
from pathlib import Path

from gptq_jax.comparison.html import html_report
from gptq_jax.comparison.plots import all_plots
from gptq_jax.comparison.table import ComparisonTable
from gptq_jax.storage.directory import put_file

TABLES = ("table.md", "table.csv", "table.json")
PAGE = "report.html"


def write_report(table: ComparisonTable, path: str | os.PathLike[str], *, plots: bool = True) -> None:
    """Write table.md, table.csv, table.json, report.html and, with matplotlib, plots as PNG into a directory.

    Args:
        table: of `compare_methods`.
        path: a directory; made if there is none. Files of these names are replaced.
        plots: draw them.

    Raises:
        ImportError: plots are wanted, and matplotlib is missing.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = all_plots(table) if plots else {}
    for name, picture in pictures.items():
        put_file(folder / name, picture)
    for name, text in zip(
        TABLES, (table.markdown(), table.csv(), json.dumps(table.to_json(), indent=1) + "\n"), strict=True
    ):
        put_file(folder / name, text)
    put_file(folder / PAGE, html_report(table, pictures))
