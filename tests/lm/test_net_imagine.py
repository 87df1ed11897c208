"""The rewritten imagination gives what the code gave before it was rewritten; see tests/net/README.md.

Some rows of some files are compared, since rows do not depend on each other; with KALM_NET=all every one of all."""

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kalm.core.domain import domain
from kalm.core.goals import Goal
from kalm.core.rollouts import IMAGINED, Rollouts
from kalm.lm.explain import caption, explain, meaning, round_trip
from kalm.lm.generate import Imagination, generate
from kalm.lm.imagine import imagine_filtered
from kalm.lm.model import KalmLM
from kalm.lm.parts import imagine_by_parts, parts_of
from kalm.lm.quality import perplexity, repair_unreal, replays
from kalm.lm.reading import GoalEncoder

NET = Path(__file__).parents[1] / "net"
STOPS = dict(goal="success", done="done", limit="limit")  # what they are called now
ALL = os.environ.get("KALM_NET") == "all"
ROWS = slice(None) if ALL else slice(6)
WALLS = dict(low=(-0.6, -0.3) * 5, high=(0.6, 0.7) * 5)  # the limits in which rollouts were repaired
LEVELS = ["imagined-offline", "imagined-rephrase", "imagined-easy", "imagined-hard"]


@pytest.fixture(scope="module")
def clevr():
    return domain("clevr")


@pytest.fixture(scope="module")
def lm():
    return KalmLM.grounded("clevr")


def task_of(d: dict) -> dict:
    names = {k: d[k] for k in ("source", "target", "direction") if k in d}
    parts = dict(parts=[task_of(p) for p in d["parts"]]) if "parts" in d else {}
    return dict(type=d["kind"], **names, **parts)


def goals_of(ds: list[dict]) -> list[Goal]:
    return [Goal(d["text"], d["level"], 1 if d["kind"] == "push" else 50, task_of(d)) for d in ds]


def stored(name: str):
    "Arrays and JSON of a topic."
    with np.load(NET / f"{name}.npz", allow_pickle=False) as z:
        arrays = {k: z[k] for k in z.files}
    return arrays, json.loads((NET / f"{name}.json").read_text())


def rollouts_of(z: dict, d: dict, lm: KalmLM) -> Rollouts:
    "Imagined rollouts as they are stored."
    actions = z["actions"].astype(np.int64)
    return Rollouts(
        z["states"],
        actions,
        z["rewards"],
        z["lengths"],
        success=z["success"],
        truncated=z["truncated"],
        goal=z["index"],
        source=np.full(len(actions), IMAGINED),
        goals=goals_of(d["goals"]),
        codec=lm.codec,
        domain="clevr",
    )


def settings_of(d: dict) -> Imagination:
    given = {k: v for k, v in d["settings"].items() if k not in ("taught", "tries")}
    return Imagination(**given | dict(stop=STOPS[given["stop"]]))


def agree(r: Rollouts, z: dict, head: str = "", share: float = 0.85) -> None:
    "The same rollouts: at least a share of them in every decision, and those to rounding."

    def was(name):
        return z[head + name][: len(r)]

    width = max(r.max_steps, was("actions").shape[1])
    mine, theirs = (np.pad(a, [(0, 0), (0, width - a.shape[1])]) for a in (r.actions, was("actions")))
    same = (mine == theirs).all(1) & (r.lengths == was("lengths")) & (r.success == was("success"))
    assert same.mean() >= share, f"{same.sum()} of {len(same)} rollouts are decided as before"
    steps = min(r.states.shape[1], was("states").shape[1])
    np.testing.assert_allclose(r.states[same, :steps], was("states")[same, :steps], atol=1e-5)
    np.testing.assert_allclose(r.rewards[same, : steps - 1], was("rewards")[same, : steps - 1], atol=2e-3)
    np.testing.assert_array_equal(r.truncated[same], was("truncated")[same])
    np.testing.assert_array_equal(r.goal, was("index"))
    assert (r.source == IMAGINED).all() and (r.seed == -1).all() and r.domain == "clevr"


KINDS = [f"imagined-rephrase-{kind}" for kind in ("done", "drawn", "limit", "rank")]


@pytest.mark.parametrize("name", [*LEVELS, *KINDS] if ALL else ["imagined-easy", "imagined-rephrase", *KINDS[:2]])
def test_imagined_rollouts(name, lm, clevr):
    z, d = stored(name)
    goals, index, starts = goals_of(d["goals"]), z["index"][ROWS], z["starts"][ROWS]
    agree(generate(lm, clevr, goals, index, starts, settings=settings_of(d)), z)


