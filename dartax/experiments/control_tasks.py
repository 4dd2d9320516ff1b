"""Reinforcement learning: the data of a step depend on the parameters, because the agent acts.

PPO on CartPole and on a pendulum, and DQN on CartPole. A step of the optimizer is the gradient of
one minibatch. Every ``period`` steps the agents act and give the minibatches of the steps to come.

What counts is the mean undiscounted return of test episodes, and higher is better. But a comparison
ranks by a loss, and divides it by that of a tuned optimizer. So the test loss is a cost, the
``ceiling`` of the environment minus the return. It falls as the return rises and by as much, so
means and standard errors of returns can be read from those of costs; a comparison prints both.

- CartPole: the ceiling is 550, a tenth above the best possible return, 500. A cost that can reach 0
  would make ratios between two good agents arbitrarily large; with this one, ten points of return
  below a perfect agent are a ratio of 1.2, and the worst possible ratio is 11.
- Pendulum: the ceiling is 0. The reward is the negative of a cost already, which no agent gets to
  0, because episodes begin anywhere and the torque is too weak to lift the pendulum at once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dartax.experiments.config import ConfigError
from dartax.experiments.models import MLP
from dartax.experiments.task import Task, TaskConfig, World

PyTree = Any

# Environments that an agent acts in at a time, and episodes of a test.
ENVIRONMENTS, TEST_EPISODES = 8, 32


class Environment(NamedTuple):
    """An environment as pure functions of one state.

    Attributes:
      start: Makes the state at the start of an episode from a key.
      step: Maps ``(state, action)`` to the next state, the reward and whether it is terminal.
      observe: Maps a state to what the agent sees.
      limit: Steps after which an episode ends in any case.
      actions: Number of actions; 0 if an action is a real number.
      ceiling: Return whose difference to a return is the cost.
      reward_scale: Factor of the rewards that an agent learns from.
      discount: Discount factor of the agents.
    """

    start: Callable[[jax.Array], jax.Array]
    step: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
    observe: Callable[[jax.Array], jax.Array]
    limit: int
    actions: int
    ceiling: float
    reward_scale: float
    discount: float


def _cartpole_step(state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pushes the cart to the left (0) or right (1) for 0.02 s, by Euler's method."""
    _, x_dot, theta, theta_dot = state
    gravity, cart, pole, half_length, tau = 9.8, 1.0, 0.1, 0.5, 0.02
    force = jnp.where(action == 1, 10.0, -10.0)
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    total = cart + pole
    push = (force + pole * half_length * theta_dot**2 * sin) / total
    angular = (gravity * sin - cos * push) / (half_length * (4 / 3 - pole * cos**2 / total))
    linear = push - pole * half_length * angular * cos / total
    rates = jnp.stack([x_dot, linear, theta_dot, angular])
    after = state + tau * rates
    fallen = (jnp.abs(after[0]) > 2.4) | (jnp.abs(after[2]) > 12 * 2 * np.pi / 360)
    return after, jnp.ones(()), fallen


# CartPole-v1 of Gymnasium (Barto et al., 1983; Towers et al., 2024, arXiv:2407.17032).
CARTPOLE = Environment(
    start=lambda key: jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05),
    step=_cartpole_step,
    observe=lambda state: state,
    limit=500,
    actions=2,
    ceiling=550.0,
    reward_scale=0.1,
    discount=0.99,
)


