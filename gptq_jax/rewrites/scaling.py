"""Scales for each input of linear layers, folded into what writes those inputs: AWQ and SmoothQuant.

(x / s) (s W) = x W: an input that is scaled down where it is made, by a norm or a linear layer, may have weights that
are larger by as much, of which a grid loses less.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gptq_jax.hessian import accumulate, output_energy
from gptq_jax.hooks.nnx import Params, kernel_of
from gptq_jax.methods.base import Rewrite
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.models.base import Model
from gptq_jax.models.fields import DecoderFields
from gptq_jax.rewrites.roles import changed, readers
from gptq_jax.spec import QuantSpec, SpecRules


class ScalingGroup(NamedTuple):
    """Layers with one input, by role, and what writes it.

    Attributes:
        source: a norm, or a linear layer whose output reaches the input unchanged or multiplied by something else.
        readers: the layers.
        half: only the second half of the source's outputs is meant.
    """

    source: str
    readers: tuple[str, ...]
    half: bool = False


class InputStats(NamedTuple):
    """What calibration says of one input."""

    total: Float[Array, "d_in"]  # sum of |x|
    peak: Float[Array, "d_in"]  # max of |x|
    hessian: Float[Array, "d_in d_in"]


# Kernels of the layers with one input, their grids (None stays float) and the statistics -> scales.
Choose = Callable[[tuple[Array, ...], tuple[QuantSpec | None, ...], InputStats], Array]


def awq(steps: int = 20) -> Rewrite:
    """Scales mean|x|^a, a of the least output error of rounded weights (Lin et al. 2023, arXiv 2306.00978, eq. 4-5).

    Assumes that inputs which are large on average need the more exact weights, and that what is best for rounding to
    nearest is good for the method that follows. The inputs are those of the float model, and the error is that of the
    layers with one input, not of the attention around them as in the authors' code. Rounding to nearest,
    `rtn()._replace(rewrite=awq())`, is AWQ; other methods go as well. Inputs of experts are left alone, as are those
    that nothing can be folded into.

    Args:
        steps: a is 0, 1 / steps, ..., 1 - 1 / steps; 0 changes nothing.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be positive: use e.g. 20.")
    return Rewrite(partial(_apply, choose=partial(search, steps=steps)), name="awq", settings=(("awq_steps", steps),))


def smooth(alpha: float = 0.5) -> Rewrite:
    """Scales max|x|^alpha / max|w|^(1 - alpha) (SmoothQuant, Xiao et al. 2022, arXiv 2211.10438, eq. 4).

    Assumes that the largest input of each channel tells how exact its weights must be. The paper's aim is inputs that
    can be quantized too, which they are not here.

    Args:
        alpha: how much of the inputs' range goes into the weights, in [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is not in [0, 1]: use e.g. 0.5.")
    return Rewrite(
        partial(_apply, choose=partial(migrate, alpha=alpha)), name="smooth", settings=(("smooth_alpha", alpha),)
    )


def scaling_groups(config: DecoderFields) -> tuple[ScalingGroup, ...]:
    """Which inputs of a block can be scaled, and where."""
    groups = []
    if config.residual != "post":  # there, norms write the residual stream too
        groups = [ScalingGroup(norm, roles) for norm, roles in readers(config).items() if "router" not in roles]
    if config.qkv == "separate" and config.num_kv_heads == config.num_heads:
        groups.append(ScalingGroup("value", ("output",)))
    if config.experts is None and not config.rotated_down:  # a rotation mixes what is scaled
        if config.mlp in ("gated", "fused"):
            fused = config.mlp == "fused"
            groups.append(ScalingGroup("gate_up" if fused else "up", ("down",), half=fused))
        elif config.hidden_act == "relu":  # which positive factors pass through
            groups.append(ScalingGroup("up", ("down",)))
    return tuple(groups)


@partial(jax.jit, static_argnames=("specs", "steps"))
def search(
    kernels: tuple[Float[Array, "d_in _"], ...],
    specs: tuple[QuantSpec | None, ...],
    stats: InputStats,
    *,
    steps: int,
) -> Float[Array, "d_in"]:
    """AWQ's scales."""
    strength = jnp.maximum(stats.total, 1e-8 * jnp.max(stats.total))

    def scales(power: Array) -> Array:
        found = strength**power
        return found / jnp.sqrt(jnp.max(found) * jnp.min(found))

    def loss(power: Array) -> Array:
        scale = scales(power)[:, None]
        total = jnp.float32(0)
        for kernel, spec in zip(kernels, specs, strict=True):
            if spec is not None:
                rounded = round_to_nearest(kernel * scale, spec).dequantize() / scale
                total += jnp.sum(output_energy(kernel - rounded, stats.hessian))
        return total

    powers = jnp.arange(steps, dtype=jnp.float32) / steps
    return scales(powers[jnp.argmin(jax.lax.map(loss, powers))])


