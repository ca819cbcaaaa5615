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

from gptq_jax.grids import GRIDS
from gptq_jax.hessian import accumulate, output_energy, with_factor
from gptq_jax.hooks.nnx import Params, kernel_of
from gptq_jax.methods.base import Rewrite
from gptq_jax.methods.gptq import input_order
from gptq_jax.methods.rtn import fit_groups, rounded_values
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


def awq(steps: int = 20, *, grid: str = "minmax") -> Rewrite:
    """Scales mean|x|^a, a of the least output error of rounded weights (Lin et al. 2023, arXiv 2306.00978, eq. 4-5).

    Assumes that inputs which are large on average need the more exact weights. The inputs are those of the float model,
    and the error is that of the layers with one input, not of the attention around them as in the authors' code.
    Inputs of experts are left alone, as are those that nothing can be folded into.

    `rtn()._replace(rewrite=awq())` is AWQ. Scales that are best for rounding to nearest on a minmax grid need not be
    best for a method that searches its grids and makes up for what it rounds: at 2 bits they do GPTQ harm. Before such
    a method use `awq(grid="ldl")`, as `--method awq+gptq` does. That is not in the paper.

    Args:
        steps: a is 0, 1 / steps, ..., 1 - 1 / steps; 0 changes nothing.
        grid: of the weights that are tried. "minmax" or "mse": the error is that of rounding to nearest. "ldl": what
            compensation is expected to leave of it, the sum of LDL pivots times squared errors, on the grid that is
            fitted to that, inputs in activation order.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be positive: use e.g. 20.")
    if grid not in GRIDS:
        raise ValueError(f"grid={grid!r} is not supported: use one of {list(GRIDS)}.")
    settings = ("awq_steps", steps), ("awq_grid", grid)
    return Rewrite(partial(_apply, choose=partial(search, steps=steps, grid=grid)), name="awq", settings=settings)


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


@partial(jax.jit, static_argnames=("specs", "steps", "grid"))
def search(
    kernels: tuple[Float[Array, "d_in _"], ...],
    specs: tuple[QuantSpec | None, ...],
    stats: InputStats,
    *,
    steps: int,
    grid: str = "minmax",
) -> Float[Array, "d_in"]:
    """AWQ's scales."""
    strength = jnp.maximum(stats.total, 1e-8 * jnp.max(stats.total))
    pivots = _pivots(stats.hessian) if grid == "ldl" else jnp.ones_like(strength)

    def scales(power: Array) -> Array:
        found = strength**power
        return found / jnp.sqrt(jnp.max(found) * jnp.min(found))

    def loss(power: Array) -> Array:
        scale = scales(power)
        # Of the Hessian of inputs x / s, in the same order.
        scaled_pivots = pivots / scale**2
        total = jnp.float32(0)
        for kernel, spec in zip(kernels, specs, strict=True):
            if spec is not None:
                scaled = kernel * scale[:, None]
                rounded = rounded_values(scaled, fit_groups(scaled, spec, grid, scaled_pivots), spec)
                if grid == "ldl":
                    total += jnp.sum(scaled_pivots[:, None] * (scaled - rounded) ** 2)
                else:
                    total += jnp.sum(output_energy(kernel - rounded / scale[:, None], stats.hessian))
        return total

    powers = jnp.arange(steps, dtype=jnp.float32) / steps
    return scales(powers[jnp.argmin(jax.lax.map(loss, powers))])


def _pivots(hessian: Float[Array, "d_in d_in"]) -> Float[Array, "d_in"]:
    """Of the LDL factorization that GPTQ makes by default: damped, the inputs with the largest diagonal first."""
    diagonal = jnp.diagonal(hessian)
    order = input_order(diagonal, "activation", 1)
    found, *_ = with_factor(hessian, 0.01, jnp.mean(diagonal), lambda upper: jnp.diagonal(upper) ** 2, order)
    return found[jnp.argsort(order)]


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
