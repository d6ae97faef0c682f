"""What every test shares: one thread, no network, one seed, and Hypothesis without deadlines."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports diffusers

from importlib.metadata import version

import pytest
import torch
from hypothesis import HealthCheck, settings

if tuple(map(int, version("diffusers").split(".")[:2])) < (0, 42):  # the zoo and its classes are those of 0.42
    collect_ignore = [
        "test_zoo.py", "test_conformance.py", "test_families.py", "test_checks.py", "test_diffusers_adapters.py",
        "test_inspection.py", "test_scheduler_classes.py",
    ]  # fmt: skip

torch.set_num_threads(1)
settings.register_profile(
    "tests", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
