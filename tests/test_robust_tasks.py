"""The tasks of the robust comparison, and what it adds to a task: noise, fewer data, schedules."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_tasks import folder, small_files, tiny  # noqa: F401  (fixtures)

from dartax.experiments import compare, robust_tasks, scores, tasks
from dartax.experiments.compare import CompareConfig, EntrantConfig
from dartax.experiments.config import ConfigError

SMALL = {
    "variational": {},
    "gaussian_process": {},
    "moving_target": {"layers": (3, 2), "drift": 0.1},
    "vae": {"layers": (8, 2)},
    "embeddings": {"width": 4},
    "fine_tuning": {"layers": (8,)},
}


@pytest.fixture(autouse=True)
def short_pretraining(monkeypatch):
    monkeypatch.setattr(robust_tasks, "PRETRAINING_STEPS", 5)


def one_batch(task, seed=0):
    return jax.tree.map(lambda leaf: leaf[0], task.batches(jax.random.key(seed)))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("problem", SMALL)
def test_each_trains_under_vmap_and_scan(problem, small_files):  # noqa: F811
    task = tasks.build(tiny(problem, **SMALL[problem]))
    optimizer = optax.adam(1e-2)

    @jax.jit
    @jax.vmap
    def run(key):
        init_key, batch_key = jax.random.split(key)
        params = task.init(init_key)
        first = jax.tree.map(lambda leaf: leaf[0], task.batches(batch_key))

        def step(carry, _):
            params, state = carry
            loss, grads = task.value_and_grad(params, task.data, first)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        (last, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), length=40)
        return losses, task.test_loss(last, task.data) if task.test_loss else losses[-1]

    losses, test_loss = run(jax.random.split(jax.random.key(0), 2))
    assert np.isfinite(losses).all()
    assert np.isfinite(test_loss).all()
    assert (losses[:, -1] < losses[:, 0]).all()


def test_the_evidence_lower_bound_of_a_gaussian_posterior():
    """Without examples that say anything the best factorized Gaussian is the prior."""
    task = tasks.build(tiny("variational"))
    x, y = task.data
    size = x.shape[1] + 1
    prior = {"mean": jnp.zeros(size), "log_std": jnp.zeros(size)}
    nothing = (jnp.zeros_like(x), jnp.full_like(y, 0.5))
    # A logit of N(0, 1), from the bias alone, has the cross-entropy E log(1 + e^z) of 0.8061.
    assert task.test_loss(prior, nothing) == pytest.approx(0.806, abs=0.03)


def test_the_marginal_likelihood_of_a_gaussian_process():
    task = tasks.build(tiny("gaussian_process", batch_size=5))
    params = {"scale": jnp.log(0.7), "variance": jnp.log(2.0), "noise": jnp.log(0.3)}
    x, y = (np.asarray(column, float) for column in task.data)
    covariance = 2.0 * np.exp(-((x[:, None] - x) ** 2) / (2 * 0.7**2)) + 0.30001 * np.eye(5)
    expected = y @ np.linalg.solve(covariance, y) / 2 + np.linalg.slogdet(covariance)[1] / 2
    expected = expected / 5 + np.log(2 * np.pi) / 2
    assert task.test_loss(params, task.data) == pytest.approx(expected, rel=1e-3)


def test_adapters_begin_at_the_network_that_they_adapt(small_files):  # noqa: F811
    whole = tasks.build(tiny("fine_tuning", layers=(8,)))
    adapted = tasks.build(tiny("fine_tuning", layers=(8,), rank=2))
    params = adapted.init(jax.random.key(3))
    assert {leaf.shape for leaf in jax.tree.leaves(params)} == {(784, 2), (2, 8), (8, 2), (2, 10)}
    np.testing.assert_allclose(
        adapted.test_loss(params, adapted.data),
        whole.test_loss(whole.init(jax.random.key(0)), whole.data),
        rtol=1e-5,
    )
    assert set(np.unique(whole.data["train"][1])) == {5, 6, 7, 8, 9}


def test_few_rows_of_an_embedding_have_gradients(small_files):  # noqa: F811
    task = tasks.build(tiny("embeddings", width=4, batch_size=1))
    params = jax.tree.map(jnp.ones_like, task.init(jax.random.key(0)))
    _, grads = task.value_and_grad(params, task.data, one_batch(task))
    assert np.sum(np.any(grads["word"] != 0, axis=1)) == 1
    assert 1 <= np.sum(np.any(grads["context"] != 0, axis=1)) <= 1 + robust_tasks.NEGATIVES


@pytest.mark.slow
def test_private_gradients_are_clipped_one_by_one_and_noisy():
    task = tasks.build(tiny("digits", batch_size=16))
    params = jax.tree.map(lambda p: 0.3 * p, task.init(jax.random.key(0)))
    index, key = one_batch(task)
    total = jax.tree.map(jnp.zeros_like, params)
    norms = []
    gradient = jax.jit(jax.grad(task.train_loss))
    for i in index:
        grads = gradient(params, task.data, (i[None], key))
        norms.append(float(optax.tree.norm(grads)))
        total = jax.tree.map(lambda t, g: t + g / max(norms[-1], 1.0), total, grads)
    assert min(norms) < 1 < max(norms)
    loss, exact = robust_tasks.private(task.train_loss, 0.0)(params, task.data, (index, key))
    assert loss == pytest.approx(float(task.train_loss(params, task.data, (index, key))), rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 16, atol=1e-6), exact, total)
    _, noisy = robust_tasks.private(task.train_loss, 0.5)(params, task.data, (index, key))
    noise = np.concatenate(
        jax.tree.leaves(jax.tree.map(lambda a, b: np.ravel(a - b), noisy, exact))
    )
    assert noise.std() == pytest.approx(0.5 / 16, rel=0.1)


def test_fewer_examples_and_wrong_labels():
    clean = tasks.build(tiny("digits"))
    noisy = tasks.build(tiny("digits", examples=1000, label_noise=0.5))
    x, y = noisy.data["train"]
    np.testing.assert_array_equal(x, clean.data["train"][0][:1000])
    # A tenth of the random labels are right.
    assert np.mean(y != clean.data["train"][1][:1000]) == pytest.approx(0.45, abs=0.05)
    np.testing.assert_array_equal(noisy.data["test"][1], clean.data["test"][1])


def compared(task, schedules=(), **options):
    return CompareConfig(
        seeds=2,
        evaluations=3,
        group=2,
        schedules=schedules,
        tasks={"task": task},
        optimizers={
            "adamw": EntrantConfig(
                "adamw", role="tuned", sweep="learning_rate", values=(1e-3, 1e-2)
            ),
            "free": EntrantConfig("schedule_free_adamw", schedule="constant", learning_rate=1e-2),
            **options,
        },
    )


def test_a_task_under_each_schedule():
    config = compare.under_each_schedule(compared(tiny("digits"), ("linear", "constant")))
    assert {name: task.schedule for name, task in config.tasks.items()} == {
        "task_linear": "linear",
        "task_constant": "constant",
    }
    parts = dict(compare.by_schedule(config))
    assert {schedule: [*part.tasks] for schedule, part in parts.items()} == {
        "linear": ["task_linear"],
        "constant": ["task_constant"],
    }
    cells = {
        (task, name): compare.run_cell(config, task, name, lambda _: None)["test_loss"]
        for task, name in compare.cells(config)
    }
    assert cells["task_linear", "adamw"] != cells["task_constant", "adamw"]
    assert cells["task_linear", "free"] == cells["task_constant", "free"]


@pytest.mark.one_in(3)
def test_accumulation_updates_once_in_so_many_batches():
    config = compared(tiny("digits", steps=12, accumulate=4))
    cell = compare.run_cell(config, "task", "adamw", lambda _: None)
    # One update at each of the three evaluations.
    assert all(len(set(run)) == 3 for value in cell["test_loss"] for run in value)
    twice = compare.run_cell(
        compared(tiny("digits", steps=12, accumulate=12)), "task", "adamw", lambda _: None
    )
    assert all(run[0] == run[1] != run[2] for value in twice["test_loss"] for run in value)
    assert np.isfinite(compare.run_cell(config, "task", "free", lambda _: None)["test_loss"]).all()


def test_optimizers_can_be_judged_by_their_errors():
    config = compared(tiny("digits", steps=30, judge="error"))
    cells = {
        name: compare.run_cell(config, "task", name, lambda _: None) for name in config.optimizers
    }
    scored = scores.score(config, {"task": cells})["cells"]["task"]
    for name, cell in cells.items():
        index = scores.counted(config, name, cell)
        errors = np.array(cell["test_error"])[index, :, -1]
        assert scored[name]["mean"] == pytest.approx(errors.mean())
        assert 0 < errors.mean() < 1


def test_the_loss_along_the_way_of_a_moving_target():
    config = compared(tiny("moving_target", layers=(3,), drift=0.1))
    cell = compare.run_cell(config, "task", "adamw", lambda _: None)
    assert cell["test_loss"] == cell["train_loss"]


def test_older_results_stay_valid():
    """Keys that are left at their defaults are not in the specification of a cell."""
    spec = compare.specification(compared(tiny("digits")), "task", "adamw")
    assert not {*compare.LATER_TASK_KEYS} & {*spec["task"]}
    spec = compare.specification(compared(tiny("digits", examples=5)), "task", "adamw")
    assert spec["task"]["examples"] == 5


@pytest.mark.parametrize(
    ("problem", "settings", "match"),
    [
        ("friedman", {"examples": 5}, "examples must be left out unless the problem is digits or"),
        ("digits", {"label_noise": 1.0}, r"label_noise must be in \[0, 1\), got 1.0; pass 0.0"),
        ("digits", {"accumulate": 4}, "accumulate must be an int that divides the 9 steps, got 4"),
        ("digits", {"rank": -1}, "rank must be a non-negative int, got -1; pass 0"),
        ("digits", {"schedule": "cosin"}, "schedule must be one of .* did you mean 'cosine'"),
        ("vae", {"layers": (8,)}, r"layers must be the width and the number of codes of vae"),
        ("vae", {"layers": (8, 2), "dtype": "bfloat16"}, "dtype must be left out unless"),
    ],
)
def test_bad_settings(problem, settings, match):
    with pytest.raises(ConfigError, match=match):
        tiny(problem, **settings)


def test_the_shipped_comparison_is_what_it_says():
    config = compare.load(Path(__file__).parent.parent / "configs/compare/robust.toml")
    assert len(config.tasks) == 34
    assert {task.schedule for task in config.tasks.values()} == {"linear", "constant"}
    for task in config.tasks.values():
        assert dataclasses.replace(task) == task
