"Pictures of rollouts: what they show, and what they refuse."

from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402
from worlds import line  # noqa: E402

from kalm.core.episodes import collect  # noqa: E402
from kalm.core.goals import Goal  # noqa: E402
from kalm.core.rollouts import IMAGINED, Rollout, Rollouts  # noqa: E402
from kalm.run import strips  # noqa: E402


class Drawn:
    "A domain that writes down how it is asked to draw, and is `world` in everything else."

    def __init__(self, world):
        self.world, self.calls = world, []

    def __getattr__(self, name):
        return getattr(self.world, name)

    def draw(self, ax, state, before=None, action=None, goal=None):
        self.calls.append(dict(state=state, before=before, action=action, goal=goal))
        ax.plot([state[0]], [state[1]], "o")
        ax.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))


@pytest.fixture(autouse=True)
def nothing_stays_open():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def world():
    return line()


@pytest.fixture(scope="module")
def real(world) -> Rollouts:
    return collect(world, world.goals("offline"), 6, seed=0, progress=False)


@pytest.fixture
def imagined(real) -> Rollouts:
    "The same actions; each imagined step goes 0.1 further down in the second coordinate, which never moves."
    shift = -0.1 * np.arange(real.max_steps + 1, dtype=np.float32)[:, None] * (np.arange(2) == 1)
    return replace(real, states=real.states + shift, source=np.full(len(real), IMAGINED))


def texts(fig) -> list[str]:
    return [t.get_text() for t in fig.texts]


def long_rollout(goal: Goal | None, n: int = 20) -> Rollout:
    states = np.stack([np.linspace(0, 0.5, n + 1), np.zeros(n + 1)], 1).astype(np.float32)
    return Rollout(states, np.ones(n, np.int64), np.zeros(n, np.float32), truncated=True, goal=goal)


# ---------------------------------------------------------------- film strips


def test_a_strip_has_a_picture_a_state_up_to_the_limit(world, real):
    one = long_rollout(world.goals("offline")[0])
    assert len(strips.film_strip(world, one, most=5).axes) == 5
    short = real[real.lengths <= 5]
    assert len(short) > 1
    assert len(strips.film_strip(world, short, most=6).axes) == (short.lengths + 1).sum()


def test_a_strip_says_what_happened_and_whether_the_goal_was_met(world, real):
    one = real[0]
    told = texts(strips.film_strip(world, one, "a remark", most=20))
    assert {one.goal.text, "a remark", f"{len(one)}: goal met ✓"} <= set(told)
    for t in range(len(one)):
        moved = "right" if one.states[t + 1, 0] > one.states[t, 0] else "left"
        assert f"{t}: {moved}" in told
    missed = Rollout(one.states[:2], one.actions[:1], one.rewards[:1], goal=one.goal)
    assert "1: goal not met ✗" in texts(strips.film_strip(world, missed))


def test_without_words_the_action_is_named():
    mute, continuous = line(words=False), line(continuous=True, words=False)
    goal = mute.goals("offline")[0]
    assert "0: action 1" in texts(strips.film_strip(mute, long_rollout(goal, 2)))
    pushed = replace(long_rollout(goal, 2), actions=np.array([[0.5], [-1]], np.float32))
    assert {"0: 0.50", "1: -1.00"} <= set(texts(strips.film_strip(continuous, pushed)))


def test_a_thinned_strip_counts_its_steps(world):
    told = texts(strips.film_strip(world, long_rollout(world.goals("offline")[0], 12), most=3))
    assert [t.split(":")[0] for t in told[1:]] == ["0", "6", "12"]


def test_unknown_goals_are_not_judged(world):
    unjudged = line(judged=False)
    piece = replace(long_rollout(unjudged.goals("offline")[0], 2), truncated=False)
    assert strips.succeeded(unjudged, piece) is None
    assert strips.succeeded(unjudged, replace(piece, truncated=True)) is False
    assert strips.succeeded(unjudged, replace(piece, success=True)) is True
    assert strips.succeeded(world, long_rollout(None, 2)) is None
    assert not any("goal" in t for t in texts(strips.film_strip(unjudged, piece))[1:])


def test_captions_and_titles_keep_to_their_frames(world):
    "Text stays within the figure, and captions within the frame above them."
    goal = Goal("Walk " + "on and on " * 20 + "to the right end.", task={"side": "right"})
    fig = strips.film_strip(world, long_rollout(goal, 4), "a remark " * 30)
    canvas = fig.canvas.get_renderer()
    for t in fig.texts:
        box = t.get_window_extent(canvas)
        assert box.x0 >= 0 and box.x1 <= fig.bbox.x1 and box.y0 >= -1 and box.y1 <= fig.bbox.y1 + 1
    captions = [t.get_window_extent(canvas) for t in fig.texts if t.get_text()[0].isdigit()]
    assert all(a.x1 < b.x0 for a, b in zip(captions, captions[1:]))


