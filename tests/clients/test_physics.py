"""Neural ODEs, physics-informed networks, quantum circuits and wave functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def test_diffrax_neural_ode(compare):
    """The spirals of the diffrax example, shorter."""
    diffrax, eqx = pytest.importorskip("diffrax"), pytest.importorskip("equinox")
    times = jnp.linspace(0.0, 2.0, 20)
    starts = jax.random.uniform(jax.random.key(0), (64, 2), minval=-0.6)

    def solve(field, start, args=None):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Tsit5(), 0.0, times[-1], 0.1, start, args=args,
            saveat=diffrax.SaveAt(ts=times),
        ).ys  # fmt: skip

    def spiral(t, y, args):
        x = y / (1 + y)
        return jnp.stack([x[1], -x[0]])

    data = jax.vmap(lambda start: solve(spiral, start))(starts)

    def program(optimizer):
        model = eqx.nn.MLP(2, 2, 32, 2, activation=jax.nn.softplus, key=jax.random.key(1))
        state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

        def loss(model, data):
            found = jax.vmap(lambda y: solve(lambda t, y, args: args(y), y, model))(data[:, 0])
            return jnp.mean((found - data) ** 2)

        @eqx.filter_jit
        def step(model, state, data):
            grads = eqx.filter_grad(loss)(model, data)
            updates, state = optimizer.update(grads, state)
            return eqx.apply_updates(model, updates), state

        draws = np.random.default_rng(0)
        for _ in range(300):
            model, state = step(model, state, data[draws.integers(0, 64, 16)])
        return loss(model, data)

    adam, dart, decayed = compare(
        "diffrax", "neural ODE: mean squared error", program, rate=3e-3, steps=300, better="lower"
    )
    assert dart < 2 * adam
    assert decayed < 2 * adam


def test_jinns(compare):
    """A physics-informed network for u' = -2 u, u(0) = 1."""
    jinns, eqx = pytest.importorskip("jinns"), pytest.importorskip("equinox")

    class Decay(jinns.loss.ODE):
        def equation(self, t, u, params):
            return jax.jacfwd(lambda t: u(t, params))(t).squeeze(-1) + 2 * u(t, params)

    def program(optimizer):
        u, nn_params = jinns.nn.PINN_MLP.create(
            key=jax.random.key(0), eq_type="ODE",
            eqx_list=((eqx.nn.Linear, 1, 20), (jax.nn.tanh,), (eqx.nn.Linear, 20, 20),
                      (jax.nn.tanh,), (eqx.nn.Linear, 20, 1)),
        )  # fmt: skip
        params = jinns.parameters.Params(nn_params=nn_params, eq_params={})
        loss = jinns.loss.LossODE(
            u=u,
            dynamic_loss=Decay(Tmax=1.0),
            initial_condition=(0.0, jnp.ones(1)),
            loss_weights=jinns.loss.LossWeightsODE(dyn_loss=1.0, initial_condition=1.0),
            params=params,
        )
        data = jinns.data.DataGeneratorODE(
            key=jax.random.key(1), nt=200, tmin=0.0, tmax=1.0, temporal_batch_size=50
        )
        params = jinns.solve(
            n_iter=2000, init_params=params, data=data, loss=loss, optimizer=optimizer,
            verbose=False,
        )[0]  # fmt: skip
        times = jnp.linspace(0.0, 1.0, 100)[:, None]
        found = jax.vmap(lambda t: u(t, params))(times)
        return jnp.sqrt(jnp.mean((found - jnp.exp(-2 * times)) ** 2))

    adam, dart, decayed = compare(
        "jinns", "PINN of u' = -2u: RMS error", program, rate=1e-3, steps=2000, better="lower"
    )
    assert dart < 5e-3
    assert decayed < 2 * adam


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "complex128",
    ],
)
def test_netket(compare, x64, dtype):
    """The ground state of the transverse-field Ising chain at its critical point."""
    nk = pytest.importorskip("netket")
    hilbert = nk.hilbert.Spin(0.5, 8)
    energy = nk.operator.IsingJax(hilbert, nk.graph.Chain(8), h=1.0)
    exact = nk.exact.lanczos_ed(energy)[0]

    def program(optimizer):
        model = nk.models.RBM(alpha=1, param_dtype=dtype)
        sampler = nk.sampler.MetropolisLocal(hilbert, n_chains=16)
        sampled = nk.vqs.MCState(
            sampler, model, n_samples=512, seed=jax.random.key(0), sampler_seed=jax.random.key(1)
        )
        driver = nk.driver.VMC(energy, optimizer, variational_state=sampled)
        driver.run(500, out=(), show_progress=False)
        full = nk.vqs.FullSumState(hilbert, model, variables=sampled.variables)
        return (full.expect(energy).mean.real - exact) / abs(exact)

    _, dart, decayed = compare(
        "netket", f"VMC, RBM of {dtype}: relative energy error", program,
        rate=1e-2, steps=500, better="lower",
    )  # fmt: skip
    assert dart < 3e-3
    assert decayed < 1e-3


@pytest.mark.parametrize("scale", [1.0, 0.01], ids=["anywhere", "near 0"])
@pytest.mark.parametrize("steps", [100, 300])
def test_pennylane(compare, x64, steps, scale):
    """A variational eigensolver: the Ising chain of four spins, three layers of rotations."""
    qml = pytest.importorskip("pennylane")
    wires = range(4)
    terms = [qml.Z(i) @ qml.Z(i + 1) for i in range(3)] + [qml.X(i) for i in wires]
    hamiltonian = qml.dot([-1.0] * 3 + [-0.5] * 4, terms)

    @qml.qnode(qml.device("default.qubit"), interface="jax")
    def energy(weights):
        qml.BasicEntanglerLayers(weights, wires=wires, rotation=qml.RY)
        return qml.expval(hamiltonian)

    def program(optimizer):
        def step(carry, _):
            weights, state = carry
            updates, state = optimizer.update(jax.grad(energy)(weights), state)
            return (weights + updates, state), None

        weights = scale * jax.random.normal(jax.random.key(1), (3, 4))
        run = jax.jit(
            lambda weights: jax.lax.scan(step, (weights, optimizer.init(weights)), length=steps)
        )
        return energy(run(weights)[0][0])

    start = "near 0" if scale < 1 else "anywhere"
    adam, dart, decayed = compare(
        "pennylane", f"VQE, {steps} steps from {start}: energy", program,
        rate=1e-1, steps=steps, better="lower",
    )  # fmt: skip
    assert decayed < adam + 0.1
    if steps == 100 and dart > adam + 0.1:
        pytest.xfail(f"no schedule tells dart that the run is short: {dart:.3f}, Adam {adam:.3f}")
    assert dart < adam + 0.1
