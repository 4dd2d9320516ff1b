"""Variational inference, flows and hidden states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

LABELS = np.random.default_rng(0)
X = np.asarray(LABELS.normal(size=(200, 5)), "float32")
Y = (LABELS.uniform(size=200) < 1 / (1 + np.exp(-X @ [2.0, -1.0, 0.5, 0.0, 0.0]))).astype("float32")


def log_density(position):
    """Bayesian logistic regression: one vector of weights and an intercept."""
    logits = X @ position["w"] + position["b"]
    likelihood = jnp.sum(Y * logits - jnp.logaddexp(0.0, logits))
    return likelihood - 0.5 * (jnp.sum(position["w"] ** 2) + position["b"] ** 2)


@pytest.mark.parametrize("guide", ["AutoNormal", "AutoMultivariateNormal"])
def test_numpyro_svi(compare, guide):
    numpyro = pytest.importorskip("numpyro")
    from numpyro import distributions, infer

    def model(x, y):
        w = numpyro.sample("w", distributions.Normal(jnp.zeros(5), 1.0).to_event(1))
        b = numpyro.sample("b", distributions.Normal(0.0, 1.0))
        numpyro.sample("y", distributions.Bernoulli(logits=x @ w + b), obs=y)

    def program(optimizer):
        autoguide = getattr(infer.autoguide, guide)(model)
        svi = infer.SVI(model, autoguide, optimizer, infer.Trace_ELBO())
        result = svi.run(jax.random.key(0), 2000, X, Y, progress_bar=False)
        elbo = infer.Trace_ELBO(num_particles=1000)
        return -elbo.loss(jax.random.key(1), result.params, model, autoguide, X, Y)

    adam, dart, decayed = compare(
        "numpyro", f"SVI, {guide}: ELBO", program, rate=5e-3, steps=2000, better="higher"
    )
    assert dart > adam - 1.0
    assert decayed > adam - 0.3


def test_blackjax_mean_field(compare):
    blackjax = pytest.importorskip("blackjax")

    def program(optimizer):
        algorithm = blackjax.meanfield_vi(log_density, optimizer, num_samples=10)
        step = jax.jit(algorithm.step)
        state = algorithm.init({"w": jnp.zeros(5), "b": jnp.zeros([])})
        for key in jax.random.split(jax.random.key(0), 1000):
            state, _ = step(key, state)
        draws = algorithm.sample(jax.random.key(1), state, 2000)
        entropy = sum(jnp.sum(rho) for rho in jax.tree.leaves(state.rho))
        return jnp.mean(jax.vmap(log_density)(draws)) + entropy

    adam, dart, decayed = compare(
        "blackjax", "mean-field VI: ELBO + const", program, rate=1e-2, steps=1000, better="higher"
    )
    assert dart > adam - 1.0
    assert decayed > adam - 0.3


def test_blackjax_svgd(compare):
    blackjax = pytest.importorskip("blackjax")
    mean, spread = jnp.array([3.0, -1.0]), jnp.array([2.0, 0.5])

    def program(optimizer):
        algorithm = blackjax.svgd(
            jax.grad(lambda x: -0.5 * jnp.sum(((x - mean) / spread) ** 2)),
            optimizer,
            blackjax.vi.svgd.rbf_kernel,
            blackjax.vi.svgd.update_median_heuristic,
        )
        step = jax.jit(algorithm.step)
        state = algorithm.init(jax.random.normal(jax.random.key(0), (50, 2)), {"length_scale": 1.0})
        for _ in range(1000):
            state = step(state)
        return jnp.max(jnp.abs(jnp.mean(state.particles, 0) - mean) / spread)

    _, dart, decayed = compare(
        "blackjax", "SVGD: error of the mean", program, rate=1e-1, steps=1000, better="lower"
    )
    assert dart < 0.1  # standard deviations
    assert decayed < 0.1


def test_flowjax(compare):
    pytest.importorskip("flowjax")
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow
    from flowjax.train import fit_to_data

    first, noise = jax.random.normal(jax.random.key(0), (2, 5000))
    data = jnp.stack([first, 0.5 * first**2 + 0.3 * noise], 1)

    def program(optimizer):
        flow = masked_autoregressive_flow(
            jax.random.key(1), base_dist=Normal(jnp.zeros(2)), flow_layers=4
        )
        flow, _ = fit_to_data(
            jax.random.key(2), flow, data[:4000], optimizer=optimizer, max_epochs=10,
            max_patience=10, show_progress=False,
        )  # fmt: skip
        return -jnp.mean(flow.log_prob(data[4000:]))

    steps = 10 * (4000 * 9 // 10 // 100)
    adam, dart, decayed = compare(
        "flowjax", "autoregressive flow: test NLL", program, rate=5e-4, steps=steps, better="lower"
    )
    assert dart < adam + 0.02
    assert decayed < adam + 0.02


def test_tensorflow_probability(compare):
    tfp = pytest.importorskip("tensorflow_probability.substrates.jax")
    tfd = tfp.distributions

    def program(optimizer):
        def make(loc, raw):
            return tfd.Independent(tfd.Normal(loc, jax.nn.softplus(raw)), 1)

        def target(z):
            return jax.vmap(lambda z: log_density({"w": z[:5], "b": z[5]}))(z)

        (loc, raw), _ = tfp.vi.fit_surrogate_posterior_stateless(
            target, build_surrogate_posterior_fn=make, optimizer=optimizer, num_steps=1000,
            initial_parameters=(jnp.zeros(6), jnp.zeros(6)), sample_size=10,
            seed=jax.random.key(0), jit_compile=True,
        )  # fmt: skip
        draws = make(loc, raw).sample(2000, seed=jax.random.key(1))
        return jnp.mean(target(draws) - make(loc, raw).log_prob(draws))

    adam, dart, decayed = compare(
        "tfp-nightly", "surrogate posterior: ELBO", program, rate=1e-1, steps=1000, better="higher"
    )
    assert dart > adam - 1.0
    assert decayed > adam - 0.3


def test_dynamax(compare):
    """A hidden Markov model with Gaussian emissions, fitted in batches of sequences."""
    pytest.importorskip("dynamax")
    from dynamax.hidden_markov_model import GaussianHMM

    hmm = GaussianHMM(num_states=3, emission_dim=2)
    true, _ = hmm.initialize(
        initial_probs=jnp.ones(3) / 3,
        transition_matrix=0.85 * jnp.eye(3) + 0.05,
        emission_means=jnp.array([[0.0, 0.0], [2.0, 1.0], [-1.0, 3.0]]),
        emission_covariances=0.5 * jnp.tile(jnp.eye(2), (3, 1, 1)),
    )
    keys = jax.random.split(jax.random.key(0), 16)
    data = jax.vmap(lambda key: hmm.sample(true, key, 50)[1])(keys)

    def program(optimizer):
        params, properties = hmm.initialize(jax.random.key(1), method="kmeans", emissions=data)
        params, _ = hmm.fit_sgd(
            params, properties, data, optimizer=optimizer, batch_size=4, num_epochs=100,
            shuffle=True, key=jax.random.key(2),
        )  # fmt: skip
        return -jnp.mean(jax.vmap(lambda y: hmm.marginal_log_prob(params, y))(data)) / 50

    adam, dart, decayed = compare(
        "dynamax",
        "hidden Markov model: NLL of a step",
        program,
        rate=1e-2,
        steps=400,
        better="lower",
    )
    assert dart < adam + 0.02
    assert decayed < adam + 0.02
