"""Do states tell success as Meta-World does? results/metaworld_success.csv: of each task how many decisions agree.

    python experiments/check_success.py [--decisions 20000] [--only reach push ...]

Episodes of the noisy scripts, from starts of their own. Every decision of every episode counts. The two environments
that are ours are left out: Meta-World has no judgement of them.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from tables import add, there

from kalm.core.goals import Goal
from kalm.metaworld.domain import METAWORLD
from kalm.metaworld.tasks import MAX_DECISIONS, TASKS
from kalm.run.folder import commit

BESIDE = 32   # episodes side by side
OURS = ("make-coffee", "locked-door-open")


def agreement(name: str, decisions: int) -> dict:
    "How many decisions were judged, how many ended the task, how many the state tells alike, or calls done alone."
    task, counts, batch = TASKS[name], np.zeros(4, int), 0
    goals, index = [Goal(task.about, task.level, MAX_DECISIONS, dict(name=name))], np.zeros(BESIDE, int)
    while counts[0] < decisions:
        seeds = np.arange(batch * BESIDE, (batch + 1) * BESIDE)
        simulator, rng, live = METAWORLD.start(goals, index, seeds), np.random.default_rng(batch), np.arange(BESIDE)
        for _ in range(MAX_DECISIONS):
            actions = METAWORLD.behaviours["medium"].act(simulator, live, rng)
            _, success, _ = simulator.step(live, actions)
            told = METAWORLD.success(goals, index[live], simulator.states[live], simulator.begin[live])
            said = simulator.said[live]
            counts += len(live), success.sum(), (told == said).sum(), (told & ~said).sum()
            live = live[~success]
            if not len(live):
                break
        batch += 1
    judged, succeeded, agree, alone = counts.tolist()
    return dict(decisions=judged, successes=succeeded, agree=agree, state_alone=alone, share=agree / judged)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--decisions", type=int, default=20_000)
    p.add_argument("--only", nargs="+", choices=TASKS, default=[name for name in TASKS if name not in OURS])
    p.add_argument("--results", type=Path, default=Path("results/metaworld_success.csv"))
    a = p.parse_args()
    for name in a.only:
        if not there(a.results, task=name):
            began = time.monotonic()
            add(a.results, dict(task=name) | agreement(name, a.decisions) | dict(commit=commit()), began)


if __name__ == "__main__":
    main()
