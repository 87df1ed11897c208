"What each task shows and asks for, and how an epoch is planned."

import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from lively import made_up
from worlds import LineWords, line

from kalm.core.actions import DiscreteActions
from kalm.core.domain import Words, codec_of
from kalm.core.files import numpy_rng
from kalm.core.rollouts import Rollouts
from kalm.lm.examples import PASSAGE, Examples, Planned, collate, pack
from kalm.lm.model import ACTION, PAD, STATE, TEXT, Adapter, KalmLM
from kalm.lm.sequences import (
    ACT,
    ARROW,
    DONE,
    JUMP,
    MEANING,
    NOTHING,
    PROMPTS,
    STEP,
    WORD,
    Sequence,
    Writer,
    prompts_of,
)
from kalm.lm.settings import TASKS, GroundConfig, TaskWeights
from kalm.lm.tasks import compose, ordinary_text, passages

pytestmark = pytest.mark.usefixtures("cache")

GENERATE, DYNAMICS, EXPLAIN, CONSEQUENCE, CAPTION, QUESTION, READ, COMPOSE, SCENE = range(9)
EQUAL = TaskWeights(**{name: 1.0 for name in TASKS})
CONFIG = GroundConfig(
    backbone="tiny-random",
    adapter=Adapter(rank=2),
    steps=8,
    batch_tokens=400,
    bf16=False,
    task_weights=EQUAL,
    keyword_weight=3.0,
    unrewarded_weight=0.25,
)
CORPUS = ["The five boxing wizards jump quickly. " * 9, "too short to read", "Pack my box with five dozen jugs. " * 6]
MODELS = {}


def tiny(domain) -> KalmLM:
    "One model for all tests, which only read from it."
    if domain.codec not in MODELS:
        MODELS[domain.codec] = fresh(domain)
    return MODELS[domain.codec]


def fresh(domain) -> KalmLM:
    return KalmLM.from_pretrained(
        "tiny-random",
        state_dim=2,
        codec=codec_of(domain),
        features=domain.features,
        prompts=prompts_of(domain.words),
        domain=domain.name,
    )


def examples(domain, rollouts=None, words="own", lm=None, **change) -> Examples:
    rollouts = made_up(domain, 24, 5) if rollouts is None else rollouts
    words = domain.words if words == "own" else words
    return Examples(lm or tiny(domain), rollouts, words, replace(CONFIG, **change), corpus=CORPUS)


def written(ex: Examples, task: int, *rows) -> Sequence:
    return ex.write(Planned(task, np.array(rows)))


def column(q: Sequence, name: str) -> list:
    return [getattr(token, name) for token in q.tokens]


def said(ex: Examples, q: Sequence) -> list[str]:
    "What is asked for in words, answer by answer."
    answers = {}
    for token in q.tokens:
        if token.ask == WORD:
            answers.setdefault(token.branch, []).append(token.answer)
    return [ex.material.writer.tokenizer.decode(ids) for ids in answers.values()]


def read(ex: Examples, q: Sequence) -> str:
    "The words that are read, `#` for a state, `!` for an action."
    word = ex.material.writer.tokenizer.decode
    return "".join({TEXT: word([t.ids]), STATE: "#", ACTION: "!"}[t.kind] for t in q.tokens)


@pytest.fixture(params=[False, True], ids=["discrete", "continuous"])
def domain(request):
    return line(continuous=request.param)


# ---------------------------------------------------------------- one sequence of each task


