"""Make the checkpoint that ships to read out of grounded ones: the mean of their weights, with what it reads.

    python experiments/ship_reader.py --mean runs/reader/1 runs/reader/2 --out runs/reader/mean    a mean alone
    python experiments/ship_reader.py --mean runs/reader/mean runs/reader/3 --out SHIPPED           and ship it
    python experiments/ship_reader.py --domain metaworld --mean runs/metaworld/grounded --out SHIPPED
    python experiments/ship_reader.py --calibrate kalm/assets/grounded/clevr     a threshold alone, beside its weights

Shipping calibrates the model, and asks it for the meanings of all sentences of the domain, so that runs need not.
"""

import argparse
from pathlib import Path

import torch

import kalm
from kalm.core.domain import Domain
from kalm.lm.explain import calibrate
from kalm.lm.model import CALIBRATION, KalmLM, keep_threshold
from kalm.lm.reading import Reader, keep_meanings, reading_folder


def mean_of(folders: list[Path]) -> KalmLM:
    "A model whose trained weights are the mean of theirs, which began from the same ones."
    models = [KalmLM.from_pretrained(folder) for folder in folders]
    weights = [{name: p for name, p in lm.named_parameters() if p.requires_grad} for lm in models]
    with torch.no_grad():
        for name, p in weights[0].items():
            p.copy_(torch.stack([w[name].float() for w in weights]).mean(0))
    return models[0]


def ship(lm: KalmLM, d: Domain, out: Path) -> None:
    "With its threshold and what it says of every sentence."
    lm.sure = round(calibrate(lm, d), 4)
    lm.save_pretrained(out)
    for older in ("meanings.json", CALIBRATION):
        (out / older).unlink(missing_ok=True)
    reader = Reader(d.name, out, names=d.words.names, cache=Path("runs/reader/meanings"))
    texts = [goal.text for level in d.levels for goal in d.goals(level)]
    keep_meanings(out / "meanings.json", dict(zip(texts, reader.read(texts))), reader.spec())
    print(f"{out}: sure {lm.sure}, {len(texts):,} sentences read")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--domain", default="clevr")
    p.add_argument("--mean", nargs="+", type=Path, help="folders of checkpoints")
    p.add_argument("--out", help="a folder, or SHIPPED")
    p.add_argument("--calibrate", type=Path, metavar="FOLDER", help="of a checkpoint, alone")
    a = p.parse_args()
    if a.calibrate:
        sure = round(calibrate(KalmLM.from_pretrained(a.calibrate), kalm.domain(a.domain)), 4)
        keep_threshold(a.calibrate, sure)
        return print(f"{a.calibrate}: sure {sure}")
    if not (a.mean and a.out):
        p.error("--mean and --out go together")
    lm = mean_of(a.mean)
    if a.out == "SHIPPED":
        ship(lm, kalm.domain(a.domain), reading_folder(a.domain))
    else:
        lm.save_pretrained(Path(a.out))


if __name__ == "__main__":
    main()
