"Pictures show what is there: balls, letters, pushes, and exactly where goals hold."
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Circle, PathPatch, Wedge

from kalm.clevr.draw import BALL_COLOURS, action_words, draw, draw_camera, project
from kalm.clevr.goals import GATHERED, all_of, gather, line_up, move, push, success
from kalm.clevr.render import render_states
from kalm.core.files import numpy_rng
from kalm.core.gl import can_render
from kalm.core.goals import Goal

STATE = np.array([-.3, .3, 0, .1, .3, .4, -.3, -.1, .35, 0])  # no two balls touch


def axes(width=2., dpi=100):
    "Axes that fill a figure, and the figure."
    fig = Figure(figsize=(width, .83 * width), dpi=dpi)
    return fig.add_axes((0, 0, 1, 1)), fig


def pixels(fig):
    "The picture, (H, W, 3) 0 to 255."
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def at(ax, fig, point):
    "Row and column of a point in the picture."
    col, row = ax.transData.transform(point)
    return round(fig.bbox.height - row), round(col)


def discs(ax):
    return [p for p in ax.patches if isinstance(p, Circle) and p.get_fill()]


def test_every_ball_is_a_disc_of_its_colour_with_its_letter():
    ax, _ = axes()
    draw(ax, STATE)
    np.testing.assert_allclose([p.center for p in discs(ax)], STATE.reshape(5, 2))
    assert [to_hex(p.get_facecolor()) for p in discs(ax)] == list(BALL_COLOURS)
    letters = [p for p in ax.patches if isinstance(p, PathPatch)]
    middle = [p.get_path().get_extents().get_points().mean(0) for p in letters]
    np.testing.assert_allclose(middle, STATE.reshape(5, 2), atol=1e-6)
    assert len({p.get_path().vertices.shape for p in letters}) >= 4   # R, B, G, P, C differ


@pytest.mark.parametrize("width", [1.5, 6.])
def test_letters_grow_with_the_picture_and_are_seen_at_150_pixels(width):
    ax, fig = axes(width)
    draw(ax, STATE)
    image = pixels(fig)
    for ball, centre in enumerate(STATE.reshape(5, 2)):
        (row, col), reach = at(ax, fig, centre), round(.1 * width * 100 / 1.46)
        part = image[row - reach:row + reach + 1, col - reach:col + reach + 1]
        dark = (part.max(-1) < 90).mean()
        assert .08 < dark < .5, (ball, dark)


@pytest.mark.parametrize("direction", ["behind", "left", "front", "right"])
def test_the_shaded_sector_is_where_a_move_is_met(direction):
    goal, ax = move("red", "blue", direction), axes()[0]
    draw(ax, STATE, goal=goal)
    wedge = next(p for p in ax.patches if isinstance(p, Wedge))
    shaded = wedge.get_path().transformed(wedge.get_patch_transform())
    spots = numpy_rng(1, "spots").uniform(-.35, .45, (300, 2))
    tried = np.tile(STATE, (300, 1))
    tried[:, :2] = spots
    met = success(goal, tried)
    near = [success(goal, tried + .005 * np.r_[a, b, np.zeros(8)]) for a in (-1, 1) for b in (-1, 1)]
    sure = (np.array(near) == met).all(0)   # away from the edge, which is drawn as a polygon
    assert sure.mean() > .9 and met[sure].sum() > 10
    np.testing.assert_array_equal(shaded.contains_points(spots)[sure], met[sure])


@pytest.mark.parametrize("goal, patches", [
    (move("red", "blue", "left"), 2), (push("red", "left"), 1), (gather("green"), 2), (line_up(), 4),
    (all_of([move("red", "blue", "left"), move("cyan", "green", "behind"), gather("green")]), 6)])
def test_every_type_of_goal_is_shaded_part_by_part(goal, patches):
    plain, ax = axes()[0], axes()[0]
    draw(plain, STATE)
    draw(ax, STATE, goal=goal)
    assert len(ax.patches) - len(plain.patches) == patches