@pytest.mark.parametrize("end", ["success", "failure", "truncated"])
def test_generate_asks_for_actions_changes_and_done_after_success_only(end, domain):
    rollouts = made_up(domain, 4, 3)
    flags = {name: np.full(4, name == end) for name in ("success", "failure", "truncated")}
    ex = examples(domain, replace(rollouts, **flags), meanings=False)
    q, rollout = written(ex, GENERATE, [0, 0]), rollouts[0]
    n = len(f"Goal: {rollout.goal.text} Rollout:")
    assert read(ex, q) == f"Goal: {rollout.goal.text} Rollout:#!#!#!#"
    assert column(q, "ask") == [NOTHING] * n + [ACT, STEP] * 3 + [DONE if end == "success" else NOTHING]
    assert column(q, "branch") == [0] * n + [1] * 7 and column(q, "position") == list(range(n + 7))
    weights = [1.0 if r > 0 else 0.25 for r in rollout.rewards]
    assert column(q, "weight")[n:] == [w for pair in zip(weights, [0.0] * 3) for w in pair] + [float(end == "success")]
    for t in range(3):
        state, action = q.tokens[n + 2 * t], q.tokens[n + 2 * t + 1]
        np.testing.assert_array_equal(state.state, rollout.states[t])
        np.testing.assert_array_equal(action.state, rollout.states[t])
        np.testing.assert_array_equal(action.target, rollout.states[t + 1] - rollout.states[t])
        if domain.codec.shape:
            np.testing.assert_array_equal(state.action, rollout.actions[t])
            np.testing.assert_array_equal(action.action, rollout.actions[t])
        else:
            assert state.answer == action.ids == rollout.actions[t] and state.action is action.action is None


def test_generate_asks_for_the_meaning_in_a_branch_of_its_own(domain):
    ex = examples(domain)
    q = written(ex, GENERATE, [0, 0], [4, 0])
    assert said(ex, q) == [" right</s>"] and max(column(q, "branch")) == 3
    assert [t.weight for t in q.tokens if t.ask == WORD] == [3.0] * len(" right") + [1.0]
    assert read(ex, q).endswith(MEANING + " right") and all(t.state is None for t in q.tokens if t.branch == 3)


def test_dynamics_asks_for_one_change_without_a_goal(domain):
    ex = examples(domain)
    q = written(ex, DYNAMICS, [0, 2])
    states = ex.material.rollouts.states[0]
    assert read(ex, q) == "What happens next?#!" and [a for a in column(q, "ask") if a] == [STEP]
    np.testing.assert_array_equal(q.tokens[-1].target, states[3] - states[2])


@pytest.mark.parametrize("row", [0, 3, 9])
@pytest.mark.parametrize("meanings", [True, False])
def test_explain_asks_for_key_words_the_sentence_and_its_end(meanings, row, domain):
    ex = examples(domain, meanings=meanings)
    q, rollout = written(ex, EXPLAIN, [row, 0]), ex.material.rollouts[row]
    before, after = PROMPTS["explain"][row % 8]
    side, n = rollout.goal.task["side"], len(rollout)
    answer = f" {side}{ARROW} {rollout.goal.text}" if meanings else f" {rollout.goal.text}"
    assert said(ex, q) == [answer + "</s>"] and read(ex, q) == before + "#!" * n + "#" + after + answer
    key = len(f" {side}") if meanings else 0
    assert [t.weight for t in q.tokens if t.ask == WORD] == [3.0] * key + [1.0] * (len(answer) + 1 - key)
    assert column(q, "ask").count(STEP) == n and ACT not in column(q, "ask")
    about = [t.state for t in q.tokens[len(before) :] if t.kind == TEXT]
    assert all(np.array_equal(state, rollout.states[-1]) for state in about)
    assert all(t.state is None for t in q.tokens[: len(before)])


def test_consequence_asks_for_the_whole_change_after_the_last_word(domain):
    ex = examples(domain)
    q, rollout = written(ex, CONSEQUENCE, [1, 0]), ex.material.rollouts[1]
    assert read(ex, q) == f"Goal: {rollout.goal.text} Start:# End:"
    assert [a for a in column(q, "ask") if a] == [JUMP] and q.tokens[-1].ask == JUMP
    np.testing.assert_array_equal(q.tokens[-1].target, rollout.states[-1] - rollout.states[0])
    np.testing.assert_array_equal(q.tokens[-1].state, rollout.states[0])


