"""Compile for a GPU on a machine without one, and read the machine code.

XLA compiles for a described card (`cards/*.textproto`); Mosaic writes ptxas's report and a disassembly of each
kernel. That takes the CUDA plugin, ptxas and nvdisasm, which are Python packages, but no GPU and no driver.
Lowering alone (`lower_for`) takes JAX only.
"""

import atexit
import importlib.util
import multiprocessing
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

INSTALL = "python -m pip install --group kernels-compiler"


@dataclass(frozen=True)
class Card:
    """A card to compile for.

    Attributes:
        name: of its description in `cards`.
        kind: as JAX names it.
        capability: compute capability.
        tensor_core: the opcode of its matrix product.
    """

    name: str
    kind: str
    capability: str
    tensor_core: str


H100 = Card("h100", "NVIDIA H100 80GB HBM3", "9.0", "HGMMA")
A100 = Card("a100", "NVIDIA A100-SXM4-40GB", "8.0", "HMMA")


@dataclass(frozen=True)
class MachineCode:
    """One kernel as it will run.

    Attributes:
        name: the kernel's.
        registers: of a thread.
        spilled_bytes: stack frame, spill stores and spill loads.
        shared_bytes: shared memory of a block.
        instructions: opcodes in order, without modifiers.
        loops: first and last instruction of each.
    """

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]

    def hottest_loop(self, opcode: str) -> Counter[str]:
        """How often each opcode comes in the loop that has most of `opcode`, not counting loops around it.

        Where two have as many, as where a pipeline drains, the longer.
        """
        found = {loop: self.instructions[loop[0] : loop[1] + 1].count(opcode) for loop in self.loops}
        assert found, f"{self.name} has no loop"
        most = [loop for loop, count in found.items() if count == max(found.values())]
        inner = [one for one in most if not any(one[0] <= other[0] and other[1] < one[1] for other in most)]
        first, last = max(inner, key=lambda loop: loop[1] - loop[0])
        return Counter(self.instructions[first : last + 1])

    def instructions_per_weight(self, opcode: str, products_per_weight: int = 1) -> float:
        """Instructions that a thread issues in the hottest loop for each weight that it takes in.

        A tensor-core instruction multiplies 64x16 weights in 128 threads (HGMMA) or 16x16 in 32 (HMMA): 8 a
        thread. `products_per_weight` of them multiply the same weights with different tokens.
        """
        body = self.hottest_loop(opcode)
        return body.total() * products_per_weight / (8 * body[opcode])


def require_mosaic() -> None:
    """Skip the test where this JAX cannot lower the kernels, saying why."""
    if jax.__version_info__ < (0, 11, 2):
        pytest.skip(f"Mosaic GPU kernels need jax >= 0.11.2; this is {jax.__version__}")


def require_compiler() -> None:
    """Skip the test where this machine cannot compile for a GPU, saying why."""
    require_mosaic()
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip(f"no CUDA plugin to compile with: {INSTALL}")
    nvidia = importlib.util.find_spec("nvidia")
    roots = list(nvidia.submodule_search_locations or []) if nvidia else []
    if not any(Path(root, "cu13", "bin", "nvdisasm").is_file() for root in roots):
        pytest.skip(f"no nvdisasm to read machine code with: {INSTALL}")


def lower_for(card: Card, function: Callable[..., Any], *arguments: Any) -> str:
    """The StableHLO of `function` for `card`, which holds the lowered kernels."""
    require_mosaic()
    mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=_abstract_device(card))
    # Mosaic's calls are not among those whose stability JAX promises.
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments)
    return exported.mlir_module()