# ---------------------------------------------------------------- pictures of states


def test_a_domain_draws_its_own_states(world, real):
    drawn, one = Drawn(world), real[0]
    strips.film_strip(drawn, one, most=20)
    assert len(drawn.calls) == len(one) + 1
    for t, call in enumerate(drawn.calls[:-1]):
        np.testing.assert_array_equal(call["state"], one.states[t])
        assert call["action"] == one.actions[t] and call["before"] is None and call["goal"] == one.goal
    last = drawn.calls[-1]
    assert last["action"] is None
    np.testing.assert_array_equal(last["before"], one.states[-2])


def test_a_sentence_that_nobody_can_judge_is_not_handed_to_the_domain(world, real):
    drawn = Drawn(world)
    strips.film_strip(drawn, replace(real[0], goal=None), most=3)
    assert all(call["goal"] is None for call in drawn.calls)


def test_without_draw_bars_show_shares_of_the_largest_value(world):
    one = long_rollout(None, 2)
    axes = strips.film_strip(world, one).axes
    heights = [[p.get_height() for p in ax.patches] for ax in axes]
    np.testing.assert_allclose(heights, [[0, 0], [0.5, 0], [1, 0]], atol=1e-6)


def test_frames_are_pictures_of_each_state(world, real):
    for d in (world, Drawn(world)):
        frames = strips.rollout_frames(d, real[0], size=(60, 80))
        assert frames.shape == (len(real[0]) + 1, 60, 80, 3) and frames.dtype == np.uint8
        assert (frames[0] != frames[1]).any()
    assert not plt.get_fignums()


# ---------------------------------------------------------------- imagined and real


def test_compare_replays_and_tells_the_distance(world, real, imagined):
    i = int(np.argmax(real.lengths <= 5))
    told = texts(strips.compare_strip(world, imagined[[i]]))
    assert {"imagined", "real", "0: 0.000 apart", "1: 0.050 apart"} <= set(told)  # mean over two parts, one is off
    n = int(real.lengths[i])
    assert f"{n}: {0.05 * n:.3f} apart\ngoal met ✓" in told


def test_a_unit_stands_beside_the_distance(world, real, imagined):
    drawn = Drawn(world)
    drawn.unit = "m"
    assert "0: 0.000 m apart" in texts(strips.compare_strip(drawn, imagined[:1], real[:1]))


def test_a_real_rollout_that_ends_early_keeps_its_end(world):
    goal = world.goals("offline")[0]
    start = world.start([goal], [0], [5]).states
    states = np.repeat(start, 9, 0)[None]
    still = Rollouts(states, np.ones((1, 8), np.int64), goal=[0], seed=[5], goals=[goal], domain="line")
    fig = strips.compare_strip(world, still, most=3)
    told = texts(fig)
    assert "8: goal not met ✗" in told
    ends = [t for t in told if t.endswith("apart\ngoal met ✓")]
    assert len(ends) == 1 and int(ends[0].split(":")[0]) < 8


def test_rollouts_that_cannot_be_replayed_are_refused(world, imagined):
    with pytest.raises(ValueError, match="not replayable"):
        strips.compare_strip(world, replace(imagined[:1], seed=[-1]))


# ---------------------------------------------------------------- GIFs


def test_gifs_are_written_whole(tmp_path):
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    frames[1] = 255
    strips.gif(frames, tmp_path / "a.gif", fps=4)
    with Image.open(tmp_path / "a.gif") as im:
        assert im.n_frames == 3 and im.info["duration"] == 250
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda w, r: strips.film_strip(w, []), "no rollouts"),
        (lambda w, r: strips.film_strip(w, r, notes=["one"]), "1 notes for 6"),
        (lambda w, r: strips.film_strip(w, r, most=1), "at least 2 frames"),
        (lambda w, r: strips.film_strip(w, replace(r[0], states=np.zeros((3, 9)))), r"shape \(3, 9\)"),
        (lambda w, r: strips.compare_strip(w, r[:1], r[:2]), "expected as many"),
        (lambda w, r: strips.compare_strip(w, long_rollout(None, 2), long_rollout(None, 3)), "no more real ones"),
        (lambda w, r: strips.gif(np.zeros((0, 3)), "never.gif"), "frames"),
        (lambda w, r: strips.gif(np.zeros((1, 4, 4, 3), np.uint8), "never.gif", fps=0), "fps"),
    ],
)
def test_bad_input_is_named_before_anything_is_drawn(world, real, call, said):
    with pytest.raises(ValueError, match=said):
        call(world, real)
    assert not plt.get_fignums()
