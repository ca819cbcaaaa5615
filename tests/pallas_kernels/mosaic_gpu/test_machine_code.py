"""Every kernel, lowered wherever JAX can, and compiled to machine code where the compiler is: no GPU is needed."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import machine_code
import pytest
from machine_code import A100, H100, Card

from pallas_kernels.mosaic_gpu import ampere, hopper, hopper_decode, layout
from pallas_kernels.mosaic_gpu.tuning import Tiling
from pallas_kernels.packing import packed_words
from pallas_kernels.weight import PackedWeight

REGISTERS = 65536  # of a multiprocessor
BLOCK = 128  # threads


class Case(NamedTuple):
    """A product. `blocks`, on a multiprocessor at a time, is what leaves enough copies in flight."""

    tokens: int
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    dtype: str = "bfloat16"
    d_in: int = 8192
    d_out: int = 8192
    blocks: int = 2

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, Any]:
        group_rows = self.d_in if self.group_size == -1 else self.group_size
        grid = (-(-self.d_in // group_rows), self.d_out)
        weight = PackedWeight(
            codes=jax.ShapeDtypeStruct((packed_words(self.d_in, self.bits), self.d_out), jnp.uint32),
            scales=jax.ShapeDtypeStruct(grid, jnp.float16),
            zeros=None if self.symmetric else jax.ShapeDtypeStruct(grid, jnp.uint8),
            bits=self.bits,
            group_rows=group_rows,
            d_in=self.d_in,
        )
        x = jax.ShapeDtypeStruct((self.tokens, self.d_in), jnp.dtype(self.dtype))
        return x, jax.eval_shape(layout.shuffle, weight)


FEW = [
    Case(1, blocks=4),
    Case(16, blocks=3),
    Case(64, symmetric=False),
    Case(3, bits=2, blocks=3),
    Case(16, bits=3, group_size=32, symmetric=False),
    Case(16, bits=8, group_size=64, dtype="float16"),
    Case(17, bits=4, group_size=-1, symmetric=False),
    Case(64, bits=3, group_size=32),
    Case(1, d_in=11008, d_out=4096, blocks=3),  # an odd number of steps
    Case(8, d_in=576, d_out=1536, blocks=3),
]
SOME = [
    Case(130, blocks=1),
    Case(256, bits=8, group_size=32, blocks=1),
    Case(512, bits=3, symmetric=False, blocks=1),
    Case(1000, bits=2, group_size=-1, dtype="float16", blocks=1),
]
KERNELS = [(card, run, case) for card, run in ((H100, hopper.run), (A100, ampere.run)) for case in FEW + SOME]


def name(value: Any) -> str | None:
    if isinstance(value, Card):
        return value.name
    if isinstance(value, Experts):
        return f"{value.number}-experts-{name(value.case)}"
    if isinstance(value, Case):
        grid = "sym" if value.symmetric else "asym"
        return f"m{value.tokens}-k{value.d_in}-n{value.d_out}-{value.bits}bit-g{value.group_size}-{grid}-{value.dtype}"
    return None


@pytest.mark.parametrize(("card", "run", "case"), KERNELS, ids=name)
def test_lowers(card: Card, run: Any, case: Case) -> None:
    assert "@mosaic_gpu" in machine_code.lower_for(card, run, *case.arguments())


@pytest.mark.parametrize(("card", "run"), [(H100, hopper.run), (A100, ampere.run)], ids=name)
def test_many_tokens_are_left_to_the_vendor(card: Card, run: Any) -> None:
    assert "@mosaic_gpu" not in machine_code.lower_for(card, run, *Case(2048).arguments())


@pytest.mark.parametrize(("card", "run", "case"), KERNELS, ids=name)
def test_compiles(card: Card, run: Any, case: Case) -> None:
    (code,) = machine_code.compile_for(card, run, *case.arguments())
    assert code.spilled_bytes == 0
    assert card.tensor_core in code.instructions
    warpgroups = 3 if code.name == "hopper_middle" else 1
    assert code.registers * BLOCK * warpgroups * case.blocks <= REGISTERS


class Experts(NamedTuple):
    """Stacked weights. `warpgroups` are those of a block, with the one that copies."""

    number: int
    case: Case
    warpgroups: int = 1

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, Any, jax.ShapeDtypeStruct]:
        x, weight = self.case.arguments()
        stack = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((self.number, *leaf.shape), leaf.dtype), weight)
        return x, stack, jax.ShapeDtypeStruct((self.number,), jnp.int32)


MIXTRAL = {"d_in": 4096, "d_out": 14336}
STACKS = [
    (H100, "hopper_decode", Experts(8, Case(2, **MIXTRAL, blocks=4))),
    (H100, "hopper_decode", Experts(8, Case(512, **MIXTRAL, symmetric=False))),
    (H100, "hopper_decode", Experts(64, Case(16, bits=3, group_size=32, symmetric=False, d_in=2048, d_out=1408))),
    (H100, "hopper_decode", Experts(8, Case(16, **MIXTRAL, group_size=-1, symmetric=False, dtype="float16"))),
    (H100, "hopper_middle", Experts(8, Case(1024, **MIXTRAL, blocks=1), warpgroups=3)),
    (
        H100,
        "hopper_middle",
        Experts(8, Case(2000, bits=8, group_size=-1, symmetric=False, d_in=1024, d_out=192, blocks=1), warpgroups=2),
    ),
    (A100, "ampere", Experts(8, Case(2, **MIXTRAL, blocks=3))),
    (A100, "ampere", Experts(8, Case(512, **MIXTRAL, symmetric=False))),
    (A100, "ampere", Experts(64, Case(16, bits=3, group_size=32, symmetric=False, d_in=2048, d_out=1408, blocks=3))),
]


@pytest.mark.parametrize(("card", "kernel", "experts"), STACKS, ids=name)
def test_experts_compile(card: Card, kernel: str, experts: Experts) -> None:
    run = hopper.grouped if card is H100 else ampere.grouped
    assert "@mosaic_gpu" in machine_code.lower_for(card, run, *experts.arguments())
    (code,) = machine_code.compile_for(card, run, *experts.arguments())
    assert code.name == kernel
    assert code.spilled_bytes == 0
    assert card.tensor_core in code.instructions
    assert code.registers * BLOCK * experts.warpgroups * experts.case.blocks <= REGISTERS


# A thread issues at most so many instructions a weight: at 5.1 (H100) or 6.5 (A100) they cost the time of reading it.
@pytest.mark.parametrize(
    ("card", "product", "tile_k", "limit"),
    [
        (H100, hopper_decode.decode, 512, 3.0),
        (H100, hopper_decode.decode, 128, 3.6),
        (A100, ampere.matmul, 256, 3.0),
        (A100, ampere.matmul, 128, 3.6),
    ],
    ids=name,
)
@pytest.mark.parametrize("tile_m", [8, 16])
def test_instructions_a_weight(card: Card, product: Any, tile_k: int, limit: float, tile_m: int) -> None:
    tiling = Tiling(tile_m=tile_m, tile_k=tile_k, stages=4, split_k=2)
    x, weight = Case(tile_m).arguments()
    (code,) = machine_code.compile_for(card, partial(product, tiling=tiling), x, weight)
    assert code.spilled_bytes == 0
    products = tile_m // 8 if card is A100 else 1  # HMMA takes 8 tokens, HGMMA all
    assert code.instructions_per_weight(card.tensor_core, products) <= limit


# The reading of machine code itself

REPORT = """
ptxas warning : Registers are spilled to local memory in function 'f', 36 bytes spill stores, 40 bytes spill loads
    48 bytes stack frame, 36 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 1 bytes smem