def test_caption_asks_what_happened_in_one_step(domain):
    ex = examples(domain)
    states = ex.material.rollouts.states[0]
    caption = LineWords().caption(states[1], states[2])
    q = written(ex, CAPTION, [0, 1])
    assert read(ex, q) == f"What happened?#!#: {caption}" and said(ex, q) == [f" {caption}</s>"]
    assert [t.weight for t in q.tokens if t.ask == WORD] == [3.0] * len(f" {caption}") + [1.0]


class Curious(LineWords):
    "Several questions, and nothing to say of some steps and states."

    def caption(self, state, next_state):
        return super().caption(state, next_state) if next_state[0] > 0 else ""

    def questions(self, state):
        return [(f"digit {k}", str(int(abs(state[0]) * 10**k) % 10)) for k in range(1, 6)] if state[0] > 0 else []


def test_questions_are_some_of_those_about_the_state_the_same_each_time(domain):
    ex = examples(domain, words=Curious(), branches=3)
    states = ex.material.rollouts.states
    i, t = np.argwhere(states[:, :3, 0] > 0.1)[0].tolist()
    q = written(ex, QUESTION, [i, t])
    pairs = ex.material.questions(i, t)
    assert len(pairs) == 3 and set(pairs) <= set(Curious().questions(states[i, t]))
    assert pairs == ex.material.questions(i, t)
    assert said(ex, q) == [f" {answer}" for _, answer in pairs] and max(column(q, "branch")) == 3
    before, after = PROMPTS["question"][i % 4]
    assert read(ex, q) == before + "#" + after + "".join(f" {question} {answer}"[:-1] for question, answer in pairs)
    other = examples(domain, words=Curious(), branches=3, seed=1)
    places = np.argwhere(states[:, :3, 0] > 0.1)
    assert any(ex.material.questions(i, t) != other.material.questions(i, t) for i, t in places)


def test_what_has_no_words_makes_no_example(domain):
    ex = examples(domain, words=Curious())
    states = ex.material.rollouts.states
    for planned in (p for batch in ex.plan(0) for p in batch):
        for i, t in planned.rows:
            if planned.task == CAPTION:
                assert states[i, t + 1, 0] > 0
            elif planned.task == QUESTION:
                assert states[i, t, 0] > 0


def test_text_asks_for_every_next_token(domain):
    ex = examples(domain)
    q = written(ex, READ, [6, 0])
    ids = ex.material.passages[6]
    assert column(q, "ids") == ids[:-1] and column(q, "answer") == ids[1:] and set(column(q, "weight")) == {1.0}
    assert len(ex.material.passages) == 8 and {len(p) for p in ex.material.passages} == {PASSAGE}


def test_composed_sentences_are_asked_for_all_meanings(domain):
    ex = examples(domain, compose=0.5)
    planned = [p for batch in ex.plan(0) for p in batch if p.task == COMPOSE]
    assert len(planned) == 12
    for p in planned:
        meanings = said(ex, ex.write(p))[0].removesuffix("</s>").strip().split("; ")
        assert len(meanings) in (2, 3) and set(meanings) <= {"left", "right"}
        assert set(column(ex.write(p), "kind")) == {TEXT}
    assert len({read(ex, ex.write(p)) for p in planned}) > 6


def test_the_models_first_tokens_lead_every_sequence(domain):
    lm = fresh(domain)
    lm.begin = [1, 5]
    bare, led = examples(domain, compose=0.2), examples(domain, compose=0.2, lm=lm)
    assert {p.task for batch in led.plan(0) for p in batch} == set(range(8))
    for p in (p for batch in led.plan(0) for p in batch):
        q = led.write(p)
        assert column(q, "ids")[:2] == [1, 5] and column(q, "ids")[2:] == column(bare.write(p), "ids")
        assert len(q) == led.tasks[p.task].length(p.rows)


def test_scenes_are_asked_for_their_meanings(domain):
    class Telling(LineWords):
        def scene(self, rng):
            side = ("left", "right")[rng.integers(2)]
            return f"Thing {rng.integers(1000)} is on the {side}.", side

    ex = examples(domain, words=Telling(), scenes=0.5)
    planned = [p for batch in ex.plan(0) for p in batch if p.task == SCENE]
    assert len(planned) == 12
    for p in planned:
        text, meaning = read(ex, ex.write(p)), said(ex, ex.write(p))[0].removesuffix("</s>").strip()
        assert f"on the {meaning}" in text and len(ex.write(p)) == ex.tasks[SCENE].length(p.rows)
    assert len({read(ex, ex.write(p)) for p in planned}) > 6


