"""Compares optimizers: runs each optimizer on each task with several seeds.

A cell is one optimizer on one task. It has a run for each seed and value of a swept option. The
runs are vmapped in groups of equal size, so each cell compiles once. Each finished cell is written
to the JSON file of its task. A cell that the file already holds, with the same configuration, is
kept.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import dartax
from dartax.experiments import config as config_lib
from dartax.experiments import optimizers, tasks
from dartax.experiments.config import ConfigError, OptimizerConfig, nearest
from dartax.experiments.files import write_whole
from dartax.experiments.run_folder import git_commit, make_folder, versions
from dartax.experiments.tasks import TaskConfig

PyTree = Any


@dataclasses.dataclass(frozen=True)
class EntrantConfig(OptimizerConfig):
    """An optimizer in a comparison."""

    role: Literal["dart", "tuned", "peer", "reference", "basin", "ablation"] = "peer"
    """Purpose: ``dart`` with its defaults; a ``tuned`` baseline, whose best rate on each task
    counts; a learning-rate-free ``peer``; a ``reference`` with a fixed rate; a ``basin``, which
    shows the loss as a function of the initial rate; an ``ablation``."""
    sweep: str = ""
    """Option to sweep, such as learning_rate; none by default."""
    values: tuple[float, ...] = ()
    """Values of the swept option."""
    tasks: tuple[str, ...] = ()
    """Tasks to run; all by default."""
    average: bool = False
    """Evaluate the mean of the parameters along the way, later ones counting more."""

    def __post_init__(self):
        super().__post_init__()
        if bool(self.sweep) != bool(self.values):
            raise ConfigError(
                f"sweep and values must be given together, got sweep={self.sweep!r} and "
                f"values={list(self.values)}; name the option and list its values."
            )
        if self.role in ("tuned", "basin") and len(self.values) < 2:
            raise ConfigError(
                f"values must hold at least 2 numbers under role '{self.role}', got "
                f"{list(self.values)}; list the rates to try."
            )


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """A comparison."""

    workdir: str = "runs/compare"
    """Folder of the pictures and of the results, one JSON file per task."""
    seeds: int = 5
    """Runs of each setting, which differ in parameters, order of the data and draws."""
    evaluations: int = 20
    """Number of evaluations of the test loss during a run."""
    group: int = 5
    """Number of runs that are vmapped together."""
    target: str = "adamw"
    """Tuned optimizer to compare the others with."""
    schedules: tuple[Literal["constant", "linear", "cosine"], ...] = ()
    """If given, each task is run under each of these schedules, and named after both."""
    tasks: dict[str, TaskConfig] = dataclasses.field(default_factory=dict)
    """Tasks by name."""
    optimizers: dict[str, EntrantConfig] = dataclasses.field(default_factory=dict)
    """Optimizers by name."""

    def __post_init__(self):
        for name in ("seeds", "evaluations", "group"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} must be an int of at least 1, got {getattr(self, name)}; raise it."
                )
        for name in ("tasks", "optimizers"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must hold at least one, got none; add [{name}.NAME].")
        if self.target not in self.optimizers:
            raise ConfigError(
                f"target must be one of the optimizers, got {self.target!r}; "
                f"{nearest(self.target, [*self.optimizers])}"
            )
        for name, task in self.tasks.items():
            if task.steps % self.evaluations:
                fitting = -(-task.steps // self.evaluations) * self.evaluations
                raise ConfigError(
                    f"tasks.{name}.steps must be a multiple of the {self.evaluations} evaluations, "
                    f"got {task.steps}; pass {fitting}."
                )
        for name, entrant in self.optimizers.items():
            for chosen in entrant.tasks:
                if chosen not in self.tasks:
                    raise ConfigError(
                        f"optimizers.{name}.tasks must name tasks of the comparison, got "
                        f"{chosen!r}; {nearest(chosen, [*self.tasks])}"
                    )


def load(
    path: str | Path,
    *,
    workdir: str | None = None,
    seeds: int | None = None,
    tasks: Sequence[str] = (),
    optimizers: Sequence[str] = (),
) -> CompareConfig:
    """Reads a TOML file.

    Args:
      path: The file.
      workdir: Replaces the value in the file.
      seeds: Replaces the value in the file.
      tasks: If given, only these tasks are kept.
      optimizers: If given, only these optimizers and the target are kept.

    Raises:
      ConfigError: If the file is missing or wrong, or a name is unknown.
    """
    config = under_each_schedule(config_lib.load(path, CompareConfig))
    if workdir is not None:
        config = dataclasses.replace(config, workdir=workdir)
    if seeds is not None:
        config = dataclasses.replace(config, seeds=seeds)
    for key, names in (("tasks", tasks), ("optimizers", optimizers)):
        table = getattr(config, key)
        for name in names:
            if name not in table:
                raise ConfigError(
                    f"{key} must be names of {path}, got {name!r}; {nearest(name, [*table])}"
                )
    if optimizers:
        kept = {n: e for n, e in config.optimizers.items() if n in {*optimizers, config.target}}
        config = dataclasses.replace(config, optimizers=kept)
    return with_tasks(config, tasks) if tasks else config


def with_tasks(config: CompareConfig, tasks: Sequence[str]) -> CompareConfig:
    """The part of a comparison that is about some tasks, without optimizers that have none left."""
    return dataclasses.replace(
        config,
        tasks={name: task for name, task in config.tasks.items() if name in tasks},
        optimizers={
            name: dataclasses.replace(entrant, tasks=tuple(t for t in entrant.tasks if t in tasks))
            for name, entrant in config.optimizers.items()
            if not entrant.tasks or {*entrant.tasks} & {*tasks}
        },
    )


def by_schedule(config: CompareConfig) -> Iterator[tuple[str, CompareConfig]]:
    """Yields the part of a comparison under every schedule, with the name of the schedule."""
    for schedule in dict.fromkeys(task.schedule for task in config.tasks.values()):
        names = [name for name, task in config.tasks.items() if task.schedule == schedule]
        yield schedule, with_tasks(config, names)


def under_each_schedule(config: CompareConfig) -> CompareConfig:
    """Writes ``schedules`` out: a task for each, such as ``vae_linear``."""
    if not config.schedules:
        return config
    expanded = {
        name: [f"{name}_{schedule}" for schedule in config.schedules] for name in config.tasks
    }
    return dataclasses.replace(
        config,
        schedules=(),
        tasks={
            f"{name}_{schedule}": dataclasses.replace(task, schedule=schedule)
            for name, task in config.tasks.items()
            for schedule in config.schedules
        },
        optimizers={
            name: dataclasses.replace(
                entrant, tasks=tuple(long for short in entrant.tasks for long in expanded[short])
            )
            for name, entrant in config.optimizers.items()
        },
    )


def cells(config: CompareConfig) -> Iterator[tuple[str, str]]:
    """Yields the (task, optimizer) pairs of a comparison, for each task the target first."""
    names = sorted(config.optimizers, key=lambda name: name != config.target)
    for task in config.tasks:
        for name in names:
            if not config.optimizers[name].tasks or task in config.optimizers[name].tasks:
                yield task, name


def specification(config: CompareConfig, task: str, name: str) -> dict[str, Any]:
    """Returns all that affects the numbers of a cell, as JSON types."""
    entrant = dataclasses.asdict(config.optimizers[name])
    for key in ("tasks", "role"):
        del entrant[key]
    # Keys that were added later count only where they are set, so that older results stay valid.
    for key in ("blocks", "average"):
        if entrant[key] == getattr(EntrantConfig, key):
            del entrant[key]
    spec = {
        "task": {
            key: value
            for key, value in dataclasses.asdict(config.tasks[task]).items()
            if key not in LATER_TASK_KEYS or value != getattr(TaskConfig, key)
        },
        "optimizer": entrant,
        "seeds": config.seeds,
        "evaluations": config.evaluations,
    }
    return json.loads(json.dumps(spec))


def read_cells(workdir: Path, task: str) -> dict[str, Any]:
    """Reads the finished cells of a task, by optimizer."""
    path = workdir / f"{task}.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"workdir must hold results as this command writes them, got {str(path)!r} ({error}); "
            "delete that file and run again."
        ) from error
    return content


# The mean of the parameters gives those of step t a weight in proportion to t ** (AVERAGE - 1): at
# any time it is mostly of the last quarter of the run (Shamir and Zhang, 2013, arXiv:1212.1824).
AVERAGE = 8

LATER_TASK_KEYS = (
    "examples",
    "label_noise",
    "privacy_noise",
    "rank",
    "drift",
    "accumulate",
    "schedule",
    "judge",
)


class Carry(NamedTuple):
    """The state of training."""

    params: PyTree
    opt_state: PyTree
    world: PyTree = ()
    average: PyTree = ()


class Program(NamedTuple):
    """The jitted functions of a cell, which are vmapped over runs."""

    init: jax.stages.Wrapped
    interval: jax.stages.Wrapped
    evaluate: jax.stages.Wrapped


def program(task: tasks.Task, config: TaskConfig, entrant: EntrantConfig) -> Program:
    """Makes the functions of a cell.

    A run is given by its seed and its value of the swept option, which are traced.
    """
    world = task.world
    if config.schedule and entrant.name not in optimizers.SCHEDULE_FREE:
        entrant = dataclasses.replace(entrant, schedule=config.schedule)

    def optimizer(seed, value):
        built = optimizers.build(
            entrant,
            config.steps // config.accumulate,
            key=jax.random.fold_in(jax.random.key(seed), 2),
            overrides={entrant.sweep: value} if entrant.sweep else {},
        )
        if config.accumulate == 1:
            return built
        return optax.MultiSteps(built, config.accumulate).gradient_transformation()

    def init(seed, value):
        key = jax.random.key(seed)
        params = task.init(jax.random.fold_in(key, 0))
        opt_state = optimizer(seed, value).init(params)
        state = world.start(jax.random.fold_in(key, 3)) if world else ()
        average = (jnp.zeros([], jnp.int32), params) if entrant.average else ()
        return Carry(params, opt_state, state, average), task.batches(jax.random.fold_in(key, 1))

    def interval(carry, batches, seed, value, data):
        def step(carry, batch):
            loss, grads = task.value_and_grad(carry.params, data, batch)
            updates, opt_state = optimizer(seed, value).update(
                grads, carry.opt_state, carry.params, value=loss
            )
            params = optax.apply_updates(carry.params, updates)
            average = carry.average
            if entrant.average:
                count, mean = average
                mean = optax.incremental_update(params, mean, AVERAGE / (count + AVERAGE))
                average = (count + 1, mean)
            return carry._replace(params=params, opt_state=opt_state, average=average), loss

        def learn(carry, batches):
            return jax.lax.scan(step, carry, batches)

        def act_and_learn(carry, batches):
            assert world is not None
            state, batches = world.collect(carry.params, data, carry.world, batches)
            carry, losses = learn(carry._replace(world=()), batches)
            return carry._replace(world=state), losses

        if world is None:
            carry, losses = learn(carry, batches)
        else:
            periods = jax.tree.map(lambda b: b.reshape(-1, world.period, *b.shape[1:]), batches)
            carry, losses = jax.lax.scan(act_and_learn, carry, periods)
        return carry, jnp.mean(losses)

    def evaluate(carry, data):
        opt_state = carry.opt_state if config.accumulate == 1 else carry.opt_state.inner_opt_state
        params = carry.average[1] if entrant.average else carry.params
        params = optimizers.eval_params(entrant, opt_state, params)
        rates = {}
        if optimizers.has_rates(entrant.name):
            tree = dartax.expected_learning_rates(carry.opt_state, carry.params)
            for path, rate in jax.tree_util.tree_leaves_with_path(tree):
                rates[jax.tree_util.keystr(path, simple=True, separator="/")] = jnp.mean(rate)
        test_loss = task.test_loss(params, data) if task.test_loss else jnp.nan
        test_error = task.test_error(params, data) if task.test_error else jnp.nan
        return test_loss, test_error, rates

    return Program(
        init=jax.jit(jax.vmap(init)),
        interval=jax.jit(jax.vmap(interval, in_axes=(0, 0, 0, 0, None)), donate_argnums=0),
        evaluate=jax.jit(jax.vmap(evaluate, in_axes=(0, None))),
    )


def run_cell(
    config: CompareConfig, task_name: str, name: str, progress: Callable[[int], Any]
) -> dict[str, Any]:
    """Runs one optimizer on one task.

    Args:
      config: The comparison.
      task_name: Key of the task in ``config``.
      name: Key of the optimizer in ``config``.
      progress: Called with the number of training steps taken since the last call.

    Returns:
      The cell, as in the JSON file. ``test_loss``, ``train_loss`` and, of a classification,
      ``test_error`` are lists ``[values][seeds][evaluations]``, with ``None`` for a number that is
      not finite.
    """
    entrant, task_config = config.optimizers[name], config.tasks[task_name]
    task = tasks.build(task_config)
    runs = [(v, s) for v in entrant.values or (math.nan,) for s in range(config.seeds)]
    group, steps = min(config.group, len(runs)), task_config.steps // config.evaluations
    if task.world and steps % task.world.period:
        raise ConfigError(
            f"tasks.{task_name}.steps / {config.evaluations} evaluations must be a multiple "
            f"of {task.world.period}, the steps between two rollouts, got {steps}; pass e.g. "
            f"steps = {config.evaluations * -(-steps // task.world.period) * task.world.period}."
        )
    # The last group is padded to the same size, because another size would compile again.
    groups = [
        [runs[min(first + i, len(runs) - 1)] for i in range(group)]
        for first in range(0, len(runs), group)
    ]
    functions = program(task, task_config, entrant)

    losses, rates, compile_s = [], [], 0.0
    start = time.monotonic()
    for number, chosen in enumerate(groups):
        value, seed = (jnp.asarray(column) for column in zip(*chosen, strict=True))
        carry, batches = functions.init(seed, value)
        points = []
        for point in range(config.evaluations):
            first = point * steps
            window = jax.tree.map(lambda b: b[:, first : first + steps], batches)  # noqa: B023
            if number == point == 0:
                interval = functions.interval.lower(carry, window, seed, value, task.data).compile()
                evaluate = functions.evaluate.lower(carry, task.data).compile()
                compile_s, start = time.monotonic() - start, time.monotonic()
            carry, train_loss = interval(carry, window, seed, value, task.data)
            points.append((*evaluate(carry, task.data), train_loss))
            progress(steps * len(set(chosen)))
        points = jax.device_get(points)
        for i in range(len(set(chosen))):
            losses.append(
                [
                    (
                        float((test if task.test_loss else train)[i]),
                        float(train[i]),
                        float(error[i]),
                    )
                    for test, error, _, train in points
                ]
            )
            rates.append([{block: float(rate[i]) for block, rate in p[2].items()} for p in points])

    curves = np.reshape(losses, (-1, config.seeds, config.evaluations, 3))
    cell = {
        "specification": specification(config, task_name, name),
        "metric": task.metric,
        "test_loss": rounded(curves[..., 0]),
        "train_loss": rounded(curves[..., 1]),
        **({"test_error": rounded(curves[..., 2])} if task.test_error else {}),
        **({"ceiling": task.world.ceiling} if task.world else {}),
        "seconds_per_run": round((time.monotonic() - start) / (len(groups) * group), 3),
        "compile_seconds": round(compile_s, 2),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    if rates[0][0]:
        # Geometric means over the seeds, for the first value of a sweep.
        first_value = rates[: config.seeds]
        cell["rates"] = {
            block: rounded(geometric_mean([[p[block] for p in run] for run in first_value]))
            for block in rates[0][0]
        }
    return cell


def geometric_mean(values: Sequence[Any]) -> np.ndarray:
    """Takes the geometric mean over the first axis; NaN if a value is 0, as after a decay."""
    array = np.array(values)
    return np.exp(np.mean(np.log(np.where(array > 0, array, np.nan)), axis=0))


def rounded(array: np.ndarray) -> Any:
    """Converts an array to nested lists of numbers with five digits, or ``None`` if not finite."""
    if np.ndim(array) == 0:
        return float(f"{array:.5g}") if np.isfinite(array) else None
    return [rounded(row) for row in array]


def write_cells(workdir: Path, task: str, content: Mapping[str, Any]) -> None:
    """Writes the cells of a task, one per line, to make diffs readable."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(cell, allow_nan=False)}"
        for name, cell in sorted(content.items())
    ]
    write_whole(workdir / f"{task}.json", "{\n" + ",\n".join(lines) + "\n}\n")


