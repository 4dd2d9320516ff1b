"""The subcommands of ``dartax``: tyro makes the command line from their signatures."""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from dartax._colored import Description
from dartax.experiments import config as config_lib
from dartax.experiments.config import Config, ConfigError

OPTIONS = "--optimizer.options"
File = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


def train(
    config: File,
    run: Annotated[Config, tyro.conf.arg(name="")],
    distributed: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Train a network as CONFIG says, or resume that run.

    Any key can be overridden: dartax train CONFIG --epochs 12 --optimizer.options init_rate 1e-4.

    Args:
      config: TOML file of the run.
      run: Keys of CONFIG, with the values that the file gives them.
      distributed: Join the other processes of a cluster that JAX detects, such as Slurm.
      coordinator: HOST:PORT of process 0, to join other processes without a cluster.
      processes: Number of processes. All of them need access to the same workdir.
      process_id: Number of this process, from 0.
    """
    del config  # run holds what it says
    from dartax.experiments import devices, run_folder
    from dartax.experiments import train as train_lib

    where = (coordinator, processes, process_id)
    if distributed or where != (None, None, None):
        devices.join_processes(*where)
    workdir = Path(run.workdir)
    finished = run_folder.is_finished(workdir)
    summary = train_lib.train_and_evaluate(run)
    if not devices.is_first_process():
        return
    if finished:
        print(f"{workdir} is finished; nothing was run. For a new run pass another --workdir.")
    if (workdir / "rates.txt").exists():
        table = Description((workdir / "rates.txt").read_text(encoding="utf-8"))
        colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(table.in_color() if colored else table, end="")
    print(
        f"{run_folder.outcome(summary)} after {summary['epochs']} epochs "
        f"({summary['steps']} steps, {summary['wall_s']:.0f} s); pictures in {workdir / 'plots'}, "
        f"more by dartax report {workdir}"
    )


def compare(
    config: File,
    workdir: str | None = None,
    seeds: int | None = None,
    tasks: tuple[str, ...] = (),
    optimizers: tuple[str, ...] = (),
    redo: tuple[str, ...] = (),
) -> None:
    """Compare optimizers on tasks as CONFIG says, or resume that comparison.

    Prints a table and draws pictures. Results that are already there are kept.

    Args:
      config: TOML file of the comparison.
      workdir: Folder of the results.
      seeds: Runs of each setting.
      tasks: Only run these tasks.
      optimizers: Only run these optimizers and the target.
      redo: Run these optimizers again.
    """
    from dartax.experiments import compare as compare_lib
    from dartax.experiments import compare_plots, scores

    loaded = compare_lib.load(
        config, workdir=workdir, seeds=seeds, tasks=tasks, optimizers=optimizers
    )
    results = compare_lib.run(loaded, redo=redo)
    for schedule, part in compare_lib.by_schedule(loaded):
        if schedule:
            print(f"Under a {schedule} schedule")
        print(scores.table(part, scores.score(part, {t: results[t] for t in part.tasks})))
    scored = scores.score(loaded, results)
    for path in compare_plots.draw(loaded, results, scored):
        print(path)
    if last := scores.sentence(loaded, scored):
        print(last)


def bench(
    sizes: tuple[str, ...] = ("1e6x24", "1e7x24"),
    optimizers: tuple[str, ...] = (),
    dtype: str = "float32",
    rounds: int = 10,
    draws: int = 10**6,
    compile_for: str | None = None,
    workdir: str = "runs/bench",
) -> None:
    """Time the steps of optimizers side by side.

    Args:
      sizes: Models, each as PARAMETERSxTENSORS.
      optimizers: Optimizers to time; many by default.
      dtype: Type of the parameters and gradients.
      rounds: Number of times that each optimizer takes its turn.
      draws: Number of gamma draws to time.
      compile_for: File that describes a GPU: only compile for it, and count the bytes of a step.
      workdir: Folder of the results.
    """
    from dartax.experiments import bench as bench_lib
    from dartax.experiments import compiled

    names = optimizers or bench_lib.DEFAULT
    if compile_for is not None:
        counted = compiled.run(compile_for, sizes, names, dtype=dtype, workdir=workdir)
        print(compiled.table(counted))
        return
    content = bench_lib.run(sizes, names, dtype=dtype, rounds=rounds, draws=draws, workdir=workdir)
    print(bench_lib.table(content))
    print(Path(workdir) / "bench.png")
    print(bench_lib.sentence(content))


def soak(steps: int = 1_000_000, workdir: str = "runs/soak") -> None:
    """Train a small network for very long, with faults, and record the optimizer state.

    Args:
      steps: Steps of each optimizer.
      workdir: Folder of the results.
    """
    from dartax.experiments import soak as soak_lib

    print(soak_lib.table(soak_lib.run(steps, workdir)))
    print(Path(workdir) / "soak.png")


def plot(run: Folder) -> None:
    """Draw all pictures of a run.

    Args:
      run: Run folder.
    """
    from dartax.experiments import plots

    for path in plots.draw(run):
        print(path)


def report(run: Folder) -> None:
    """Write RUN/report.html, one page about a run.

    Args:
      run: Run folder.
    """
    from dartax.experiments import report as report_lib

    print(report_lib.write(run))


def run(words: Sequence[str]) -> None:
    """Parses the words of the command line and runs the subcommand that they name.

    Raises:
      SystemExit: After ``--help``, or if tyro cannot parse the words.
      ConfigError: If the configuration is invalid.
    """
    words = _config_first(words)
    words, default = _with_options(words, _read_config(words))
    tyro.extras.subcommand_cli_from_dict(
        {
            "train": functools.partial(train, run=default),
            "compare": compare,
            "bench": bench,
            "soak": soak,
            "plot": plot,
            "report": report,
        },
        prog="dartax",
        description="Learning rates as a learned Dirichlet distribution.",
        args=words,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _config_first(words: Sequence[str]) -> Sequence[str]:
    """``train --epochs 3 a.toml`` as ``train a.toml --epochs 3``, if one word ends in ``.toml``."""
    files = [word for word in words[1:] if word.endswith(".toml")]
    if words[:1] != ["train"] or len(files) != 1 or words[1] == files[0]:
        return words
    rest = [word for word in words[1:] if word != files[0]]
    return ["train", files[0], *rest]


def _read_config(words: Sequence[str]) -> Config:
    """Loads the file of ``dartax train CONFIG``; other words get the default configuration."""
    if words[:1] != ["train"] or (len(words) > 1 and words[1] in ("-h", "--help")):
        return Config()
    if len(words) < 2 or words[1].startswith("-"):
        raise ConfigError(
            f"train must be followed by CONFIG, a TOML file, got {' '.join(words[1:2]) or 'none'}; "
            "pass e.g. dartax train configs/digits.toml."
        )
    return config_lib.load(words[1])


def _with_options(words: Sequence[str], config: Config) -> tuple[list[str], Config]:
    """Makes tyro accept every name under ``--optimizer.options``.

    tyro takes the keys of a table from its default value, so the names on the command line are
    added there. ``--optimizer.options NAME VALUE`` becomes ``--optimizer.options.NAME VALUE``.
    """
    words = "\0".join(words).replace(f"{OPTIONS}\0", f"{OPTIONS}.").split("\0") if words else []
    names = [
        word.partition("=")[0].removeprefix(f"{OPTIONS}.").replace("-", "_")
        for word in words
        if word.startswith(f"{OPTIONS}.")
    ]
    options = {**dict.fromkeys(names, math.nan), **config.optimizer.options}
    optimizer = dataclasses.replace(config.optimizer, options=options)
    return words, dataclasses.replace(config, optimizer=optimizer)
