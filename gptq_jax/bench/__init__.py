"""Measure products and whole models on the device at hand: what `gptq-jax bench` runs."""
