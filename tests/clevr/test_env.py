"The environment: Gymnasium's contract, the published physics, starts, batched = single, bad input, pictures."
import os
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import kalm  # noqa: F401, registers the environments
from kalm.clevr import env as E
from kalm.clevr import physics as P
from kalm.clevr import render as V
from kalm.clevr.goals import COLOURS, COMPASS, all_of, gather, line_up, move, push, reward_rows, success, success_rows
from kalm.clevr.sentences import goal_set
from kalm.core.gl import can_render
from kalm.core.goals import Goal

ID = "kalm/ClevrRobot-v0"
GOLDEN = Path(__file__).resolve().parents[3]/"shared/golden/clevr_transitions.npz"
STATE = np.float32([-.3, .1, 0, .1, .3, .1, -.15, .4, .15, .4])
GOALS = [move("red", "blue", "behind"), push("cyan", "left"), gather("green"), line_up(),
         all_of([move("red", "blue", "left"), move("green", "cyan", "front")])]


def make(**kw):
    return gym.make(ID, **kw)


def make_vec(n, **kw):
    return gym.make_vec(ID, num_envs=n, vectorization_mode="vector_entry_point", **kw)


def type_of(goal):
    return goal.task["type"] if goal else "default"


@pytest.fixture(scope="module")
def gold():
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is not here: published transitions are not ours to ship")
    with np.load(GOLDEN, allow_pickle=False) as f:
        return {k: f[k] for k in f}


@pytest.fixture
def gl():
    if not can_render():
        pytest.skip("no OpenGL here")


# --- Gymnasium's contract

@pytest.mark.parametrize("goal", [None, GOALS[0], GOALS[2], GOALS[3], GOALS[4]], ids=type_of)
def test_check_env_has_nothing_to_say(goal):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(goal=goal).unwrapped, skip_render_check=True)


@pytest.mark.usefixtures("gl")
def test_check_env_with_pictures():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(render_mode="rgb_array").unwrapped)


def test_spaces():
    e, v = make(), make_vec(3)
    assert e.observation_space.shape == (10,) and e.observation_space.dtype == np.float32 and e.action_space.n == 40
    assert np.isfinite(e.observation_space.low).all() and np.isfinite(e.observation_space.high).all()
    assert v.single_observation_space == e.observation_space and v.observation_space.shape == (3, 10)
    assert v.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP


def test_same_seed_same_episode_other_seed_other_episode():
    def play(seed):
        e = make()
        return np.stack([e.reset(seed=seed)[0]] + [e.step(a)[0] for a in (0, 13, 39)] + [e.reset()[0]])

    first = play(5)
    assert np.array_equal(first, play(5))
    assert not np.array_equal(first[0], play(6)[0]) and not np.array_equal(first[0], first[-1])


def test_global_generator_is_left_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    e = make()
    e.reset()
    e.step(0)
    make_vec(2).reset()
    assert np.array_equal(before, np.random.get_state()[1])


def test_returned_arrays_belong_to_the_caller():
    e, twin = make().unwrapped, make().unwrapped
    e.reset(seed=1)
    twin.reset(seed=1)
    for a in (3, 17, 33):
        obs, *_ = e.step(a)
        assert np.array_equal(obs, twin.step(a)[0])
        e.physics[:] = 9
        obs[:] = np.nan
    first, _ = e.reset(seed=1)
    kept = first.copy()
    e.step(0)
    assert np.array_equal(first, kept)
    v, w = make_vec(2), make_vec(2)
    a, b = v.reset(seed=1)[0], w.reset(seed=1)[0]
    for _ in range(3):
        a[:] = np.nan
        v.unwrapped.physics[:] = 9
        a, paid, *_ = v.step([3, 17])
        b, twin_paid, *_ = w.step([3, 17])
        assert np.array_equal(a, b) and np.array_equal(paid, twin_paid)


