"""What exact tests share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def float64():
    """Tensors are float64 unless they say otherwise: batches, values and all."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
