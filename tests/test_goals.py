"Goals: definitions, sentences, storage, bad input."
import dataclasses, json, re
from collections import Counter
from pathlib import Path
import numpy as np
import pytest
from kalm.goals import (COLOURS, COMPASS, LEVELS, Goal, configuration_index, configurations, find_layout, goal_array, goal_set,
                        in_sector, load_goals, relations, reward_rows, save_goals, split_goals, success_rows)

GOLDEN = Path(__file__).resolve().parents[2]/"shared/golden/clevr_transitions.npz"
AXES = dict(behind=(0, 1), left=(-1, 0), front=(0, -1), right=(1, 0))


@pytest.fixture(scope="module")
def states(): return np.random.default_rng(0).uniform(-.5, .5, (4000, 10))


# ---- definitions -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists(): pytest.skip(f"the published transitions are not at {GOLDEN}; they are not ours to ship")
    with np.load(GOLDEN, allow_pickle=False) as f: d = {k: f[k] for k in f}
    d["state"] = np.stack([d["physics"][:, 7*i + j] for i in range(5) for j in range(2)], 1)
    d["goals"] = [Goal.move(COLOURS[list(g[:5]).index(1)], COLOURS[list(g[:5]).index(2)], COMPASS[g[5]]) for g in d["goal"]]
    return d


def test_published_rewards_and_terminals(golden):
    index = np.arange(len(golden["goals"]))
    pairs = np.stack([golden["state"], golden["next_state"]], 1)
    assert len(index) > 400 and golden["terminal"].any()
    rewards = reward_rows(golden["goals"], index, pairs)[:, 0]
    np.testing.assert_allclose(rewards, golden["reward"], rtol=0, atol=1e-5)
    success = success_rows(golden["goals"], index, pairs)
    np.testing.assert_array_equal(success[:, 1], golden["terminal"])
    assert not success[:, 0].any()
    single = [g.reward(s, n) for g, s, n in zip(golden["goals"], golden["state"], golden["next_state"])]
    np.testing.assert_array_equal(single, rewards)


def test_published_transitions_do_not_settle_the_boundary(golden):
    "The notebook says that none comes closer than 0.24 degrees to a sector's boundary."
    a, b, d = goal_array(golden["goals"])[:, 1:].T
    x, rows, axis = golden["next_state"].astype(float).reshape(-1, 5, 2), np.arange(len(a)), np.array([AXES[w] for w in COMPASS])
    off = x[rows, a] - x[rows, b]
    angle = np.degrees(np.arccos((off*axis[d]).sum(1)/np.linalg.norm(off, axis=1)))      # from the goal's direction
    assert .24 < np.abs(angle - 45).min() < .25


@pytest.mark.parametrize("word", COMPASS)
def test_move_success_against_angles(word, states):
    "An independent computation with angles and distances."
    x = states.reshape(-1, 5, 2)
    off = x[:, 3] - x[:, 1]
    angle = np.degrees(np.arctan2(off[:, 1], off[:, 0]) - np.arctan2(AXES[word][1], AXES[word][0]))
    angle = (angle + 180) % 360 - 180
    want = (-45 <= angle) & (angle < 45) & (np.linalg.norm(off, axis=1) < .39)
    got = Goal.move("purple", "blue", word).success(states)
    assert got.dtype == bool and 100 < got.sum() < 2000
    np.testing.assert_array_equal(got, want)


def test_sectors_are_half_open_and_tile_the_plane():
    corner = lambda sx, sy: np.array([sx*.2, sy*.2])
    closed = {"behind": corner(1, 1), "left": corner(-1, 1), "front": corner(-1, -1), "right": corner(1, -1)}  # the clockwise end
    for d, word in enumerate(COMPASS):
        for other, offset in closed.items(): assert in_sector(offset, d) == (other == word)
    offsets = np.random.default_rng(1).integers(-3, 4, (500, 2)).astype(float)
    held = sum(in_sector(offsets, d).astype(int) for d in range(4))
    np.testing.assert_array_equal(held, (offsets != 0).any(1))


def test_distance_is_strict():
    s = np.zeros(10); s[1] = .39
    assert not Goal.move("red", "blue", "behind").success(s)
    s[1] = np.nextafter(.39, 0)
    assert Goal.move("red", "blue", "behind").success(s)


