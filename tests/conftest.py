"""What every test shares: one thread, no network, one seed, and Hypothesis without deadlines."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports diffusers

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "tests", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
