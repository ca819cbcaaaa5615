"""Train LoRA adapters over a packed model with optax, and write them and the merged model.

    python examples/qlora.py MODEL TEXT OUT [--rank 8 --steps 100 --length 256 --batch-size 2]

MODEL is a quantized model, like the directory that `gptq-jax quantize` wrote; TEXT a file to learn. OUT gets
`adapters`, in PEFT's format, and `merged`, a float checkpoint.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gptq_jax
from gptq_jax.models.lora import Adapters


def train(
    model: gptq_jax.Model, batches: list[np.ndarray], *, rank: int, steps: int, learning_rate: float
) -> tuple[Adapters, list[float]]:
    """Trained adapters, and the loss of every step.

    Args:
        model: its packed weights stay as they are; prepared for this device or not.
        batches: tokens [batch, time], taken in turn.
        rank: of the adapters.
        steps: of Adam.
        learning_rate: its peak; it falls to zero along a cosine.
    """
    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps))

    @jax.jit
    def step(adapters, state, params, tokens):  # type: ignore[no-untyped-def]
        frozen = gptq_jax.Model(model.config, params)

        def loss_of(adapters: Adapters) -> jax.Array:
            logits = gptq_jax.with_lora(frozen, adapters)(tokens)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        loss, gradients = jax.value_and_grad(loss_of)(adapters)
        updates, state = optimizer.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state, loss

    adapters = gptq_jax.lora(model, rank)
    state, losses = optimizer.init(adapters), []
    for number in range(steps):
        tokens = jnp.asarray(batches[number % len(batches)])
        adapters, state, loss = step(adapters, state, model.params, tokens)
        losses.append(float(loss))
        if number % 10 == 0 or number == steps - 1:
            print(f"step {number:4d}  loss {losses[-1]:.4f}", flush=True)
    return adapters, losses


def main(arguments: list[str] | None = None) -> list[float]:
    """The losses of the run that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    asked = parser.parse_args(arguments)
    asked.out.mkdir(exist_ok=True)

    packed = gptq_jax.load(asked.model)
    drawn = gptq_jax.calibration_batches(
        asked.text, packed.tokenizer, samples=8 * asked.batch_size, length=asked.length, batch_size=asked.batch_size
    )
    batches = [np.asarray(batch) for batch in drawn]
    runs = gptq_jax.prepare(packed)
    adapters, losses = train(runs, batches, rank=asked.rank, steps=asked.steps, learning_rate=asked.learning_rate)
    gptq_jax.save_lora(adapters, packed, asked.out / "adapters", overwrite=True)
    gptq_jax.export(gptq_jax.merge_lora(packed, adapters), asked.out / "merged", format="float", overwrite=True)
    return losses


if __name__ == "__main__":
    main()
