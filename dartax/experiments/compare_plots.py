"""Pictures of a comparison."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dartax.experiments.compare import CompareConfig
from dartax.experiments.scores import Cells, counted, losses
from dartax.plot._theme import styles

# The palette of Okabe and Ito, which color-blind readers can distinguish.
DART, TARGET = "#D55E00", "#0072B2"
PEERS = ["#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
DASHES = ["-", "--", ":", "-."]


def draw(config: CompareConfig, results: Cells, scores: Mapping[str, Any]) -> list[Path]:
    """Draws the pictures into ``config.workdir`` and returns their paths."""
    paths = []
    for name, figure in (
        ("loss_curves", loss_curves(config, results, scores)),
        ("profiles", profiles(config, scores)),
        ("initial_rate", initial_rate(config, results)),
        ("learned_rates", learned_rates(config, results)),
    ):
        if figure is not None:
            paths.append(Path(config.workdir) / f"{name}.png")
            figure.savefig(paths[-1], dpi=110)
    return paths


def _panels(titles: list[str], height: float = 2.7) -> tuple[Figure, dict[str, Axes]]:
    """Makes a figure with one panel per title, at most four in a row."""
    columns = min(4, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(3.4 * columns, height * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in grid[len(titles) :]:
        ax.set_axis_off()
    for ax, title in zip(grid, titles, strict=False):
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, dict(zip(titles, grid, strict=False))


def _dart(config: CompareConfig) -> str | None:
    """Returns the name of the entrant with the role ``dart``, if there is one."""
    return next((n for n, entrant in config.optimizers.items() if entrant.role == "dart"), None)


def loss_curves(config: CompareConfig, results: Cells, scores: Mapping[str, Any]) -> Figure | None:
    """Draws the test loss of dart, the target and the best peer: median, minimum and maximum."""
    tasks = [task for task in config.tasks if scores["cells"][task]]
    if not tasks:
        return None
    figure, panels = _panels(tasks)
    for task, ax in panels.items():
        chosen = [(config.target, TARGET, f"{config.target}, tuned")]
        if task in scores["best_peer"]["tasks"]:
            peer = scores["best_peer"]["tasks"][task]["optimizer"]
            chosen.append((peer, PEERS[0], "best peer"))
            ax.set_title(f"{task}\nbest peer: {peer}", fontsize=9)
        dart = _dart(config)
        if dart is not None and dart in results[task]:
            chosen.append((dart, DART, "dart"))
        ends = []
        for name, color, label in chosen:
            cell = results[task][name]
            curves = losses(cell)[counted(config, name, cell)]
            steps = config.tasks[task].steps / config.evaluations
            x = steps * np.arange(1, config.evaluations + 1)
            ax.plot(x, np.median(curves, 0), color=color, lw=1.5, label=label)
            ax.fill_between(x, curves.min(0), curves.max(0), color=color, alpha=0.15, lw=0)
            ends.append(np.concatenate([curves[:, -1], np.median(curves, 0)[1:]]))
        shown = np.concatenate(ends)
        shown = shown[np.isfinite(shown) & (shown > 0)]
        ax.set_yscale("log")
        ax.set_ylim(shown.min() * 0.95, shown.max() * 1.05)
        ax.set_xlabel("step", fontsize=8)
        ax.set_ylabel(f"test {results[task][config.target]['metric']}", fontsize=8)
    handles, labels = next(iter(panels.values())).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def profiles(config: CompareConfig, scores: Mapping[str, Any]) -> Figure | None:
    """Draws the fraction of tasks solved within tau times the fewest steps of any optimizer."""
    parts, areas = scores["profile"]["parts"], scores["profile"]["areas"]
    if not parts:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    dart = _dart(config)
    others = 0
    for name in sorted(parts, key=lambda n: -areas[n]):
        if name == dart:
            style: dict[str, Any] = {"color": DART, "lw": 3}
        elif name == config.target:
            style = {"color": TARGET, "lw": 3}
        else:
            color = PEERS[others % len(PEERS)]
            dash = DASHES[others // len(PEERS) % len(DASHES)]
            style = {"color": color, "ls": dash, "lw": 1.3}
            others += 1
        label = f"{name}, {areas[name]:.2f}"
        ax.plot(scores["profile"]["taus"], parts[name], label=label, **style)
    ax.set_xlabel(f"tau: steps to the final loss of the tuned {config.target}, over the fewest")
    ax.set_ylabel("part of the tasks")
    ax.set_ylim(-0.03, 1.03)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(title="area", loc="outside right center", frameon=False, fontsize=8)
    return figure


def initial_rate(config: CompareConfig, results: Cells) -> Figure | None:
    """Draws the final loss over the initial rate of dart, and over the rate of the target.

    The unit of the losses is the one that the target reaches at its best rate.
    """
    basins = [name for name, entrant in config.optimizers.items() if entrant.role == "basin"]
    shown = [*basins, config.target]
    tasks = [task for task in config.tasks if any(n in results[task] for n in basins)]
    if not tasks:
        return None
    figure, panels = _panels(tasks)
    lowest = 1.0
    for task, ax in panels.items():
        unit = losses(results[task][config.target])[..., -1].mean(1).min()
        for name in (n for n in shown if n in results[task]):
            final = losses(results[task][name])[..., -1] / unit
            kept = np.isfinite(final).all(1)
            mean, seeds = final[kept].mean(1), final.shape[1]
            error = final[kept].std(1, ddof=1) / seeds**0.5 if seeds > 1 else 0 * mean
            ax.errorbar(
                np.array(config.optimizers[name].values)[kept], mean, error, fmt="o-", ms=3,
                capsize=2, color=TARGET if name == config.target else DART, label=name,
            )  # fmt: skip
            lowest = min([lowest, *(mean - error)])
        ax.set_xscale("log")
        ax.set_xlabel("rate given", fontsize=8)
        ax.set_ylabel("final test loss, ratio", fontsize=8)
    for ax in panels.values():
        ax.set_yscale("log")
        ax.set_ylim(0.9 * lowest, 8.5)
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8) if tick > 0.9 * lowest]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
    handles, labels = next(iter(panels.values())).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def learned_rates(config: CompareConfig, results: Cells) -> Figure | None:
    """Draws the mean rate of each block of dart, including the schedule."""
    dart = _dart(config)
    if dart is None:
        return None
    tasks = [task for task in config.tasks if "rates" in results[task].get(dart, {})]
    if not tasks:
        return None
    figure, panels = _panels(tasks, height=3.4)
    for task, ax in panels.items():
        rates = results[task][dart]["rates"]
        steps = config.tasks[task].steps / config.evaluations
        # At the end of a decay the rate is 0, which a log axis cannot show.
        x = steps * np.arange(1, config.evaluations)
        for (block, curve), style in zip(rates.items(), styles(len(rates)), strict=True):
            ax.plot(x, np.array(curve[:-1], float), label=block, **style)
        ax.set_yscale("log")
        ax.set_xlabel("step", fontsize=8)
        ax.set_ylabel("learning rate", fontsize=8)
        if len(rates) <= 8:
            ax.legend(
                fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22)
            )
    return figure
