"""How often each task of a run was done, in all its time and in half of it: results/DOMAIN_tasks.csv.

    python experiments/tabulate_tasks.py RUN [--results FILE]

Counts the episodes of the last checkpoint of each method, over its seeds. Rows of the same preset are replaced.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import kalm
from kalm.core.domain import Domain
from kalm.core.files import load_json, read_csv, write_csv


def rows_of(run: Path, d: Domain, preset: str) -> list[dict]:
    "A row for each method, level and task."
    last = {folder.name: max(int(p.stem.split("-")[2]) for p in folder.glob("*.json"))
            for folder in (run / "episodes").iterdir()}
    counts = defaultdict(lambda: [0, 0, 0])
    for method, step in last.items():
        for path in sorted((run / "episodes" / method).glob(f"*-*-{step}.json")):
            level, e = path.stem.split("-")[0], load_json(path)
            goals = d.goals(level)
            for i, success, length in zip(e["goal"], e["success"], e["length"]):
                row = counts[method, level, goals[i].task.get("name", goals[i].key)]
                row[0] += 1
                row[1] += success
                row[2] += success and 2 * length <= goals[i].max_steps
    return [dict(preset=preset, method=method, level=level, task=task, episodes=n, successes=k, in_half_the_time=early)
            for (method, level, task), (n, k, early) in sorted(counts.items())]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("run", type=Path)
    p.add_argument("--results", type=Path)
    a = p.parse_args()
    settings = load_json(a.run / "config.json")
    d, preset = kalm.domain(settings["domain"]), settings["name"]
    path = a.results or Path(f"results/{d.name}_tasks.csv")
    write_csv(path, [r for r in read_csv(path) if r["preset"] != preset] + rows_of(a.run, d, preset))


if __name__ == "__main__":
    main()
