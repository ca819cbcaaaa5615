"""Low-rank correction of what quantizing left (EoRA, Liu et al. 2024, arXiv 2410.21271), as adapters beside weights.

Beside each packed weight Q come two thin factors a @ b, with the least tr((E - ab)^T H (E - ab)) of all of their rank:
E = W - Q is the residual and H = X^T X the Hessian of the layer's inputs. The paper takes the eigenvectors of H, and
the singular vectors of sqrt(L) V^T E with H = V L V^T. Any factor H = R R^T gives the same right ones, of R^T E; if B
are the first of them, the paper's factors come to a = E B and b = B^T, and nothing is inverted.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gptq_jax.block import run_again
from gptq_jax.calibration import Batch
from gptq_jax.clock import Clock
from gptq_jax.hessian import factorize, output_energy
from gptq_jax.hooks.experts import is_stacked
from gptq_jax.hooks.low_rank import LowRank
from gptq_jax.hooks.nnx import Params, kernel_of, with_kernel
from gptq_jax.matmul import holds_prepared
from gptq_jax.methods.base import Finish
from gptq_jax.methods.gptq import gptq
from gptq_jax.methods.qep import correct, qep
from gptq_jax.models.base import Model, check_no_lora
from gptq_jax.models.lora import Adapters, with_lora
from gptq_jax.models.quantizable import Block
from gptq_jax.observe import observe
from gptq_jax.pipeline import job_for
from gptq_jax.report import Report
from gptq_jax.spec import QuantSpec
from gptq_jax.storage.checkpoint_source import CheckpointSource
from gptq_jax.storage.parts import packed_layers
from gptq_jax.storage.progress import Progress
from gptq_jax.stream import STREAMED_BYTES
from gptq_jax.tensor import QuantizedTensor

DAMPING = 0.01  # as methods have it by default
_MORE_COLUMNS, _ROUNDS = 16, 8  # of subspace iteration


class _Corrected(NamedTuple):
    """What was found for one layer: its factors as they are stored, and |XE| / |XW| without and with them."""

    added: LowRank
    error: Float[Array, ""]
    corrected_error: Float[Array, ""]


@dataclass(frozen=True, kw_only=True)
class CorrectedLayer:
    """What a correction did for one layer.

    Attributes:
        path: of the layer, like "layers.3.mlp.down_proj".
        error: |X(W-Q)| / |XW|, on the inputs that the corrected model gives.
        corrected_error: the same with the factors, as they are stored.
    """

    path: str
    error: float
    corrected_error: float


def eora(
    model: Model | CheckpointSource,
    quantized: Model,
    batches: Sequence[Any],
    rank: int = 16,
    *,
    targets: str = "",
    alpha: float = 0.0,
    dtype: DTypeLike = jnp.float16,
    devices: int | Sequence[jax.Device] | None = 1,
    activations: str | PathLike[str] | None = None,
    progress: Progress | None = None,
    on_layer: Callable[[CorrectedLayer, int, int], None] | None = None,
) -> Adapters:
    """Adapters that bring a quantized model's outputs nearer to the float model's, without training.

    Assumes that what quantizing lost of a layer lies in few directions, as far as the calibration's inputs see it.
    One pass through the model, block by block and, inside a block, layer by layer: each layer sees the inputs that its
    corrected predecessors give it. Time is that of quantizing, less the solver; in memory are the packed model, one
    float block, and the calibration on its way.

    Args:
        model: the float one that `quantized` was made from, or its checkpoint (`open_checkpoint`).
        quantized: packed, by this library or another.
        batches: calibration, as for `quantize`.
        rank: columns of `a`: rank * (d_in + d_out) more numbers a layer.
        targets: a regex that is searched in the paths of layers; "" for all that are packed. Stacked experts have none.
        alpha: 0: layers are brought towards their float weights, as in the paper. Else towards QEP's, which make up for
            what earlier layers lost (`methods.qep.correct`): 0.5 for a model that QEP quantized. Takes a second pass
            through the float model.
        dtype: of the factors.
        devices, activations: as for `quantize_blocks`.
        progress: where finished blocks are kept, so that the same call goes on after a crash: the calibration then
            runs through them again, and that is all.
        on_layer: called after each layer, with how many are done, and how many there are; of those that are kept too.

    Returns:
        By path, for `with_lora`, `merge_lora` and `save_lora`.

    Raises:
        ValueError: before the long work: a rank that is not positive or more than a layer's inputs or outputs, nothing
            to correct, a model that is not the quantized one's, and what `quantize` says of batches and devices;
            during it: inputs that are not finite or all zero.
    """
    specs = corrected_layers(model, quantized, rank, targets)
    job = job_for(model, batches, None, qep(alpha=alpha) if alpha else gptq(), True, None, devices)
    streams, clock = job.open_streams(STREAMED_BYTES, activations), Clock()
    kept, there = _kept(quantized, specs, rank, dtype, progress)
    found: dict[str, _Corrected] = {}

    def take(block: Block, path: str, corrected: _Corrected, working: Params) -> Params:
        found[block.prefix + path] = corrected
        if on_layer is not None:
            errors = {"error": float(corrected.error), "corrected_error": float(corrected.corrected_error)}
            on_layer(CorrectedLayer(path=block.prefix + path, **errors), len(found), len(specs))
        return with_kernel(working, path, _with(kernel_of(working, path), corrected.added))

    for index, (block, packed) in enumerate(zip(job.calibration.blocks, quantized.params["layers"], strict=True)):
        inside = {path: specs.get(block.prefix + path) for group in block.groups for path in group}
        task = replace(job.task(block, streams, clock), specs=inside)
        floats = task.read()
        working = _dequantized(floats, task.parallel.replicate(packed), block.prefix.rstrip("."))
        if index < there:
            for path in task.paths():
                working = take(block, path, kept[block.prefix + path], working)
            run_again(task, task.ways(working, floats))
            continue
        for stage in task.stages():
            observed = observe(block, job.method, task.ways(working, floats), stage, keep=True, clock=clock)
            for path, said in ((path, said) for group, said in zip(stage, observed, strict=True) for path in group):
                weights = kernel_of(floats, path), kernel_of(working, path)
                drift = said.stats.drift if alpha else None
                corrected = _factors(*weights, said.hessian, drift, alpha, rank, jnp.dtype(dtype).name)
                working = take(block, path, corrected, working)
        task.leave(task.ways(working, floats))
        if progress is not None:
            progress.keep(found, index + 1)
    return {path: this.added for path, this in found.items()}


def low_rank_correction(rank: int = 16, *, alpha: float = 0.0) -> Finish:
    """`eora` as the end of a method, on the calibration it was solved with: `gptq()._replace(finish=...)`.

    Args:
        rank, alpha: as for `eora`; after `qep`, alpha is best its own.
    """

    def apply(model: Any, quantized: Any, report: Report, batches: Sequence[Batch]) -> tuple[Any, Report]:
        adapters = eora(model, quantized, batches, rank, alpha=alpha)
        layers = tuple(
            replace(layer, nbytes=layer.nbytes + sum(leaf.nbytes for leaf in jax.tree.leaves(adapters[layer.path])))
            if layer.path in adapters
            else layer
            for layer in report.layers
        )
        return with_lora(quantized, adapters), replace(report, layers=layers)

    return Finish(apply, "eora", settings=(("rank", rank), ("eora_alpha", alpha)))


def corrected_layers(
    model: Model | CheckpointSource, quantized: Model, rank: int, targets: str
) -> dict[str, QuantSpec]:
    """The layers that get factors, each with its grid; arguments, and errors before the work, as for `eora`."""
    if not (isinstance(model, Model | CheckpointSource) and isinstance(quantized, Model)):
        raise TypeError("corrections are for supplied architectures: a module of one's own has no places for adapters.")
    check_no_lora(quantized, "corrected")
    if holds_prepared(quantized.params):
        raise ValueError("the quantized model is prepared to run here: correct the one it was prepared from.")
    if rank < 1:
        raise ValueError(f"rank={rank} must be positive.")
    packed = {path: kernel for path, kernel in _packed(quantized).items() if not is_stacked(kernel)}
    if not packed:
        raise ValueError(
            "the quantized model holds no packed layers that could have a correction: give a quantized one."
        )
    abstract = model.config.abstract_params()["layers"]
    if len(abstract) != len(quantized.params["layers"]):
        raise ValueError(
            f"the quantized model has {len(quantized.params['layers'])} blocks, the float one {len(abstract)}: "
            "give the float model that it was made from."
        )
    for path, kernel in packed.items():
        _, index, inside = path.split(".", 2)
        if kernel.shape != (expected := kernel_of(abstract[int(index)], inside).shape):
            raise ValueError(
                f"{path} has shape {kernel.shape} in the quantized model, but {expected} in the float one: "
                "give the float model that it was made from."
            )
    if _apart(*(each.params["embed"] for each in (model, quantized))):
        raise ValueError(
            "embed is another in the quantized model: give the float model that it was made from; of one that was "
            "rotated before (hadamard), the rotated one."
        )
    try:
        found = {path: kernel for path, kernel in packed.items() if re.search(targets, path)}
    except re.error as error:
        raise ValueError(f"targets={targets!r} is not a regular expression: {error}.") from None
    if not found:
        raise ValueError(f"targets={targets!r} matches no packed layer: they are named like {next(iter(packed))!r}.")
    for path, kernel in found.items():
        if rank > min(kernel.shape):
            raise ValueError(f"rank={rank} is more than the {min(kernel.shape)} that {path} can have: use less.")
    return {path: kernel.spec for path, kernel in found.items()}


def stacked_experts(quantized: Model) -> list[str]:
    """The packed layers that have no adapters, and so no correction."""
    return [path for path, kernel in _packed(quantized).items() if is_stacked(kernel)]


def bits_per_weight(quantized: Model, adapters: Mapping[str, LowRank]) -> tuple[float, float]:
    """Bits of the packed layers for each of their weights, without the factors and with them."""
    kernels = _packed(quantized).values()
    weights = sum(math.prod(kernel.shape) for kernel in kernels)
    packed = sum(kernel.nbytes for kernel in kernels)
    return 8 * packed / weights, 8 * (packed + sum(leaf.nbytes for leaf in jax.tree.leaves(dict(adapters)))) / weights


def low_rank(
    error: Float[Array, "d_in d_out"], hessian: Float[Array, "d_in d_in"], rank: int, damping: float = DAMPING
) -> tuple[Float[Array, "d_in {rank}"], Float[Array, "{rank} d_out"]]:
    """`a`, `b` with the least |R^T (error - a b)|, R R^T the damped Hessian (Eckart and Young).

    By subspace iteration, which takes a few products where a decomposition of a large matrix takes minutes.

    Args:
        error: E = W - Q.
        hessian: where it cannot be factored, it counts for nothing.
        rank: at most d_in and d_out.
        damping: as in `GPTQOptions`.
    """
    upper = factorize(hessian, damping, jnp.mean(jnp.diagonal(hessian))).upper
    product = partial(jnp.matmul, precision="highest")
    outputs = product(upper.T, error)
    columns = min(rank + _MORE_COLUMNS, *error.shape)
    start = jax.random.normal(jax.random.key(0), (error.shape[1], columns), outputs.dtype)

    def turn(_: Any, basis: Array) -> Array:
        return jnp.linalg.qr(product(outputs.T, product(outputs, basis)))[0]

    basis = jax.lax.fori_loop(0, _ROUNDS, turn, jnp.linalg.qr(start)[0])
    *_, inside = jnp.linalg.svd(product(outputs, basis), full_matrices=False)
    right = product(basis, inside[:rank].T)
    return product(error, right), right.T


@partial(jax.jit, static_argnums=(4, 5, 6))
def _factors(
    weight: Float[Array, "d_in d_out"],
    kernel: Float[Array, "d_in d_out"],
    hessian: Float[Array, "d_in d_in"],
    drift: Float[Array, "d_in d_in"] | None,
    alpha: float,
    rank: int,
    dtype: str,
) -> _Corrected:
    """What is found for one layer; with a drift, W is QEP's."""
    wide = weight.astype(jnp.float32)
    if drift is not None:
        wide = correct(wide, hessian, drift, alpha, DAMPING)
    error = wide - kernel.astype(jnp.float32)
    a, b = low_rank(error, hessian, rank)
    added = LowRank(a=a.astype(dtype), b=b.astype(dtype), scale=1.0)
    left = error - added.weight()
    of_weight = jnp.maximum(jnp.sum(output_energy(wide, hessian)), jnp.finfo(jnp.float32).tiny)

    def relative(error: Array) -> Array:
        return jnp.sqrt(jnp.maximum(jnp.sum(output_energy(error, hessian)), 0.0) / of_weight)

    return _Corrected(added, relative(error), relative(left))


