"""Ground small variants of the model and measure each: results/ablations.csv, one row a variant.

    python experiments/ablate_grounding.py [--data runs/checkpoint/data] [--only base no_text ...] [--keep]

Every variant differs in one respect from the settings of the checkpoint that ships and sees as many tokens of the same
rollouts. Without a task, the others share its tokens. Collect the rollouts with `kalm collect --preset checkpoint`.
"""

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path

from measures import brief
from tables import add, there

import kalm
from kalm.core.files import read_csv, save_json
from kalm.core.rollouts import Rollouts
from kalm.lm.backbone import Adapter
from kalm.lm.ground import ground
from kalm.lm.model import KalmLM
from kalm.lm.settings import GroundConfig
from kalm.run.folder import commit, device
from kalm.run.presets import preset
from kalm.tensors.store import fast_dtype


def variants(base: GroundConfig) -> dict[str, GroundConfig]:
    "Each by its name in the table."
    full = dict(adapter=Adapter(full=True), lr=2e-4)
    without = {f"no_{task}": dict(task_weights=replace(base.task_weights, **{task: 0.}))
               for task in ("dynamics", "explain", "consequence", "caption", "question", "text")}
    changes = dict(base={}, rank_4=dict(adapter=Adapter(rank=4, alpha=8)), lr_5e_4=dict(lr=5e-4), lr_3e_3=dict(lr=3e-3),
                   rank_64=dict(adapter=Adapter(rank=64, alpha=128)), full=full, **without,
                   equal_actions=dict(unrewarded_weight=1.), no_meaning=dict(meanings=False), compose=dict(compose=.1),
                   plain_words=dict(keyword_weight=1.), random_weights=dict(scratch=True),
                   random_weights_full=full | dict(scratch=True))
    return {name: replace(base, **change) for name, change in changes.items()}


def keeper(folder: Path):
    "A callback that saves the model at each checkpoint, for `track_grounding.py`."
    def keep(lm: KalmLM, step: int) -> None:
        point = folder / f"step-{step}"
        lm.save_pretrained(point)
        tokens = [int(r["tokens"]) for r in read_csv(folder / "log.csv") if int(r["step"]) <= step]
        save_json(point / "point.json", dict(step=step, tokens=max(tokens)))
    return keep


def measure(name: str, config: GroundConfig, real: Rollouts, a: argparse.Namespace) -> dict:
    "Ground one variant in its own folder, where it can be stopped and goes on, and measure it."
    d, folder = kalm.domain("clevr"), a.out / f"{name}-{a.steps}-{a.seed}"
    ground(d, real, config, out=folder, callback=keeper(folder) if a.keep else None)
    log = read_csv(folder / "log.csv")[-1]
    lm = KalmLM.from_pretrained(folder, device=device(), dtype=fast_dtype(device()))
    row = dict(tokens=log["tokens"], ground_seconds=log["seconds"], action_loss=log["action"], state_loss=log["state"],
               text_loss=log["text"])
    row |= brief(lm, d, a.rollouts, a.max_steps)
    if not a.keep:
        shutil.rmtree(folder)
    return row


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", type=Path, default=Path("runs/checkpoint/data"))
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--rollouts", type=int, default=300)
    p.add_argument("--max-steps", type=int, default=20)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", nargs="+", help="variants")
    p.add_argument("--list", action="store_true", help="show the variants")
    p.add_argument("--keep", action="store_true", help="keep the weights, those of every checkpoint too")
    p.add_argument("--out", type=Path, default=Path("runs/ablations"))
    p.add_argument("--results", type=Path, default=Path("results/ablations.csv"))
    return p.parse_args()


def main() -> None:
    a = arguments()
    base = replace(preset(kalm.domain("clevr"), "checkpoint").ground, compose=0., steps=a.steps, seed=a.seed,
                   log_every=min(10, a.steps), checkpoint_every=min(50, a.steps))
    every = variants(base)
    if a.list:
        return print("\n".join(every))
    unknown = set(a.only or ()) - set(every)
    if unknown:
        raise SystemExit(f"unknown variants {', '.join(sorted(unknown))}: expected some of {', '.join(every)}")
    real = Rollouts.load(a.data / "rollouts.npz")
    for name in a.only or every:
        key = dict(steps=a.steps, rollouts=a.rollouts, max_steps=a.max_steps, seed=a.seed, variant=name)
        if not there(a.results, **key):
            began = time.monotonic()
            add(a.results, key | measure(name, every[name], real, a) | dict(commit=commit()), began)


if __name__ == "__main__":
    main()
