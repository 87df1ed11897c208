"""Measure a grounded model: results/imagination.csv has a row for each model and level, explanations.csv one a model.

    python experiments/assess_imagination.py [--rollouts 1000] [--checkpoint FOLDER] [--levels easy] [--models grounded]

The grounded model's first rollouts of each level, and what it says of them, are kept in results/imagined/.
"""

import argparse
import time
from pathlib import Path

from measures import of_filter, of_imagination, of_parts, of_words, repaired
from tables import add, there

import kalm
from kalm.core.files import save_json, sha256
from kalm.core.rollouts import Rollouts
from kalm.lm.explain import caption, explain
from kalm.lm.model import SHIPPED, KalmLM
from kalm.lm.quality import perplexity
from kalm.run.folder import device
from kalm.tensors.store import fast_dtype

SHOWN = 200  # rollouts of a level that are kept to look at


def show(folder: Path, lm: KalmLM, level: str, r: Rollouts) -> None:
    "Keep imagined rollouts, and the model's words about each."
    said = (caption if level == "easy" else explain)(lm, r)
    r.save(folder / f"{level}.npz")
    save_json(folder / f"{level}.json", dict(said=said))


def measure_level(lm: KalmLM, model: str, level: str, a: argparse.Namespace) -> dict:
    "Columns of a level; of a model that was never grounded only the first few."
    d, sizes = kalm.domain("clevr"), (a.rollouts, a.seed, a.max_steps)
    r, row = of_imagination(lm, d, level, *sizes)
    row["repaired_match"] = repaired(r, d)
    if model == "grounded":
        show(a.out / "imagined", lm, level, r[:SHOWN])
        row |= of_filter(lm, d, level, *sizes, a.tries)
    if model == "grounded" and level == "hard":
        parts, more = of_parts(lm, d, level, *sizes)
        parts[:SHOWN].save(a.out / "imagined" / "hard-parts.npz")
        row |= more
    return row


def arguments() -> argparse.Namespace:
    levels = kalm.domain("clevr").levels
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rollouts", type=int, default=1000)
    p.add_argument("--max-steps", type=int, default=50)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--tries", type=int, default=8)
    p.add_argument("--checkpoint", type=Path, default=SHIPPED / "clevr", help="default: the one that ships")
    p.add_argument("--out", type=Path, default=Path("results"), help="folder of the tables")
    p.add_argument("--levels", nargs="+", default=list(levels), choices=levels)
    p.add_argument("--models", nargs="+", default=["grounded", "untrained"], choices=["grounded", "untrained"])
    return p.parse_args()


def untrained(lm: KalmLM, **kw) -> KalmLM:
    "The same backbone with parts of ours that learnt nothing."
    blank = KalmLM.from_pretrained(lm.name, state_dim=lm.state_dim, codec=lm.codec, features=lm.features_spec,
                                   prompts=lm.prompts, domain=lm.domain, **kw)
    return blank.normalise(lm.normaliser)


def main() -> None:
    a = arguments()
    kw = dict(device=device(), dtype=fast_dtype(device()))
    grounded = KalmLM.from_pretrained(a.checkpoint, **kw)
    d, key = kalm.domain("clevr"), dict(checkpoint=sha256(a.checkpoint / "model.safetensors")[:12],
                                        rollouts=a.rollouts, seed=a.seed)
    for model in a.models:
        lm = grounded if model == "grounded" else untrained(grounded, **kw)
        path, k, began = a.out / "explanations.csv", key | dict(model=model), time.monotonic()
        if not there(path, **k):
            add(path, k | of_words(lm, d, a.rollouts, a.seed) | dict(perplexity=perplexity(lm)), began)
        for level in a.levels:
            path, began = a.out / "imagination.csv", time.monotonic()
            k = key | dict(model=model, level=level, max_steps=a.max_steps, tries=a.tries)
            if not there(path, **k):
                add(path, k | measure_level(lm, model, level, a), began)


if __name__ == "__main__":
    main()
