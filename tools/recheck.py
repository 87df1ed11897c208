"""Judge the last policies of a finished run again, on goals in another order and on starts that no choice was made on: results/recheck.csv.

    python tools/recheck.py runs/best

Settings were chosen by `tools/ablate_policies.py`, which judges on the same starts as `kalm evaluate`. This tells how much of a result that was. Rows already in the file are kept.
"""
import argparse
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from kalm.core import load_json, read_csv
from kalm.evaluate import write_result
from kalm.pipeline import PRESETS, commit, judge, rows_of

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("run", type=Path, help="folder of a finished run"); p.add_argument("--other", type=int, default=1000, help="added to the seeds of goals and starts"); p.add_argument("--results", type=Path, default=Path("results/recheck.csv"))
    a = p.parse_args()
    if not (a.run/"config.json").exists(): p.error(f"{a.run} is not the folder of a run")
    config = load_json(a.run/"config.json"); preset = replace(PRESETS[config["settings"]["name"]], seed=config["settings"]["seed"], checkpoints=1, baselines=tuple(b for b in config["settings"]["baselines"] if b == "oracle"))
    done = {(r["method"], r["level"], r["seed"], r["step"]) for r in read_csv(a.results) if r["config"] == config["config"]}
    for method, level, seed, step, folder in tqdm(rows_of(preset, a.run), desc="judging", unit="row", disable=None):
        if (method, level, str(seed + a.other), str(step)) in done: continue
        e = judge(preset.episodes, method, level, seed + a.other, step, folder)
        write_result(a.results, preset=preset.name, backend=preset.ground.backbone, config=config["config"], method=method, level=level, seed=seed + a.other, step=step, episodes=e.episodes, successes=e.successes, commit=commit())

if __name__ == "__main__": main()