def test_callers_start_is_not_changed():
    e, physics, state = make(), P.physics_of(STATE), STATE.copy()
    before = physics.copy()
    e.reset(options={"state": state})
    e.step(0)
    e.reset(options={"physics": physics})
    e.step(0)
    v, many = make_vec(2), np.stack([physics, physics])
    v.reset(options={"physics": many})
    v.step([0, 1])
    assert np.array_equal(state, STATE) and np.array_equal(physics, before) and np.array_equal(many, [before, before])


def test_every_real_state_is_on_the_table_and_within_the_limits():
    "All of them: `TABLE` is the region that real rollouts reach, and what imagination is judged by."
    engine, rng = P.Physics(1), np.random.default_rng(0)
    physics, space = P.physics_of(P.initial_states(60, rng)), make().observation_space
    for t in range(25):
        before = P.states_of(physics)
        stubborn = np.arange(60) % 40
        physics = engine.step(physics, rng.integers(0, 40, 60) if t % 2 else stubborn)
        after = P.states_of(physics)
        assert np.isfinite(physics).all() and all(s in space for s in after)
        xy = np.stack([before, after]).reshape(-1, 2)
        assert ((xy >= P.TABLE[0]) & (xy <= P.TABLE[1])).all()
        assert np.linalg.norm((after - before).reshape(-1, 2), axis=-1).max() <= P.MAX_STEP


# --- episodes

def test_info_success_and_goal():
    goal, other = move("red", "blue", "left"), move("green", "blue", "left")
    e = make(goal=goal)
    _, info = e.reset(options={"state": STATE})
    assert info["goal"] == goal and info["success"] is True and success(goal, STATE)
    _, info = e.reset(seed=0, options={"goal": other})
    assert info["goal"] == other and info["success"] is False
    obs, reward, terminated, truncated, info = e.step(0)
    assert info["goal"] == other and isinstance(reward, float)
    assert (terminated, truncated, info["success"]) == (False, False, False)
    assert e.reset()[1]["goal"] == other  # kept until another is given


def test_fifty_steps_truncate_and_success_terminates():
    e = make(goal=line_up())
    e.reset(seed=0)
    ends = [e.step(0)[2:4] for _ in range(50)]
    assert ends[:-1] == [(False, False)]*49 and ends[-1] == (False, True)
    e = make(goal=move("blue", "red", "behind"))
    e.reset(options={"state": [0, 0, .3, .3, -.4, -.1, -.4, .5, .4, -.15]})
    for _ in range(10):
        _, reward, terminated, truncated, info = e.step(1*8 + 2)  # blue, to the left
        if terminated:
            break
    assert terminated and not truncated and info["success"] and reward == 100


def test_a_push_has_one_step():
    e = make(goal=push("green", "right"))
    e.reset(options={"state": STATE})
    assert e.step(2*8 + 0)[2:4] == (True, False)
    e.reset(options={"state": STATE})
    assert e.step(2*8 + 2)[2:4] == (False, True)


# --- starts

def test_start_distribution():
    s = P.initial_states(2000, np.random.default_rng(0)).astype(np.float64).reshape(-1, 5, 2)
    assert s.shape[0] == 2000 and (s >= [-.5 - 1e-6, -.3 - 1e-6]).all() and (s <= .5 + 1e-6).all()
    i, j = np.triu_indices(5, 1)
    gap = s[:, i] - s[:, j]
    assert np.linalg.norm(gap, axis=-1).min() >= .36 - 1e-6 and np.abs(gap).min() > .01 - 1e-6
    assert len(np.unique(s, axis=0)) == 2000
    assert np.array_equal(P.initial_states(7, np.random.default_rng(1)), P.initial_states(7, np.random.default_rng(1)))
    assert P.initial_states(0, np.random.default_rng(1)).shape == (0, 10)


