"""The command ``dartax``."""

import argparse
import shlex
import signal
import sys
from pathlib import Path


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one sentence, without the usage around it."""

    def error(self, message):
        print(f"dartax: {message}; {self.prog} --help lists what there is.", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    """Runs ``dartax train``, ``compare``, ``bench``, ``soak``, ``plot`` or ``report``.

    Returns:
      The exit status: 0, 2 for a mistake of the caller's, 1 for a machine that failed (a disk, a
      lost process), 130 after Ctrl-C and 143 after SIGTERM.
    """
    parser = _Parser(
        prog="dartax", description="Learning rates as a learned Dirichlet distribution."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser(
        "train",
        help="train a network as a TOML file says",
        description="Trains, or resumes, the run that CONFIG describes. Any key can be "
        "overridden: dartax train CONFIG --epochs 12; dartax train CONFIG --help lists them.",
        add_help=False,
        allow_abbrev=False,
    )
    train_parser.add_argument("config", metavar="CONFIG", nargs="?", help="TOML file of the run")
    train_parser.add_argument("--distributed", action="store_true")
    train_parser.add_argument("--coordinator", metavar="HOST:PORT")
    train_parser.add_argument("--processes", type=int, metavar="N")
    train_parser.add_argument("--process-id", type=int, metavar="I")
    compare_parser = commands.add_parser(
        "compare",
        help="compare optimizers on tasks as a TOML file says",
        description="Runs, or resumes, the comparison that CONFIG describes, prints its table and "
        "draws its pictures. Finished cells are kept.",
    )
    compare_parser.add_argument("config", metavar="CONFIG", help="TOML file of the comparison")
    compare_parser.add_argument("--workdir", help="folder of the results")
    compare_parser.add_argument("--seeds", type=int, help="runs of each setting")
    compare_parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks")
    compare_parser.add_argument(
        "--optimizers", nargs="+", metavar="NAME", help="only these optimizers and the target"
    )
    compare_parser.add_argument(
        "--redo", nargs="+", default=[], metavar="NAME", help="run these optimizers again"
    )
    bench_parser = commands.add_parser(
        "bench",
        help="time the steps of optimizers side by side",
        description="Times the steps of optimizers in turns, and prints a table with the bytes "
        "that they move and keep and the seconds of compilation.",
    )
    bench_parser.add_argument(
        "--sizes", nargs="+", default=["1e6x24", "1e7x24"], metavar="PARAMETERSxTENSORS"
    )
    bench_parser.add_argument("--optimizers", nargs="+", metavar="NAME")
    bench_parser.add_argument("--dtype", default="float32", help="of parameters and gradients")
    bench_parser.add_argument("--rounds", type=int, default=10, help="turns of every optimizer")
    bench_parser.add_argument("--draws", type=int, default=10**6, help="gamma draws to time")
    bench_parser.add_argument(
        "--compile-for",
        metavar="FILE",
        help="description of a GPU: only compile for it, and count what a step would move",
    )
    bench_parser.add_argument("--workdir", default="runs/bench", help="folder of the results")
    soak_parser = commands.add_parser(
        "soak",
        help="look for drift in the state over a million steps",
        description="Trains a small network for very long, with faults, and records every number "
        "of the optimizer's state.",
    )
    soak_parser.add_argument("--steps", type=int, default=1_000_000, help="of every optimizer")
    soak_parser.add_argument("--workdir", default="runs/soak", help="folder of the results")
    plot_parser = commands.add_parser("plot", help="draw all pictures of a run")
    plot_parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    report_parser = commands.add_parser("report", help="make one page of a run: RUN/report.html")
    report_parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = rest

    command = shlex.join(["dartax", *(sys.argv[1:] if argv is None else argv)])
    try:
        from dartax.experiments import config, data, devices, signals

        with signals.interrupt_on_sigterm():
            return _COMMANDS[arguments.command](arguments)
    except ModuleNotFoundError as error:
        print(
            f"dartax: the command needs the package {error.name}; pip install 'dartax[train]'.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stop:
        print(f"\ndartax: stopped; the same command resumes the run: {command}", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except (config.ConfigError, data.DataError) as error:
        print(f"dartax: {error}", file=sys.stderr)
        status = 2
    except (OSError, MemoryError) as error:
        print(
            "\ndartax: the files of a run must be readable and writable, got "
            f"{error or type(error).__name__}; mend that, and the same command resumes the run: "
            f"{command}",
            file=sys.stderr,
        )
        status = 1
    devices.exit_alone(status)
    return status


def _train(arguments: argparse.Namespace) -> int:
    """``dartax train``."""
    from dartax.experiments import config, devices, train

    prog = "dartax train CONFIG"
    if arguments.config is None:
        # Only to list the keys: dartax train --help.
        helps = [word for word in arguments.overrides if word in ("-h", "--help")]
        config.override(config.Config(), helps, prog)
        raise config.ConfigError(
            "train needs CONFIG, a TOML file, got none; pass e.g. configs/digits.toml."
        )
    chosen = config.override(config.load(arguments.config), arguments.overrides, prog)
    where = (arguments.coordinator, arguments.processes, arguments.process_id)
    if arguments.distributed or where != (None, None, None):
        devices.join_processes(*where)
    summary = train.train_and_evaluate(chosen)
    if not devices.is_first_process():
        return 0
    workdir = Path(chosen.workdir)
    if (workdir / "rates.txt").exists():
        print((workdir / "rates.txt").read_text(encoding="utf-8"), end="")
    print(
        f"test loss {summary['test_loss']:.4f}, test accuracy "
        f"{100 * summary['test_accuracy']:.2f} % after {summary['epochs']} epochs "
        f"({summary['steps']} steps, {summary['wall_s']:.0f} s); pictures in {workdir / 'plots'}, "
        f"more by dartax report {workdir}"
    )
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    """``dartax compare``."""
    from dartax.experiments import compare, compare_plots, scores

    config = compare.load(
        arguments.config,
        workdir=arguments.workdir,
        seeds=arguments.seeds,
        tasks=arguments.tasks,
        optimizers=arguments.optimizers,
    )
    results = compare.run(config, redo=arguments.redo)
    scored = scores.score(config, results)
    print(scores.table(config, scored))
    for path in compare_plots.draw(config, results, scored):
        print(path)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    """``dartax bench``."""
    from dartax.experiments import bench, compiled

    names = bench.DEFAULT if arguments.optimizers is None else arguments.optimizers
    if arguments.compile_for is not None:
        counted = compiled.run(
            arguments.compile_for,
            arguments.sizes,
            names,
            dtype=arguments.dtype,
            workdir=arguments.workdir,
        )
        print(compiled.table(counted))
        return 0
    content = bench.run(
        arguments.sizes,
        names,
        dtype=arguments.dtype,
        rounds=arguments.rounds,
        draws=arguments.draws,
        workdir=arguments.workdir,
    )
    print(bench.table(content))
    print(Path(arguments.workdir) / "bench.png")
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    """``dartax plot``."""
    from dartax.experiments import plots

    for path in plots.draw(arguments.run):
        print(path)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    """``dartax report``."""
    from dartax.experiments import report

    print(report.write(arguments.run))
    return 0


def _soak(arguments: argparse.Namespace) -> int:
    """``dartax soak``."""
    from dartax.experiments import soak

    print(soak.table(soak.run(arguments.steps, arguments.workdir)))
    print(Path(arguments.workdir) / "soak.png")
    return 0


_COMMANDS = {
    "train": _train,
    "compare": _compare,
    "bench": _bench,
    "plot": _plot,
    "report": _report,
    "soak": _soak,
}


if __name__ == "__main__":
    sys.exit(main())
