"The environment: Gymnasium's contract, the published physics, batched = single, bad input, pictures."
import os
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import kalm  # noqa: F401  registers the environments
from kalm import env as E
from kalm.goals import COLOURS, COMPASS, Goal, goal_set

ID = "kalm/ClevrRobot-v0"
GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "clevr_transitions.npz"
STATE = np.float32([-.3, .1, 0, .1, .3, .1, -.15, .4, .15, .4])
GOALS = [Goal.move("red", "blue", "behind"), Goal.push("cyan", "left"), Goal.gather("green"), Goal.line_up(),
         Goal.all_of([Goal.move("red", "blue", "left"), Goal.move("green", "cyan", "front")])]


def make(**kw): return gym.make(ID, **kw)
def make_vec(n, **kw): return gym.make_vec(ID, num_envs=n, vectorization_mode="vector_entry_point", **kw)


@pytest.fixture(scope="module")
def gold():
    if not GOLDEN.exists(): pytest.skip(f"{GOLDEN} is not here: published transitions are not ours to ship")
    return dict(np.load(GOLDEN, allow_pickle=False))


# --- Gymnasium's contract

@pytest.mark.parametrize("goal", [None, GOALS[0], GOALS[2], GOALS[3], GOALS[4]], ids=lambda g: getattr(g, "kind", "default"))
def test_check_env_has_nothing_to_say(goal):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(goal=goal).unwrapped, skip_render_check=True)


def test_check_env_with_pictures():
    if not E.can_render(): pytest.skip("no OpenGL here")
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
        out = [e.reset(seed=seed)[0]] + [e.step(a)[0] for a in (0, 13, 39)] + [e.reset()[0]]
        return np.stack(out)
    assert np.array_equal(play(5), play(5))
    assert not np.array_equal(play(5)[0], play(6)[0]) and not np.array_equal(play(5)[0], play(5)[-1])


def test_global_generator_is_left_alone():
    np.random.seed(0); before = np.random.get_state()[1].copy()
    e = make(); e.reset(); e.step(0); make_vec(2).reset()
    assert np.array_equal(before, np.random.get_state()[1])


def test_returned_arrays_belong_to_the_caller():
    e, twin = make().unwrapped, make().unwrapped
    for x in (e, twin): x.reset(seed=1)
    kept = []
    for a in (3, 17, 33):
        obs, *_ = e.step(a)
        want, *_ = twin.step(a)
        assert np.array_equal(obs, want)
        kept.append((obs, obs.copy())); p = e.physics; p[:] = 9; obs[:] = np.nan
    first, _ = e.reset(seed=1); kept_first = first.copy(); e.step(0)
    assert np.array_equal(first, kept_first)
    v, w = make_vec(2), make_vec(2)
    a, b = v.reset(seed=1)[0], w.reset(seed=1)[0]
    for _ in range(3):
        a[:] = np.nan; v.unwrapped.physics[:] = 9
        a, ra, *_ = v.step([3, 17]); b, rb, *_ = w.step([3, 17])
        assert np.array_equal(a, b) and np.array_equal(ra, rb)


def test_callers_start_is_not_changed():
    e, physics = make(), E.physics_of(STATE)
    state, before = STATE.copy(), physics.copy()
    e.reset(options={"state": state}); e.step(0)
    e.reset(options={"physics": physics}); e.step(0)
    v, many = make_vec(2), np.stack([physics, physics])
    v.reset(options={"physics": many}); v.step([0, 1])
    assert np.array_equal(state, STATE) and np.array_equal(physics, before) and np.array_equal(many, [before, before])


def test_random_play_stays_finite_on_the_table_and_within_the_limits():
    sim, rng = E.Simulator(1), np.random.default_rng(0)
    physics, space = sim.reset(60, rng), make().observation_space
    for t in range(25):
        before = E.states_of(physics)
        physics = sim.step(physics, rng.integers(0, 40, 60))
        after = E.states_of(physics)
        assert np.isfinite(physics).all() and all(s in space for s in after)
        xy = after.reshape(-1, 2)
        assert (xy >= E.TABLE[0]).all() and (xy <= E.TABLE[1]).all()
        assert np.linalg.norm((after - before).reshape(-1, 2), axis=-1).max() <= E.MAX_STEP


