"""Slow oracles in NumPy and SciPy, float64, written from the formulas alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import special, stats

Draw = Callable[[int, np.ndarray], np.ndarray]


def log_quantile(p: float, a: float) -> float:
    """log x with F(x; a) = p for Gamma(a, 1), also where x underflows."""
    x = special.gammaincinv(a, p)
    return np.log(x) if x > 1e-250 else (np.log(p) + special.gammaln(a + 1)) / a


def log_derivative(log_x: float, a: float) -> float:
    """d log x / d log a = -a (dF/da) / f, f the density of log x; dF/da by differences."""
    if log_x < -50:  # F = x^a / Gamma(a + 1), and d log F = 0 gives the rate
        return special.digamma(a + 1) - log_x
    x = np.exp(log_x)
    step = 1e-3 * min(a, np.sqrt(a))
    # The smaller tail keeps its digits.
    if special.gammainc(a, x) < 0.5:
        distribution, sign = special.gammainc, 1.0
    else:
        distribution, sign = special.gammaincc, -1.0
    below, above = (distribution(a + k * step, x) for k in (-1, 1))
    below2, above2 = (distribution(a + k * step, x) for k in (-2, 2))
    slope = sign * (8 * (above - below) - (above2 - below2)) / (12 * step)
    density = stats.gamma.pdf(x, a) * x
    return -a * slope / density


def adam(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8):
    """Adam directions, one tree of arrays after the other."""
    state: dict[str, Any] = {"t": 0}

    def direction(gradient: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        state["t"] += 1
        result = {}
        for name, g in gradient.items():
            m, v = state.get(name, (0.0, 0.0))
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            state[name] = (m, v)
            m_hat, v_hat = m / (1 - beta1 ** state["t"]), v / (1 - beta2 ** state["t"])
            result[name] = m_hat / (np.sqrt(v_hat) + eps)
        return result

    return direction


def sign():
    """Signs of the gradient."""
    return lambda g: {name: np.sign(value) for name, value in g.items()}


def sgd():
    """The gradient itself."""
    return lambda gradient: gradient


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def paper_dart(
    params, gradients, direction, draw: Draw, *, min_rate=1e-6, rate_budget=0.1, concentration=1.0,
    b1=0.9, b2=0.999, eps=1e-8, eta=0.01, weight_decay=0.0,
):  # fmt: skip
    """The published formula, component by component; yields params, concentrations, rates."""
    names = sorted(params)
    K = len(names)
    params = {name: np.array(params[name], float) for name in names}
    a, m, v = np.full(K, concentration), np.zeros(K), np.zeros(K)
    last = pi = l = None
    for t, gradient_of in enumerate(gradients):
        g = gradient_of(params)
        g = {name: g[name] + weight_decay * params[name] for name in names}
        if t > 0:
            h = [-np.sum(g[name] * last[name]) for name in names]
            for j in range(K):
                mean_h = sum(pi[k] * h[k] for k in range(K))
                grad = (rate_budget - min_rate) * l[j] / a[j] * pi[j] * (h[j] - mean_h)
                m[j] = b1 * m[j] + (1 - b1) * grad
                v[j] = b2 * v[j] + (1 - b2) * grad**2
            m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
            a = np.clip(a - eta * m_hat / (np.sqrt(v_hat) + eps), 0.1, 10.0)
        log_gamma = draw(t, a)
        pi = softmax(log_gamma)
        l = np.array([log_derivative(log_gamma[j], a[j]) for j in range(K)])
        rates = min_rate + (rate_budget - min_rate) * pi
        last = direction(g)
        params = {name: params[name] - rates[i] * last[name] for i, name in enumerate(names)}
        yield params, a, rates


def dart(
    params, gradients, direction, draw: Draw, *, init_rate=1e-4, min_rate=0.0, rate_budget=1.0,
    concentration=10.0, memory_decay=0.999, weight_decay=0.0,
    multiplier: Callable[[int], float] = lambda t: 1.0, labels: dict[str, int] | None = None,
    sample: dict[str, np.ndarray] | None = None,
    white_noise: tuple[Any, Any, Any] = (1.0, 0.9, 0.1 / 1.9),
    schedule_steps: float = np.inf, averaged: bool = False,
):  # fmt: skip
    """The learning-rate-free form with slack; yields params, concentrations, rates.

    ``sample`` is True where a thin memory holds an element. ``white_noise`` is that of Adam.
    ``multiplier`` falls to its last value in ``schedule_steps``, which count for nothing if a mean
    of the parameters is evaluated (``averaged``).
    """
    b1, b2 = 0.9, 0.99
    names = sorted(params)
    labels = labels or {name: i for i, name in enumerate(names)}
    K = len(set(labels.values()))
    params = {name: np.array(params[name], float) for name in names}
    matrices = [[] for _ in range(K)]
    for name in names:
        if params[name].ndim >= 2:
            matrices[labels[name]].extend(params[name].ravel())
    rms = [np.sqrt(np.mean(np.square(elements))) if elements else 0.0 for elements in matrices]
    smallest = min([value for value in rms if value > 0], default=0.0)
    rms = [value or smallest or 0.04 for value in rms]
    slack = concentration * ((rate_budget - min_rate) / (init_rate - min_rate) - K)
    a = np.append(np.full(K, concentration), slack)
    m, v = np.zeros(K), np.zeros(K)
    n = np.zeros(K, int)  # hypergradients that were not 0
    z = {name: np.zeros_like(params[name]) for name in names}
    past = [[] for _ in range(K)]  # of every step since the start: its length in z, and its decay
    powers = [[] for _ in range(K)]
    white_noise = (np.broadcast_to(value, K) for value in white_noise)
    agreement, persistence, white_power = white_noise

    def kept_part(x, name):
        return x[(sample or {}).get(name, ...)]

    def free_walk(i):
        """The expected squared length of z: a double sum over all pairs of steps."""
        lengths, decays = (np.array(column) for column in zip(*past[i], strict=True))
        left = np.array([lengths[j] * np.prod(decays[j + 1 :]) for j in range(len(lengths))])
        distance = np.abs(np.subtract.outer(np.arange(len(left)), np.arange(len(left))))
        correlation = np.where(distance == 0, 1.0, agreement[i] * persistence[i] ** distance)
        return left @ correlation @ left

    def evidence(i, t):
        """Progress and noise of a block, and the mean square of its memory."""
        members = [name for name in names if labels[name] == i]
        length = sum(np.sum(kept_part(z[name], name) ** 2) for name in members)
        power, usual = (
            np.average(powers[i], weights=d ** np.arange(t)[::-1]) for d in (0.95, 0.99)
        )
        ratio = power / (white_power[i] or usual)
        noise = np.clip(2 - abs(np.log(ratio)) / 0.3, 0, 1)
        if not white_power[i]:
            noise = min(noise, np.clip(n[i] / 25 - 1, 0, 1))
        size = sum(kept_part(z[name], name).size for name in members)
        return length / free_walk(i), noise, length / size

    pi = l = np.zeros(K + 1)
    for t, gradient_of in enumerate(gradients):
        g = gradient_of(params)
        kept = np.full(K, memory_decay)
        if t > 0:
            h = np.zeros(K)
            for name in names:
                products = kept_part(g[name] * z[name], name)
                h[labels[name]] -= g[name].size / products.size * np.sum(products)
            grad = np.array([l[i] * (h[i] - pi[i] * np.sum(h)) for i in range(K)])
            usual = np.sqrt(v / (1 - b2 ** np.maximum(n, 1)))
            n = n + (h != 0)
            m = np.where(h != 0, b1 * m + (1 - b1) * grad, m)
            v = np.where(h != 0, b2 * v + (1 - b2) * grad**2, v)
            s = [
                -m[i] / (1 - b1 ** n[i]) / np.sqrt(v[i] / (1 - b2 ** n[i])) if n[i] else 0
                for i in range(K)
            ]
            rate = min_rate + (rate_budget - min_rate) * a[:K] / a.sum()
            f, last_f = multiplier(t), multiplier(t - 1)
            steps = np.inf if averaged else schedule_steps
            last = 0.0 if averaged else multiplier(schedule_steps)
            ends = f > last and (averaged or np.isfinite(steps))
            annealing = 1 - last / f if ends else 0.0
            schedule_fall = np.log(last_f / f) if 0 < f < last_f else 0.0
            a_before = a.copy()
            for i in np.flatnonzero(h):
                progress, noise, displacement = evidence(i, t)
                limit = min(max(0.05, 10 * annealing / steps), 20.0 / (1 + n[i]))
                limit = min(limit * max(2.5e-2 * rms[i] / rate[i], 1), 1.0)
                limit *= np.clip(2 * progress, 0, 1) * min(a_before[K] / a_before[i], 1)
                tolerance = 0.3 * annealing * (1 - noise) * np.clip(2 * progress - 1, 0, 1)
                carried_away = np.clip(4 * displacement / rms[i] ** 2 - 1, 0, 1)
                astray = noise * np.clip(3 - progress, 0, 1) * max(1 - annealing, carried_away)
                confined = max(1 - 2 * progress, 0)
                change = limit * np.clip(s[i] + tolerance, 0, 1)
                retreat = 0.05 * np.clip(-4 * s[i] - 3, 0, 1)
                fall = min(0.05, 3.0 / (1 + n[i])) * max(astray, confined)
                change -= max(retreat, fall - schedule_fall)
                if usual[i] > 0 and grad[i] > 10 * usual[i]:
                    change = -np.log(10)
                a[i] *= np.exp(change)
                kept[i] *= min(np.exp(change), 1)
            a *= concentration / max(a[:K].min(), a[:K].max() / 1e6)
            a = np.clip(a, 1e-4, 1e30)
        log_gamma = draw(t, a)
        pi = softmax(log_gamma)
        l = np.array([log_derivative(log_gamma[j], a[j]) for j in range(K + 1)])
        rates = multiplier(t) * (min_rate + (rate_budget - min_rate) * pi[:K])
        u = direction(g)
        u = {name: u[name] + weight_decay * params[name] for name in names}
        spent = rates - multiplier(t) * min_rate
        z = {n: kept[labels[n]] * z[n] + spent[labels[n]] * u[n] for n in names}
        for i in range(K):
            parts = [kept_part(u[name], name) for name in names if labels[name] == i]
            square = sum(np.sum(part**2) for part in parts)
            past[i].append((spent[i] * np.sqrt(square), kept[i]))
            powers[i].append(square / sum(part.size for part in parts))
        params = {name: params[name] - rates[labels[name]] * u[name] for name in names}
        yield params, a.copy(), rates
