"""Ask a model what sentences mean: results/understanding.csv, a row a model, level and kind of sentence.

    python experiments/ask_meanings.py NAME [--model reader|shipped|FOLDER] [--levels rephrase] [--answers FILE]
    python experiments/ask_meanings.py plain --few-shot 6 [--scratch]      the backbone alone, shown a few examples

`right` counts key words that say what the goal asks for; `sure` is how sure the model was of them, on average, and
`sure_right` of those that were right. A backbone alone is asked which of four places is the likeliest to follow.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tables import add, there

import kalm
from kalm.clevr.goals import COMPASS, SIDES, WHERE
from kalm.core.files import numpy_rng
from kalm.core.goals import Goal
from kalm.lm.backbone import load_backbone
from kalm.lm.model import SHIPPED, KalmLM
from kalm.lm.reading import checked_meanings, reading_folder, weights_of


def by_kind(level: str, each: int) -> dict[str, list[Goal]]:
    "Goals that have key words, some of each kind, spread evenly."
    d, kinds = kalm.domain("clevr"), defaultdict(list)
    for goal in d.goals(level):
        if d.words.meaning(goal):
            kinds[goal.kind or level].append(goal)
    rng = numpy_rng(0, "kinds", level)
    return {kind: [goals[i] for i in np.sort(rng.permutation(len(goals))[:each])] for kind, goals in kinds.items()}


def folder_of(model: str) -> Path:
    return {"reader": reading_folder("clevr"), "shipped": SHIPPED / "clevr"}.get(model, Path(model))


def grounded(a: argparse.Namespace):
    "How a grounded model answers: key words, how sure, whether right."
    d = kalm.domain("clevr")
    lm = KalmLM.from_pretrained(folder_of(a.model))

    def ask(goals: list[Goal]) -> list[tuple[str, float, bool]]:
        said = checked_meanings(lm, [goal.text for goal in goals], d.words.names if a.checked else ())
        return [(m.words, m.sure, d.words.agree(d.words.meaning(g), m.words)) for g, m in zip(goals, said)]
    return ask


def place(goal: Goal, side: int) -> str:
    "A place beside a landmark in words."
    return f" The {goal.task['source']} ball will be {WHERE[side]} the {goal.task['target']} ball."


def few_shot(a: argparse.Namespace):
    "How the backbone alone answers, shown taught sentences: the place of four whose words are the likeliest."
    model, tokenizer = load_backbone("smollm2-135m", scratch=0 if a.scratch else None)
    taught = kalm.domain("clevr").goals("offline")
    shown = [taught[i] for i in numpy_rng(0, "shots").permutation(len(taught))[:a.few_shot]]
    shots = "".join(f"{g.text}{place(g, COMPASS.index(g.task['direction']))}\n\n" for g in shown)

    @torch.no_grad()
    def likelihood(text: str, end: str) -> float:
        before, more = (tokenizer(t, return_tensors="pt").input_ids for t in (shots + text, end))
        log_p = model(torch.cat([before, more], 1)).logits[0, before.shape[1] - 1:-1].float().log_softmax(-1)
        return float(log_p.gather(-1, more[0, :, None]).sum())

    def ask(goals: list[Goal]) -> list[tuple[str, float, bool]]:
        out = []
        for goal in goals:
            p = np.exp([likelihood(goal.text, place(goal, k)) for k in range(4)])
            best = int(p.argmax())
            words = f"{goal.task['source']} {goal.task['target']} {SIDES[best]}"
            out.append((words, float(p[best] / p.sum()), COMPASS[best] == goal.task["direction"]))
        return out
    return ask


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("name", help="of the row")
    p.add_argument("--model", default="reader", help="reader, shipped (who imagines), or the folder of a checkpoint")
    p.add_argument("--levels", nargs="+", default=["rephrase"])
    p.add_argument("--each", type=int, default=64, help="sentences of a kind")
    p.add_argument("--checked", action="store_true", help="ask again where the answer names other balls")
    p.add_argument("--few-shot", type=int, default=0, help="ask the backbone alone, shown this many examples")
    p.add_argument("--scratch", action="store_true", help="random weights in place of the backbone's own")
    p.add_argument("--answers", type=Path, help="keep every answer in this file")
    p.add_argument("--results", type=Path, default=Path("results/understanding.csv"))
    return p.parse_args()


def main() -> None:
    a = arguments()
    weights = "" if a.few_shot else weights_of(folder_of(a.model), "clevr")
    ask, kept = None, []
    for level in a.levels:
        for kind, goals in by_kind(level, a.each).items():
            key = dict(name=a.name, weights=weights, level=level, kind=kind, sentences=len(goals))
            if there(a.results, **key) and not a.answers:
                continue
            ask, began = ask or (few_shot if a.few_shot else grounded)(a), time.monotonic()
            said = ask(goals)
            sure, right = np.array([s for _, s, _ in said]), np.array([r for *_, r in said])
            sure_right = float(sure[right].mean()) if right.any() else 0.
            row = key | dict(right=int(right.sum()), sure=float(sure.mean()), sure_right=sure_right)
            if not there(a.results, **key):
                add(a.results, row, began)
            kept += [dict(level=level, kind=kind, text=g.text, said=w, sure=round(s, 3), right=bool(r))
                     for g, (w, s, r) in zip(goals, said)]
    if a.answers:
        a.answers.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
