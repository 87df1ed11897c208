"""Ground a model further in texts about places, so that it reads: legs of the checkpoint that ships to read.

    python experiments/ground_reader.py --out runs/reader/1 --steps 400 --start FOLDER --seed 5

`--start pretrained` begins with the backbone as it comes, `--start random` with random weights: what does each know?
Another one is tried with `--backbone`, a folder such as `fetch_gemma.py` makes.
A run that was stopped continues. `ship_reader.py` makes the checkpoint out of legs.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import kalm
from kalm.lm.backbone import DEFAULT_BACKBONE
from kalm.run.presets import preset


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--start", default="shipped", help="shipped, pretrained, random, or the folder of a checkpoint")
    p.add_argument("--backbone", default=DEFAULT_BACKBONE, help="a folder, with --start pretrained or random")
    p.add_argument("--steps", type=int, default=400)
    p.add_argument("--scenes", type=float, default=60., help="texts a rollout and epoch")
    p.add_argument("--compose", type=float, default=6., help="sentences made of several a rollout and epoch")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--seed", type=int, default=1, help="of the order of examples")
    p.add_argument("--rollouts", type=int, default=1280)
    p.add_argument("--max-minutes", type=float, help="stop cleanly after this long")
    return p.parse_args()


def main() -> None:
    a, clevr = arguments(), kalm.domain("clevr")
    real = kalm.collect(clevr, clevr.goals("offline"), a.rollouts, policy="medium", seed=1, out=a.out.parent / "data")
    begin = dict(scratch=True) if a.start == "random" else dict(start="" if a.start == "pretrained" else a.start)
    begin |= dict(backbone=a.backbone)
    config = replace(preset(clevr, "checkpoint").ground, steps=a.steps, scenes=a.scenes, compose=a.compose, lr=a.lr,
                     head_lr=1e-3, seed=a.seed, checkpoint_every=50, log_every=5, **begin)
    kalm.ground(clevr, real, config, a.out, max_minutes=a.max_minutes)


if __name__ == "__main__":
    main()
