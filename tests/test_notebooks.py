"""The notebooks run from top to bottom, are committed without outputs, and leave Colab's JAX alone."""

import json
import runpy
import shlex
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TOOL = runpy.run_path(str(ROOT / ".ci" / "notebooks"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_these_are_the_notebooks():
    names = [
        "choosing_inner",
        "dirichlet_rates",
        "fine_tuning",
        "flax",
        "quickstart",
        "reading_a_run",
        "switch_from_adamw",
    ]
    assert [path.stem for path in NOTEBOOKS] == names


# These train dozens of networks, or draw millions of numbers.
LONG = ("choosing_inner", "dirichlet_rates", "fine_tuning", "reading_a_run", "switch_from_adamw")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in LONG))
        for path in NOTEBOOKS
    ],
)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("DARTAX_NOTEBOOK_STEPS", "24")  # at reduced size
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a command may have set it
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    # A call that ends in a figure shows it.
    pictures = [output for output in found if "image/png" in output.get("data", {})]
    expected = {
        "choosing_inner": 2,
        "dirichlet_rates": 6,
        "fine_tuning": 2,
        "flax": 0,
        "quickstart": 2,
        "reading_a_run": 7,
        "switch_from_adamw": 3,
    }
    assert len(pictures) == expected[path.stem]
    # Warnings go there.
    assert not [output.text for output in found if output.get("name") == "stderr"]


@each_notebook
def test_notebook_is_as_the_tool_leaves_it(path):
    content = path.read_text(encoding="utf-8")
    assert content == TOOL["clean"](content), "run .ci/notebooks"


def test_the_tool_takes_outputs_out_and_sets_links():
    cell = {
        "cell_type": "code",
        "source": ["%pip install git+https://github.com/someone/dartax\n", "1 + 1"],
        "outputs": [{"output_type": "stream", "name": "stdout", "text": ["2"]}],
        "execution_count": 3,
        "metadata": {"scrolled": True},
    }
    badge = {
        "cell_type": "markdown",
        "source": ["(https://colab.research.google.com/github/someone/dartax/blob/main/a.ipynb)"],
        "metadata": {},
    }
    content = json.dumps({"cells": [cell, badge], "metadata": {"kernelspec": {"name": "mine"}}})
    code, markdown = json.loads(TOOL["clean"](content))["cells"]
    assert (code["outputs"], code["execution_count"], code["metadata"]) == ([], None, {})
    assert code["source"] == [f"%pip install git+{TOOL['REPOSITORY']}\n", "1 + 1"]
    where = TOOL["REPOSITORY"].removeprefix("https://")
    colab = where.replace("github.com", "https://colab.research.google.com/github")
    assert markdown["source"] == [f"({colab}/blob/main/a.ipynb)"]


@each_notebook
def test_notebook_has_a_badge_and_an_install_cell_that_leaves_jax_alone(path):
    cells = nbformat.read(path, as_version=4).cells
    colab = TOOL["REPOSITORY"].replace("https://github.com", "github")
    link = f"https://colab.research.google.com/{colab}/blob/main/notebooks/{path.name}"
    assert link in cells[0].source
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    installing = [
        line for source in code for line in source.splitlines() if "pip" in line.split("#")[0]
    ]
    assert installing == [line for line in code[0].splitlines() if "%pip" in line]
    (line,) = installing
    assert shlex.split(line) == [
        "%pip",
        "install",
        "--quiet",
        "--no-deps",
        f"git+{TOOL['REPOSITORY']}",
    ]
    assert '"google.colab" in sys.modules' in code[0]
