"""Models of this library under lm-evaluation-harness, an optional package; what is pure here works without it."""
