import collections
import contextlib
import importlib.metadata
import io
import os
import urllib.request

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests spend their time compiling small programs, not running them. Until jaxlib 0.11 XLA could
# also emit kernels as it did before 2025, in half the time; what it does by default later releases
# test.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + (
        " --xla_cpu_use_fusion_emitters=false"
        if importlib.metadata.version("jaxlib").startswith(("0.7.", "0.8.", "0.9.", "0.10."))
        else ""
    ),
)
# On one device, as users do, but for the tests that test_eight_devices.py starts.
if "DARTAX_TEST_DEVICES" in os.environ:
    os.environ["XLA_FLAGS"] += (
        f" --xla_force_host_platform_device_count={os.environ['DARTAX_TEST_DEVICES']}"
    )
    # Where cores are few and busy, the devices wait for one another for longer than XLA's 40 seconds,
    # and it ends the process. Earlier releases refuse the flag.
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=600"

import jax
import pytest

# Not part of a run of all tests. test_eight_devices.py runs the first, .ci/matrix the others.
collect_ignore = ["eight_devices", "compiler", "clients"]

jax.config.update("jax_numpy_rank_promotion", "raise")
if not hasattr(jax, "enable_x64"):  # before JAX 0.8
    jax.enable_x64 = jax.experimental.enable_x64


@pytest.hookimpl(tryfirst=True)  # before pytest leaves the slow ones out
def pytest_collection_modifyitems(items):
    """Of a test with ``one_in(n)``, all variants but every n-th are slow."""
    variants = collections.Counter()
    for item in items:
        if thin := item.get_closest_marker("one_in"):
            name = item.nodeid.partition("[")[0]
            if variants[name] % thin.args[0]:
                item.add_marker(pytest.mark.slow)
            variants[name] += 1


@pytest.fixture(autouse=True, scope="session")
def _compile_once(tmp_path_factory):
    """Equal programs of different tests, and of the processes that they start, compile once."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Tests write where pytest cleans up, whatever relative paths they use."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def serve(monkeypatch):
    """Answers every download with the same bytes; returns the list of addresses asked for."""

    def serve(content):
        asked = []

        def urlopen(url, **_):
            asked.append(url)
            return contextlib.closing(io.BytesIO(content))

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return asked

    return serve


@pytest.fixture
def all_measured(monkeypatch):
    """No inner transform tells what it makes of white noise: ours and optax's are alike."""
    from dartax import _probe  # here, as XLA_FLAGS must be set before

    monkeypatch.setattr(_probe, "fusable", lambda inner: None)
