"""Repeat everything with other random numbers, from the data on: results/repeats.csv, as `kalm run` writes its results.

    python experiments/repeat_all.py [--seeds 0 1 2] [--steps 600]

Each seed collects its own data, grounds its own model on a small budget (which then both reads and imagines), imagines,
and trains a policy of each kind. What was stopped continues.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import kalm
from kalm.core.files import append_csv, read_csv
from kalm.run.command import STAGES, run_stages
from kalm.run.folder import Run
from kalm.run.presets import Preset, clevr_levels, preset


def small(steps: int, seed: int) -> Preset:
    "`quick`, with a grounding of its own, half as much imagination and one policy of each kind."
    quick = preset(kalm.domain("clevr"), "quick")
    ground = replace(quick.ground, steps=steps, scenes=4., compose=.3)
    return replace(quick, name="repeat", ground=ground, shipped=False, seeds=1,
                   imagined=clevr_levels(1200, 1000, 500)).with_seed(seed)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=600, help="of grounding")
    p.add_argument("--out", type=Path, default=Path("runs/repeat"))
    p.add_argument("--results", type=Path, default=Path("results/repeats.csv"))
    a = p.parse_args()
    for seed in a.seeds:
        run = Run(small(a.steps, seed), "clevr", a.out / str(seed))
        run_stages(run, [name for name in STAGES if name != "figures"])
        there = read_csv(a.results)
        for row in read_csv(run.out / "results.csv"):
            if row not in there:
                append_csv(a.results, row)


if __name__ == "__main__":
    main()
