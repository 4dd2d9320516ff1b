"""What the README and the pages that it leads to name is there."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        *sorted(ROOT.glob("configs/**/README.md")),
        *sorted(ROOT.glob("tests/**/README.md")),
        *sorted(ROOT.glob(".github/*.md")),
    )
}
TEXT = "\n".join(PAGES.values())
CONTRIBUTING = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", TEXT))))
def test_promises_are_held_by_tests(name):
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    assert f"def {name}(" in tests


@pytest.mark.parametrize("config", sorted(set(re.findall(r"configs/[\w/]+\.toml", TEXT))))
def test_configurations_are_there(config):
    assert (ROOT / config).is_file()


@pytest.mark.parametrize("module", sorted(set(re.findall(r"\w+\.py\b", CONTRIBUTING))))
def test_modules_are_where_contributors_look(module):
    assert list(ROOT.glob(f"dartax/**/{module}")) or list(ROOT.glob(f"tests/{module}"))


def test_the_address_of_the_repository_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = set(re.findall(r"https://github\.com/[\w.-]+/dartax\b", TEXT))
    assert found == {project["urls"]["Source"]}
