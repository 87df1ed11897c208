"""Ground small variants of the model in a world and measure each: results/DOMAIN_grounding.csv, one row a variant.

    python experiments/ground_variants.py metaworld [--data runs/metaworld/data] [--only gaussian bins ...] [--keep]

Variants differ in one respect from the settings of the preset `checkpoint` and see as many tokens of the same rollouts.
Collect the rollouts with `kalm collect --domain metaworld --preset checkpoint`. A model that is there already is
measured with `--of NAME FOLDER`, one that went on from another with `--before` the tokens of that one.
"""

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path

from measures import of_levels, of_steps
from tables import add, there

import kalm
from kalm.core.domain import Domain
from kalm.core.episodes import collect
from kalm.core.files import read_csv
from kalm.core.rollouts import Rollouts
from kalm.lm.actions import CONTINUOUS
from kalm.lm.ground import ground
from kalm.lm.model import KalmLM
from kalm.run.folder import commit, device
from kalm.run.presets import preset
from kalm.tensors.store import fast_dtype

VARIANTS = {head: dict(action_head=head) for head in CONTINUOUS} | dict(random_weights=dict(scratch=True))
HELD_OUT = 8   # every eighth rollout is not learned from


def measure(name: str, a: argparse.Namespace) -> dict:
    "Ground one variant in its own folder, where it can be stopped and goes on, and measure it."
    d, folder = kalm.domain(a.domain), a.out / f"{a.domain}-{name}-{a.steps}-{a.seed}"
    real = Rollouts.load(a.data / "rollouts.npz")
    held_out = [i for i in range(len(real)) if i % HELD_OUT == 0]
    base = preset(d, "checkpoint").ground
    config = replace(base, steps=a.steps, seed=a.seed, log_every=min(10, a.steps), checkpoint_every=min(50, a.steps),
                     **VARIANTS[name])
    ground(d, real[[i for i in range(len(real)) if i % HELD_OUT]], config, out=folder)
    row = measured(folder, d, real[held_out[:a.rollouts]], a.rollouts)
    if not a.keep:
        shutil.rmtree(folder)
    return row


def measured(folder: Path, d: Domain, real: Rollouts, n: int) -> dict:
    "What the model in a folder makes of real rollouts, and of `n` goals a level."
    log = read_csv(folder / "log.csv")[-1]
    lm = KalmLM.from_pretrained(folder, device=device(), dtype=fast_dtype(device()))
    return dict(tokens=log["tokens"], ground_seconds=log["seconds"], **of_steps(lm, d, real), **of_levels(lm, d, n))


def measure_there(a: argparse.Namespace) -> dict:
    "Measure a model that somebody else grounded."
    d = kalm.domain(a.domain)
    row = measured(Path(a.of[1]), d, collect(d, d.goals(d.levels[0]), a.rollouts, seed=10_000), a.rollouts)
    return row | dict(tokens=a.before + int(row["tokens"]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("domain")
    p.add_argument("--data", type=Path, default=Path("runs/metaworld/data"))
    p.add_argument("--steps", type=int, default=250)
    p.add_argument("--rollouts", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    p.add_argument("--of", nargs=2, metavar=("NAME", "FOLDER"), help="measure the model in a folder, on new rollouts")
    p.add_argument("--before", type=int, default=0, help="tokens that it had seen before those of its log")
    p.add_argument("--keep", action="store_true", help="keep the weights")
    p.add_argument("--out", type=Path, default=Path("runs/variants"))
    p.add_argument("--results", type=Path)
    a = p.parse_args()
    a.results = a.results or Path(f"results/{a.domain}_grounding.csv")
    for name in [a.of[0]] if a.of else a.only:
        key = dict(variant=name, steps=a.steps, rollouts=a.rollouts, seed=a.seed)
        if not there(a.results, **key):
            began = time.monotonic()
            row = measure_there(a) if a.of else measure(name, a)
            add(a.results, key | row | dict(commit=commit()), began)


if __name__ == "__main__":
    main()
