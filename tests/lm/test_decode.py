"Decoding: the cache gives the plain way's answers on every architecture, and every row is served to its end."

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, tiny_backbone
from lively import lively_lm
from worlds import line

from kalm.core.actions import ContinuousActions, DiscreteActions
from kalm.core.files import numpy_rng
from kalm.lm.decode import (
    CachedDecoder,
    Element,
    SlotScheduler,
    UncachedDecoder,
    as_tensors,
    step_elements,
    text_elements,
)
from kalm.lm.model import ACTION, PAD, STATE, TEXT, KalmLM

pytestmark = pytest.mark.usefixtures("cache")


def prompt_of(lm, rng, words: int, steps: int) -> list[Element]:
    "Text, then states and actions, then a state."
    width = lm.state_dim
    out = text_elements(rng.integers(3, 60, words))
    for action in lm.codec.sample(rng, steps):
        out += step_elements(rng.uniform(-1, 1, width).astype(np.float32), action)
    return out + [Element(STATE, state=rng.uniform(-1, 1, width).astype(np.float32))]


def same_answers(lm, tolerance: float = 2e-4) -> None:
    "Read, push, read anew in a used slot, shrink: both decoders side by side, sequences longer than any window."
    rng, width = numpy_rng(0, "decode"), lm.state_dim
    decoders = [CachedDecoder(lm, 4), UncachedDecoder(lm, 4)]

    def both(act):
        a, b = (act(d) for d in decoders)
        np.testing.assert_allclose(a.float().numpy(), b.float().numpy(), atol=tolerance, rtol=1e-3)
        return a

    def push(slots, kind):
        columns = dict(ids=rng.integers(3, 60, len(slots))) if kind == TEXT else {}
        if kind != TEXT:
            columns["states"] = rng.uniform(-1, 1, (len(slots), width)).astype(np.float32)
        if kind == ACTION:
            columns["actions" if lm.codec.shape else "ids"] = lm.codec.sample(rng, len(slots))
        return both(lambda d: d.push(slots, kind, **columns))

    with torch.no_grad(), lm.merged():
        prompts = [prompt_of(lm, rng, 3 + 5 * k, k) for k in range(4)]
        first = both(lambda d: d.read(np.arange(4), prompts))
        assert len(np.unique(first.float().numpy().round(3), axis=0)) == 4
        for kind in (ACTION, STATE, TEXT):
            push(np.arange(4), kind)
        push(np.array([1, 3]), TEXT)  # some slots grow, others wait
        again = [prompt_of(lm, rng, 2, 1), prompt_of(lm, rng, 30, 2)]
        both(lambda d: d.read(np.array([2, 0]), again))  # used slots begin anew
        push(np.array([0, 2, 3]), ACTION)
        kept = np.array([0, 3])
        assert [d.shrink(kept).tolist() for d in decoders] == [[0, 1]] * 2
        for kind in (STATE, ACTION, STATE):
            push(np.arange(2), kind)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cached_equals_uncached_on_every_architecture(name, tmp_path):
    lm = KalmLM.from_pretrained(tiny_backbone(name, tmp_path), state_dim=2, codec=DiscreteActions(3), hidden=16)
    same_answers(lm)


@pytest.mark.parametrize("continuous", [False, True])
def test_cached_equals_uncached_with_an_adapter(continuous):
    same_answers(lively_lm(line(continuous)))


def test_elements_become_tensors():
    s, a = np.ones(2, np.float32), np.array([0.5], np.float32)
    discrete = SimpleNamespace(state_dim=2, codec=DiscreteActions(3), device="cpu")
    out = as_tensors(discrete, [text_elements([5, 6]) + step_elements(s, 2), [Element(STATE, state=2 * s)]])
    assert out["kind"].tolist() == [[TEXT, TEXT, STATE, ACTION], [STATE, PAD, PAD, PAD]]
    assert out["ids"].tolist() == [[5, 6, 0, 2], [0, 0, 0, 0]] and set(out) == {"kind", "ids", "states"}
    assert out["states"][0].sum(1).tolist() == [0, 0, 2, 2] and out["states"][1, 0].tolist() == [2, 2]
    continuous = SimpleNamespace(state_dim=2, codec=ContinuousActions((-1,), (1,)), device="cpu")
    out = as_tensors(continuous, [step_elements(s, a)])
    assert out["actions"].tolist() == [[[0], [0.5]]] and out["ids"].tolist() == [[0, 0]]


# ---------------------------------------------------------------- who sits where


class Ledger:
    "A decoder that keeps what every slot holds, and answers with the first thing read and how many there are."

    def __init__(self, slots):
        self.slots, self.held = slots, [None] * slots

    def _answer(self, slots):
        return torch.tensor([[float(self.held[b][0]), len(self.held[b])] for b in slots])

    def read(self, slots, prompts):
        for b, prompt in zip(slots, prompts, strict=True):
            self.held[b] = list(prompt)
        return self._answer(slots)

    def push(self, slots, kind, ids=None, states=None):
        for b, i in zip(slots, ids, strict=True):
            self.held[b].append(i)
        return self._answer(slots)

    def shrink(self, slots):
        self.held, self.slots = [self.held[b] for b in slots], len(slots)
        return np.arange(len(slots))


@pytest.mark.parametrize("slots, enough", [(1, 8), (3, 1), (4, 2), (5, 8), (16, 4), (40, 8)])
def test_every_row_is_served_to_its_end_whoever_leaves(slots, enough):
    life, done = numpy_rng(0, "scheduler").integers(0, 9, 23), np.zeros(23, int)
    work, busy, seen = SlotScheduler(Ledger(slots), range(23)), [], []
    while work:
        waiting, free = len(work.queue), len(work.free)
        work.admit(lambda r: [r] * (1 + r % 3), enough)
        came = waiting - len(work.queue)
        assert came == (min(waiting, free) if free * enough >= slots else 0)
        seen += work.rows[done[work.rows] == 0].tolist()
        busy.append(len(work.rows))
        assert work.h.tolist() == [[r, 1 + r % 3 + done[r]] for r in work.rows]
        assert (np.diff(work.slots) > 0).all() and len(work.slots) == len(work.rows) <= slots
        assert all(set(work.decoder.held[b]) == {r} for b, r in zip(work.slots, work.rows))
        work.leave(done[work.rows] >= life[work.rows])
        if len(work.rows):
            done[work.rows] += 1
            last = not work.queue
            assert work.push(TEXT, ids=work.rows) is work.h
            if last:  # no pass is wider than what is left
                assert work.decoder.slots == len(work.rows) and work.slots.tolist() == list(range(len(work.rows)))
    assert (done == life).all() and max(busy) == min(slots, 23) and set(seen) == set(range(23)) and not work
