"Intervals against known values, and a table of results that loses nothing."
import threading

import numpy as np
import pytest

from kalm.core import files
from kalm.core.files import numpy_rng, read_csv
from kalm.core.results import (
    LAST,
    RESULT_COLUMNS,
    RESULT_KEY,
    Cell,
    interquartile_mean,
    markdown_table,
    pooled,
    read_results,
    results_folder,
    stratified_bootstrap,
    wilson,
    write_result,
)

# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize("k, n, low, high", [(0, 10, 0., .2775), (10, 10, .7225, 1.), (5, 10, .2366, .7634),
                                             (1, 29, .0061, .1718), (300, 1000, .2724, .3291)])
def test_wilson_against_published_values(k, n, low, high):
    np.testing.assert_allclose(wilson(k, n), (low, high), atol=1e-4)


def test_wilson_solves_its_own_equation():
    "Its ends are the rates p at which the observed rate is z standard errors away."
    for end in wilson(37, 120, .9):
        errors = abs(37 / 120 - end) / np.sqrt(end * (1 - end) / 120)
        np.testing.assert_allclose(errors, 1.6448536, rtol=1e-6)


@pytest.mark.parametrize("args", [(1, 0), (3, 2), (-1, 5), (1, 2, 1.), (1, 2, 0.)])
def test_wilson_bad_input(args):
    with pytest.raises(ValueError, match="expected"):
        wilson(*args)


def test_interquartile_mean():
    assert interquartile_mean([100, 1, 2, 3, 4, -50, 5, 6]) == np.mean([2, 3, 4, 5])
    assert interquartile_mean([1, 2, 6]) == 3
    with pytest.raises(ValueError, match="at least one"):
        interquartile_mean([])


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng, hits = numpy_rng(0, "coverage"), 0
    for i in range(100):
        low, high = stratified_bootstrap([rng.random(60) < p for p in (.2, .5, .8)], level=.9, samples=100, seed=i)
        hits += low <= .5 <= high
    assert .8 < hits / 100 < .97


def test_bootstrap_keeps_strata_apart():
    assert stratified_bootstrap([np.zeros(5), np.ones(50)]) == (.5, .5)  # pooled, it would vary round .91
    assert stratified_bootstrap([np.zeros(5), np.ones(50), np.ones(3)], statistic=np.median) == (1., 1.)


@pytest.mark.parametrize("strata, kwargs", [([], {}), ([[1.], []], {}), ([[np.nan]], {}), ([[1.]], dict(level=1.)),
                                            ([[1.]], dict(samples=0))])
def test_bootstrap_bad_input(strata, kwargs):
    with pytest.raises(ValueError):
        stratified_bootstrap(strata, **kwargs)


# ---------------------------------------------------------------- results.csv

ROW = dict(domain="clevr", method="cql", level="easy", seed=0, step=1000, episodes=1000, successes=250, config="abc",
           commit="deadbee", backend="default", preset="quick")


def test_same_key_replaces_and_other_keys_stay(tmp_path):
    f = tmp_path/"results.csv"
    write_result(f, **ROW)
    write_result(f, **ROW | dict(seed=1))
    write_result(f, **ROW | dict(successes=300, commit="cafe"))
    rows = read_csv(f)
    assert [(r["seed"], r["successes"], r["commit"]) for r in rows] == [("1", "250", "deadbee"), ("0", "300", "cafe")]
    assert tuple(rows[0]) == RESULT_COLUMNS and float(rows[1]["rate"]) == .3 and rows[0]["kind"] == ""
    np.testing.assert_allclose([float(rows[1][c]) for c in ("low", "high")], wilson(300, 1000), atol=1e-6)


@pytest.mark.parametrize("column", RESULT_KEY)
def test_every_part_of_the_key_counts(column, tmp_path):
    write_result(tmp_path/"r.csv", **ROW)
    write_result(tmp_path/"r.csv", **ROW | {column: "7"})
    assert len(read_results(tmp_path/"r.csv")) == 2
    assert len(read_results(tmp_path/"r.csv", **{column: 7})) == 1


