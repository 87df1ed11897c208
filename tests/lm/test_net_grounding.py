"Batches and training give what the code gave before it was rewritten; see tests/net/README.md, part `grounding`."

import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

import kalm.lm.examples as examples_module
from kalm.clevr.domain import CLEVR
from kalm.core.domain import codec_of
from kalm.core.goals import Goal
from kalm.core.rollouts import Rollouts
from kalm.lm.examples import Examples
from kalm.lm.ground import Progress, ground, prepare
from kalm.lm.model import Adapter, KalmLM, Normaliser
from kalm.lm.sequences import ACT, DONE, JUMP, STEP, WORD, prompts_of
from kalm.lm.settings import TASKS, GroundConfig, TaskWeights

NET = Path(__file__).parents[1] / "net"
SAME = (
    "backbone",
    "steps",
    "batch_tokens",
    "lr",
    "head_lr",
    "warmup",
    "weight_decay",
    "clip",
    "start",
    "compose",
    "width",
    "text_weight",
    "negatives",
    "scratch",
    "max_length",
    "bf16",
    "checkpoint_every",
    "log_every",
    "seed",
)
RENAMED = dict(branches="share", unrewarded_weight="idle_credit", keyword_weight="key_weight", meanings="gist")
COLUMNS = ["loss", "action", "state", "text", "consequence", "action_accuracy", "tokens", "epoch", "batch"]


@pytest.fixture(scope="module")
def arrays() -> dict:
    with np.load(NET / "grounding.npz", allow_pickle=False) as z:
        return {k: z[k] for k in z.files}


@pytest.fixture(scope="module")
def about() -> dict:
    return json.loads((NET / "grounding.json").read_text())


@pytest.fixture(scope="module")
def data(arrays, about) -> Rollouts:
    goals = [
        Goal(
            g["text"],
            g["level"],
            50,
            dict(type=g["kind"], source=g["source"], target=g["target"], direction=g["direction"]),
        )
        for g in about["goals"]
    ]
    own = ("states", "rewards", "lengths", "success", "truncated")
    return Rollouts(
        **{name: arrays[name] for name in own},
        actions=arrays["actions"].astype(np.int64),
        goal=arrays["index"],
        goals=goals,
        codec=codec_of(CLEVR),
        domain="clevr",
    )


def settings(old: dict) -> GroundConfig:
    "Today's settings for those of the old code."
    adapter = Adapter(old["adapter"]["rank"], old["adapter"]["alpha"])
    renamed = {new: old[name] for new, name in RENAMED.items()}
    return GroundConfig(
        **{name: old[name] for name in SAME},
        **renamed,
        adapter=adapter,
        task_weights=TaskWeights(**dict(zip(TASKS, old["mix"]))),
    )


def model(backbone: str) -> KalmLM:
    return KalmLM.from_pretrained(
        backbone,
        state_dim=10,
        codec=codec_of(CLEVR),
        features=CLEVR.features,
        prompts=prompts_of(CLEVR.words),
        domain="clevr",
    )


def old_columns(batch: dict) -> dict:
    "A batch in the columns that the old code had."
    b = {name: value.numpy() for name, value in batch.items()}
    ask, answer = b["ask"], b["answer"]
    same = ("kind", "ids", "branch", "position", "tree", "known", "states", "target", "candidates")
    return {name: b[name] for name in same} | dict(
        action=np.where(ask == ACT, answer, np.where(ask == DONE, 40, -1)),
        text=np.where(ask == WORD, answer, -1),
        span=np.where(ask == STEP, 1, np.where(ask == JUMP, 2, 0)),
        credit=b["weight"],
        weight=b["log_count"],
    )


def assert_same_batch(batch: dict, arrays: dict, head: str) -> None:
    got = old_columns(batch)
    want = {name[len(head) :]: value for name, value in arrays.items() if name.startswith(head)}
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_batches_of_the_tiny_settings(cache, data, arrays, about):
    assert_same_batch(
        Examples(model("tiny-random"), data, CLEVR.words, settings(about["tiny"])).at((0, 0)), arrays, "tiny_batch_"
    )


def test_plan_and_batches_of_the_shipped_settings(data, arrays, about):
    config = settings(about["ours"])
    lm = model(config.backbone)
    ex = Examples(lm, data, CLEVR.words, config, corpus=about["corpus"])
    assert_same_batch(ex.at((0, 0)), arrays, "own_batch_")
    plan = [
        (i, j, who, p.task, first)
        for i, batch in enumerate(ex.plan(0))
        for j, p in enumerate(batch)
        for who, first in p.rows.tolist()
    ]
    np.testing.assert_array_equal(plan, arrays["own_plan"])
    if platform.python_version() == "3.11.7":  # whose manual the other batch reads
        assert_same_batch(Examples(lm, data, CLEVR.words, config).at((0, 0)), arrays, "batch_")


def summary(p: torch.Tensor) -> list[float]:
    x = p.detach().double().flatten()
    return [float(x.mean()), float(x.std(correction=0)), *x[:4].tolist()]


@pytest.mark.parametrize("name", ["tiny", "mixed"])
def test_losses_step_by_step_and_final_weights(name, cache, data, arrays, about, monkeypatch, tmp_path):
    monkeypatch.setattr(examples_module, "ordinary_text", lambda: about["corpus"])
    rows, losses = [], Progress.losses

    def spy(progress):
        value, count = torch.stack(progress.pending).unbind(1)
        mean = ((value * count).sum(0) / count.sum(0).clamp(min=1)).tolist()
        rows.append([*mean, progress.tokens, progress.position[0], progress.position[1] - 1])
        return losses(progress)

    monkeypatch.setattr(Progress, "losses", spy)
    lm = ground(CLEVR, data, settings(about[name]), out=tmp_path)
    old = arrays["losses" if name == "tiny" else "mixed_losses"]
    want = old[:, [about["columns"].index(c) for c in COLUMNS]]
    np.testing.assert_array_equal(np.array(rows)[:, -3:], want[:, -3:])  # tokens and batches
    np.testing.assert_allclose(rows, want, rtol=1e-4, atol=1e-6)
    weights = about["weights" if name == "tiny" else "mixed_weights"]
    own = lm.own_parameters()
    assert {n: list(p.shape) for n, p in own.items()} == {n: w["shape"] for n, w in weights.items()}
    for n, w in weights.items():
        np.testing.assert_allclose(summary(own[n]), [w["mean"], w["std"], *w["first"]], rtol=1e-3, atol=1e-4, err_msg=n)


def test_scales_of_states(cache, data, about):
    old = about["normaliser"]
    want = Normaliser(tuple(old["mean"]), tuple(old["std"]), old["step"], old["jump"])
    assert prepare(CLEVR, data, settings(about["tiny"])).normaliser == want
