"""A whole quantized model, moved by gradient descent towards the float model's next-token distribution.

What EfficientQAT does after its blocks (Chen et al. 2024, arXiv 2407.11062, section 3.3, E2E-QP): codes stay, scales
are trained end to end; so are zero points here, where they are stored as fractions. The loss is the distance from the
float model, as in LLM-QAT (Liu et al. 2023, arXiv 2305.17888), not that from the text:
    minimize over scales  mean over tokens of KL(p_float || p_quantized)
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptq_jax.calibration import Batch
from gptq_jax.distillation.divergence import divergence, divergence_slope
from gptq_jax.distillation.student import Moving, Student, Window
from gptq_jax.matmul import holds_prepared
from gptq_jax.methods.base import Finish, Tuning
from gptq_jax.methods.contract import check_tuning
from gptq_jax.models.base import Model, check_no_lora, check_tokens, embed, head_params
from gptq_jax.parallel import is_cut
from gptq_jax.report import Report
from gptq_jax.storage.progress import Progress
from gptq_jax.tensor import QuantizedTensor
from gptq_jax.tuning.block_tuning import block_tuning

EPOCHS, RATE = 1, 2e-3  # a fifth of the rate that a single block takes
HELD_BACK = 16  # one of so many windows is not learned from


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What a distillation did.

    Attributes:
        before, after: KL(float || quantized) on the windows that were held back, the mean over tokens, in nats. After
            is never more: what did not help is thrown away.
        steps: that were taken.
    """

    before: float
    after: float
    steps: int


def distill(
    model: Model,
    quantized: Model,
    batches: Sequence[Any],
    *,
    tuning: Tuning | None = None,
    progress: Progress | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[Model, Distilled]:
    """Train the scales of all packed layers at once, so that the model predicts what the float one does.

    Codes, what is stored, and bits per weight stay as they are. Assumes text like that which the model will see: a few
    hundred windows of it, more than solving needs. Each is one step, of about eight forward passes; one device does the
    work. Gradients go back through one block at a time, which runs again for that, so that beside both models there are
    in memory one block's float weights, the stream between blocks, and what moves.

    Args:
        model: the float one. Only its predictions count: of a model that was rewritten, the original will do.
        quantized: packed, by this library or another.
        batches: tokens or `Batch`es, as for `quantize`. One window in 16 is held back, to see what was gained.
        tuning: what moves, and how; `block_tuning(epochs=1, rate=2e-3)` if None: scales, and zero points that are
            stored as fractions. The weights that it is given are the packed ones.
        progress: where steps are kept, so that the same call goes on after a crash.
        on_step: called after each step, with how many are done, and how many there are.

    Returns:
        The model with other scales, and what they brought.

    Raises:
        ValueError: before the work: fewer than two windows, bad tokens, models with other vocabularies, or a quantized
            one that is not packed, is prepared, cut over devices or carries adapters; during it: a divergence that is
            not finite.
    """
    tuning = block_tuning(epochs=EPOCHS, rate=RATE) if tuning is None else tuning
    check_tuning(tuning)
    check_models(model, quantized)
    learned, held_back = cut(batches, quantized)
    student = Student(quantized, tuning, tuning.epochs * len(learned))
    configs = model.config, quantized.config
    heads = tuple(head_params(each.config, each.params) for each in (model, quantized))

    def left(moving: Sequence[Moving]) -> float:
        sums = [
            divergence(configs, heads, last_state(model, each), student.states(moving, each)[-1], each.mask)
            for each in held_back
        ]
        total, count = np.sum(np.asarray(sums, np.float64), axis=0)
        return float(total / count)

    moving, done = student.start(), 0
    before = left(moving)
    if progress is not None:
        moving, done = progress.open(moving)
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(len(learned)) for _ in range(tuning.epochs)])
    for number in order[done:]:
        window = learned[number]
        *states, last = student.states(moving, window)
        loss, slope = divergence_slope(configs, heads, last_state(model, window), last, window.mask)
        if not np.isfinite(loss):
            raise ValueError(f"the divergence is {loss} in step {done + 1} of {student.steps}: use a lower rate.")
        moving, done = student.step(moving, window, states, slope), done + 1
        if progress is not None:
            progress.keep(moving, done)
        if on_step is not None:
            on_step(done, student.steps)
    after = left(moving)
    if not after < before:
        return quantized, Distilled(before=before, after=before, steps=done)
    return student.packed(moving), Distilled(before=before, after=after, steps=done)


