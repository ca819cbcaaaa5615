"""GPTQ for Flax language models: quantize, check, store and run them at 2, 3, 4 or 8 bits."""

# ruff: noqa: I001  (grouped by level)
from importlib.metadata import version as _version

# grids and packed weights
from gptq_jax.spec import QuantSpec, SpecRules
from gptq_jax.tensor import QuantizedTensor

# methods
from gptq_jax.methods import (
    LayerBatch,
    Method,
    Solution,
    coordinate_descent,
    fractional_zeros,
    gptaq,
    gptq,
    gptq_solve,
    hqq,
    qep,
    rtn,
)

from gptq_jax.methods.base import Finish, Rewrite, Tuning
from gptq_jax.rewrites import awq, hadamard, smooth
from gptq_jax.tuning import block_tuning, learned_rounding

# models and checkpoints
from gptq_jax.hooks.registry import register_layer
from gptq_jax.models.adapted import AdaptedModel, adapt
from gptq_jax.models.base import Model
from gptq_jax.models.lora import lora, merge_lora, with_lora
from gptq_jax.models.prepared import prepare
from gptq_jax.storage import CheckpointError, CheckpointSource, StoreSink, load, open_checkpoint, save
from gptq_jax.storage.export import export
from gptq_jax.storage.peft import load_lora, save_lora
from gptq_jax.storage.sharding import ShardingRules

# the whole job
from gptq_jax.allocation import allocate_bits
from gptq_jax.calibration import calibration_batches
from gptq_jax.comparison import ComparisonTable, compare_methods, write_report
from gptq_jax.correction import eora, low_rank_correction
from gptq_jax.distillation import distill, end_to_end_tuning
from gptq_jax.evaluate import Reference, compare, perplexity
from gptq_jax.generate import generate
from gptq_jax.pipeline import quantize, quantize_blocks
from gptq_jax.planning.plan import plan
from gptq_jax.report import Report
from gptq_jax.self_calibration import self_windows

__version__ = _version("gptq-jax")

__all__ = [
    "AdaptedModel",
    "CheckpointError",
    "CheckpointSource",
    "ComparisonTable",
    "Finish",
    "LayerBatch",
    "Method",
    "Model",
    "QuantSpec",
    "QuantizedTensor",
    "Reference",
    "Report",
    "Rewrite",
    "ShardingRules",
    "Solution",
    "SpecRules",
    "StoreSink",
    "Tuning",
    "adapt",
    "allocate_bits",
    "awq",
    "block_tuning",
    "calibration_batches",
    "compare",
    "compare_methods",
    "coordinate_descent",
    "distill",
    "end_to_end_tuning",
    "eora",
    "export",
    "fractional_zeros",
    "generate",
    "gptaq",
    "gptq",
    "gptq_solve",
    "hadamard",
    "hqq",
    "learned_rounding",
    "load",
    "load_lora",
    "lora",
    "low_rank_correction",
    "merge_lora",
    "open_checkpoint",
    "perplexity",
    "plan",
    "prepare",
    "qep",
    "quantize",
    "quantize_blocks",
    "register_layer",
    "rtn",
    "save",
    "save_lora",
    "self_windows",
    "smooth",
    "with_lora",
    "write_report",
]