# ---------------------------------------------------------------- prompts, words and text


def test_a_domains_wordings_stand_in_for_the_general_ones():
    class Own(Words):
        prompts = {"caption": (("Now?", " So:"),)}

    got = prompts_of(Own())
    assert got["caption"] == [["Now?", " So:"]] and got["explain"] == [list(pair) for pair in PROMPTS["explain"]]
    assert prompts_of(None) == prompts_of(Words()) and set(got) == set(TASKS) - {"text"}


@pytest.mark.parametrize(
    "prompts, message",
    [
        ({"sing": (("a", "b"),)}, "prompts for sing"),
        ({"caption": ()}, "pairs"),
        ({"caption": (("a",),)}, "pairs"),
        ({"caption": (("a", 1),)}, "pairs"),
        ({"generate": (("Do it", ""),)}, "{goal}"),
        ({"caption": (("{goal}", ""),)}, "{goal}"),
    ],
    ids=str,
)
def test_wordings_that_do_not_fit_are_refused(prompts, message):
    class Own(Words):
        pass

    Own.prompts = prompts
    with pytest.raises(ValueError, match=message):
        prompts_of(Own())


def test_braces_in_a_sentence_are_just_braces(domain):
    writer = Writer(tiny(domain))
    ids = writer.prompt("generate", 0, "Go to {x} or {goal}.")
    assert writer.tokenizer.decode(ids) == "Goal: Go to {x} or {goal}. Rollout:"


@pytest.mark.parametrize("words", [None, Words()], ids=["none", "empty"])
def test_without_words_their_tasks_weigh_nothing_and_the_log_says_so(words, domain, caplog):
    with caplog.at_level(logging.WARNING):
        ex = examples(domain, words=words, compose=0.5, scenes=0.5)
    missing = [record.message for record in caplog.records]
    assert [m.split(":")[0].split()[-1] for m in missing] == ["caption", "question", "compose", "scene"]
    tasks = {p.task for batch in ex.plan(0) for p in batch}
    assert tasks == {GENERATE, DYNAMICS, EXPLAIN, CONSEQUENCE, READ}
    assert not any(MEANING in read(ex, ex.write(p)) for batch in ex.plan(0) for p in batch)


def test_no_example_at_all_is_an_error(domain):
    only = replace(EQUAL, **{name: 0.0 for name in TASKS if name != "caption"})
    with pytest.raises(ValueError, match="no task has examples"):
        examples(domain, words=None, task_weights=only)


def test_leaving_words_out_changes_no_other_task(domain):
    whole, part = examples(domain), examples(domain, words=None)

    def rows(ex, task):
        return sorted(p.rows.tolist() for batch in ex.plan(0) for p in batch if p.task == task)

    for task in (GENERATE, DYNAMICS, EXPLAIN, CONSEQUENCE, READ):
        assert rows(whole, task) == rows(part, task)


def test_passages_by_hand(domain):
    writer = Writer(tiny(domain))
    ids = writer.ids("abcdefgh")
    got = passages(writer, ["abcdefgh", "abc", "", "abcdefg"], 3)
    assert got == [ids[:3], ids[3:6], ids[:3], ids[:3], ids[3:6]] and passages(writer, ["ab"], 3) == []


def test_nothing_to_read(domain):
    with pytest.raises(ValueError, match="no text of at least 64 tokens"):
        Examples(tiny(domain), made_up(domain, 4), None, CONFIG, corpus=["short"])


def test_pages_held_out_are_not_learnt():
    learn, held = ordinary_text(), ordinary_text(held_out=True)
    assert min(len(learn), len(held)) > 20 and all(t.strip() for t in learn + held)
    paragraphs = [{p for page in pages for p in page.split("\n\n")} for pages in (learn, held)]
    assert not paragraphs[0] & paragraphs[1]


