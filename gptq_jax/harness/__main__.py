"""`python -m gptq_jax.harness ...` is `lm_eval ...` with the model `gptq_jax`, for any version of the harness."""

from lm_eval.__main__ import cli_evaluate

import gptq_jax.harness.model  # noqa: F401  (registers itself)

if __name__ == "__main__":
    cli_evaluate()
