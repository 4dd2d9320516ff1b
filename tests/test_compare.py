import dataclasses
import json
import math
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax._fused import _sample
from dartax.experiments import ablations, cli, compare, compare_plots, optimizers, scores
from dartax.experiments.compare import CompareConfig, EntrantConfig
from dartax.experiments.config import ConfigError, OptimizerConfig
from dartax.experiments.tasks import TaskConfig

CONFIGS = Path(__file__).parent.parent / "configs" / "compare"


@pytest.fixture
def small(tmp_path):
    """Two tasks that need no data folder, and one optimizer of most roles."""
    friedman = TaskConfig("friedman", steps=20, batch_size=16, layers=(8,))
    return CompareConfig(
        workdir=str(tmp_path / "results"),
        seeds=2,
        evaluations=4,
        group=3,
        tasks={"friedman": friedman, "narrow": dataclasses.replace(friedman, layers=(4,))},
        optimizers={
            "dart": EntrantConfig(role="dart", tasks=("friedman",)),
            "adamw": EntrantConfig(
                "adamw", role="tuned", sweep="learning_rate", values=(1e-9, 1e-2)
            ),
            "momo": EntrantConfig("momo_adam", learning_rate=0.01, tasks=("friedman",)),
            "first rate": EntrantConfig(
                role="basin", sweep="init_rate", values=(1e-8, 1e-3), tasks=("friedman",)
            ),
        },
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of the small comparison, run once."""
    config = small.__wrapped__(tmp_path_factory.mktemp("finished"))
    compare.run(config, progress=False)
    return Path(config.workdir)


@pytest.fixture
def done(small, finished):
    """The small comparison with its results in a folder of its own."""
    shutil.copytree(finished, small.workdir)
    return small


@pytest.fixture
def ran(monkeypatch):
    """The cells that are run from here on."""
    ran, run_cell = [], compare.run_cell

    def recorded(config, task, name, progress):
        ran.append((task, name))
        return run_cell(config, task, name, progress)

    monkeypatch.setattr(compare, "run_cell", recorded)
    return ran


def strip(cell):
    """A cell without what differs between equal runs."""
    return {k: v for k, v in cell.items() if k not in ("seconds_per_run", "compile_seconds")}


def test_a_comparison_is_scored_and_drawn(done):
    results = compare.run(done, progress=False)
    assert {task: sorted(cells) for task, cells in results.items()} == {
        "friedman": ["adamw", "dart", "first rate", "momo"],
        "narrow": ["adamw"],
    }
    cell = results["friedman"]["adamw"]
    assert np.shape(cell["test_loss"]) == (2, 2, 4)  # values, seeds, evaluations
    assert cell["versions"]["jax"] == jax.__version__
    assert cell["device"]
    assert len(results["friedman"]["dart"]["rates"]["Dense_0/kernel"]) == 4
    # Seeds are different runs, a useless rate is a different run, and the best one counts.
    assert len(np.unique(scores.losses(cell)[..., -1])) == 4
    scored = scores.score(done, results)
    assert scored["cells"]["friedman"]["adamw"]["value"] == 1e-2
    assert scored["cells"]["friedman"]["adamw"]["ratio"] == pytest.approx(1.0)
    assert scored["best_peer"]["tasks"]["friedman"]["optimizer"] == "momo"
    # The target reaches its own loss at its last step, by definition.
    assert scored["cells"]["friedman"]["adamw"]["steps"] == pytest.approx(20, rel=1e-3)
    assert scored["cells"]["friedman"]["first rate"]["spread"] == pytest.approx(0.0)
    table = scores.table(done, scored)
    assert all(name in table for name in [*done.tasks, *done.optimizers])
    paths = compare_plots.draw(done, results, scored)
    assert [path.name for path in paths] == [
        "loss_curves.png", "profiles.png", "initial_rate.png", "learned_rates.png",
    ]  # fmt: skip
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_finished_cells_are_kept_and_changed_ones_run_again(done, ran):
    first = compare.run(done, progress=False)
    assert ran == []
    momo = dataclasses.replace(done.optimizers["momo"], learning_rate=0.02)
    # A cell does not depend on the other entrants, nor on its role.
    dart = dataclasses.replace(done.optimizers["dart"], role="peer")
    changed = dataclasses.replace(
        done, optimizers={"dart": dart, "momo": momo, "adamw": done.optimizers["adamw"]}
    )
    second = compare.run(changed, progress=False)
    assert ran == [("friedman", "momo")]
    assert second["friedman"]["dart"] == first["friedman"]["dart"]
    assert second["friedman"]["momo"]["test_loss"] != first["friedman"]["momo"]["test_loss"]


def test_the_same_cell_run_again_gives_the_same_numbers(done, ran):
    first = compare.run(done, progress=False)
    again = compare.run(done, redo=["dart"], progress=False)
    assert ran == [("friedman", "dart")]
    assert strip(again["friedman"]["dart"]) == strip(first["friedman"]["dart"])


def test_an_interrupt_leaves_the_finished_cells(small, ran, monkeypatch):
    def stops(config, task, name, progress):
        if name == "adamw":
            return {"specification": compare.specification(config, task, name)}
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_cell", stops)
    with pytest.raises(KeyboardInterrupt):
        compare.run(small, progress=False)
    assert [*json.loads((Path(small.workdir) / "friedman.json").read_text())] == ["adamw"]


def test_a_run_does_not_depend_on_those_it_is_vmapped_with(done):
    together = compare.run(done, progress=False)["narrow"]["adamw"]["test_loss"]
    alone = dataclasses.replace(
        done,
        group=1,
        workdir=done.workdir + "_alone",
        tasks={"narrow": done.tasks["narrow"]},
        optimizers={"adamw": done.optimizers["adamw"]},
    )
    apart = compare.run(alone, progress=False)["narrow"]["adamw"]["test_loss"]
    np.testing.assert_allclose(together, apart, rtol=1e-3)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_comparisons_load_and_build(path):
    config = compare.load(path)
    for entrant in config.optimizers.values():
        overrides = {entrant.sweep: entrant.values[0]} if entrant.sweep else {}
        optimizer = optimizers.build(entrant, steps=10, overrides=overrides)
        params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        state = jax.eval_shape(optimizer.init, params)
        updates, _ = jax.eval_shape(optimizer.update, params, state, params, value=jnp.ones([]))
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seeds": 0}, "seeds must be an int of at least 1, got 0"),
        ({"evaluations": 3}, "tasks.friedman.steps must be a multiple of the 3 evaluations, got 20; pass 21"),
        ({"tasks": {}}, r"tasks must hold at least one, got none; add \[tasks.NAME\]"),
        ({"target": "adam"}, "target must be one of the optimizers, got 'adam'; did you mean 'adamw'"),
        ({"optimizers": {"adamw": EntrantConfig("adamw", tasks=("digit",))}}, "optimizers.adamw.tasks must name tasks of the comparison, got 'digit'"),
    ],
)  # fmt: skip
def test_bad_comparisons_are_refused(small, changes, match):
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(small, **changes)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"sweep": "learning_rate"}, "sweep and values must be given together"),
        ({"role": "tuned"}, "values must hold at least 2 numbers under role 'tuned'"),
        ({"warmup": 1.0}, r"optimizer.warmup must be a part of the run in \[0, 1\), got 1.0"),
    ],
)
def test_bad_entrants_are_refused(arguments, match):
    with pytest.raises(ConfigError, match=match):
        EntrantConfig("adamw", **arguments)


def test_a_bad_option_shows_before_the_first_run(small):
    entrants = {**small.optimizers, "bad": EntrantConfig("dart", options={"init_rat": 1.0})}
    with pytest.raises(
        ConfigError, match="init_rat is not an option of dart; did you mean 'init_rate'"
    ):
        compare.run(dataclasses.replace(small, optimizers=entrants), progress=False)
    assert not list(Path(small.workdir).glob("*.json"))


def test_the_command_chooses_tasks_and_optimizers(capsys):
    config = compare.load(CONFIGS / "quick.toml", tasks=["digits"], optimizers=["dart"], seeds=2)
    assert list(config.tasks) == ["digits"]
    assert sorted(config.optimizers) == ["adamw", "dart"]
    assert cli.main(["compare", str(CONFIGS / "quick.toml"), "--tasks", "digit"]) == 2
    assert "got 'digit'; did you mean 'digits'" in capsys.readouterr().err


def test_a_bad_redo_or_folder_is_refused(small, tmp_path):
    with pytest.raises(
        ConfigError,
        match="redo must name optimizers of the comparison, got 'dar'; did you mean 'dart'",
    ):
        compare.run(small, redo=["dar"], progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match="workdir must be a writable folder, got .*file/a' .*; pass another"
    ):
        compare.run(
            dataclasses.replace(small, workdir=str(tmp_path / "file" / "a")), progress=False
        )


def test_damaged_results_are_refused(small):
    Path(small.workdir).mkdir()
    (Path(small.workdir) / "friedman.json").write_text("{")
    with pytest.raises(ConfigError, match="workdir must hold results as this command writes them"):
        compare.run(small, progress=False)


def test_steps_to_a_target():
    assert scores.steps_to(np.array([4.0, 2.0, 1.0]), 2.0) == 2
    assert scores.steps_to(np.array([4.0, 2.0, 1.0]), math.sqrt(2)) == pytest.approx(2.5)
    assert scores.steps_to(np.array([1.0, 2.0]), 1.5) == 1
    assert scores.steps_to(np.array([4.0, np.inf]), 1.0) == np.inf


def test_width_of_a_basin():
    assert scores.width([1e-3, 1e-2, 1e-1], [1.02, 1.0, 1.04]) == pytest.approx(0.5 + 0.25)
    assert scores.width([1e-3, 1e-2], [1.0, 1.0]) == pytest.approx(1.0)  # to the ends
    assert scores.width([1e-3, 1e-2], [1.0, np.inf]) == pytest.approx(0.0)


def test_profile_of_hand_made_steps():
    steps = np.array([[10.0, 30.0], [20.0, 10.0], [np.inf, np.inf]])
    taus = np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(
        scores.profile(steps, taus), [[0.5, 0.5, 1.0], [0.5, 1.0, 1.0], [0.0, 0.0, 0.0]]
    )
    # A task that nobody solves counts against all.
    np.testing.assert_allclose(scores.profile(np.array([[np.inf]]), taus), [[0.0, 0.0, 0.0]])


def test_diverged_runs_are_counted(small):
    def cell(*finals):
        return {
            "test_loss": [[[1.0, 0.5, 0.5, final] for final in finals]],
            "seconds_per_run": 1.0,
            "specification": {"task": {}},
        }

    found = {
        "adamw": {**cell(0.5, 0.5), "test_loss": cell(0.5, 0.5)["test_loss"] * 2},
        "momo": cell(0.4, None),
        "dart": cell(0.4, 0.6),
    }
    scored = scores.score(small, {"friedman": found})
    assert scored["cells"]["friedman"]["momo"]["diverged"] == 1
    assert scored["cells"]["friedman"]["momo"]["ratio"] == np.inf
    assert scored["cells"]["friedman"]["dart"]["diverged"] == 0
    assert scored["cells"]["friedman"]["dart"]["ratio"] == pytest.approx(1.0)
    assert scored["cells"]["friedman"]["dart"]["standard_error"] == pytest.approx(0.1)

    # Infinite from the first evaluation on is no better.
    found["momo"]["test_loss"][0][0] = 4 * [None]
    scored = scores.score(small, {"friedman": found})
    assert scored["cells"]["friedman"]["momo"]["diverged"] == 2


def test_an_average_is_evaluated_and_changes_nothing_else(small):
    plain = small.optimizers["dart"]
    entrants = {"plain": plain, "mean": dataclasses.replace(plain, average=True)}
    config = dataclasses.replace(small, optimizers={**small.optimizers, **entrants})
    plain, mean = (compare.run_cell(config, "friedman", name, lambda _: None) for name in entrants)
    assert mean["train_loss"] == plain["train_loss"]
    # While the loss falls fast, an average lags behind.
    assert np.all(np.array(mean["test_loss"])[..., :2] > np.array(plain["test_loss"])[..., :2])
    assert "average" not in plain["specification"]["optimizer"]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up(schedule):
    config = OptimizerConfig("adamw", schedule=schedule, learning_rate=2.0, warmup=0.1)
    rate = optimizers.schedule(config, steps=100)
    values = np.array([rate(jnp.asarray(i)) for i in range(100)])
    assert 0 < values[0] < values[5] < values[9] < 2.0  # no update is lost to a rate of zero
    assert values[10] == pytest.approx(2.0)
    if schedule != "constant":
        assert np.all(np.diff(values[10:]) < 0)


def test_schedule_free_is_tested_where_its_authors_say():
    config = OptimizerConfig("schedule_free_adamw", schedule="constant", learning_rate=0.1)
    optimizer = optimizers.build(config, steps=10)
    params = {"w": jnp.ones(3)}
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(params, state, params)
        params = optax.apply_updates(params, updates)
    tested = optimizers.eval_params(config, state, params)
    assert not np.allclose(tested["w"], params["w"])


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", sorted(ablations.FACTORY))
def test_ablations_change_what_they_say(name, monkeypatch):
    """On a flat, a steep and a noisy direction, under a decay, beside dart itself.

    The steep direction becomes a thousand times as steep on the way.
    """

    def concentrations(factory):
        optimizer = factory(optax.linear_schedule(1.0, 0.0, 100), init_rate=1e-2, key=3)
        flat = jnp.linspace(0.5, 1.5, 6).reshape(3, 2)
        params = {"flat": flat, "noisy": jnp.full((8, 8), 1e-3), "steep": jnp.ones((2, 2))}

        def loss(params, step):
            curvature = jnp.where(step < 70, 4.0, 4e3)
            noise = jax.random.normal(jax.random.key(step), params["noisy"].shape)
            noisy = jnp.sum(noise * params["noisy"])
            flat, steep = (jnp.sum(params[name] ** 2) for name in ("flat", "steep"))
            return 0.1 * flat + noisy + curvature * steep

        def step(carry, count):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, count), state, params)
            return (optax.apply_updates(params, updates), state), state[0].concentration

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(100))[1]

    found, dart = concentrations(ablations.FACTORY[name]), concentrations(dartax.dart)
    if name == "dart_whole_memory":
        # These tensors are small. Later on, roundings grow.
        np.testing.assert_allclose(found[:10], dart[:10], rtol=1e-3)
        monkeypatch.setattr(_sample, "MIN_SAMPLE", 0.25)
        dart = concentrations(dartax.dart)
    assert np.all(np.isfinite(found))
    if name == "dart_frozen":
        np.testing.assert_array_equal(found, np.broadcast_to(found[:1], found.shape))
    elif name == "dart_one_rate":
        assert found.shape == (100, 2)  # one block and the slack
    elif name == "dart_no_slack":
        assert found.shape == (100, 3)
        assert np.ptp(found[-1]) > 1
    else:
        # The first draw is the same; what is learned from it is not.
        np.testing.assert_array_equal(found[0], dart[0])
        assert np.any(np.abs(found / dart - 1) > 0.01)
