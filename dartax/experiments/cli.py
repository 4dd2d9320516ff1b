"""The command ``dartax``."""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Runs ``dartax train`` or another of its commands; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="dartax", description="Learning rates as a learned Dirichlet distribution."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser(
        "train",
        help="train a network as a TOML file says",
        description="Trains, or resumes, the run that CONFIG describes. Any key can be "
        "overridden: dartax train CONFIG --epochs 12; dartax train CONFIG --help lists them.",
        add_help=False,
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
    bench_parser.add_argument("--workdir", default="runs/bench", help="folder of the results")
    plot_parser = commands.add_parser("plot", help="draw all pictures of a run")
    plot_parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    report_parser = commands.add_parser("report", help="make one page of a run: RUN/report.html")
    report_parser.add_argument("run", metavar="RUN", type=Path, help="run folder")
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")

    try:
        from dartax.experiments import config, data, devices, plots, report, train
    except ModuleNotFoundError as error:
        print(
            f"dartax: the command needs the package {error.name}; pip install 'dartax[train]'.",
            file=sys.stderr,
        )
        return 2
    try:
        if arguments.command == "compare":
            return _compare(arguments)
        if arguments.command == "bench":
            return _bench(arguments)
        if arguments.command == "plot":
            for path in plots.draw(arguments.run):
                print(path)
            return 0
        if arguments.command == "report":
            print(report.write(arguments.run))
            return 0
        prog = "dartax train CONFIG"
        if arguments.config is None:
            # Only to list the keys: dartax train --help.
            config.override(config.Config(), [a for a in rest if a in ("-h", "--help")], prog)
            parser.error("train needs CONFIG, a TOML file such as configs/digits.toml")
        chosen = config.override(config.load(arguments.config), rest, prog)
        where = (arguments.coordinator, arguments.processes, arguments.process_id)
        if arguments.distributed or where != (None, None, None):
            devices.join_processes(*where)
        summary = train.train_and_evaluate(chosen)
    except (config.ConfigError, data.DataError) as error:
        print(f"dartax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndartax: stopped; the same command resumes the run.", file=sys.stderr)
        return 130
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
    from dartax.experiments import bench

    content = bench.run(
        arguments.sizes,
        bench.DEFAULT if arguments.optimizers is None else arguments.optimizers,
        dtype=arguments.dtype,
        rounds=arguments.rounds,
        draws=arguments.draws,
        workdir=arguments.workdir,
    )
    print(bench.table(content))
    print(Path(arguments.workdir) / "bench.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
