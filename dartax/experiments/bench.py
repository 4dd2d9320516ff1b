"""Benchmark of a step: time, memory traffic, state and compilation of many optimizers.

The optimizers take turns of a few steps each, so noise of the machine affects all of them alike. In
each round, the time of an optimizer is divided by the time of the target. The reported ratio is the
median over the rounds.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

from dartax import random
from dartax.experiments import optimizers
from dartax.experiments.config import ConfigError, OptimizerConfig, nearest
from dartax.experiments.run_folder import git_commit, make_folder, versions, write_json
from dartax.experiments.scores import aligned
from dartax.experiments.traffic import Traffic, traffic

PyTree = Any

TARGET = "adamw"
# Variants of dart, as fields of OptimizerConfig.
VARIANTS: dict[str, dict[str, Any]] = {
    "dart_weight_decay": {"options": {"weight_decay": 1e-4}},
    "dart_memory_decay_0": {"options": {"memory_decay": 0.0}},
    "dart_optax_adam": {"inner": "optax_adam"},
    "dart_momentum": {"inner": "momentum"},
    "dart_lion": {"inner": "lion"},
    "dart_muon": {"inner": "muon"},
    "dart_channel": {"blocks": "channel"},
    "dart_element": {"blocks": "element"},
}
# Variants of the target that, like dart, read all gradients before they update any parameter.
WRAPPED: dict[str, Callable[[optax.GradientTransformation], optax.GradientTransformation]] = {
    "adamw_clipped": lambda adamw: optax.chain(optax.clip_by_global_norm(1.0), adamw),
    "adamw_if_finite": lambda adamw: optax.apply_if_finite(adamw, max_consecutive_errors=5),
}
PEERS = ("paper_dart", "prodigy", "d_adaptation", "mechanic", "dowg", "momo_adam")
# (Muon multiplies matrices, and takes many times as long as all others on a CPU.)
QUICK = [name for name in VARIANTS if name != "dart_muon"]
DEFAULT = (TARGET, *WRAPPED, "dart", *QUICK, *PEERS)
# A turn has at least STEPS steps, so that the caches are as in a run of one optimizer. It has more,
# up to MOST_STEPS, if it would be shorter than TURN_S: then a GPU can queue steps ahead.
STEPS, TURN_S, MOST_STEPS = 3, 0.1, 100
# The sides of large matrices are multiples of WIDTH.
WIDTH = 64
# Length of the schedules, which does not affect the results.
HORIZON = 10_000


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of a model: the number of its parameters and of its tensors."""

    parameters: int
    tensors: int

    def __str__(self):
        return f"{self.parameters}x{self.tensors}"

    @classmethod
    def parse(cls, text: str) -> "Size":
        """Parses text such as ``10000000x24`` or ``1e7x24``."""
        try:
            parameters, tensors = (float(number) for number in text.split("x"))
        except ValueError:
            parameters = tensors = 0.0
        if not (parameters >= tensors >= 2 and parameters.is_integer() and tensors.is_integer()):
            raise ConfigError(
                "sizes must be PARAMETERSxTENSORS, at least 2 tensors and as many parameters, got "
                f"{text!r}; pass e.g. 1e7x24."
            )
        return cls(int(parameters), int(tensors))


def make_params(size: Size, dtype: Any) -> PyTree:
    """Makes square matrices, each with a bias vector, of about ``size`` in total."""
    layers = size.tensors // 2
    side = max(1, round((size.parameters / layers) ** 0.5))
    # Large models have such sides. With odd ones, GPU kernels of XLA read one element at a time.
    side = WIDTH * round(side / WIDTH) if side >= 4 * WIDTH else side
    return [
        {"kernel": jnp.full((side, side), 0.02, dtype), "bias": jnp.zeros(side, dtype)}
        for _ in range(layers)
    ]


def make_step(name: str) -> tuple[optax.GradientTransformationExtraArgs, Callable[..., Any]]:
    """Returns an optimizer, and a function that updates parameters and state from gradients."""
    variant = VARIANTS.get(name, {})
    known: Any = TARGET if name in WRAPPED else "dart" if variant else name  # checked by check
    rate = 1.0 if optimizers.has_rates(known) else 1e-3
    config = OptimizerConfig(name=known, learning_rate=rate, **variant)
    optimizer = optimizers.build(config, HORIZON)
    optimizer = optax.with_extra_args_support(WRAPPED.get(name, lambda same: same)(optimizer))

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params, value=jnp.ones([]))
        return optax.apply_updates(params, updates), state

    return optimizer, step


