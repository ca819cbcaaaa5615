"""Checkpoints that other tools quantized, read without unpacking them: GPTQ, compressed-tensors, AWQ."""