@jax.jit
def _with(kernel: Float[Array, "d_in d_out"], added: LowRank) -> Float[Array, "d_in d_out"]:
    return (kernel.astype(jnp.float32) + added.weight()).astype(kernel.dtype)


def _kept(
    quantized: Model, specs: Mapping[str, QuantSpec], rank: int, dtype: DTypeLike, progress: Progress | None
) -> tuple[dict[str, _Corrected], int]:
    """By path, what an interrupted run found for the layers of so many blocks."""
    if progress is None:
        return {}, 0

    def form(d_in: int, d_out: int) -> _Corrected:
        added = LowRank(a=jnp.zeros((d_in, rank), dtype), b=jnp.zeros((rank, d_out), dtype), scale=1.0)
        return _Corrected(added, jnp.zeros(()), jnp.zeros(()))

    layers = {path: kernel for path, kernel in _packed(quantized).items() if path in specs}
    done = {path: kernel for path, kernel in layers.items() if int(path.split(".")[1]) < progress.done}
    forms = {path: jax.eval_shape(partial(form, *kernel.shape)) for path, kernel in done.items()}
    return progress.open(forms)


def _packed(model: Model) -> dict[str, QuantizedTensor]:
    """The packed layers of the blocks by path, in the order they run."""
    found = packed_layers({"layers": model.params["layers"]})
    paths = (block.prefix + path for block in model.blocks() for group in block.groups for path in group)
    return {path: found[path] for path in paths if path in found}


