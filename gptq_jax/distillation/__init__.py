"""Quantized models trained as a whole towards the float one."""

from gptq_jax.distillation.end_to_end import Distilled, distill, end_to_end_tuning

__all__ = ["Distilled", "distill", "end_to_end_tuning"]
