import dataclasses
import gzip
import hashlib
import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_folders import rows_of

import dartax
from dartax.experiments import cli, data, devices, optimizers, plots
from dartax.experiments import config as config_lib
from dartax.experiments.config import Config, ConfigError, ModelConfig, OptimizerConfig
from dartax.experiments.run_folder import read_metrics
from dartax.experiments.train import train_and_evaluate

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = ["--epochs", "4", "--model.hidden", "16", "--log-steps", "10", "--seed", "5", "--mesh", "1"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configs_load_and_build(path):
    config = config_lib.load(path)
    optimizers.build(config.optimizer, steps=10)
    assert config.workdir == f"runs/{path.stem}"


def test_config_survives_saving(tmp_path):
    config = Config(
        model=ModelConfig(hidden=(3, 4)), optimizer=OptimizerConfig(options={"init_rate": 1e-4})
    )
    config_lib.save(config, tmp_path / "config.toml")
    assert config_lib.load(tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        (OptimizerConfig(options={"int_rate": 1.0}), "int_rate is not an option of dart; did you mean 'init_rate'?"),
        (OptimizerConfig(options={"blocks": 2.0}), "blocks is not an option of dart"),
        (OptimizerConfig(options={"init_rate": 2.0}), "init_rate must be below rate_budget"),
        (OptimizerConfig(name="paper_dart", options={"min_rate": 1.0}), "min_rate must be below rate_budget"),
        (OptimizerConfig(name="adamw", inner="lion"), "optimizer.inner must be left out under adamw"),
        (OptimizerConfig(name="adamw", blocks="channel"), "optimizer.blocks must be left out under adamw"),
        (OptimizerConfig(name="paper_dart", blocks="element"), "blocks must be one of 'tensor', a tree"),
        (OptimizerConfig(options={"init_rate": 0.5}), "init_rate must be below 0.16"),
    ],
)  # fmt: skip
def test_bad_optimizer_configs(optimizer, match):
    with pytest.raises(ConfigError, match=match):
        train_and_evaluate(Config(optimizer=optimizer))
    assert not Path("runs").exists(), "a run that cannot be made leaves nothing behind"


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dartax {dartax.__version__}\n"


def test_command_line_messages(capsys, tmp_path):
    assert cli.main(["train"]) == 2
    assert "train must be followed by CONFIG, a TOML file, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    assert "--batch-size" in capsys.readouterr().out
    assert cli.main(["plot", "nowhere"]) == 2
    assert "RUN must be a run folder with a metrics.csv" in capsys.readouterr().err
    (tmp_path / "metrics.csv").write_text("step,rate\n1,2\nnonsense\n")
    assert cli.main(["plot", str(tmp_path)]) == 2
    assert (
        "metrics.csv must hold a number in every cell, got something else at line 3"
        in capsys.readouterr().err
    )
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cli.main(["train", str(CONFIGS / "digits.toml"), "--workdir", str(blocked / "a")]) == 2
    assert "workdir must be a writable folder" in capsys.readouterr().err


def test_train_leaves_a_run_folder(capsys):
    arguments = ["train", str(CONFIGS / "digits.toml"), *SMALL, "--workdir", "runs/a"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "test accuracy" in out
    assert "Dense_0/kernel" in out
    summary = json.loads(Path("runs/a/summary.json").read_text())
    assert summary["steps"] == 4 * 22
    assert summary["epochs"] == 4
    assert summary["wall_s"] > 0
    assert summary["versions"]["jax"] == jax.__version__
    assert 0 < summary["test_accuracy"] <= 1
    rows = read_metrics(Path("runs/a/metrics.csv"))
    assert [row["step"] for row in rows] == [10, 20, 22, 32, 42, 44, 54, 64, 66, 76, 86, 88]
    assert [row["epoch"] for row in rows if row["test_loss"] is not None] == [1, 2, 3, 4]
    assert rows[-1]["test_loss"] == summary["test_loss"]
    # The last step of the linear decay still has a rate, and every block has its own.
    last = [rows[-1][f"rate/Dense_{i}/{leaf}"] for i in (0, 1) for leaf in ("bias", "kernel")]
    assert len(set(last)) == 4
    assert rows[-1]["rate"] == pytest.approx(np.mean(last))
    assert all(0 < rate < max(row["rate"] or 0 for row in rows) for rate in last)
    saved = config_lib.load("runs/a/config.toml")
    assert (saved.epochs, saved.seed, saved.model.hidden) == (4, 5, (16,))
    for name in ("loss", "learning_rates", "concentrations"):
        assert Path(f"runs/a/plots/{name}.png").read_bytes().startswith(b"\x89PNG")

    # Again: nothing is trained, and the same result is told.
    before = Path("runs/a/metrics.csv").stat().st_mtime_ns
    assert cli.main(arguments) == 0
    told = "runs/a is finished; nothing was run. For a new run pass another --workdir.\n"
    assert capsys.readouterr().out == told + out
    assert Path("runs/a/metrics.csv").stat().st_mtime_ns == before

    # Another configuration does not overwrite it.
    assert cli.main([*arguments, "--epochs", "5"]) == 2
    assert "with another (epochs 4 there, 5 here)" in capsys.readouterr().err

    # All pictures can be drawn.
    shutil.rmtree("runs/a/plots")
    assert cli.main(["plot", "runs/a"]) == 0
    assert capsys.readouterr().out.split() == [
        f"runs/a/plots/{name}.png" for name in plots.PICTURES
    ]
    # The rows are the metrics of the last state.
    assert all(0 < row["spent"] < 1 for row in rows)
    assert [row["multiplier"] for row in rows] == pytest.approx(
        [1 - (row["step"] - 1) / 88 for row in rows], rel=1e-4
    )
    assert {(row["skipped"], row["min_rate"], row["rate_budget"]) for row in rows} == {(0, 0, 1)}
    blocks = [name for name in rows[-1] if name.startswith("concentration/")]
    assert sum(rows[-1][name] for name in blocks) / rows[-1][
        "concentration_total"
    ] == pytest.approx(rows[-1]["spent"])


def test_baselines_have_no_rate_columns():
    config = Config(
        epochs=1,
        model=ModelConfig(hidden=()),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3, schedule="cosine"),
    )
    train_and_evaluate(config, progress=False)
    assert read_metrics(Path("runs/digits/metrics.csv"))[-1]["rate"] is None
    assert [path.name for path in Path("runs/digits/plots").iterdir()] == ["loss.png"]