def test_push():
    goal, start = Goal.push("green", "front"), np.zeros((3, 10))
    states = start.copy(); states[:, 5] = -.16, -.14, .3
    np.testing.assert_array_equal(goal.success(states, start), [True, False, False])
    np.testing.assert_array_equal(goal.success(states, start[0]), [True, False, False])      # one start for all
    np.testing.assert_allclose(goal.reward(start, states), [100, 1.4, -3], atol=1e-5)
    good = {(1, 4, 5): "behind", (2, 5, 7): "left", (3, 6, 7): "front", (0, 4, 6): "right"}
    for directions, word in good.items():
        got = np.flatnonzero(Goal.push("cyan", word).action_success(np.arange(40)))
        np.testing.assert_array_equal(got, [32 + d for d in directions])
    assert not goal.action_success(-1) and goal.action_success(np.full((2, 3), 19)).shape == (2, 3)
    assert goal.max_steps == 1 and Goal.line_up().max_steps == 50


def test_all_of_is_the_conjunction(states):
    a, b = Goal.move("red", "blue", "behind"), Goal.move("cyan", "blue", "left")
    both = Goal.all_of([a, b])
    np.testing.assert_array_equal(both.success(states), a.success(states) & b.success(states))
    assert both.success(states).any()
    nxt = states[::-1]
    done = both.success(nxt)
    want = 10*sum(np.linalg.norm(s[:, i] - s[:, 1] - .195*np.array(AXES[w]), axis=1)*sign
                  for s, sign in ((states.reshape(-1, 5, 2), 1), (nxt.reshape(-1, 5, 2), -1)) for i, w in ((0, "behind"), (4, "left")))
    got = both.reward(states, nxt)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.where(done, 100, want), atol=1e-4)


def test_line_up():
    line = lambda degrees: np.cumsum(np.r_[[(0, 0)], [(np.cos(np.radians(t)), np.sin(np.radians(t))) for t in degrees]], 0).ravel()*.3
    goal = Goal.line_up()
    for degrees, want in (((0, 0, 0, 0), True), ((29, -29, 29, -29), True), ((0, 31, 0, 0), False), ((0, 0, 0, -31), False), ((180,)*4, False), ((0, 0, 150, 0), False)):
        assert goal.success(line(degrees)) == want, degrees
    assert goal.reward(line((0, 50, 0, 0)), line((0, 40, 0, 0))) > 0
    want = 10*.3*(np.sin(np.radians(20)) - np.sin(np.radians(10)))            # distances to the cone's side
    np.testing.assert_allclose(goal.reward(line((0, 50, 0, 0)), line((0, 40, 0, 0))), want, atol=1e-5)


def test_gather():
    around = lambda r: np.array([(r, 0), (0, r), (0, 0), (-r, 0), (0, -r)]).ravel()
    goal = Goal.gather("green")
    assert goal.success(around(.32)) and not goal.success(around(.33)) and not Goal.gather("red").success(around(.32))
    np.testing.assert_allclose(goal.reward(around(.5), around(.4)), 10*4*.1, atol=1e-5)
    np.testing.assert_allclose(goal.reward(around(.5), around(.3)), 100)


@pytest.mark.parametrize("goal", [Goal.line_up(), Goal.gather("green"), Goal.gather("cyan")], ids=lambda g: g.text)
def test_potentials_fall_to_zero_at_success(goal):
    "From any state, the most that a failing step can still earn is paid on the way to a success, and is positive."
    rng = np.random.default_rng(4)
    end = find_layout(goal, rng).reshape(5, 2)
    near = (end + rng.normal(0, .05, (3000, 5, 2))).reshape(-1, 10)
    ok = goal.success(near)
    assert 50 < ok.sum() < 2950
    failing, inside = near[~ok], near[ok][0]
    back = goal.reward(np.broadcast_to(inside, failing.shape), failing)      # phi(inside) - phi(failing) = -phi(failing)
    assert (back < 0).all()


# ---- shapes, batches ---------------------------------------------------------------------------------------------

ONE_OF_EACH = [Goal.move("red", "cyan", "left"), Goal.push("blue", "right"), Goal.line_up(), Goal.gather("green"),
               Goal.all_of([Goal.move("red", "blue", "behind"), Goal.gather("green"), Goal.move("green", "cyan", "right")])]