def run(
    config: CompareConfig, *, redo: Sequence[str] = (), progress: bool = True
) -> dict[str, dict[str, Any]]:
    """Runs the missing cells of a comparison.

    Args:
      config: The comparison.
      redo: Optimizers to run again.
      progress: Whether to show a progress bar.

    Returns:
      All cells of the comparison, by task and optimizer.

    Raises:
      ConfigError: If an optimizer is invalid, or the folder holds other files.
      DataError: If the data are missing or damaged.
    """
    for name in redo:
        if name not in config.optimizers:
            raise ConfigError(
                f"redo must name optimizers of the comparison, got {name!r}; "
                f"{nearest(name, [*config.optimizers])}"
            )
    workdir = Path(config.workdir)
    make_folder(workdir)
    found = {task: read_cells(workdir, task) for task in config.tasks}
    missing = [
        (task, name)
        for task, name in cells(config)
        if name in redo
        or found[task].get(name, {}).get("specification") != specification(config, task, name)
    ]
    if not missing:
        kept = [found[task][name]["versions"].get("dartax") for task, name in cells(config)]
        print(
            f"All {len(kept)} results are in {workdir} already, of dartax "
            f"{', '.join(sorted({str(version) for version in kept}))}; nothing is run. To run them "
            "again, pass --redo with names, or another --workdir."
        )
    for name in {name for _, name in missing}:
        # Find invalid options now, not after hours of training.
        entrant = config.optimizers[name]
        overrides = {entrant.sweep: entrant.values[0]} if entrant.sweep else {}
        optimizers.build(entrant, steps=1, overrides=overrides)

    total = sum(
        config.tasks[task].steps * config.seeds * max(len(config.optimizers[name].values), 1)
        for task, name in missing
    )
    with tqdm(total=total, unit="step", unit_scale=True, disable=not progress) as bar:
        for task, name in missing:
            bar.set_description(f"{task}, {name}")
            cell = run_cell(config, task, name, bar.update)
            # Another process may have written other cells of the task in the meantime.
            found[task] = {**read_cells(workdir, task), name: cell}
            write_cells(workdir, task, found[task])
    wanted = set(cells(config))
    return {
        task: {name: cell for name, cell in content.items() if (task, name) in wanted}
        for task, content in found.items()
    }
