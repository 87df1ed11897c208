"""How often each task of a run was done, in all its time and in half of it: results/DOMAIN_tasks.csv.

    python experiments/tabulate_tasks.py RUN ... [--results FILE]

Counts the episodes of the last checkpoint of each method, over its seeds, and the imagined rollouts for the task that
it learned from. Rows of the same preset and first seed are replaced.
"""

import argparse
from collections import Counter, defaultdict
from pathlib import Path

import kalm
from kalm.core.domain import Domain
from kalm.core.files import load_json, read_csv, write_csv
from kalm.core.goals import Goal
from kalm.core.rollouts import Rollouts


def task_of(goal: Goal) -> str:
    "Its name."
    return goal.task.get("name", goal.key)


def imagined(run: Path) -> Counter:
    "How many rollouts a run imagined, and kept, for each level and task."
    found = Counter()
    for path in (run / "imagined").glob("*/rollouts.npz"):
        r = Rollouts.load(path)
        found.update((path.parent.name, task_of(r.goals[i])) for i in r.goal)
    return found


def rows_of(run: Path, d: Domain, settings: dict) -> list[dict]:
    "A row for each method, level and task."
    last = {folder.name: max(int(p.stem.split("-")[2]) for p in folder.glob("*.json"))
            for folder in (run / "episodes").iterdir()}
    counts, dreams = defaultdict(lambda: [0, 0, 0]), imagined(run)
    for method, step in last.items():
        for path in sorted((run / "episodes" / method).glob(f"*-*-{step}.json")):
            level, e = path.stem.split("-")[0], load_json(path)
            goals = d.goals(level)
            for i, success, length in zip(e["goal"], e["success"], e["length"]):
                row = counts[method, level, task_of(goals[i])]
                row[0] += 1
                row[1] += success
                row[2] += success and 2 * length <= goals[i].max_steps
    return [dict(preset=settings["name"], seed=settings["seed"], method=method, level=level, task=task, episodes=n,
                 successes=k, in_half_the_time=early, imagined=dreams[level, task] * method.endswith("+kalm"))
            for (method, level, task), (n, k, early) in sorted(counts.items())]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    p.add_argument("--results", type=Path)
    a = p.parse_args()
    for run in a.runs:
        settings = load_json(run / "config.json")
        path = a.results or Path(f"results/{settings['domain']}_tasks.csv")
        rows = rows_of(run, kalm.domain(settings["domain"]), settings)
        old = [r for r in read_csv(path) if (r["preset"], r["seed"]) != (settings["name"], str(settings["seed"]))]
        write_csv(path, old + rows)


if __name__ == "__main__":
    main()