# --- episodes

def test_info_success_and_goal():
    goal = Goal.move("red", "blue", "left")
    e = make(goal=goal)
    _, info = e.reset(options={"state": STATE})
    assert info["goal"] == goal and info["success"] == bool(goal.success(STATE)) is True
    other = Goal.move("green", "blue", "left")
    _, info = e.reset(seed=0, options={"goal": other})
    assert info["goal"] == other and info["success"] is False
    obs, reward, terminated, truncated, info = e.step(0)
    assert info["goal"] == other and isinstance(reward, float) and (terminated, truncated, info["success"]) == (False, False, False)
    assert e.reset()[1]["goal"] == other  # kept until another is given


def test_fifty_steps_truncate_and_success_terminates():
    e = make(goal=Goal.line_up()); e.reset(seed=0)
    ends = [e.step(0)[2:4] for _ in range(50)]
    assert ends[:-1] == [(False, False)]*49 and ends[-1] == (False, True)
    e = make(goal=Goal.move("blue", "red", "behind"))
    e.reset(options={"state": [0, 0, .3, .3, -.4, -.1, -.4, .5, .4, -.15]})
    for _ in range(10):
        _, reward, terminated, truncated, info = e.step(1*8 + 2)  # blue, to the left
        if terminated: break
    assert terminated and not truncated and info["success"] and reward == 100


def test_a_push_has_one_step():
    e = make(goal=Goal.push("green", "right"))
    e.reset(options={"state": STATE})
    assert e.step(2*8 + 0)[2:4] == (True, False)
    e.reset(options={"state": STATE})
    assert e.step(2*8 + 2)[2:4] == (False, True)


def test_starts_never_satisfy_the_goal_already():
    rng = np.random.default_rng(3)
    goal = Goal.move("red", "blue", "left")
    assert goal.success(E.initial_states(3000, rng)).any()  # without the redraw it happens
    e = make(goal=goal)
    e.reset(seed=0)
    assert not any(e.reset()[1]["success"] for _ in range(400))


def test_start_distribution():
    s = E.initial_states(2000, np.random.default_rng(0)).astype(np.float64).reshape(-1, 5, 2)
    assert s.shape[0] == 2000 and (s >= [-.5 - 1e-6, -.3 - 1e-6]).all() and (s <= .5 + 1e-6).all()
    i, j = np.triu_indices(5, 1)
    gap = s[:, i] - s[:, j]
    assert np.linalg.norm(gap, axis=-1).min() >= .36 - 1e-6 and np.abs(gap).min() > .01 - 1e-6
    assert len(np.unique(s, axis=0)) == 2000
    assert np.array_equal(E.initial_states(7, np.random.default_rng(1)), E.initial_states(7, np.random.default_rng(1)))
    assert E.initial_states(0, np.random.default_rng(1)).shape == (0, 10)


# --- physics

def test_model_has_named_parts_and_its_fixes():
    raw, model = E.mujoco.MjModel.from_xml_string(E.model_xml()), E.load_model()
    for kind, n in (("body", raw.nbody), ("joint", raw.njnt), ("geom", raw.ngeom), ("actuator", raw.nu), ("pair", raw.npair)):
        names = [getattr(raw, kind)(i).name for i in range(n)]
        assert all(names) and len(set(names)) == n, kind
    assert (model.nq, model.nv, model.nu) == (37, 32, 2)
    assert np.allclose(model.dof_invweight0[30:], 24.837, atol=1e-3) and np.isclose(model.body("agent").invweight0[0], 16.558, atol=1e-3)
    assert np.allclose(model.pair_margin, .002)


