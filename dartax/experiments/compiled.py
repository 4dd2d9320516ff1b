"""Compilation of a step for a GPU that the machine does not have.

XLA can compile for a GPU from its description. This measures no times, but it shows the kernels of
a step and the bytes that they read and write. Memory bandwidth limits a step on a GPU, so these
bytes determine most of its time.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dartax.experiments import bench
from dartax.experiments.config import ConfigError
from dartax.experiments.run_folder import git_commit, make_folder, versions, write_json
from dartax.experiments.scores import aligned
from dartax.experiments.traffic import traffic


def device(description: Path) -> jax.Device:
    """Reads the description of a GPU, a ``GpuTargetConfigProto`` of XLA as text.

    Raises:
      ConfigError: If the file cannot be read, or JAX cannot compile for the GPU.
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
    except Exception as error:  # JAX raises errors of many kinds
        raise ConfigError(
            f"compile-for must describe a GPU that JAX can compile for, got '{description}' "
            f"({str(error).splitlines()[0]}); pip install jax-cuda12-plugin=={jax.__version__} "
            f"jax-cuda12-pjrt=={jax.__version__} and set JAX_PLATFORMS=cpu, or fix the "
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
    """Compiles a step of each optimizer, and writes ``compiled.json`` into ``workdir``.

    Args:
      description: File that describes the GPU; see :func:`device`.
      sizes: Sizes of models, such as ``10000000x24``: parameters and tensors.
      names: Optimizers. The target, AdamW, is added.
      dtype: Type of the parameters and gradients.
      workdir: Folder of the results, made if it does not exist.

    Returns:
      The content of ``compiled.json``: for each optimizer the ``bytes`` per parameter, their
      ``ratio`` to those of the target, and the number of ``kernels``.

    Raises:
      ConfigError: If an argument is invalid.
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
            # Autotuning would have to run kernels on the GPU.
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
    """Formats the results for a terminal."""
    lines = []
    for size, results in content["sizes"].items():
        rows = [[size, "bytes", "ratio", "kernels"]]
        for name, row in results.items():
            rows.append([name, f"{row['bytes']:.1f}", f"{row['ratio']:.2f}", str(row["kernels"])])
        lines += [*aligned(rows), ""]
    lines.append(f"bytes per parameter that a step would move on an {content['device']}")
    return "\n".join(lines)