@partial(jax.jit, static_argnames=("specs", "alpha"))
def migrate(
    kernels: tuple[Float[Array, "d_in _"], ...],
    specs: tuple[QuantSpec | None, ...],
    stats: InputStats,
    *,
    alpha: float,
) -> Float[Array, "d_in"]:
    """SmoothQuant's scales, one where an input or its weights are zero."""
    weights = jnp.max(jnp.stack([jnp.max(jnp.abs(kernel), axis=1) for kernel in kernels]), axis=0)
    usable = (stats.peak > 0) & (weights > 0)
    found = jnp.where(usable, stats.peak, 1.0) ** alpha / jnp.where(usable, weights, 1.0) ** (1 - alpha)
    return jnp.where(usable, jnp.maximum(found, 1e-5), 1.0)


def _apply(model: Any, batches: Sequence[Any], rules: SpecRules, *, choose: Choose) -> Model:
    if not isinstance(model, Model) or not isinstance(model.config, DecoderFields):
        raise ValueError("scales: the model is not a supplied decoder, so what writes its layers' inputs is not known.")
    calibration = model.calibration([batch.tokens for batch in batches], [batch.mask for batch in batches])
    states, layers = list(calibration.start()), []
    for index, block in enumerate(calibration.blocks):
        config, params = model.config.of_kind(model.config.layer_kind(index)), block.params
        groups = scaling_groups(config)
        members = [tuple(getattr(config.names, role) for role in group.readers) for group in groups]
        paths = [first for first, *_ in members]
        stats: list[InputStats] = [_zeros(kernel_of(params, path).shape[0]) for path in paths]
        for number, (state, mask) in enumerate(zip(states, calibration.masks, strict=True)):
            captured = block.forward.capture(params, state, tuple(paths), mask, {})
            stats = [_add(have, captured[path], mask) for have, path in zip(stats, paths, strict=True)]
            known = {path: captured[these[0]] for these in members for path in these}
            states[number] = block.forward.run(params, state, mask, known)
        scaled = params
        for group, these, have in zip(groups, members, stats, strict=True):
            specs = tuple(rules.spec_for(block.prefix + path) for path in these)
            kernels = tuple(kernel_of(params, path).astype(jnp.float32) for path in these)
            scaled = fold(scaled, config, group, choose(kernels, specs, have))
        layers.append(scaled)
    return replace(model, params={**model.params, "layers": layers})


def fold(params: Params, config: DecoderFields, group: ScalingGroup, scales: Float[Array, "d_in"]) -> Params:
    """The block with one input scaled down by `scales`, and the weights that read it scaled up."""
    for role in group.readers:
        params = changed(params, getattr(config.names, role), "kernel", lambda kernel: kernel * scales[:, None])
    source = getattr(config.names, group.source)
    if group.half:
        scales = jnp.concatenate([jnp.ones_like(scales), scales])
    offset = 1.0 if config.norm == "rms_plus_one" else 0.0
    params = changed(params, source, "kernel", lambda kernel: kernel / scales[None])
    params = changed(params, source, "scale", lambda scale: (scale + offset) / scales - offset)
    return changed(params, source, "bias", lambda bias: bias / scales)


def _zeros(d_in: int) -> InputStats:
    return InputStats(jnp.zeros(d_in), jnp.zeros(d_in), jnp.zeros((d_in, d_in)))


@jax.jit
def _add(stats: InputStats, x: Float[Array, "batch time d_in"], mask: Bool[Array, "batch time"] | None) -> InputStats:
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if mask is not None:
        rows = jnp.where(mask.reshape(-1, 1), rows, 0.0)
    size = jnp.abs(rows)
    return InputStats(
        stats.total + jnp.sum(size, axis=0),
        jnp.maximum(stats.peak, jnp.max(size, axis=0)),
        accumulate(stats.hessian, rows),
    )