@pytest.mark.parametrize("goal", ONE_OF_EACH, ids=lambda g: g.kind)
def test_any_leading_shape(goal, states):
    s = states[:60].reshape(3, 4, 5, 10)
    flat = goal.success(s.reshape(60, 10), start=states[60:120])
    np.testing.assert_array_equal(goal.success(s, start=states[60:120].reshape(s.shape)), flat.reshape(3, 4, 5))
    one = goal.success(s[0, 0, 0], start=states[60])
    assert np.shape(one) == () and bool(one) == flat[0]
    assert goal.reward(s[:, :-1], s[:, 1:]).shape == (3, 3, 5)
    assert goal.success(np.zeros((0, 10)), start=np.zeros((0, 10))).shape == (0,)
    np.testing.assert_array_equal(goal.success(s.astype(np.float32), start=s[0, 0, 0]), goal.success(s.astype(np.float32).astype(float), start=s[0, 0, 0]))


def test_batched_judges_equal_single_ones():
    rng = np.random.default_rng(5)
    goals = ONE_OF_EACH + [Goal.move("purple", "green", w) for w in COMPASS] + goal_set("hard")[::20]
    ends = np.stack([find_layout(g, rng) if g.kind != "push" else np.zeros(10) for g in goals])
    index = rng.integers(len(goals), size=300)
    walk = ends[index][:, None] + np.cumsum(rng.normal(0, .05, (300, 8, 10)), 1)[:, ::-1]
    success = np.stack([goals[i].success(w, start=w[0]) for i, w in zip(index, walk)])
    reward = np.stack([goals[i].reward(w[:-1], w[1:], start=w[0]) for i, w in zip(index, walk)])
    assert {goals[i].kind for i in index[success.any(1)]} == {"move", "push", "all", "line_up", "gather"}
    np.testing.assert_array_equal(success_rows(goals, index, walk, start=walk[:, 0]), success)
    np.testing.assert_allclose(reward_rows(goals, index, walk), reward, atol=1e-5)
    np.testing.assert_array_equal(success_rows(goals, index, walk[:, 3], start=walk[:, 0]), success[:, 3])
    assert reward_rows(goals, index[:0], walk[:0]).shape == (0, 7)


def test_batched_judges_refuse_nonsense():
    goals, x = [Goal.push("red", "left"), Goal.line_up()], np.zeros((2, 3, 10))
    with pytest.raises(ValueError, match="start="): success_rows(goals, [0, 1], x)
    with pytest.raises(ValueError, match="goal index from -1"): reward_rows(goals, [-1, 1], x)
    with pytest.raises(ValueError, match="to 2: expected integers 0 to 1"): reward_rows(goals, [0, 2], x)
    with pytest.raises(ValueError, match="for 2 rows"): reward_rows(goals, [0], x)
    with pytest.raises(ValueError, match=r"\(B, T\+1, 10\)"): reward_rows(goals, [0, 1], x[0])
    with pytest.raises(ValueError, match=r"start for 2 rows"): success_rows(goals, [0, 1], x, start=x)


# ---- sentences ---------------------------------------------------------------------------------------------------

def pattern(text): return re.sub("|".join(COLOURS), "*", text.lower())
SIDES = dict(behind="behind|back|backwards|rear", left="left|leftwards|left-hand", front="front|frontwards", right="right|rightwards|right-hand")


def test_sizes_and_tasks():
    assert [len(goal_set(level)) for level in LEVELS] == [1440, 800, 400, 200]
    assert all(g.level == level for level in LEVELS for g in goal_set(level))
    assert len(set(configurations())) == 80 and {g.kind for g in configurations()} == {"move"}
    np.testing.assert_array_equal(configuration_index(configurations()), np.arange(80))
    for level, each in (("offline", 18), ("rephrase", 10)):
        np.testing.assert_array_equal(np.bincount(configuration_index(goal_set(level))), np.full(80, each))
    assert set(Counter((g.source, g.direction) for g in goal_set("easy")).values()) == {20}
    assert {g.kind for g in goal_set("easy")} == {"push"} and (configuration_index(goal_set("easy")) == -1).all()
    assert Counter((g.kind, len(g.parts)) for g in goal_set("hard")) == {("all", 2): 80, ("all", 3): 60, ("line_up", 0): 30, ("gather", 0): 30}
    assert len({frozenset((p.source, p.target, p.direction) for p in g.parts) for g in goal_set("hard") if g.parts}) == 140
    assert {g.target for g in goal_set("hard") if g.kind == "gather"} == {COLOURS.index("green")}


