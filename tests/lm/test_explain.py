"What the model says: cached equals uncached, questions are put as in training, and the round trip is the domain's."

import numpy as np
import pytest
import torch
from lively import lively_lm, made_up
from worlds import LineWords, line

import kalm.lm.explain as explain_module
from kalm.core.domain import Words
from kalm.core.goals import Goal
from kalm.core.rollouts import Rollouts
from kalm.lm.explain import (
    AGREES,
    CONTRADICTS,
    EVERYDAY,
    NOT_JUDGED,
    NOT_UNDERSTOOD,
    Answer,
    FilterScores,
    Meaning,
    calibrate,
    caption,
    explain,
    meaning,
    meaning_prompt,
    round_trip,
    story,
)
from kalm.lm.model import ACTION, STATE, TEXT, KalmLM
from kalm.lm.sequences import Sequence, Writer

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def domain():
    return line()


@pytest.fixture
def lively(domain, cache):
    return lively_lm(domain)


# ---------------------------------------------------------------- cached and plain, together and alone


@pytest.fixture
def talkative(lively, monkeypatch):
    "A model that ends some of its sentences early: the end token is raised to about the level of the best."
    plain, eos, lift = KalmLM.text_logits, lively.tokenizer.eos_token_id, [0.0]

    def text_logits(self, h, states=None):
        z = plain(self, h, states)
        z[..., eos] += lift[0]
        return z

    monkeypatch.setattr(KalmLM, "text_logits", text_logits)
    return lively, lift


def test_explanations_cached_batched_and_alone_agree(talkative, domain):
    lm, lift = talkative
    r = made_up(domain, 10, steps=5, least=0)
    for lift[0] in (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2):  # until some rows end early and others do not
        texts = explain(lm, r, max_tokens=7)
        if 1 < len(set(map(len, texts))) and len(set(texts)) > 2:
            break
    else:
        pytest.fail("no sentence ended early: the test compares nothing")
    for how in (dict(cached=False), dict(batch_size=1), dict(batch_size=4)):
        assert explain(lm, r, max_tokens=7, **how) == texts


@pytest.mark.parametrize("continuous", [False, True])
def test_explanations_stay_with_their_rollouts(continuous):
    domain = line(continuous)
    lm, r, order = lively_lm(domain), made_up(domain, 9, steps=6), np.array([4, 0, 8, 2])
    texts = explain(lm, r, max_tokens=5)
    assert explain(lm, r[order], max_tokens=5) == [texts[i] for i in order] and len(set(texts)) > 2


def test_explanations_know_limits(lively, domain, monkeypatch):
    r = made_up(domain, 5)
    assert explain(lively, r[:0]) == [] and caption(lively, r[:0]) == [] and meaning(lively, []) == []
    monkeypatch.setattr(lively.tokenizer, "decode", lambda ids: str(len(ids)))
    assert max(map(int, explain(lively, r, max_tokens=4))) == 4 and max(map(int, explain(lively, r, max_tokens=1))) == 1


def test_captions_are_of_the_last_step(lively, domain):
    r = made_up(domain, 6, steps=5, least=2)
    last = Rollouts(np.stack([one.states[-2:] for one in r]), np.stack([one.actions[-1:] for one in r]))
    said = caption(lively, r, max_tokens=5)
    assert said == caption(lively, last, max_tokens=5, batch_size=2) == caption(lively, r, max_tokens=5, cached=False)
    assert len(set(said)) > 1


def test_meanings_cached_batched_and_alone_agree(lively):
    texts = ["Walk to the right end.", "Please go left.", "Red!", "Blue?"]
    said = meaning(lively, texts, max_tokens=6)
    assert len({m.words for m in said}) > 2
    for how in (dict(cached=False), dict(batch_size=1), dict(batch_size=3)):
        again = meaning(lively, texts, max_tokens=6, **how)
        assert [m.words for m in again] == [m.words for m in said]
        np.testing.assert_allclose([m.sure for m in again], [m.sure for m in said], rtol=1e-3)
    assert meaning(lively, texts[1:2], max_tokens=6)[0].words == said[1].words


