"Drawings from plain data: what they show, and what they refuse."
import matplotlib
matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from kalm import plots
from kalm.core import Rollout, Rollouts, numpy_rng
from kalm.env import can_render, initial_states, render_states
from kalm.evaluate import wilson
from kalm.goals import LEVELS, Goal


def row(method, level, seed, successes, episodes=100, **more): return dict(method=method, level=level, seed=str(seed), successes=str(successes), episodes=str(episodes)) | more

ROWS = [row("bc", "offline", s, k) for s, k in enumerate((50, 60, 70))] + [row("bc+kalm", "hard", 0, 3)]
STATES = initial_states(12, numpy_rng(0, "plots")).astype(np.float32)
ROLLOUT = Rollout(STATES[:4], np.array([0, 12, 39]), np.zeros(3, np.float32), terminated=True)

@pytest.fixture(autouse=True)
def nothing_stays_open():
    yield
    plt.close("all")


# ---------------------------------------------------------------- cells and tables

def test_pooled_averages_seeds_and_its_interval_is_wilsons():
    cell = plots.pooled(ROWS, "bc", "offline")
    assert cell.rate == pytest.approx(.6) and (cell.seeds, cell.episodes) == (3, 300)
    np.testing.assert_allclose(cell[1:3], wilson(180, 300))
    assert plots.pooled(ROWS, "cql", "offline") is None

def test_checkpoints_of_a_seed_are_averaged_and_count_once():
    rows = [row("bc", "hard", s, k, step=str(t)) for s in (0, 1) for t, k in ((1, 10), (2, 20))]
    cell = plots.pooled(rows, "bc", "hard")
    assert cell.rate == pytest.approx(.15) and (cell.seeds, cell.episodes) == (2, 200)

def test_only_the_last_five_checkpoints_count():
    rows = [row("bc", "hard", 0, k, step=str(100 * t)) for t, k in ((10, 60), (1, 0), (9, 50), (8, 40), (7, 30), (6, 20), (2, 0))]; assert plots.pooled(rows, "bc", "hard").rate == pytest.approx(.4)

def test_success_curves_are_means_over_seeds():
    rows = [row("bc", "hard", s, k + s, step=str(t)) for s in (0, 2) for t, k in ((2000, 20), (1000, 10))] + [row("expert", "hard", 0, 68, step="0"), row("bc", "easy", 0, 5, step="1000")]
    easy, hard = plots.success_curves(rows).axes; assert (easy.get_title(), hard.get_title()) == ("easy", "hard")
    lines = {l.get_label(): l for l in hard.lines}; np.testing.assert_allclose(lines["bc"].get_xydata(), [(1000, 11), (2000, 21)]); assert set(lines["expert"].get_ydata()) == {68}
    [band] = hard.collections; y = band.get_paths()[0].vertices[:, 1]; assert (y.min(), y.max()) == pytest.approx((10, 22))

def test_by_checkpoint_has_the_steps_that_all_seeds_share():
    rows = [row("bc", "hard", s, k + s, step=str(t)) for s in (10, 2) for t, k in ((2000, 20), (1000, 10))] + [row("bc", "hard", 2, 9, step="3000"), row("bc", "easy", 2, 9, step="3000")]
    at, rates = plots.by_checkpoint(rows, "bc", "hard"); assert at.tolist() == [1000, 2000]; np.testing.assert_allclose(rates, [[.12, .22], [.2, .3]])
    assert [x.size for x in plots.by_checkpoint(rows, "cql", "hard")] == [0, 0]

def test_rows_of_two_runs_are_not_mixed():
    rows = [row("bc", "hard", 0, 1, config="aaa"), row("bc", "hard", 0, 9, config="bbb")]
    with pytest.raises(ValueError, match="2 runs.*aaa.*bbb"): plots.results_table(rows)
    with pytest.raises(ValueError, match="2 runs"): plots.success_bars(rows)