def test_no_test_sentence_was_trained_on():
    tidy = lambda t: re.sub(r"\W+", " ", t.lower()).strip()
    trained = {tidy(g.text) for g in goal_set("offline")}
    assert len(trained) == 1440
    for level in LEVELS[1:]:
        unseen = {tidy(g.text) for g in goal_set(level)}
        assert len(unseen) == len(goal_set(level)) and not trained & unseen


def test_no_rephrase_pattern_is_an_offline_pattern():
    masked = {level: {pattern(g.text) for g in goal_set(level)} for level in LEVELS}
    assert len(masked["rephrase"]) == 40 and len(masked["offline"]) == 72 and len(masked["easy"]) == 80
    for level in LEVELS[1:]: assert not masked["offline"] & masked[level]


@pytest.mark.parametrize("level", LEVELS)
def test_sentences_are_plain_sentences(level):
    for g in goal_set(level):
        assert re.fullmatch(r"[A-Z][A-Za-z,:' -]*[.?]", g.text) and "  " not in g.text, g.text
        assert g.text[-1] == "?" or not re.match(r"(Could|Can|Why|Would|Might|Do you)\b", g.text), g.text
        assert not re.search(r"\ba (?=[aeiou])", g.text), g.text


@pytest.mark.parametrize("level", LEVELS[:3])
def test_colours_and_direction_can_be_read_off(level):
    for g in goal_set(level):
        words = re.findall(r"[a-z-]+", g.text.lower())
        assert {w for w, p in SIDES.items() if any(re.fullmatch(p, x) for x in words)} == {COMPASS[g.direction]}, g.text
        assert Counter(x for x in words if x in COLOURS) == Counter(COLOURS[i] for i in (g.source, g.target) if i >= 0), g.text


def test_hard_sentences_say_every_part():
    where = dict(behind="behind", left="to the left of", front="in front of", right="to the right of")
    for g in goal_set("hard"):
        for p in g.parts:
            assert re.search(f"the {COLOURS[p.source]} ball (is )?{where[COMPASS[p.direction]]} the {COLOURS[p.target]} ball", g.text), g.text
        named = [x for x in re.findall(r"[a-z]+", g.text.lower()) if x in COLOURS]
        if g.kind == "line_up": assert set(named) == set(COLOURS) and re.search("left|right", g.text), g.text
        if g.kind == "gather": assert "green" in named, g.text
        if g.parts: assert len(named) == 2*len(g.parts)


def test_hard_goals_are_possible():
    rng = np.random.default_rng(0)
    tasks = {g.parts or g.kind: g for g in goal_set("hard")}
    assert len(tasks) == 142
    for g in tasks.values():
        s = find_layout(g, rng)
        x = s.reshape(5, 2)
        gaps = np.linalg.norm(x[:, None] - x[None], axis=-1)[np.triu_indices(5, 1)]
        assert g.success(s) and gaps.min() >= .26 - 1e-9 and (np.abs(x[:, 0]) <= .47).all() and (-.17 <= x[:, 1]).all() and (x[:, 1] <= .57).all()


def test_impossible_goals_are_not_found():
    with pytest.raises(ValueError, match="no layout found"):
        find_layout(Goal.all_of([Goal.move("red", "blue", "left"), Goal.move("red", "blue", "right")]), np.random.default_rng(0), steps=20)
    with pytest.raises(ValueError, match="a push is a change"): find_layout(Goal.push("red", "left"), np.random.default_rng(0))


def test_goal_sets_are_stable_and_private():
    first = goal_set("hard")
    first.clear()
    assert len(goal_set("hard")) == 200 and goal_set("easy") == goal_set("easy")
    c = configurations(); c.pop()
    assert len(configurations()) == 80


def test_split_goals():
    goals = goal_set("offline") + goal_set("hard")
    kept, held = split_goals(goals, .25, np.random.default_rng(0))
    assert sorted(g.text for g in kept + held) == sorted(g.text for g in goals) and not set(kept) & set(held)
    np.testing.assert_array_equal(np.bincount(configuration_index([g for g in held if g.kind == "move"])), np.full(80, 4))
    assert {g.parts for g in kept} == {g.parts for g in goals}
    assert split_goals(goals, .25, np.random.default_rng(0)) == (kept, held)
    with pytest.raises(ValueError, match="fraction"): split_goals(goals, 1., np.random.default_rng(0))