def end_to_end_tuning(*, epochs: int = EPOCHS, rate: float = RATE) -> Finish:
    """`distill` as the end of a method, on its calibration: `qep()._replace(finish=end_to_end_tuning())`.

    Args:
        epochs, rate: of `block_tuning`.
    """
    tuning = block_tuning(epochs=epochs, rate=rate)

    def apply(model: Any, quantized: Any, report: Report, batches: Sequence[Batch]) -> tuple[Any, Report]:
        trained, found = distill(model, quantized, batches, tuning=tuning)
        report = noted(report, found)
        return replace(trained, report=report.to_json()), report

    return Finish(apply, "distill", settings=(("distill_epochs", epochs), ("distill_rate", rate)))


def noted(report: Report, found: Distilled) -> Report:
    """The report of a quantization, with what distilling did after it."""
    return replace(report, settings={**report.settings, "distilled": asdict(found)})


def last_state(model: Model, window: Window) -> Float[Array, "1 time d_model"]:
    """The float model's stream after its last block, whose real tokens look at no padding."""
    x = embed(model.config, model.params, window.tokens)
    for block in model.blocks():
        x = block.forward.run(block.params, x, window.mask, {})
    return x


def check_models(model: Any, quantized: Any) -> None:
    """Raise ValueError saying why one cannot be brought nearer to the other."""
    if not (isinstance(model, Model) and isinstance(quantized, Model)):
        raise ValueError("distilling is for supplied architectures: of a module of one's own, train what `adapt` made.")
    check_no_lora(quantized, "distilled")
    if holds_prepared(quantized.params):
        raise ValueError("the quantized model is prepared to run here: distill the one it was prepared from.")
    leaves = jax.tree.leaves(quantized.params["layers"], is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    if not any(isinstance(leaf, QuantizedTensor) for leaf in leaves):
        raise ValueError("the quantized model holds no packed layers whose scales could be trained: quantize it first.")
    if is_cut((model.params, quantized.params)):
        raise ValueError("the parameters are cut over devices, but one device distills: load both without a mesh.")
    if len(sizes := {each.config.vocab_size for each in (model, quantized)}) > 1:
        raise ValueError(
            f"the models' vocabularies hold {sorted(sizes)} tokens: give the float model that the quantized one was "
            "made from."
        )


def cut(batches: Sequence[Any], model: Model) -> tuple[list[Window], list[Window]]:
    """The windows to learn from, and those that are held back: the last of each 16, or of fewer.

    Raises:
        ValueError: bad tokens, or fewer than two windows with any that are real.
    """
    found = []
    for batch in batches:
        tokens, mask = batch if isinstance(batch, Batch) else Batch(batch)
        rows = check_tokens(tokens, model.config.vocab_size)
        real = None if mask is None else np.asarray(mask, bool)
        for number in range(len(rows)):
            own = None if real is None else jnp.asarray(real[number : number + 1])
            if own is None or own.any():
                found.append(Window(rows[number : number + 1], own))
    if len(found) < 2:
        raise ValueError(f"batches hold {len(found)} windows: pass at least two, one of which is held back.")
    held = set(range(HELD_BACK - 1, len(found), HELD_BACK)) or {len(found) - 1}
    learned = [window for number, window in enumerate(found) if number not in held]
    return learned, [found[number] for number in sorted(held)]
