"Shared by the tests: rollouts made without physics, a tiny language model, a clean way to run Python beside this one."
import os
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it: no test asks a hub
os.environ.setdefault("TQDM_DISABLE", "1")

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kalm.core import REAL, Rollouts, numpy_rng
from kalm.goals import Goal

ROOT = Path(__file__).parents[1]


def make_rollouts(n: int, goals: int = 1, steps: int = 4, seed: int = 0, source: int = REAL, least: int = 1) -> Rollouts:
    "Random rollouts of `least` to `steps` steps, tidily padded; the first has the full length."
    rng = numpy_rng(seed, "made up", source)
    lengths = rng.integers(least, steps + 1, n); lengths[:1] = steps
    mask = np.arange(steps) < lengths[:, None]
    states = rng.uniform(-.45, .45, (n, steps + 1, 10)) * np.concatenate([np.ones((n, 1), bool), mask], 1)[..., None]
    ended = rng.random(n) < .6; ended[:1] = True
    return Rollouts(states, np.where(mask, rng.integers(0, 40, (n, steps)), -1), rng.normal(size=(n, steps)) * mask, lengths,
                    terminated=ended, truncated=~ended, goal=np.arange(n) % goals, source=np.full(n, source))

def same_rollouts(a: Rollouts, b: Rollouts) -> bool:
    "Equal to the last bit and type."
    pairs = [(getattr(a, n), getattr(b, n)) for n in ("states", "actions", "rewards", "lengths", "terminated", "truncated", "goal", "source")]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)

def mute(goal: Goal) -> Goal:
    "`goal` robbed of its sentence, as only a program error could make it."
    copy = Goal(**vars(goal)); object.__setattr__(copy, "text", " ")
    return copy

def python(*args: str, **env: str) -> subprocess.CompletedProcess:
    "Run this Python on `args` with the package importable."
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=path) | env)


@pytest.fixture(scope="session")
def goals() -> list[Goal]:
    "Sentences of different lengths, of three kinds."
    return [Goal.move("red", "blue", "behind"), Goal.move("green", "cyan", "left", text="Could somebody see to it that green ends up on the left of cyan, please?"),
            Goal.push("purple", "front", text="Purple forward!"), Goal.gather("green")]

@pytest.fixture(scope="session")
def session_cache(tmp_path_factory) -> Path: return tmp_path_factory.mktemp("cache")

@pytest.fixture
def cache(session_cache, monkeypatch) -> Path:
    "kalm's cache, moved to a folder of this session: the tiny backbone is built there, nothing is downloaded."
    monkeypatch.setenv("KALM_CACHE", str(session_cache))
    return session_cache

@pytest.fixture
def tiny(cache):
    "A fresh tiny model."
    from kalm.embeddings import KalmLM
    return KalmLM.from_pretrained("tiny-random")

def liven(lm, seed: int = 0):
    "Give an untrained model an adapter that does something and heads whose answers depend on what they read."
    import torch
    from kalm.core import torch_rng
    from kalm.embeddings import Adapter
    lm.adapt(Adapter(rank=4)); g = torch_rng(seed, "liven")
    with torch.no_grad():
        for name, p in lm.own_parameters().items():
            if "lora_B" in name: p.copy_(.2 * torch.randn(p.shape, generator=g))
        lm.action_head.out.weight.mul_(30); lm.state_head.out.weight.mul_(5)
    return lm.eval()

@pytest.fixture
def lively(tiny): return liven(tiny)
