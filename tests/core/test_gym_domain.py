"Any Gymnasium environment as a domain: goals, states, success, and one line for each mistake."
import gymnasium as gym
import numpy as np
import pytest
from worlds import LineEnv, line, line_goals, reached

from kalm.core.domain import Behaviour, Limits, judge_reward, judge_success
from kalm.core.episodes import collect, evaluate, play
from kalm.core.files import numpy_rng
from kalm.core.goals import Goal
from kalm.core.gym_domain import GymDomain

GO = {"offline": ["Go."]}


class Scripted(gym.Env):
    "Counts its steps; at step `end` it does what it was told: any of terminated, truncated, success."
    observation_space, action_space = gym.spaces.Box(0, 99, (1,), np.float32), gym.spaces.Discrete(2)

    def __init__(self, end: int = 3, terminated=False, truncated=False, success=None, at_reset=None):
        self.end, self.flags, self.success, self.at_reset = end, (terminated, truncated), success, at_reset

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.options, self.t = options, 0
        return np.zeros(1, np.float32), {} if self.at_reset is None else {"success": self.at_reset}

    def step(self, action):
        self.t += 1
        over = self.t == self.end
        info = {} if self.success is None else {"success": over and self.success}
        return np.full(1, self.t, np.float32), .5, over and self.flags[0], over and self.flags[1], info


def ends(success, env: dict) -> tuple[bool, bool, bool, int]:
    "How an episode of a scripted environment ended: success, failure, truncated, length."
    d = GymDomain(lambda: Scripted(**env), GO, success, max_steps=5)
    r = collect(d, d.goals("offline"), 1, keep_failures=True)[0]
    return r.success, r.failure, r.truncated, len(r)


@pytest.mark.parametrize("success, env, end", [
    ("info", dict(success=True), (True, False, False, 3)),
    ("info", dict(success=True, terminated=True), (True, False, False, 3)),
    ("info", dict(success=False, terminated=True), (False, True, False, 3)),
    ("info", dict(success=False, truncated=True), (False, False, True, 3)),
    ("info", dict(success=False), (False, False, True, 5)),
    ("info", dict(success=True, end=5), (True, False, False, 5)),
    ("terminated", dict(terminated=True), (True, False, False, 3)),
    ("terminated", dict(truncated=True), (False, False, True, 3)),
    ("terminated", dict(), (False, False, True, 5)),
    ("survive", dict(), (True, False, False, 5)),
    ("survive", dict(terminated=True), (False, True, False, 3)),
    ("survive", dict(terminated=True, end=5), (False, True, False, 5)),
    ("survive", dict(truncated=True), (True, False, False, 3)),
    (lambda goal, states, start: states[..., 0] >= 2, dict(terminated=True), (True, False, False, 2)),
    (lambda goal, states, start: states[..., 0] >= 9, dict(terminated=True), (False, True, False, 3)),
    (lambda goal, states, start: states[..., 0] - start[..., 0] >= 5, dict(), (True, False, False, 5))])
def test_how_episodes_end(success, env, end):
    assert ends(success, env) == end


def test_what_reset_is_told():
    d = GymDomain(Scripted, GO, "survive", max_steps=2)
    simulator = d.start(d.goals("offline"), [0], [0])
    assert simulator.envs[0].options == {"goal": d.goals("offline")[0]}
    d = GymDomain(Scripted, GO, "survive", max_steps=2, options=lambda goal: {"text": goal.text})
    assert d.start(d.goals("offline"), [0], [0]).envs[0].options == {"text": "Go."}


def test_goals_and_limits():
    own = Goal("Run.", "elsewhere", 7, {"speed": 2})
    d = GymDomain("CartPole-v1", {"hard": [own], "offline": ["Go."]}, "survive", levels=["offline", "hard"])
    assert d.levels == ("offline", "hard")
    assert d.goals("offline") == [Goal("Go.", "offline", 500)]   # the limit that CartPole is registered with
    assert d.goals("hard") == [own.replace(level="hard")]        # a goal is of the level where it stands
    d.goals("hard").clear()
    assert len(d.goals("hard")) == 1
    with pytest.raises(ValueError, match="unknown level 'easy': one of offline, hard"):
        d.goals("easy")
    assert GymDomain("CartPole-v1", GO, "survive", max_episode_steps=9).goals("offline")[0].max_steps == 9


