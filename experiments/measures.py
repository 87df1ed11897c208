"What the experiments measure of a grounded model, as parts of rows. All are shares from 0 to 1, but errors (metres)."

from dataclasses import asdict

import numpy as np
import torch

from kalm.clevr.goals import action_success
from kalm.clevr.words import score_explanations
from kalm.core.domain import Domain, judge_success
from kalm.core.episodes import collect
from kalm.core.files import numpy_rng
from kalm.core.rollouts import Rollouts
from kalm.lm.explain import CONTRADICTS, FilterScores, caption, explain, meaning, round_trip
from kalm.lm.imagine import imagine
from kalm.lm.model import ACTION, PAD, STATE, TEXT, KalmLM
from kalm.lm.quality import distances, matches, perplexity, quality, repair_unreal
from kalm.lm.sequences import Writer

UNSEEN_PROMPT = ("These are the moves of a player:", " Say what the player wanted:")  # never used in grounding


def mean(x) -> float:
    "NaN where there is nothing."
    return float(np.mean(x)) if len(x) else float("nan")


def right_pushes(r: Rollouts) -> float | str:
    "Share of first actions that push the right ball a right way; empty unless all goals are single pushes."
    if not len(r) or any(g.task["type"] != "push" for g in r.goals):
        return ""
    return mean(action_success(r.goals, r.goal, r.actions[:, :1])[:, 0])


def at_the_end(r: Rollouts, d: Domain) -> np.ndarray:  # (B,) bool
    "Whether the goal holds when all actions were carried out, without stopping in time."
    real = d.start(r.goals, r.goal, r.seed)
    start = real.states.copy()
    for t in range(r.max_steps):
        rows = np.flatnonzero(t < r.lengths)
        real.step(rows, r.actions[rows, t])
    return judge_success(d, r.goals, r.goal, real.states, start)


def of_imagination(lm: KalmLM, d: Domain, level: str, n: int, seed: int, max_steps: int) -> tuple[Rollouts, dict]:
    "Imagined rollouts of a level, and what they are worth."
    r = imagine(lm, d, d.goals(level), n, seed=seed, max_steps=max_steps)
    return r, asdict(quality(r, d)) | dict(action_match=right_pushes(r))


def brief(lm: KalmLM, d: Domain, n: int, max_steps: int, seed: int = 1) -> dict:
    "The measures that are followed through training, on every level, and those of words."
    row = {}
    for level in d.levels:
        _, q = of_imagination(lm, d, level, n, seed, max_steps)
        row |= {f"{level}_{k}": q[k] for k in ("match", "replay", "step_error", "off_limits")}
        if level == "easy":
            row["easy_action_match"] = q["action_match"]
    return row | of_words(lm, d, n, seed) | dict(perplexity=perplexity(lm))


def of_filter(lm: KalmLM, d: Domain, level: str, n: int, seed: int, max_steps: int, tries: int) -> dict:
    "Rollouts that the model itself ends: what the round trip keeps of them, and what a goal gets within some tries."
    kw = dict(seed=seed, max_steps=max_steps, stop="done")
    done = imagine(lm, d, d.goals(level), n, **kw)
    good = dict(match=matches(done, d), replay=at_the_end(done, d))
    passed = round_trip(lm, done, d.words)[0] != CONTRADICTS
    row = {f"done_{k}": mean(g) for k, g in good.items()}
    for name, g in good.items():
        row |= {f"filter_{name}_{k}": v for k, v in asdict(FilterScores.of(passed, g)).items()}
    kept = imagine(lm, d, d.goals(level), n, filter="round_trip", tries=tries, **kw)
    return row | dict(filtered=len(kept) / n, filtered_match=mean(matches(kept, d)),
                      filtered_replay=mean(at_the_end(kept, d)), filtered_action_match=right_pushes(kept))


def of_parts(lm: KalmLM, d: Domain, level: str, n: int, seed: int, max_steps: int) -> tuple[Rollouts, dict]:
    "Rollouts imagined one part of a goal after the other, and those that do so without a look at the goal's test."
    kw = dict(seed=seed, max_steps=max_steps, parts=True)
    looked, blind = (imagine(lm, d, d.goals(level), n, stop=stop, **kw) for stop in (None, "done"))
    return looked, dict(parts_match=mean(matches(looked, d)), parts_replay=quality(looked, d).replay,
                        parts_done_match=mean(matches(blind, d)), parts_done_replay=mean(at_the_end(blind, d)))


def repaired(r: Rollouts, d: Domain) -> float:
    "Match once unreal steps were made possible."
    return mean(matches(repair_unreal(r, d)[0], d))