def test_table_has_our_value_its_interval_the_papers_and_the_evidence():
    text = plots.results_table(ROWS)
    assert "60.0 (54.4 to 65.4) [60.1]" in text and "- [7.7]" not in text and "[7.7]" in text and "arXiv 2404.09248" in text
    assert "bc: 3 seeds x 100 episodes" in text and "bc+kalm: 1 seed x 100 episodes" in text
    lines = text.splitlines()
    assert lines[0] == "| method | offline | hard |" and all(l.count("|") == 4 for l in lines[:4])
    assert "[60.1]" not in plots.results_table(ROWS, paper=False) and "arXiv" not in plots.results_table(ROWS, paper=False)

def test_plain_table_lines_up():
    lines = plots.results_table(ROWS, plain=True).splitlines()
    assert "|" not in "".join(lines)
    assert lines[0].index("offline") == lines[2].index("60.0") == lines[3].index("- [52.5]") and lines[0].index("hard") == lines[3].index("3.0")

def test_the_papers_numbers_are_those_of_its_bars():
    assert set(plots.PAPER) < set(plots.METHOD_COLOURS) and all(set(v) <= set(LEVELS) for v in plots.PAPER.values())
    assert "offline" not in plots.PAPER["lm"] and plots.PAPER["cql+kalm"]["hard"] == 7.8 and plots.PAPER["bc"]["offline"] == 60.1


# ---------------------------------------------------------------- bars and curves

def test_bars_have_the_height_of_the_rates_and_a_colour_a_method():
    ax = plots.success_bars(ROWS).axes[0]
    bars = {round(p.get_height(), 6): matplotlib.colors.to_hex(p.get_facecolor()).upper() for p in ax.patches if np.isfinite(p.get_height())}
    assert bars == {60.: plots.METHOD_COLOURS["bc"], 3.: plots.METHOD_COLOURS["bc+kalm"]}
    assert ax.get_ylim()[0] == 0

def test_bars_show_seeds_as_dots_and_the_paper_as_diamonds():
    ax = plots.success_bars(ROWS, levels=["offline"]).axes[0]
    marks = {l.get_marker(): np.sort(l.get_ydata()) for l in ax.lines if l.get_marker() in "oD" and len(l.get_ydata()) and l.get_ydata()[0] in (50., 60.1)}
    np.testing.assert_allclose(marks["o"], [50, 60, 70]); np.testing.assert_allclose(marks["D"], [60.1])
    assert not any(l.get_marker() == "D" for l in plots.success_bars(ROWS, paper=False).axes[0].lines)

def test_colours_are_the_same_for_the_same_methods():
    assert plots.colours(["mine", "bc", "yours"]) == {"mine": "#000000", "bc": plots.METHOD_COLOURS["bc"], "yours": "#F0E442"}
    assert len(set(plots.METHOD_COLOURS.values())) == len(plots.METHOD_COLOURS)

def test_curves_draw_the_mean_over_seeds_at_the_steps_they_share():
    seeds = [[dict(step=str(t), loss=str(v + t)) for t in range(n)] for v, n in ((0., 4), (2., 6))]
    line = plots.curves({"bc": seeds}, y=["loss"]).axes[0].lines[0]
    np.testing.assert_allclose(line.get_xdata(), np.arange(4)); np.testing.assert_allclose(line.get_ydata(), np.arange(4) + 1.)

def test_a_smoothed_curve_keeps_the_raw_one():
    rows = [dict(step=t, loss=float(v)) for t, v in enumerate((0, 3, 0, 3, 0))]
    raw, smooth = plots.curves(rows, smooth=3).axes[0].lines
    np.testing.assert_allclose(raw.get_ydata(), [0, 3, 0, 3, 0]); np.testing.assert_allclose(smooth.get_ydata(), [0, 1, 2, 1, 0])

def test_quality_bars_draw_shares_and_errors():
    m = dict(rollouts=50, match=.4, replay=.2, step_error=.03, still_error=.05, off_table=0., too_fast=float("nan"))
    ax, err = plots.quality_bars({"before": m, "after": m | dict(match=.8, explanation=.9)}, level="easy").axes
    heights = sorted(round(p.get_height(), 6) for p in ax.patches if np.isfinite(p.get_height()))
    assert heights == [0, 0, 20, 20, 40, 80, 90] and {round(p.get_height(), 6) for p in err.patches} == {3}
    assert [t.get_text().split("\n")[0] for t in ax.get_xticklabels()] == ["meets its goal", "meets its goal", "explained", "steps that leave"]

