"The last stage of a run, on a run folder that was made up."

from dataclasses import replace
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402
from worlds import line  # noqa: E402

from kalm.core.episodes import collect  # noqa: E402
from kalm.core.files import append_csv  # noqa: E402
from kalm.core.results import write_result  # noqa: E402
from kalm.core.rollouts import IMAGINED  # noqa: E402
from kalm.run import figures  # noqa: E402

CONFIG = "c0ffee"


class TinyRun(SimpleNamespace):
    "What the stage asks of a `kalm.run.folder.Run`."

    def say(self, text: str) -> None:
        self.said.append(text)


def write_rows(run, config: str = CONFIG) -> None:
    about = dict(domain="line", preset="smoke", backend="tiny-random", config=config, commit="", episodes=20)
    trained = [(seed, step) for seed in (0, 1) for step in (50, 100)]
    for method, evaluated in (("bc", trained), ("bc+kalm", trained), ("random", [(0, 0)])):
        for level in ("rephrase", "offline"):
            for seed, step in evaluated:
                made = dict(method=method, level=level, seed=seed, step=step, successes=5 + seed)
                write_result(run.out / "results.csv", **made, **about)


def write_curves(run, *jobs: str) -> None:
    for job in jobs:
        for seed in range(2):
            for step in (10, 20):
                append_csv(
                    run.out / "policies" / f"{job}-{seed}" / "curve.csv", dict(step=step, loss=1 / step, accuracy=0.5)
                )


@pytest.fixture
def bare(tmp_path) -> TinyRun:
    "Results and nothing else."
    run = TinyRun(
        out=tmp_path / "run",
        domain=line(),
        config=CONFIG,
        said=[],
        preset=SimpleNamespace(checkpoints=1, imagined={"rephrase": None}),
    )
    write_rows(run)
    return run


@pytest.fixture
def run(bare) -> TinyRun:
    "Everything that a run can hold."
    run = bare
    run.preset.checkpoints = 2
    write_curves(run, "bc", "bc+kalm", "cql+kalm-rephrase")
    played = collect(run.domain, run.domain.goals("rephrase"), 6, seed=0, progress=False, keep_failures=True)
    replace(played, source=np.full(6, IMAGINED)).save(run.out / "imagined" / "rephrase" / "rollouts.npz")
    lost = replace(played, success=np.zeros(6, bool), truncated=played.success | played.truncated)
    lost.save(run.out / "acted" / "bc+kalm" / "rephrase.npz")
    return run


def names(run) -> set[str]:
    return {p.name for p in (run.out / "figures").iterdir()}


def test_everything_that_is_there_is_drawn(run):
    figures.figures_stage(run)
    assert names(run) == {
        "table.md",
        "success.png",
        "learning.png",
        "curves-bc.png",
        "curves-cql.png",
        "imagined-rephrase.png",
        "lost-bc+kalm-rephrase.png",
    }
    for path in (run.out / "figures").glob("*.png"):
        with Image.open(path) as im:
            assert im.width > 300 and len(np.unique(np.asarray(im.convert("L")))) > 10
    table = (run.out / "figures" / "table.md").read_text()
    assert table.startswith("| method | offline | rephrase |") and "| bc+kalm |" in table
    assert "bc+kalm" in run.said[0] and "table.md" in run.said[0]


def test_what_is_not_there_is_left_out_and_the_stage_can_be_repeated(bare):
    figures.figures_stage(bare)
    assert names(bare) == {"table.md", "success.png"}
    before = {p.name: p.read_bytes() for p in (bare.out / "figures").iterdir()}
    figures.figures_stage(bare)
    assert before == {p.name: p.read_bytes() for p in (bare.out / "figures").iterdir()}


def test_results_of_another_run_are_not_drawn(bare):
    write_rows(bare, config="other")
    figures.figures_stage(bare)  # rows of two runs in one table would be refused
    bare.config = "never ran"
    with pytest.raises(FileNotFoundError, match="kalm evaluate"):
        figures.figures_stage(bare)


def test_seeds_of_a_method_belong_together_and_levels_apart(run):
    write_curves(run, "bc+kalm-rephrase")
    found = figures.policy_curves(run)
    assert {a: {name: len(seeds) for name, seeds in jobs.items()} for a, jobs in found.items()} == {
        "bc": {"bc": 2, "bc+kalm": 2, "bc+kalm rephrase": 2},
        "cql": {"cql+kalm rephrase": 2},
    }
    assert list(found["bc"])[0] == "bc"


def test_an_imagined_rollout_that_met_its_goal_is_shown(run):
    "A success, as long as fits on a strip; alone where it cannot be replayed."
    path = run.out / "imagined" / "rephrase" / "rollouts.npz"
    r = figures.Rollouts.load(path)
    best = np.minimum(r.lengths, 5)[r.success].max()
    fig = figures.imagined_strip(run, "rephrase")
    told = [t.get_text() for t in fig.texts]
    assert "imagined" in told and "real" in told and sum(t.endswith("goal met ✓") for t in told) == 2
    assert len(fig.axes) >= 2 * (best + 1)
    replace(r, seed=np.full(6, -1)).save(path)
    told = [t.get_text() for t in figures.imagined_strip(run, "rephrase").texts]
    assert "imagined; not replayable" in told and "real" not in told


def test_no_failures_no_strip(run):
    path = run.out / "acted" / "bc+kalm" / "rephrase.npz"
    r = figures.Rollouts.load(path)
    replace(r, success=np.ones(6, bool), truncated=np.zeros(6, bool), failure=np.zeros(6, bool)).save(path)
    assert figures.lost_strip(run, path) is None
