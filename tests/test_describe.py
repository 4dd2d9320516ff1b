import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax._describe import block_name, shorten
from dartax._health import RULES

SGD = optax.identity()
PAIR = {"a": jnp.ones(3), "b": jnp.ones(3)}


def words(table):
    """The last column, of every row that stands for one block."""
    lines = [line for line in table.splitlines() if not line.startswith("  …")]
    return {line.split("  ")[0].rstrip(): line.rsplit("  ", 1)[1] for line in lines[3:]}


def history(optimizer, loss, steps, params=PAIR, noise=0.0):
    """The words and the mean rates of every block after each of ``steps`` numbers of updates."""
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, i):
        keys = dict(zip(params, jax.random.split(jax.random.key(i), len(params)), strict=True))
        grads = {
            name: grad + noise * jax.random.normal(keys[name], grad.shape)
            for name, grad in jax.grad(loss)(params).items()
        }
        updates, state = optimizer.update(grads, state, params)
        rates = dartax.expected_learning_rates(state, params)
        return optax.apply_updates(params, updates), state, rates

    found = []
    for i in range(1, max(steps) + 1):
        params, state, rates = step(params, state, i)
        if i in steps:
            table = dartax.describe(state, params)
            found.append((words(table), jax.tree.map(float, rates)))
    return found


def quadratic(a, b):
    return lambda p: 0.5 * (a * jnp.sum(p["a"] ** 2) + b * jnp.sum(p["b"] ** 2))


def slope(a, b):
    return lambda p: a * jnp.sum(p["a"]) + b * jnp.sum(p["b"])


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("loss", "noise", "expected"),
    [
        (quadratic(15.0, 2.0), 5.0, {"growing", "settled"}),
        (quadratic(150.0, 250.0), 0.0, {"growing", "shrinking"}),
    ],
)
def test_the_words_are_what_dart_does(loss, noise, expected):
    optimizer = dartax.dart(inner=SGD, init_rate=1e-2)
    run = history(optimizer, loss, range(2, 70), noise=noise)
    seen = set()
    for (_, before), (now, rates) in itertools.pairwise(run):
        for block, word in now.items():
            change = np.log(rates[block] / before[block])
            if change < -2:  # taken back at once, for a gradient that no average holds
                continue
            if word == "growing":
                assert change > -1e-3
            elif word == "settled":
                assert abs(change) < 1e-3
            elif word == "shrinking":
                assert change < 0
            seen.add(word)
    assert seen >= expected


def test_no_update_has_been_judged_yet():
    ((first, _), (second, _)) = history(dartax.dart(), quadratic(1.0, 2.0), [1, 2])
    assert first == {"a": "not started", "b": "not started"}
    assert second == {"a": "growing", "b": "growing"}


@pytest.mark.parametrize("make", [dartax.dart, dartax.paper_dart])
def test_a_block_without_gradient(make):
    for now, _ in history(make(), quadratic(1.0, 0.0), [2, 5]):
        assert now["b"] == "no signal"
        assert now["a"] != "no signal"


def test_a_budget_that_is_too_small():
    optimizer = dartax.dart(rate_budget=1e-3, init_rate=1e-4, inner=SGD)
    (early, _), (late, rates) = history(optimizer, quadratic(0.1, 0.1), [20, 200])
    assert early == {"a": "growing", "b": "growing"}
    assert late == {"a": "pinned at max", "b": "pinned at max"}
    assert sum(rates.values()) > 0.95e-3


def test_a_budget_that_is_too_small_for_many_blocks():
    optimizer = dartax.dart(rate_budget=2e-3, init_rate=1e-5)
    params = {f"w{i:02}": jnp.ones((2, 2)) for i in range(40)}

    def step(carry, _):  # constant gradients: longer steps are always better
        params, state = carry
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimizer.init(params))
    params, state = jax.jit(lambda carry: jax.lax.scan(step, carry, length=300)[0])(start)
    assert set(words(dartax.describe(state, params)).values()) == {"pinned at max"}


def test_a_least_rate_that_is_too_high():
    optimizer = dartax.dart(min_rate=1e-2, init_rate=0.1, inner=SGD)
    (early, _), (late, rates) = history(optimizer, quadratic(150.0, 250.0), [8, 45])
    assert early == {"a": "shrinking", "b": "shrinking"}
    assert late == {"a": "pinned at min", "b": "pinned at min"}
    assert 1e-2 < rates["a"] < 1.05e-2


