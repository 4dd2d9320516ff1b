import contextlib
import io
import os
import urllib.request

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests spend their time compiling small programs, not running them; those of
# test_devices.py need eight devices.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8",
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
if not hasattr(jax, "enable_x64"):  # before JAX 0.8
    jax.enable_x64 = jax.experimental.enable_x64


@pytest.fixture(autouse=True, scope="session")
def _compile_once(tmp_path_factory):
    """Equal programs of different tests compile once."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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
