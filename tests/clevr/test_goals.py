"Goals of CLEVR-Robot: definitions of success, rewards, batches, storage, bad input."
import json
import re
from pathlib import Path

import numpy as np
import pytest

from kalm.clevr.goals import (
    COLOURS,
    COMPASS,
    TYPES,
    action_success,
    all_of,
    find_layout,
    gather,
    goal_table,
    in_sector,
    line_up,
    move,
    potential_rows,
    push,
    reward_rows,
    success,
    success_rows,
    task_rows,
)
from kalm.clevr.sentences import configurations, goal_set
from kalm.core.goals import Goal, load_goals, save_goals

GOLDEN = Path(__file__).resolve().parents[3]/"shared/golden/clevr_transitions.npz"
AXES = dict(behind=(0, 1), left=(-1, 0), front=(0, -1), right=(1, 0))


@pytest.fixture(scope="module")
def states():
    return np.random.default_rng(0).uniform(-.5, .5, (4000, 10))


def reward(goal, before, after):
    "`reward_rows` for one goal and any leading shape, each step the first of its rollout."
    x, y = np.reshape(before, (-1, 10)), np.reshape(after, (-1, 10))
    return reward_rows([goal], np.zeros(len(x), int), x, y, x).reshape(np.shape(before)[:-1])


# --- definitions of success

@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip(f"the published transitions are not at {GOLDEN}; they are not ours to ship")
    with np.load(GOLDEN, allow_pickle=False) as f:
        d = {k: f[k] for k in f}
    d["state"] = np.stack([d["physics"][:, 7*i + j] for i in range(5) for j in range(2)], 1)
    d["goals"] = [move(COLOURS[list(g[:5]).index(1)], COLOURS[list(g[:5]).index(2)], COMPASS[g[5]]) for g in d["goal"]]
    return d


