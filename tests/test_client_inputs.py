"""Inputs of libraries and loops that are not ours: modules as trees, odd paths, float16, meta-gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax


@jax.tree_util.register_pytree_node_class
class Module:
    """A tree of weights that can be called, as the modules of Equinox are."""

    def __init__(self, weight, bias, activation=jnp.tanh, width=3):
        self.weight, self.bias = weight, bias
        self.activation, self.width = activation, width

    def __call__(self, x):
        raise AssertionError("a tree is not to be called")

    def tree_flatten(self):
        return (self.weight, self.bias), (self.activation, self.width)

    @classmethod
    def tree_unflatten(cls, fixed, leaves):
        return cls(*leaves, *fixed)


PARAMS = Module(jnp.ones((3, 2)), jnp.ones(2))


@pytest.mark.parametrize(
    "make", [dartax.dart, dartax.paper_dart, dartax.scale_by_dart], ids=lambda make: make.__name__
)
def test_trees_that_can_be_called_are_trees(make):
    chosen, labels = Module(True, False), Module("weights", "rest")
    optimizer = make(weight_decay=1.0, mask=chosen, blocks=labels)
    state = optimizer.init(PARAMS)
    assert optax.tree.get(state, "last_rates").shape == (2,)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    for _ in range(2):
        updates, state = jax.jit(optimizer.update)(zero, state, PARAMS)
    assert np.any(updates.weight != 0)  # only the decay moves it
    assert not np.any(updates.bias)


def test_a_tree_that_can_be_called_chooses_matrices():
    state = dartax.inner.muon(matrices=Module(True, False)).init(PARAMS)
    assert len(jax.tree.leaves(state.inner_states["muon"])) == 1


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({"a/b": 1.0, "a": {"b": 2.0}}, {"a/b", "a/b#2"}),
        ({"a/b/c": 1.0, "a/b": {"c": 2.0}, "a": {"b/c": 3.0}}, {"a/b/c", "a/b/c#2", "a/b/c#3"}),
        ({"a": {"b": 1.0}, "a/b": 2.0, "a/b#2": 3.0}, {"a/b", "a/b#2", "a/b#2#2"}),
        ({"0": [1.0], "0/0": 2.0}, {"0/0", "0/0#2"}),
    ],
)
def test_leaves_of_one_path_are_told_apart(params, names):
    params = jax.tree.map(jnp.asarray, params)
    optimizer = dartax.dart(init_rate=1e-2)
    state, run = optimizer.init(params), []
    for _ in range(4):
        _, state = optimizer.update(params, state, params)
        run.append(dartax.metrics(state, params))
    prefix = "dart/rate/"
    found = {name.removeprefix(prefix) for name in run[-1] if name.startswith(prefix)}
    assert found == names
    assert all(name in dartax.describe(state, params) for name in names)
    schedules = dartax.distill_schedule(run)
    assert set(schedules) == names
    kept = dartax.scale_by_learning_rates(schedules)
    updates, _ = kept.update(params, kept.init(params))
    assert len(set(map(float, jax.tree.leaves(updates)))) == len(names)
    # A function from paths to labels sees them apart as well.
    state = dartax.dart(blocks=lambda path: path).init(params)
    assert optax.tree.get(state, "last_rates").shape == (len(names),)


@pytest.mark.parametrize("make", [dartax.dart, dartax.paper_dart])
def test_a_whole_model_may_stand_for_the_parameters(make):
    model = {"w": jnp.ones((3, 2)), "activation": jnp.tanh, "width": 3, "frozen": jnp.ones(4)}
    trained = {name: model[name] if name == "w" else None for name in model}
    optimizer = make(weight_decay=0.1)
    state = optimizer.init(trained)
    expected, _ = optimizer.update(trained, state, trained)
    updates, _ = optimizer.update(trained, state, model)
    np.testing.assert_array_equal(updates["w"], expected["w"])
    # (In paper_dart optax's decay comes first, with the words of JAX.)
    with pytest.raises(ValueError, match="structure|mismatch"):
        optimizer.update(trained, state, {"other": jnp.ones(3)})


INNERS = {
    "adam": optax.scale_by_adam(),
    "belief": optax.scale_by_belief(),
    "rms": optax.scale_by_rms(),
    "amsgrad": optax.scale_by_amsgrad(),
    "adan": optax.scale_by_adan(),
    "lion": optax.scale_by_lion(),
    "ours": dartax.inner.adam(),
    "muon": dartax.inner.muon(),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("inner", INNERS)
def test_float16_inside_any_inner_transform(inner):
    params = {"w": jnp.ones((3, 2), jnp.float16), "b": jnp.zeros(2, jnp.float16)}
    optimizer = dartax.dart(inner=INNERS[inner], init_rate=1e-3)

    def loss(params):
        w, b = (leaf.astype(jnp.float32) for leaf in (params["w"], params["b"]))
        return jnp.sum((w - 3) ** 2) + jnp.sum((b - 1) ** 2)

    @jax.jit
    def train(params):
        def step(carry, t):
            params, state = carry
            # One gradient whose square is no float16.
            grads = jax.tree.map(lambda g: jnp.where(t == 3, 300, g), jax.grad(loss)(params))
            grads = {**grads, "b": grads["b"] * (t > 5)}  # and some that are 0
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(1500))

    (after, state), updates = train(params)
    assert all(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves((after, updates)))
    assert optax.tree.get(state, "skipped") == 0
    assert loss(after) < 0.1 * loss(params)


@pytest.mark.parametrize(
    ("bad", "implementation", "blocks"),
    [
        (np.nan, "fused", "tensor"),
        (np.inf, "plain", "tensor"),
        (1e30, "fused", "tensor"),
        (np.nan, "fused", "channel"),
        pytest.param(np.nan, "plain", "channel", marks=pytest.mark.slow),
        pytest.param(1e30, "fused", "element", marks=pytest.mark.slow),
    ],
)
def test_a_direction_that_is_not_finite_costs_its_step(bad, implementation, blocks):
    """The guard looks at what comes out of an inner transform as well as at what goes in."""

    def update(updates, state, params=None, *, hurt=False, **_):
        del params
        return jax.tree.map(lambda g: jnp.where(hurt, bad, g), updates), state + 1

    inner = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros([], jnp.int32), update)
    optimizer = dartax.dart(inner=inner, implementation=implementation, blocks=blocks)
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for hurt in (False, False, True, True, False, True, False):
        before = state[0]
        updates, state = update(params, state, params, hurt=hurt)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, state)))
        if hurt:
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
            jax.tree.map(np.testing.assert_array_equal, state[0].inner_state, before.inner_state)
            jax.tree.map(np.testing.assert_array_equal, state[0].step_memory, before.step_memory)
    assert state[0].skipped == 3
    inner_state = state[0].inner_state
    assert getattr(inner_state, "inner_state", inner_state) == 4


START = {"w": jnp.array([1.0, 2.0, -1.0]), "b": jnp.zeros(2)}
OPTIMIZERS = {
    "dart": functools.partial(dartax.dart, init_rate=1e-2),
    "plain": functools.partial(dartax.dart, init_rate=1e-2, implementation="plain"),
    "sgd": functools.partial(dartax.dart, inner=optax.identity(), init_rate=1e-3),
    "paper_dart": dartax.paper_dart,
}


@pytest.mark.one_in(7)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_pass_through_updates(name, steps):
    """Meta-gradients, against differences of runs with the same draws."""
    optimizer = OPTIMIZERS[name]()

    def loss(params):
        return jnp.sum((params["w"] - 3.0) ** 2) + jnp.sum((params["b"] - 1.0) ** 2)

    def loss_after(params, scale):
        def step(carry, _):
            params, state = carry
            grads = jax.tree.map(lambda g: scale * g, jax.grad(loss)(params))
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return loss(jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0])

    loss_after = jax.jit(loss_after)
    of_params, of_scale = jax.jit(jax.grad(loss_after, (0, 1)))(START, 1.0)
    width = 1e-2
    for place in range(3):
        up, down = (
            loss_after({**START, "w": START["w"].at[place].add(sign * width)}, 1.0)
            for sign in (1, -1)
        )
        assert float(of_params["w"][place]) == pytest.approx(
            float((up - down) / (2 * width)), rel=1e-2, abs=1e-3
        )
    up, down = (loss_after(START, 1 + sign * width) for sign in (1, -1))
    assert float(of_scale) == pytest.approx(float((up - down) / (2 * width)), rel=2e-2, abs=1e-3)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("concentration", [1e-30, 1e-20, 1e-10, 1e-4, 1.0, 1e10])
def test_gradients_of_draws_at_the_ends_of_the_range(concentration):
    def second_moment(concentration):
        return jnp.sum(dartax.dirichlet.sample(0, concentration) ** 2)

    assert np.all(np.isfinite(jax.grad(second_moment)(jnp.full(3, concentration))))
    assert np.all(np.isfinite(jax.grad(second_moment)(jnp.array([concentration, 1.0, 2.0]))))


@pytest.mark.parametrize("concentration", [[1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [2.0, 1.0, 1.0]])
def test_gradients_of_the_density_on_the_boundary(concentration):
    point, concentration = jnp.array([0.0, 0.25, 0.75]), jnp.array(concentration)
    of_point, of_concentration = jax.grad(dartax.dirichlet.log_prob, (0, 1))(point, concentration)
    assert np.all(np.isfinite(of_concentration))
    assert np.all(np.isfinite(of_point))
    # Inside, and where it does not matter, it is the usual one.
    point = np.maximum(np.asarray(point, float), np.finfo("float32").tiny)
    expected = np.where(concentration == 1, 0.0, (np.asarray(concentration) - 1) / point)
    np.testing.assert_allclose(of_point, expected, rtol=1e-5)


@pytest.mark.parametrize("make", [dartax.dart, dartax.scale_by_dart])
def test_what_looks_like_a_rate_is_told(make):
    def said(learning_rate, match):
        with pytest.warns(UserWarning, match=f"learning_rate must be .* got {match}") as caught:
            make(learning_rate=learning_rate)
        assert caught[0].filename == __file__, "the warning points at the user's line"

    for rate in (3e-4, 1e-3, 0.1):
        said(rate, rate)
        said(optax.constant_schedule(rate), f"a schedule that never exceeds {rate:.3g}")
    said(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 30, 600), "a schedule that never exceeds")
    said(optax.cosine_decay_schedule(3e-4, 600), "a schedule that never exceeds 0.0003")
    for fine in (1.0, 0.5, 0.0, optax.linear_schedule(0.0, 1.0, 10**6), lambda count: 0.3):
        make(learning_rate=fine)
    jax.jit(lambda rate: optax.tree.get(make(learning_rate=rate).init(jnp.ones(3)), "skipped"))(
        1e-3
    )


@pytest.mark.parametrize("make", [dartax.dart, dartax.paper_dart])
def test_outside_jit_a_schedule_sees_values(make):
    """A plateau decay by hand changes a variable; others look at the count as a Python number."""
    params = {"w": jnp.ones((4, 3))}
    factor = {"now": 1.0}
    for schedule in (lambda _: factor["now"], lambda count: 1.0 if int(count) < 2 else 0.5):
        factor["now"] = 1.0
        optimizer = make(schedule)
        state, seen = optimizer.init(params), []
        for step in range(4):
            factor["now"] = 1.0 if step < 2 else 0.5
            _, state = optimizer.update(params, state, params)
            seen.append(float(optax.tree.get(state, "last_multiplier")))
        assert seen == [1.0, 1.0, 0.5, 0.5]


def test_outside_jit_an_inner_transform_may_use_numpy():
    inner = optax.stateless(lambda updates, _: jax.tree.map(np.asarray, updates))
    optimizer = dartax.dart(inner=inner)
    params = {"w": jnp.ones((4, 3))}
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(params, state, params)
    assert np.all(updates["w"] < 0)


def test_an_inner_transform_may_read_values_when_its_state_is_made():
    scale = lambda params: {"scale": 1 + float(jnp.std(params["w"]))}  # noqa: E731
    inner = optax.GradientTransformation(
        scale, lambda updates, state, _: (optax.tree.scale(state["scale"], updates), state)
    )
    params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
    optimizer = dartax.dart(inner=inner)
    state = optimizer.init(params)
    updates, _ = jax.jit(optimizer.update)(params, state, params)
    assert np.any(updates["w"] != 0)


def test_a_whole_optimizer_that_asks_for_the_loss_is_refused():
    with pytest.raises(ValueError, match="inner must keep the sign of the gradient"):
        dartax.dart(inner=optax.polyak_sgd()).init({"w": jnp.ones((4, 3))})


def test_a_schedule_of_one_first_step_is_no_rate_and_a_negative_one_is_refused():
    dartax.dart(optax.exponential_decay(1.0, 1, 0.05))
    with pytest.raises(ValueError, match="learning_rate must not be negative, got a schedule"):
        dartax.dart(lambda count: -1.0)


def test_injected_hyperparameters_of_complex_parameters():
    params = {"a": jnp.ones(2), "z": jnp.ones(3, jnp.complex64)}
    with pytest.raises(TypeError, match="hyperparam_dtype=jnp.float32"):
        optax.inject_hyperparams(dartax.dart)(learning_rate=1.0).init(params)
    optimizer = optax.inject_hyperparams(dartax.dart, hyperparam_dtype=jnp.float32)(1.0)
    state = optimizer.init(params)
    updates, _ = jax.jit(optimizer.update)(params, state, params)
    assert updates["z"].dtype == jnp.complex64
