"""The agents of the comparison: their environments, their estimates, and that they learn."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tasks import tiny

from dartax.experiments import compare, control_tasks, scores, tasks
from dartax.experiments.compare import CompareConfig, EntrantConfig
from dartax.experiments.config import ConfigError
from dartax.experiments.control_tasks import CARTPOLE, PENDULUM

SMALL = {
    "ppo_cartpole": {"layers": (16,), "batch_size": 64, "steps": 160},
    "ppo_pendulum": {"layers": (16,), "batch_size": 64, "steps": 160},
    "dqn_cartpole": {"layers": (16,), "batch_size": 32, "steps": 320},
}


def gymnasium_cartpole(state, action):
    """A step of CartPole-v1, as Gymnasium writes it."""
    x, x_dot, theta, theta_dot = (float(value) for value in state)
    force = 10.0 if action == 1 else -10.0
    costheta, sintheta = math.cos(theta), math.sin(theta)
    temp = (force + 0.05 * theta_dot**2 * sintheta) / 1.1
    thetaacc = (9.8 * sintheta - costheta * temp) / (0.5 * (4.0 / 3.0 - 0.1 * costheta**2 / 1.1))
    xacc = temp - 0.05 * thetaacc * costheta / 1.1
    x, x_dot = x + 0.02 * x_dot, x_dot + 0.02 * xacc
    theta, theta_dot = theta + 0.02 * theta_dot, theta_dot + 0.02 * thetaacc
    limit = 12 * 2 * math.pi / 360
    return (x, x_dot, theta, theta_dot), 1.0, abs(x) > 2.4 or abs(theta) > limit


def gymnasium_pendulum(state, action):
    """A step of Pendulum-v1, as Gymnasium writes it."""
    th, thdot = (float(value) for value in state)
    g, m, l, dt = 10.0, 1.0, 1.0, 0.05
    u = np.clip(action, -2.0, 2.0)
    costs = ((th + np.pi) % (2 * np.pi) - np.pi) ** 2 + 0.1 * thdot**2 + 0.001 * u**2
    newthdot = thdot + (3 * g / (2 * l) * np.sin(th) + 3.0 / (m * l**2) * u) * dt
    newthdot = np.clip(newthdot, -8.0, 8.0)
    return (th + newthdot * dt, newthdot), -costs, False


@pytest.mark.parametrize(
    ("environment", "reference", "scale", "actions"),
    [
        (CARTPOLE, gymnasium_cartpole, (2.4, 2.0, 0.21, 2.0), (0, 1)),
        (PENDULUM, gymnasium_pendulum, (7.0, 8.0), (-3.0, -0.4, 1.7)),
    ],
)
def test_a_step_is_that_of_gymnasium(environment, reference, scale, actions):
    states = np.random.default_rng(0).uniform(-1, 1, (50, len(scale))) * scale
    ends = []
    for state in states:
        for action in actions:
            expected, reward, terminal = reference(state, action)
            found = environment.step(jnp.asarray(state, jnp.float32), jnp.asarray(action))
            np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)
            assert found[1] == pytest.approx(reward, rel=1e-4)
            assert bool(found[2]) == terminal
            ends.append(terminal)
    assert any(ends) == (environment is CARTPOLE)


def test_a_step_of_cartpole_by_hand():
    """Upright and at rest: 10 N on 1.1 kg, and the pole falls against the push."""
    state, reward, terminal = CARTPOLE.step(jnp.zeros(4), jnp.asarray(1))
    push = 10 / 1.1
    angular = -push / (0.5 * (4 / 3 - 0.1 / 1.1))
    expected = [0, 0.02 * (push - 0.05 * angular / 1.1), 0, 0.02 * angular]
    np.testing.assert_allclose(state, expected, rtol=1e-5)
    assert (reward, terminal) == (1, False)


def test_starts_and_observations():
    keys = jax.random.split(jax.random.key(0), 2000)
    carts, pendulums = (np.asarray(jax.vmap(e.start)(keys)) for e in (CARTPOLE, PENDULUM))
    assert np.abs(carts).max(0) == pytest.approx(0.05, rel=0.01)
    assert np.abs(pendulums).max(0) == pytest.approx((np.pi, 1), rel=0.01)
    np.testing.assert_allclose(
        PENDULUM.observe(jnp.array([0.3, -2.0])), [math.cos(0.3), math.sin(0.3), -2.0], rtol=1e-6
    )


def test_episodes_end_at_their_limit_or_when_the_pole_falls():
    def advance(state, time, environment=CARTPOLE):
        episode = control_tasks.Episode(jnp.asarray(state), jnp.asarray(time))
        action = jnp.asarray(1) if environment is CARTPOLE else jnp.asarray(0.5)
        return control_tasks.advance(environment, episode, action, jax.random.key(7))

    upright, fallen = jnp.zeros(4), jnp.array([0.0, 0.0, 0.3, 1.0])
    following, made = advance(upright, 498)
    assert (following.time, made.terminal, made.ended) == (499, False, False)
    np.testing.assert_array_equal(following.state, made.after)
    following, made = advance(upright, 499)
    assert (following.time, made.terminal, made.ended) == (0, False, True)
    np.testing.assert_array_equal(following.state, CARTPOLE.start(jax.random.key(7)))
    np.testing.assert_allclose(made.after, gymnasium_cartpole(upright, 1)[0], rtol=1e-5)
    following, made = advance(fallen, 20)
    assert (following.time, made.terminal, made.ended, made.reward) == (0, True, True, 1)
    following, made = advance(jnp.zeros(2), 199, PENDULUM)
    assert (following.time, made.terminal, made.ended) == (0, False, True)


def test_returns_are_those_of_episodes_one_by_one():
    returns = []
    for key in jax.random.split(jax.random.key(0), control_tasks.TEST_EPISODES):
        state, terminal, total = np.asarray(CARTPOLE.start(key)), False, 0.0
        while not terminal and total < 500:
            state, reward, terminal = gymnasium_cartpole(state, int(state[2] + state[3] > 0))
            total += reward
        returns.append(total)
    assert len(set(returns)) > 1
    found = control_tasks.mean_return(CARTPOLE, lambda seen: (seen[:, 2] + seen[:, 3] > 0) * 1)
    assert found == pytest.approx(np.mean(returns), rel=0.02)
    # A pendulum that nothing moves costs between 0 and 16.3 in each of the 200 steps.
    assert -200 * 16.3 < control_tasks.mean_return(PENDULUM, lambda seen: 0 * seen[:, 0]) < -500


def test_advantages():
    """Against the sum over later errors, for each step, until the end of its episode."""
    rng = np.random.default_rng(0)
    shape = (30, 3)
    rewards, values, after = rng.normal(size=(3, *shape))
    terminal = rng.random(shape) < 0.1
    ended = terminal | (rng.random(shape) < 0.1)
    assert (ended & ~terminal).any()
    expected = np.zeros(shape)
    for column in range(shape[1]):
        for first in range(shape[0]):
            weight = 1.0
            for t in range(first, shape[0]):
                bootstrap = 0.0 if terminal[t, column] else 0.9 * after[t, column]
                error = rewards[t, column] + bootstrap - values[t, column]
                expected[first, column] += weight * error
                weight *= 0.9 * 0.8
                if ended[t, column]:
                    break
    found = control_tasks.advantages(
        *(jnp.asarray(array) for array in (rewards, values, after, terminal, ended)), 0.9, 0.8
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def first_batches(problem, seed=0, **settings):
    """A task, its first parameters, and what it collects at first."""
    task = tasks.build(tiny(problem, **{**SMALL[problem], **settings}))
    params = task.init(jax.random.key(seed))
    keys = jax.tree.map(lambda x: x[: task.world.period], task.batches(jax.random.key(seed)))
    state, batches = task.world.collect(
        params, task.data, task.world.start(jax.random.key(seed)), keys
    )
    return task, params, state, batches


@pytest.mark.one_in(2)
@pytest.mark.parametrize("problem", ["ppo_cartpole", "ppo_pendulum"])
def test_ppo_goes_through_a_rollout_in_minibatches(problem):
    task, params, _, batches = first_batches(problem)
    seen, _, logs, gains, targets = (np.asarray(leaf) for leaf in batches)
    size = control_tasks.ROLLOUT * control_tasks.ENVIRONMENTS
    assert seen.shape[:2] == (task.world.period, 64) == (5 * size // 64, 64)
    epochs = seen.reshape(5, size, -1)
    for epoch in epochs[1:]:
        assert (epoch != epochs[0]).any()
        np.testing.assert_array_equal(np.sort(epoch, axis=0), np.sort(epochs[0], axis=0))
    # At first the ratio is 1, so that the surrogate is the mean of normalized advantages, 0.
    loss = task.train_loss(params, task.data, jax.tree.map(lambda leaf: leaf[0], batches))
    values = targets[0] - gains[0]
    entropy = math.log(2) if problem == "ppo_cartpole" else 0.5 * math.log(2 * math.pi * math.e)
    expected = 0.5 * np.mean((values - targets[0]) ** 2) - 0.01 * entropy
    assert loss == pytest.approx(expected, abs=2e-4)
    if problem == "ppo_cartpole":
        np.testing.assert_allclose(logs, -math.log(2), atol=0.05)


def test_ppo_clips():
    """Beyond the clip the policy has no gradient where it gains, but where it loses."""
    task, params, _, batches = first_batches("ppo_cartpole")
    seen, actions, logs, _, targets = jax.tree.map(lambda leaf: leaf[0], batches)
    gains = jnp.where(jnp.arange(64) % 2 == 0, 1.0, -1.0)

    def slope(ratio):
        batch = (seen, actions, logs - jnp.log(ratio), gains, targets)
        grads = jax.grad(task.train_loss)(params, task.data, batch)["actor"]["Dense_1"]["bias"]
        return np.asarray(grads)

    one = jnp.where(gains > 0, 1.5, 0.5)
    other = jnp.where(gains > 0, 0.5, 1.5)
    assert np.abs(slope(one)).max() < 1e-3 < np.abs(slope(other)).max()


def test_dqn_learns_from_what_it_keeps():
    _, params, state, batches = first_batches("dqn_cartpole")
    made = control_tasks.ACTING * control_tasks.ENVIRONMENTS
    seen, actions, targets = (np.asarray(leaf) for leaf in batches)
    assert seen.shape == (control_tasks.UPDATES, 32, 4)
    memory = jax.tree.map(np.asarray, state.memory)
    assert memory.reward[:made].all()
    assert not memory.reward[made:].any()

    def values(x):
        hidden = np.maximum(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], 0)
        return hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]

    for i in range(32):
        at = np.flatnonzero((memory.seen == seen[0, i]).all(1))[0]
        after = 0 if memory.terminal[at] else float(values(memory.after[at]).max())
        assert targets[0, i] == pytest.approx(0.1 + 0.99 * after, rel=1e-4)
        assert actions[0, i] == memory.action[at]
    # Everything is random at first.
    assert 0.35 < memory.action[:made].mean() < 0.65


def test_dqn_forgets_the_oldest(monkeypatch):
    made = control_tasks.ACTING * control_tasks.ENVIRONMENTS
    monkeypatch.setattr(control_tasks, "CAPACITY", 2 * made)
    task, params, state, _ = first_batches("dqn_cartpole")
    period, keys = task.world.period, task.batches(jax.random.key(0))
    before = np.asarray(state.memory.seen)
    for number in (1, 2):
        part = jax.tree.map(lambda x, n=number: x[n * period : (n + 1) * period], keys)
        state, _ = task.world.collect(params, task.data, state, part)
    after = np.asarray(state.memory.seen)
    assert after.any(1).all()
    assert (before[:made] != after[:made]).any(1).all()


def compared(problem, rate=1e-2, **settings):
    return CompareConfig(
        seeds=2,
        evaluations=2,
        group=4,
        tasks={"task": tiny(problem, **{**SMALL[problem], **settings})},
        optimizers={
            "adamw": EntrantConfig(
                "adamw", role="tuned", sweep="learning_rate", values=(1e-5, rate)
            ),
            "dart": EntrantConfig("dart", role="dart"),
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "settings"),
    [
        ("ppo_cartpole", {"steps": 480}),
        pytest.param("ppo_pendulum", {"steps": 1600}, marks=pytest.mark.slow),
        pytest.param(
            "dqn_cartpole",
            {"steps": 3200, "rate": 3e-3, "layers": (64, 64)},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_agent_learns(problem, settings):
    """Under a good rate the returns are above those under one that hardly changes anything."""
    config = compared(problem, **settings)
    cell = compare.run_cell(config, "task", "adamw", lambda _: None)
    (slow, fast) = np.array(cell["test_loss"])[..., -1].mean(-1)
    assert fast < 0.85 * slow
    assert np.isfinite(cell["train_loss"]).all()


def test_returns_are_in_a_table():
    config = compared("ppo_cartpole")
    common = {"specification": {"task": {}}, "seconds_per_run": 1.0, "ceiling": 550.0}
    cells = {
        "adamw": {"test_loss": [[[540, 500], [530, 510]], [[400, 50], [300, 60]]], **common},
        "dart": {"test_loss": [[[500, 150], [500, 250]]], **common},
    }
    scored = scores.score(config, {"task": cells})
    assert scored["cells"]["task"]["dart"]["return"] == 350
    lines = [line.split() for line in scores.table(config, scored).splitlines()]
    assert ["adamw", "495.0", "±", "5.0"] in lines
    assert ["dart", "350.0", "±", "50.0"] in lines


@pytest.mark.parametrize("problem", SMALL)
def test_a_network_that_is_not_finite_has_no_return(problem):
    task = tasks.build(tiny(problem, **SMALL[problem]))
    params = task.init(jax.random.key(0))
    assert np.isfinite(task.test_loss(params, task.data))
    leaves, tree = jax.tree.flatten(params)
    broken = jax.tree.unflatten(tree, [leaves[0] + jnp.nan, *leaves[1:]])
    assert np.isnan(task.test_loss(broken, task.data))


@pytest.mark.parametrize(
    ("problem", "settings", "match"),
    [
        ("ppo_cartpole", {"batch_size": 100}, "batch_size must divide the 1024 steps of a rollout"),
        ("ppo_pendulum", {"steps": 90}, "steps must be a multiple of the 80 .* got 90; pass 160"),
        ("dqn_cartpole", {"steps": 33}, "steps must be a multiple of the 32 .* got 33; pass 64"),
    ],
)
def test_bad_sizes(problem, settings, match):
    with pytest.raises(ConfigError, match=match):
        tasks.build(tiny(problem, **{**SMALL[problem], **settings}))


def test_evaluations_come_between_rollouts():
    config = compared("ppo_cartpole", steps=240)
    with pytest.raises(ConfigError, match=r"multiple of 80, .* got 120; pass e.g. steps = 320"):
        compare.run_cell(config, "task", "adamw", lambda _: None)


def test_the_shipped_comparison_is_what_it_says():
    config = compare.load(Path(__file__).parent.parent / "configs/compare/control.toml")
    assert len(config.tasks) == 6
    for task in config.tasks.values():
        assert task.steps // config.evaluations % tasks.build(task).world.period == 0
        assert dataclasses.replace(task) == task
    robust = compare.load(Path(__file__).parent.parent / "configs/compare/robust.toml")
    assert {*config.optimizers} < {*robust.optimizers}
