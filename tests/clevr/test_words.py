"Captions, questions, meanings and agreement, by hand and against the physics of goals."
import numpy as np
import pytest

from kalm.clevr.goals import COLOURS, COMPASS, COMPASS_VECTORS, LEVELS, all_of, gather, line_up, move, push, success
from kalm.clevr.sentences import goal_set
from kalm.clevr.words import MOVED, PROMPTS, ClevrWords, named, read, score_explanations
from kalm.core.files import numpy_rng
from kalm.core.goals import Goal
from kalm.core.rollouts import Rollouts

WORDS = ClevrWords()
MOVES = goal_set("offline")[::18]


def places(n, name="places"):
    return numpy_rng(0, name).uniform(-.5, .5, (n, 10))


# ---- captions and questions ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("moves, said", [
    ({}, "nothing"), ({0: (-.2, .1)}, "red left"), ({1: (.1, .3)}, "blue back"), ({2: (-.1, -.2)}, "green front"),
    ({4: (.3, 0)}, "cyan right"), ({0: (.1, 0), 3: (0, -.11)}, "purple front"),
    ({0: (.2, 0), 3: (0, -.19)}, "red right"),
    ({2: (.9 * MOVED, 0)}, "nothing"), ({2: (1.1 * MOVED, 0)}, "green right"),
    ({i: (0, .9 * MOVED) for i in range(5)}, "nothing"),
    ({2: (.8 * MOVED, .8 * MOVED - 1e-4)}, "green right")], ids=str)
def test_captions_by_hand(moves, said):
    state, step = places(1)[0], np.zeros((5, 2))
    for ball, way in moves.items():
        step[ball] = way
    assert WORDS.caption(state, state + step.ravel()) == said


def test_questions_by_hand():
    state = np.array([0, 0, .2, .1, -.2, .1, .1, .2, .1, -.3])  # red in the middle, the others round it
    said = dict(WORDS.questions(state))
    assert len(said) == len(WORDS.questions(state)) == 20
    assert list(said)[:5] == ["red blue", "red green", "red purple", "red cyan", "blue red"]
    assert [said[f"{c} red"] for c in COLOURS[1:]] == ["right", "left", "back", "front"]
    assert [said[f"red {c}"] for c in COLOURS[1:]] == ["left", "right", "front", "back"]
    # the last lies on the very diagonal, at -45 degrees
    assert (said["green blue"], said["purple cyan"], said["blue purple"]) == ("left", "back", "right")


@pytest.mark.parametrize("state", [np.zeros(9), np.full(10, np.nan)])
def test_states_that_are_none_are_refused(state):
    with pytest.raises(ValueError, match="expected"):
        WORDS.questions(state)
    with pytest.raises(ValueError, match="expected"):
        WORDS.caption(state, state)


def test_answers_are_those_of_angles():
    for state in places(100):
        x, said = state.reshape(5, 2), dict(WORDS.questions(state))
        for i, a in enumerate(COLOURS):
            for j, b in enumerate(COLOURS):
                if i != j:
                    dx, dy = x[i] - x[j]
                    quarter = round(np.degrees(np.arctan2(dy, dx)) / 90) % 4
                    assert said[f"{a} {b}"] == ["right", "back", "left", "front"][quarter]


def test_a_move_is_met_where_its_meaning_is_an_answer_and_the_balls_are_near():
    held = 0
    for state in places(40):
        true, x = {f"{question} {answer}" for question, answer in WORDS.questions(state)}, state.reshape(5, 2)
        for goal in MOVES:
            a, b = (x[COLOURS.index(goal.task[role])] for role in ("source", "target"))
            near = np.linalg.norm(a - b) < .39
            assert success(goal, state) == (near and WORDS.meaning(goal) in true)
            held += bool(near and WORDS.meaning(goal) in true)
    assert held > 50


# ---- what sentences and goals say ------------------------------------------------------------------------------------

@pytest.mark.parametrize("goal, said", [
    (move("red", "blue", "behind"), "red blue back"), (push("cyan", "front"), "cyan front"), (gather("green"), ""),
    (line_up(), ""), (all_of([move("red", "blue", "left"), gather("green"), move("cyan", "red", "right")]),
                      "red blue left; cyan red right")])
def test_meanings_by_hand(goal, said):
    assert WORDS.meaning(goal) == said


