"""A file imports only from levels below its own, or from its own package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVELS = {
    0: ("pallas_kernels", "gptq_jax.spec", "gptq_jax.heap", "gptq_jax.cache", "gptq_jax.options"),
    1: ("gptq_jax.tensor",),
    2: ("gptq_jax.grids", "gptq_jax.hessian", "gptq_jax.matmul"),
    3: ("gptq_jax.hooks",),
    4: ("gptq_jax.methods", "gptq_jax.models", "gptq_jax.rewrites", "gptq_jax.tuning"),
    5: (
        "gptq_jax.report",
        "gptq_jax.storage",
        "gptq_jax.calibration",
        "gptq_jax.statistics",
        "gptq_jax.parallel",
        "gptq_jax.clock",
        "gptq_jax.activations",
    ),
    6: (
        "gptq_jax.stream",
        "gptq_jax.observe",
        "gptq_jax.block",
        "gptq_jax.pipeline",
        "gptq_jax.evaluate",
        "gptq_jax.generate",
        "gptq_jax.inspection",
        "gptq_jax.self_calibration",
        "gptq_jax.sensitivity",
        "gptq_jax.terminal",
    ),
    7: (
        "gptq_jax.allocation",
        "gptq_jax.bench",
        "gptq_jax.by_name",
        "gptq_jax.commands",
        "gptq_jax.comparison",
        "gptq_jax.correction",
        "gptq_jax.demo",
        "gptq_jax.distillation",
        "gptq_jax.harness",
        "gptq_jax.planning",
        "gptq_jax.cli",
    ),
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names}
SAME_LEVEL = {  # what may be imported beside a file on its own level: an order inside it
    "gptq_jax.rewrites": {"gptq_jax.methods", "gptq_jax.models"},
    "gptq_jax.tuning": {"gptq_jax.methods", "gptq_jax.models"},
    "gptq_jax.spec": {"pallas_kernels"},
    "gptq_jax.storage": {"gptq_jax.parallel", "gptq_jax.report"},
    "gptq_jax.observe": {"gptq_jax.stream"},
    "gptq_jax.block": {"gptq_jax.observe", "gptq_jax.stream"},
    "gptq_jax.pipeline": {"gptq_jax.block", "gptq_jax.stream"},
    "gptq_jax.self_calibration": {"gptq_jax.generate"},
    "gptq_jax.sensitivity": {"gptq_jax.evaluate"},
    "gptq_jax.planning": {"gptq_jax.bench"},
    "gptq_jax.allocation": {"gptq_jax.planning"},
    "gptq_jax.by_name": {"gptq_jax.correction", "gptq_jax.distillation"},
    "gptq_jax.comparison": {"gptq_jax.by_name", "gptq_jax.commands"},
    "gptq_jax.correction": {"gptq_jax.commands"},
    "gptq_jax.distillation": {"gptq_jax.commands"},
    "gptq_jax.cli": {
        "gptq_jax.allocation",
        "gptq_jax.bench",
        "gptq_jax.by_name",
        "gptq_jax.commands",
        "gptq_jax.comparison",
        "gptq_jax.correction",
        "gptq_jax.demo",
        "gptq_jax.distillation",
        "gptq_jax.harness",
        "gptq_jax.planning",
    },
}
FILES = sorted(file for package in ("gptq_jax", "pallas_kernels") for file in (ROOT / package).rglob("*.py"))


def unit(module: str) -> str:
    """The entry of the table that a module belongs to: a top-level file, or a package inside gptq_jax."""
    parts = module.split(".")
    return parts[0] if parts[0] == "pallas_kernels" else ".".join(parts[:2])


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_units(source: str) -> set[str]:
    """Units of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            # `from gptq_jax import grids` imports gptq_jax.grids.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {unit(name) for name in names if name.split(".")[0] in ("gptq_jax", "pallas_kernels")}
    return found - {"gptq_jax.__version__"}


def problems(module: str, source: str) -> list[str]:
    own = unit(module)
    return [
        f"{module} (level {LEVEL[own]}) imports {other} (level {LEVEL.get(other)})"
        for other in sorted(imported_units(source) - {own})
        if other not in SAME_LEVEL.get(own, ()) and not LEVEL.get(other, 99) < LEVEL[own]
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down(file):
    module = module_of(file)
    if module == "gptq_jax":
        return  # the public names, from every level
    assert unit(module) in LEVEL, f"{module} has no level: add it to the table"
    assert problems(module, file.read_text()) == []


def test_no_level_is_left_over():
    assert set(LEVEL) == {unit(module_of(file)) for file in FILES} - {"gptq_jax"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pallas_kernels.api", "from gptq_jax.spec import QuantSpec"),
        ("gptq_jax.grids", "def f():\n    import gptq_jax.pipeline"),
        ("gptq_jax.methods.rtn", "from gptq_jax import models"),
        ("gptq_jax.hessian", "from gptq_jax import gptq_solve"),
    ],
)
def test_imports_that_go_up_are_seen(module, source):
    assert len(problems(module, source)) == 1
