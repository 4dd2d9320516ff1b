"""Counts the kernels of a compiled program, and the bytes that they move, from its HLO text."""

import math
import re
from typing import NamedTuple

# Name of the entry computation.
ENTRY = ""
# Operations without a kernel.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
# Operations that read only as much of their first operand as they output.
_TAKES = ("slice", "dynamic-slice", "gather")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) .*{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z-]+)\((.*?)\)(,.*|$)")
_CALLED = re.compile(r"calls=%?([\w.-]+)")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Traffic(NamedTuple):
    """Kernels and memory traffic of one call of a compiled program.

    Attributes:
      kernels: Number of instructions that need a kernel.
      bytes: Bytes that the kernels read and write. Each operand and result counts once. If a kernel
        only takes slices of an operand, the slices count. An in-place update of a part of an array
        counts as an update of the whole array.
    """

    kernels: int
    bytes: float


def _array_bytes(shape: str) -> float:
    """Returns the size of the arrays in an HLO shape, such as ``(f32[3,2]{1,0}, bf16[])``."""
    return sum(
        math.prod(map(int, filter(None, dimensions.split(",")))) * int(bits or 8) / 8
        for bits, dimensions in _ARRAY.findall(shape)
    )


class Instruction(NamedTuple):
    """One line of an HLO computation."""

    name: str
    shape: str
    operation: str
    operands: list[str]
    called: str

    @property
    def dimensions(self) -> str:
        """The dimensions of the result; empty for scalars and tuples."""
        return _ARRAY.findall(self.shape)[0][1] if self.shape[0] != "(" else ""


def _computations(hlo: str) -> dict[str, list[Instruction]]:
    """Parses the instructions of each computation of a module, by name."""
    found: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in re.sub(r"/\*.*?\*/", "", hlo).splitlines():
        if header := _HEADER.match(line):
            body = found[ENTRY if header[1] else header[2]] = []
        elif match := _INSTRUCTION.match(line):
            name, shape, operation, operands, attributes = match.groups()
            words = [word.split()[-1].lstrip("%") for word in operands.split(",") if word.strip()]
            called = _CALLED.search(attributes)
            body.append(Instruction(name, shape, operation, words, called[1] if called else ""))
    return found


def _read(body: list[Instruction]) -> dict[int, float]:
    """Returns the fraction that a kernel reads of each operand, by number.

    An elementwise operation before a slice only computes the elements of the slice.
    """
    users: dict[str, list[Instruction]] = {}
    for instruction in body:
        for operand in set(instruction.operands):
            users.setdefault(operand, []).append(instruction)

    # The fraction of each value that the kernel needs. Users come after the value.
    fraction: dict[str, float] = {}
    for value in reversed(body):
        needed = 0.0
        for user in users.get(value.name, []):
            if user.operation in _TAKES and user.operands[0] == value.name:
                needed += _array_bytes(user.shape) / max(_array_bytes(value.shape), 1)
            elif user.dimensions == value.dimensions and user.name in users:  # elementwise
                needed += fraction[user.name]
            else:
                needed = 1.0
        fraction[value.name] = min(needed, 1.0)
    parameters = [instruction for instruction in body if instruction.operation == "parameter"]
    return {int(one.operands[0]): fraction[one.name] for one in parameters}


def traffic(hlo: str) -> Traffic:
    """Counts the kernels of an optimized HLO module, and the bytes that they move."""
    computations = _computations(hlo)
    size: dict[str, float] = {}
    kernels, moved = 0, 0.0
    for instruction in computations[ENTRY]:
        size[instruction.name] = here = _array_bytes(instruction.shape)
        if instruction.operation in _FREE:
            continue
        read = _read(computations.get(instruction.called, []))
        for number, operand in enumerate(instruction.operands):
            here += read.get(number, 1.0) * size.get(operand, 0.0)
        kernels, moved = kernels + (here > 0), moved + here
    return Traffic(kernels, moved)
