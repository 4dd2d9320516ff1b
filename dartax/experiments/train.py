"""Trains a network and writes a run folder."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import dartax
from dartax.experiments import config as config_lib
from dartax.experiments import data, devices, logs, optimizers, plots
from dartax.experiments.checkpoints import Checkpoints
from dartax.experiments.config import Config, ConfigError
from dartax.experiments.files import write_whole
from dartax.experiments.models import MLP
from dartax.experiments.run_folder import (
    SUMMARY_FIGURES,
    git_commit,
    held,
    make_folder,
    read_metrics,
    read_summary,
    versions,
    write_json,
)
from dartax.experiments.signals import HeldSignals
from dartax.experiments.tasks import cross_entropy

PyTree = Any

# First columns of metrics.csv; the columns of the blocks follow.
COLUMNS = ["step", "epoch", "wall_s", "train_loss", "test_loss", "test_accuracy", "rate"]
# Scalars of dartax.metrics to record, besides the columns of leaves.
SCALARS = ("concentration_total", "spent", "skipped", "multiplier", "min_rate", "rate_budget")


class TrainState(NamedTuple):
    """The state of training, which checkpoints hold."""

    params: PyTree
    opt_state: PyTree


class Functions(NamedTuple):
    """The functions of a run."""

    shuffle: Callable[[int], jax.Array]
    interval: Callable[..., tuple[TrainState, jax.Array]]
    evaluate: Callable[[TrainState], tuple[jax.Array, jax.Array]]
    rates: Callable[[TrainState], dict[str, jax.Array]]


def compile_functions(
    config: Config,
    model: MLP,
    optimizer: optax.GradientTransformationExtraArgs,
    dataset: data.Dataset,
    mesh: jax.sharding.Mesh,
    state_shardings: TrainState,
) -> Functions:
    """Puts the data on all devices and makes the jitted functions of a run."""
    everywhere = devices.replicated(mesh)
    train_x, train_y = jax.device_put((dataset.train_x, dataset.train_y), everywhere)
    test_x, test_y = jax.device_put((dataset.test_x, dataset.test_y), everywhere)
    steps_per_epoch = len(train_x) // config.batch_size
    shuffle_key = jax.random.fold_in(jax.random.key(config.seed), 1)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def shuffle(epoch):
        """Returns the indices of the batches of an epoch, ``[steps_per_epoch, batch_size]``."""
        order = jax.random.permutation(jax.random.fold_in(shuffle_key, epoch), len(train_x))
        return order[: steps_per_epoch * config.batch_size].reshape(steps_per_epoch, -1)

    # The data are arguments, because constants would be copied into the program.
    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(state_shardings, everywhere))
    def interval(state, x, y, batches, first, last):
        """Runs steps ``first`` to ``last`` of an epoch; returns the new state and the mean loss."""

        def loss_fn(params, batch):
            logits: Any = model.apply({"params": params}, x[batch])
            return cross_entropy(logits, y[batch])

        def step(i, carry):
            (params, opt_state), total = carry
            batch = devices.split_batch(mesh, batches[i])
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
            return TrainState(optax.apply_updates(params, updates), opt_state), total + loss

        state, total = jax.lax.fori_loop(first, last, step, (state, jnp.zeros([])))
        return state, total / (last - first)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def evaluate(state, x, y):
        params = optimizers.eval_params(config.optimizer, state.opt_state, state.params)
        logits: Any = model.apply({"params": params}, x)
        return cross_entropy(logits, y), jnp.mean(jnp.argmax(logits, -1) == y)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def rates(state):
        found = dartax.metrics(state.opt_state, state.params)
        row = {name.removeprefix("dart/"): value for name, value in found.items()}
        kept = {name: value for name, value in row.items() if "/" in name or name in SCALARS}
        return {"rate": row["rate_mean"], **kept}

    has_rates = optimizers.has_rates(config.optimizer.name)
    return Functions(
        shuffle=shuffle,
        interval=lambda state, *where: interval(state, train_x, train_y, *where),
        evaluate=lambda state: evaluate(state, test_x, test_y),
        rates=rates if has_rates else lambda _: {},
    )


def train_and_evaluate(config: Config, *, progress: bool = True) -> dict[str, Any]:
    """Trains to the end, and resumes from the last checkpoint if there is one.

    Args:
      config: The run. ``workdir`` is made if it does not exist.
      progress: Whether to show a progress bar.

    Returns:
      The content of ``summary.json``.

    Raises:
      ConfigError: If the configuration is invalid, or ``workdir`` holds another run or is in use.
      DataError: If the data are missing or damaged.
      OSError: If a file cannot be read or written. The run can be resumed.
      KeyboardInterrupt: After Ctrl-C or SIGTERM, once a checkpoint is saved. The argument is the
        number of the signal.
    """
    logs.check_installed(config.log)
    workdir = Path(config.workdir)
    dataset = data.load(config.dataset)
    steps_per_epoch = len(dataset.train_x) // config.batch_size
    if steps_per_epoch == 0:
        raise ConfigError(
            f"batch_size must be at most the {len(dataset.train_x)} training examples, got "
            f"{config.batch_size}; lower it."
        )
    total_steps = config.epochs * steps_per_epoch
    if total_steps >= 2**31:
        raise ConfigError(
            f"epochs must make fewer than 2**31 steps, got {config.epochs} epochs of "
            f"{steps_per_epoch}; lower it."
        )
    optimizer = optimizers.build(config.optimizer, total_steps)
    model = MLP(config.model.hidden, dataset.num_classes)
    mesh = devices.make_mesh(config.mesh, config.batch_size)

    def init():
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        params = model.init(key, jnp.asarray(dataset.train_x[:1]))["params"]
        return TrainState(params, optimizer.init(params))

    try:
        shapes = jax.eval_shape(init)
    except (TypeError, ValueError) as error:  # options that depend on the parameters
        raise ConfigError(f"optimizer.options: {error}") from error

    make_folder(workdir)
    if (summary := read_summary(workdir)) is not None:
        claim_workdir(config, workdir)
        return summary
    if (workdir / "summary.json").exists():
        print(
            f"dartax: {workdir / 'summary.json'} is damaged; writing it again from the checkpoint.",
            file=sys.stderr,
        )
    shardings = TrainState(*devices.state_shardings(mesh, optimizer, *shapes))
    functions = compile_functions(config, model, optimizer, dataset, mesh, shardings)
    first_state = jax.jit(init, out_shardings=shardings)
    with contextlib.ExitStack() as stack, devices.exit_if_left_alone():
        with devices.together():
            if devices.is_first_process():  # only one process writes
                stack.enter_context(held(workdir))
                claim_workdir(config, workdir)
        return _train(config, functions, first_state, shapes, shardings, mesh, progress)


def _train(
    config: Config,
    functions: Functions,
    first_state: Callable[[], TrainState],
    shapes: TrainState,
    shardings: TrainState,
    mesh: jax.sharding.Mesh,
    progress: bool,
) -> dict[str, Any]:
    """Runs the remaining steps of the run in ``config.workdir``; returns the summary."""
    workdir = Path(config.workdir)
    steps_per_epoch = len(functions.shuffle(0))
    total_steps = config.epochs * steps_per_epoch
    writes = devices.is_first_process()
    with devices.together():
        if not writes:
            claim_workdir(config, workdir)
        checkpoints = Checkpoints(workdir / "checkpoints")
        step = checkpoints.newest(shapes) if writes else 0
    (step,) = devices.largest(step)
    state = checkpoints.restore(step, devices.placed(shapes, shardings)) if step else first_state()
    columns = COLUMNS + [name for name in functions.rates(state) if name not in COLUMNS]
    with devices.together():
        opened = logs.open_logs(config, workdir, columns, step) if writes else []
    rows = read_metrics(workdir / "metrics.csv")
    start = time.monotonic() - (rows[-1]["wall_s"] or 0.0 if rows else 0.0)
    last_save = time.monotonic()

    shown = rows[-1] if rows else {}
    bar = tqdm(
        total=total_steps,
        initial=step,
        disable=not (progress and writes),
        dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f} % |{bar}| {remaining} left",
    )
    with HeldSignals() as signals, bar, contextlib.ExitStack() as stack:
        for log in opened:
            stack.callback(log.close)
        for epoch in range(step // steps_per_epoch, config.epochs):
            batches = functions.shuffle(epoch)
            for first in range(step % steps_per_epoch, steps_per_epoch, config.log_steps):
                last = min(first + config.log_steps, steps_per_epoch)
                state, loss = functions.interval(state, batches, first, last)
                step = epoch * steps_per_epoch + last
                values = {"train_loss": loss, **functions.rates(state)}
                if last == steps_per_epoch:
                    values["test_loss"], values["test_accuracy"] = functions.evaluate(state)
                row = {name: value.item() for name, value in jax.device_get(values).items()}
                wall = round(time.monotonic() - start, 3)
                for log in opened:
                    log.write({"step": step, "epoch": epoch + 1, "wall_s": wall, **row})
                shown = {**shown, **row}
                where = f"epoch {epoch + 1} of {config.epochs}"
                bar.set_description_str(", ".join([where, *_figures(shown)]), refresh=False)
                bar.update(last - first)
                old = time.monotonic() - last_save >= config.checkpoint_seconds
                signum, due = devices.largest(signals.signum, old or step == total_steps)
                if signum or due:
                    for log in opened:
                        log.sync()
                    checkpoints.save(step, state)
                    last_save = time.monotonic()
                if signum:
                    raise KeyboardInterrupt(signum)

    if writes:
        finish(config, workdir, step, state, shapes, mesh)
    devices.wait_for_all("summary")
    summary = read_summary(workdir)
    assert summary is not None, "the first process has just written it"
    return summary


def _figures(row: Mapping[str, float | None]) -> list[str]:
    """The training loss and the last known test accuracy, for the progress bar."""
    loss, accuracy = row.get("train_loss"), row.get("test_accuracy")
    return [
        *([f"loss {loss:.3g}"] if loss is not None else []),
        *([f"test accuracy {accuracy:.1%}"] if accuracy is not None else []),
    ]


def finish(
    config: Config,
    workdir: Path,
    step: int,
    state: TrainState,
    shapes: TrainState,
    mesh: jax.sharding.Mesh,
) -> None:
    """Draws the pictures of a finished run and writes its summary."""
    plots.draw(workdir, plots.FIRST)
    last_row = read_metrics(workdir / "metrics.csv")[-1]
    if optimizers.has_rates(config.optimizer.name):
        # The rates are replicated, so every shard holds all of them.
        rates = dartax.describe(devices.own_shards(state.opt_state), shapes.params)
        write_whole(workdir / "rates.txt", rates + "\n")
    summary = {
        **{name: last_row.get(name) for name in SUMMARY_FIGURES},
        "steps": step,
        "epochs": config.epochs,
        "git_commit": git_commit(),
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "mesh": [mesh.shape[devices.DATA], mesh.shape[devices.MODEL]],
        "processes": jax.process_count(),
    }
    write_json(workdir / "summary.json", summary)


def claim_workdir(config: Config, workdir: Path) -> None:
    """Writes ``config.toml``, or checks that the existing one is of the same run."""
    path = workdir / "config.toml"
    if not path.exists():
        config_lib.save(config, path)
    if (there := config_lib.load(path)) != config:
        changed = [
            f"{name} {getattr(there, name)!r} there, {getattr(config, name)!r} here"
            for name in Config.__dataclass_fields__
            if getattr(there, name) != getattr(config, name)
            and name not in ("workdir", "mesh", "log")
        ]
        if changed:
            raise ConfigError(
                f"workdir must be free or hold this same run, got {str(workdir)!r} with another "
                f"({'; '.join(changed)}); pass another --workdir or delete that folder."
            )
