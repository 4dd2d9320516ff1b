"""Scores of a comparison: ratios of losses, steps to a target, profiles and basins."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dartax.experiments.compare import CompareConfig, geometric_mean

Cells = Mapping[str, Mapping[str, Any]]

# Upper limit of tau in profiles.
MAX_TAU = 4.0
# The basin of a rate: the loss is at most this factor times the best loss.
BASIN = 1.01
# Initial rates up to this value should give similar losses.
SAFE = 1e-4


def losses(cell: Mapping[str, Any], kind: str | None = None) -> np.ndarray:
    """Returns curves ``[values, seeds, evaluations]``; infinite if not finite.

    By default they are what the task is judged by, the test loss or the test error.
    """
    kind = kind or ("test_error" if cell["specification"]["task"].get("judge") else "test_loss")
    array = np.array(cell[kind], float)  # None becomes NaN
    return np.where(np.isfinite(array), array, np.inf)


def counted(config: CompareConfig, name: str, cell: Mapping[str, Any]) -> int:
    """Returns the index of the swept value that counts, the best one of a tuned optimizer."""
    if config.optimizers[name].role != "tuned":
        return 0
    return int(np.argmin(losses(cell)[..., -1].mean(-1)))


def steps_to(curve: np.ndarray, target: float) -> float:
    """Returns the evaluations until a loss curve reaches ``target``; infinite if it never does.

    Between two evaluations, the logarithm of the loss is interpolated linearly. The result is at
    least 1, because there is no loss before the first evaluation.
    """
    reached = np.flatnonzero(curve <= target)
    if not len(reached):
        return np.inf
    last = int(reached[0])
    if last == 0 or not np.isfinite(curve[last - 1]) or curve[last] <= 0:
        return last + 1.0
    before, after = np.log(curve[last - 1]), np.log(curve[last])
    return float(last + (before - np.log(target)) / (before - after))


def width(values: Sequence[float], mean_loss: np.ndarray) -> float:
    """Returns the width, in decades, of the basin around the best rate.

    Between two rates, the loss is interpolated linearly in the logarithm of the rate. The basin
    includes at most the range of the swept values.
    """
    x, y = np.log10(values), np.asarray(mean_loss) / np.min(mean_loss)
    best = int(np.argmin(y))
    edges = []
    for direction in (-1, 1):
        at = best
        while 0 <= at + direction < len(x) and y[at + direction] <= BASIN:
            at += direction
        edge = x[at]
        beyond = at + direction
        if 0 <= beyond < len(x) and np.isfinite(y[beyond]):
            edge += (x[beyond] - x[at]) * (BASIN - y[at]) / (y[beyond] - y[at])
        edges.append(edge)
    return float(edges[1] - edges[0])


def profile(steps: np.ndarray, taus: np.ndarray) -> np.ndarray:
    """Computes performance profiles (Dolan and More, 2002; as in AlgoPerf).

    Args:
      steps: Steps to the target, ``[optimizers, tasks]``; infinite if it is not reached.
      taus: Multiples of the fewest steps of any optimizer on the task, ``[n]``.

    Returns:
      The fraction of the tasks that each optimizer solves within tau, ``[optimizers, n]``.
    """
    fewest = np.min(steps, axis=0)
    ratio = np.where(np.isfinite(steps), steps, np.inf) / np.where(np.isfinite(fewest), fewest, 1.0)
    return (ratio[:, :, None] <= taus).mean(1)


def score(config: CompareConfig, results: Cells) -> dict[str, Any]:
    """Computes all scores for the table and the pictures.

    Args:
      config: The comparison.
      results: Its finished cells by task and optimizer; some may be missing.

    Returns:
      ``cells`` by task and optimizer; ``optimizers``, with means over tasks; ``profile``; and
      ``best_peer``, which compares dart with the best peer on each task.
    """
    scored: dict[str, dict[str, Any]] = {task: {} for task in config.tasks}
    for task, found in results.items():
        if config.target not in found:
            continue
        target_cell = found[config.target]
        target = losses(target_cell)[counted(config, config.target, target_cell), :, -1].mean()
        for name, cell in found.items():
            scored[task][name] = _score_cell(
                config, task, name, cell, target, target_cell["seconds_per_run"]
            )

    optimizers = {}
    for name in config.optimizers:
        own = [scored[task][name] for task in scored if name in scored[task]]
        if own:
            optimizers[name] = {
                "role": config.optimizers[name].role,
                "tasks": len(own),
                "ratio": geometric_mean([cell["ratio"] for cell in own]),
                "worst_ratio": max(cell["ratio"] for cell in own),
                "diverged": sum(cell["diverged"] for cell in own),
                "time": geometric_mean([cell["time"] for cell in own]),
            }
    return {
        "cells": scored,
        "optimizers": optimizers,
        "profile": _profile(config, scored, optimizers),
        "best_peer": _best_peer(config, scored),
    }


def _score_cell(
    config: CompareConfig,
    task: str,
    name: str,
    cell: Mapping[str, Any],
    target: float,
    target_seconds: float,
) -> dict[str, Any]:
    entrant = config.optimizers[name]
    curves = losses(cell)
    index = counted(config, name, cell)
    final = curves[index, :, -1]
    finite = np.all(np.isfinite(final))
    every = config.tasks[task].steps / config.evaluations
    result = {
        "mean": float(final.mean()),
        "standard_error": float(final.std(ddof=1) / np.sqrt(len(final)))
        if finite and len(final) > 1
        else np.nan,
        "ratio": float(final.mean() / target),
        # The curve is the mean over the seeds, so the target reaches its own loss at the end.
        "steps": every * steps_to(curves[index].mean(0), target * (1 + 1e-6)),
        # Time of a run relative to the target, without compilation.
        "time": cell["seconds_per_run"] / target_seconds,
        # A final loss far above the first evaluation counts as diverged too.
        "diverged": int(np.sum(~np.isfinite(final) | ~(final <= 1.5 * curves[index, :, 0]))),
    }
    if "ceiling" in cell:
        result["return"] = cell["ceiling"] - result["mean"]
    if entrant.values:
        result["values"] = list(entrant.values)
        result["means"] = curves[..., -1].mean(-1).tolist()
        result["value"] = entrant.values[index]
        result["width"] = width(entrant.values, curves[..., -1].mean(-1))
        if entrant.role == "basin":
            result["diverged"] = int(np.sum(~np.isfinite(curves[..., -1])))
            below = [m for v, m in zip(entrant.values, result["means"], strict=True) if v <= SAFE]
            result["spread"] = max(below) / min(below) - 1 if below else np.nan
    return result


def _profile(config: CompareConfig, scored: Cells, optimizers: Mapping[str, Any]) -> dict[str, Any]:
    """Computes the profiles of all optimizers with all tasks, except basins and ablations."""
    tasks = [task for task in scored if scored[task]]
    names = [
        name
        for name in optimizers
        if config.optimizers[name].role not in ("basin", "ablation")
        and all(name in scored[task] for task in tasks)
    ]
    taus = np.linspace(1, MAX_TAU, 301)
    if not names:
        return {"taus": taus, "parts": {}, "areas": {}}
    parts = profile(
        np.array([[scored[task][name]["steps"] for task in tasks] for name in names]), taus
    )
    areas = np.trapezoid(parts, taus, axis=1) / (MAX_TAU - 1)
    return {
        "taus": taus,
        "parts": dict(zip(names, parts, strict=True)),
        "areas": dict(zip(names, areas.tolist(), strict=True)),
    }


def _best_peer(config: CompareConfig, scored: Cells) -> dict[str, Any]:
    """Finds the best peer on each task, and the ratio of the loss of dart to its loss."""
    dart = [name for name, entrant in config.optimizers.items() if entrant.role == "dart"]
    peers = [name for name, entrant in config.optimizers.items() if entrant.role == "peer"]
    best = {}
    for task, cells in scored.items():
        present = [name for name in peers if name in cells and cells[name]["mean"] < np.inf]
        if dart and dart[0] in cells and present:
            name = min(present, key=lambda n: cells[n]["mean"])
            ratio = cells[dart[0]]["mean"] / cells[name]["mean"]
            best[task] = {"optimizer": name, "ratio": ratio}
    ratios = [peer["ratio"] for peer in best.values()]
    return {"tasks": best, "ratio": geometric_mean(ratios) if ratios else np.nan}


def table(config: CompareConfig, scores: Mapping[str, Any]) -> str:
    """Formats the comparison for a terminal: losses, steps to the target, peers and basins."""
    tasks = [task for task in config.tasks if scores["cells"][task]]
    names = [
        name
        for role in ("dart", "tuned", "peer", "reference", "ablation")
        for name in sorted(
            (n for n, overall in scores["optimizers"].items() if overall["role"] == role),
            key=lambda n: scores["optimizers"][n]["ratio"],
        )
    ]
    cells, overall, areas = scores["cells"], scores["optimizers"], scores["profile"]["areas"]
    rows = [["final test loss", *tasks, "geo.mean", "worst", "time", "diverged"]]
    rows.append([f"of {config.target}", *(f"{cells[t][config.target]['mean']:.4g}" for t in tasks)])
    for name in names:
        row = [f"{cells[t][name]['ratio']:.3f}" if name in cells[t] else "" for t in tasks]
        row += [f"{overall[name][key]:.3f}" for key in ("ratio", "worst_ratio", "time")]
        rows.append([name, *row, str(overall[name]["diverged"])])
    lines = [*aligned(rows), "", *_returns(tasks, names, cells)]

    rows = [[f"steps to {config.target}'s loss", *tasks, "area of profile"]]
    for name in names:
        steps = [
            cells[t][name]["steps"] / config.tasks[t].steps if name in cells[t] else None
            for t in tasks
        ]
        row = ["" if s is None else f"{s:.2f}" if np.isfinite(s) else "never" for s in steps]
        rows.append([name, *row, f"{areas[name]:.2f}" if name in areas else ""])
    lines += [*aligned(rows), ""]

    if peers := scores["best_peer"]["tasks"]:
        lines.append(f"dart over the best peer of each task: {scores['best_peer']['ratio']:.3f}")
        lines += aligned(
            [["", task, f"{b['ratio']:.3f}", b["optimizer"]] for task, b in peers.items()]
        )
    return "\n".join([*lines, *_basins(config, scores)])


def sentence(config: CompareConfig, scores: Mapping[str, Any]) -> str:
    """What a reader wants to know: how dart did beside the target. Empty without both."""
    overall = scores["optimizers"]
    found = [name for name, entrant in overall.items() if entrant["role"] == "dart"]
    if not found or found[0] == config.target:
        return ""
    name = found[0]
    ratios = {
        task: cells[name]["ratio"] for task, cells in scores["cells"].items() if name in cells
    }
    worst, best = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
    count = overall[name]["diverged"]
    return (
        f"{name} ends at {overall[name]['ratio']:.3f} of {config.target}'s loss over "
        f"{len(ratios)} tasks (geometric mean; worst {ratios[worst]:.2f}, {worst}; best "
        f"{ratios[best]:.2f}, {best}); {count or 'no'} run{'s' if count > 1 else ''} diverged."
    )


def _returns(tasks: Sequence[str], names: Sequence[str], cells: Cells) -> list[str]:
    """Formats the mean returns at the end and their standard errors, where there are any."""
    tasks = [task for task in tasks if any("return" in cell for cell in cells[task].values())]
    if not tasks:
        return []
    rows = [["mean return at the end", *tasks]]
    for name in names:
        found = [cells[task].get(name) for task in tasks]
        rows.append(
            [name, *(f"{c['return']:.1f} ± {c['standard_error']:.1f}" if c else "" for c in found)]
        )
    return [*aligned(rows), ""]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Formats rows as lines, with the first column left-aligned and the others right-aligned."""
    count = max(map(len, rows))
    full = [[*row, *[""] * (count - len(row))] for row in rows]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in full
    ]


def _basins(config: CompareConfig, scores: Mapping[str, Any]) -> list[str]:
    """Describes how the final loss depends on the given rate, one line per task and basin."""
    lines = []
    for task, cells in scores["cells"].items():
        found = [name for name in cells if config.optimizers[name].role == "basin"]
        for name in found:
            lines.append(
                f"{task}: within 1 % of the best over {cells[name]['width']:.1f} decades of "
                f"'{name}' and {cells[config.target]['width']:.1f} of {config.target}'s rate; "
                f"up to {SAFE:g} the losses differ by {100 * cells[name]['spread']:.1f} %"
            )
    return lines