ASKED = ["Put the red ball behind the blue one.", "Put the green ball to the left of the cyan one.", "Could you hurry?"]


def test_composed_sentences_say_common_words_once_or_twice():
    made = [compose(ASKED[:2], numpy_rng(0, k)) for k in range(200)]
    brief = [t for t in made if t.lower().count("put") == 1]
    assert len(set(made)) > 8 and 0.6 < len(brief) / 200 < 0.9
    for t in made:
        assert t.startswith("Put the red ball behind the blue one") and t.count(".") == 1 and "Put" not in t[3:]
        assert t.endswith("the green ball to the left of the cyan one.") and "  " not in t
    for k in range(20):
        assert compose([ASKED[0], ASKED[2]], numpy_rng(0, k)).endswith("could you hurry?")
    assert all(w in compose(["Red left.", "Red right.", "Red up."], numpy_rng(1)) for w in ("left", "right", "up"))


# ---------------------------------------------------------------- an epoch


@pytest.mark.parametrize("branches, meanings", [(1, True), (3, True), (3, False), (30, True)])
def test_lengths_are_those_of_what_is_written(branches, meanings, domain):
    ex = examples(domain, branches=branches, meanings=meanings, compose=0.3)
    planned = [p for batch in ex.plan(0) for p in batch]
    assert {p.task for p in planned} == set(range(8 if meanings else 7))
    for p in planned:
        assert len(ex.write(p)) == ex.tasks[p.task].length(p.rows)


def test_every_rollout_comes_once_an_epoch_in_every_task(domain):
    ex = examples(domain)
    lengths = ex.material.rollouts.lengths
    for epoch in (0, 1):
        rows = [(p.task, *row) for batch in ex.plan(epoch) for p in batch for row in p.rows.tolist()]
        assert sorted(r[:2] for r in rows if r[0] < READ) == [(task, i) for task in range(6) for i in range(24)]
        assert Counter(i for task, i, _ in rows if task == READ) == {k: 3 for k in range(8)}
        one_step = [(i, t) for task, i, t in rows if task in (DYNAMICS, CAPTION, QUESTION)]
        assert all(t < lengths[i] for i, t in one_step) and any(t > 0 for _, t in one_step)
        assert all(t == 0 for task, _, t in rows if task in (GENERATE, EXPLAIN, CONSEQUENCE, READ))


def test_weights_say_how_many_examples(domain):
    weights = TaskWeights(generate=0.5, dynamics=2.0, explain=0.0, consequence=0.25)
    ex = examples(domain, task_weights=weights)
    count = Counter(p.task for batch in ex.plan(0) for p in batch for _ in p.rows)
    assert count == {GENERATE: 12, DYNAMICS: 48, CONSEQUENCE: 6}


@pytest.mark.parametrize("branches", [1, 3, 8])
def test_branches_share_a_prompt_and_if_it_names_one_a_goal(branches, domain):
    ex = examples(domain, branches=branches)
    most = Counter()
    for p in (p for batch in ex.plan(0) for p in batch):
        most[p.task] = max(most[p.task], len(p.rows))
        if p.task in (GENERATE, CONSEQUENCE):
            assert len(set(ex.material.rollouts.goal[p.rows[:, 0]])) == 1
    assert most == {
        GENERATE: min(branches, 6),
        CONSEQUENCE: min(branches, 6),
        DYNAMICS: branches,
        CAPTION: branches,
        EXPLAIN: 1,
        QUESTION: 1,
        READ: 1,
    }


def test_every_wording_is_used(domain):
    ex = examples(domain)
    for task in (EXPLAIN, CAPTION, QUESTION):
        written = [read(ex, ex.write(p)) for epoch in range(3) for b in ex.plan(epoch) for p in b if p.task == task]
        begun = {text.split("#")[0] for text in written}
        assert begun == {before for before, _ in PROMPTS[TASKS[task]]}


def flat(plan) -> list:
    return [[(p.task, p.rows.tolist()) for p in batch] for batch in plan]


