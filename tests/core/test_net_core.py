"What the old code gave for the same inputs: the last steps of rollouts (see tests/net/README.md)."
import json
from pathlib import Path

import numpy as np
import pytest

from kalm.core.actions import DiscreteActions
from kalm.core.goals import Goal
from kalm.core.rollouts import Rollouts

FIELDS = ("states", "actions", "rewards", "lengths", "success", "truncated")
NET = Path(__file__).parents[1]/"net"


@pytest.fixture(scope="module")
def net():
    with np.load(NET/"policies.npz") as z:
        return dict(z), json.loads((NET/"policies.json").read_text())


def test_last_steps(net):
    arrays, about = net
    goals = [Goal(g["text"], task={k: g[k] for k in ("source", "target", "direction")}) for g in about["real_goals"]]
    real = {name: arrays[f"real_{name}"] for name in FIELDS}
    r = Rollouts(**real, goal=arrays["real_index"], goals=goals, codec=DiscreteActions(40))
    last = r.last(2)[:60]
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(last, name), arrays[f"last_{name}"], err_msg=name)
    assert last.texts == [goals[i].text for i in arrays["real_index"][:60]]
