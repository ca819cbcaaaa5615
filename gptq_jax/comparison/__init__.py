"""Quantization methods side by side: a grid of runs that can be gone on with, tables, plots, and a page."""

from gptq_jax.comparison.grid import compare_methods
from gptq_jax.comparison.table import ComparisonTable
from gptq_jax.comparison.write import write_report

__all__ = ["ComparisonTable", "compare_methods", "write_report"]