def test_states_and_physics_are_inverse():
    s = E.initial_states(12, np.random.default_rng(0)).reshape(3, 4, 10)
    p = E.physics_of(s)
    assert p.shape == (3, 4, 69) and p.dtype == np.float64 and E.states_of(p).dtype == np.float32
    assert np.array_equal(E.states_of(p), s) and (p[..., 37:] == 0).all()


def test_explicit_physics_is_kept_exactly():
    e = make().unwrapped
    e.reset(seed=0); e.step(5); p = e.physics
    assert p.shape == (69,) and p.dtype == np.float64 and np.abs(p[37:]).max() > 0
    obs, _ = e.reset(options={"physics": p})
    assert np.array_equal(e.physics, p) and np.array_equal(obs, E.states_of(p))
    obs, _ = e.reset(options={"state": STATE})
    assert np.array_equal(obs, STATE)


def test_golden_next_states(gold):
    after = E.states_of(E.Simulator().step(gold["physics"], gold["action"]))
    assert len(after) == len(gold["action"]) > 400
    assert np.abs(after - gold["next_state"]).max() < 1e-5


def test_golden_through_the_environment(gold):
    e = make()
    for p, a, g, s, r, end in zip(*(gold[k] for k in ("physics", "action", "goal", "next_state", "reward", "terminal"))):
        goal = Goal.move(COLOURS[np.flatnonzero(g[:5] == 1)[0]], COLOURS[np.flatnonzero(g[:5] == 2)[0]], COMPASS[g[5]])
        e.reset(options={"physics": p, "goal": goal})
        obs, reward, terminated, truncated, info = e.step(a)
        assert np.abs(obs - s).max() < 1e-5 and abs(reward - r) < 1e-5
        assert terminated == info["success"] == bool(end) and not truncated


@pytest.mark.parametrize("trap", ["inverse weight", "margin"])
def test_either_version_trap_would_spoil_the_golden_check(gold, trap):
    xml = E.model_xml().replace('margin="0.002"', 'margin="0.004"') if trap == "margin" else E.model_xml()
    model = E.mujoco.MjModel.from_xml_string(xml)
    if trap == "margin": model.dof_invweight0[:], model.body_invweight0[:] = E.load_model().dof_invweight0, E.load_model().body_invweight0
    data, worst = E.mujoco.MjData(model), 0
    for p, a, s in zip(gold["physics"][:60], gold["action"], gold["next_state"]):
        ball, k = divmod(int(a), 8)
        E._load(data, p)
        data.qpos[35:37], data.qvel[30:32], data.qacc_warmstart[:], data.ctrl[:] = data.qpos[7*ball:7*ball + 2] - E._OFFSETS[k], 0, 0, E.DIRECTIONS[k]
        E.mujoco.mj_step(model, data, nstep=E.SUBSTEPS)
        worst = max(worst, np.abs(E.states_of(data.qpos) - s).max())
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
        want = [(e.reset()[0], 0., False, False, None) if d else e.step(a) for e, a, d in zip(ones, actions, done)]
        obs, rewards, terminated, truncated, info = v.step(actions)
        for got, k in ((obs, 0), (rewards, 1), (terminated, 2), (truncated, 3)):
            assert np.array_equal(got, np.array([w[k] for w in want])), (t, k)
        assert np.array_equal(info["success"], terminated)
        assert np.array_equal(v.unwrapped.physics, [e.physics for e in ones])
        done = terminated | truncated
    assert done.dtype == bool and v.observation_space.contains(obs)


def test_simulator_is_a_function_of_its_arguments():
    rng = np.random.default_rng(0)
    sim = E.Simulator(2)
    physics, actions = sim.reset(600, rng), rng.integers(0, 40, 600)  # more than one block
    kept = physics.copy()
    a = sim.step(physics, actions)
    assert np.array_equal(physics, kept) and np.array_equal(a, sim.step(physics, actions))
    order = rng.permutation(600)
    assert np.array_equal(a[order], E.Simulator(1).step(physics[order], actions[order]))
    assert sim.step(physics[:0], actions[:0]).shape == (0, 69)


