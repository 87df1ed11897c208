"""Measure a grounded model: results/imagination.csv, one row a model and level, and results/explanations.csv, one row a model. Its rollouts and what it says of them are kept in results/imagined/.

    python tools/assess.py [--rollouts 1000] [--max-steps 50] [--checkpoint FOLDER] [--levels offline rephrase easy hard] [--models grounded untrained]

Rows already in the files (same checkpoint, model, level, settings) are kept, so an interrupted run continues.
"""
import argparse, time
from pathlib import Path

import torch

import kalm
from kalm.core import append_csv, fast_dtype, read_csv, save_json, sha256
from kalm.embeddings import KalmLM
from kalm.generation import describe, explain, imagine_by_parts
from kalm.goals import LEVELS, goal_set
from kalm.grounding import perplexity
from kalm.pipeline import assess, assess_explanations, dream

COLUMNS = ("match replay step_error still_error off_table off_table_repaired too_fast length action_match done_match done_replay "
           + " ".join(f"filter_{name}_{k}" for name in ("match", "replay") for k in ("kept", "precision", "recall", "base")) + " trusted trusted_match trusted_replay trusted_action_match parts_match parts_replay parts_done_match parts_done_replay").split()

def keep(path: Path, key: dict, row: dict, began: float) -> None:
    "Append one row, with every share to four digits."
    append_csv(path, key | {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} | dict(seconds=round(time.monotonic() - began, 1)))
    print({k: v for k, v in key.items() if k != "checkpoint"}, {k: round(v, 3) for k, v in row.items() if v != ""}, flush=True)

def show(folder: Path, lm: KalmLM, level: str, r) -> None:
    "Keep imagined rollouts (their goals are those of `goal_set(level)`) and what the model says of each, for the figure notebooks."
    r.save(folder/f"{level}.npz"); save_json(folder/f"{level}.json", dict(said=(describe if level == "easy" else explain)(lm, r)))

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rollouts", type=int, default=1000); p.add_argument("--max-steps", type=int, default=50); p.add_argument("--seed", type=int, default=1); p.add_argument("--tries", type=int, default=8)
    p.add_argument("--checkpoint", type=Path, default=Path(kalm.__file__).parent/"assets"/"grounded", help="a grounded checkpoint's folder (default: the shipped one)")
    p.add_argument("--out", type=Path, default=Path("results"), help="folder of the two files")
    p.add_argument("--levels", nargs="+", default=list(LEVELS), choices=LEVELS); p.add_argument("--models", nargs="+", default=["grounded", "untrained"], choices=["grounded", "untrained"])
    a = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kw = dict(device=device, dtype=fast_dtype(device))
    lm = KalmLM.from_pretrained(a.checkpoint, **kw)
    models = dict(grounded=lm, untrained=KalmLM.from_pretrained(lm.name, **kw).normalise(lm.normaliser))
    key = dict(checkpoint=sha256(a.checkpoint/"model.safetensors")[:12], rollouts=a.rollouts, seed=a.seed)
    done = lambda path, **k: any(all(r[n] == str(v) for n, v in (key | k).items()) for r in read_csv(path))
    for model in a.models:
        path, began = a.out/"explanations.csv", time.monotonic()
        if not done(path, model=model): keep(path, key | dict(model=model), assess_explanations(models[model], a.rollouts, a.seed) | dict(perplexity=perplexity(models[model])), began)
        for level in a.levels:
            path, began, k = a.out/"imagination.csv", time.monotonic(), dict(model=model, level=level, max_steps=a.max_steps, tries=a.tries)
            if done(path, **k): continue
            raw = dream(models[model], level, a.rollouts, a.seed, max_steps=a.max_steps)
            parts = imagine_by_parts(models[model], goal_set(level), raw.states[:, 0], raw.goal, max_steps=a.max_steps, seed=a.seed) if model == "grounded" and level == "hard" else None
            row = assess(models[model], level, a.rollouts, a.seed, a.max_steps, a.tries, full=model == "grounded", raw=raw, parts=parts)
            if model == "grounded": show(a.out/"imagined", models[model], level, raw)
            if parts is not None: parts.save(a.out/"imagined"/"hard-parts.npz")
            keep(path, key | k, {c: row.get(c, "") for c in COLUMNS}, began)

if __name__ == "__main__": main()
