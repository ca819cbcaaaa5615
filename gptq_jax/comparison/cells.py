"""One run of a grid: what it is, and what came of it."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from gptq_jax.report import Report, spec_label
from gptq_jax.spec import QuantSpec


@dataclass(frozen=True)
class Cell:
    """A method, by its name in the grid, at one grid of weights, on the calibration windows of one seed."""

    method: str
    spec: QuantSpec
    seed: int

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.method}, {spec_label(self.spec)}, seed {self.seed}"

    @property
    def stem(self) -> str:
        """Of its file: readable, and another one for every cell."""
        identity = json.dumps(asdict(self), sort_keys=True)
        readable = re.sub(r"[^\w.-]+", "-", f"{self.method}-{spec_label(self.spec)}-s{self.seed}")[:80]
        return f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Of one quantized layer: see `gptq_jax.report.LayerReport`."""

    path: str
    loss: float
    rtn_loss: float
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured of one quantized model.

    Attributes:
        perplexity: on the held-out text.
        kl: to the float model, the mean over predicted tokens, in nats.
        top1_agreement: fraction of predicted tokens for which both models find the same token likeliest.
        bits_per_weight: of the quantized layers, scales and zeros included.
        nbytes: of all parameters in memory, those that stay float included.
        seconds: wall time of quantizing.
        compile_seconds: of those, what XLA took to compile; cells that come first pay for others.
        evaluation_seconds: wall time of perplexity and divergence.
        peak_bytes: the most memory that the process had resident while quantizing, the float model and what is kept
            of it included; None where the system does not tell.
        layers: in the order they were solved.
        fallbacks: layers that the method could not solve and that were rounded to nearest.
    """

    perplexity: float
    kl: float
    top1_agreement: float
    bits_per_weight: float
    nbytes: int
    seconds: float
    compile_seconds: float
    evaluation_seconds: float
    peak_bytes: int | None
    layers: tuple[LayerError, ...]
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """A cell with its figures, or with why it has none.

    Attributes:
        cell: which.
        method: what its method was made with; another cell of the same name must have the same.
        figures: None if it failed.
        failed: the error; None if it did not.
    """

    cell: Cell
    method: Mapping[str, Any]
    figures: Figures | None
    failed: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return json.loads(json.dumps(asdict(replace(self, method=dict(self.method)))))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CellResult":
        """The inverse of `to_json`; KeyError or TypeError if it is not of this shape."""
        cell, figures = data["cell"], data["figures"]
        if figures is not None:
            layers = tuple(LayerError(**layer) for layer in figures["layers"])
            figures = Figures(**{**figures, "layers": layers, "fallbacks": tuple(figures["fallbacks"])})
        return cls(
            cell=Cell(cell["method"], QuantSpec(**cell["spec"]), cell["seed"]),
            method=data["method"],
            figures=figures,
            failed=data["failed"],
        )


def layer_errors(report: Report) -> tuple[LayerError, ...]:
    """What a comparison keeps of a report's layers."""
    return tuple(
        LayerError(path=layer.path, loss=layer.loss, rtn_loss=layer.rtn_loss, relative_error=layer.relative_error)
        for layer in report.layers
    )
