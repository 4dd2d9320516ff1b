"""DARTAX_TEST_DEVICES=8 python -m pytest tests/eight_devices runs these tests."""

import jax
import pytest


def pytest_collection_modifyitems(items):
    few = pytest.mark.skipif(
        jax.device_count() < 8, reason="eight devices are there with DARTAX_TEST_DEVICES=8"
    )
    for item in items:
        if "eight_devices" in item.path.parts:
            item.add_marker(pytest.mark.eight_devices)
            item.add_marker(few)