def compile_for(card: Card, function: Callable[..., Any], *arguments: Any) -> list[MachineCode]:
    """The Mosaic kernels of `function`, compiled for `card` in another process.

    Args:
        card: what to compile for.
        function: what to compile; a process can import it.
        arguments: pytrees of `jax.ShapeDtypeStruct`s.
    """
    require_compiler()
    for _ in range(2):
        if card not in _processes:  # one for each: jaxlib goes on compiling for the first architecture it is asked for
            _processes[card] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start)
        kernels, abandoned = _processes[card].submit(_compile, card, function, arguments).result()
        _to_remove.update(abandoned)
        if kernels is not None:
            return kernels
        _processes.pop(card).shutdown()
    raise AssertionError(f"{function} has the same kernel twice, of which Mosaic writes only one.")


_processes: dict[Card, ProcessPoolExecutor] = {}


def _start() -> None:
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the plugin would look for a driver


def _compile(card: Card, function: Callable[..., Any], arguments: Any) -> tuple[list[MachineCode] | None, set[Path]]:
    """None where this process compiled one of the kernels before: Mosaic keeps it, and writes nothing."""
    description = (Path(__file__).parent / "cards" / f"{card.name}.textproto").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=card.name, target_config=description, topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments)
    traced_for = mesh.abstract_mesh.update(abstract_device=_abstract_device(card))
    before = _handed_to_nvdisasm()
    with TemporaryDirectory() as directory, jax.sharding.use_abstract_mesh(traced_for):
        os.environ["MOSAIC_GPU_DUMP_TO"] = directory
        # Without autotuning, which times the vendor's kernels on the card.
        jax.jit(function).lower(*shapes).compile(compiler_options={"xla_gpu_autotune_level": 0})
        return _read(Path(directory)), _handed_to_nvdisasm() - before


def _read(directory: Path) -> list[MachineCode] | None:
    """Each kernel in the order compiled. Mosaic numbers what it lowers and what it compiles, apart."""
    kinds = [sorted(directory.glob(f"*{kind}"), key=_number) for kind in (".ptxas", ".resources.txt", ".sass_ctrl")]
    if len(kinds[0]) < len(kinds[1]):
        return None
    return [
        parse(files[0].name.rsplit("_", 1)[0], *(file.read_text() for file in files))
        for files in zip(*kinds, strict=True)
    ]


def _number(file: Path) -> int:
    return int(file.name.split(".")[0].rsplit("_", 1)[1])


def parse(name: str, report: str, resources: str, disassembly: str) -> MachineCode:
    """One kernel from ptxas's report, Mosaic's resources and nvdisasm's text."""
    spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    shared = re.search(r"smem_scratch_bytes=(\d+)", resources)
    assert spilled, report
    assert registers, report
    assert shared, resources
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in disassembly.splitlines():
        if label := re.match(r"\s*\.(L_x_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)([^;]*)", line):
            target = re.search(r"\.(L_x_\w+)\)", instruction[2])
            if instruction[1] == "BRA" and target and target[1] in labels:
                loops.append((labels[target[1]], len(instructions)))
            instructions.append(instruction[1])
    assert instructions, disassembly
    return MachineCode(
        name=name,
        registers=int(registers[1]),
        spilled_bytes=sum(map(int, spilled.groups())),
        shared_bytes=int(shared[1]),
        instructions=tuple(instructions),
        # Beyond the exit are waits that jump back into the code, and a trap that jumps to itself.
        loops=tuple((first, last) for first, last in loops if first < last and "EXIT" not in instructions[first:last]),
    )


def _abstract_device(card: Card) -> Any:
    """What Mosaic asks for the compute capability while it traces; JAX's own abstract device has none."""

    @dataclass(frozen=True)
    class Device(jax.sharding.AbstractDevice):
        compute_capability: str = card.capability

    return Device(device_kind=card.kind, num_cores=None, platform="gpu")


def _handed_to_nvdisasm() -> set[Path]:
    """Directories that Mosaic leaves behind, of any process."""
    return set(Path("/tmp").glob("mosaic-gpu-??????"))


# At exit, when another process of the same tests has long read its own.
_to_remove: set[Path] = set()
atexit.register(lambda: [shutil.rmtree(path, ignore_errors=True) for path in _to_remove])
