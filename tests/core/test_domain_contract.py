"What every domain promises, asked of small worlds and of environments that are not ours."
import gymnasium as gym
import minigrid  # noqa: F401 (its environments are registered by the import)
import numpy as np
import pytest
from worlds import line

from kalm.core.domain import RANDOM, behaviour_of, check_domain, codec_of, judge_success
from kalm.core.episodes import collect, evaluate, replay
from kalm.core.files import numpy_rng, start_seeds
from kalm.core.gym_domain import GymDomain
from kalm.core.rollouts import ARRAYS
from kalm.metaworld.domain import MetaWorld


def cartpole() -> GymDomain:
    return GymDomain("CartPole-v1", {"offline": ["Keep the pole up.", "Hold on."]}, "survive", max_steps=12)


def pendulum() -> GymDomain:
    return GymDomain("Pendulum-v1", {"offline": ["Swing it up."], "rephrase": ["To the sky!"]},
                     lambda goal, states, start: states[..., 0] > .9, max_steps=15)


def squares(observation) -> np.ndarray:
    return np.append(observation["image"][..., 0].ravel(), observation["direction"])


def grid() -> GymDomain:
    return GymDomain("BabyAI-GoToRedBallGrey-v0", {"offline": ["Go to the red ball."]}, "terminated", observe=squares,
                     max_steps=20)


MAKERS = {"line": line, "continuous line": lambda: line(True), "unjudged line": lambda: line(judged=False),
          "cartpole": cartpole, "pendulum": pendulum, "minigrid": grid, "metaworld": MetaWorld}


@pytest.fixture(scope="module", params=MAKERS, ids=list(MAKERS))
def domain(request):
    return MAKERS[request.param]()


def starts(domain, n: int = 12, first: int = 0):
    goals = domain.goals(domain.levels[0])
    seeds = start_seeds(0, first + n, "contract")[first:]
    return goals, np.arange(first, first + n) % len(goals), seeds


def test_it_is_a_domain(domain):
    assert check_domain(domain) is domain
    for level in domain.levels:
        goals = domain.goals(level)
        assert goals and goals == domain.goals(level) and {g.level for g in goals} == {level}
    with pytest.raises(ValueError, match="unknown level 'nowhere'"):
        domain.goals("nowhere")


def test_the_same_goal_and_seed_are_the_same_start(domain):
    goals, index, seeds = starts(domain)
    first = domain.start(goals, index, seeds)
    evaluate("random", domain, goals, 5)   # other episodes in between leave no trace
    again = domain.start(goals, index, seeds)
    np.testing.assert_array_equal(first.states, again.states)
    backwards = domain.start(goals, index[::-1], seeds[::-1])
    np.testing.assert_array_equal(first.states, backwards.states[::-1])
    for i in (0, 7):
        alone = domain.start(goals, index[i:i + 1], seeds[i:i + 1])
        np.testing.assert_array_equal(first.states[i], alone.states[0])


def test_the_same_start_in_another_instance(domain, request):
    goals, index, seeds = starts(domain)
    other = MAKERS[request.node.callspec.params["domain"]]()
    np.testing.assert_array_equal(domain.start(goals, index, seeds).states, other.start(goals, index, seeds).states)


def test_different_seeds_are_different_starts(domain):
    goals, index, seeds = starts(domain, 30)
    states = domain.start(goals, index, seeds).states
    assert len(np.unique(states, axis=0)) > 5


def test_no_start_fulfils_its_goal(domain):
    goals, index, seeds = starts(domain, 40)
    states = domain.start(goals, index, seeds).states
    success = judge_success(domain, goals, index, states, states)
    assert success is None or not success.any()


