"""The kernels of a compiled step and the bytes that they move, counted in the program as text."""

import math
import re
from typing import NamedTuple

# Name for the computation that a program begins with.
ENTRY = ""
# What the entry computation names without a kernel behind it.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
# What reads no more of its first operand than it makes.
_TAKES = ("slice", "dynamic-slice", "gather")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) .*{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z-]+)\((.*?)\)(,.*|$)")
_CALLED = re.compile(r"calls=%?([\w.-]+)")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Traffic(NamedTuple):
    """What a compiled program does at every call.

    Attributes:
      kernels: Instructions that are not free.
      bytes: What they read and write, each of their operands and results once; of an operand that a
        kernel only takes slices of, these. An update of a part of an array, in place, counts as
        one of the whole.
    """

    kernels: int
    bytes: float


def _array_bytes(shape: str) -> float:
    """The size of the arrays in an HLO shape, such as ``(f32[3,2]{1,0}, bf16[])``."""
    return sum(
        math.prod(map(int, filter(None, dimensions.split(",")))) * int(bits or 8) / 8
        for bits, dimensions in _ARRAY.findall(shape)
    )


class Instruction(NamedTuple):
    """A line of an HLO computation: what it makes, how, of what, and the computation it calls."""

    name: str
    shape: str
    operation: str
    operands: list[str]
    called: str

    @property
    def dimensions(self) -> str:
        """Of its array; empty for scalars and tuples."""
        return _ARRAY.findall(self.shape)[0][1] if self.shape[0] != "(" else ""


def _computations(hlo: str) -> dict[str, list[Instruction]]:
    """The instructions of every computation of a module, by name."""
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
    """How much a kernel reads of each of its operands, by number; of those that are not there, all.

    A loop over a slice computes no more of what it is a slice of than that.
    """
    users: dict[str, list[Instruction]] = {}
    for instruction in body:
        for operand in set(instruction.operands):
            users.setdefault(operand, []).append(instruction)

    # What a kernel needs of a value: what its slices are of it, or all. Users come after it.
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
    """Counts the kernels of an optimized HLO module, from its text, and the bytes they move."""
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
