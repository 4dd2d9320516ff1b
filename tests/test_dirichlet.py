import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from dartax import dirichlet

CONCENTRATIONS = [np.array([0.3, 1.0, 4.0]), np.array([8.0, 0.4]), np.array([2.0, 3.0, 5.0, 7.0])]


@pytest.mark.parametrize("a", CONCENTRATIONS)
def test_closed_forms_agree_with_scipy(a):
    x = stats.dirichlet.rvs(a, size=5, random_state=0)
    x = np.maximum(x, 1e-30)
    exact = special.gammaln(a.sum()) - special.gammaln(a).sum() + ((a - 1) * np.log(x)).sum(-1)
    c = jnp.asarray(a, jnp.float32)
    log_prob = jax.vmap(dirichlet.log_prob, in_axes=(0, None))(jnp.asarray(x, jnp.float32), c)
    np.testing.assert_allclose(log_prob, exact, rtol=1e-4)
    np.testing.assert_allclose(dirichlet.mean(c), stats.dirichlet.mean(a), rtol=1e-5)
    np.testing.assert_allclose(dirichlet.variance(c), stats.dirichlet.var(a), rtol=1e-5)
    np.testing.assert_allclose(dirichlet.entropy(c), stats.dirichlet.entropy(a), rtol=1e-4)


def test_moments_where_the_slack_is_large():
    c = jnp.asarray([10.0, 10.0, 1e10], jnp.float32)
    np.testing.assert_allclose(dirichlet.mean(c)[:2], 1e-9, rtol=1e-5)
    np.testing.assert_allclose(dirichlet.variance(c)[:2], 1e-19, rtol=1e-5)


def test_kl_divergence_is_the_mean_log_ratio():
    p, q = np.array([0.8, 2.0, 5.0]), np.array([3.0, 1.5, 2.0])
    x = stats.dirichlet.rvs(p, size=200_000, random_state=1).T
    ratio = stats.dirichlet.logpdf(x, p) - stats.dirichlet.logpdf(x, q)
    got = dirichlet.kl_divergence(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))
    assert abs(got - ratio.mean()) < 5 * ratio.std() / np.sqrt(len(ratio))
    backward = dirichlet.kl_divergence(jnp.asarray(q, jnp.float32), jnp.asarray(p, jnp.float32))
    assert abs(got - backward) > 0.1
    np.testing.assert_allclose(dirichlet.kl_divergence(jnp.ones(3), jnp.ones(3)), 0, atol=1e-6)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("a", CONCENTRATIONS)
def test_marginals_are_beta(a):
    n = 20_000
    draws = np.asarray(dirichlet.sample(2, jnp.asarray(a, jnp.float32), (n,)), np.float64)
    np.testing.assert_allclose(draws.sum(-1), 1, rtol=1e-5)
    for i, concentration in enumerate(a):
        marginal = stats.beta(concentration, a.sum() - concentration)
        assert stats.kstest(draws[:, i], marginal.cdf).statistic < 1.95 / np.sqrt(n)


@pytest.mark.parametrize("a", CONCENTRATIONS[:2])
def test_mean_pathwise_gradient_is_the_gradient_of_the_mean(a):
    # E[dpi_i/da_j] = (delta_ij a_0 - a_i) / a_0^2
    n = 100_000
    c = jnp.asarray(a, jnp.float32)
    keys = jax.random.split(jax.random.key(4), n)
    jacobians = jax.jit(jax.vmap(jax.jacobian(dirichlet.sample, argnums=1), in_axes=(0, None)))
    samples = np.asarray(jacobians(keys, c), np.float64)
    total = a.sum()
    exact = (np.eye(len(a)) * total - a[:, None]) / total**2
    error = samples.std(0) / np.sqrt(n)
    assert np.all(np.abs(samples.mean(0) - exact) < 5 * error)


def test_batches():
    c = jnp.asarray([[1.0, 2.0], [3.0, 0.5], [4.0, 4.0]])
    assert dirichlet.sample(0, c, (5,)).shape == (5, 3, 2)
    assert dirichlet.mean(c).shape == dirichlet.variance(c).shape == (3, 2)
    assert dirichlet.entropy(c).shape == dirichlet.kl_divergence(c, c).shape == (3,)
    assert dirichlet.log_prob(dirichlet.mean(c), c).shape == (3,)