@pytest.mark.parametrize("level", LEVELS)
def test_meanings_tell_tasks_apart(level):
    goals = goal_set(level)
    meant = {}
    for goal in goals:
        meant.setdefault(WORDS.meaning(goal), set()).add(goal.key)
    assert len(meant) == dict(offline=80, rephrase=80, easy=20, hard=141, unheard=80 + 20 + 68 + 1)[level]
    assert all(len(keys) == 1 for said, keys in meant.items() if said)


@pytest.mark.parametrize("text, colours, sides", [
    ("Move the red ball behind the blue ball.", ["red", "blue"], ["behind"]),
    ("Blue should have RED on its left, not blue.", ["blue", "red"], ["left"]),
    ("the green/cyan pair: front!", ["green", "cyan"], ["front"]), ("at the back of purple", ["purple"], ["behind"]),
    ("to the rear", [], ["behind"]), ("right of it, then left", [], ["right", "left"]),
    ("reddish coloured leftovers", [], []), ("", [], [])])
def test_what_a_sentence_names(text, colours, sides):
    assert named(text) == (colours, sides)
    assert named(read(text)) == (colours, sides)   # nothing is lost in key words


# ---- agreement -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("goal, said, ok", [
    ("Push the red ball to the left.", "red left", True), ("Push the red ball to the left.", "red right", False),
    ("Push the red ball to the left.", "blue left", False), ("Push the red ball to the left.", "red", False),
    ("Push the red ball to the left.", "left", False), ("Push the red ball to the left.", "nothing", False),
    ("Push the red ball to the left.", "", False), ("Push the red ball to the left.", "red left front", False),
    ("Roll the cyan ball backwards.", "cyan back", True), ("Roll the cyan ball backwards.", "cyan behind", True),
    ("Steer green towards the rear.", "green front", False), ("Make a heap.", "red left", False),
    ("Gather the other four balls around the green ball.", "green left", True),
    ("Gather the other four balls around the green ball.", "red left", False)])
def test_a_caption_may_name_only_what_a_goal_of_one_ball_names(goal, said, ok):
    assert WORDS.agree(goal, said) is ok
    assert WORDS.agree(WORDS.read(goal), said) is ok


@pytest.mark.parametrize("a, b, same", [
    ("red blue left", "red blue left", True), ("red blue left", "blue red right", True),
    ("red blue back", "blue red front", True), ("cyan red front", "red cyan back", True),
    ("red blue left", "Left of blue is red", False), ("red blue left", "red blue right", False),
    ("red blue left", "blue red left", False), ("red blue left", "blue red front", False),
    ("red blue left", "red green left", False), ("red blue", "red blue", False),
    ("left", "left", False), ("", "", False),
    ("red blue green left", "red blue green left", False), ("red blue left front", "red blue left front", False),
    ("red blue left", "red blue left front", False), ("red blue left", "", False),
    ("red blue left", "red left", False)])
def test_two_balls_and_a_side_by_hand(a, b, same):
    assert WORDS.agree(a, b) is same


@pytest.mark.parametrize("a, b, same", [
    ("red blue left; green cyan back", "cyan green front; red blue left", True),
    ("red blue left; green cyan back", "red blue left", False),
    ("red blue left", "red blue left; green cyan back", False),
    ("red blue left; red blue left", "red blue left; green cyan back", False)])
def test_parts_agree_one_by_one_in_any_order(a, b, same):
    assert WORDS.agree(a, b) is same


def test_meanings_agree_where_they_hold_in_the_same_states():
    true = [{f"{question} {answer}" for question, answer in WORDS.questions(state)} for state in places(60)]
    meant = [WORDS.meaning(goal) for goal in MOVES]
    holds = [tuple(m in said for said in true) for m in meant]
    assert [[WORDS.agree(a, b) for b in meant] for a in meant] == [[x == y for y in holds] for x in holds]
    assert len(set(holds)) == 40


# ---- how goals are checked, and prompts ------------------------------------------------------------------------------

@pytest.mark.parametrize("goal, how", [
    (push("red", "left"), "caption"), (move("red", "blue", "left"), "explanation"), (line_up(), ""),
    (gather("green"), ""),
    (all_of([move("red", "blue", "left"), move("cyan", "red", "right")]), ""),
    (push("red", "left", text="Red, blue: left."), ""), (push("red", "left").replace(max_steps=2), ""),
    (push("red", "left", text="Do something."), ""), (line_up("Red, blue, and the left wall."), ""),
    (Goal("Open the green door in the cyan wall on the right."), ""),
    (Goal("Open the red door in the blue wall, left.", task={"type": "open"}), "")])