def test_vector_options_and_goals():
    v = make_vec(3, goal=GOALS[2])
    states = E.initial_states(3, np.random.default_rng(0))
    obs, info = v.reset(seed=0, options={"states": states, "goals": GOALS[:3]})
    assert np.array_equal(obs, states) and list(info["goal"]) == GOALS[:3]
    p = v.unwrapped.physics
    obs, info = v.reset(options={"physics": p, "goal": GOALS[0]})
    assert np.array_equal(obs, states) and set(info["goal"]) == {GOALS[0]}
    a = v.reset(seed=[4, 5, 6])[0]
    assert np.array_equal(a, v.reset(seed=4)[0]) and not np.array_equal(a, v.reset()[0])


def test_hundreds_of_goals_in_one_batch():
    goals = (goal_set("offline")[::40] + goal_set("easy")[::10] + goal_set("hard")[::20])[:64]
    v = make_vec(len(goals), goals=goals)
    v.reset(seed=0)
    _, rewards, terminated, truncated, info = v.step(np.zeros(len(goals), int))
    push = np.array([g.kind == "push" for g in goals])
    assert push.any() and (terminated | truncated)[push].all() and not truncated[~push].any() and np.isfinite(rewards).all()


# --- bad input

@pytest.mark.parametrize("action, says", [(40, "0 to 39"), (-1, "0 to 39"), (1.0, "integers"), (None, "integers"), ("3", "integers"), ([1, 2], "shape"), (np.nan, "integers")])
def test_bad_action(action, says):
    e = make().unwrapped; e.reset(seed=0)
    before = e.physics
    with pytest.raises(ValueError, match=says): e.step(action)
    assert np.array_equal(e.physics, before)


BAD_STARTS = [({"state": np.zeros(9)}, r"\(9,\)"), ({"state": np.zeros((2, 10))}, r"\(2, 10\)"), ({"state": np.full(10, np.nan)}, "NaN"), ({"state": np.full(10, np.inf)}, "infinite"),
              ({"state": "here"}, "expected numbers"), ({"state": np.full(10, 3.)}, "outside the walls"), ({"physics": np.zeros(68)}, r"\(68,\)"),
              ({"physics": np.full(69, np.nan)}, "NaN"), ({"physics": np.zeros(69)}, "quaternion"), ({"state": STATE, "physics": np.zeros(69)}, "not both"),
              ({"goal": "push the red ball"}, "unknown goal"), ({"goal": None}, "unknown goal"), ({"stat": STATE}, "unknown reset option 'stat'")]

@pytest.mark.parametrize("options, says", BAD_STARTS, ids=[s for _, s in BAD_STARTS])
def test_bad_reset(options, says):
    e = make(goal=GOALS[2]); e.reset(seed=0)
    with pytest.raises(ValueError, match=says): e.reset(options=options)
    assert e.reset()[1]["goal"] == GOALS[2]


def test_bad_construction():
    for kw, says in (({"goal": "red"}, "unknown goal"), ({"render_mode": "human"}, "render_mode")):
        with pytest.raises(ValueError, match=says): E.ClevrRobotEnv(**kw)
    for kw, says in (({"goals": GOALS[:2]}, "2 goals for 3"), ({"goals": [1, 2, 3]}, "unknown goal"), ({"goal": GOALS[0], "goals": GOALS[:3]}, "not both"),
                     ({"threads": 0}, "threads"), ({"num_envs": 0}, "num_envs"), ({"render_mode": "human"}, "render_mode")):
        with pytest.raises(ValueError, match=says): E.ClevrRobotVectorEnv(**{"num_envs": 3, **kw})