def timed(call: Callable[[], Any]) -> float:
    """Returns the mean seconds of a call over a turn, after a warm-up call."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    calls = int(np.clip(TURN_S / (time.perf_counter() - start), STEPS, MOST_STEPS))
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


class Contender:
    """One optimizer with a compiled step, its own parameters and state, and its times."""

    def __init__(self, name: str, size: Size, dtype: Any):
        """Compiles the step, with donated parameters and state."""
        optimizer, step = make_step(name)
        self.params = make_params(size, dtype)
        # Some optimizers put the parameters into their state, and an array is donated only once.
        self.state = jax.tree.map(jnp.copy, optimizer.init(self.params))
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(self.params, self.state, self.params)
        self.trace_s = time.perf_counter() - start
        start = time.perf_counter()
        self.compiled = lowered.compile()
        self.compile_s = time.perf_counter() - start
        self.times: list[float] = []

    def turn(self, grads: PyTree) -> None:
        """Takes a few steps and records the mean seconds of a step."""

        def step():
            self.params, self.state = self.compiled(self.params, self.state, grads)
            return self.params

        self.times.append(timed(step))

    def traffic(self) -> Traffic:
        """Counts the kernels of a step and the bytes that it reads and writes."""
        counted = traffic(self.compiled.as_text() or "")
        # Both counts can be too high: that of XLA for gathers, ours for updates of a part.
        analysis: Any = self.compiled.cost_analysis() or {}  # some devices have none
        return counted._replace(bytes=min(counted.bytes, analysis.get("bytes accessed", np.inf)))

    def state_bytes(self) -> int:
        """Returns the size of the optimizer state."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))


def bandwidth(dtype: Any, size: int) -> Callable[[], float]:
    """Measures the bytes per second of a plain pass, which reads and writes an array."""
    pass_over = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = [pass_over(jnp.zeros(size, dtype))]

    def step():
        array[0] = pass_over(array[0])
        return array[0]

    return lambda: 2 * array[0].nbytes / timed(step)


def measure_draws(count: int) -> dict[str, float]:
    """Times ``count`` gamma draws with their gradient, of dartax and of JAX, in milliseconds."""
    concentration = jnp.full(count, 10.0, jnp.float32)
    samplers: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
        "fast": lambda key, a: random.loggamma(key, a, method="fast"),
        "jax": jax.random.loggamma,
    }
    times = {}
    for name, sample in samplers.items():

        def total(a, key, sample=sample):
            return jnp.sum(sample(key, a))

        draw = jax.jit(jax.value_and_grad(total))
        jax.block_until_ready(draw(concentration, jax.random.key(0)))
        seconds = []
        for key in jax.random.split(jax.random.key(1), STEPS):
            start = time.perf_counter()
            jax.block_until_ready(draw(concentration, key))
            seconds.append(time.perf_counter() - start)
        times[f"{name}_ms"] = 1e3 * float(np.median(seconds))
    return {"count": count, **times, "ratio": times["jax_ms"] / times["fast_ms"]}


def measure(
    size: Size, names: Sequence[str], dtype: Any, rounds: int, bar: Any
) -> tuple[dict[str, dict[str, float]], float]:
    """Times the optimizers ``names`` in turns, on a model of one size.

    Returns:
      A dict and the bytes per second of a plain pass. For each optimizer, the dict holds ``ms`` per
      step, the ``ratio`` to the target, ``kernels``, ``bytes_accessed`` and ``state_bytes`` per
      parameter, ``bandwidth`` relative to a plain pass, ``trace_s`` and ``compile_s``.
    """
    contenders = {}
    for name in names:
        bar.set_description(f"{size}, {name}")
        contenders[name] = Contender(name, size, dtype)
        bar.update()
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), make_params(size, dtype))
    count = sum(leaf.size for leaf in jax.tree.leaves(grads))
    plain, speeds = bandwidth(dtype, count), []
    for _ in range(rounds):
        speeds.append(plain())
        for name, contender in contenders.items():
            bar.set_description(f"{size}, {name}")
            contender.turn(grads)
            bar.update()
    target, speed = np.array(contenders[names[0]].times), float(np.median(speeds))
    rows = {}
    for name, contender in contenders.items():
        kernels, moved = contender.traffic()
        seconds = float(np.median(contender.times))
        rows[name] = {
            "ms": 1e3 * seconds,
            "ratio": float(np.median(np.array(contender.times) / target)),
            "kernels": kernels,
            "bytes_accessed": moved / count,
            "state_bytes": contender.state_bytes() / count,
            "bandwidth": moved / seconds / speed,
            "trace_s": contender.trace_s,
            "compile_s": contender.compile_s,
        }
    return rows, speed


def check(sizes: Sequence[str], names: Sequence[str], dtype: str) -> tuple[list[Size], list[str]]:
    """Parses the sizes, and puts the target first among the optimizers.

    Raises:
      ConfigError: If a size, an optimizer or ``dtype`` is unknown.
    """
    for name in names:
        known = [*optimizers.FACTORY, *WRAPPED, *VARIANTS]
        if name not in known:
            raise ConfigError(f"optimizers must be known, got {name!r}; {nearest(name, known)}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}; pass one.")
    parsed = [Size.parse(text) for text in sizes]
    return parsed, [TARGET, *(name for name in dict.fromkeys(names) if name != TARGET)]