def test_lengths_are_shares():
    fig = plots.length_histogram(dict(a=np.array([1, 1, 3]), b=np.array([2])))
    np.testing.assert_allclose(fig.axes[0].patches[0].get_data().values, [0, 200 / 3, 0, 100 / 3])


# ---------------------------------------------------------------- pictures

def test_a_strip_has_a_picture_a_state_up_to_the_limit():
    assert len(plots.film_strip(STATES, "A goal.", render=False, most=5).axes) == 5
    assert len(plots.film_strip(Rollouts.from_list([ROLLOUT, ROLLOUT]), render=False).axes) == 8
    assert len(plots.compare_strip(STATES[:3], STATES[:3], render=False).axes) == 6

def texts(fig): return [t.get_text() for t in fig.texts]

def test_a_strip_says_what_was_done_and_whether_it_worked():
    goal = Goal.move("red", "blue", "behind", text="Red, get behind blue!")
    met, missed = np.tile(STATES[:1], (2, 1)), STATES[:2].copy()
    met[1, :4] = 0, .2, 0, -.1; missed[1, :4] = 0, -.3, 0, .1
    told = texts(plots.film_strip([met, missed], goal=goal, note=["first", "second"], render=False))
    assert told.count("Red, get behind blue!") == 2 and {"✓ met", "✗ not met", "first", "second"} <= set(told)
    assert {"red →", "blue ↗", "cyan ↙"} <= set(texts(plots.film_strip(ROLLOUT, render=False)))

def test_a_thinned_strip_counts_its_steps():
    assert [t.split(":")[0] for t in texts(plots.film_strip(STATES, captions=["x"] * 12, render=False, most=3))] == ["0", "6", "11"]

def test_compare_tells_the_distance():
    real = STATES[:2].copy(); real[1, 0] += .05
    assert {"0.0 cm apart", "1.0 cm apart"} <= set(texts(plots.compare_strip(STATES[:2], real, render=False)))

def test_top_view_shades_where_the_goal_holds():
    "Points inside the shaded sector satisfy the goal, points outside do not."
    for direction in ("behind", "left", "front", "right"):
        goal, state = Goal.move("red", "blue", direction), STATES[0].copy(); state[2:4] = 0, .1
        fig, ax = plt.subplots(); plots.top_view(state, ax, goal)
        wedge = next(p for p in ax.patches if isinstance(p, matplotlib.patches.Wedge))
        spots = numpy_rng(1, "spots").uniform(-.35, .45, (200, 2)); tried = np.tile(state, (200, 1)); tried[:, :2] = spots
        shaded = wedge.get_path().transformed(wedge.get_patch_transform())
        jitter = np.tile(tried, (4, 1, 1)); jitter[..., :2] += np.array([(.005, .005), (-.005, .005), (.005, -.005), (-.005, -.005)])[:, None]
        sure = (goal.success(jitter) == goal.success(tried)).all(0)   # away from the edge, which is drawn as a polygon
        assert sure.mean() > .9 and goal.success(tried)[sure].sum() > 10
        np.testing.assert_array_equal(shaded.contains_points(spots)[sure], goal.success(tried)[sure])

@pytest.mark.skipif(not can_render(), reason="no OpenGL")
def test_projection_finds_the_balls():
    "The middle of the red pixels is where the red ball is projected to."
    for at in ((-.3, .3), (.3, -.1)):
        s = np.full(10, 3.); s[:2] = at   # the others far away
        red = render_states(s[None], size=(120, 160))[0].astype(int); red = (red[..., 0] > 120) & (red[..., 0] > 2 * red[..., 1])
        rows, cols = np.nonzero(red)
        np.testing.assert_allclose(plots.project(s[None, :2], (120, 160))[0], (cols.mean(), rows.mean()), atol=2.5)