def test_draws_that_are_nearly_all_zero():
    ((now, _),) = history(dartax.dart(concentration=0.1), slope(1.0, 1.0), [3])
    assert now == {"a": "collapsed", "b": "collapsed"}


def test_paper_dart_follows_the_sign():
    run = history(dartax.paper_dart(eta=0.05), slope(1e-3, 1.0), [6, 20, 30])
    assert [now for now, _ in run] == [
        {"a": "shrinking", "b": "growing"},
        {"a": "collapsed", "b": "growing"},
        {"a": "pinned at min", "b": "pinned at max"},
    ]
    noisy = history(dartax.paper_dart(), quadratic(1.0, 1.0), range(20, 60, 4), noise=3.0)
    assert [word for now, _ in noisy for word in now.values()].count("settled") > 16


def layers(num):
    return {f"layer_{i:03}": {"kernel": jnp.ones(2)} for i in range(num)}


def test_many_blocks_are_shown_in_part():
    params = layers(24)
    optimizer = dartax.dart(inner=SGD)
    state = optimizer.init(params)
    grads = {name: {"kernel": jnp.ones(2) * (i != 17)} for i, name in enumerate(params)}
    update = jax.jit(optimizer.update)
    for _ in range(2):
        _, state = update(grads, state, params)
    table = dartax.describe(state, params, max_rows=10)
    lines = table.splitlines()
    assert lines[0] == "DART after 2 updates, 0 skipped: 1 no signal, 23 growing"
    assert words(table)["layer_017/kernel"] == "no signal"
    assert len(words(table)) == 10
    hidden = [int(line.split()[1]) for line in lines if line.startswith("  …")]
    assert sum(hidden) == 14
    assert len(words(dartax.describe(state, params))) == 24
    with pytest.raises(
        ValueError, match="max_rows must be None or a positive integer, got 0; 40 is usual"
    ):
        dartax.describe(state, params, max_rows=0)
    with pytest.raises(ValueError, match="max_rows must be None or a positive integer, got 2.5"):
        dartax.describe(state, params, max_rows=2.5)


def test_two_hundred_blocks():
    params = layers(200)
    state = dartax.dart().init(params)
    lines = dartax.describe(state, params).splitlines()
    assert lines[-1] == "  … 160 more, 0.0001 to 0.0001: 160 not started"
    assert max(map(len, lines)) <= 80
    assert len(words(dartax.describe(state, params, max_rows=None))) == 200


def test_the_table_fits_a_terminal():
    deep = {
        "transformer": {
            "decoder_layer_000017": {
                "self_attention_projection": {"kernel": jnp.ones((3000, 1000)), "bias": jnp.ones(3)}
            }
        }
    }
    state = optax.partition(
        {"a label of some length, as they may come along": dartax.dart()},
        "a label of some length, as they may come along",
    ).init(deep)
    lines = dartax.describe(state, deep).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].startswith("block in tra")
    assert lines[-1].startswith("kernel  ")
    assert "3,000,000" in lines[-1]
    starts = {
        line.index(word) for line in lines[2:] for word in ("health", "not started") if word in line
    }
    assert len(starts) == 1
    warmup = optax.linear_schedule(1.23e-6, 1.0, 10)
    state = dartax.dart(warmup, min_rate=1.23e-6, rate_budget=1.23e5).init(deep)
    lines = dartax.describe(state, deep).splitlines()
    assert max(map(len, lines)) <= 80
    assert "; before it, rates in [1.23e-06, 1.23e+05], " in lines[1]
    shared = dartax.describe(dartax.dart(blocks=lambda path: 0).init(layers(30)), layers(30))
    assert "layer_000/kernel + 29 more" in shared


def test_a_common_folder_is_told_once_where_names_are_long():
    leaf = {"self_attention": {"kernel": jnp.ones(2)}, "multilayer": {"kernel": jnp.ones(2)}}
    params = {"transformer": {"decoder": {f"layer_{i:02}": leaf for i in range(3)}}}
    lines = dartax.describe(dartax.dart().init(params), params).splitlines()
    assert lines[2].startswith("block in transformer/decoder/  ")
    assert lines[3].startswith("layer_00/multilayer/kernel  ")
    short = dartax.describe(dartax.dart().init(layers(2)), layers(2))
    assert "block " in short
    assert " in " not in short.splitlines()[2]


