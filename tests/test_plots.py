"Drawings from plain data: what they show, and what they refuse."
import matplotlib
matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from kalm import plots


def row(method, level, seed, successes, episodes=100): return dict(method=method, level=level, seed=str(seed), successes=str(successes), episodes=str(episodes))

ROWS = [row("bc", "offline", s, k) for s, k in enumerate((50, 60, 70))] + [row("bc+kalm", "hard", 0, 3)]


def test_pooled_averages_seeds_and_its_interval_holds_the_mean():
    rate, low, high, seeds, n = plots.pooled(ROWS, "bc", "offline")
    assert rate == pytest.approx(.6) and low < .6 < high and (seeds, n) == (3, 300)
    assert plots.pooled(ROWS, "cql", "offline") is None

def test_table_has_our_value_its_interval_and_the_papers():
    text = plots.results_table(ROWS)
    assert "60.0 (" in text and "[60]" in text and "[8]" in text
    assert "[60]" not in plots.results_table(ROWS, paper=False)
    assert "|" not in plots.results_table(ROWS, plain=True)

def test_bars_have_the_height_of_the_rates():
    fig = plots.success_bars(ROWS)
    heights = [p.get_height() for p in fig.axes[0].patches]
    assert np.nanmax(heights) == pytest.approx(60) and np.nanmin(heights) == pytest.approx(3)
    plt.close(fig)

def test_curves_draw_the_mean_over_seeds():
    seeds = [[dict(step=str(t), loss=str(v + t)) for t in range(4)] for v in (0., 2.)]
    fig = plots.curves({"bc": seeds}, y=["loss"])
    np.testing.assert_allclose(fig.axes[0].lines[0].get_ydata(), np.arange(4) + 1.)
    plt.close(fig)

def test_a_strip_has_a_picture_a_state_up_to_the_limit():
    states = np.random.default_rng(0).uniform(-.4, .4, (12, 10))
    fig = plots.film_strip(states, "A goal.", render=False, most=5)
    assert len(fig.axes) == 5; plt.close(fig)
    fig = plots.compare_strip(states[:3], states[:3], render=False)
    assert len(fig.axes) == 6; plt.close(fig)

def test_figures_and_gifs_are_written_whole(tmp_path):
    fig = plots.success_bars(ROWS); plots.save_figure(fig, tmp_path/"a.png")
    frames = np.zeros((3, 8, 8, 3), np.uint8); frames[1] = 255
    plots.gif(frames, tmp_path/"a.gif")
    assert Image.open(tmp_path/"a.png").size[0] > 100 and Image.open(tmp_path/"a.gif").n_frames >= 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gif", "a.png"] and not plt.fignum_exists(fig.number)

@pytest.mark.parametrize("call", [lambda: plots.success_bars([]), lambda: plots.results_table([row("bc", "harder", 0, 1)]), lambda: plots.curves({}, y=["loss"]),
                                  lambda: plots.film_strip(np.zeros((3, 9)), render=False), lambda: plots.compare_strip(np.zeros((2, 10)), np.zeros((3, 10))),
                                  lambda: plots.length_histogram({}), lambda: plots.gif(np.zeros((0, 3)), "never.gif")])
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError): call()
