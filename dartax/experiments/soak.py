"""Soak test: a million steps of a small network, to find drift or overflow in the optimizer state.

The test records the state at a hundred points, with one ``lax.scan`` between two points. Every
thousandth gradient holds a NaN, which must affect only its own step.
"""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import dartax
from dartax.experiments.compare import rounded
from dartax.experiments.config import ConfigError
from dartax.experiments.run_folder import git_commit, make_folder, versions, write_whole
from dartax.experiments.scores import aligned

PyTree = Any

POINTS = 100
FAULT_EVERY = 1000
BATCH, INPUTS, HIDDEN = 16, 4, 16

OPTIMIZERS: dict[str, Callable[[int], optax.GradientTransformationExtraArgs]] = {
    "dart": lambda steps: dartax.dart(),
    "dart, decayed": lambda steps: dartax.dart(optax.linear_schedule(1.0, 0.0, steps)),
    "paper_dart": lambda steps: dartax.paper_dart(),
}


def make_params(key: jax.Array) -> PyTree:
    """Initializes a network with one hidden layer."""
    keys = jax.random.split(key)
    return {
        "hidden": {
            "bias": jnp.zeros(HIDDEN),
            "kernel": jax.random.normal(keys[0], (INPUTS, HIDDEN)) / INPUTS**0.5,
        },
        "output": {"kernel": jax.random.normal(keys[1], (HIDDEN, 1)) / HIDDEN**0.5},
    }


def loss_fn(params: PyTree, key: jax.Array) -> jax.Array:
    """Returns the squared error on a random batch of a smooth function with noise."""
    input_key, noise_key = jax.random.split(key)
    x = jax.random.normal(input_key, (BATCH, INPUTS))
    y = jnp.sin(x[:, :1]) * x[:, 1:2] + 0.1 * jax.random.normal(noise_key, (BATCH, 1))
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return jnp.mean((hidden @ params["output"]["kernel"] - y) ** 2)


def magnitudes(state: PyTree) -> dict[str, jax.Array]:
    """Returns the largest magnitude in each field of a state, by name."""
    fields: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        names = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]
        if not {"key", "version", "block_index"} & {*names}:
            magnitude = jnp.abs(leaf.astype(jnp.float32)).ravel()
            fields.setdefault(".".join(names), []).append(magnitude)
    return {name: jnp.max(jnp.concatenate(leaves)) for name, leaves in fields.items()}


