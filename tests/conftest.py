"""What all tests share: where the goldens are, and that nothing leaks from one test into the next."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import goldens as adapter


@pytest.fixture(scope="session")
def goldens_root() -> Path:
    """The goldens' folder; without one, skip with a sentence, and fail where CI=true."""
    root = adapter.root()
    if root is None:
        message = "no goldens: set ATTNZOO_GOLDENS, or lay shared/goldens beside the checkout"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return root


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