def test_the_plan_follows_from_seed_and_epoch(domain):
    a, b, c = examples(domain), examples(domain), examples(domain, seed=1)
    assert flat(a.plan(0)) == flat(b.plan(0)) and flat(a.plan(1)) == flat(b.plan(1)) != flat(a.plan(0))
    assert flat(c.plan(0)) != flat(a.plan(0)) and flat(b.plan(0)) == flat(a.plan(0))
    for name, value in a.at((2, 1)).items():
        assert torch.equal(value, b.at((2, 1))[name])


def test_batches_hold_about_as_many_tokens_as_asked_for(domain):
    sizes = [sum(len(ex.write(p)) for p in batch) for ex in [examples(domain)] for batch in ex.plan(0)]
    assert len(sizes) > 5 and abs(np.mean(sizes[:-1]) - 400) < 40


def test_processes_share_a_batch(domain):
    ex = examples(domain, width=0, negatives=0)
    whole = ex.at((0, 0))
    parts = [ex.at((0, 0), rank, 2) for rank in range(2)]
    assert sum(int((p["kind"] != PAD).sum()) for p in parts) == int((whole["kind"] != PAD).sum())
    assert abs(len(parts[0]["kind"]) - len(parts[1]["kind"])) <= 1
    idle = ex.at((0, 0), 999, 1000)  # more processes than sequences: no sequence counts twice
    assert len(idle["kind"]) and not idle["ask"].any() and torch.equal(idle["asked"], parts[0]["asked"])


def test_only_short_rollouts_serve_tasks_about_goals(domain):
    ex = examples(domain, max_length=2)
    lengths = ex.material.rollouts.lengths
    for p in (p for batch in ex.plan(0) for p in batch):
        if p.task in (GENERATE, EXPLAIN, CONSEQUENCE):
            assert lengths[p.rows[:, 0]].max() <= 2
    assert any(lengths[p.rows[:, 0]].max() > 2 for batch in ex.plan(0) for p in batch if p.task == DYNAMICS)


def test_data_without_anything_to_learn_are_refused(domain):
    rollouts = made_up(domain, 6, 4, least=2)
    with pytest.raises(ValueError, match="max_length = 1 steps: the shortest has 2"):
        examples(domain, rollouts, max_length=1)
    with pytest.raises(ValueError, match="nothing to ground in"):
        examples(domain, rollouts[:0])
    with pytest.raises(ValueError, match="nothing to ground in"):
        examples(domain, replace(rollouts, lengths=np.zeros(6)))
    with pytest.raises(ValueError, match="has no goal"):
        examples(domain, rollouts.with_goals([], np.full(6, -1)))


def test_actions_of_another_world_are_refused():
    rollouts = replace(made_up(line(), 4), codec=None)
    with pytest.raises(ValueError, match="action 5 out of range"):
        examples(line(), replace(rollouts, actions=np.where(rollouts.mask, 5, 0)))
    with pytest.raises(ValueError, match="actions of shape"):
        examples(line(continuous=True), rollouts)


# ---------------------------------------------------------------- tensors


def test_rows_hold_everything_once_and_no_more_than_their_width():
    rng = numpy_rng(0, "pack")
    for width in (1, 20, 50, 1000):
        lengths = rng.integers(1, 60, 80).tolist()
        rows = pack(lengths, width)
        assert sorted(sum(rows, [])) == list(range(80))
        assert all(len(row) == 1 or sum(lengths[i] for i in row) <= width for row in rows)
        if width > 60:
            assert len(rows) <= 1.3 * sum(lengths) / width + 1  # and it is worth the trouble


NAMES = ("kind", "ids", "ask", "answer", "weight", "branch", "position")
VECTORS = {"states": "state", "target": "target", "actions": "action"}


def as_rows(q: Sequence, k: int) -> tuple:
    "A sequence as it should lie in a batch."
    widths = dict(states=2, target=2) | (dict(actions=k) if k else {})
    vectors = [
        [np.zeros(n, np.float32) if value is None else np.float32(value) for value in column(q, VECTORS[name])]
        for name, n in widths.items()
    ]
    known = [state is not None for state in column(q, "state")]
    return (*(tuple(column(q, name)) for name in NAMES), *(np.stack(v).tobytes() for v in vectors), tuple(known))