@pytest.mark.parametrize("name", LEVELS)
def test_replays_and_repairs(name, lm, clevr):
    z, d = stored(name)
    r = rollouts_of(z, d, lm)
    assert (replays(r, clevr) == z["replays"]).mean() > 0.9
    walled = copy.copy(clevr)
    walled.limits = replace(clevr.limits, **WALLS)
    fixed, counts = repair_unreal(r, walled)
    agree(fixed, z, "repaired_", 1.0)
    old = dict(d["repaired"])
    old["off_limits_steps"] = old.pop("off_table_steps")
    assert counts == old


@pytest.mark.parametrize("name", ["imagined-offline", "imagined-rephrase"][not ALL :])
def test_round_trips(name, lm, clevr):
    z, d = stored(name)
    passed, said = round_trip(lm, rollouts_of(z, d, lm)[ROWS], clevr.words)
    assert (passed == d["round_trip"]["passed"][ROWS]).mean() > 0.8 and alike(said, d["round_trip"]["said"][ROWS])


def test_filtered_rollouts(lm, clevr):
    z, d = stored("trusted-easy")
    rows = np.arange(24) if ALL else np.argsort(~z["passed"], kind="stable")[:4]
    goals, index, starts = goals_of(d["goals"]), z["index"][rows], z["starts"][rows]
    r, passed = imagine_filtered(lm, clevr, goals, index, starts, settings=replace(settings_of(d), tries=4))
    agree(r, {k: v[rows] for k, v in z.items()})
    said = round_trip(lm, r, clevr.words)[1]
    assert (passed == z["passed"][rows]).mean() > 0.7 and alike(said, [d["said"][b] for b in rows])


def test_parts(lm, clevr):
    z, d = stored("parts-hard")
    rows = np.argsort(z["lengths"], kind="stable")[: 16 if ALL else 3]  # the quickest first
    goals = goals_of(d["goals"])
    asked = [goals[i].text for i in z["index"][rows]]
    plans = parts_of(lm, clevr, asked)
    assert alike([[clevr.words.meaning(g) for g in plan] for plan in plans], [d["plans"][i] for i in z["index"][rows]])
    wanted = [[g["text"] for g in d["plan_goals"][i]] for i in z["index"][rows]]
    assert alike([[g.text for g in plan] for plan in plans], wanted)
    for head, stop in (("", "goal"), ("done_", "done"))[: 1 + ALL]:
        d["settings"]["stop"] = stop
        r = imagine_by_parts(lm, clevr, goals, z["index"][rows], z["starts"][rows], settings=settings_of(d))
        agree(r, {k: v[rows] for k, v in z.items()}, head, 0.8)


def alike(a: list, b: list) -> bool:
    "Most sentences are equal; floats of other processors may turn a few."
    assert len(a) == len(b)
    return np.mean([x == y for x, y in zip(a, b)]) > 0.8


def test_meanings_of_sentences(lm):
    _, d = stored("words")
    texts = [g["text"] for g in d["sentences"]]
    texts = texts if ALL else texts[::8]  # ten of each of four levels
    was = dict(zip([g["text"] for g in d["sentences"]], zip(d["understand"], d["understand_32"])))
    for k, most in enumerate((12, 32)):
        said = meaning(lm, texts, max_tokens=most)
        assert alike([m.words for m in said], [was[t][k] for t in texts]) and all(0 < m.sure <= 1 for m in said)


@pytest.mark.parametrize("name", ["imagined-offline", "imagined-easy"][not ALL :])
def test_words_about_rollouts(name, lm):
    _, d = stored("words")
    r = rollouts_of(*stored(name), lm)[ROWS]
    assert alike(explain(lm, r), d["explain"][name][ROWS])
    assert alike(explain(lm, r, short=True), d["explain_short"][name][ROWS])
    assert alike(caption(lm, r), d["describe"][name][ROWS])


def test_perplexity_and_vectors(lm):
    z, d = stored("words")
    assert perplexity(lm, texts=d["passages"]) == pytest.approx(d["perplexity_of_passages"], rel=1e-3)
    texts = [g["text"] for g in d["sentences"]][::10]
    np.testing.assert_allclose(GoalEncoder(lm).encode(texts), z["read"], atol=1e-4)