def test_names():
    assert GymDomain("CartPole-v1", GO, "survive").name == "CartPole-v1"
    assert GymDomain(lambda: Scripted(), GO, "survive", max_steps=2).name == "Scripted"
    assert line(name="mine").name == "mine" and "mine" in repr(line(name="mine"))


def test_state_spaces():
    d = GymDomain("CartPole-v1", GO, "survive")
    np.testing.assert_array_equal(d.state_space.high, gym.make("CartPole-v1").observation_space.high)
    d = GymDomain("CartPole-v1", GO, "survive", observe=lambda observation: observation[:2])
    assert d.state_space.shape == (2,) and np.isinf(d.state_space.high).all()
    d = GymDomain("FrozenLake-v1", GO, "terminated", is_slippery=False)   # one of 16 squares
    assert d.state_space.shape == (16,) and d.start(d.goals("offline"), [0], [3]).states.tolist() == [[1.] + [0.] * 15]


class Named(Scripted):
    "Observations with names: a place and whether a door is open."
    observation_space = gym.spaces.Dict(place=gym.spaces.Box(0, 9, (2,), np.float32), door=gym.spaces.Discrete(2))

    def reset(self, *, seed=None, options=None):
        return self.seen(), super().reset(seed=seed, options=options)[1]

    def step(self, action):
        return self.seen(), *super().step(action)[1:]

    def seen(self):
        return {"place": np.array([3, 4], np.float32), "door": 1}


def test_the_layout_of_a_flattened_dictionary_is_told_and_true():
    d = GymDomain(Named, GO, "terminated", max_steps=5)
    start = d.start(d.goals("offline"), [0], [0]).states[0].tolist()
    layout = repr(d).split("states of 4 numbers ")[1]
    assert layout.startswith("(place 0 to 1, door 2 to 3), Discrete(2)") and start == [3, 4, 0, 1]
    with_observe = GymDomain(Named, GO, "terminated", max_steps=5, observe=lambda o: o["place"])
    assert "states of 2 numbers, " in repr(with_observe)


def test_success_and_reward_of_any_states():
    d = GymDomain(LineEnv, {"offline": line_goals("offline")}, lambda goal, s, start: reached(goal.task["side"], s),
                  reward=lambda goal, s, after, start: after[..., 0] - start[..., 0])
    goals, index = d.goals("offline"), np.array([1, 0, 0])
    states = numpy_rng(0, "x").uniform(-1.1, 1.1, (3, 4, 2)).astype(np.float32)
    got = judge_success(d, goals, index, states, states[:, 0])
    assert got.tolist() == [[bool(reached(goals[i].task["side"], s)) for s in row] for i, row in zip(index, states)]
    earned = judge_reward(d, goals, index, states[:, :-1], states[:, 1:], states[:, 0])
    np.testing.assert_allclose(earned, states[:, 1:, 0] - states[:, :1, 0], rtol=1e-6)
    assert judge_success(line(judged=False), goals, index, states, states[:, 0]) is None
    assert judge_reward(line(), goals, index, states, states, states[:, 0]) is None


def test_starts_that_fulfil_their_goal_are_drawn_again():
    d = GymDomain(LineEnv, {"offline": [Goal("Go right.", max_steps=3)]}, lambda goal, s, start: s[..., 0] > 0)
    seeds = np.arange(40)
    raw = [LineEnv().reset(seed=int(s))[0] for s in seeds]
    states = d.start(d.goals("offline"), np.zeros(40, int), seeds).states
    again = np.array([s[0] > 0 for s in raw])
    assert again.any() and not again.all() and not (states[:, 0] > 0).any()
    np.testing.assert_array_equal(states[~again], np.array(raw)[~again])


def test_a_goal_that_always_holds_is_an_error():
    for success, env in ((lambda goal, s, start: s[..., 0] < 99, {}), ("info", dict(at_reset=True))):
        d = GymDomain(lambda env=env: Scripted(**env), GO, success, max_steps=2)
        with pytest.raises(ValueError, match="goal 'Go.' holds in each of 100 starts of seed 5: nothing is left"):
            d.start(d.goals("offline"), [0], [5])


def test_environments_are_used_again():
    made = []
    d = GymDomain(lambda: made.append(1) or LineEnv(), {"offline": line_goals("offline")}, success="info")
    for _ in range(3):
        collect(d, d.goals("offline"), 8, workers=1, keep_failures=True)
    assert len(made) == 8


