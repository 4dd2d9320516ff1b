import io
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pandas as pd
import pytest
import scipy.stats
from matplotlib.figure import Figure

import dartax
from dartax import plot
from dartax._history import load
from dartax.plot._laws import _allocations, _cumulative
from dartax.plot._theme import MANY, spread_out

FUNCTIONS = [getattr(plot, name) for name in plot.__all__]
NAMES = [
    "attention/query/kernel",
    "attention/out/kernel",
    "mlp/up/kernel",
    "mlp/down/kernel",
    "norm/scale",
]


@pytest.fixture(scope="module")
def rows():
    """Metrics of each of 12 updates, as a training loop logs them."""
    params = {"flat": jnp.ones(3), "noisy": jnp.ones(3), "steep": jnp.ones(3)}
    curvature = {"flat": 0.1, "noisy": 1.0, "steep": 8.0}
    optimizer = dartax.dart(0.5, min_rate=1e-6, init_rate=1e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.multiply, curvature, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, dartax.metrics(state, params)

    logged = []
    for _ in range(12):
        params, state, metrics = step(params, state)
        logged.append(metrics)
    return logged


def of_many(num, steps=8):
    """Columns of ``num`` blocks whose rates grow to decades apart, under a decay to zero."""
    rng = np.random.default_rng(0)
    goal = rng.uniform(-5.0, -2.0, num) - np.log10(num)
    share = 10 ** (-6 + (goal + 6) * np.linspace(0, 1, steps)[:, None])
    decay = np.linspace(1, 0, steps)
    columns = {
        "step": 10.0 * np.arange(1, steps + 1),
        "multiplier": decay,
        "min_rate": np.zeros(steps),
        "rate_budget": np.ones(steps),
        "spent": share.sum(1),
        "concentration_total": 10 / share.min(1),
        "loss": np.array(["other things"] * steps),
    }
    for i in range(num):
        path = f"decoder/layer_{i // 5:02}/{NAMES[i % 5]}"
        columns |= {
            f"rate/{path}": decay * share[:, i] * rng.uniform(0.5, 1.5, steps),
            f"expected_rate/{path}": decay * share[:, i],
            f"rate_std/{path}": 0.3 * decay * share[:, i],
            f"concentration/{path}": 10 * share[:, i] / share.min(1),
        }
    return columns


def png(figure):
    file = io.BytesIO()
    figure.savefig(file, dpi=50)
    return file.getvalue()


def texts(figure):
    """Every text that is drawn, with its box in pixels."""
    figure.draw_without_rendering()
    found = figure.findobj(
        lambda artist: isinstance(artist, matplotlib.text.Text) and artist.get_text()
    )
    # Without the arrow of an annotation.
    extent = matplotlib.text.Text.get_window_extent
    return [(text.get_text(), extent(text)) for text in found if text.get_visible()]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("draw", FUNCTIONS)
@pytest.mark.parametrize("num", [3, 200])
def test_every_picture_of_few_and_of_many(draw, num):
    figure = draw(of_many(num))
    assert isinstance(figure, Figure)
    # Nothing is cut off.
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    assert min(box.x0, box.y0) > -0.02
    assert box.x1 < width + 0.02
    assert box.y1 < height + 0.02
    assert max(figure.get_size_inches()) < 13


@pytest.mark.parametrize("draw", [plot.learning_rates, plot.concentrations])
def test_names_beside_lines_do_not_overlap(draw):
    columns = of_many(MANY)
    figure = draw(columns)
    names = load(columns).names(32)
    boxes = [box for text, box in texts(figure) if text in names]
    assert len(boxes) == MANY
    tops = sorted((box.y0, box.y1) for box in boxes)
    for (_, top), (bottom, _) in itertools.pairwise(tops):
        assert top <= bottom + 1


@pytest.mark.parametrize("draw", [plot.learning_rates, plot.heatmap, plot.budget])
def test_a_picture_does_not_depend_on_the_style_of_the_user(draw, rows):
    plain, dark = png(draw(rows)), png(draw(rows, dark=True))
    assert plain != dark
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context(
        {
            "axes.facecolor": "red",
            "xtick.color": "red",
            "ytick.color": "red",
            "axes.prop_cycle": "cycler('color', ['r'])",
            "lines.linewidth": 9,
        }
    ):
        assert png(draw(rows)) == plain
        assert png(draw(rows, dark=True)) == dark
    assert dict(matplotlib.rcParams) == before


def corner(figure):
    pixels = matplotlib.image.imread(io.BytesIO(png(figure)))
    return pixels[0, 0, :3].max()


def test_dark_is_dark(rows):
    assert corner(plot.budget(rows)) == 1.0
    assert corner(plot.budget(rows, dark=True)) < 0.1


def as_columns(rows):
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def test_a_log_may_have_many_forms(rows, tmp_path):
    columns = as_columns(rows)
    short = {name.removeprefix("dart/"): values for name, values in columns.items()}
    pd.DataFrame(short).to_csv(tmp_path / "metrics.csv", index=False)
    pd.DataFrame(columns).to_csv(tmp_path / "of_a_logger.csv", index=False)
    with_other_rows = [{"loss": 1.0}, *({"loss": "high", **row} for row in rows), {"dart/step": 99}]
    forms = [
        columns,
        short,
        pd.DataFrame(columns),
        str(tmp_path),
        tmp_path,
        tmp_path / "metrics.csv",
        str(tmp_path / "of_a_logger.csv"),
        with_other_rows,
        iter(rows),
    ]
    expected = load(rows)
    np.testing.assert_array_equal(expected.step, np.arange(1, 13))
    assert expected.names(20) == ["flat", "noisy", "steep"]
    for form in forms:
        history = load(form)
        assert history.paths == expected.paths
        for name, values in expected.columns.items():
            np.testing.assert_allclose(history[name], values, rtol=1e-6)
    assert png(plot.learning_rates(columns)) == png(plot.learning_rates(rows))


def test_lines_are_the_recorded_values(rows):
    figure = plot.learning_rates(rows, blocks=["steep", "flat"])
    lines = [line.get_ydata() for line in figure.axes[0].lines]
    for line, name in zip(lines, ["steep", "flat"], strict=True):
        np.testing.assert_array_equal(line, [row[f"dart/expected_rate/{name}"] for row in rows])


def test_leaves_of_a_block_are_drawn_once():
    columns = of_many(3)
    first = f"decoder/layer_00/{NAMES[0]}"
    for name in ("rate", "expected_rate", "rate_std", "concentration"):
        columns[f"{name}/decoder/layer_07/kernel"] = columns[f"{name}/{first}"]
    history = load(columns)
    assert history.paths[0] == (first, "decoder/layer_07/kernel")
    assert len(history.paths) == 3
    assert len(history.select(["decoder/layer_07/kernel", first]).paths) == 1
    # Before the first draw nothing tells who shares.
    unborn = {
        name: 0 * values if name.startswith("rate/") else values for name, values in columns.items()
    }
    assert len(load(unborn).paths) == 4


def test_several_darts():
    params = {"a": jnp.ones(3), "b": jnp.ones(2), "c": jnp.ones(2), "d": jnp.ones(2)}
    labels = {"a": "x", "b": "y", "c": "y", "d": "y"}
    state = optax.partition({"x": dartax.dart(), "y": dartax.paper_dart()}, labels).init(params)
    history = load([dartax.metrics(state, params)])
    assert history.labels == ("x", "y", "y", "y")
    np.testing.assert_allclose(history["concentration_total"], [[1e5, 3.0, 3.0, 3.0]], rtol=1e-5)
    for draw in FUNCTIONS:
        # One step, too, makes a picture.
        png(draw([dartax.metrics(state, params)]))
    assert "spent [x]" in [text for text, _ in texts(plot.budget([dartax.metrics(state, params)]))]


@pytest.mark.parametrize("low", [0.0, 1e-3])
@pytest.mark.parametrize(("a", "b"), [(10.0, 1e7), (0.1, 0.4), (40.0, 3.0), (1e5, 1e6)])
def test_ridges_are_beta_laws(a, b, low):
    log_rate, mass = _cumulative(a, a + b, low, 0.5)
    share = scipy.stats.beta(a, b)
    for part in (0.05, 0.5, 0.95):
        rate = low + (0.5 - low) * share.ppf(part)
        found = np.exp(np.interp(part, mass, log_rate))
        # Within a hundredth of the spread.
        spread = low + (0.5 - low) * share.ppf(min(part + 0.02, 0.999)) - rate
        assert abs(found - rate) <= spread + 1e-9


def test_simplex_is_the_dirichlet_of_three():
    concentration = np.array([2.0, 5.0, 0.5])
    points, density = _allocations(concentration, 4000)
    law = scipy.stats.dirichlet(concentration)
    np.testing.assert_allclose(points.sum(1), 1.0, rtol=1e-12)
    deviation = np.sqrt(law.var() / 4000)
    assert np.all(np.abs(points.mean(0) - law.mean()) < 5 * deviation)
    inner = points[(points > 1e-12).all(1)]
    exact = [law.logpdf(point) for point in inner]
    assert np.all(np.diff(exact) > -1e-6)
    assert (density[0], density[-1]) == (0.0, 1.0)
    tiny, _ = _allocations(np.array([1e6, 10.0, 10.0]), 10)
    assert np.isfinite(tiny).all()


def test_chosen_steps(rows):
    titles = [ax.get_title(loc="center") for ax in plot.simplex(rows, steps=[2, 11.4]).axes]
    assert titles == ["step 2", "step 11"]
    assert {"2", "11"} <= {text for text, _ in texts(plot.ridges(rows, steps=[2, 11]))}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("draw", FUNCTIONS)
def test_names_are_no_formulas(draw):
    odd = {NAMES[0]: "_w$x$", NAMES[1]: "$\\q$ of ümläut", NAMES[2]: "{}^_"}
    columns = {}
    for name, values in of_many(3).items():
        *_, path = name.split("layer_00/")
        columns[name.replace(f"decoder/layer_00/{path}", odd.get(path, ""))] = values
    figure = draw(columns)
    shown = " ".join(text for text, _ in texts(figure))
    for name in odd.values():
        assert name.replace("$", r"\$") in shown


def test_names_lose_what_all_begin_with():
    history = load(of_many(20))
    assert history.names(40)[5] == "layer_01/attention/query/kernel"
    assert history.names(12)[5] == "layer…kernel"
    assert load(of_many(1)).names(60) == [f"decoder/layer_00/{NAMES[0]}"]


def test_places_keep_their_order_and_distance():
    wanted = np.array([0.5, 0.5, 0.99, 1.0, 0.51, 0.0])
    places = spread_out(wanted, 0.05)
    assert np.all(np.diff(np.sort(places)) >= 0.05 - 1e-12)
    assert places.max() <= 1.0
    assert list(np.argsort(places, kind="stable")) == list(np.argsort(wanted, kind="stable"))


def test_dartax_does_not_import_matplotlib():
    program = "import sys, dartax; assert 'matplotlib' not in sys.modules; import dartax.plot"
    subprocess.run([sys.executable, "-c", program], check=True)
    without = "import sys; sys.modules['matplotlib'] = None; import dartax; import dartax.plot"
    result = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True)
    assert "dartax.plot needs the package matplotlib; pip install 'dartax[plot]'." in result.stderr