def test_flat_frames_need_no_opengl():
    frames = plots.rollout_frames(ROLLOUT, size=(60, 80), render=False)
    assert frames.shape == (4, 60, 80, 3) and frames.dtype == np.uint8 and (frames[0] != frames[1]).any()

def test_figures_and_gifs_are_written_whole(tmp_path):
    fig = plots.success_bars(ROWS); number = fig.number
    plots.save_figure(fig, tmp_path/"a.png"); plots.save_figure(plots.success_bars(ROWS), tmp_path/"b.png")
    frames = np.zeros((3, 8, 8, 3), np.uint8); frames[1] = 255
    plots.gif(frames, tmp_path/"a.gif", fps=4)
    with Image.open(tmp_path/"a.gif") as im: assert im.n_frames == 3 and im.info["duration"] == 250
    assert Image.open(tmp_path/"a.png").size[0] > 100 and (tmp_path/"a.png").read_bytes() == (tmp_path/"b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gif", "a.png", "b.png"] and not plt.fignum_exists(number)

def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path/"a.png").write_bytes(b"old"); fig = plots.success_bars(ROWS)
    def full(path, **kw): path.write_bytes(b"half"); raise OSError("no space left")
    monkeypatch.setattr(fig, "savefig", full)
    with pytest.raises(OSError): plots.save_figure(fig, tmp_path/"a.png")
    assert (tmp_path/"a.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1

def test_style_ends_with_its_block():
    before = plt.rcParams["font.size"]
    with plots.style(): assert plt.rcParams["font.size"] == plots.STYLE["font.size"]
    plots.success_bars(ROWS)
    assert plt.rcParams["font.size"] == before


# ---------------------------------------------------------------- bad input

GOOD = dict(rollouts=10, match=.5, step_error=.1)

@pytest.mark.parametrize("call, said", [
    (lambda: plots.success_bars([]), "no result rows"), (lambda: plots.results_table([row("bc", "harder", 0, 1)]), "unknown level 'harder'"),
    (lambda: plots.results_table([dict(method="bc", level="easy")]), "without 'successes'"), (lambda: plots.success_bars(ROWS, levels=["simple"]), "unknown level 'simple'"),
    (lambda: plots.curves({}, y=["loss"]), "no curves"), (lambda: plots.curves([dict(step=1, loss=1)], y=["reward"]), "no column 'reward'"),
    (lambda: plots.curves([dict(step=1, loss="")]), "not all numbers"), (lambda: plots.curves({"bc": [[dict(step=1, loss=1)], [dict(step=2, loss=1)]]}), "in common"),
    (lambda: plots.film_strip(np.zeros((3, 9)), render=False), r"shape \(3, 9\)"), (lambda: plots.film_strip(np.full((3, 10), np.nan), render=False), "NaN"),
    (lambda: plots.film_strip([], render=False), "no rollouts"), (lambda: plots.film_strip([STATES, STATES], note=["one"], render=False), "1 notes for 2"),
    (lambda: plots.film_strip(STATES, captions=["a"], render=False), "1 captions for 12"), (lambda: plots.compare_strip(np.zeros((2, 10)), np.zeros((3, 10))), "expected as many"),
    (lambda: plots.action_words(40), "0 to 39"), (lambda: plots.quality_bars({}), "no measures"), (lambda: plots.quality_bars({"a": GOOD | dict(match=50)}), "match=50"),
    (lambda: plots.quality_bars({"a": dict(match=.5)}), "rollouts"), (lambda: plots.quality_bars({"a": GOOD}, level="x"), "unknown level"),
    (lambda: plots.length_histogram({}), "no lengths"), (lambda: plots.length_histogram({"a": np.array([.5])}), "integer"),
    (lambda: plots.gif(np.zeros((0, 3)), "never.gif"), "frames"), (lambda: plots.gif(np.zeros((1, 4, 4, 3), np.uint8), "never.gif", fps=0), "fps")])
def test_bad_input_is_named_before_anything_is_drawn(call, said):
    with pytest.raises(ValueError, match=said): call()
    assert not plt.get_fignums()