def _dequantized(floats: Any, packed: Any, path: str) -> Any:
    """The float block with what packed weights stand for in the place of its own; all else must be equal."""
    if isinstance(floats, dict) and isinstance(packed, dict) and floats.keys() == packed.keys():
        return {name: _dequantized(child, packed[name], f"{path}.{name}") for name, child in floats.items()}
    if isinstance(packed, QuantizedTensor):
        return packed.dequantize(floats.dtype)
    if not (isinstance(floats, jax.Array) and isinstance(packed, jax.Array) and _near(floats, packed)):
        raise ValueError(
            f"{path} is another in the quantized model: give the float model that it was made from; of one that was "
            "rewritten before (hadamard, awq, smooth), the rewritten one."
        )
    return floats


def _apart(ours: Params, theirs: Params) -> bool:
    """Whether embeddings differ by more than storing them in few bits would make them."""
    if jax.tree.map(jnp.shape, ours) != jax.tree.map(jnp.shape, theirs):
        return True
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    wide = [(one.astype(jnp.float32), two.astype(jnp.float32)) for one, two in pairs]
    return any(bool(jnp.linalg.norm(one - two) > 0.5 * jnp.linalg.norm(one)) for one, two in wide)


def _near(ours: Array, theirs: Array) -> bool:
    """Whether they are equal, though one may have been stored in 16 bits."""
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    return bool(jnp.max(jnp.abs(ours - theirs)) <= 0.01 * jnp.max(jnp.abs(ours)))
