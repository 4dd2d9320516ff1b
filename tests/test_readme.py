"""What the README and the guide for contributors name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", README))))
def test_promises_are_held_by_tests(name):
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    assert f"def {name}(" in tests


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("config", sorted(set(re.findall(r"configs/[\w/]+\.toml", README))))
def test_configurations_are_there(config):
    assert (ROOT / config).is_file()


@pytest.mark.parametrize("module", sorted(set(re.findall(r"\w+\.py\b", CONTRIBUTING))))
def test_modules_are_where_contributors_look(module):
    assert list(ROOT.glob(f"dartax/**/{module}")) or list(ROOT.glob(f"tests/{module}"))
