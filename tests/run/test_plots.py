"Tables, bars and curves: what they show, and what they refuse."

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from matplotlib.colors import to_hex, to_rgb  # noqa: E402
from PIL import Image  # noqa: E402

from kalm.core.results import METHODS, wilson  # noqa: E402
from kalm.run import plots  # noqa: E402

LEVELS = ["offline", "rephrase", "easy", "hard"]


def row(method, level, seed, successes, episodes=100, **more):
    values = dict(domain="clevr", method=method, level=level, seed=seed, successes=successes, episodes=episodes) | more
    return {k: str(v) for k, v in values.items()}


ROWS = [row("bc", "offline", seed, k) for seed, k in enumerate((50, 60, 70))] + [row("bc+kalm", "hard", 0, 3)]


@pytest.fixture(autouse=True)
def nothing_stays_open():
    yield
    plt.close("all")


# ---------------------------------------------------------------- tables


def test_table_has_our_value_its_interval_the_papers_and_the_evidence():
    text = plots.results_table(ROWS, LEVELS[:1] + LEVELS[3:])
    low, high = wilson(180, 300)
    assert f"60.0 ({100 * low:.1f} to {100 * high:.1f}) [60.1]" in text
    assert "[7.7]" in text and "arXiv 2404.09248" in text
    assert "bc: 3 seeds x 100 episodes" in text and "bc+kalm: 1 seed x 100 episodes" in text
    lines = text.splitlines()
    assert lines[0] == "| method | offline | hard |" and all(line.count("|") == 4 for line in lines[:4])
    ours = plots.results_table(ROWS, paper=False)
    assert "[60.1]" not in ours and "arXiv" not in ours


def test_another_domain_has_no_published_values():
    elsewhere = [dict(r, domain="line") for r in ROWS]
    assert "[" not in plots.results_table(elsewhere)
    assert not any(line.get_marker() == "D" for line in plots.success_bars(elsewhere).axes[0].lines)


def test_plain_table_lines_up():
    lines = plots.results_table(ROWS, ["offline", "hard"], plain=True).splitlines()
    assert "|" not in "".join(lines)
    assert lines[0].index("offline") == lines[2].index("60.0") == lines[3].index("- [52.5]")
    assert lines[0].index("hard") == lines[3].index("3.0")


def test_levels_of_an_unknown_domain_come_in_order_of_first_mention():
    rows = [dict(r, domain="nobody knows it") for r in (row("bc", "far", 0, 1), row("bc", "near", 0, 1))]
    assert plots.levels_in(rows) == ["far", "near"]


def test_levels_of_a_known_domain_come_in_its_order(monkeypatch):
    monkeypatch.setattr(plots, "domain", lambda name: type("D", (), dict(levels=("near", "mid", "far"))))
    rows = [row("bc", "other", 0, 1), row("bc", "far", 0, 1), row("bc", "near", 0, 1)]
    assert plots.levels_in(rows) == ["near", "far", "other"]


def test_rows_of_one_kind_of_sentence_are_left_out():
    kinds = [row("bc", "offline", 0, 1, kind="spoken"), row("cql", "offline", 0, 1, kind="spoken")]
    assert plots.results_table(ROWS + kinds) == plots.results_table(ROWS)
    assert plots.by_checkpoint(kinds, "bc", "offline")[0].size == 0
    with pytest.raises(ValueError, match="no result rows"):
        plots.results_table(kinds)