def test_starts_by_seed_come_from_the_same_distribution():
    seeded = P.start_states([line_up()], np.zeros(2000, int), np.arange(2000))   # a goal that no start fulfils
    drawn = P.initial_states(4000, np.random.default_rng(0))
    assert len(np.unique(seeded, axis=0)) == 2000
    for q in (.1, .25, .5, .75, .9):
        assert np.abs(np.quantile(seeded, q, axis=0) - np.quantile(drawn, q, axis=0)).max() < .08


def test_a_start_depends_on_task_and_seed_alone():
    rng = np.random.default_rng(0)
    index, seeds = rng.integers(len(GOALS), size=60), rng.integers(0, 2**31 - 1, 60)
    starts = P.start_states(GOALS, index, seeds)
    order = rng.permutation(60)
    assert np.array_equal(P.start_states(GOALS, index[order], seeds[order]), starts[order])
    alone = [P.start_states([GOALS[i]], [0], [s])[0] for i, s in zip(index, seeds)]
    assert np.array_equal(alone, starts)
    in_other_words = [g.replace(text="Do it.", level="rephrase") for g in GOALS]
    assert np.array_equal(P.start_states(in_other_words, index, seeds), starts)
    environment = [make(goal=GOALS[i]).reset(seed=int(s))[0] for i, s in zip(index[:10], seeds)]
    assert np.array_equal(environment, starts[:10])
    assert P.start_states(GOALS, [], []).shape == (0, 10)


def test_starts_never_fulfil_the_goal_already():
    goal = move("red", "blue", "left")
    assert success(goal, P.initial_states(3000, np.random.default_rng(3))).any()  # without the check it happens
    starts = P.start_states([goal], np.zeros(3000, int), np.arange(3000))
    assert not success(goal, starts).any()
    e = make(goal=goal)
    e.reset(seed=0)
    assert not any(e.reset()[1]["success"] for _ in range(300))


@pytest.mark.parametrize("seeds, says", [([-1, 0], "from -1 to 0: expected whole numbers, 0 or more"),
                                         ([.5, 1.], "expected whole numbers"), ([1], "for 1 rows")])
def test_bad_seeds(seeds, says):
    with pytest.raises(ValueError, match=says):
        P.start_states(GOALS, [0, 1], seeds)


# --- physics

def test_model_has_named_parts_and_its_fixes():
    raw, model = mujoco.MjModel.from_xml_string(P.model_xml()), P.load_model()
    counts = dict(body=raw.nbody, joint=raw.njnt, geom=raw.ngeom, actuator=raw.nu, pair=raw.npair)
    for kind, n in counts.items():
        names = [getattr(raw, kind)(i).name for i in range(n)]
        assert all(names) and len(set(names)) == n, kind
    assert (model.nq, model.nv, model.nu) == (37, 32, 2)
    assert np.allclose(model.dof_invweight0[30:], 24.837, atol=1e-3)
    assert np.isclose(model.body("agent").invweight0[0], 16.558, atol=1e-3)


def test_margins_mean_the_same_whether_they_are_summed_or_the_larger_counts():
    model = P.load_model()
    assert np.allclose(model.pair_margin, .002) and (model.geom_margin == 0).all()
    touching = {frozenset((model.geom(a).name, model.geom(b).name)) for a, b in zip(model.pair_geom1, model.pair_geom2)}
    assert len(touching) == 40                              # every contact there can be is an explicit pair ...
    ball_geoms = [f"{colour}_ball" for colour in COLOURS]
    assert {frozenset((a, b)) for a in ball_geoms for b in ball_geoms if a != b} <= touching
    assert (model.geom_contype == 0).all() and (model.geom_conaffinity == 0).all()   # ... and there are no others


def test_states_and_physics_are_inverse():
    s = P.initial_states(12, np.random.default_rng(0)).reshape(3, 4, 10)
    p = P.physics_of(s)
    assert p.shape == (3, 4, 69) and p.dtype == np.float64 and P.states_of(p).dtype == np.float32
    assert np.array_equal(P.states_of(p), s) and (p[..., 37:] == 0).all()


