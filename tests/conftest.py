"Shared by the tests: a cache of their own, a tiny language model, a clean way to run Python beside this one."

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it: no test asks a hub
os.environ.setdefault("TQDM_DISABLE", "1")

import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # for `worlds`


def python(*args: str, **env: str) -> subprocess.CompletedProcess:
    "Run this Python on `args` with the package importable."
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=path) | env
    )


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(session_cache, monkeypatch) -> Path:
    "kalm's cache, moved to a folder of this session: the tiny backbone is built there, nothing is downloaded."
    monkeypatch.setenv("KALM_CACHE", str(session_cache))
    return session_cache


@pytest.fixture
def single_precision(monkeypatch) -> None:
    "Policies trained with products of all digits, also where the processor has quicker ones of fewer."
    import torch

    import kalm.rl.train

    monkeypatch.setattr(kalm.rl.train, "fast_dtype", lambda device="cpu": torch.float32)
