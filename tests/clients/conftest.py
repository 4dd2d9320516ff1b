"""Programs of other libraries with dart in the place of Adam: .ci/matrix clients runs them.

Every test reports the numbers that it compares. They are printed as a table at the end, and written
to the JSON file that DARTAX_CLIENTS_TABLE names.
"""

import importlib.metadata
import json
import os
from pathlib import Path

# As users run, but for Eigen's threads: a scanned PPO sometimes hangs in them, with Adam as well.
# The backend reads this when it starts, which is later than the first import of jax.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"

import jax
import optax
import pytest

import dartax

LIMIT = 600  # seconds a test may take; a hang inside XLA ends with the stacks of all threads
NAMES = ("adam", "dart", "decayed")
ROWS = []


def pytest_configure(config):
    # Other libraries warn as they please. dartax may not.
    config.addinivalue_line("filterwarnings", "default")
    config.addinivalue_line("filterwarnings", "error:::dartax")


def pytest_collection_modifyitems(items):
    for item in items:
        if "clients" in item.path.parts:
            item.add_marker(pytest.mark.timeout(LIMIT, method="thread"))


@pytest.fixture(autouse=True)
def _as_other_libraries_expect():
    """Rank promotion is theirs to use, and x64 is on only where a test asks for it."""
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_enable_x64", False)  # NetKet turns it on when it is imported


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)


@pytest.fixture
def compare(record_property):
    """Runs a program with Adam, with dart, and with dart under a decay, and reports the results."""

    def compare(library, task, program, *, rate, steps, better, dart=dartax.dart):
        numbers = {
            "adam": float(program(optax.adam(rate))),
            "dart": float(program(dart())),
        }
        if steps is not None:
            decay = optax.linear_schedule(1.0, 0.0, steps)
            numbers["decayed"] = float(program(dart(decay)))
        row = {"library": library, "version": importlib.metadata.version(library)}
        record_property("client", row | {"task": task, "better": better, "rate": rate} | numbers)
        return tuple(numbers.get(name) for name in NAMES)

    return compare


def pytest_runtest_logreport(report):
    if report.when == "call":
        ROWS.extend(value for name, value in report.user_properties if name == "client")


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    ROWS.sort(key=lambda row: (row["library"].lower(), row["task"]))
    terminalreporter.section("clients")
    terminalreporter.write_line(table(ROWS))
    if path := os.environ.get("DARTAX_CLIENTS_TABLE"):
        Path(path).write_text(json.dumps(ROWS, indent=1) + "\n")


def table(rows):
    """The rows in Markdown, the best number of each in bold, ties too."""
    lines = [
        "| library | task | better | Adam (rate) | `dart()` | `dart(decay)` |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        reached = {name: row[name] for name in NAMES if name in row}
        best = (min if row["better"] == "lower" else max)(reached.values())
        cells = {name: f"{number:.4g}" for name, number in reached.items()}
        cells |= {name: f"**{cells[name]}**" for name in reached if cells[name] == f"{best:.4g}"}
        cells["adam"] += f" ({row['rate']:g})"
        lines.append(
            f"| {row['library']} {row['version']} | {row['task']} | {row['better']} "
            f"| {' | '.join(cells.get(name, '') for name in NAMES)} |"
        )
    return "\n".join(lines)
