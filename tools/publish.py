"""Copy what the figure notebooks read from finished runs into results/: their rows as PRESET.csv, and the episodes they kept.

    python tools/publish.py runs/best runs/night

Episodes (acted/METHOD-LEVEL.npz) come from runs with one policy for all levels. A run that is not whole is refused.
"""
import argparse
import csv
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from kalm.core import atomic_write, load_json, read_csv
from kalm.pipeline import PRESETS, rows_of


def publish(run: Path, out: Path) -> str:
    "Copy one run's results; returns what was done, in a line."
    config, rows = load_json(run/"config.json"), read_csv(run/"results.csv")
    settings = config["settings"]; preset, rows = settings["name"], [r for r in rows if r["config"] == config["config"]]
    if preset not in PRESETS or (differ := json.loads(json.dumps(asdict(p := replace(PRESETS[preset], seed=settings["seed"])))).keys() ^ settings.keys()): raise SystemExit(f"{run} is of another version of the presets" + (f" ({', '.join(sorted(differ))})" if preset in PRESETS else ""))
    missing = {(m, l, str(s), str(t)) for m, l, s, t, _ in rows_of(p, run)} - {(r["method"], r["level"], r["seed"], r["step"]) for r in rows}
    if missing: raise SystemExit(f"{run/'results.csv'} lacks {len(missing)} rows: `kalm evaluate --preset {preset} --out {run}` goes on with them")
    episodes = sorted((run/"acted").glob("*+kalm/*/rollouts.npz")) if settings["together"] else []
    with atomic_write(out/f"{preset}.csv") as tmp, open(tmp, "w", newline="", encoding="utf-8") as f: w = csv.DictWriter(f, list(rows[0]), lineterminator="\n"); w.writeheader(); w.writerows(rows)
    for f in episodes:
        with atomic_write(out/"acted"/f"{f.parent.parent.name}-{f.parent.name}.npz") as tmp: shutil.copyfile(f, tmp)
    return f"{preset}: {len(rows)} rows, {len(episodes)} files of episodes"

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="+", type=Path, help="folders of finished runs"); p.add_argument("--out", type=Path, default=Path("results"))
    a = p.parse_args()
    for run in a.runs: print(publish(run, a.out))

if __name__ == "__main__": main()
