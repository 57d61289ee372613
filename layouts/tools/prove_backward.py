"""The proofs of ``prove`` for the layouts of the backward pass, whose operands and products have names of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

from ..base import BYTES, Box, Config, row_width
from . import prove
from .prove import Finding, Row


def rows(config: Config, head_dim: int | None, family: ModuleType) -> Iterator[Row]:
    """Every step of every operand of a config, and its products."""
    for operand in family.OPERANDS:
        parts, part = _parts(operand, config, family), family.over(config).get(operand, operand).removeprefix("q")
        if part not in parts:
            continue  # it is in registers all the while
        yield from prove.operand_rows(operand, parts[part], config, head_dim, family)
        yield from _tensor_core_rows(operand, config, family)
    for role in family.ROLES:
        yield Row(role, "product", "", str(family.mma(role, config).c), findings=tuple(_product(role, config, family)))


def _parts(operand: str, config: Config, family: ModuleType) -> dict[str, int]:
    """Bytes by part, of the kernel that has the operand."""
    if hasattr(family, "smem_parts_of"):  # two kernels
        return family.smem_parts_of(next(name for name, held in family.KERNELS.items() if operand in held), config)
    return family.smem_parts(config)


def _tensor_core_rows(operand: str, config: Config, family: ModuleType) -> Iterator[Row]:
    """What warpgroup MMAs read through descriptors. Scores and dP sum over a head's columns: what they read is K-major;
    the other products sum over rows of what they read from shared memory, but for dK, if it reads dSᵀ there."""
    layout, where = family.smem(operand, config), f"{prove.title(config)}, {operand}"
    for role, operands in family.READS.items():
        mma = family.mma(role, config)
        if role == "dQ" and family.turned(config):
            operands = operands[::-1]
        for letter, name in zip("AB", operands, strict=True):
            if name != operand or letter not in mma.from_shared:
                continue
            width = row_width(layout)
            box = Box(operand, family.tile(operand, config)[0], width, width * BYTES)
            k_major = role in family.FIRST or (mma.from_shared == "AB" and role != "dQ" and (role, letter) != ("dK", "B"))
            read = mma if letter == "B" or k_major else replace(mma, shape=(mma.shape[0], mma.shape[0], mma.shape[2]))
            found = prove.tensor_cores_get(
                f"{where}, {role}", read, "S" if k_major else "O", "Q" if letter == "A" else "K", layout, box
            )
            what = f"{'×'.join(map(str, mma.shape))}, {'K' if k_major else 'MN'}-major, {box.swizzle_bytes}-byte swizzle"
            yield Row(operand, f"read {role}", "wgmma", what, findings=tuple(found))


def _product(role: str, config: Config, family: ModuleType) -> list[Finding]:
    """An MMA's own maps are bijections; and where its A operand is in registers, it is what S's accumulator holds."""
    mma, at = family.mma(role, config), f"{prove.title(config)}, {role}"
    m, n, k = mma.tile
    found: list[Finding] = []
    for letter, values, tile, times in (
        ("A", mma.a, (m, k), mma.across),
        ("B", mma.b, (n, k), 1 if mma.from_shared else mma.warps),
        ("C", mma.c, (m, n), 1),
    ):
        if letter not in mma.from_shared:
            found += prove.once(f"{at}, operand {letter}", values, tile, times)
    if "A" not in mma.from_shared and (role in ("dV", "dK") or not family.READS[role][0]):
        scores = family.mma("qS" if role == "dQ" else "S", config)
        found += prove.scores_are_operand(at, scores, mma, "the product", split=True)
    return found