def soak(name: str, steps: int, progress: Callable[[int], Any]) -> dict[str, list[Any]]:
    """Trains with one optimizer; returns the ``POINTS`` recorded values of each field."""
    optimizer, every = OPTIMIZERS[name](steps), steps // POINTS
    key = jax.random.key(0)

    def step(carry, t):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, jax.random.fold_in(key, t))
        fault = jnp.where(t % FAULT_EVERY == FAULT_EVERY // 2, jnp.nan, 0.0)
        grads["hidden"]["bias"] = grads["hidden"]["bias"].at[0].add(fault)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def interval(carry, start):
        carry, losses = jax.lax.scan(step, carry, start + jnp.arange(every))
        params, state = carry
        numbers = {"loss": jnp.mean(losses), "parameters": optax.tree.norm(params)}
        rates = dartax.expected_learning_rates(state, params)
        for path, rate in jax.tree_util.tree_leaves_with_path(rates):
            numbers["rate " + jax.tree_util.keystr(path, simple=True, separator="/")] = rate
        return carry, (numbers, magnitudes(state))

    params = make_params(jax.random.key(1))
    carry = (params, optimizer.init(params))
    record: dict[str, list[Any]] = {}
    for point in range(POINTS):
        carry, (numbers, fields) = interval(carry, point * every)
        for field, value in jax.device_get({**numbers, **fields}).items():
            record.setdefault(field, []).append(float(value))
        progress(every)
    return {field: rounded(np.array(values)) for field, values in record.items()}


def run(
    steps: int = 1_000_000, workdir: str | Path = "runs/soak", *, progress: bool = True
) -> dict[str, Any]:
    """Runs the test for each optimizer, and writes ``soak.json`` and ``soak.png``.

    Args:
      steps: Steps of each optimizer, a multiple of 100.
      workdir: Folder of the results, made if it does not exist.
      progress: Whether to show a progress bar.

    Returns:
      The content of ``soak.json``.

    Raises:
      ConfigError: If ``steps`` is not a positive multiple of 100.
    """
    if steps < POINTS or steps % POINTS:
        fitting = max(1, round(steps / POINTS)) * POINTS
        raise ConfigError(
            f"steps must be a positive multiple of {POINTS}, got {steps}; pass {fitting}."
        )
    workdir = Path(workdir)
    make_folder(workdir)
    records, seconds = {}, {}
    with tqdm(total=steps * len(OPTIMIZERS), unit="step", disable=not progress) as bar:
        for name in OPTIMIZERS:
            bar.set_description(name)
            start = time.perf_counter()
            records[name] = soak(name, steps, bar.update)
            seconds[name] = round(time.perf_counter() - start, 1)
    content = {
        "steps": steps,
        "faults": len(range(FAULT_EVERY // 2, steps, FAULT_EVERY)),
        "seconds": seconds,
        "device": jax.devices()[0].device_kind,
        "git_commit": git_commit(),
        "versions": versions(),
        "records": records,
    }
    write(workdir / "soak.json", content)
    draw(content).savefig(workdir / "soak.png", dpi=110)
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes the results, with one record per line."""
    text = json.dumps(content, indent=1, allow_nan=False)
    write_whole(path, re.sub(r"(?<=[\[,])\n\s+(?=[-\dn])|(?<=[\dl])\n\s+(?=\])", "", text) + "\n")


def series(values: list[Any]) -> np.ndarray:
    """Converts a record to numbers; NaN for values that were not finite."""
    return np.array([np.nan if value is None else value for value in values], float)


def table(content: dict[str, Any]) -> str:
    """Formats, for each field, the magnitude at three points and its maximum."""
    lines = []
    for name, record in content["records"].items():
        rows = [[name, "at 1 %", "at 50 %", "at the end", "greatest"]]
        for field, values in record.items():
            numbers = series(values)
            cells = (numbers[0], numbers[POINTS // 2 - 1], numbers[-1], np.max(numbers))
            rows.append([field, *(f"{cell:.4g}" for cell in cells)])
        lines += [*aligned(rows), ""]
    return "\n".join(lines)


def draw(content: dict[str, Any]) -> Figure:
    """Draws loss, rates, concentrations and moments of each optimizer."""
    records = content["records"]
    figure = Figure(figsize=(4.2 * len(records), 9.5), layout="constrained")
    axes = figure.subplots(4, len(records), sharex=True, squeeze=False)
    steps = content["steps"] / POINTS * np.arange(1, POINTS + 1)
    for column, (name, record) in enumerate(records.items()):
        panels: dict[str, list[str]] = {
            "loss, parameters": ["loss", "parameters"],
            "mean rates": [field for field in record if field.startswith("rate ")],
            "greatest concentration": ["concentration"],
            "averages and memory": [
                f for f in record if f.startswith(("moments", "step_memory", "hyperg"))
            ],
        }
        for ax, (title, fields) in zip(axes[:, column], panels.items(), strict=True):
            for field in fields:
                values = series(record[field])
                if np.any(values > 0):
                    ax.plot(steps, values, lw=1, label=field.removeprefix("rate "))
            ax.set_yscale("log")
            ax.set_title(f"{name}: {title}", fontsize=9)
            ax.legend(fontsize=7, ncols=2, framealpha=0.7, edgecolor="none", loc="best")
            ax.margins(y=0.4)
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel("step")
    return figure