def test_the_ring_of_a_gathering_has_its_radius():
    ax, _ = axes()
    draw(ax, STATE, goal=gather("cyan"))
    ring = next(p for p in ax.patches if isinstance(p, Circle) and not p.get_fill())
    np.testing.assert_allclose((*ring.center, ring.radius), (*STATE[8:], GATHERED))


def test_a_push_is_judged_from_where_it_began():
    after = STATE.copy()
    after[0] -= .2
    lines = []
    for kw in (dict(), dict(before=STATE)):
        ax, _ = axes()
        draw(ax, after, goal=push("red", "left"), **kw)
        lines.append(next(line.get_xdata() for line in ax.lines if line.get_color() == "k"))
    np.testing.assert_allclose(lines, [[after[0] - .15] * 2, [STATE[0] - .15] * 2])


def test_before_leaves_rings_where_moved_balls_were():
    after = STATE.copy()
    after[4:6] += (0, -.2)
    ax, _ = axes()
    draw(ax, after, before=STATE)
    rings = [p for p in ax.patches if isinstance(p, Circle) and not p.get_fill()]
    np.testing.assert_allclose([p.center for p in rings], [STATE[4:6]])


@pytest.mark.parametrize("action, way", [(0, (1, 0)), (1, (0, 1)), (2, (-1, 0)), (31, (-1, -1))])
def test_arrows_point_where_the_push_goes(action, way):
    for before in (None, STATE + .05):
        ax, _ = axes()
        draw(ax, STATE, before=before, action=action)
        centre = (STATE if before is None else before).reshape(5, 2)[action // 8]
        for arrow in ax.texts:
            head, tail = np.array(arrow.xy) - centre, np.array(arrow.xyann) - centre
            for straight in (head - tail, -tail):   # along the push, and beginning behind the ball
                np.testing.assert_allclose(straight / np.linalg.norm(straight), way / np.linalg.norm(way), atol=1e-9)
        assert len(ax.texts) == 2


def test_action_words():
    said = [action_words(a) for a in range(40)]
    assert len(set(said)) == 40 and said[0] == "red →" and said[39] == "cyan ↙"


@pytest.mark.parametrize("call, says", [
    (lambda ax: draw(ax, STATE[:9]), "expected"), (lambda ax: draw(ax, np.tile(STATE, (2, 1))), r"expected \(10,\)"),
    (lambda ax: draw(ax, np.full(10, np.nan)), "NaN"), (lambda ax: draw(ax, STATE, action=40), "0 to 39"),
    (lambda ax: draw(ax, STATE, action=-1), "0 to 39"), (lambda ax: draw(ax, STATE, before=STATE[:4]), "before"),
    (lambda ax: draw_camera(ax, STATE, action=99), "0 to 39"),
    (lambda ax: draw(ax, STATE, goal=Goal("Open the door.", task={"type": "open"})), "unknown type 'open'")])
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call(axes()[0])


@pytest.mark.skipif(not can_render(), reason="no OpenGL")
def test_projection_finds_the_red_ball():
    for spot in ((-.3, .3), (.3, -.1)):
        state = np.full(10, 3.)   # the others far away
        state[:2] = spot
        image = render_states(state[None], size=(120, 160))[0].astype(int)
        rows, cols = np.nonzero((image[..., 0] > 120) & (image[..., 0] > 2 * image[..., 1]))
        np.testing.assert_allclose(project(state[None, :2], (120, 160))[0], (cols.mean(), rows.mean()), atol=2.5)


@pytest.mark.skipif(not can_render(), reason="no OpenGL")
def test_the_camera_draws_state_and_push():
    ax, _ = axes()
    draw_camera(ax, STATE, action=9, size=(60, 80))
    assert ax.images[0].get_array().shape == (60, 80, 3) and len(ax.texts) == 2