# ---------------------------------------------------------------- how sure


def test_how_sure_the_model_is(lively):
    "The geometric mean of the probabilities of the key words, computed by one plain pass over all of it."
    text = "Please go left."
    writer, (said,) = Writer(lively), meaning(lively, ["Please go left."], max_tokens=4)
    prompt = [e.id for e in meaning_prompt(writer, text)]
    ids = torch.tensor([prompt])
    log_p = []
    with torch.no_grad(), lively.merged():
        for _ in range(4):
            h = lively(torch.full_like(ids, TEXT), ids, torch.zeros(*ids.shape, 2))[:, -1]
            p, best = lively.text_logits(h).log_softmax(-1).max(-1)
            if int(best) == lively.tokenizer.eos_token_id:
                break
            log_p.append(float(p))
            ids = torch.cat([ids, best[:, None]], 1)
    assert said.sure == pytest.approx(np.exp(np.mean(log_p)), rel=1e-3)
    assert said.words == lively.tokenizer.decode(ids[0, len(prompt) :]).strip()


def test_below_the_threshold_a_sentence_is_not_understood(lively):
    texts = ["Walk to the right end.", "Please go left."]
    said = meaning(lively, texts, max_tokens=4)
    between = sum(m.sure for m in said) / 2
    strict = meaning(lively, texts, threshold=between, max_tokens=4)
    assert [m.sure for m in strict] == [m.sure for m in said]
    assert [m.words == NOT_UNDERSTOOD for m in strict] == [m.sure < between for m in said] and strict != said
    refused = {"threshold nan: expected": dict(threshold=float("nan")), "threshold 2": dict(threshold=2),
               "max_tokens 0: expected": dict(max_tokens=0)}
    for message, settings in refused.items():
        with pytest.raises(ValueError, match=message):
            meaning(lively, texts, **settings)


@pytest.mark.parametrize("novel, nonsense, expected", [
    ([("right", .7), ("left", .8)], ("", .9), 0),           # all is read correctly, and nonsense names no goal
    ([("left", .7), ("left", .8)], ("", .9), .8),           # the less sure reading is wrong
    ([("left", .7), ("right", .8)], ("", .9), 1),           # both are wrong, but taught sentences have to pass
    ([("right", .7), ("left", .8)], ("left", .6), .6)])     # nonsense is taken for a goal
def test_where_the_threshold_is_drawn(novel, nonsense, expected, lively, domain, monkeypatch):
    said = dict(zip([g.text for g in domain.goals("rephrase")], novel)) | dict.fromkeys(EVERYDAY, nonsense)
    taught = {g.text: ("right", .95) for g in domain.goals("offline")}
    monkeypatch.setattr(explain_module, "meaning", lambda lm, texts: [Meaning(*(said | taught)[t]) for t in texts])
    assert calibrate(lively, domain) == pytest.approx(min(expected, .95))


@pytest.mark.parametrize("texts, message", [("go left", r"give \[text\]"), (["go", "  "], "blank")])
def test_what_is_no_list_of_sentences(texts, message, lively):
    with pytest.raises(ValueError, match=message):
        meaning(lively, texts)


# ---------------------------------------------------------------- questions are put as in training


def as_read(tokens) -> list[tuple]:
    "What a sequence of grounding holds up to where its first word is asked for."
    at = next(i for i, t in enumerate(tokens) if t.ask == 1)
    own = [t for t in tokens[: at + 1] if t.branch in (0, tokens[at].branch)]
    return [(t.kind, t.ids, None if t.kind == TEXT else t.state.tolist()) for t in own]


@pytest.fixture
def heard(monkeypatch):
    "What the model would be told, instead of asking it."
    got = []

    def run(self, *args):
        got.append((self.prompts, self.states))
        return [Answer("", 0.0)] * len(self.prompts)

    monkeypatch.setattr(explain_module.Speaking, "run", run)
    return got


