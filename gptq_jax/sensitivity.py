"""How much a model's predictions feel the weights of each layer: the traces of the Fisher information.

To second order, a small change D of one layer's weights moves the distributions of the tokens of a text by
    KL(p || p_D) = 1/2 E (sum of D * S)^2,    S the slope of log p(tokens) in the weights, tokens drawn from p.
S is the sum of x g^T over inputs x and slopes g in outputs. With x and g taken for independent (K-FAC, Martens & Grosse
2015, arXiv 1503.05671), and all outputs for equally important, this is
    1/2 F tr(D^T H D) / (tr(H) d_out),         F = E |S|^2, the trace, H = sum of x x^T:
the average trace times the error, as in HAWQ-V2 (Dong et al. 2019, arXiv 1911.03852), the error being that of outputs.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from gptq_jax.activations import Activations
from gptq_jax.evaluate import by_pieces
from gptq_jax.hooks.nnx import Params, kernel_of, with_kernel
from gptq_jax.models.base import Headed, apply_head
from gptq_jax.models.quantizable import Calibration, Forward
from gptq_jax.parallel.data import on_host
from gptq_jax.tuning.fit import Kernels

WINDOWS = 8  # of the calibration: the mean over so many is within some 10 % of that over all


class Window(NamedTuple):
    """A row of the calibration.

    Attributes:
        state: of the model, [1, time, d_model].
        mask: True for real tokens; None if all are.
    """

    state: Float[Array, "1 time d_model"]
    mask: Bool[Array, "1 time"] | None

    @property
    def tokens(self) -> int:
        """The real ones."""
        return self.state.shape[1] if self.mask is None else int(self.mask.sum())


def fisher_traces(
    calibration: Calibration,
    layers: Collection[str],
    *,
    directory: str | PathLike[str] | None = None,
    on_block: Callable[[], None] | None = None,
) -> dict[str, float]:
    """E |slope of log p(tokens) in the weights|^2 of each layer, per token.

    One pass forward and one back, a block at a time, of the first few windows; one device does the work. Between
    the two, the stream before each block is kept.

    Args:
        calibration: of a float model whose head is known.
        layers: full paths of those that are asked for.
        directory: where the streams are kept, as for `Activations`.
        on_block: called when a block is behind: each once on the way there, and once on the way back.

    Raises:
        ValueError: by name: a layer whose slopes are not finite.
    """
    if calibration.head is None:
        raise ValueError("the calibration is of a model whose head is not known: there is no token to predict.")
    windows = _windows(calibration)
    before = Activations(directory)
    for block in calibration.blocks:
        params = block.params
        for number, (x, mask) in enumerate(windows):
            before.append(on_host(x))
            windows[number] = Window(block.forward.run(params, x, mask, {}), mask)
        if on_block is not None:
            on_block()

    config, head = calibration.head()
    keys = jax.random.split(jax.random.key(0), len(windows))
    slopes = [_random_slope(config, head, x, mask, key) for (x, mask), key in zip(windows, keys, strict=True)]
    del head
    tokens = sum(window.tokens for window in windows)
    found = {}
    for index, block in reversed(list(enumerate(calibration.blocks))):
        params = block.params
        paths = [path for group in block.groups for path in group if block.prefix + path in layers]
        squares = []
        for number, (_, mask) in enumerate(windows):
            x = jnp.asarray(before[index * len(windows) + number])
            own, slopes[number] = _back(block.forward, params, paths, x, mask, slopes[number])
            squares.append(own)
        found.update({block.prefix + path: sum(float(own[path]) for own in squares) / tokens for path in paths})
        if on_block is not None:
            on_block()
    if wrong := sorted(path for path, trace in found.items() if not np.isfinite(trace)):
        raise ValueError(f"the model's predictions have no finite slope in {wrong[0]}: check it, or use float32.")
    return found


def expected_divergence(trace: float, loss: float, energy: float, d_out: int) -> float:
    """KL(float || quantized) that the error of one layer is expected to bring, in nats per token.

    Args:
        trace: of the Fisher information, of `fisher_traces`.
        loss: tr(D^T H D), D the change of the weights.
        energy: tr(H), of the same H.
        d_out: outputs of the layer.
    """
    return 0.5 * trace * loss / (energy * d_out)


def _windows(calibration: Calibration) -> list[Window]:
    """The first rows with any real token, before the first block."""
    found: list[Window] = []
    for states, mask in zip(calibration.start(), calibration.masks, strict=True):
        for row in range(len(states)):
            own = None if mask is None else mask[row : row + 1]
            if own is None or own.any():
                found.append(Window(states[row : row + 1], own))
            if len(found) == WINDOWS:
                return found
    return found


def _back(
    forward: Forward,
    params: Params,
    paths: Sequence[str],
    x: Float[Array, "1 time d_model"],
    mask: Bool[Array, "1 time"] | None,
    slope: Float[Array, "1 time d_model"],
) -> tuple[dict[str, Array], Float[Array, "1 time d_model"]]:
    """|slope|^2 in the kernel of each path, and the slope in the stream before the block."""

    def run(kernels: Kernels, x: Array) -> Any:
        block = params
        for path, kernel in kernels.items():
            block = with_kernel(block, path, kernel)
        return forward.run(block, x, mask, {})

    # Not one jit, as in `tune`: the block's own compiled program is used again.
    _, pull = jax.vjp(run, {path: kernel_of(params, path) for path in paths}, x)
    slopes, before = pull(slope)
    return _squares(slopes), before


@jax.jit
def _squares(slopes: Kernels) -> dict[str, Array]:
    return {path: jnp.sum(slope.astype(jnp.float32) ** 2) for path, slope in slopes.items()}


@partial(jax.jit, static_argnums=0)
def _random_slope(
    config: Headed,
    head: Params,
    x: Float[Array, "1 time d_model"],
    mask: Bool[Array, "1 time"] | None,
    key: PRNGKeyArray,
) -> Float[Array, "1 time d_model"]:
    """A random slope in the stream after the last block, with the covariance of that of log p(token).

    In the logits that is diag(p) - p p^T. Of random signs times sqrt(p), unlike of tokens drawn, no rare one decides.
    """

    def piece(inputs: tuple[Array, Array]) -> Array:
        logits, pull = jax.vjp(lambda x: apply_head(config, head, x[None])[0], inputs[0])
        p = jax.nn.softmax(logits)
        signs = jax.vmap(lambda seed: jax.random.rademacher(jax.random.key(seed), p.shape[-1:], jnp.float32))(inputs[1])
        spread = jnp.sqrt(p) * signs
        return pull(spread - p * jnp.sum(spread, axis=-1, keepdims=True))[0].astype(jnp.float32)

    seeds = jax.random.bits(key, x.shape[:2])
    slope = by_pieces(piece, config.vocab_size, (x, seeds))
    real = slope if mask is None else jnp.where(mask[..., None], slope, 0.0)
    return real.astype(x.dtype)
