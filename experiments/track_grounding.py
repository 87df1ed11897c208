"""Measure a grounding run at several points: results/grounding.csv, one row a point.

    python experiments/track_grounding.py NAME FOLDER ... [--before TOKENS] [--rollouts 300]

A FOLDER is a checkpoint that was kept while the run went on (`kalm.ground` takes a callback for that, see
`ablate_grounding.py --keep`). NAME is the run's; --before counts tokens that its start had seen.
"""

import argparse
import time
from pathlib import Path

from measures import brief
from tables import add, there

import kalm
from kalm.core.files import load_json
from kalm.lm.model import KalmLM
from kalm.run.folder import device
from kalm.tensors.store import fast_dtype


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("name")
    p.add_argument("folders", nargs="+", type=Path)
    p.add_argument("--before", type=int, default=0)
    p.add_argument("--rollouts", type=int, default=300)
    p.add_argument("--max-steps", type=int, default=20)
    p.add_argument("--results", type=Path, default=Path("results/grounding.csv"))
    a = p.parse_args()
    for folder in a.folders:
        point, began = load_json(folder / "point.json"), time.monotonic()
        key = dict(run=a.name, rollouts=a.rollouts, max_steps=a.max_steps, step=point["step"],
                   tokens=point["tokens"] + a.before)
        if not there(a.results, **key):
            lm = KalmLM.from_pretrained(folder, device=device(), dtype=fast_dtype(device()))
            add(a.results, key | brief(lm, kalm.domain("clevr"), a.rollouts, a.max_steps), began)


if __name__ == "__main__":
    main()