def test_rows_do_not_disturb_each_other():
    d = line()
    goals, index, seeds = d.goals("offline"), np.arange(6) % 4, np.arange(6)
    simulator = d.start(goals, index, seeds)
    before = simulator.states
    simulator.step(np.array([4, 1]), np.array([1, 0]))
    moved = np.flatnonzero((simulator.states != before).any(1))
    assert moved.tolist() == [1, 4] and simulator.states is not before
    assert simulator.states[4, 0] > before[4, 0] and simulator.states[1, 0] < before[1, 0]


@pytest.mark.parametrize("given", [lambda sim, rows, rng: np.ones(len(rows), int),
                                   Behaviour(lambda sim, rows, rng: np.ones(len(rows), int), keep_failures=True)])
def test_behaviours_as_functions_or_whole(given):
    d = GymDomain(LineEnv, {"offline": line_goals("offline")}, behaviours={"right": given})
    assert evaluate("right", d, d.goals("offline")[:1], 5).rate == 1
    assert d.behaviours["right"].keep_failures == isinstance(given, Behaviour)


# ---------------------------------------------------------------- mistakes


class Odd(gym.Env):
    "Whatever spaces it is given."
    def __init__(self, observation_space=gym.spaces.Box(-1, 1, (2,)), action_space=gym.spaces.Discrete(2)):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0., False, False, {}


def growing():
    "Observations that get longer and longer."
    seen = []

    def observe(observation):
        seen.append(0.)
        return list(seen)
    return observe


@pytest.mark.parametrize("args, kwargs, message", [
    (("CartPole-v7", GO), {}, "no Gymnasium environment 'CartPole-v7'"),
    (("Nothing-v0", GO), {}, "no Gymnasium environment 'Nothing-v0'"),
    (("no_such_package:Nothing-v0", GO), {}, "no Gymnasium environment 'no_such_package:Nothing-v0'"),
    (("CartPole-v1", GO, "won"), {}, "success 'won': one of info, survive, terminated, or a function"),
    (("CartPole-v1", {}), {}, "expected a level with its sentences"),
    (("CartPole-v1", ["Go."]), {}, "expected a level with its sentences"),
    (("CartPole-v1", {"offline": []}), {}, "level 'offline' has no goals"),
    (("CartPole-v1", {"offline": "Go."}), {}, "is one text, 'Go.'"),
    (("CartPole-v1", {"offline": [" "]}), {}, "a goal needs a sentence, got ' '"),
    (("CartPole-v1", {"offline": [3]}), {}, "holds 3: expected sentences, or Goals"),
    (("CartPole-v1", GO), dict(levels=["offline", "hard"]), "level 'hard' has no goals"),
    (("CartPole-v1", GO), dict(judged_only=["hard"]), "judged_only names hard"),
    (("CartPole-v1", GO), dict(limits=Limits((0,), (1,))), "limits of 1 coordinates"),
    (("CartPole-v1", GO), dict(max_steps=-1), "max_steps -1"),
    ((Odd, GO), {}, "Odd has no time limit of its own: give max_steps"),
    ((lambda: Odd(action_space=gym.spaces.Box(-np.inf, np.inf, (1,))), GO), {}, "rescale the action first"),
    ((lambda: Odd(action_space=gym.spaces.MultiBinary(2)), GO), {}, "expected Discrete"),
    ((lambda: Odd(gym.spaces.Graph(gym.spaces.Box(0, 1, (1,)), None)), GO), dict(max_steps=3), "give observe="),
    ((lambda: Odd(gym.spaces.Sequence(gym.spaces.Box(0, 1, (1,)))), GO), dict(max_steps=3), "observe="),
    ((Odd, GO), dict(max_steps=3, observe=lambda o: o[None]), r"has shape \(1, 2\): expected \(S,\)"),
    ((Odd, GO), dict(max_steps=3, observe=lambda o: []), r"has shape \(0,\): expected \(S,\)"),
    ((Odd, GO), dict(max_steps=3, observe=lambda o: ["left"]), "could not convert string"),
    ((Odd, GO), dict(max_steps=3, observe=lambda o: o * np.nan), "NaN or infinity")])
