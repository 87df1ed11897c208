"""Judge the last policies of a finished run again, on starts that no choice was made on: results/recheck.csv.

    python experiments/recheck_policies.py runs/best

Settings were chosen on the starts that `kalm evaluate` uses; this tells how much of a result that was.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

import kalm
from kalm.core.files import load_json
from kalm.core.results import read_results, write_result
from kalm.run.folder import Run, commit, need
from kalm.run.policies import evaluate_policy, rows_of
from kalm.run.presets import preset


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("run", type=Path, help="folder of a finished run")
    p.add_argument("--other", type=int, default=1000, help="added to the seeds of goals and starts")
    p.add_argument("--results", type=Path, default=Path("results/recheck.csv"))
    a = p.parse_args()
    settings = load_json(need(a.run / "config.json", "run"))
    world = kalm.domain(settings["domain"])
    run = Run(preset(world, settings["name"]).with_seed(settings["seed"]), settings["domain"], a.run)
    done = {(r["method"], r["level"], r["seed"], r["step"]) for r in read_results(a.results, config=run.config)}
    rows = rows_of(run)
    last = {row.method: max(r.step for r in rows if r.method == row.method) for row in rows if row.folder}
    rows = [row for row in rows if row.step == last.get(row.method)]
    for row in tqdm(rows, desc="judging", unit="row", disable=None):
        other = replace(row, seed=row.seed + a.other)
        if other.key in done:
            continue
        e = evaluate_policy(run, other)
        write_result(a.results, domain=world.name, preset=run.preset.name, backend=run.preset.ground.backbone,
                     config=run.config, method=row.method, level=row.level, seed=other.seed, step=row.step,
                     episodes=e.episodes, successes=e.successes, commit=commit())


if __name__ == "__main__":
    main()