def small_config(workdir, epochs=4):
    return Config(
        epochs=epochs,
        workdir=str(workdir),
        checkpoint_seconds=0.0,
        mesh=(1,),
        model=ModelConfig(hidden=(16,)),
    )


@pytest.mark.skipif(jax.device_count() < 8, reason="XLA_FLAGS were set to fewer than eight devices")
def test_a_mesh_ends_where_one_device_ends_and_takes_over_its_run():
    one = small_config("runs/one")
    train_and_evaluate(one, progress=False)
    for mesh in ((8,), (2, 4)):
        workdir = f"runs/{len(mesh)}"
        config = dataclasses.replace(one, workdir=workdir, mesh=mesh)
        summary = train_and_evaluate(config, progress=False)
        assert summary["mesh"] == [*mesh, 1][:2]
        for row, expected in zip(rows_of(workdir), rows_of("runs/one"), strict=True):
            for name, cell in expected.items():
                assert bool(row[name]) == bool(cell)
                if cell:
                    # Rounding parts the runs further with every step.
                    assert float(row[name]) == pytest.approx(float(cell), rel=1e-2, abs=1e-5), name
    # The checkpoint of eight devices goes on, on one.
    Path("runs/2/summary.json").unlink()
    summary = train_and_evaluate(dataclasses.replace(one, workdir="runs/2"), progress=False)
    assert summary["mesh"] == [1, 1]


@pytest.mark.skipif(jax.device_count() < 8, reason="XLA_FLAGS were set to fewer than eight devices")
@pytest.mark.parametrize(
    ("mesh", "batch_size", "match"),
    [
        ((3, 3), 64, r"mesh must have at most the 8 devices that JAX finds, got \[3, 3\]; pass e.g. --mesh 8"),
        ((6,), 64, "batch_size must be a multiple of the 6 devices of the data axis, got 64; pass --batch-size 60"),
        ((0,), 64, r"mesh must hold one or two numbers of devices, each at least 1, got \[0\]"),
        ((2, 2, 2), 64, r"mesh must hold one or two numbers of devices, each at least 1, got \[2, 2, 2\]"),
    ],
)  # fmt: skip
def test_bad_mesh(mesh, batch_size, match):
    with pytest.raises(ConfigError, match=match):
        devices.make_mesh(Config(mesh=mesh).mesh, batch_size)


def test_all_devices_are_used_that_divide_a_batch():
    assert devices.make_mesh((), 8 * 5).size == jax.device_count()
    assert devices.make_mesh((), 1).size == 1


@pytest.mark.parametrize("name", list(optimizers.FACTORY))
def test_state_lies_where_its_parameters_lie(name):
    params = jax.eval_shape(lambda: {"kernel": jnp.zeros((4, 8)), "bias": jnp.zeros(8)})
    optimizer = optimizers.build(OptimizerConfig(name=name), steps=10)
    state = jax.eval_shape(optimizer.init, params)
    mesh = devices.make_mesh((1, min(2, jax.device_count())), 1)
    where, state_where = devices.state_shardings(mesh, optimizer, params, state)
    assert where["kernel"].spec == jax.P(None, devices.MODEL)
    state = jax.jit(
        lambda: optimizer.init(jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)),
        out_shardings=state_where,
    )()
    for leaf in jax.tree.leaves(state):
        expected = jax.P(*[None] * (leaf.ndim - 1), devices.MODEL)
        split = leaf.shape in ((4, 8), (8,))
        assert leaf.sharding.spec == (expected if split else jax.P()), (leaf.shape, leaf.sharding)