def test_bad_batches():
    v = make_vec(3)
    with pytest.raises(gym.error.ResetNeeded): v.step([0, 0, 0])
    v.reset(seed=0)
    for actions in ([0, 0], [0, 0, 40], [0., 0., 0.], 3, [[0, 0, 0]]):
        with pytest.raises(ValueError): v.step(np.array(actions))
    for options in ({"states": np.zeros((2, 10))}, {"states": np.full((3, 10), np.nan)}, {"physics": np.zeros(69)}, {"goals": GOALS[:2]}, {"state": STATE}):
        with pytest.raises(ValueError): v.reset(options=options)
    with pytest.raises(ValueError, match="2 seeds"): v.reset(seed=[1, 2])
    sim = E.Simulator(1)
    for physics, actions in ((np.zeros(69), 0), (np.zeros((2, 68)), [0, 0]), (np.full((2, 69), np.nan), [0, 0]), (E.physics_of(np.stack([STATE]*2)), [0]), (E.physics_of(STATE[None]), [40])):
        with pytest.raises(ValueError): sim.step(physics, actions)


# --- pictures

def dominant(image, colour):
    "Rows and columns where a colour channel pattern dominates."
    r, g, b = (image[..., k].astype(int) for k in range(3))
    mask = {"red": (r > 120) & (g < 90) & (b < 90), "green": (g > 120) & (b < 90), "cyan": (g > 150) & (b > 150) & (r < 110)}[colour]
    assert mask.sum() > 20, f"no {colour} ball in the picture"
    return np.argwhere(mask).mean(0)


def test_pictures_or_a_clear_error():
    e = make(render_mode="rgb_array").unwrapped
    e.reset(seed=0)
    if not E.can_render():
        with pytest.raises(gym.error.DependencyNotInstalled, match="apt-get install"): e.render()
        return
    image = e.render()
    assert image.shape == (240, 320, 3) and image.dtype == np.uint8 and image.std() > 10
    e.step(0)
    assert not np.array_equal(image, e.render())


def test_right_is_right_and_behind_is_up():
    if not E.can_render(): pytest.skip("no OpenGL here")
    s = np.float32([[-.4, 0, 0, .2, .4, 0, 0, -.1, -.4, .5]])  # red front left, green front right, cyan behind left
    image = E.render_states(s, size=(120, 160))[0]
    red, green, cyan = (dominant(image, c) for c in ("red", "green", "cyan"))
    assert green[1] > red[1] + 20 and cyan[0] < red[0] - 10 and abs(cyan[1] - red[1]) < 40
    assert not np.array_equal(image, E.render_states(s, [[0, .4]], size=(120, 160))[0])  # the agent shows when asked for
    assert E.render_states(np.zeros((0, 10)), size=(24, 32)).shape == (0, 24, 32, 3)
    with pytest.raises(ValueError, match=r"\(N, 10\)"): E.render_states(s[0])


def test_drawing_leaves_the_physics_alone():
    if not E.can_render(): pytest.skip("no OpenGL here")
    e, twin = make(render_mode="rgb_array").unwrapped, make().unwrapped
    for x in (e, twin): x.reset(seed=2)
    for a in (1, 12, 30, 22):
        e.render(); e.step(a); twin.step(a); e.render()
        assert np.array_equal(e.physics, twin.physics)
    assert len(make_vec_rendered()) == 2


def make_vec_rendered():
    v = make_vec(2, render_mode="rgb_array", size=(24, 32)); v.reset(seed=0)
    return v.render()


@pytest.mark.parametrize("gl", ["disable", "osmesa", "nonsense"])
def test_physics_works_whatever_opengl_says(gl):
    code = ("import kalm, gymnasium as gym, kalm.env as E\n"
            "e = gym.make('kalm/ClevrRobot-v0', render_mode='rgb_array'); e.reset(seed=0); e.step(0)\n"
            "try: print('drawn', e.render().shape)\n"
            "except gym.error.DependencyNotInstalled as x: print('refused:', x)")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "MUJOCO_GL": gl}, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("drawn (240, 320, 3)", "refused: drawing needs OpenGL")), done.stdout
    if gl == "disable": assert "apt-get install" in done.stdout