def run(
    sizes: Sequence[str],
    names: Sequence[str],
    *,
    dtype: str = "float32",
    rounds: int = 10,
    draws: int = 10**6,
    workdir: str | Path = "runs/bench",
    progress: bool = True,
) -> dict[str, Any]:
    """Runs the benchmark, and writes ``bench.json`` and ``bench.png`` into ``workdir``.

    Args:
      sizes: Sizes of models, such as ``10000000x24``: parameters and tensors.
      names: Optimizers. The target, AdamW, is added.
      dtype: Type of the parameters and gradients.
      rounds: Number of turns of each optimizer.
      draws: Number of gamma draws to time; 0 skips that.
      workdir: Folder of the results, made if it does not exist.
      progress: Whether to show a progress bar.

    Returns:
      The content of ``bench.json``.

    Raises:
      ConfigError: If an argument is invalid.
    """
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1, got {rounds}; pass 10.")
    if draws < 0:
        raise ConfigError(f"draws must be at least 0, got {draws}; pass 1000000.")
    parsed, names = check(sizes, names, dtype)
    workdir = Path(workdir)
    make_folder(workdir)
    total = len(parsed) * len(names) * (rounds + 1)
    with tqdm(total=total, unit="turn", disable=not progress) as bar:
        measured = {
            str(size): measure(size, names, jnp.dtype(dtype), rounds, bar) for size in parsed
        }
    content = {
        "dtype": dtype,
        "rounds": rounds,
        "device": jax.devices()[0].device_kind,
        "git_commit": git_commit(),
        "versions": versions(),
        "draws": measure_draws(draws) if draws else None,
        "plain_pass_gb_per_s": {size: speed / 1e9 for size, (_, speed) in measured.items()},
        "sizes": {size: rows for size, (rows, _) in measured.items()},
    }
    write_json(workdir / "bench.json", content)
    draw(content).savefig(workdir / "bench.png", dpi=110)
    return content


def table(content: dict[str, Any]) -> str:
    """Formats the results for a terminal."""
    lines = []
    for size, results in content["sizes"].items():
        rows = [
            [size, "ms", "ratio", "kernels", "bytes", "state", "bandwidth", "trace s", "compile s"]
        ]
        for name, row in results.items():
            rows.append(
                [
                    name,
                    f"{row['ms']:.2f}",
                    f"{row['ratio']:.2f}",
                    str(row["kernels"]),
                    f"{row['bytes_accessed']:.1f}",
                    f"{row['state_bytes']:.1f}",
                    f"{100 * row['bandwidth']:.0f} %",
                    f"{row['trace_s']:.2f}",
                    f"{row['compile_s']:.2f}",
                ]
            )
        speed = content["plain_pass_gb_per_s"][size]
        lines += [*aligned(rows), f"bandwidth: over the {speed:,.0f} GB/s of a plain pass", ""]
    if draws := content["draws"]:
        lines += [
            f"{draws['count']:,} gamma draws with gradient: fast {draws['fast_ms']:.0f} ms, "
            f"jax.random {draws['jax_ms']:.0f} ms, {draws['ratio']:.1f} times as much",
            "",
        ]
    lines.append("bytes and state: bytes per parameter that a step moves, and that the state takes")
    return "\n".join(lines)


def sentence(content: dict[str, Any]) -> str:
    """What a reader wants to know: how long a step takes beside the target's, at each size."""
    lines = []
    for size, results in content["sizes"].items():
        target, *others = results
        name = "dart" if "dart" in others else others[0] if others else target
        parameters, tensors = dataclasses.astuple(Size.parse(size))
        lines.append(
            f"{parameters:,} parameters in {tensors} tensors: a step of {name} takes "
            f"{results[name]['ratio']:.2f} times as long as {target}'s."
        )
    return "\n".join(lines)


def draw(content: dict[str, Any]) -> Figure:
    """Draws, for each size, the step time relative to the target, and the compilation time."""
    sizes, panels = content["sizes"], ("ratio", "compile_s")
    names = list(next(iter(sizes.values())))
    figure = Figure(figsize=(9.5, 1.2 + 0.26 * len(names) * len(sizes)), layout="constrained")
    titles = {"ratio": f"time of a step over {names[0]}'s", "compile_s": "compilation, s"}
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    for ax, panel in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        height = 0.8 / len(sizes)
        for i, (size, results) in enumerate(sizes.items()):
            values = [results[name][panel] for name in names]
            place = np.arange(len(names)) + (i - (len(sizes) - 1) / 2) * height
            parameters, tensors = dataclasses.astuple(Size.parse(size))
            label = f"{parameters:,} in {tensors}"
            bars = ax.barh(place, values, height, label=label, color=colors[i % len(colors)])
            ax.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        ax.set_title(titles[panel], fontsize=10)
        ax.set_yticks(np.arange(len(names)), names)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.12, y=0.01)
        if panel == "ratio":
            ax.axvline(1.0, color="grey", lw=0.8)
    ax.invert_yaxis()
    figure.legend(
        *ax.get_legend_handles_labels(),
        title="parameters in tensors",
        loc="outside lower center",
        ncols=4,
        fontsize=8,
    )
    return figure