def test_explicit_physics_is_kept_exactly():
    e = make().unwrapped
    e.reset(seed=0)
    e.step(5)
    p = e.physics
    assert p.shape == (69,) and p.dtype == np.float64 and np.abs(p[37:]).max() > 0
    obs, _ = e.reset(options={"physics": p})
    assert np.array_equal(e.physics, p) and np.array_equal(obs, P.states_of(p))
    obs, _ = e.reset(options={"state": STATE})
    assert np.array_equal(obs, STATE)


def test_golden_next_states(gold):
    after = P.states_of(P.Physics().step(gold["physics"], gold["action"]))
    assert len(after) == len(gold["action"]) > 400
    assert np.abs(after - gold["next_state"]).max() < 1e-5


def test_golden_through_the_environment(gold):
    e = make()
    fields = ("physics", "action", "goal", "next_state", "reward", "terminal")
    for p, a, g, s, r, end in zip(*(gold[k] for k in fields)):
        goal = move(COLOURS[np.flatnonzero(g[:5] == 1)[0]], COLOURS[np.flatnonzero(g[:5] == 2)[0]], COMPASS[g[5]])
        e.reset(options={"physics": p, "goal": goal})
        obs, reward, terminated, truncated, info = e.step(a)
        assert np.abs(obs - s).max() < 1e-5 and abs(reward - r) < 1e-5
        assert terminated == info["success"] == bool(end) and not truncated


@pytest.mark.parametrize("trap", ["inverse weight", "margin"])
def test_either_version_trap_would_spoil_the_golden_check(gold, trap):
    xml = P.model_xml().replace('margin="0.002"', 'margin="0.004"') if trap == "margin" else P.model_xml()
    model = mujoco.MjModel.from_xml_string(xml)
    if trap == "margin":
        model.dof_invweight0[:] = P.load_model().dof_invweight0
        model.body_invweight0[:] = P.load_model().body_invweight0
    data, worst = mujoco.MjData(model), 0
    for p, a, s in zip(gold["physics"][:60], gold["action"], gold["next_state"]):
        P.load_physics(data, p)
        P.aim(data, int(a))
        mujoco.mj_step(model, data, nstep=P.SUBSTEPS)
        worst = max(worst, np.abs(P.states_of(data.qpos) - s).max())
    assert worst > 1e-3


# --- batched = single

@pytest.mark.parametrize("threads", [1, 2])
def test_batched_and_single_agree_bit_for_bit(threads):
    v, ones = make_vec(len(GOALS), goals=GOALS, threads=threads), [make(goal=g).unwrapped for g in GOALS]
    obs, info = v.reset(seed=10)
    assert np.array_equal(obs, [e.reset(seed=10 + i)[0] for i, e in enumerate(ones)])
    assert list(info["goal"]) == GOALS and not info["success"].any()
    rng, done = np.random.default_rng(0), np.zeros(len(GOALS), bool)
    for t in range(60):
        actions = rng.integers(0, 40, len(GOALS))
        want = [(e.reset()[0], 0., False, False) if d else e.step(a)[:4] for e, a, d in zip(ones, actions, done)]
        *got, info = v.step(actions)
        for x, y in zip(got, zip(*want)):
            assert np.array_equal(x, np.array(y)), t
        obs, _, terminated, truncated = got
        assert np.array_equal(info["success"], terminated)
        assert np.array_equal(v.unwrapped.physics, [e.physics for e in ones])
        done = terminated | truncated
    assert done.dtype == bool and v.observation_space.contains(obs)


def test_physics_is_a_function_of_its_arguments():
    rng, engine = np.random.default_rng(0), P.Physics(2)
    physics, actions = P.physics_of(P.initial_states(600, rng)), rng.integers(0, 40, 600)  # more than one block
    kept = physics.copy()
    after = engine.step(physics, actions)
    assert np.array_equal(physics, kept) and np.array_equal(after, engine.step(physics, actions))
    order = rng.permutation(600)
    assert np.array_equal(after[order], P.Physics(1).step(physics[order], actions[order]))
    assert engine.step(physics[:0], actions[:0]).shape == (0, 69)