def test_rare_trouble_is_shown_first():
    params = layers(30)
    optimizer = dartax.dart(concentration=0.1)
    state = optimizer.init(params)
    (inner, *rest) = state
    # As after updates that judged all blocks but one.
    h = jnp.ones(30).at[12].set(0.0)
    state = (inner._replace(count=jnp.asarray(9, jnp.int32), hypergradient=h), *rest)
    table = dartax.describe(state, params, max_rows=3)
    assert words(table)["layer_012/kernel"] == "no signal"
    assert list(words(table).values()).count("collapsed") == 2


def test_names_are_shortened_in_the_middle():
    assert shorten("Dense_0/kernel", 14) == "Dense_0/kernel"
    assert shorten("Dense_0/kernel", 9) == "Dens…rnel"
    assert shorten("Dense_0/kernel", 8) == "Den…rnel"
    assert block_name(["a", "b"]) == "a, b"
    assert block_name(["a", "b", "c", "d"]) == "a, b + 2 more"
    assert block_name(["Dense_0/kernel", "Dense_0/bias"], 20) == "Dense…ernel + 1 more"


def test_every_word_is_explained():
    for word in RULES:
        assert f"``{word}``" in dartax.describe.__doc__


def final_loss(optimizer, loss, steps, noise=0.0, params=PAIR):
    """The words after training, and the loss there."""
    state = optimizer.init(params)

    def step(carry, key):
        params, state = carry
        keys = dict(zip(params, jax.random.split(key, len(params)), strict=True))
        gradient = jax.grad(loss)(params)
        noisy = {k: g + noise * jax.random.normal(keys[k], g.shape) for k, g in gradient.items()}
        updates, state = optimizer.update(noisy, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), steps)
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])
    params, state = scan((params, state))
    return set(words(dartax.describe(state, params)).values()), float(loss(params))


def test_a_larger_budget_helps_where_the_word_says_so():
    far, loss = {"rate_budget": 1e-3, "inner": SGD, "init_rate": 1e-4}, quadratic(0.1, 0.1)
    word, tight = final_loss(dartax.dart(**far), loss, 200)
    _, wide = final_loss(dartax.dart(**{**far, "rate_budget": 1.0}), loss, 200)
    assert word == {"pinned at max"}
    assert wide < 0.9 * tight


def test_the_word_is_not_said_where_noise_used_the_budget_up():
    optimizer = {"inner": SGD, "init_rate": 0.4}
    loss = quadratic(1.0, 1.0)
    word, narrow = final_loss(dartax.dart(rate_budget=1.0, **optimizer), loss, 40, noise=3.0)
    _, wide = final_loss(dartax.dart(rate_budget=10.0, **optimizer), loss, 40, noise=3.0)
    assert "pinned at max" not in word
    assert wide > 0.9 * narrow


def test_a_notebook_and_a_terminal_show_colors():
    params = {"<lambda>": jnp.ones(3), "b": jnp.ones(3)}
    text = dartax.describe(dartax.dart().init(params), params)
    assert isinstance(text, str)
    assert "\x1b" not in text
    assert text.in_color().count("\x1b[90mnot started\x1b[0m") == 2
    page = text._repr_html_()
    assert page.count('<span style="color: gray">not started</span>') == 2
    assert "&lt;lambda&gt;" in page
    assert "2 not started\n" in page  # the title has no colors


def test_a_lower_least_rate_helps_where_the_word_says_so():
    steep, loss = {"min_rate": 1e-2, "init_rate": 0.1, "inner": SGD}, quadratic(150.0, 250.0)
    word, high = final_loss(dartax.dart(**steep), loss, 45)
    _, low = final_loss(dartax.dart(**{**steep, "min_rate": 0.0}), loss, 45)
    assert word == {"pinned at min"}
    assert low < 0.9 * high


def test_a_higher_concentration_helps_where_the_word_says_so():
    loss = quadratic(1.0, 3.0)
    word, wide = final_loss(dartax.dart(concentration=0.01, init_rate=1e-2), loss, 60)
    _, narrow = final_loss(dartax.dart(init_rate=1e-2), loss, 60)
    assert word == {"collapsed"}
    assert narrow < 0.9 * wide


def test_shrinking_is_right_where_the_word_is_said():
    """To leave the rates where they are would do harm: a run that cannot lower them."""
    high, loss = {"inner": SGD, "init_rate": 0.4}, quadratic(4.0, 6.0)
    ((said, _),) = history(dartax.dart(**high), loss, [6])
    assert "shrinking" in said.values()
    _, free = final_loss(dartax.dart(**high), loss, 60)
    _, held = final_loss(dartax.dart(**{**high, "min_rate": 0.39}), loss, 60)
    assert not held < free
