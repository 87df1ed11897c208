"What policies are told of a goal: a run from grounding to a policy that acts on a sentence nobody prepared it for."

from dataclasses import replace

import numpy as np
import pytest
from worlds import discrete_line

import kalm
from kalm.core.results import read_results
from kalm.lm.reading import GoalEncoder, Reader
from kalm.rl.encoder import Retold
from kalm.run.command import STAGES, run_stages
from kalm.run.folder import Run
from kalm.run.presets import Mixing, preset

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("goals", ["doubt", "vector"])
def test_policies_learn_from_what_the_model_takes_sentences_to_mean(goals, tmp_path, monkeypatch):
    monkeypatch.setattr("kalm.run.workers.os.cpu_count", lambda: 1)
    line = discrete_line()
    smoke = preset(line, "smoke")
    run = Run(replace(smoke, mixing=replace(smoke.mixing, goals=goals)), line, tmp_path / "run", quiet=True)
    assert run_stages(run, list(STAGES)[:-1])
    assert {r["method"] for r in read_results(run.out / "results.csv")} >= {"bc", "bc+kalm", "random"}

    (tmp_path / "run").rename(tmp_path / "moved")   # the model moves with it
    policy = kalm.load_policy(next((tmp_path / "moved" / "policies" / "bc+kalm-rephrase-0").glob("step-*")))
    new = "Off to the far side with you."
    states = line.start(line.goals("offline"), np.zeros(2, int), np.arange(2)).states
    assert policy.act(states, [new] * 2).shape == (2,)
    if goals == "vector":
        reads = GoalEncoder(folder=tmp_path / "moved" / "grounded", domain=line.name)
    else:
        reads = Retold(Reader(line.name, tmp_path / "moved" / "grounded", samples=8))
    assert policy.encoder.spec() == reads.spec()
    np.testing.assert_allclose(policy.encoder.encode([new]), reads.encode([new]), atol=1e-5)


def test_what_policies_can_be_told_is_named():
    with pytest.raises(ValueError, match="'words': expected one of sentence, meaning, doubt, both, vector"):
        Mixing(goals="words")
