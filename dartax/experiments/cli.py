"""The command ``dartax``: runs a subcommand, and turns errors into messages and exit statuses."""

import os
import shlex
import signal
import sys

from dartax._version import __version__
from dartax.experiments import files


def main(argv: list[str] | None = None) -> int:
    """Runs one of the subcommands in :mod:`dartax.experiments.commands`.

    Returns:
      The exit status: 0 on success, 1 if the machine failed (a full disk, a lost process), 2 if
      the user made a mistake, 130 after Ctrl-C, and 143 after SIGTERM.

    Raises:
      SystemExit: After ``--help`` (status 0), or if the arguments cannot be parsed (status 2).
    """
    # Nothing is shown in a window, whatever the environment or a notebook says, and matplotlib
    # refuses to be imported with a backend that it does not know.
    os.environ["MPLBACKEND"] = "agg"
    with files.unfailing_streams():
        return _run(sys.argv[1:] if argv is None else argv)


def _run(words: list[str]) -> int:
    command = shlex.join(["dartax", *words])
    if words == ["--version"]:
        print(f"dartax {__version__}")
        return 0
    try:
        from dartax.experiments import commands, config, data, devices, signals

        with signals.interrupt_on_sigterm():
            commands.run(words)
        return 0
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
            f"{error or type(error).__name__}; fix that, and the same command resumes the run: "
            f"{command}",
            file=sys.stderr,
        )
        status = 1
    devices.exit_alone(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