def without(columns, word):
    return {name: values for name, values in columns.items() if word not in name}


GOOD = of_many(4)
OF_TWO = {
    f"{label}/{name}/{leaf}": [1.0]
    for label, leaf in (("x", "a"), ("x", "b"), ("y", "c"))
    for name in ("expected_rate", "concentration")
}
BAD = [
    (lambda: plot.heatmap(3), TypeError, "metrics must be a sequence of dicts, .* got int; record"),
    (lambda: plot.heatmap([1.0, 2.0]), TypeError, "metrics must be a sequence of dicts, .* got list; record"),
    (lambda: plot.heatmap([]), ValueError, "metrics must hold expected_rate/PATH of every leaf, got nothing"),
    (lambda: plot.heatmap([{"dart/step": 1}]), ValueError, "metrics must hold expected_rate/PATH of every leaf, got step"),
    (lambda: plot.heatmap("nowhere"), ValueError, "metrics must be a CSV file with a header .* or a folder with a metrics.csv, got 'nowhere'; pass"),
    (lambda: plot.heatmap({**GOOD, "spent": np.ones(3)}), ValueError, "metrics must have columns of one length, got the shapes"),
    (lambda: plot.heatmap({"expected_rate/a": [np.nan]}), ValueError, "metrics must hold at least one row with rates"),
    (lambda: plot.learning_rates(without(GOOD, "rate_std")), ValueError, "metrics must hold rate_std/PATH of every leaf, got .*; record"),
    (lambda: plot.ridges(without(GOOD, "total")), ValueError, "metrics must hold concentration_total, got .*; record"),
    (lambda: plot.ridges(GOOD, steps=[1e6]), ValueError, "steps must be between .* 10 and 80, got 1000000"),
    (lambda: plot.ridges(GOOD, steps=[]), ValueError, "steps must be between .* 10 and 80, got none"),
    (lambda: plot.heatmap(GOOD, blocks=["decoder"]), ValueError, "blocks must name recorded leaves, got 'decoder'; did you mean 'decoder/layer"),
    (lambda: plot.heatmap(GOOD, blocks=[]), ValueError, "blocks must name recorded leaves, got none"),
    (lambda: plot.heatmap(GOOD, blocks="decoder"), TypeError, "blocks must be a sequence of names, got 'decoder'; pass a list"),
    (lambda: plot.heatmap(GOOD, blocks=3), TypeError, "blocks must be a sequence of names, got 3; pass a list"),
    (lambda: plot.heatmap(GOOD, blocks=[3]), ValueError, "blocks must name recorded leaves, got 3; did you mean"),
    (lambda: plot.ridges(GOOD, steps=1), TypeError, "steps must be a sequence of numbers, got 1; pass a list"),
    (lambda: plot.ridges(GOOD, steps="a"), TypeError, "steps must be a sequence of numbers, got 'a'; pass a list"),
    (lambda: plot.heatmap([{"dart/expected_rate/a": "x"}]), TypeError, "metrics must hold numbers, got 'x' for expected_rate/a"),
    (lambda: plot.heatmap([{1: 2.0}]), ValueError, "metrics must hold expected_rate/PATH of every leaf, got nothing"),
    (lambda: plot.simplex(of_many(2)), ValueError, "blocks must name leaves of three blocks, got 2; pass three"),
    (lambda: plot.simplex(OF_TWO, blocks=["a", "b", "c"]), ValueError, "blocks must name leaves of one DART, got the labels 'x', 'x', 'y'; pass"),
    (lambda: plot.simplex(GOOD, draws=0), ValueError, "draws must be at least 1, got 0; 1500 is usual"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_gets_one_sentence(call, kind, message):
    with pytest.raises(kind, match=message) as caught:
        call()
    text = str(caught.value)
    assert text.endswith((".", "?"))
    assert "\n" not in text


def test_a_notebook_shows_a_picture_without_a_magic():
    assert plot.learning_rates(of_many(2))._repr_png_().startswith(b"\x89PNG")