@pytest.mark.parametrize("threads", [1, 2])
def test_simulator_is_the_environment_row_by_row(threads):
    "Also where rows are over at different times and are no longer stepped."
    index, seeds = np.arange(10) % len(GOALS), np.arange(10)
    simulator = P.ClevrSimulator.start(GOALS, index, seeds, threads=threads)
    ones = [make(goal=GOALS[i]).unwrapped for i in index]
    assert np.array_equal(simulator.states, [e.reset(seed=int(s))[0] for e, s in zip(ones, seeds)])
    assert np.array_equal(simulator.seeds, seeds)
    rng, live = np.random.default_rng(0), np.arange(10)
    for t in range(12):
        actions, before = rng.integers(0, 40, len(live)), simulator.states
        kept = before.copy()
        rewards, held, failure = simulator.step(live, actions)
        want = [ones[b].step(a)[:4] for b, a in zip(live, actions)]
        assert np.array_equal(simulator.states[live], [w[0] for w in want])
        assert np.array_equal(rewards, np.float32([w[1] for w in want])) and np.array_equal(held, [w[2] for w in want])
        assert not failure.any() and np.array_equal(before, kept)   # states are a new array after each step
        over = held | np.array([w[3] for w in want]) | (rng.random(len(live)) < .1)
        resting = np.setdiff1d(np.arange(10), live)
        assert np.array_equal(simulator.states[resting], before[resting])
        live = live[~over]


def test_simulator_at_given_states():
    simulator = P.ClevrSimulator(GOALS, [0, 3], np.stack([STATE, STATE]))
    assert np.array_equal(simulator.states, [STATE, STATE]) and (simulator.seeds == -1).all()
    after = P.states_of(P.Physics(1).step(P.physics_of(STATE)[None], [5]))
    rewards, held, _ = simulator.step(np.array([1]), np.array([5]))
    assert np.array_equal(simulator.states, np.stack([STATE, after[0]]))
    assert np.array_equal(rewards, reward_rows(GOALS, [3], STATE[None], after, STATE[None]))
    assert np.array_equal(held, success_rows(GOALS, [3], after))
    with pytest.raises(ValueError, match="unknown type None"):
        P.ClevrSimulator([Goal("Balance the pole.")], [0], STATE[None])


def test_vector_options_and_goals():
    v = make_vec(3, goal=GOALS[2])
    states = P.initial_states(3, np.random.default_rng(0))
    obs, info = v.reset(seed=0, options={"states": states, "goals": GOALS[:3]})
    assert np.array_equal(obs, states) and list(info["goal"]) == GOALS[:3]
    p = v.unwrapped.physics
    obs, info = v.reset(options={"physics": p, "goal": GOALS[0]})
    assert np.array_equal(obs, states) and set(info["goal"]) == {GOALS[0]}
    a = v.reset(seed=[4, 5, 6])[0]
    assert np.array_equal(a, v.reset(seed=4)[0]) and not np.array_equal(a, v.reset()[0])


def test_many_goals_in_one_batch():
    goals = (goal_set("offline")[::40] + goal_set("easy")[::10] + goal_set("hard")[::20])[:64]
    v = make_vec(len(goals), goals=goals)
    v.reset(seed=0)
    _, rewards, terminated, truncated, info = v.step(np.zeros(len(goals), int))
    pushes = np.array([type_of(g) == "push" for g in goals])
    assert pushes.any() and (terminated | truncated)[pushes].all()
    assert not truncated[~pushes].any() and np.isfinite(rewards).all()


# --- bad input

@pytest.mark.parametrize("action, says", [(40, "0 to 39"), (-1, "0 to 39"), (1.0, "integers"), (None, "integers"),
                                          ("3", "integers"), ([1, 2], "shape"), (np.nan, "integers")])
