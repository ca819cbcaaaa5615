"""Implementations of x @ quantized weight, on plain arrays; imports nothing of gptq_jax."""