def test_questions_are_put_as_in_training(lively, domain, heard):
    from kalm.lm.settings import GroundConfig
    from kalm.lm.tasks import Caption, Explain, Generate, Material

    r = made_up(domain, 1, steps=3)
    explain(lively, r)
    caption(lively, r)
    meaning(lively, [r.texts[0]])
    told = [
        [(e.kind, e.id, None if e.state is None else np.asarray(e.state).tolist()) for e in prompts[0]]
        for prompts, _ in heard
    ]
    material = Material(Writer(lively), r, LineWords(), GroundConfig(), [])
    assert told[0] == as_read(Explain(material).write(np.array([[0, 0]])).tokens)
    assert told[1] == as_read(Caption(material).write(np.array([[0, 2]])).tokens)
    assert told[2] == as_read(Generate(material).write(np.array([[0, 0]])).tokens)
    for _, states in heard[:2]:
        np.testing.assert_array_equal(states, r.last_states)
    assert heard[2][1] is None and isinstance(Sequence(), Sequence)


def test_another_prompt(lively, domain, heard):
    writer = Writer(lively)
    explain(lively, made_up(domain, 2), prompt=("One:", " two?"))
    ids = [e.id for e in heard[0][0][1] if e.kind == TEXT]
    assert ids == writer.ids("One:") + writer.ids(" two?")


def test_prompts_begin_as_the_model_expects(lively, domain):
    lively.begin = [1]
    writer, r = Writer(lively), made_up(domain, 1)
    assert meaning_prompt(writer, "Go.")[0].id == 1 == story(writer, r[0], ([5], [6]))[0].id
    kinds = [e.kind for e in story(writer, r[0], ([5], [6]))]
    assert kinds == [TEXT, TEXT] + [STATE, ACTION] * len(r[0]) + [STATE, TEXT]


# ---------------------------------------------------------------- key words and sentences


class Parrot:
    "A decoder of a model that says what it was taught to say of the first action in a story."

    told: list[int] = []

    def __init__(self, lm, slots):
        self.slots, self.held = slots, [None] * slots

    def _answer(self, slots):
        return torch.tensor([self.held[b] for b in slots], dtype=torch.float32)

    def read(self, slots, prompts):
        for b, prompt in zip(slots, prompts):
            self.held[b] = [next(e.id for e in prompt if e.kind == ACTION), 0]
        return self._answer(slots)

    def push(self, slots, kind, ids=None):
        Parrot.told += list(ids)
        for b in slots:
            self.held[b][1] += 1
        return self._answer(slots)

    def shrink(self, slots):
        self.held, self.slots = [self.held[b] for b in slots], len(slots)
        return np.arange(len(slots))


LINES = [
    "red blue left -> Move the red ball.",
    "No arrow here.",
    "a b left -> c d left -> Twice.",
    "-> Only a sentence.",
    "red blue left ->",
]


@pytest.fixture
def parrot(lively, monkeypatch):
    "(model, rollouts): the k-th is told of in the words of `LINES[k]`."
    end = lively.tokenizer.eos_token_id
    ids = [lively.tokenizer(t, add_special_tokens=False).input_ids + [end] for t in LINES]

    def text_logits(self, h, states=None):
        words = torch.tensor([ids[int(a)][int(n)] for a, n in h])
        return 20.0 * torch.nn.functional.one_hot(words, 300)

    monkeypatch.setattr(explain_module, "CachedDecoder", Parrot)
    monkeypatch.setattr(KalmLM, "text_logits", text_logits)
    Parrot.told = []
    return lively, Rollouts(np.zeros((5, 2, 2)), np.arange(5)[:, None])


@pytest.mark.parametrize("size", [1, 3, 128])
def test_key_words_are_no_part_of_the_sentence(size, parrot):
    said = explain(*parrot, max_tokens=99, batch_size=size)
    assert said == ["Move the red ball.", "No arrow here.", "Twice.", "Only a sentence.", ""]


@pytest.mark.parametrize("size", [1, 3, 128])
def test_short_explanations_are_the_key_words(size, parrot):
    said = explain(*parrot, max_tokens=99, batch_size=size, short=True)
    assert said == ["red blue left", "No arrow here.", "a b left", "", "red blue left"]


def test_short_explanations_stop_at_the_arrow(parrot):
    explain(parrot[0], parrot[1][:1], max_tokens=99, short=True)
    assert len(Parrot.told) <= len("red blue left ->")