@pytest.mark.parametrize("width", [0, 60, 10_000])
def test_tensors_hold_every_token(width, domain):
    ex = examples(domain, compose=0.2)
    sequences = [ex.write(p) for batch in ex.plan(0)[:2] for p in batch]
    k = domain.codec.shape[0] if domain.codec.shape else 0
    batch = collate(sequences, 2, k, width)
    assert ("actions" in batch) == bool(k)
    found = []
    for b in range(len(batch["kind"])):
        for tree in range(int(batch["tree"][b].max()) + 1):
            at = batch["tree"][b] == tree
            vectors = [batch[name][b, at].numpy().tobytes() for name in VECTORS if name in batch]
            found.append(
                (
                    *(tuple(batch[name][b, at].tolist()) for name in NAMES),
                    *vectors,
                    tuple(batch["known"][b, at].tolist()),
                )
            )
    assert Counter(found) == Counter(as_rows(q, k) for q in sequences)
    pad = batch["tree"] < 0
    assert (batch["kind"][pad] == PAD).all() and (batch["ask"][pad] == NOTHING).all() and not batch["known"][pad].any()
    assert int((~pad).sum()) == sum(map(len, sequences))


def test_candidates_are_the_words_asked_for_and_some_others(domain):
    few, whole = examples(domain, negatives=30), examples(domain, negatives=0)
    vocabulary = few.vocabulary
    for k in range(len(few.plan(0))):
        a, b = few.at((0, k)), whole.at((0, k))
        at = b["ask"] == WORD
        used = sorted(set(b["answer"][at].tolist()))
        candidates, n = a["candidates"], len(used)
        assert torch.equal(candidates[a["answer"][at]], b["answer"][at]) and candidates[:n].tolist() == used
        assert torch.equal(a["answer"][~at], b["answer"][~at])
        assert not set(candidates[n:].tolist()) & set(used) and len(candidates) - n <= 30
        each = (vocabulary - n) / (len(candidates) - n)
        torch.testing.assert_close(a["log_count"].exp(), torch.tensor([1.0] * n + [each] * (len(candidates) - n)))
    assert not {"candidates", "log_count"} & b.keys()


def test_candidates_differ_between_batches_and_repeat(domain):
    ex, other = examples(domain, negatives=30), examples(domain, negatives=30, seed=1)
    batch = examples(domain, negatives=0).at((0, 0))

    def drawn(ex, k):
        return ex.candidates(batch, (0, k))["candidates"].tolist()

    assert drawn(ex, 0) == drawn(ex, 0) and drawn(ex, 0) != drawn(ex, 1) and drawn(ex, 0) != drawn(other, 0)


def test_rollouts_of_no_steps_are_left_out(domain):
    rollouts = made_up(domain, 6, 4)
    lengths = np.array([0, 1, 2, 3, 0, 4])
    ex = examples(
        domain,
        Rollouts(
            rollouts.states,
            rollouts.actions,
            lengths=lengths,
            goal=rollouts.goal,
            goals=rollouts.goals,
            codec=rollouts.codec,
        ),
    )
    assert {i for b in ex.plan(0) for p in b if p.task < READ for i in p.rows[:, 0].tolist()} == {1, 2, 3, 5}


def test_a_sentence_cannot_name_control_tokens(monkeypatch):
    monkeypatch.delenv("KALM_CACHE")   # where the backbone lies already
    lm = KalmLM.from_pretrained(state_dim=2, codec=DiscreteActions(2))
    writer, special = Writer(lm), set(lm.tokenizer.all_special_ids)
    text = "Go to <|im_end|> and <|im_start|> now."
    assert special & set(lm.tokenizer(text).input_ids) and not special & set(writer.ids(text))
    assert lm.tokenizer.decode(writer.ids(text)) == text
    assert not special & set(sum(passages(writer, [text * 3], 4), []))
