"""What a quantization did: every layer, its losses, what was left float and why, where the time went."""

import json
import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from gptq_jax.spec import QuantSpec


@dataclass(frozen=True, kw_only=True)
class ExpertsReport:
    """What calibration said of the experts of one layer.

    Attributes:
        count: experts.
        needed: rows below which an expert was solved with the statistics of all tokens.
        least: rows that the expert with the fewest saw.
        most: rows that the expert with the most saw.
        shared: experts that were solved with the statistics of all tokens.
        unseen: those of them that no token was routed to.
        rounded: experts that the method could not solve and that were rounded to nearest.
    """

    count: int
    needed: int
    least: int
    most: int
    shared: tuple[int, ...]
    unseen: tuple[int, ...]
    rounded: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TuningReport:
    """What tuning made of a block's error on the calibration; see `tuning.fit.block_error`.

    Attributes:
        before: of its layers as they were solved.
        after: as they are stored; never more.
    """

    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One quantized weight, or those of stacked experts, whose losses are summed.

    Losses and errors are those of solving: what tuning did after that is known of the whole block only.

    Attributes:
        path: of the layer, like "layers.3.mlp.down_proj".
        method: that made its codes; "rtn" where another method fell back to rounding.
        spec: the grid.
        d_in, d_out: of the kernel.
        loss: squared output error summed over outputs, a mean over calibration tokens: tr(D^T H D) / tokens.
        rtn_loss: the same for rounding to nearest on the same Hessian.
        relative_error: root of loss over the mean squared output, |X(W-Q)| / |XW|.
        damping: fraction of the mean diagonal at which the Hessian could be factored, the most of any expert;
            None: no factor needed.
        fell_back: the solver failed and the weight, or that of an expert, was rounded to nearest.
        tokens: that its Hessian is made of.
        seconds: solving, shared evenly among layers solved as one.
        nbytes: of the packed weight.
        experts: None for a layer without.
        tuning: of the block that the layer is in; None: it was not tuned.
    """

    path: str
    method: str
    spec: QuantSpec
    d_in: int
    d_out: int
    loss: float
    rtn_loss: float
    relative_error: float
    damping: float | None
    fell_back: bool
    tokens: int
    seconds: float = 0.0
    nbytes: int
    experts: ExpertsReport | None = None
    tuning: TuningReport | None = None

    @property
    def weights(self) -> int:
        """How many numbers were quantized."""
        return self.d_in * self.d_out * (1 if self.experts is None else self.experts.count)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole quantization.

    Attributes:
        layers: in the order they were solved.
        kept_float: path -> why.
        seconds: stage -> wall time: "read" (a block), "forward", "hessian", "solve", "measure", "tune", "write".
        settings: as they were asked for.
        peak_bytes: of the process's memory, at its end.
    """

    layers: tuple[LayerReport, ...]
    kept_float: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    peak_bytes: int = 0

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Layers that their method could not solve and that were rounded to nearest."""
        return tuple(layer.path for layer in self.layers if layer.fell_back)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized layers, scales and zeros included."""
        return 8 * sum(layer.nbytes for layer in self.layers) / sum(layer.weights for layer in self.layers)

    @property
    def loss(self) -> float:
        """Sum of all layers' losses."""
        return sum(layer.loss for layer in self.layers)

    @property
    def tuned(self) -> TuningReport | None:
        """The mean over layers of what tuning did to their blocks; None: nothing was tuned."""
        found = [layer.tuning for layer in self.layers if layer.tuning is not None]
        if not found:
            return None
        return TuningReport(before=fmean(each.before for each in found), after=fmean(each.after for each in found))

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Report":
        """The inverse of `to_json`."""
        return cls(**{**data, "layers": tuple(map(layer_report, data["layers"]))})

    def write(self, path: str) -> None:
        """Write as JSON."""
        with open(path, "w") as file:
            json.dump(self.to_json(), file, indent=1)

    def table(self) -> Table:
        """A row a layer, for a terminal of 80 columns."""
        table = Table(title="quantized layers", title_justify="left", box=SIMPLE_HEAD, padding=0)
        one_grid = len({layer.spec for layer in self.layers}) == 1
        # Every path starts with "layers.", which stands once, at the head of its column.
        last = "ratio" if one_grid else "grid"
        for name in ("layers.", "loss", "rtn loss", "error", "damping", "s", last):
            table.add_column(name, justify="left" if name in ("layers.", "grid") else "right", no_wrap=True)
        for layer in self.layers:
            ratio = layer.loss / layer.rtn_loss if layer.rtn_loss else float("nan")
            row = [
                escape(layer.path.removeprefix("layers.")),
                f"{layer.loss:.2e}",
                f"{layer.rtn_loss:.2e}",
                f"{layer.relative_error:.4f}",
                "[bold red]rounded" if layer.fell_back else "" if layer.damping is None else f"{layer.damping:.3g}",
                f"{layer.seconds:.2f}",
            ]
            table.add_row(*row, f"{ratio:.2f}" if one_grid else spec_label(layer.spec))
        return table


def without_times(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report as `to_json` has it, less what differs from run to run: seconds and memory."""
    kept = {key: value for key, value in report.items() if key not in ("seconds", "peak_bytes")}
    layers = [{key: value for key, value in layer.items() if key != "seconds"} for layer in report.get("layers", [])]
    return {**kept, "layers": layers}


def layer_report(data: Mapping[str, Any]) -> LayerReport:
    """The inverse of `asdict`, of one layer."""
    experts = data.get("experts")
    if experts is not None:
        lists = {name: tuple(value) for name, value in experts.items() if isinstance(value, list)}
        experts = ExpertsReport(**{**experts, **lists})
    tuning = data.get("tuning")
    tuning = None if tuning is None else TuningReport(**tuning)
    return LayerReport(**{**data, "spec": QuantSpec(**data["spec"]), "experts": experts, "tuning": tuning})


def expert_lines(layers: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which experts were not solved with tokens of their own, a line for layers of which the same is true.

    Args:
        layers: each as `to_json` has it.
    """
    lines: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        experts = layer.get("experts")
        if experts is None:
            continue
        parent, _, name = layer["path"].rpartition(".")
        if experts["shared"]:
            text = (
                f"{len(experts['shared'])} of {experts['count']} experts saw fewer than {experts['needed']} tokens "
                f"and were solved with those of all: {_listed(experts['shared'])}"
            )
            text += f"; no token at all: {_listed(experts['unseen'])}" if experts["unseen"] else ""
            lines.setdefault((parent, text), []).append(name)
        if experts["rounded"]:
            text = f"experts that could not be solved and were rounded to nearest: {_listed(experts['rounded'])}"
            lines.setdefault((parent, text), []).append(name)
    return [f"{parent}.{', '.join(names)}: {text}" for (parent, text), names in lines.items()]


def _listed(experts: Iterable[int]) -> str:
    return ", ".join(map(str, experts))


def spec_label(spec: QuantSpec) -> str:
    """Short: "W4 g128 sym"."""
    group = "column" if spec.group_size == -1 else f"g{spec.group_size}"
    return f"W{spec.bits} {group} {'sym' if spec.symmetric else 'asym'}"


def peak_memory() -> int:
    """The most bytes this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
