"Wrapped environments go the whole way, from data to figures, with the command alone."

import pytest

from kalm.core.domain import domain
from kalm.core.results import read_results
from kalm.core.rollouts import Rollouts
from kalm.run.command import main
from kalm.run.folder import Run
from kalm.run.policies import rows_of
from kalm.run.presets import preset

pytestmark = pytest.mark.usefixtures("cache")

WORLDS = ["discrete_line", "cart_pole", "pendulum", "grid"]


@pytest.mark.parametrize("kind", WORLDS)
def test_every_stage_runs_in_a_wrapped_environment(kind, tmp_path, capsys, monkeypatch):
    if kind != "cart_pole":  # that one with workers, which import for long; the others in this process
        monkeypatch.setattr("kalm.run.workers.os.cpu_count", lambda: 1)
    out = tmp_path / "run"
    assert main(["run", "--domain", f"worlds:{kind}", "--preset", "smoke", "--out", str(out), "--debug"]) == 0
    text = capsys.readouterr().out
    assert "[6/6] figures" in text and "imagined rollouts are kept" in text
    run = Run(preset(domain(f"worlds:{kind}"), "smoke"), f"worlds:{kind}", out)
    rows = read_results(out / "results.csv")
    assert {(r["method"], r["level"], r["seed"], r["step"]) for r in rows} == {row.key for row in rows_of(run)}
    assert {r["domain"] for r in rows} == {kind}
    imagined = Rollouts.load(out / "imagined" / "rephrase" / "rollouts.npz")
    assert (imagined.seed >= 0).all() and imagined.domain == kind
    assert (out / "figures" / "success.png").exists() and (out / "figures" / "table.md").exists()
