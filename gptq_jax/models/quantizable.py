"""What a model must offer to be quantized block by block; `Model` does, and what `adapt` makes of a user's module."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool

from gptq_jax.hooks.nnx import Params


@runtime_checkable
class Forward(Protocol):
    """How a block runs.

    Between blocks there is, for each batch, a state that only blocks of the same model understand: the residual
    stream of a supplied architecture.
    """

    def __hash__(self) -> int: ...

    def run(self, params: Params, state: Any, mask: Any, known: Mapping[str, Any]) -> Any:
        """The state after the block, with parameters that may be packed; `known` are inputs captured before."""

    def capture(
        self, params: Params, state: Any, wanted: tuple[str, ...], mask: Any, known: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The inputs of the layers `wanted`, [*batch, d_in]."""

    def rows(self, state: Any, path: str) -> int:
        """How many inputs the layer at `path` sees, padding included."""


@runtime_checkable
class Block(Protocol):
    """One block of a model: what quantizing it needs.

    Attributes:
        prefix: of the full paths of its layers, like "layers.3.".
        params: nested dicts; the kernel of the layer at "mlp.up" is params["mlp"]["up"]["kernel"], [d_in, d_out].
            Read anew each time it is asked for, where it comes from a file.
        groups: its layers in the order they run, those fed by the same array together.
        forward: how it runs; blocks that run alike have equal ones.
    """

    @property
    def prefix(self) -> str: ...  # noqa: D102
    @property
    def params(self) -> Params: ...  # noqa: D102
    @property
    def groups(self) -> tuple[tuple[str, ...], ...]: ...  # noqa: D102
    @property
    def forward(self) -> Forward: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A model about to be quantized on some batches.

    Attributes:
        blocks: in the order they run.
        start: computes the states before the first block, batch by batch.
        masks: of the batches: True for real tokens, [batch, time]; None if all are.
        kept_float: matrices outside of all layers, and why they stay float.
        refused: layers that stop the quantization unless a rule skips them, and why.
        alike: groups of layers, by full path, that must have one grid.
        one_device: why its batches cannot be shared among devices; None if they can: then states, and what is captured
            of them, have the rows of the batch first.
        assemble: makes the model of its blocks' parameters and the report.
        head: gives what makes logits of the state after the last block, and what that reads; None if it is not known.
    """

    blocks: Sequence[Block]
    start: Callable[[], Iterable[Any]]
    masks: Sequence[Bool[Array, "batch time"] | None]
    kept_float: Mapping[str, str]
    assemble: Callable[[Sequence[Params], dict[str, Any]], Any]
    refused: Mapping[str, str] = field(default_factory=dict)
    alike: Sequence[Sequence[str]] = ()
    one_device: str | None = None
    head: Callable[[], tuple[Any, Params]] | None = None


@runtime_checkable
class BlockSource(Protocol):
    """Where a model comes from that is quantized block by block: the model itself, or a checkpoint."""

    def calibration(self, calls: Sequence[Any], masks: Sequence[Any]) -> Calibration:
        """The model block by block on these inputs; ValueError if it cannot take them."""

    def identity(self) -> dict[str, str]:
        """What tells this model from another: a digest of each part of it, by name."""


@runtime_checkable
class BlockModel(Protocol):
    """What can be quantized in memory: a `Model`, or what `adapt` makes of a user's module."""

    @property
    def params(self) -> Any: ...  # noqa: D102

    def calibration(self, calls: Sequence[Any], masks: Sequence[Any]) -> Calibration:
        """The model block by block on these inputs; ValueError if it cannot take them."""

    def identity(self) -> dict[str, str]:
        """What tells this model from another: a digest of each part of it, by name."""