def test_bad_action(action, says):
    e = make().unwrapped
    e.reset(seed=0)
    before = e.physics
    with pytest.raises(ValueError, match=says):
        e.step(action)
    assert np.array_equal(e.physics, before)


BAD_STARTS = [
    ({"state": np.zeros(9)}, r"\(9,\)"), ({"state": np.zeros((2, 10))}, r"\(2, 10\)"),
    ({"state": np.full(10, np.nan)}, "NaN"), ({"state": np.full(10, np.inf)}, "infinite"),
    ({"state": "here"}, "expected numbers"), ({"state": np.full(10, 3.)}, "outside the walls"),
    ({"physics": np.zeros(68)}, r"\(68,\)"), ({"physics": np.full(69, np.nan)}, "NaN"),
    ({"physics": np.zeros(69)}, "quaternion"), ({"state": STATE, "physics": np.zeros(69)}, "not both"),
    ({"goal": "push the red ball"}, "unknown goal"), ({"goal": None}, "unknown goal"),
    ({"goal": Goal("Balance the pole.")}, "unknown type None"), ({"stat": STATE}, "unknown reset option 'stat'"),
]


@pytest.mark.parametrize("options, says", BAD_STARTS, ids=[says for _, says in BAD_STARTS])
def test_bad_reset(options, says):
    e = make(goal=GOALS[2])
    e.reset(seed=0)
    with pytest.raises(ValueError, match=says):
        e.reset(options=options)
    assert e.reset()[1]["goal"] == GOALS[2]


@pytest.mark.parametrize("kw, says", [({"goal": "red"}, "unknown goal"), ({"render_mode": "human"}, "render_mode")])
def test_bad_construction(kw, says):
    with pytest.raises(ValueError, match=says):
        E.ClevrRobotEnv(**kw)


@pytest.mark.parametrize("kw, says", [
    ({"goals": GOALS[:2]}, "2 goals for 3"), ({"goals": [1, 2, 3]}, "unknown goal"),
    ({"goal": GOALS[0], "goals": GOALS[:3]}, "not both"), ({"threads": 0}, "threads"), ({"num_envs": 0}, "num_envs"),
    ({"render_mode": "human"}, "render_mode")])
def test_bad_vector_construction(kw, says):
    with pytest.raises(ValueError, match=says):
        E.ClevrRobotVectorEnv(**{"num_envs": 3, **kw})


def test_bad_batches():
    v = make_vec(3)
    with pytest.raises(gym.error.ResetNeeded):
        v.step([0, 0, 0])
    v.reset(seed=0)
    for actions in ([0, 0], [0, 0, 40], [0., 0., 0.], 3, [[0, 0, 0]]):
        with pytest.raises(ValueError):
            v.step(np.array(actions))
    for options in ({"states": np.zeros((2, 10))}, {"states": np.full((3, 10), np.nan)}, {"physics": np.zeros(69)},
                    {"goals": GOALS[:2]}, {"state": STATE}):
        with pytest.raises(ValueError):
            v.reset(options=options)
    with pytest.raises(ValueError, match="2 seeds"):
        v.reset(seed=[1, 2])


@pytest.mark.parametrize("physics, actions", [
    (np.zeros(69), 0), (np.zeros((2, 68)), [0, 0]), (np.full((2, 69), np.nan), [0, 0]),
    (P.physics_of(np.stack([STATE]*2)), [0]), (P.physics_of(STATE[None]), [40])])
def test_bad_physics(physics, actions):
    with pytest.raises(ValueError):
        P.Physics(1).step(physics, actions)


# --- pictures

def middle_of(image, colour):
    "Mean row and column where a colour dominates."
    r, g, b = (image[..., k].astype(int) for k in range(3))
    masks = {"red": (r > 120) & (g < 90) & (b < 90), "green": (g > 120) & (b < 90),
             "cyan": (g > 150) & (b > 150) & (r < 110)}
    assert masks[colour].sum() > 20, f"no {colour} ball in the picture"
    return np.argwhere(masks[colour]).mean(0)


