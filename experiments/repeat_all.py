"""Repeat everything with other random numbers, from the data on: results/repeats.csv, as `kalm run` writes its results.

    python experiments/repeat_all.py [--domain clevr] [--seeds 0 1 2] [--steps 600]

Each seed collects its own data, grounds its own model on a small budget (which then both reads and imagines), imagines,
and trains a policy of each kind. What was stopped continues. The table of another domain has its name before `repeats`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import kalm
from kalm.core.domain import Domain
from kalm.core.files import append_csv, read_csv
from kalm.run.command import STAGES, run_stages
from kalm.run.folder import Run
from kalm.run.presets import Preset, preset

READS = {"clevr": dict(scenes=4., compose=.3)}   # of one model that also reads, where two ship


def small(d: Domain, steps: int, seed: int) -> Preset:
    "`quick`, with a grounding of its own, half as much imagination and one policy of each kind."
    quick = preset(d, "quick")
    ground = replace(quick.ground, steps=steps, **READS.get(d.name, {}))
    half = {level: replace(plan, rollouts=plan.rollouts // 2) for level, plan in quick.imagined.items()}
    return replace(quick, name="repeat", ground=ground, shipped=False, seeds=1, imagined=half).with_seed(seed)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--domain", default="clevr")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=600, help="of grounding")
    p.add_argument("--out", type=Path)
    p.add_argument("--results", type=Path)
    a = p.parse_args()
    name = "" if a.domain == "clevr" else f"{a.domain}-"
    out, results = a.out or Path(f"runs/{name}repeat"), a.results or Path(f"results/{name}repeats.csv")
    for seed in a.seeds:
        run = Run(small(kalm.domain(a.domain), a.steps, seed), a.domain, out / str(seed))
        run_stages(run, [name for name in STAGES if name != "figures"])
        there = read_csv(results)
        for row in read_csv(run.out / "results.csv"):
            if row not in there:
                append_csv(results, row)


if __name__ == "__main__":
    main()