def _pendulum_step(state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Applies a torque, clipped to [-2, 2], for 0.05 s; the angle is 0 at the top."""
    theta, speed = state
    torque = jnp.clip(action, -2.0, 2.0)
    angle = (theta + np.pi) % (2 * np.pi) - np.pi
    cost = angle**2 + 0.1 * speed**2 + 0.001 * torque**2
    speed = jnp.clip(speed + 0.05 * (15 * jnp.sin(theta) + 3 * torque), -8.0, 8.0)
    return jnp.stack([theta + 0.05 * speed, speed]), -cost, jnp.zeros((), bool)


# Pendulum-v1 of Gymnasium (Towers et al., 2024, arXiv:2407.17032).
PENDULUM = Environment(
    start=lambda key: jax.random.uniform(key, (2,), minval=-1.0) * jnp.array([np.pi, 1.0]),
    step=_pendulum_step,
    observe=lambda state: jnp.stack([jnp.cos(state[0]), jnp.sin(state[0]), state[1]]),
    limit=200,
    actions=0,
    ceiling=0.0,
    reward_scale=0.1,
    discount=0.9,
)


class Episode(NamedTuple):
    """An episode under way."""

    state: jax.Array
    time: jax.Array


class Transition(NamedTuple):
    """What an agent saw, did and got. ``after`` is seen before the next episode begins."""

    seen: jax.Array
    action: jax.Array
    reward: jax.Array
    after: jax.Array
    terminal: jax.Array
    ended: jax.Array


def new_episode(environment: Environment, key: jax.Array) -> Episode:
    """Begins an episode."""
    return Episode(environment.start(key), jnp.zeros((), jnp.int32))


def advance(
    environment: Environment, episode: Episode, action: jax.Array, key: jax.Array
) -> tuple[Episode, Transition]:
    """Takes a step and, at the end of an episode, begins the next one."""
    state, reward, terminal = environment.step(episode.state, action)
    time = episode.time + 1
    ended = terminal | (time >= environment.limit)
    transition = Transition(
        environment.observe(episode.state),
        action,
        reward,
        environment.observe(state),
        terminal,
        ended,
    )
    fresh = new_episode(environment, key)
    following = jax.tree.map(lambda a, b: jnp.where(ended, a, b), fresh, Episode(state, time))
    return following, transition


def act(
    environment: Environment,
    policy: Callable[[jax.Array, jax.Array], jax.Array],
    episodes: Episode,
    key: jax.Array,
    steps: int,
) -> tuple[Episode, Transition]:
    """Acts for ``steps`` steps in several environments; ``policy`` maps observations and a key.

    Returns:
      The episodes then under way, and the transitions ``[steps, environments, ...]``.
    """

    def step(episodes, key):
        action_key, reset_key = jax.random.split(key)
        actions = policy(jax.vmap(environment.observe)(episodes.state), action_key)
        keys = jax.random.split(reset_key, len(episodes.time))
        return jax.vmap(functools.partial(advance, environment))(episodes, actions, keys)

    return jax.lax.scan(step, episodes, jax.random.split(key, steps))


def mean_return(environment: Environment, policy: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Mean undiscounted return of test episodes, whose starts are always the same."""
    keys = jax.random.split(jax.random.key(0), TEST_EPISODES)
    states = jax.vmap(environment.start)(keys)

    def step(carry, _):
        states, alive, total = carry
        actions = policy(jax.vmap(environment.observe)(states))
        states, rewards, terminal = jax.vmap(environment.step)(states, actions)
        return (states, alive & ~terminal, total + jnp.where(alive, rewards, 0.0)), None

    carry = (states, jnp.ones(TEST_EPISODES, bool), jnp.zeros(TEST_EPISODES))
    return jnp.mean(jax.lax.scan(step, carry, length=environment.limit)[0][2])


def advantages(
    rewards: jax.Array,
    values: jax.Array,
    after: jax.Array,
    terminal: jax.Array,
    ended: jax.Array,
    discount: float,
    decay: float,
) -> jax.Array:
    """Generalized advantage estimates (Schulman et al., 2016, arXiv:1506.02438), over axis 0.

    Args:
      rewards: Rewards of the steps.
      values: Values of what was seen before each step.
      after: Values of what was seen after it. They count except in terminal states, so also where
        an episode ends at its limit.
      terminal: Whether the step led to a terminal state.
      ended: Whether an episode ended there, in any way.
      discount: Discount factor.
      decay: Lambda, the weight of later steps.
    """
    errors = rewards + discount * jnp.where(terminal, 0.0, after) - values

    def step(following, now):
        error, ended = now
        total = error + discount * decay * jnp.where(ended, 0.0, following)
        return total, total

    return jax.lax.scan(step, jnp.zeros_like(errors[0]), (errors, ended), reverse=True)[1]


def _checked(params: PyTree, cost: jax.Array) -> jax.Array:
    """``cost``, or NaN if parameters are not finite: an agent may seem to act even then."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]
    return jnp.where(jnp.all(jnp.stack(finite)), cost, jnp.nan)


def _check_steps(config: TaskConfig, period: int) -> None:
    """Raises if the steps do not use up the minibatches of a whole number of rollouts."""
    if config.steps % period:
        raise ConfigError(
            f"steps must be a multiple of the {period} minibatches of a rollout, got "
            f"{config.steps}; pass {-(-config.steps // period) * period}."
        )


# ----------------------------------------------------------------------------------------- PPO

# Steps of a rollout in each environment, and passes over it.
ROLLOUT, EPOCHS = 128, 5
CLIP, LAMBDA, VALUE_WEIGHT, ENTROPY_WEIGHT = 0.2, 0.95, 0.5, 0.01


def ppo_cartpole(config: TaskConfig) -> Task:
    """PPO on CartPole."""
    return _ppo(config, CARTPOLE)


def ppo_pendulum(config: TaskConfig) -> Task:
    """PPO with a Gaussian policy on a pendulum."""
    return _ppo(config, PENDULUM)


def _ppo(config: TaskConfig, environment: Environment) -> Task:
    """Proximal policy optimization (Schulman et al., 2017, arXiv:1707.06347).

    Actor and critic are MLPs with tanh, and ``batch_size`` is that of the minibatches. Advantages
    are normalized in each minibatch. Gradients are not clipped, which is up to the optimizer.
    """
    size = ROLLOUT * ENVIRONMENTS
    if size % config.batch_size:
        raise ConfigError(
            f"batch_size must divide the {size} steps of a rollout, got {config.batch_size}; "
            "pass e.g. 128."
        )
    period = EPOCHS * (size // config.batch_size)
    _check_steps(config, period)
    actor = MLP(config.layers, environment.actions or 1, activation=nn.tanh)
    critic = MLP(config.layers, 1, activation=nn.tanh)
    seen = environment.observe(environment.start(jax.random.key(0)))[None]

    def init(key):
        actor_key, critic_key = jax.random.split(key)
        params = {
            "actor": actor.init(actor_key, seen)["params"],
            "critic": critic.init(critic_key, seen)["params"],
        }
        # All actions are about as likely at first (Andrychowicz et al., 2021, arXiv:2006.05990).
        last = params["actor"][f"Dense_{len(config.layers)}"]
        last["kernel"] = 0.01 * last["kernel"]
        if not environment.actions:
            params["log_std"] = jnp.zeros(())
        return params

    def outputs(params, seen):
        out: Any = actor.apply({"params": params["actor"]}, seen)
        return out if environment.actions else out[..., 0]

    def values(params, seen):
        out: Any = critic.apply({"params": params["critic"]}, seen)
        return out[..., 0]

    def sample(params, seen, key):
        out = outputs(params, seen)
        if environment.actions:
            return jax.random.categorical(key, out)
        return out + jnp.exp(params["log_std"]) * jax.random.normal(key, out.shape)

    def best(params, seen):
        out = outputs(params, seen)
        return jnp.argmax(out, axis=-1) if environment.actions else out

    def log_likelihood(params, seen, actions):
        """Log-likelihood of the actions, and entropy of the policy."""
        out = outputs(params, seen)
        if environment.actions:
            logs = jax.nn.log_softmax(out)
            chosen = jnp.take_along_axis(logs, actions[..., None], axis=-1)[..., 0]
            return chosen, -jnp.sum(jnp.exp(logs) * logs, axis=-1)
        log_std = params["log_std"]
        chosen = -0.5 * ((actions - out) * jnp.exp(-log_std)) ** 2
        constant = 0.5 * np.log(2 * np.pi) + log_std
        return chosen - constant, jnp.broadcast_to(0.5 + constant, out.shape)

    def collect(params, data, episodes, keys):
        del data
        act_key, order_key = jax.random.split(keys[0])
        policy = functools.partial(sample, params)
        episodes, made = act(environment, policy, episodes, act_key, ROLLOUT)
        now = values(params, made.seen)
        gains = advantages(
            environment.reward_scale * made.reward,
            now,
            values(params, made.after),
            made.terminal,
            made.ended,
            environment.discount,
            LAMBDA,
        )
        logs, _ = log_likelihood(params, made.seen, made.action)
        examples = (made.seen, made.action, logs, gains, gains + now)
        orders = jax.vmap(lambda key: jax.random.permutation(key, size))(
            jax.random.split(order_key, EPOCHS)
        ).reshape(period, config.batch_size)
        return episodes, jax.tree.map(lambda x: x.reshape(size, *x.shape[2:])[orders], examples)

    def train_loss(params, data, batch):
        del data
        seen, actions, old_logs, gains, targets = batch
        gains = (gains - jnp.mean(gains)) / (jnp.std(gains) + 1e-8)
        logs, entropy = log_likelihood(params, seen, actions)
        ratio = jnp.exp(logs - old_logs)
        clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
        surrogate = jnp.minimum(ratio * gains, clipped * gains)
        error = (values(params, seen) - targets) ** 2
        return jnp.mean(VALUE_WEIGHT * error - surrogate - ENTROPY_WEIGHT * entropy)

    def test_loss(params, data):
        del data
        return _checked(
            params,
            environment.ceiling - mean_return(environment, functools.partial(best, params)),
        )

    return Task(
        init=init,
        batches=lambda key: jax.random.split(key, config.steps),
        train_loss=train_loss,
        test_loss=test_loss,
        data=(),
        metric=f"{environment.ceiling:g} - return",
        world=World(
            start=functools.partial(_episodes, environment),
            collect=collect,
            period=period,
            ceiling=environment.ceiling,
        ),
    )


def _episodes(environment: Environment, key: jax.Array) -> Episode:
    """Begins an episode in each environment."""
    keys = jax.random.split(key, ENVIRONMENTS)
    return jax.vmap(functools.partial(new_episode, environment))(keys)


# ----------------------------------------------------------------------------------------- DQN

# Steps in each environment between two updates of the target network, and updates of the agent.
ACTING, UPDATES = 8, 32
# Transitions that are kept: the last ones.
CAPACITY = 256 * ACTING * ENVIRONMENTS
# Fraction of the steps over which the fraction of random actions falls, and its final value.
EXPLORATION, LAST_EPSILON = 0.25, 0.05


class Replay(NamedTuple):
    """The episodes under way, and the transitions to learn from."""

    episodes: Episode
    memory: Transition


def dqn_cartpole(config: TaskConfig) -> Task:
    """Deep Q-learning (Mnih et al., 2015) on CartPole, by an MLP.

    Every 32 steps the target network becomes the present one, which then acts: 8 steps in each of
    8 environments. The following steps learn from minibatches of ``batch_size`` transitions
    that are drawn from the last 16,384. Their targets depend on the target network alone, so they
    are computed at once. The loss is the squared error: the Huber loss made values diverge, because
    it lets few terminal states have little say.
    """
    environment, period = CARTPOLE, UPDATES
    _check_steps(config, period)
    model = MLP(config.layers, environment.actions)
    made_at_once = ACTING * ENVIRONMENTS
    seen = environment.observe(environment.start(jax.random.key(0)))

    def values(params, seen) -> Any:
        return model.apply({"params": params}, seen)

    def start(key):
        shapes = jax.eval_shape(
            functools.partial(advance, environment),
            new_episode(environment, key),
            jnp.zeros((), jnp.int32),
            key,
        )[1]
        memory = jax.tree.map(lambda leaf: jnp.zeros((CAPACITY, *leaf.shape), leaf.dtype), shapes)
        return Replay(_episodes(environment, key), memory)

    def collect(params, data, replay, batches):
        del data
        numbers, keys = batches
        act_key, sample_key = jax.random.split(keys[0])
        part = numbers[0] / (EXPLORATION * config.steps)
        epsilon = jnp.maximum(1 - (1 - LAST_EPSILON) * part, LAST_EPSILON)

        def policy(seen, key):
            any_key, which_key = jax.random.split(key)
            random = jax.random.randint(any_key, seen.shape[:1], 0, environment.actions)
            explores = jax.random.bernoulli(which_key, epsilon, seen.shape[:1])
            return jnp.where(explores, random, jnp.argmax(values(params, seen), axis=-1))

        episodes, made = act(environment, policy, replay.episodes, act_key, ACTING)
        first = numbers[0] // period * made_at_once
        memory = jax.tree.map(
            lambda all, new: jax.lax.dynamic_update_slice_in_dim(
                all, new.reshape(made_at_once, *new.shape[2:]), first % CAPACITY, axis=0
            ),
            replay.memory,
            made,
        )
        kept = jnp.minimum(first + made_at_once, CAPACITY)
        index = jax.random.randint(sample_key, (period, config.batch_size), 0, kept)
        chosen = jax.tree.map(lambda leaf: leaf[index], memory)
        after = jnp.max(values(params, chosen.after), axis=-1)
        rewards = environment.reward_scale * chosen.reward
        targets = rewards + environment.discount * jnp.where(chosen.terminal, 0.0, after)
        return Replay(episodes, memory), (chosen.seen, chosen.action, targets)

    def train_loss(params, data, batch):
        del data
        seen, actions, targets = batch
        found = jnp.take_along_axis(values(params, seen), actions[:, None], axis=-1)[:, 0]
        return jnp.mean((found - targets) ** 2)

    def test_loss(params, data):
        del data
        best = mean_return(environment, lambda seen: jnp.argmax(values(params, seen), axis=-1))
        return _checked(params, environment.ceiling - best)

    return Task(
        init=lambda key: model.init(key, seen[None])["params"],
        batches=lambda key: (jnp.arange(config.steps), jax.random.split(key, config.steps)),
        train_loss=train_loss,
        test_loss=test_loss,
        data=(),
        metric=f"{environment.ceiling:g} - return",
        world=World(start, collect, period, environment.ceiling),
    )