# ---- key words ---------------------------------------------------------------------------------------------------

SIDE = dict(behind="back", left="left", front="front", right="right")


@pytest.mark.parametrize("goal, gist", [
    (Goal.move("red", "blue", "left"), "red blue left"), (Goal.move("cyan", "green", "behind", text="Hide cyan."), "cyan green back"), (Goal.move("blue", "red", "front"), "blue red front"),
    (Goal.push("purple", "right"), "purple right"), (Goal.push("red", "behind"), "red back"), (Goal.line_up(), ""), (Goal.gather("red"), ""), (Goal.all_of([Goal.gather("green")]), ""),
    (Goal.all_of([Goal.move("red", "cyan", "left"), Goal.move("green", "blue", "behind")]), "red cyan left; green blue back"),
    (Goal.all_of([Goal.move("red", "blue", "right"), Goal.gather("green"), Goal.move("green", "cyan", "front")]), "red blue right; green cyan front")], ids=lambda x: x.gist if isinstance(x, Goal) else "")
def test_gists_by_hand(goal, gist): assert goal.gist == gist


@pytest.mark.parametrize("level", LEVELS)
def test_gists_say_what_the_goal_is_and_nothing_else(level):
    said = {}
    for g in goal_set(level):
        said.setdefault(g.gist, set()).add(tuple((p.kind, p.source, p.target, p.direction) for p in g.parts or (g,)))
        want = [" ".join([COLOURS[p.source]] + [COLOURS[p.target]] * (p.kind == "move") + [SIDE[COMPASS[p.direction]]]) for p in g.parts or (g,) if p.kind in ("move", "push")]
        assert g.gist == "; ".join(want), g.text
    assert len(said) == dict(offline=80, rephrase=80, easy=20, hard=141)[level] and all(len(goals) == 1 for gist, goals in said.items() if gist)


def test_relations_by_hand():
    s = np.array([0, 0, .2, .1, -.2, .1, .1, .2, .1, -.3])              # red in the middle, blue to its right, green to its left, purple behind it, cyan in front of it
    said = dict(relations(s)); assert len(said) == len(relations(s)) == 20 and list(said)[:5] == ["red blue", "red green", "red purple", "red cyan", "blue red"]
    assert [said[f"{c} red"] for c in COLOURS[1:]] == ["right", "left", "back", "front"] and [said[f"red {c}"] for c in COLOURS[1:]] == ["left", "right", "front", "back"]
    assert (said["green blue"], said["purple cyan"], said["blue purple"]) == ("left", "back", "right")   # the last on the very diagonal, at -45 degrees
    for bad in (np.zeros(9), np.full(10, np.nan)):
        with pytest.raises(ValueError, match="expected"): relations(bad)


def test_relations_are_those_of_angles(states):
    for s in states[:200]:
        x, said = s.reshape(5, 2), dict(relations(s))
        for i, a in enumerate(COLOURS):
            for j, b in enumerate(COLOURS):
                if i != j: dx, dy = x[i] - x[j]; assert said[f"{a} {b}"] == ["right", "back", "left", "front"][round(np.degrees(np.arctan2(dy, dx)) / 90) % 4]


def test_relations_are_the_gists_that_hold(states):
    "A move goal is fulfilled exactly where its gist is a relation and the two balls are near."
    goals = configurations(); held = 0
    for s in states[:100]:
        true, x = {f"{q} {a}" for q, a in relations(s)}, s.reshape(5, 2)
        for g in goals: near = np.linalg.norm(x[g.source] - x[g.target]) < .39; assert g.success(s) == (near and g.gist in true); held += bool(near and g.gist in true)
    assert held > 100


# ---- storage -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("level", LEVELS)
def test_json_round_trip(level, tmp_path):
    goals = goal_set(level) + ONE_OF_EACH
    assert [Goal.from_json(json.loads(json.dumps(g.to_json()))) for g in goals] == goals
    save_goals(tmp_path/"g.json", goals)
    assert load_goals(tmp_path/"g.json") == goals