def test_goals_are_checked_where_words_and_task_can_be_compared(goal, how):
    assert WORDS.checked_by(goal) == how


def test_wordings_are_different_and_whole():
    assert {task: len(said) for task, said in PROMPTS.items()} == {"explain": 8, "caption": 4, "question": 4}
    assert WORDS.prompts is PROMPTS
    for said in PROMPTS.values():
        assert len(set(said)) == len(said) and {len(parts) for parts in said} == {2}
        assert not any("{" in part for parts in said for part in parts)


# ---- scores of explanations ------------------------------------------------------------------------------------------

def table(**at):
    "One state: balls far from each other but for those given as colour=(x, y)."
    x = np.array([(-.9, .9), (.9, .9), (0, 2.), (.9, -.9), (-.9, -.9)])
    for colour, xy in at.items():
        x[COLOURS.index(colour)] = xy
    return x.ravel()


def test_scores_by_hand():
    goals = [move("red", "blue", "left", text="Red left of blue."),
             move("red", "blue", "left", text="To the left of blue there should be red.")]
    texts = ["Red, left of blue.", "blue, left of red", "To the left of blue there should be red.", "red right of blue",
             "red left of green", "red and blue and green left", "mumble", "", "blue right of red"]
    before, after, n = table(red=(-.9, 0), blue=(0, 0)), table(red=(-.2, 0), blue=(0, 0)), len(texts)
    states = np.tile(np.stack([before, after]), (n, 1, 1))
    r = Rollouts(states, np.zeros((n, 1), int), goal=np.arange(n) % 2, goals=goals)
    got = score_explanations(texts, r, goals)
    assert got.balls.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 1]
    assert got.order.tolist() == [1, 0, 1, 1, 0, 0, 0, 0, 0]
    assert got.direction.tolist() == [1, 1, 1, 0, 1, 1, 0, 0, 0]
    assert got.all.tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 0]
    assert got.true.tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 1]   # the last names another goal, which came true as well
    untaught = score_explanations(texts[2:3], r[2:3], [])     # unknown sentence: first named is first moved
    assert not untaught.order[0] and not untaught.true[0]
    nothing = score_explanations([], r[:0], goals)
    assert len(nothing.all) == len(nothing.true) == 0
    assert "-" in nothing._repr_markdown_() and "9" in got._repr_markdown_()


def test_true_is_what_the_last_step_brought():
    near, far = table(red=(-.2, 0), blue=(0, 0)), table(red=(-.9, 0), blue=(0, 0))
    green = table(red=(-.2, 0), blue=(0, 0), green=(0, .2))
    states = np.stack([[far, far, near], [far, near, near], [near, far, near], [near, near, far], [near, near, green],
                       [near, near, near], [far, near, near]])
    r = Rollouts(states, np.zeros((7, 2), int), lengths=[2, 2, 2, 2, 2, 0, 1], goal=np.zeros(7, int),
                 goals=[move("red", "blue", "left")])

    def true(text):
        return score_explanations([text] * 7, r, []).true.tolist()

    assert true("red, left of blue") == true("blue is right of red") == [1, 0, 1, 0, 0, 0, 1]
    assert true("green behind blue") == [0, 0, 0, 0, 1, 0, 0]
    assert not any(true("red and blue") + true("red left"))


def test_every_taught_sentence_is_scored_right():
    goals = goal_set("offline")
    n = np.arange(len(goals))
    source, target = (np.array([COLOURS.index(g.task[role]) for g in goals]) for role in ("source", "target"))
    x = np.tile(table().reshape(5, 2), (len(goals), 2, 1, 1))
    x[n, :, target] = 0
    x[n, 1, source] = .2 * COMPASS_VECTORS[[COMPASS.index(g.task["direction"]) for g in goals]]
    r = Rollouts(x.reshape(-1, 2, 10), np.zeros((len(goals), 1), int), goal=n, goals=goals)
    got = score_explanations([g.text for g in goals], r, goals)
    wrong = [g.text for g, ok in zip(goals, got.all & got.balls & got.true) if not ok]
    assert not wrong


def test_only_moves_are_scored():
    r = Rollouts(np.zeros((1, 2, 10)), np.zeros((1, 1), int), goal=[0], goals=[gather("green")])
    with pytest.raises(ValueError, match="scored for moves only"):
        score_explanations(["red"], r, [])
    with pytest.raises(ValueError, match="2 explanations of 1 rollouts"):
        score_explanations(["red", "blue"], r, [])
