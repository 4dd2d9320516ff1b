import html.parser
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from dartax.experiments import cli, config, plots, report
from dartax.experiments.config import Config, OptimizerConfig
from dartax.experiments.run_folder import write_json

EVIL = "<script>alert('&')</script>"
CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)


def make_run(folder, blocks=(EVIL, "Dense_0/kernel", "Dense_1/kernel"), steps=6):
    """A run folder as a run leaves it, but for the checkpoints."""
    folder.mkdir(parents=True)
    share = np.geomspace(1e-5, 1e-2, steps)
    columns = {
        "step": 10 * np.arange(1, steps + 1),
        "train_loss": np.linspace(2.0, 0.5, steps),
        "test_loss": np.linspace(2.2, 0.7, steps),
        "test_accuracy": np.linspace(0.1, 0.9, steps),
    }
    if blocks:
        columns |= {
            "concentration_total": 10 / share,
            "spent": len(blocks) * share,
            "multiplier": np.ones(steps),
            "min_rate": np.zeros(steps),
            "rate_budget": np.ones(steps),
        }
    for i, block in enumerate(blocks):
        columns |= {
            f"rate/{block}": share * (i + 1) / 2,
            f"expected_rate/{block}": share,
            f"rate_std/{block}": 0.3 * share,
            f"concentration/{block}": np.full(steps, 10.0),
        }
    lines = [
        ",".join(columns),
        *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True)),
    ]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    if blocks:
        table = "\n".join(["block  health", *(f"{block}  growing" for block in blocks)])
        (folder / "rates.txt").write_text(table + "\n", encoding="utf-8")
    name = "dart" if blocks else "adamw"
    config.save(Config(optimizer=OptimizerConfig(name=name)), folder / "config.toml")
    summary = {
        "test_loss": 0.7,
        "test_accuracy": 0.9,
        "train_loss": 0.5,
        "epochs": 6,
        "steps": 60,
        "wall_s": 3.0,
    }
    write_json(folder / "summary.json", {**summary, "versions": {"jax": EVIL}, "mesh": [1, 1]})
    return folder


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "losses",
    [
        (["nan"], ["nan"]),
        (["2.0", "inf"], ["", "nan"]),
        (["2.0"], [""]),
        (["nan", "nan"], ["inf", "2.3"]),
    ],
)
def test_a_page_on_runs_that_have_just_begun_or_diverged(losses, tmp_path):
    run = make_run(tmp_path / "run", blocks=(), steps=len(losses[0]))
    (run / "summary.json").unlink()
    rows = [f"{10 * i},{a},{b}," for i, (a, b) in enumerate(zip(*losses, strict=True), 1)]
    header = "step,train_loss,test_loss,test_accuracy"
    (run / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
    assert cli.main(["report", str(run)]) == 0
    assert cli.main(["plot", str(run)]) == 0
    text = Page(run / "report.html").text
    assert f"Not finished: {10 * len(rows)} steps so far." in text


class Page(html.parser.HTMLParser):
    """The tags of a page, its text, and the tags that were never closed."""

    VOID = ("meta", "img", "source")

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The report of a run whose names are no friends of HTML."""
    folder = make_run(tmp_path_factory.mktemp("runs") / EVIL.split("/")[0])
    assert cli.main(["report", str(folder)]) == 0
    return folder / "report.html"


def test_the_page_holds_everything(made):
    page = Page(made)
    assert page.open == []
    # Every picture, for light and for dark paper, and in words.
    images, sources = page.all("img"), page.all("source")
    assert len(images) == len(sources) == len(report.CAPTIONS) == 7
    embedded = [image["src"] for image in images] + [source["srcset"] for source in sources]
    assert all(picture.startswith("data:image/png;base64,iVBOR") for picture in embedded)
    assert len(set(embedded)) == 14
    assert len({image["alt"] for image in images}) == 7
    assert (
        "Loss: the training loss goes from 2 to 0.5, the test loss goes from 2.2 to 0.7."
        in images[0]["alt"]
    )
    assert "Dense_1/kernel 0.01" in images[1]["alt"]
    for heading, _ in report.CAPTIONS.values():
        assert heading in page.text
    # The table, the configuration and the result.
    assert "Dense_0/kernel  growing" in page.text
    assert 'dataset = "digits"' in page.text
    assert "Test loss 0.7000, test accuracy 90.00 % after 6 epochs (60 steps, 3 s)." in page.text


def test_the_page_refers_to_nothing_outside(made):
    page = Page(made)
    addresses = [
        value
        for _, attrs in page.tags
        for name, value in attrs.items()
        if name in ("src", "srcset", "href", "action", "data", "poster", "background")
    ]
    assert len(addresses) == 14
    assert all(address.startswith("data:") for address in addresses)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {
        tag for tag, _ in page.tags
    }
    style = report.TEMPLATE.read_text()
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    outside = [part for part in made.read_text().split('"') if "//" in part]
    assert all(part.startswith("data:") for part in outside)


def test_what_users_name_is_text(made):
    page = Page(made)
    assert "script" not in {tag for tag, _ in page.tags}
    assert f"{EVIL}  growing" in page.text
    assert f"jax {EVIL}" in page.text
    assert f"{EVIL} 0.01" in page.all("img")[1]["alt"]
    assert made.parent.name in page.text
    assert "<script" not in made.read_text()


def test_a_run_without_rates_and_one_that_goes_on():
    folder = make_run(Path("plain"), blocks=())
    page = Page(report.write(folder))
    assert len(page.all("img")) == 1
    assert "Learned rates at the end" not in page.text
    (folder / "summary.json").write_text("{")
    page = Page(report.write(folder))
    assert "Not finished: 60 steps so far." in page.text
    assert "Summary" not in page.text


def test_many_blocks_are_told_in_part():
    folder = make_run(Path("many"), [f"layer_{i:03}/kernel" for i in range(30)])
    words = report._in_words("heatmap", plots.read_columns(folder))
    assert words.startswith(
        "mean rate of 30 blocks at step 60, the three highest and lowest of them: "
    )
    assert words.count("/kernel") == 6


def test_no_run(capsys):
    assert cli.main(["report", "nowhere"]) == 2
    assert "RUN must be a run folder with a metrics.csv" in capsys.readouterr().err
    folder = make_run(Path("run"), blocks=())
    (folder / "report.html.part").mkdir()
    assert cli.main(["report", "run"]) == 2
    assert "RUN must be a writable folder, got 'run'" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH to render the page")
@pytest.mark.parametrize(("dark", "width"), [(False, 1200), (True, 500)])
def test_a_browser_shows_the_page(dark, width, made, tmp_path):
    shot = tmp_path / "shot.png"
    arguments = [
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},6000",
        f"--screenshot={shot}",
        # 0 is dark for the first, and 1 light.
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    subprocess.run(
        [CHROMIUM, *arguments, made.as_uri()], check=True, capture_output=True, timeout=120
    )
    pixels = (255 * matplotlib.image.imread(shot)[..., :3]).round().astype(int)
    assert pixels.shape[1] == width
    paper = [13, 17, 23] if dark else [255, 255, 255]
    assert pixels[2, 2].tolist() == paper
    # The areas of the last picture have the colors that no text has.
    for color in ([0, 114, 178], [213, 94, 0], [0, 158, 115]):
        assert np.sum(np.all(abs(pixels - color) <= 1, axis=-1)) > 1000
    # Nothing is wider than the window: the margin at the right is empty.
    assert np.all(pixels[:, -8:] == paper)
