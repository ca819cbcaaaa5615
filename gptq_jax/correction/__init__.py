"""What quantizing left, made up for by adapters beside the packed weights."""

from gptq_jax.correction.low_rank import CorrectedLayer, bits_per_weight, eora

__all__ = ["CorrectedLayer", "bits_per_weight", "eora"]