def test_digits():
    digits = data.load("digits")
    assert digits.train_x.shape == (1438, 64)
    assert digits.test_x.shape == (359, 64)
    assert digits.train_x.dtype == np.float32
    assert digits.train_y.dtype == np.int32
    assert abs(digits.train_x.mean()) < 1e-5
    assert abs(digits.train_x.std() - 1) < 1e-4


@pytest.mark.skipif(
    not (data.data_dir() / "mnist").exists(), reason="MNIST is not in $DARTAX_DATA_DIR"
)
def test_mnist():
    mnist = data.load("mnist")
    assert mnist.train_x.shape == (60_000, 784)
    assert mnist.test_x.shape == (10_000, 784)
    np.testing.assert_array_equal(mnist.train_y[:5], [5, 0, 4, 1, 9])
    np.testing.assert_array_equal(np.bincount(mnist.test_y)[:3], [980, 1135, 1032])
    assert abs(mnist.train_x.mean()) < 1e-4


def test_missing_mnist_without_a_network(monkeypatch, tmp_path, capsys):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setenv("DARTAX_DATA_DIR", str(tmp_path / "data"))
    assert cli.main(["train", str(CONFIGS / "mnist.toml")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "or downloadable, got neither (<urlopen error no route to host>)" in message
    assert "set DARTAX_DATA_DIR to a folder that holds mnist/train-images-idx3-ubyte.gz" in message


def test_damaged_mnist(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "mnist"
    folder.mkdir()
    monkeypatch.setenv("DARTAX_DATA_DIR", str(tmp_path))
    whole = gzip.compress(b"\0\0\x08\x01" + bytes(1000))
    for content, match in (
        (whole[:-10], "must be a complete, readable file"),
        (b"not gzip", "must be a complete, readable file"),
        (whole, "must be the published MNIST file, got 1,004 bytes"),
    ):
        (folder / "train-images-idx3-ubyte.gz").write_bytes(content)
        assert cli.main(["train", str(CONFIGS / "mnist.toml")]) == 2
        message = capsys.readouterr().err
        assert match in message
        assert "delete it and run again" in message


def test_downloads_are_kept_and_checked(monkeypatch, tmp_path, serve):
    raw = b"\0\0\x08\1" + np.array([3], ">u4").tobytes() + bytes(range(3))
    asked = serve(gzip.compress(raw))
    monkeypatch.setenv("DARTAX_DATA_DIR", str(tmp_path))
    with pytest.raises(data.DataError, match="train-images-idx3-ubyte.gz must be the published MNIST file, got different content; try again, or set DARTAX_DATA_DIR"):  # fmt: skip
        data.load("mnist")
    assert asked == [data.MNIST_URL + "train-images-idx3-ubyte.gz"]
    assert not list((tmp_path / "mnist").iterdir())

    for name in data.MNIST_SHA256:
        monkeypatch.setitem(data.MNIST_SHA256, name, hashlib.sha256(raw).hexdigest())
    for _ in range(2):
        np.testing.assert_array_equal(data.load("mnist").test_y, range(3))
    assert asked[1:] == [f"{data.MNIST_URL}{name}.gz" for name in data.MNIST_SHA256]
    assert {path.name: path.read_bytes() for path in (tmp_path / "mnist").iterdir()} == dict.fromkeys(data.MNIST_SHA256, raw)  # fmt: skip


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(bytes(1000))[:-10]], ids=["not gzip", "cut short"]
)
def test_downloads_that_cannot_be_read(content, monkeypatch, tmp_path, serve, capsys):
    serve(content)
    monkeypatch.setenv("DARTAX_DATA_DIR", str(tmp_path))
    assert cli.main(["train", str(CONFIGS / "mnist.toml")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "set DARTAX_DATA_DIR to a folder that holds mnist/train-images" in message
    assert not list((tmp_path / "mnist").iterdir())


def test_plot_of_many_blocks(tmp_path):
    names = [f"Layer_{i}/kernel" for i in range(40)]
    columns = ["step", "train_loss", "test_loss", "test_accuracy"]
    columns += [f"{c}/{n}" for c in ("expected_rate", "rate_std", "concentration") for n in names]
    with (tmp_path / "metrics.csv").open("w") as file:
        file.write(",".join(columns) + "\n")
        for step in (1, 2, 3):
            file.write(",".join([str(step), "1.0", "", ""] + ["0.1"] * (len(columns) - 4)) + "\n")
    # A run of an older version, without what the other pictures need.
    assert [path.stem for path in plots.draw(tmp_path)] == [
        "loss",
        "learning_rates",
        "concentrations",
        "heatmap",
        "simplex",
    ]
