"""Copy what the notebooks read from finished runs into results/: their rows as PRESET.csv; of the run with the preset `--front` also the episodes it kept, and the front page's success bars.

    python tools/publish.py runs/quick runs/best runs/night

A run that is not whole is refused.
"""
import argparse
import csv
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from kalm.core import atomic_write, load_json, read_csv
from kalm.pipeline import PRESETS, rows_of
from kalm.plots import save_figure, success_bars

FRONT = ("bc", "bc+kalm", "cql", "cql+kalm", "expert", "random")   # methods on the front page

def publish(run: Path, out: Path, front: str, image: Path) -> str:
    "Copy one run's results; returns what was done, in a line."
    config, rows = load_json(run/"config.json"), read_csv(run/"results.csv")
    settings = config["settings"]; preset, rows = settings["name"], [r for r in rows if r["config"] == config["config"]]
    if preset not in PRESETS or (differ := json.loads(json.dumps(asdict(p := replace(PRESETS[preset], seed=settings["seed"])))).keys() ^ settings.keys()): raise SystemExit(f"{run} is of another version of the presets" + (f" ({', '.join(sorted(differ))})" if preset in PRESETS else ""))
    missing = {(m, l, str(s), str(t)) for m, l, s, t, _ in rows_of(p, run)} - {(r["method"], r["level"], r["seed"], r["step"]) for r in rows}
    if missing: raise SystemExit(f"{run/'results.csv'} lacks {len(missing)} rows: `kalm evaluate --preset {preset} --out {run}` goes on with them")
    episodes = sorted((run/"acted").glob("*+kalm/*/rollouts.npz")) if preset == front else []
    with atomic_write(out/f"{preset}.csv") as tmp, open(tmp, "w", newline="", encoding="utf-8") as f: w = csv.DictWriter(f, list(rows[0]), lineterminator="\n"); w.writeheader(); w.writerows(rows)
    for f in episodes:
        with atomic_write(out/"acted"/f"{f.parent.parent.name}-{f.parent.name}.npz") as tmp: shutil.copyfile(f, tmp)
    if preset == front: save_figure(success_bars([r for r in rows if r["method"] in FRONT]), image)
    return f"{preset}: {len(rows)} rows, {len(episodes)} files of episodes"

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="+", type=Path, help="folders of finished runs"); p.add_argument("--out", type=Path, default=Path("results")); p.add_argument("--front", default="best"); p.add_argument("--image", type=Path, default=Path("nbs/images/success.png"))
    a = p.parse_args()
    for run in a.runs: print(publish(run, a.out, a.front, a.image))

if __name__ == "__main__": main()