def test_published_rewards_and_ends(golden):
    index = np.arange(len(golden["goals"]))
    assert len(index) > 400 and golden["terminal"].any()
    rewards = reward_rows(golden["goals"], index, golden["state"], golden["next_state"], golden["state"])
    np.testing.assert_allclose(rewards, golden["reward"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(success_rows(golden["goals"], index, golden["next_state"]), golden["terminal"])
    assert not success_rows(golden["goals"], index, golden["state"]).any()


def test_published_transitions_do_not_settle_the_boundary(golden):
    "The notebook says that none comes closer than 0.24 degrees to a sector's boundary."
    a, b, d = goal_table(golden["goals"])[:, 0, 1:].T
    x, rows = golden["next_state"].astype(float).reshape(-1, 5, 2), np.arange(len(a))
    axis = np.array([AXES[w] for w in COMPASS])
    offset = x[rows, a] - x[rows, b]
    angle = np.degrees(np.arccos((offset*axis[d]).sum(1)/np.linalg.norm(offset, axis=1)))  # from the goal's direction
    assert .24 < np.abs(angle - 45).min() < .25


@pytest.mark.parametrize("word", COMPASS)
def test_move_success_against_angles(word, states):
    x = states.reshape(-1, 5, 2)
    offset = x[:, 3] - x[:, 1]
    angle = np.degrees(np.arctan2(offset[:, 1], offset[:, 0]) - np.arctan2(AXES[word][1], AXES[word][0]))
    angle = (angle + 180) % 360 - 180
    want = (-45 <= angle) & (angle < 45) & (np.linalg.norm(offset, axis=1) < .39)
    got = success(move("purple", "blue", word), states)
    assert got.dtype == bool and 100 < got.sum() < 2000
    np.testing.assert_array_equal(got, want)


def test_sectors_are_half_open_and_tile_the_plane():
    closed = {"behind": (1, 1), "left": (-1, 1), "front": (-1, -1), "right": (1, -1)}  # their clockwise ends
    for d, word in enumerate(COMPASS):
        for other, signs in closed.items():
            assert in_sector(.2*np.array(signs), d) == (other == word)
    offsets = np.random.default_rng(1).integers(-3, 4, (500, 2)).astype(float)
    held = sum(in_sector(offsets, d).astype(int) for d in range(4))
    np.testing.assert_array_equal(held, (offsets != 0).any(1))


def test_distance_is_strict():
    s = np.zeros(10)
    s[1] = .39
    assert not success(move("red", "blue", "behind"), s)
    s[1] = np.nextafter(.39, 0)
    assert success(move("red", "blue", "behind"), s)


def test_push():
    goal, start = push("green", "front"), np.zeros((3, 10))
    states = start.copy()
    states[:, 5] = -.16, -.14, .3
    np.testing.assert_array_equal(success_rows([goal], [0, 0, 0], states, start), [True, False, False])
    np.testing.assert_array_equal(success(goal, states, start[0]), [True, False, False])
    np.testing.assert_allclose(reward(goal, start, states), [100, 1.4, -3], atol=1e-5)
    assert goal.max_steps == 1 and line_up().max_steps == 50


COUNTING = dict(behind=(1, 4, 5), left=(2, 5, 7), front=(3, 6, 7), right=(0, 4, 6))


@pytest.mark.parametrize("word, directions", COUNTING.items())
def test_action_judge(word, directions):
    got = action_success([push("cyan", word)], np.zeros(40, int), np.arange(40))
    np.testing.assert_array_equal(np.flatnonzero(got), [32 + d for d in directions])


def test_action_judge_in_batches():
    goals = [push("cyan", "left"), push("red", "behind")]
    got = action_success(goals, [0, 1], np.array([[34, 1, 33], [34, 1, 33]]))
    np.testing.assert_array_equal(got, [[True, False, False], [False, True, False]])


def test_all_of_is_the_conjunction(states):
    a, b = move("red", "blue", "behind"), move("cyan", "blue", "left")
    both = all_of([a, b])
    held = success(both, states)
    np.testing.assert_array_equal(held, success(a, states) & success(b, states))
    assert held.any()
    after = states[::-1]

    def distances(s):
        x = s.reshape(-1, 5, 2)
        to_points = [x[:, i] - x[:, 1] - .195*np.array(AXES[w]) for i, w in ((0, "behind"), (4, "left"))]
        return np.linalg.norm(to_points, axis=-1).sum(0)

    got = reward(both, states, after)
    assert got.dtype == np.float32
    want = np.where(success(both, after), 100, 10*(distances(states) - distances(after)))
    np.testing.assert_allclose(got, want, atol=1e-4)


def row_of_balls(degrees):
    "Five balls 0.3 m apart, each at an angle from the one before."
    steps = [(np.cos(np.radians(t)), np.sin(np.radians(t))) for t in degrees]
    return .3*np.cumsum(np.array([(0, 0), *steps]), 0).ravel()


@pytest.mark.parametrize("degrees, want", [((0, 0, 0, 0), True), ((29, -29, 29, -29), True), ((0, 31, 0, 0), False),
                                           ((0, 0, 0, -31), False), ((180,)*4, False), ((0, 0, 150, 0), False)])
def test_line_up(degrees, want):
    assert success(line_up(), row_of_balls(degrees)) == want


def test_line_up_reward_is_the_distance_to_the_cone():
    want = 10*.3*(np.sin(np.radians(20)) - np.sin(np.radians(10)))
    got = reward(line_up(), row_of_balls((0, 50, 0, 0)), row_of_balls((0, 40, 0, 0)))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_gather():
    def around(r):
        return np.array([(r, 0), (0, r), (0, 0), (-r, 0), (0, -r)]).ravel()

    goal = gather("green")
    assert success(goal, around(.32)) and not success(goal, around(.33)) and not success(gather("red"), around(.32))
    np.testing.assert_allclose(reward(goal, around(.5), around(.4)), 10*4*.1, atol=1e-5)
    np.testing.assert_allclose(reward(goal, around(.5), around(.3)), 100)


@pytest.mark.parametrize("goal", [line_up(), gather("green"), gather("cyan")], ids=lambda g: g.text)
def test_potentials_fall_to_zero_at_success(goal):
    rng = np.random.default_rng(4)
    end = find_layout(goal, rng).reshape(5, 2)
    near = (end + rng.normal(0, .05, (3000, 5, 2))).reshape(-1, 10)
    held, phi = success(goal, near), potential_rows([goal], [0], near[None])[0]
    assert 50 < held.sum() < 2950
    assert (phi[held] < 1e-12).all() and (phi[~held] > 0).all()


# --- shapes and batches

ONE_OF_EACH = [move("red", "cyan", "left"), push("blue", "right"), line_up(), gather("green"),
               all_of([move("red", "blue", "behind"), gather("green"), move("green", "cyan", "right")])]


def type_of(goal):
    return goal.task["type"]


@pytest.mark.parametrize("goal", ONE_OF_EACH, ids=type_of)
def test_any_shape_between_row_and_ball(goal, states):
    s, start = states[:60].reshape(3, 4, 5, 10), states[60:63]
    flat = success_rows([goal], np.zeros(60, int), s.reshape(60, 10), np.repeat(start, 20, 0))
    np.testing.assert_array_equal(success_rows([goal], [0, 0, 0], s, start), flat.reshape(3, 4, 5))
    one = success(goal, s[0, 0, 0], start[0])
    assert np.shape(one) == () and bool(one) == flat[0]
    assert reward_rows([goal], [0, 0, 0], s[:, :-1], s[:, 1:], start).shape == (3, 3, 5)
    assert success_rows([goal], [], np.zeros((0, 7, 10)), np.zeros((0, 10))).shape == (0, 7)


def test_rows_of_different_goals_are_judged_as_each_alone():
    rng = np.random.default_rng(5)
    goals = ONE_OF_EACH + [move("purple", "green", w) for w in COMPASS] + goal_set("hard")[::40]
    ends = np.stack([np.zeros(10) if type_of(g) == "push" else find_layout(g, rng) for g in goals])
    index = rng.integers(len(goals), size=300)
    walk = ends[index][:, None] + np.cumsum(rng.normal(0, .05, (300, 8, 10)), 1)[:, ::-1]
    before, after, start = walk[:, :-1], walk[:, 1:], walk[:, 0]
    alone = [([goals[i]], [0], w[None]) for i, w in zip(index, walk)]
    held = np.stack([success_rows(g, i, w, w[:, 0])[0] for g, i, w in alone])
    paid = np.stack([reward_rows(g, i, w[:, :-1], w[:, 1:], w[:, 0])[0] for g, i, w in alone])
    assert {type_of(goals[i]) for i in index[held.any(1)]} == {*TYPES, "all"}
    np.testing.assert_array_equal(success_rows(goals, index, walk, start), held)
    np.testing.assert_array_equal(reward_rows(goals, index, before, after, start), paid)
    np.testing.assert_array_equal(success_rows(goals, index, walk[:, 3], start), held[:, 3])
    np.testing.assert_array_equal(paid == 100, held[:, 1:])


def test_tables_are_made_once_for_the_same_goals():
    goals = goal_set("offline")
    table = goal_table(goals)
    assert table is goal_table(goal_set("offline")) and table is goal_table(tuple(goals))   # other lists, same goals
    assert table is not goal_table(goals[::-1]) and not table.flags.writeable
    changed = list(goals)
    goal_table(changed)
    changed[0] = push("red", "left")                                                        # the list, not its goals
    np.testing.assert_array_equal(goal_table(changed)[0], [[TYPES.index("push"), 0, -1, 1]])
    np.testing.assert_array_equal(table[0], [[0, 0, 1, 0]])


@pytest.mark.parametrize("call, message", [
    (lambda goals, x: success_rows(goals, [0, 1], x), "start="),
    (lambda goals, x: reward_rows(goals, [-1, 1], x, x, x[:, 0]), "goal index from -1"),
    (lambda goals, x: reward_rows(goals, [0, 2], x, x, x[:, 0]), "expected whole numbers, 0 to 1"),
    (lambda goals, x: reward_rows(goals, [0], x, x, x[:, 0]), "for 2 rows"),
    (lambda goals, x: success_rows(goals, [0, 1], x[0, 0]), "expected (B, ..., 10)"),
    (lambda goals, x: success_rows(goals, [0, 1], x, start=x), "for 2 rows of states: expected (2, 10)"),
    (lambda goals, x: reward_rows(goals, [0, 1], x, x[:, :2], x[:, 0]), "expected (2, 3, 10), as states have"),
])
def test_batched_judges_refuse_nonsense(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call([push("red", "left"), line_up()], np.zeros((2, 3, 10)))


# --- goals that can be reached

def test_hard_goals_are_possible():
    rng = np.random.default_rng(0)
    tasks = list({g.key: g for g in goal_set("hard")}.values())
    assert len(tasks) == 142
    for g in tasks[:140:5] + tasks[140:]:
        s = find_layout(g, rng)
        x = s.reshape(5, 2)
        gaps = np.linalg.norm(x[:, None] - x[None], axis=-1)[np.triu_indices(5, 1)]
        assert success(g, s) and gaps.min() >= .26 - 1e-9
        assert (np.abs(x[:, 0]) <= .47).all() and (-.17 <= x[:, 1]).all() and (x[:, 1] <= .57).all()


def test_impossible_goals_are_not_found():
    impossible = all_of([move("red", "blue", "left"), move("red", "blue", "right")])
    with pytest.raises(ValueError, match="no layout found"):
        find_layout(impossible, np.random.default_rng(0), steps=20)
    with pytest.raises(ValueError, match="a push is a change"):
        find_layout(push("red", "left"), np.random.default_rng(0))


# --- as values, in words, in files

@pytest.mark.parametrize("goal, text", [
    (move("red", "blue", "left"), "Move the red ball to the left of the blue ball."),
    (push("cyan", "behind"), "Push the cyan ball to the back."),
    (line_up(), "Line up the balls from left to right: red, blue, green, purple, cyan."),
    (gather("red"), "Gather the other four balls around the red ball."),
    (all_of([move("red", "blue", "left"), move("cyan", "red", "front")]),
     "Place the red ball to the left of the blue ball and the cyan ball in front of the red ball."),
    (all_of([gather("red"), line_up("Make a row.")]),
     "At once: Gather the other four balls around the red ball and Make a row."),
])
def test_plain_sentences(goal, text):
    assert goal.text == text


def test_goals_are_values():
    a, b = move("red", "blue", "left"), move("red", "blue", "left")
    assert a == b and len({a, b}) == 1 and a != move("blue", "red", "left")
    assert a.key == move("red", "blue", "left", "Go left.", "rephrase").key
    assert a.task == {"type": "move", "source": "red", "target": "blue", "direction": "left"}
    assert "red" in a._repr_markdown_() and a.text in a._repr_markdown_()


def test_files(tmp_path):
    goals = goal_set("hard") + ONE_OF_EACH
    save_goals(tmp_path/"goals.json", goals)
    again = load_goals(tmp_path/"goals.json")
    assert again == goals
    np.testing.assert_array_equal(goal_table(again), goal_table(goals))
    assert [Goal.from_json(json.loads(json.dumps(g.to_json()))) for g in goals] == goals


@pytest.mark.parametrize("task, message", [
    ({}, "unknown type None"), ({"type": "jump"}, "unknown type 'jump'"), (3, "unknown type None"),
    ({"type": "push", "source": "pink", "direction": "left"}, "unknown colour 'pink'"),
    ({"type": "push", "source": "red"}, "expected type, source, direction"),
    ({"type": "push", "source": ["red"], "direction": "left"}, "unknown colour ['red']"),
    ({"type": "line_up", "source": "red"}, "expected type"),
    ({"type": "all", "parts": 3}, "at least one goal"), ({"type": "all", "parts": [3]}, "unknown type None"),
])
def test_bad_tasks(task, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        task_rows(task)
    if isinstance(task, dict):   # a goal from a file, or of another world
        with pytest.raises(ValueError, match=re.escape(message)):
            success(Goal("Go.", task=task), np.zeros(10))


@pytest.mark.parametrize("make, message", [
    (lambda: move("pink", "blue", "left"), "unknown colour 'pink': one of red, blue, green, purple, cyan"),
    (lambda: move("red", 3, "left"), "unknown colour 3"),
    (lambda: move("red", "blue", "up"), "unknown direction 'up': one of behind, left, front, right"),
    (lambda: move("red", "blue", "left", level="medium"), "unknown level 'medium': one of offline, rephrase, easy"),
    (lambda: move("red", "red", "left"), "source and target are both 'red'"),
    (lambda: move("red", "blue", "left", text=""), "a goal needs a sentence"),
    (lambda: push("white", "left"), "unknown colour 'white'"),
    (lambda: push("red", "north"), "unknown direction 'north'"),
    (lambda: gather("black"), "unknown colour 'black'"),
    (lambda: all_of([]), "at least one goal"),
    (lambda: all_of([push("red", "left")]), "a single state decides"),
    (lambda: all_of([all_of([line_up()])]), "a single state decides"),
    (lambda: all_of(["red"]), "takes goals"),
    (lambda: success(push("red", "left"), np.zeros(10)), "start="),
    (lambda: success_rows(["red left"], [0], np.zeros((1, 10))), "unknown goal 'red left'"),
    (lambda: action_success([line_up()], [0], [0]), "push goals only, got one of type 'line_up'"),
    (lambda: action_success([push("red", "left")], [0], [40]), "expected 0 to 39"),
    (lambda: action_success([push("red", "left")], [0], [-1]), "expected 0 to 39"),
    (lambda: action_success([push("red", "left")], [0], [1.5]), "expected whole numbers"),
])
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("goal", ONE_OF_EACH, ids=type_of)
def test_bad_states(goal):
    ok, start = np.zeros((3, 10)), np.zeros(10)
    for bad in (np.zeros((3, 9)), np.zeros(11)):
        with pytest.raises(ValueError, match="expected"):
            success(goal, bad, start)
        with pytest.raises(ValueError, match="expected"):
            reward_rows([goal], [0, 0, 0], ok, bad, ok)
    for value in (np.nan, np.inf):
        bad = ok.copy()
        bad[1, 4] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            success(goal, bad, start)
        with pytest.raises(ValueError, match="NaN or infinite"):
            reward_rows([goal], [0, 0, 0], bad, ok, ok)
        with pytest.raises(ValueError, match="next_states contain NaN or infinite"):
            reward_rows([goal], [0, 0, 0], ok, bad, ok)
    with pytest.raises(ValueError, match="start of shape"):
        success(goal, ok, start=np.zeros(3))


def test_configurations_cover_every_move_once():
    table = goal_table(configurations())
    assert table.shape == (80, 1, 4) and len(np.unique(table[:, 0], axis=0)) == 80
    assert (table[:, 0, 0] == TYPES.index("move")).all()