# ---------------------------------------------------------------- the round trip


class Checked(Words):
    "Words that check goals as their kind says."

    def checked_by(self, goal):
        return goal.kind

    def read(self, text):
        return text.split()[-1]

    def agree(self, meant, said):
        return meant == said


def test_the_round_trip_by_hand(monkeypatch):
    "Captions are compared with the words of the sentence, explanations with what the model takes it to mean."
    cases = [  # kind, last word of the sentence, what is said, what the goal is taken to mean, steps, verdict
        ("caption", "left", "left", None, 1, AGREES),
        ("caption", "left", "right", None, 1, CONTRADICTS),
        ("caption", "left", None, None, 0, CONTRADICTS),
        ("explanation", "b", "b", "b", 2, AGREES),
        ("explanation", "c", "d", "d", 3, AGREES),
        ("explanation", "e", "e", "f", 1, CONTRADICTS),
        ("explanation", "g", None, "g", 0, CONTRADICTS),
        ("", "h", None, None, 2, NOT_JUDGED),  # a third answer: what cannot be checked is not said to agree
        ("", "i", None, None, 0, CONTRADICTS),
    ]
    goals = [Goal(f"{k} {c[1]}", kind=c[0]) for k, c in enumerate(cases)]
    lengths, n, calls = np.array([c[4] for c in cases]), len(cases), []
    r = Rollouts(np.zeros((n, 4, 2)), np.zeros((n, 3), int), lengths=lengths, goal=np.arange(n), goals=goals)

    def ask(name):
        def answer(lm, rollouts, batch_size, **kw):
            calls.append((name, rollouts.goal.tolist(), kw))
            return [cases[i][2] for i in rollouts.goal]

        return answer

    def taken(lm, texts, batch_size):
        calls.append(("meaning", list(texts), {}))
        return [Meaning(cases[int(t.split()[0])][3], 1.0) for t in texts]

    monkeypatch.setattr(explain_module, "caption", ask("caption"))
    monkeypatch.setattr(explain_module, "explain", ask("explain"))
    monkeypatch.setattr(explain_module, "meaning", taken)
    ok, said = round_trip(object(), r, Checked())
    assert ok.tolist() == [c[5] for c in cases] and said == [c[2] or "" for c in cases]
    assert calls == [
        ("caption", [0, 1], {}),
        ("explain", [3, 4, 5], dict(short=True)),
        ("meaning", [goals[i].text for i in (3, 4, 5)], {}),
    ]
    calls.clear()
    ok, said = round_trip(object(), r[[7, 8]], Checked())
    assert ok.tolist() == [NOT_JUDGED, CONTRADICTS] and said == ["", ""] and not calls  # nothing to ask
    ok, said = round_trip(object(), r[:0], Checked())
    assert ok.shape == (0,) and said == []


def test_the_round_trip_of_a_model(lively, domain):
    r = made_up(domain, 6, steps=2)
    ok, said = round_trip(lively, r, LineWords(), batch_size=2)
    assert said == explain(lively, r, short=True)
    texts = meaning(lively, r.texts)
    assert ok.tolist() == [LineWords().agree(m.words, s) for m, s in zip(texts, said)]


def test_a_rollout_without_a_goal_cannot_be_checked(lively):
    with pytest.raises(ValueError, match="without a goal"):
        round_trip(lively, Rollouts(np.zeros((1, 2, 2)), np.zeros((1, 1), int)), LineWords())


def test_filter_scores_by_hand():
    keep, good = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool), np.array([1, 1, 0, 1, 1, 0, 0, 0], bool)
    assert FilterScores.of(keep, good) == FilterScores(kept=3 / 8, precision=2 / 3, recall=1 / 2, base=1 / 2)
    none = FilterScores.of(~keep & keep, good)
    assert (none.kept, none.recall, none.base) == (0, 0, 0.5) and np.isnan(none.precision)
    assert np.isnan(FilterScores.of(keep, good & ~good).recall) and np.isnan(FilterScores.of(keep[:0], good[:0]).base)
