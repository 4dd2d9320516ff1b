"""The checker of links finds what leads nowhere, and formulas become MathML."""

import ast
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKS = runpy.run_path(str(ROOT / ".ci" / "links"))


def test_links_of_the_pages_in_the_repository_lead_somewhere():
    assert LINKS["broken_in_markdown"](ROOT) == []


@pytest.mark.parametrize(
    ("link", "broken"),
    [
        ("other.md", False),
        ("other.md#a-part-of-it", False),
        ("#here", False),
        ("https://arxiv.org/abs/1805.08498", False),
        ("other.md#elsewhere", True),
        ("#elsewhere", True),
        ("missing.md", True),
        ("../outside.md", True),
        ("https:/arxiv.org", True),
    ],
)
def test_links_of_markdown(tmp_path, link, broken):
    (tmp_path / "outside.md").write_text("")
    root = tmp_path / "repository"
    root.mkdir()
    (root / "other.md").write_text("# Other\n\n## A `part` of it\n")
    text = f"# Here\n\n[text]({link}) and `[code](missing.md)`\n\n```\n[code](missing.md)\n```\n"
    (root / "README.md").write_text(text)
    assert LINKS["broken_in_markdown"](root) == ([("README.md", link)] if broken else [])


@pytest.mark.parametrize(
    ("element", "broken"),
    [
        ('<a href="other.html">', None),
        ('<a href="other.html#there">', None),
        ('<a href="#here">', None),
        ('<a href="https://arxiv.org/abs/1805.08498">', None),
        ('<img src="data:image/png;base64,AA==">', None),
        ('<a href="missing.html">', "missing.html"),
        ('<a href="other.html#nowhere">', "other.html#nowhere"),
        ('<a href="#nowhere">', "#nowhere"),
        ('<a href="https://">', "https://"),
        ('<img src="missing.png">', "missing.png"),
        ('<p id="here">', "id=here (repeated)"),
        # Nothing is loaded from another host.
        ('<script src="https://example.org/a.js"></script>', "https://example.org/a.js"),
        ('<img src="https://example.org/a.png">', "https://example.org/a.png"),
        ("<style>@import 'https://example.org/a.css'</style>", "https://example.org/a.css"),
    ],
)
def test_links_of_a_site(tmp_path, element, broken):
    (tmp_path / "other.html").write_text('<p id="there">')
    (tmp_path / "index.html").write_text(f'<p id="here">{element}')
    expected = [("index.html", broken)] if broken else []
    assert LINKS["broken_in_site"](tmp_path) == expected


def test_a_site_without_pages_is_no_site(tmp_path):
    assert LINKS["broken_in_site"](tmp_path) == [(str(tmp_path.resolve()), "no page")]


def test_the_site_has_every_notebook():
    program = ast.parse((ROOT / ".ci" / "site").read_text(encoding="utf-8"))
    (guides,) = (
        ast.literal_eval(node.value)
        for node in program.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "GUIDES"
    )
    assert sorted(guides) == sorted(path.stem for path in ROOT.glob("notebooks/*.ipynb"))


def test_formulas_become_mathml():
    for package in ("latex2mathml", "nbconvert", "pdoc"):
        pytest.importorskip(package)
    with_mathml = runpy.run_path(str(ROOT / ".ci" / "site"))["with_mathml"]
    page = with_mathml("<p>$a &lt; b$ is no <code>$HOME</code>, 5 $ or 6 $</p><pre>$x$</pre>$$y$$")
    assert page.count("<math") == 2
    assert "<mo>&#x0003C;</mo>" in page
    assert "<code>$HOME</code>, 5 $ or 6 $</p><pre>$x$</pre><math xmlns" in page
    assert 'display="block"' in page
    with pytest.raises(ValueError, match=r"has \\nothing, which latex2mathml does not know"):
        with_mathml(r"$\nothing{x}$")