"""
DISASSEMBLY = """
   -:-:-:Y:02        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28]
.L_x_0:
   -:-:-:Y:02        /*0010*/                   LDS.128 R4, [R2]
.L_x_1:
   -:-:-:Y:02        /*0020*/              @P0  LOP3.LUT R4, R4, 0xf, RZ, 0xc0, !PT
   -:-:-:Y:02        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8
   -:-:-:Y:02        /*0040*/              @!P1 BRA `(.L_x_1)
   -:-:-:Y:02        /*0050*/                   IADD3 R2, R2, 0x1, RZ
   -:-:-:Y:02        /*0060*/               @P2 BRA `(.L_x_0)
   -:-:-:Y:02        /*0070*/                   EXIT
.L_x_2:
   -:-:-:Y:02        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+URZ], R4
   -:-:-:Y:02        /*0090*/              @!P0 BRA `(.L_x_2)
   -:-:-:Y:02        /*00a0*/                   BRA `(.L_x_1)
.L_x_3:
   -:-:-:Y:02        /*00b0*/                   BRA `(.L_x_3)
"""


def test_parse() -> None:
    code = machine_code.parse("f", REPORT, "Resources(smem_scratch_bytes=1024, tmem_scratch_cols=0)", DISASSEMBLY)
    assert (code.registers, code.spilled_bytes, code.shared_bytes) == (255, 48 + 36 + 40, 1024)
    assert code.instructions == (
        "IMAD",
        "LDS",
        "LOP3",
        "HMMA",
        "BRA",
        "IADD3",
        "BRA",
        "EXIT",
        "SYNCS",
        "BRA",
        "BRA",
        "BRA",
    )
    assert code.loops == ((2, 4), (1, 6), (8, 9))
    assert code.hottest_loop("HMMA") == {"LOP3": 1, "HMMA": 1, "BRA": 1}
    assert code.instructions_per_weight("HMMA", products_per_weight=2) == 3 * 2 / 8