def of_words(lm: KalmLM, d: Domain, n: int, seed: int) -> dict:
    "How well real rollouts are explained, sentences understood, single steps captioned."
    taught, new = d.goals(d.levels[0]), d.goals("rephrase")
    real, row = collect(d, taught, n, seed=10_000 + seed, progress=False), {}
    for name, prompt in (("seen", None), ("unseen", UNSEEN_PROMPT)):
        scores = score_explanations(explain(lm, real, prompt=prompt), real, taught)
        row |= {f"explained_{name}_{k}": mean(v) for k, v in vars(scores).items()}
    said = meaning(lm, [g.text for g in new])
    row["understood"] = mean([d.words.agree(d.words.meaning(g), m.words) for g, m in zip(new, said)])
    return row | of_captions(lm, d, real, n, seed)


def of_captions(lm: KalmLM, d: Domain, real: Rollouts, n: int, seed: int) -> dict:
    "Share of single steps that are captioned rightly, of all and of those in which something moved."
    steps = real.transitions()
    pick = numpy_rng(seed, "captions").choice(len(steps["states"]), n, replace=False)
    before, after, actions = (steps[k][pick] for k in ("states", "next_states", "actions"))
    one = Rollouts(np.stack([before, after], 1), actions[:, None], goals=real.goals, codec=real.codec, domain=d.name)
    right = [d.words.caption(*pair) for pair in zip(before, after)]
    same = np.array([a == b for a, b in zip(caption(lm, one), right)])
    return dict(described=mean(same), described_moving=mean(same[[b != "nothing" for b in right]]))


def of_levels(lm: KalmLM, d: Domain, n: int, seed: int = 1) -> dict:
    "What imagined rollouts are worth, level by level, in a world that has no pushes and cannot be set to a state."
    row = {}
    for level in d.levels:
        if level not in getattr(d, "judged_only", ()):
            q = asdict(quality(imagine(lm, d, d.goals(level), n, seed=seed), d))
            row |= {f"{level}_{k}": q[k] for k in ("match", "replay", "off_limits", "too_fast", "length")}
    return row


@torch.no_grad()
def of_steps(lm: KalmLM, d: Domain, real: Rollouts, batch_size: int = 16) -> dict:
    "Errors of the next state, part by part of the domain's limits, and of the next action, after what really happened."
    with lm.merged():
        read = [_next_steps(lm, real[k:k + batch_size]) for k in range(0, len(real), batch_size)]
    before, after, said, wrong = (np.concatenate(x) for x in zip(*read))
    off, still = distances(said, after, d.limits), distances(before, after, d.limits)
    row = {f"step_error_{i}": float(e) for i, e in enumerate(off.mean(0))}
    row |= {f"still_error_{i}": float(e) for i, e in enumerate(still.mean(0))}
    return row | dict(action_error=float(wrong.mean()))


def _next_steps(lm: KalmLM, real: Rollouts) -> tuple[np.ndarray, ...]:
    "Rollouts read behind their goals: of each step the states before and after, the one foretold, the action's error."
    writer, n = Writer(lm), len(real)
    said = [writer.start("generate", real.goals[i].text) for i in real.goal]
    first, steps = np.array([len(ids) for ids in said]), real.max_steps
    width = int(first.max()) + 2 * steps + 1
    kind, ids = np.full((n, width), PAD), np.zeros((n, width), np.int64)
    states, actions = np.zeros((n, width, lm.state_dim), np.float32), np.zeros((n, width, *lm.codec.shape), np.float32)
    for b, r in enumerate(real):
        t, k = len(r), first[b]
        kind[b, :k], ids[b, :k] = TEXT, said[b]
        kind[b, k:k + 2 * t:2], kind[b, k + 1:k + 2 * t:2] = STATE, ACTION
        states[b, k:k + 2 * t:2] = states[b, k + 1:k + 2 * t:2] = r.states[:t]
        actions[b, k + 1:k + 2 * t:2] = r.actions[:t]
    tensors = [torch.from_numpy(x).to(lm.device) for x in (kind, ids, states, actions)]
    h = lm(*tensors)
    is_state, is_action = tensors[0] == STATE, tensors[0] == ACTION
    before = tensors[2][is_action]
    after = lm.next_states(h[is_action], before).cpu().numpy()
    outputs = lm.action_outputs(h[is_state], tensors[2][is_state])
    chosen, _ = lm.maps.choose(outputs, lm.maps.no_draws(len(outputs)))
    t = real.transitions()
    return t["states"], t["next_states"], after, np.abs(chosen - t["actions"]).mean(1)
