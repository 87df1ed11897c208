"Physics, success and rewards are those of the code before the library was rebuilt: tests/net/physics."
import json
from pathlib import Path

import numpy as np
import pytest

from kalm.clevr.goals import all_of, gather, line_up, move, push, reward_rows, success_rows
from kalm.clevr.physics import ClevrSimulator, Physics, physics_of, states_of

NET = Path(__file__).resolve().parents[1]/"net"
FIRST = 4   # steps before rounding, which differs between processors, can grow where balls collide


@pytest.fixture(scope="module")
def net():
    with np.load(NET/"physics.npz", allow_pickle=False) as f:
        return {k: f[k] for k in f}


def goal_of(d):
    "A goal as the old code stored it."
    if d["kind"] == "all":
        return all_of([goal_of(part) for part in d["parts"]], d["text"], d["level"])
    makers = {"move": move, "push": push, "line_up": line_up, "gather": gather}
    words = [d[field] for field in ("source", "target", "direction") if field in d]
    return makers[d["kind"]](*words, text=d["text"], level=d["level"])


@pytest.fixture(scope="module")
def goals():
    return [goal_of(d) for d in json.loads((NET/"physics.json").read_text())["goals"]]


def assert_close(states, want):
    "The first steps agree; of later ones nearly all."
    np.testing.assert_allclose(states[:, :FIRST + 1], want[:, :FIRST + 1], rtol=0, atol=1e-5)
    far = np.abs(states - want).max((1, 2)) > 1e-5
    assert far.mean() < .1


def test_states(net):
    engine, physics = Physics(1), physics_of(net["starts"])
    states = [states_of(physics)]
    for actions in net["actions"].T:
        physics = engine.step(physics, actions.astype(int))
        states.append(states_of(physics))
    assert_close(np.stack(states, 1), net["states"])


def test_full_physics(net):
    engine, physics = Physics(1), physics_of(net["starts"][:8])
    for t, want in enumerate(net["full_physics"]):
        np.testing.assert_allclose(physics, want, rtol=0, atol=1e-5)
        physics = engine.step(physics, net["actions"][:8, t].astype(int))


def test_rows_that_end_early_are_left_alone(net, goals):
    actions = net["early_actions"]
    simulator = ClevrSimulator(goals, net["index"][0].astype(int), net["starts"], threads=1)
    states = [simulator.states]
    for t in range(actions.shape[1]):
        live = np.flatnonzero(actions[:, t] >= 0)
        if len(live):
            simulator.step(live, actions[live, t].astype(int))
        states.append(simulator.states)
    assert_close(np.stack(states, 1), net["early_states"])


def test_success_and_rewards_along_rollouts(net, goals):
    states, start = net["states"], net["starts"]
    assert net["success"].any(axis=(1, 2)).all()
    for index, held, paid in zip(net["index"].astype(int), net["success"], net["reward"]):
        np.testing.assert_array_equal(success_rows(goals, index, states, start), held)
        np.testing.assert_allclose(reward_rows(goals, index, states[:, :-1], states[:, 1:], start), paid, atol=1e-5)


def test_success_and_rewards_in_states_that_fulfil_goals(net, goals):
    layouts, starts = net["layouts"], net["layout_starts"]
    assert net["layout_success"].sum() > 30
    for i, (held, paid) in enumerate(zip(net["layout_success"], net["layout_reward"])):
        index = np.full(len(layouts), i)
        np.testing.assert_array_equal(success_rows(goals, index, layouts, starts), held)
        np.testing.assert_allclose(reward_rows(goals, index, starts, layouts, starts), paid, atol=1e-5)
