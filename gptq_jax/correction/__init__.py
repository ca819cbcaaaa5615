"""What quantizing left, made up for by adapters beside the packed weights."""

from gptq_jax.correction.low_rank import CorrectedLayer, bits_per_weight, eora, low_rank_correction

__all__ = ["CorrectedLayer", "bits_per_weight", "eora", "low_rank_correction"]