def test_pictures_or_a_clear_error():
    e = make(render_mode="rgb_array").unwrapped
    e.reset(seed=0)
    if not can_render():
        with pytest.raises(gym.error.DependencyNotInstalled, match="apt-get install"):
            e.render()
        return
    image = e.render()
    assert image.shape == (240, 320, 3) and image.dtype == np.uint8 and image.std() > 10
    e.step(0)
    assert not np.array_equal(image, e.render())


@pytest.mark.usefixtures("gl")
def test_right_is_right_and_behind_is_up():
    s = np.float32([[-.4, 0, 0, .2, .4, 0, 0, -.1, -.4, .5]])  # red front left, green front right, cyan behind left
    image = V.render_states(s, size=(120, 160))[0]
    red, green, cyan = (middle_of(image, c) for c in ("red", "green", "cyan"))
    assert green[1] > red[1] + 20 and cyan[0] < red[0] - 10 and abs(cyan[1] - red[1]) < 40
    assert not np.array_equal(image, V.render_states(s, [[0, .4]], size=(120, 160))[0])  # the agent, when asked for
    assert V.render_states(np.zeros((0, 10)), size=(24, 32)).shape == (0, 24, 32, 3)
    with pytest.raises(ValueError, match=r"\(N, 10\)"):
        V.render_states(s[0])


@pytest.mark.usefixtures("gl")
def test_drawing_leaves_the_physics_alone():
    e, twin = make(render_mode="rgb_array").unwrapped, make().unwrapped
    e.reset(seed=2)
    twin.reset(seed=2)
    for a in (1, 12, 30, 22):
        e.render()
        e.step(a)
        twin.step(a)
        e.render()
        assert np.array_equal(e.physics, twin.physics)
    v = make_vec(2, render_mode="rgb_array", size=(24, 32))
    v.reset(seed=0)
    assert [image.shape for image in v.render()] == [(24, 32, 3)]*2


DRAW = """
import kalm, gymnasium as gym
e = gym.make('kalm/ClevrRobot-v0', render_mode='rgb_array')
e.reset(seed=0)
e.step(0)
try:
    print('drawn', e.render().shape)
except gym.error.DependencyNotInstalled as x:
    print('refused:', x)
"""


@pytest.mark.parametrize("gl", ["disable", "osmesa", "nonsense"])
def test_physics_works_whatever_opengl_says(gl):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", DRAW], env={**os.environ, "MUJOCO_GL": gl}, capture_output=True,
                          text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("drawn (240, 320, 3)", "refused: drawing needs OpenGL")), done.stdout
    assert gl != "disable" or "apt-get install" in done.stdout


def test_balls_beyond_the_walls_are_refused_everywhere():
    "MuJoCo would put them elsewhere without a word, other balls too."
    goals, states = [move("red", "blue", "left")], P.initial_states(2, np.random.default_rng(0))
    for where in (5., 1e10):
        far = states.copy()
        far[1, 0] = where
        with pytest.raises(ValueError, match="outside the walls"):
            P.ClevrSimulator(goals, np.zeros(2, int), far)
        with pytest.raises(ValueError, match="outside the walls"):
            gym.make("kalm/ClevrRobot-v0").reset(options=dict(state=far[1]))


def test_physics_that_the_engine_gives_up_on_are_refused():
    physics = P.physics_of(P.initial_states(2, np.random.default_rng(0)))
    physics[1, 0] = 1e10
    with pytest.raises(ValueError, match="cannot carry on"):
        P.Physics(1).step(physics, np.zeros(2, int))


def test_seeds_of_rows_are_whole_numbers():
    with pytest.raises(ValueError, match="seed 1.7: expected a whole number"):
        E.ClevrRobotVectorEnv(2).reset(seed=1.7)
