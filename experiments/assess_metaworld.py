"""What a model's imagined rollouts of Meta-World are worth: results/metaworld_imagination.csv, a row a level and task.

    python experiments/assess_metaworld.py [--checkpoint FOLDER] [--rollouts 1000]

One try a rollout, nothing filtered. The first ones of each level are kept in results/imagined/metaworld/. Rows of the
level *in parts* are of the two *hard* tasks that are two taught ones in turn, imagined so.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from tables import add, there

from kalm.core.files import sha256
from kalm.core.goals import Goal
from kalm.core.rollouts import Rollouts
from kalm.lm.imagine import imagine
from kalm.lm.model import SHIPPED, KalmLM
from kalm.lm.quality import matches, replays
from kalm.metaworld.domain import METAWORLD
from kalm.metaworld.tasks import task_of
from kalm.metaworld.unreal import unreal
from kalm.run.folder import commit, device
from kalm.tensors.store import fast_dtype

SHOWN = 60   # rollouts of a level that are kept to look at
PARTS = {"make-coffee": ("coffee-push", "coffee-button"), "locked-door-open": ("door-unlock", "door-open")}


def rows_of(r: Rollouts) -> list[dict]:
    "A row a task: rollouts, how many match and replay, steps, and how many of them are unreal in which way."
    names = np.array([task_of(goal).name for goal in r.goals])[r.goal]
    match, replay, found = matches(r, METAWORLD), replays(r, METAWORLD), unreal(r)
    return [dict(task=str(name), rollouts=int(rows.sum()), match=int(match[rows].sum()), replay=int(replay[rows].sum()),
                 steps=int(r.lengths[rows].sum()),
                 **{kind.replace(" ", "_"): int(steps[rows].sum()) for kind, steps in found.items()})
            for name in sorted({*names}) for rows in [names == name]]


def plans() -> dict[str, list[Goal]]:
    "The taught goals that sentences of the two tasks are taken apart into."
    taught = {task_of(goal).name: goal for goal in reversed(METAWORLD.goals("offline"))}
    return {goal.text: [taught[part] for part in PARTS[task_of(goal).name]] for goal in METAWORLD.goals("hard")
            if task_of(goal).name in PARTS}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--checkpoint", type=Path, default=SHIPPED / "metaworld", help="default: the one that ships")
    p.add_argument("--rollouts", type=int, default=1000, help="a level")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--results", type=Path, default=Path("results"), help="folder of the table")
    a = p.parse_args()
    path = a.results / "metaworld_imagination.csv"
    key = dict(checkpoint=sha256(a.checkpoint / "model.safetensors")[:12], seed=a.seed)
    lm = KalmLM.from_pretrained(a.checkpoint, device=device(), dtype=fast_dtype(device()))
    for level in (level for level in METAWORLD.levels if level not in METAWORLD.judged_only):
        if there(path, **key, level=level):
            continue
        began = time.monotonic()
        r = imagine(lm, METAWORLD, METAWORLD.goals(level), a.rollouts, seed=a.seed)
        r[:SHOWN].save(a.results / "imagined" / "metaworld" / f"{level}.npz")
        for row in rows_of(r):
            add(path, key | dict(level=level) | row | dict(commit=commit()), began)
    if not there(path, **key, level="in parts"):
        began, parts = time.monotonic(), plans()
        goals = [goal for goal in METAWORLD.goals("hard") if goal.text in parts]
        r = imagine(lm, METAWORLD, goals, a.rollouts // 2, seed=a.seed, parts=parts, part_steps=20, rounds=2)
        for row in rows_of(r):
            add(path, key | dict(level="in parts") | row | dict(commit=commit()), began)


if __name__ == "__main__":
    main()