@pytest.mark.parametrize("bad", [{k: v for k, v in ROW.items() if k != "commit"}, ROW | dict(colour="red"),
                                 ROW | dict(successes=1001), ROW | dict(episodes=0, successes=0)])
def test_bad_rows_leave_the_file_alone(bad, tmp_path):
    f = tmp_path/"r.csv"
    write_result(f, **ROW)
    before = f.read_bytes()
    with pytest.raises(ValueError):
        write_result(f, **bad)
    assert f.read_bytes() == before


def test_other_tables_are_refused(tmp_path):
    (tmp_path/"r.csv").write_text("a,b\n1,2\n")
    for use in (lambda: read_results(tmp_path/"r.csv"), lambda: write_result(tmp_path/"r.csv", **ROW)):
        with pytest.raises(ValueError, match="has columns a, b: expected domain, preset"):
            use()
    assert (tmp_path/"r.csv").read_text() == "a,b\n1,2\n"
    with pytest.raises(ValueError, match="no column colour"):
        read_results(tmp_path/"r.csv", colour="red")


def test_a_kill_in_the_middle_of_a_write_loses_nothing(tmp_path, monkeypatch):
    f = tmp_path/"r.csv"
    write_result(f, **ROW)
    before = f.read_bytes()

    def killed(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_result(f, **ROW | dict(seed=1))
    assert f.read_bytes() == before
    write_result(f, **ROW | dict(seed=1))
    assert len(read_csv(f)) == 2


def test_writers_side_by_side_lose_no_row(tmp_path):
    f = tmp_path/"r.csv"
    threads = [threading.Thread(target=write_result, args=(f,), kwargs=ROW | dict(seed=s)) for s in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(int(r["seed"]) for r in read_csv(f)) == list(range(16))


def test_results_folder_of_a_checkout(tmp_path, monkeypatch):
    deep = tmp_path/"nbs"/"paper"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    with pytest.raises(FileNotFoundError, match="from within a checkout"):
        results_folder()
    (tmp_path/"results").mkdir()
    (tmp_path/"settings.ini").touch()
    assert results_folder() == (tmp_path/"results").resolve()
    write_result(results_folder()/"best.csv", **ROW)
    assert [r["successes"] for r in read_results("best")] == ["250"]


# ---------------------------------------------------------------- cells


def row(seed: int, step: int, successes: int, **changes) -> dict[str, str]:
    return {k: str(v) for k, v in (ROW | dict(kind="", seed=seed, step=step, successes=successes) | changes).items()}


def test_a_cell_is_the_mean_of_the_last_checkpoints_of_each_seed():
    rows = [row(0, step, successes) for step, successes in ((100, 0), *((1000 * i, 100 * i) for i in range(1, 6)))]
    rows = rows[::-1] + [row(1, 10_000, 500)]
    assert LAST == 5
    cell = pooled(rows, "cql", "easy")
    assert isinstance(cell, Cell) and cell.seeds == (.3, .5) and cell.episodes == 2000
    assert cell.rate == pytest.approx(.4) and (cell.low, cell.high) == pytest.approx(wilson(800, 2000))


def test_kinds_are_beside_the_whole_level():
    rows = [row(0, 1, 500), row(0, 1, 900, kind="line_up")]
    assert pooled(rows, "cql", "easy").rate == .5 and pooled(rows, "cql", "easy", "line_up").rate == .9
    assert pooled(rows, "bc", "easy") is None and pooled([], "cql", "easy") is None


def test_runs_are_not_mixed():
    with pytest.raises(ValueError, match="rows of 2 runs"):
        pooled([row(0, 1, 1), row(0, 1, 1, preset="best")], "cql", "easy")


def test_markdown_table():
    assert markdown_table([[1, "b"]], ["x", "y"]) == "| x | y |\n| --- | --- |\n| 1 | b |"