def test_kinds_have_a_table_of_their_own():
    kinds = [row("cql", "hard", seed, 20 * (1 + seed), kind="two") for seed in range(2)]
    kinds += [row("cql", "hard", 0, 7, kind="line up"), row("bc", "hard", 0, 0, kind="line up")]
    lines = plots.kinds_table(ROWS + kinds, "hard").splitlines()
    assert lines[0] == "| hard | two | line up |" and [line.split(" | ")[0] for line in lines[2:4]] == ["| bc", "| cql"]
    assert lines[2].split(" | ")[1] == "-" and lines[2].split(" | ")[2].startswith("0 (0 to ")
    n = int(kinds[0]["episodes"])
    assert lines[3].split(" | ")[1].startswith(f"{100 * 30 / n:.0f} (")
    assert plots.kinds_in(ROWS + kinds, "hard") == ["two", "line up"] and plots.kinds_in(ROWS, "hard") == []
    with pytest.raises(ValueError, match="of one kind"):
        plots.kinds_table(ROWS, "hard")
    assert "\n" in plots.kinds_table(kinds, "hard", plain=True)


def test_rows_of_two_runs_or_two_domains_are_not_mixed():
    rows = [row("bc", "hard", 0, 1, config="aaa"), row("bc", "hard", 0, 9, config="bbb")]
    with pytest.raises(ValueError, match="2 runs.*aaa.*bbb"):
        plots.results_table(rows)
    with pytest.raises(ValueError, match="2 runs"):
        plots.success_bars(rows)
    with pytest.raises(ValueError, match="2 domains"):
        plots.results_table(ROWS + [row("cql", "hard", 0, 1, domain="babyai")])


def test_the_papers_numbers_are_those_of_its_bars():
    clevr = plots.PUBLISHED["clevr"]
    assert set(clevr["success"]) < set(METHODS) and all(set(v) <= set(LEVELS) for v in clevr["success"].values())
    assert clevr["success"]["bc"] == dict(offline=60.1, rephrase=27.9, easy=17.9, hard=1.0)
    assert clevr["success"]["cql"] == dict(offline=56.2, rephrase=26.4, easy=18.0, hard=1.7)
    assert clevr["success"]["bc+kalm"] == dict(offline=52.5, rephrase=43.2, easy=33.5, hard=7.7)
    assert clevr["success"]["cql+kalm"] == dict(offline=48.8, rephrase=40.1, easy=33.2, hard=7.8)
    assert clevr["success"]["lm"] == dict(rephrase=23.4, easy=15.0, hard=0.9)
    assert clevr["match"] == dict(rephrase=85, easy=36, hard=28)


# ---------------------------------------------------------------- colours

MACHADO = dict(  # Machado et al. 2009: what is left of linear RGB without one kind of cone
    none=np.eye(3),
    protanopia=[(0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)],
    deuteranopia=[(0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)],
    tritanopia=[(1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)],
)


