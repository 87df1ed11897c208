"Words and copies are those of the code before the move, as stored in tests/net."
import json
from pathlib import Path

import numpy as np
import pytest

from kalm.clevr.domain import CLEVR, symmetries
from kalm.clevr.goals import push
from kalm.core.rollouts import Rollouts

NET = Path(__file__).parents[1]/"net"
WORDS = CLEVR.words
pytestmark = pytest.mark.skipif(not (NET/"words.npz").exists(), reason="the regression net is not here")


def stored(name):
    "Lists and arrays of one topic."
    return json.loads((NET/f"{name}.json").read_text()), np.load(NET/f"{name}.npz", allow_pickle=False)


def test_captions_and_questions():
    said, arrays = stored("words")
    with arrays:
        before, after = arrays["before"], arrays["after"]
    assert [WORDS.caption(a, b) for a, b in zip(before, after)] == said["motions"]
    assert [[list(pair) for pair in WORDS.questions(a)] for a in before] == said["relations"]


def test_captions_of_pushes_are_judged_alike():
    about, arrays = stored("trusted-easy")
    with arrays:
        goals = [about["goals"][i] for i in arrays["index"]]
    goals = [push(goal["source"], goal["direction"], text=goal["text"]) for goal in goals]
    assert {WORDS.checked_by(goal) for goal in goals} == {"caption"}
    agreed = [WORDS.agree(WORDS.read(goal.text), said) for goal, said in zip(goals, about["said"])]
    assert agreed == about["passed_again"] and len(set(agreed)) == 2


def test_copies():
    _, arrays = stored("policies")
    fields = ("actions", "rewards", "lengths", "success", "truncated")
    with arrays as z:
        whole = Rollouts(z["real_states"], **{k: z[f"real_{k}"] for k in fields}, goal=z["whole_index"],
                         goals=CLEVR.goals("offline"))
        want = {k: z[f"symmetric_{k}"] for k in ("states", *fields, "index")}
    copies = symmetries(whole.last(2), 60, seed=0)
    np.testing.assert_array_equal(copies.goal, want.pop("index"))
    for name, value in want.items():
        np.testing.assert_allclose(getattr(copies, name), value, atol=1e-6, err_msg=name)
