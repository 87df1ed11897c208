"The rewritten imagination gives what the code gave before it was rewritten; see tests/net/README.md."
import json
from pathlib import Path

import numpy as np
import pytest

from kalm.core.domain import domain
from kalm.core.goals import Goal
from kalm.core.rollouts import IMAGINED, Rollouts
from kalm.lm.explain import GoalEncoder, caption, explain, meaning, round_trip
from kalm.lm.imagine import Imagination, generate, imagine_by_parts, imagine_filtered, parts_of
from kalm.lm.model import KalmLM
from kalm.lm.quality import perplexity, repair_unreal, replays

NET = Path(__file__).parents[1]/"net"
STOPS = dict(goal="success", done="done", limit="limit")   # what they are called now
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
    with np.load(NET/f"{name}.npz", allow_pickle=False) as z:
        arrays = {k: z[k] for k in z.files}
    return arrays, json.loads((NET/f"{name}.json").read_text())


def rollouts_of(z: dict, d: dict, lm: KalmLM) -> Rollouts:
    "Imagined rollouts as they are stored."
    actions = z["actions"].astype(np.int64)
    return Rollouts(z["states"], actions, z["rewards"], z["lengths"], success=z["success"], truncated=z["truncated"],
                    goal=z["index"], source=np.full(len(actions), IMAGINED), goals=goals_of(d["goals"]), codec=lm.codec,
                    domain="clevr")


def settings_of(d: dict) -> Imagination:
    given = {k: v for k, v in d["settings"].items() if k not in ("taught", "tries")}
    return Imagination(**given | dict(stop=STOPS[given["stop"]]))


def agree(r: Rollouts, z: dict, head: str = "", share: float = .9) -> None:
    "The same rollouts: at least a share of them in every decision, and those to rounding."
    def was(name):
        return z[head + name]
    width = max(r.max_steps, was("actions").shape[1])
    mine, theirs = (np.pad(a, [(0, 0), (0, width - a.shape[1])]) for a in (r.actions, was("actions")))
    same = (mine == theirs).all(1) & (r.lengths == was("lengths")) & (r.success == was("success"))
    assert same.mean() >= share, f"{same.sum()} of {len(same)} rollouts are decided as before"
    steps = min(r.states.shape[1], was("states").shape[1])
    np.testing.assert_allclose(r.states[same, :steps], was("states")[same, :steps], atol=1e-5)
    np.testing.assert_allclose(r.rewards[same, :steps - 1], was("rewards")[same, :steps - 1], atol=2e-3)
    np.testing.assert_array_equal(r.truncated[same], was("truncated")[same])
    np.testing.assert_array_equal(r.goal, was("index"))
    assert (r.source == IMAGINED).all() and (r.seed == -1).all() and r.domain == "clevr"


@pytest.mark.parametrize("name", [*LEVELS, *(f"imagined-rephrase-{kind}" for kind in ("done", "drawn", "limit", "rank"))])
def test_imagined_rollouts(name, lm, clevr):
    z, d = stored(name)
    agree(generate(lm, clevr, goals_of(d["goals"]), z["index"], z["starts"], settings=settings_of(d)), z)


@pytest.mark.parametrize("name", LEVELS)
def test_replays_and_repairs(name, lm, clevr):
    z, d = stored(name)
    r = rollouts_of(z, d, lm)
    assert (replays(r, clevr) == z["replays"]).mean() > .9
    fixed, counts = repair_unreal(r, clevr)
    agree(fixed, z, "repaired_", 1.)
    old = dict(d["repaired"])
    old["off_limits_steps"] = old.pop("off_table_steps")
    assert counts == old


@pytest.mark.parametrize("name", ["imagined-offline", "imagined-rephrase"])
def test_round_trips(name, lm, clevr):
    z, d = stored(name)
    passed, said = round_trip(lm, rollouts_of(z, d, lm), clevr.words)
    assert (passed == d["round_trip"]["passed"]).mean() > .9 and alike(said, d["round_trip"]["said"])


def test_filtered_rollouts(lm, clevr):
    z, d = stored("trusted-easy")
    r, passed = imagine_filtered(lm, clevr, goals_of(d["goals"]), z["index"], z["starts"], settings=settings_of(d), tries=4)
    agree(r, z)
    assert (passed == z["passed"]).mean() > .9 and alike(round_trip(lm, r, clevr.words)[1], d["said"])


def test_parts(lm, clevr):
    z, d = stored("parts-hard")
    goals = goals_of(d["goals"])
    plans = parts_of(lm, clevr, [g.text for g in goals])
    assert alike([[clevr.words.meaning(g) for g in plan] for plan in plans], d["plans"])
    assert alike([[g.text for g in plan] for plan in plans], [[g["text"] for g in plan] for plan in d["plan_goals"]])
    settings = settings_of(d)
    agree(imagine_by_parts(lm, clevr, goals, z["index"], z["starts"], settings=settings), z)
    d["settings"]["stop"] = "done"
    agree(imagine_by_parts(lm, clevr, goals, z["index"], z["starts"], settings=settings_of(d)), z, "done_")


def alike(a: list, b: list) -> bool:
    "Most sentences are equal; floats of other processors may turn a few."
    assert len(a) == len(b)
    return np.mean([x == y for x, y in zip(a, b)]) > .9


def test_meanings_of_sentences(lm):
    _, d = stored("words")
    texts = [g["text"] for g in d["sentences"]]
    short, long = meaning(lm, texts), meaning(lm, texts, max_tokens=32)
    assert alike([m.words for m in short], d["understand"]) and alike([m.words for m in long], d["understand_32"])
    assert all(0 < m.sure <= 1 for m in short)


@pytest.mark.parametrize("name", ["imagined-offline", "imagined-easy"])
def test_words_about_rollouts(name, lm):
    _, d = stored("words")
    r = rollouts_of(*stored(name), lm)
    assert alike(explain(lm, r), d["explain"][name])
    assert alike(explain(lm, r, short=True), d["explain_short"][name])
    assert alike(caption(lm, r), d["describe"][name])


def test_perplexity_and_vectors(lm):
    z, d = stored("words")
    assert perplexity(lm, texts=d["passages"], most=8) == pytest.approx(d["perplexity_of_passages"], rel=1e-3)
    texts = [g["text"] for g in d["sentences"]][::10]
    np.testing.assert_allclose(GoalEncoder(lm).encode(texts), z["read"], atol=1e-4)
