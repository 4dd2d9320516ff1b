"""What a step moves on a GPU that is not there: XLA compiles for one from its description.

Times need the device; the kernels that XLA makes of a step, and the bytes that they read and write,
do not. On a GPU a step is bound by memory, and these bytes are most of what it costs.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dartax.experiments import bench
from dartax.experiments.config import ConfigError
from dartax.experiments.run_folder import git_commit, make_folder, versions, write_json
from dartax.experiments.scores import aligned

# Name for the computation that a program begins with.
ENTRY = ""
# What the entry computation names without a kernel behind it.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
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
            if user.operation in ("slice", "dynamic-slice"):
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


def device(description: Path) -> jax.Device:
    """The GPU of a description, a ``GpuTargetConfigProto`` of XLA as text.

    Raises:
      ConfigError: If it cannot be read, or JAX cannot compile for it.
    """
    try:
        text = description.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"compile-for must be a file that can be read, got '{description}' ({error}); pass "
            "e.g. configs/bench/h100.txtpb."
        ) from error
    try:
        topology = topologies.get_topology_desc(
            description.stem, "cuda", topology="1x1x1", target_config=text
        )
    except Exception as error:  # JAX has no common one
        raise ConfigError(
            f"compile-for must describe a GPU that JAX can compile for, got '{description}' "
            f"({str(error).splitlines()[0]}); pip install jax-cuda12-plugin=={jax.__version__} "
            f"jax-cuda12-pjrt=={jax.__version__} and set JAX_PLATFORMS=cpu, or mend the "
            "description."
        ) from error
    return topology.devices[0]


def run(
    description: str | Path,
    sizes: Sequence[str],
    names: Sequence[str],
    *,
    dtype: str = "float32",
    workdir: str | Path = "runs/bench",
) -> dict[str, Any]:
    """Compiles a step of every optimizer, and leaves ``compiled.json`` in ``workdir``.

    Args:
      description: File that describes the GPU; see :func:`device`.
      sizes: Models, as ``10000000x24``: parameters and tensors.
      names: Optimizers; the target, AdamW, is put in front.
      dtype: Of parameters and gradients.
      workdir: Folder of the results; made where it is missing.

    Returns:
      The results, as written: ``bytes`` per parameter, ``ratio`` of them to the target's and
      ``kernels`` of every optimizer.

    Raises:
      ConfigError: If an argument makes no benchmark.
    """
    parsed, names = bench.check(sizes, names, dtype)
    target = device(Path(description))
    make_folder(Path(workdir))
    sharding = jax.sharding.SingleDeviceSharding(target)

    def there(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    results: dict[str, Any] = {}
    for size in parsed:
        row = results[str(size)] = {}
        for name in names:
            optimizer, step = bench.make_step(name)
            params = jax.eval_shape(lambda size=size: bench.make_params(size, jnp.dtype(dtype)))
            state = there(jax.eval_shape(optimizer.init, params))
            params = there(params)
            lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
            # Without the device no kernel can be timed to choose the fastest.
            compiled = lowered.compile(compiler_options={"xla_gpu_autotune_level": "0"})
            kernels, moved = traffic(compiled.as_text() or "")
            row[name] = {
                "bytes": moved / sum(leaf.size for leaf in jax.tree.leaves(params)),
                "kernels": kernels,
            }
            row[name]["ratio"] = row[name]["bytes"] / row[names[0]]["bytes"]
    content = {
        "dtype": dtype,
        "device": target.device_kind,
        "git_commit": git_commit(),
        "versions": versions(),
        "sizes": results,
    }
    write_json(Path(workdir) / "compiled.json", content)
    return content


def table(content: dict[str, Any]) -> str:
    """The results as text for a terminal."""
    lines = []
    for size, results in content["sizes"].items():
        rows = [[size, "bytes", "ratio", "kernels"]]
        for name, row in results.items():
            rows.append([name, f"{row['bytes']:.1f}", f"{row['ratio']:.2f}", str(row["kernels"])])
        lines += [*aligned(rows), ""]
    lines.append(f"bytes per parameter that a step would move on an {content['device']}")
    return "\n".join(lines)
