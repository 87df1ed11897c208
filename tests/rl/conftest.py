"Numbers that are compared with stored ones, or with NumPy's, come from products in single precision."
import pytest
import torch

import kalm.rl.train


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    "Some processors have quicker products of fewer digits, which training uses."
    monkeypatch.setattr(kalm.rl.train, "fast_dtype", lambda device="cpu": torch.float32)