def test_states_are_finite_and_in_bounds(domain):
    r = collect(domain, domain.goals(domain.levels[0]), 20, policy=RANDOM, seed=1)
    t = r.transitions()
    for states in (r.states[:, 0], t["states"], t["next_states"]):
        assert states.dtype == np.float32 and np.isfinite(states).all()
        assert all(domain.state_space.contains(s) for s in states)
    if domain.limits is not None:
        assert not domain.limits.outside(t["next_states"]).any()
        assert not domain.limits.too_fast(t["states"], t["next_states"]).any()
    codec_of(domain).check(r.actions[r.mask])


def test_returned_arrays_are_not_aliased(domain):
    "What a simulator handed out stays as it was, and writing to it changes nothing."
    goals, index, seeds = starts(domain, 4)
    simulator, twin = domain.start(goals, index, seeds), domain.start(goals, index, seeds)
    act = behaviour_of(domain, RANDOM)[1].act
    rows, rng = np.arange(4), numpy_rng(0, "contract")
    for _ in range(3):
        actions = act(simulator, rows, rng)
        handed_out = simulator.states
        kept = handed_out.copy()
        results = simulator.step(rows, actions)
        np.testing.assert_array_equal(handed_out, kept)
        assert not np.shares_memory(handed_out, simulator.states)
        expected = twin.step(rows, actions.copy())
        for mine, theirs in zip(results, expected):
            np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(simulator.states, twin.states)
        for array in (handed_out, *results):
            array[...] = 0
        actions[...] = 0
        over = results[1] | results[2] | expected[1] | expected[2]
        rows = rows[~over]
        if not len(rows):
            break


def test_step_answers_in_the_right_shapes(domain):
    goals, index, seeds = starts(domain, 4)
    simulator = domain.start(goals, index, seeds)
    np.testing.assert_array_equal(simulator.index, index)
    np.testing.assert_array_equal(simulator.seeds, seeds)
    rows = np.array([3, 1])
    before = simulator.states.copy()
    reward, success, failure = simulator.step(rows, codec_of(domain).sample(numpy_rng(0), 2))
    assert reward.shape == success.shape == failure.shape == (2,)
    assert (reward.dtype, success.dtype, failure.dtype) == (np.float32, bool, bool)
    np.testing.assert_array_equal(simulator.states[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("seed", [0, 1])
def test_replay_reproduces_collected_rollouts_exactly(domain, seed):
    goals = domain.goals(domain.levels[0])
    r = collect(domain, goals, 16, seed=seed, keep_failures=True)
    again = replay(domain, r)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(r, name), err_msg=name)
    assert again.goals == r.goals and again.domain == r.domain == domain.name


def test_success_of_states_is_what_the_world_said(domain):
    r = collect(domain, domain.goals(domain.levels[0]), 30, seed=0, keep_failures=True)
    judged = judge_success(domain, r.goals, r.goal, r.states, r.states[:, 0])
    if judged is None:
        return
    ended = judged[np.arange(len(r)), r.lengths]
    np.testing.assert_array_equal(ended, r.success)
    inside = np.arange(r.max_steps + 1) < r.lengths[:, None]
    assert not judged[inside].any()   # an episode is over at its first success


def test_another_domain_is_told_apart(domain):
    r = collect(domain, domain.goals(domain.levels[0]), 2, seed=0, keep_failures=True)
    with pytest.raises(ValueError, match=f"rollouts of domain '{domain.name}' were handed to 'another'"):
        replay(line(name="another"), r)


def test_evaluation_depends_on_its_arguments_alone(domain):
    goals = domain.goals(domain.levels[-1])
    one, two = (evaluate("random", domain, goals, 12, seed=3, record=True) for _ in range(2))
    assert one.rollouts.digest() == two.rollouts.digest()
    assert one.rollouts.digest() != evaluate("random", domain, goals, 12, seed=4, record=True).rollouts.digest()


def test_these_environments_are_not_ours():
    assert {gym.spec(name).namespace for name in ("CartPole-v1", "Pendulum-v1")} == {None}
    assert gym.spec("CartPole-v1").entry_point.startswith("gymnasium.")
