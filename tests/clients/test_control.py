"""Reinforcement learning. Returns of one seed are noisy: dart has to solve the task, not to win."""

import jax
import jax.numpy as jnp
import optax
import pytest


@pytest.mark.parametrize(
    ("name", "task", "steps", "rate", "options", "solved"),
    [
        ("PPO", "CartPole-v1", 16_000, 3e-4, {"n_steps": 512}, 200),
        ("DQN", "CartPole-v1", 12_000, 2.3e-3, {
            "learning_starts": 1000, "train_freq": 256, "gradient_steps": 128,
            "target_update_interval": 10, "exploration_fraction": 0.16, "batch_size": 64,
            "exploration_final_eps": 0.04,
        }, 100),
        ("SAC", "Pendulum-v1", 4_000, 1e-3, {"learning_starts": 200}, -400),
    ],
    ids=["PPO", "DQN", "SAC"],
)  # fmt: skip
def test_sbx(compare, name, task, steps, rate, options, solved):
    sbx = pytest.importorskip("sbx")
    from stable_baselines3.common.evaluation import evaluate_policy

    def program(optimizer):
        model = getattr(sbx, name)(
            "MlpPolicy", task, seed=0, **options,
            policy_kwargs={"optimizer_class": lambda learning_rate: optimizer},
        )  # fmt: skip
        model.learn(steps)
        environment = model.get_env()
        environment.seed(1)
        return evaluate_policy(model, environment, n_eval_episodes=20)[0]

    # How often the library will update is not for its users to count: no decay.
    _, dart, _ = compare(
        "sbx-rl", f"{name}, {task}: return", program, rate=rate, steps=None, better="higher"
    )
    assert dart > solved


def test_gymnax_ppo(compare):
    """PPO whose whole run is one scan: 16 copies of CartPole, 60 rounds of 128 steps."""
    gymnax = pytest.importorskip("gymnax")
    env, env_params = gymnax.make("CartPole-v1")
    rounds, copies, length = 60, 16, 128

    def program(optimizer):
        def init(key, sizes=((4, 64), (64, 2), (4, 64), (64, 1))):
            scales = (1.4 / 2, 0.01 / 8, 1.4 / 2, 1 / 8)
            keys = jax.random.split(key, 4)
            return [
                s * jax.random.normal(k, z) for s, k, z in zip(scales, keys, sizes, strict=True)
            ]

        def act(params, x):
            policy, value = jnp.tanh(x @ params[0]) @ params[1], jnp.tanh(x @ params[2]) @ params[3]
            return jax.nn.log_softmax(policy), value[..., 0]

        def play(carry, key):
            params, x, state = carry
            logits, value = act(params, x)
            keys = jax.random.split(key, copies + 1)
            action = jax.random.categorical(keys[0], logits)
            new, state, reward, ended, cut, _ = jax.vmap(env.step, (0, 0, 0, None))(
                keys[1:], state, action, env_params
            )
            log_prob = jnp.take_along_axis(logits, action[:, None], 1)[:, 0]
            return (params, new, state), (x, action, log_prob, value, reward, ended | cut)

        def advantages(carry, moment):
            advantage, later = carry
            value, reward, done = moment
            delta = reward + 0.99 * later * (1 - done) - value
            advantage = delta + 0.99 * 0.95 * (1 - done) * advantage
            return (advantage, value), advantage

        def loss(params, x, action, old, target, advantage):
            logits, value = act(params, x)
            log_prob = jnp.take_along_axis(logits, action[:, None], 1)[:, 0]
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            ratio = jnp.exp(log_prob - old)
            gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
            entropy = -jnp.sum(jnp.exp(logits) * logits, -1)
            return jnp.mean(0.25 * (value - target) ** 2 - gain - 0.01 * entropy)

        def learn(carry, batch):
            params, opt = carry
            grads = jax.grad(loss)(params, *batch)
            updates, opt = optimizer.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt), None

        def play_and_learn(carry, key):
            params, opt, x, state = carry
            key, of_batches = jax.random.split(key)
            (_, x, state), seen = jax.lax.scan(
                play, (params, x, state), jax.random.split(key, length)
            )
            last = act(params, x)[1]
            gained = jax.lax.scan(advantages, (jnp.zeros(copies), last), seen[3:], reverse=True)[1]
            batch = [a.reshape(-1, *a.shape[2:]) for a in (*seen[:3], seen[3] + gained, gained)]
            order = jax.vmap(lambda k: jax.random.permutation(k, copies * length))(
                jax.random.split(of_batches, 4)
            ).reshape(16, -1)
            (params, opt), _ = jax.lax.scan(learn, (params, opt), [a[order] for a in batch])
            return (params, opt, x, state), (jnp.sum(seen[4]), jnp.sum(seen[5]))

        params = init(jax.random.key(0))
        x, state = jax.vmap(env.reset, (0, None))(
            jax.random.split(jax.random.key(1), copies), env_params
        )
        carry = params, optimizer.init(params), x, state
        keys = jax.random.split(jax.random.key(2), rounds)
        rewards, ends = jax.jit(lambda c: jax.lax.scan(play_and_learn, c, keys))(carry)[1]
        return jnp.sum(rewards[-10:]) / jnp.sum(ends[-10:])

    _, dart, decayed = compare(
        "gymnax", "scanned PPO, CartPole: mean episode", program, rate=1e-3, steps=16 * rounds,
        better="higher",
    )  # fmt: skip
    assert dart > 100
    assert decayed > 100
