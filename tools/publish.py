"""Copy what the figure notebooks read from finished runs into results/: results.csv as PRESET.csv, and the episodes they kept.

    python tools/publish.py runs/best runs/night

Episodes (acted/METHOD-LEVEL.npz) come from the runs that have `+kalm` policies judged on every level; later runs overwrite earlier ones.
"""
import argparse
import shutil
from pathlib import Path

from kalm.core import load_json, read_csv
from kalm.pipeline import PRESETS


def publish(run: Path, out: Path) -> str:
    "Copy one run's results; returns what was done, in a line."
    config, rows = load_json(run/"config.json"), read_csv(run/"results.csv")
    preset = config["settings"]["name"]; rows = [r for r in rows if r["config"] == config["config"]]
    if not rows: raise SystemExit(f"{run/'results.csv'} holds no result of this run: run `kalm evaluate --preset {preset} --out {run}` first")
    if preset not in PRESETS: raise SystemExit(f"{run}: preset {preset!r} is not one of {', '.join(PRESETS)}")
    out.mkdir(parents=True, exist_ok=True); shutil.copyfile(run/"results.csv", out/f"{preset}.csv"); episodes = sorted((run/"acted").glob("*+kalm/*/rollouts.npz")) if config["settings"]["together"] else []
    for f in episodes: (out/"acted").mkdir(exist_ok=True); shutil.copyfile(f, out/"acted"/f"{f.parent.parent.name}-{f.parent.name}.npz")
    return f"{preset}: {len(rows)} rows, {len(episodes)} files of episodes"

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="+", type=Path, help="folders of finished runs"); p.add_argument("--out", type=Path, default=Path("results"))
    a = p.parse_args()
    for run in a.runs: print(publish(run, a.out))

if __name__ == "__main__": main()