def test_domains_that_cannot_be_made(args, kwargs, message):
    with pytest.raises(ValueError, match=message) as e:
        GymDomain(*args, **kwargs)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("success, kwargs, message", [
    ("info", {}, "Odd says nothing of success in its info: give success='terminated', 'survive' or a function"),
    (lambda goal, s, start: s[..., 0] > 2, {}, "random never reached the goal 'Go.' from 200 starts"),
    (lambda goal, s, start: s[0] > .5, {}, r"write states\[..., 0\], not states\[0\]"),
    ("survive", dict(observe=growing()), "has 2 numbers, before 1: expected as many")])
def test_domains_that_cannot_be_used(success, kwargs, message):
    d = GymDomain(Odd, GO, success, max_steps=2, **kwargs)
    with pytest.raises(ValueError, match=message) as e:
        collect(d, d.goals("offline"), 2, keep_failures=False)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("index, seeds, message", [
    ([0], [-1], "seeds"), ([0], [.5], "seeds"), ([0], 3, "seeds"), ([9], [0], "goal index"),
    ([0, 0], [0], "goal index")])
def test_starts_that_make_no_sense(index, seeds, message):
    with pytest.raises(ValueError, match=message):
        line().start(line_goals("offline"), index, seeds)


@pytest.mark.parametrize("continuous, actions, message", [
    (False, [2], "action 2 out of range"), (False, [.5], "whole numbers"), (False, [0, 1], "actions of shape"),
    (True, [[1.5]], "action 1.5 .* out of range: expected -1 to 1"), (True, [[np.nan]], "action nan"),
    (True, [1.], "actions of shape")])
def test_actions_out_of_range(continuous, actions, message):
    d = line(continuous)
    simulator = d.start(d.goals("offline"), [0], [0])
    with pytest.raises(ValueError, match=message):
        simulator.step([0], actions)
    with pytest.raises(ValueError, match=message):
        play(d, d.goals("offline"), [0], simulator, lambda sim, rows, t: np.array(actions))


@pytest.mark.parametrize("answer", ["False", -.3, 2])
def test_answers_that_are_neither_yes_nor_no_are_refused(answer):
    "The text `False` is true to Python, and would be a success."
    start = np.zeros((1, 1), np.float32)
    d = GymDomain(Scripted, GO, lambda goal, states, s0: np.full(states.shape[:-1], answer), max_steps=5)
    with pytest.raises(ValueError, match="expected yes or no"):
        judge_success(d, d.goals("offline"), [0], start, start)
    told = GymDomain(lambda: Scripted(success=answer), GO, max_steps=5)
    ended = GymDomain(lambda: Scripted(terminated=answer), GO, "terminated", max_steps=5)
    for d in (told, ended):
        with pytest.raises(ValueError, match="expected yes or no"):
            collect(d, d.goals("offline"), 1, keep_failures=True)


def test_real_and_imagined_steps_are_paid_alike():
    "Given a reward, real steps earn it; it sees the state before, the state after and the start."
    def count(goal, states, next_states, start):
        return 100 * states[..., 0] + 10 * next_states[..., 0] + start[..., 0]

    make = dict(env_id=lambda: Scripted(terminated=True), goals=GO, success="terminated", max_steps=5)
    own, given, sparse = GymDomain(**make), GymDomain(**make, reward=count), GymDomain(**make, reward="success")
    goals = own.goals("offline")
    assert [collect(d, goals, 1)[0].rewards.tolist() for d in (own, given, sparse)] == [
        [.5, .5, .5], [10, 120, 230], [0, 0, 1]]
    states = np.arange(4, dtype=np.float32).reshape(1, 4, 1)
    args = (goals, [0], states[:, :-1], states[:, 1:], states[:, 0])
    assert judge_reward(given, *args).tolist() == [[10, 120, 230]]
    assert judge_reward(own, *args) is None and judge_reward(sparse, *args) is None
    with pytest.raises(ValueError, match="reward 'dense': 'success', or a function"):
        GymDomain(**make, reward="dense")


def test_behaviours_that_are_no_dictionary_are_refused():
    with pytest.raises(ValueError, match="behaviours .*: expected names with functions, such as"):
        GymDomain("CartPole-v1", GO, "survive", behaviours=lambda simulator, rows, rng: rows)


def test_wrong_actions_name_the_domain_and_what_it_has():
    d = GymDomain("Pendulum-v1", GO, lambda goal, states, start: states[..., 0] > .9, max_steps=3,
                  behaviours={"push": lambda simulator, rows, rng: np.ones(len(rows))})
    with pytest.raises(ValueError, match="chosen in 'Pendulum-v1', which has .*: actions of shape"):
        collect(d, d.goals("offline"), 2)
