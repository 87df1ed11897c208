"""Keep what notebooks read of finished runs in results/: rows as PRESET.csv, and of `--front` also episodes to look at.

    python tools/publish.py runs/quick runs/best runs/protocol

A run that is not whole is refused.
"""
import argparse
import csv
import shutil
from pathlib import Path

from kalm.core.domain import domain
from kalm.core.files import atomic_write, load_json
from kalm.core.results import RESULT_COLUMNS, read_results
from kalm.run.folder import Run
from kalm.run.policies import rows_of
from kalm.run.presets import preset


def publish(folder: Path, out: Path, front: str) -> str:
    "Copy one run's results; what was done, in a line."
    settings = load_json(folder/"config.json")
    world = domain(settings["domain"])
    run = Run(preset(world, settings["name"]).with_seed(settings["seed"]), settings["domain"], folder)
    rows = read_results(folder/"results.csv", config=run.config)
    found = {(r["method"], r["level"], r["seed"], r["step"]) for r in rows if not r["kind"]}
    missing = [row for row in rows_of(run) if row.key not in found]
    if missing:
        raise SystemExit(f"{folder/'results.csv'} lacks {len(missing)} rows: `kalm evaluate` goes on with them")
    name = settings["name"] if settings["domain"] == "clevr" else f"{settings['domain']}-{settings['name']}"
    with atomic_write(out/f"{name}.csv") as tmp, open(tmp, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, RESULT_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    episodes = sorted((folder/"acted").glob("*+kalm/*.npz")) if name == front else []
    for path in episodes:
        with atomic_write(out/"acted"/path.parent.name/path.name) as tmp:
            shutil.copyfile(path, tmp)
    return f"{name}: {len(rows)} rows, {len(episodes)} files of episodes"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    p.add_argument("--out", type=Path, default=Path("results"))
    p.add_argument("--front", default="best")
    a = p.parse_args()
    for folder in a.runs:
        print(publish(folder, a.out, a.front))


if __name__ == "__main__":
    main()