def lab(linear: np.ndarray) -> np.ndarray:
    "CIELAB (n, 3) of linear RGB (n, 3)."
    to_xyz = np.array([(0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)])
    t = linear @ to_xyz.T / to_xyz.sum(1)
    f = np.where(t > 0.008856, np.cbrt(np.maximum(t, 1e-9)), 7.787 * t + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize("kind", MACHADO)
def test_methods_can_be_told_apart_by_colour_blind_readers(kind):
    assert set(plots.METHOD_COLOURS) == set(METHODS)
    rgb = np.array([to_rgb(c) for c in plots.METHOD_COLOURS.values()])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = lab(np.clip(linear @ np.array(MACHADO[kind]).T, 0, 1))
    distance = np.linalg.norm(seen[:, None] - seen, axis=-1)
    assert distance[np.triu_indices(len(seen), 1)].min() > 15


def test_colours_are_those_of_the_method_a_name_begins_with():
    given = plots.colours(["mine", "bc", "bc+kalm easy", "yours"])
    assert given["bc"] == plots.METHOD_COLOURS["bc"] and given["bc+kalm easy"] == plots.METHOD_COLOURS["bc+kalm"]
    assert len({*given.values()}) == 4 and given["mine"] == plots.colours(["mine", "bc"])["mine"]
    assert not {given["mine"], given["yours"]} & {*plots.METHOD_COLOURS.values()}


def test_style_ends_with_its_block():
    before = plt.rcParams["font.size"]
    with plots.style():
        assert plt.rcParams["font.size"] == plots.STYLE["font.size"] != before
    plots.success_bars(ROWS)
    assert plt.rcParams["font.size"] == before


# ---------------------------------------------------------------- bars


def test_bars_have_the_height_of_the_rates_and_a_colour_a_method():
    ax = plots.success_bars(ROWS).axes[0]
    drawn = [p for p in ax.patches if np.isfinite(p.get_height())]
    bars = {round(p.get_height(), 6): to_hex(p.get_facecolor()).upper() for p in drawn}
    assert bars == {60.0: plots.METHOD_COLOURS["bc"], 3.0: plots.METHOD_COLOURS["bc+kalm"]}
    assert ax.get_ylim()[0] == 0


def test_bars_show_seeds_as_dots_and_the_paper_as_diamonds():
    ax = plots.success_bars(ROWS, levels=["offline"]).axes[0]
    marks = [(line.get_marker(), sorted(line.get_ydata())) for line in ax.lines if len(line.get_ydata())]
    assert ("o", [50, 60, 70]) in [(m, pytest.approx(y)) for m, y in marks]
    assert sorted(y for m, ys in marks for y in ys if m == "D") == [52.5, 60.1]


def test_intervals_are_wilsons():
    ax = plots.success_bars(ROWS, levels=["offline"]).axes[0]
    ends = {tuple(np.round(segment[:, 1], 6)) for c in ax.collections for segment in c.get_segments()}
    assert ends == {tuple(np.round(100 * np.array(wilson(180, 300)), 6))}


def test_quality_bars_draw_shares_and_errors():
    m = dict(
        rollouts=50, match=0.4, replay=0.2, step_error=0.03, still_error=0.05, off_limits=0.0, too_fast=float("nan")
    )
    ax, err = plots.quality_bars({"before": m, "after": m | dict(match=0.8, explanation=0.9)}, published=36.0).axes
    heights = sorted(round(p.get_height(), 6) for p in ax.patches if np.isfinite(p.get_height()))
    assert heights == [0, 0, 20, 20, 40, 80, 90]
    assert {round(p.get_height(), 6) for p in err.patches} == {0.03}
    words = ["meets its goal", "meets its goal", "explained", "steps out"]
    assert [t.get_text().split("\n")[0] for t in ax.get_xticklabels()] == words
    assert [line.get_ydata()[0] for line in ax.lines if line.get_marker() == "D"] == [36.0]


def test_quality_without_a_step_error_has_one_panel():
    assert len(plots.quality_bars({"a": dict(rollouts=5, match=0.2, step_error=float("nan"))}).axes) == 1


def test_lengths_are_shares():
    fig = plots.length_histogram(dict(a=np.array([1, 1, 3]), b=np.array([2])))
    np.testing.assert_allclose(fig.axes[0].patches[0].get_data().values, [0, 200 / 3, 0, 100 / 3])


# ---------------------------------------------------------------- curves


def test_curves_draw_the_mean_over_seeds_at_the_steps_they_share():
    seeds = [[dict(step=str(t), loss=str(v + t)) for t in range(n)] for v, n in ((0.0, 4), (2.0, 6))]
    line = plots.curves({"bc": seeds}, y=["loss"]).axes[0].lines[0]
    np.testing.assert_allclose(line.get_xydata(), np.stack([np.arange(4), np.arange(4) + 1.0], 1))


def test_a_smoothed_curve_keeps_the_raw_one():
    rows = [dict(step=t, loss=float(v)) for t, v in enumerate((0, 3, 0, 3, 0))]
    raw, smooth = plots.curves(rows, smooth=3).axes[0].lines
    np.testing.assert_allclose(raw.get_ydata(), [0, 3, 0, 3, 0])
    np.testing.assert_allclose(smooth.get_ydata(), [0, 1, 2, 1, 0])


def test_curves_of_one_method_differ_in_line_style():
    rows = [dict(step=t, loss=1.0) for t in range(3)]
    easy, hard, other = plots.curves({"bc+kalm easy": rows, "bc+kalm hard": rows, "bc": rows}).axes[0].lines
    assert easy.get_color() == hard.get_color() != other.get_color()
    assert easy.get_linestyle() != hard.get_linestyle()


def test_success_curves_are_means_over_seeds():
    rows = [row("bc", "hard", s, k + s, step=t) for s in (0, 2) for t, k in ((2000, 20), (1000, 10))]
    rows += [row("expert", "hard", 0, 68, step=0), row("bc", "easy", 0, 5, step=1000)]
    easy, hard = plots.success_curves(rows, ["easy", "hard"]).axes
    assert (easy.get_title(), hard.get_title()) == ("easy", "hard")
    lines = {line.get_label(): line for line in hard.lines}
    np.testing.assert_allclose(lines["bc"].get_xydata(), [(1000, 11), (2000, 21)])
    assert set(lines["expert"].get_ydata()) == {68}
    [band] = hard.collections
    y = band.get_paths()[0].vertices[:, 1]
    assert (y.min(), y.max()) == pytest.approx((10, 22))


def test_by_checkpoint_has_the_steps_that_all_seeds_share():
    rows = [row("bc", "hard", s, k + s, step=t) for s in (10, 2) for t, k in ((2000, 20), (1000, 10))]
    rows += [row("bc", "hard", 2, 9, step=3000), row("bc", "easy", 2, 9, step=3000)]
    at, rates = plots.by_checkpoint(rows, "bc", "hard")
    assert at.tolist() == [1000, 2000]
    np.testing.assert_allclose(rates, [[0.12, 0.22], [0.2, 0.3]])
    assert [x.size for x in plots.by_checkpoint(rows, "cql", "hard")] == [0, 0]


# ---------------------------------------------------------------- files


def test_figures_are_written_whole_and_closed(tmp_path):
    fig = plots.success_bars(ROWS)
    number = fig.number
    plots.save_figure(fig, tmp_path / "a.png")
    plots.save_figure(plots.success_bars(ROWS), tmp_path / "b.png")
    assert Image.open(tmp_path / "a.png").size[0] > 100
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"] and not plt.fignum_exists(number)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"old")
    fig = plots.success_bars(ROWS)

    def full(path, **kw):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(fig, "savefig", full)
    with pytest.raises(OSError):
        plots.save_figure(fig, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- bad input

FINE = dict(rollouts=10, match=0.5, step_error=0.1)
APART = {"bc": [[dict(step=1, loss=1)], [dict(step=2, loss=1)]]}


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: plots.success_bars([]), "no result rows"),
        (lambda: plots.results_table([dict(method="bc", level="easy")]), "without 'successes'"),
        (lambda: plots.success_bars(ROWS, levels=["simple"]), "no rows of level 'simple'"),
        (lambda: plots.curves({}, y=["loss"]), "no curves"),
        (lambda: plots.curves([dict(step=1, loss=1)], y=["reward"]), "no column 'reward'"),
        (lambda: plots.curves([dict(step=1, loss="")]), "not all numbers"),
        (lambda: plots.curves(APART), "in common"),
        (lambda: plots.quality_bars({}), "no measures"),
        (lambda: plots.quality_bars({"a": FINE | dict(match=50)}), "match=50"),
        (lambda: plots.quality_bars({"a": dict(match=0.5)}), "rollouts"),
        (lambda: plots.quality_bars({"a": dict(rollouts=3)}), "is known"),
        (lambda: plots.length_histogram({}), "no lengths"),
        (lambda: plots.length_histogram({"a": np.array([0.5])}), "whole number"),
    ],
)
def test_bad_input_is_named_before_anything_is_drawn(call, said):
    with pytest.raises(ValueError, match=said):
        call()
    assert not plt.get_fignums()
