"""GPJax in double precision, as its examples run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def data(x64):
    gpjax = pytest.importorskip("gpjax")
    draws = np.random.default_rng(0)
    x = np.sort(draws.uniform(-3.0, 3.0, (40, 1)), 0)
    y = np.sin(4 * x) + np.cos(2 * x) + 0.3 * draws.normal(size=x.shape)
    return gpjax.Dataset(X=jnp.asarray(x), y=jnp.asarray(y))


def posterior(data):
    import gpjax

    prior = gpjax.gps.Prior(mean_function=gpjax.mean_functions.Zero(), kernel=gpjax.kernels.RBF())
    return prior * gpjax.likelihoods.Gaussian()


def fit(data, optimizer, steps):
    """The exact GP: a lengthscale, a variance and a noise."""
    import gpjax

    return gpjax.fit(
        model=posterior(data), objective=lambda p, d: -gpjax.objectives.conjugate_mll(p, d),
        train_data=data, optim=optimizer, num_iters=steps, key=jax.random.key(0), verbose=False,
    )  # fmt: skip


def test_gpjax_exact(compare, data):
    adam, dart, decayed = compare(
        "gpjax", "exact GP, 500 steps: -log ml", lambda o: fit(data, o, 500)[1][-1],
        rate=1e-2, steps=500, better="lower",
    )  # fmt: skip
    assert dart < adam + 0.1
    assert decayed < adam + 0.01


def test_gpjax_exact_stays_at_its_optimum(compare, data):
    """Three scalars and no schedule: nothing averages the steps of a rate that grew too far."""
    import gpjax

    histories = []

    def program(optimizer):
        histories.append(fit(data, optimizer, 2000)[1])
        return jnp.max(histories[-1][1000:])

    best = gpjax.fit_scipy(
        model=posterior(data), objective=lambda p, d: -gpjax.objectives.conjugate_mll(p, d),
        train_data=data, verbose=False,
    )[1][-1]  # fmt: skip
    _, dart, decayed = compare(
        "gpjax", "exact GP, 2,000 steps: worst of the last half", program,
        rate=1e-2, steps=2000, better="lower",
    )  # fmt: skip
    assert dart < best + 0.1
    assert decayed < best + 0.1
    assert histories[1][-1] < best + 0.01


def test_gpjax_sparse(compare, data):
    import gpjax

    def program(optimizer):
        z = jnp.linspace(-3.0, 3.0, 15)[:, None]
        family = gpjax.variational_families.CollapsedVariationalGaussian(
            model=posterior(data), inducing_inputs=z
        )
        return gpjax.fit(
            model=family, objective=lambda p, d: -gpjax.objectives.collapsed_elbo(p, d),
            train_data=data, optim=optimizer, num_iters=500, key=jax.random.key(0), verbose=False,
        )[1][-1]  # fmt: skip

    adam, dart, decayed = compare(
        "gpjax", "sparse GP, collapsed: -ELBO", program, rate=1e-2, steps=500, better="lower"
    )
    assert dart < adam + 0.2
    assert decayed < adam + 0.1


def test_gpjax_stochastic(compare, data):
    import gpjax

    def elbo(p, d):
        return -gpjax.objectives.elbo(p, d)

    def program(optimizer):
        z = jnp.linspace(-3.0, 3.0, 15)[:, None]
        family = gpjax.variational_families.WhitenedVariationalGaussian(
            model=posterior(data), inducing_inputs=z
        )
        fitted = gpjax.fit(
            model=family, objective=elbo, train_data=data, optim=optimizer, num_iters=1000,
            key=jax.random.key(0), batch_size=16, verbose=False,
        )[0]  # fmt: skip
        return elbo(fitted, data)

    adam, dart, decayed = compare(
        "gpjax", "sparse GP, batches of 16: -ELBO", program, rate=1e-2, steps=1000, better="lower"
    )
    assert dart < adam + 2.0
    assert decayed < adam + 1.0