@pytest.mark.parametrize("bad", [3, [], {}, {"text": "Go.", "level": "easy"}, {"text": "Go.", "level": "easy", "kind": "push", "source": "pink", "direction": "left"},
    {"text": "Go.", "level": "easy", "kind": "push", "source": "red"}, {"text": "Go.", "level": "easy", "kind": "jump"}, {"text": "Go.", "level": "x", "kind": "line_up"},
    {"text": "Go.", "level": "hard", "kind": "line_up", "source": "red"}, {"text": "Go.", "level": "hard", "kind": "all", "parts": 3}, {"text": "", "level": "hard", "kind": "line_up"},
    {"text": "Go.", "level": "hard", "kind": "line_up", "extra": 1}, {"text": "Go.", "level": ["hard"], "kind": "line_up"}, {"text": 7, "level": "hard", "kind": "line_up"}], ids=str)
def test_bad_json_is_a_value_error(bad, tmp_path):
    with pytest.raises(ValueError): Goal.from_json(bad)
    (tmp_path/"g.json").write_text(json.dumps({"format": "kalm goals 1", "goals": [bad]}))
    with pytest.raises(ValueError): load_goals(tmp_path/"g.json")


def test_bad_files(tmp_path):
    for text in ("", "{", "[]", "{}", '{"format": "kalm goals 1"}', '{"format": "other", "goals": []}'):
        (tmp_path/"g.json").write_text(text)
        with pytest.raises(ValueError): load_goals(tmp_path/"g.json")


def test_goals_are_values():
    a, b = Goal.move("red", "blue", "left"), Goal.move("red", "blue", "left")
    assert a == b and hash(a) == hash(b) and len({a, b}) == 1 and a != Goal.move("blue", "red", "left")
    with pytest.raises(dataclasses.FrozenInstanceError): a.text = "x"
    assert "red" in a._repr_markdown_() and a.text in a._repr_markdown_()


# ---- bad input ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, message", [
    (lambda: Goal.move("pink", "blue", "left"), "unknown colour 'pink': one of red, blue, green, purple, cyan"),
    (lambda: Goal.move("red", 3, "left"), "unknown colour 3"),
    (lambda: Goal.move("red", "blue", "up"), "unknown direction 'up': one of behind, left, front, right"),
    (lambda: Goal.move("red", "blue", "left", level="medium"), "unknown level 'medium': one of offline, rephrase, easy, hard"),
    (lambda: Goal.move("red", "red", "left"), "source and target are both 'red'"),
    (lambda: Goal.move("red", "blue", "left", text=""), "a goal needs a sentence"),
    (lambda: Goal.push("white", "left"), "unknown colour 'white'"),
    (lambda: Goal.push("red", "north"), "unknown direction 'north'"),
    (lambda: Goal.gather("black"), "unknown colour 'black'"),
    (lambda: Goal.all_of([]), "at least one goal"),
    (lambda: Goal.all_of([Goal.push("red", "left")]), "a single state decides"),
    (lambda: Goal.all_of([Goal.all_of([Goal.line_up()])]), "a single state decides"),
    (lambda: Goal.all_of(["red"]), "takes goals"),
    (lambda: goal_set("training"), "unknown level 'training': one of offline, rephrase, easy, hard"),
    (lambda: Goal("x", "offline", "move", 0, 7, 0), "target 7"),
    (lambda: Goal.push("red", "left").success(np.zeros(10)), "start="),
    (lambda: Goal.line_up().action_success(0), "push goals only"),
    (lambda: Goal.push("red", "left").action_success(40), "integers 0 to 39"),
    (lambda: Goal.push("red", "left").action_success(1.5), "integers 0 to 39"),
])
def test_bad_goals(make, message):
    with pytest.raises(ValueError, match=re.escape(message)): make()


@pytest.mark.parametrize("goal", ONE_OF_EACH, ids=lambda g: g.kind)
def test_bad_states(goal):
    ok = np.zeros((3, 10))
    for bad in (np.zeros((3, 9)), np.zeros(11), np.float64(1)):
        with pytest.raises(ValueError, match="expected"): goal.success(bad, start=ok)
        with pytest.raises(ValueError, match="expected"): goal.reward(ok, bad)
    for value in (np.nan, np.inf):
        bad = ok.copy(); bad[1, 4] = value
        with pytest.raises(ValueError, match="NaN or infinite"): goal.success(bad, start=ok)
        with pytest.raises(ValueError, match="NaN or infinite"): goal.reward(bad, ok)
    with pytest.raises(ValueError, match="start of shape"): Goal.push("red", "left").success(ok, start=np.zeros(3))
