"""Every test begins with the same random numbers and one thread."""

import pytest
import torch

collect_ignore = ["mlx", "vllm"]  # they need environments of their own: make test-mlx, make test-vllm


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # of tiny models, a second thread costs more than it gives


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch finds no GPU here"))
