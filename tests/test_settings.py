"Every object of settings refuses nonsense where it is made: one way of checking, in all of them."

from dataclasses import fields, replace

import pytest

from kalm.core.episodes import CollectOptions
from kalm.lm.backbone import Adapter
from kalm.lm.generate import Imagination
from kalm.lm.settings import GroundConfig, TaskWeights
from kalm.rl.bc import BC
from kalm.rl.cql import CQL
from kalm.rl.td3bc import TD3BC
from kalm.rl.train import Every
from kalm.run.presets import CLEVR, Imagined, Mixing, Training

SETTINGS = [CollectOptions(), Adapter(), Imagination(), GroundConfig(), TaskWeights(), BC(), CQL(), TD3BC(), Every()]
SETTINGS += [Training(BC(), 5), Imagined(4), Mixing(), CLEVR["smoke"]]
WRONG = {
    "int": (-1, 2.5, float("nan"), float("inf"), "3", True),
    "float": (-1.0, float("nan"), float("inf"), "3", True),
    "bool": (1, "False", None),
}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: type(s).__name__)
def test_nonsense_is_refused_where_settings_are_made(settings):
    asked = [(f.name, str(f.type).removesuffix("| None").strip(), str(f.type)) for f in fields(settings)]
    numbers = [(name, kind, whole) for name, kind, whole in asked if kind in WRONG]
    assert numbers
    for name, kind, whole in numbers:
        for value in WRONG[kind]:
            if value is None and whole.endswith("None"):
                continue
            with pytest.raises(ValueError, match=f"{name} .*expected"):
                replace(settings, **{name: value})


@pytest.mark.parametrize("change", [dict(discount=1.1), dict(tau=2.0)])
def test_shares_are_at_most_one(change):
    for algorithm in (CQL(), TD3BC()):
        with pytest.raises(ValueError, match="0 to 1"):
            replace(algorithm, **change)
    with pytest.raises(ValueError, match="top_p 1.5"):
        Imagination(top_p=1.5)
