"A reader reads a sentence once, says how much it doubts, and is found again by what its model weighs."

import numpy as np
import pytest
import torch
from lively import lively_lm
from worlds import line

import kalm.lm.reading as reading
from kalm.core.files import sha256
from kalm.lm.decode import CachedDecoder
from kalm.lm.explain import Meaning, meaning, meaning_prompt
from kalm.lm.model import TEXT
from kalm.lm.reading import GoalEncoder, Reader, drawn_meanings, keep_meanings
from kalm.lm.sequences import MEANING, Writer

pytestmark = pytest.mark.usefixtures("cache")

TEXTS = ["Walk to the right end.", "Please go left.", "Over there!"]


@pytest.fixture
def lively(cache):
    return lively_lm(line())


@pytest.fixture
def saved(lively, tmp_path):
    lively.save_pretrained(tmp_path / "grounded", dtype=None)
    return tmp_path / "grounded"


# ---------------------------------------------------------------- doubt


def test_drawn_answers_follow_from_the_sentence_and_the_seed_alone(lively):
    drawn = drawn_meanings(lively, TEXTS, 6, seed=3, max_tokens=4)
    assert [sum(shares.values()) for shares in drawn] == pytest.approx([1, 1, 1])
    assert all(list(shares.values()) == sorted(shares.values(), reverse=True) for shares in drawn)
    assert drawn_meanings(lively, TEXTS[::-1], 6, seed=3, max_tokens=4, batch_size=2) == drawn[::-1]
    assert drawn_meanings(lively, TEXTS, 6, seed=4, max_tokens=4) != drawn


def test_answers_are_drawn_as_often_as_they_are_likely(lively):
    "One word long, against the model's own probabilities."
    writer = Writer(lively)
    ids = torch.tensor([writer.start("generate", TEXTS[0]) + writer.ids(MEANING)])
    with torch.no_grad(), lively.merged():
        h = lively(torch.full_like(ids, TEXT), ids, torch.zeros(*ids.shape, 2))[0, -1:]
        p = lively.text_logits(h, None).float().softmax(-1)[0]
    said = drawn_meanings(lively, TEXTS[:1], 400, max_tokens=1)[0]
    likeliest = int(p.argmax())
    word = lively.tokenizer.decode([likeliest]).strip()
    same = sum(float(p[i]) for i in range(len(p)) if lively.tokenizer.decode([i]).strip() == word)
    if lively.tokenizer.eos_token_id == likeliest:
        word, same = "", same
    assert abs(said.get(word, 0.) - same) < 5 * np.sqrt(same * (1 - same) / 400) + .01


@pytest.mark.parametrize("n", [0, 1.5, True])
def test_a_number_of_answers_is_a_number(n, lively):
    with pytest.raises(ValueError, match="^n "):
        drawn_meanings(lively, TEXTS, n)


# ---------------------------------------------------------------- a reader that remembers


def test_a_sentence_is_read_once(lively, saved, tmp_path, monkeypatch):
    reader = Reader("line", saved, cache=tmp_path / "kept")
    read = reader.read(TEXTS + TEXTS[:1])
    assert read[:3] == [{said.words: 1.} for said in meaning(lively, TEXTS, max_tokens=32)] and read[3] == read[0]
    monkeypatch.setattr(reading, "meaning", lambda *args, **kw: pytest.fail("read again"))
    assert Reader("line", saved, cache=tmp_path / "kept").read(TEXTS) == read[:3]
    with pytest.raises(ValueError, match="blank"):
        reader.read([" "])


def test_readers_of_other_models_or_other_ways_share_nothing(lively, saved, tmp_path):
    one = Reader("line", saved, cache=tmp_path / "kept")
    keep_meanings(one.kept / "made.json", {TEXTS[0]: {"made up": 1.}}, one.spec())
    assert one.read(TEXTS[:1]) == [{"made up": 1.}] and "lm" not in vars(one)
    assert Reader("line", saved, samples=2, cache=tmp_path / "kept").read(TEXTS[:1]) != one.read(TEXTS[:1])
    with torch.no_grad():
        next(iter(lively.own_parameters().values())).add_(1)
    lively.save_pretrained(tmp_path / "other", dtype=None)
    assert Reader("line", tmp_path / "other", cache=tmp_path / "kept").read(TEXTS[:1]) != one.read(TEXTS[:1])


@pytest.mark.parametrize("damage", [b"", b"[1]", b'{"meanings": {}}', None], ids=["empty", "list", "half", "flipped"])
def test_a_damaged_memory_is_read_anew(damage, lively, saved, tmp_path):
    reader = Reader("line", saved, cache=tmp_path / "kept")
    read = reader.read(TEXTS)
    path, = reader.kept.glob("*.json")
    changed = path.read_bytes().replace(b"Please go left.", b"Please go lest.")
    path.write_bytes(changed if damage is None else damage)
    again = Reader("line", saved, cache=tmp_path / "kept")
    assert again.read(TEXTS) == read and "lm" in vars(again)


def test_meanings_that_ship_need_no_model(lively, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "SHIPPED", tmp_path / "ships")
    lively.save_pretrained(tmp_path / "ships" / "line", dtype=None)
    reader = Reader("line", cache=tmp_path / "kept")
    keep_meanings(tmp_path / "ships" / "line" / "meanings.json", {"Go.": {"left": 1.}}, reader.spec())
    assert reader.read(["Go."]) == [{"left": 1.}] and "lm" not in vars(reader)
    assert not reader.kept.exists()


def test_who_went_on_reading_reads(lively, saved, tmp_path, monkeypatch):
    "Of the two checkpoints that may ship for a domain the one that was grounded further in texts."
    monkeypatch.setattr(reading, "SHIPPED", tmp_path / "ships")
    lively.save_pretrained(tmp_path / "ships" / "line", dtype=None)
    first = Reader("line")
    with torch.no_grad():
        next(iter(lively.own_parameters().values())).add_(1)
    lively.save_pretrained(tmp_path / "ships" / "line" / "reader", dtype=None)
    second = Reader("line")
    assert second.folder == first.folder / "reader" and second.weights != first.weights
    assert Reader.from_spec(first.spec()).folder == first.folder
    assert Reader.from_spec(second.spec()).folder == second.folder
    assert GoalEncoder(domain="line").spec()["weights"] == second.weights


def test_a_reader_is_found_by_its_weights_wherever_it_lies(lively, saved, tmp_path):
    spec = Reader("line", saved).spec()
    assert spec == dict(domain="line", samples=0, names=[], weights=sha256(saved / "model.safetensors")[:24])
    moved = saved.rename(tmp_path / "moved")
    (tmp_path / "empty").mkdir()
    assert Reader.from_spec(spec, [tmp_path / "empty", moved]).folder == moved
    with pytest.raises(FileNotFoundError, match="neither the one that ships nor in .*empty"):
        Reader.from_spec(spec, [tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Reader("line", tmp_path / "empty")


@pytest.mark.parametrize("first, drawn, wanted", [
    ("red blue left", {}, ("red blue left", .9)),                                # names what the sentence names
    ("red left", {"red cyan left": .5, "blue red left": .3}, ("blue red left", .3)),
    ("red red left", {"mumble": .6, "red blue left": .2, "red blue right": .1}, ("red blue left", .2)),
    ("red cyan left", {"cyan": 1.}, ("red cyan left", .9)),                      # nothing better was said
])
def test_a_reading_names_what_the_sentence_names(first, drawn, wanted, monkeypatch):
    monkeypatch.setattr(reading, "meaning", lambda lm, texts, **kw: [Meaning(first, .9)] * len(texts))
    monkeypatch.setattr(reading, "drawn_meanings", lambda lm, texts, n: [drawn] * len(texts))
    text = "Red, to Blue's left."
    assert reading.checked_meanings(None, [text], ("red", "blue", "cyan")) == [Meaning(*wanted)]
    assert reading.checked_meanings(None, [text]) == [Meaning(first, .9)]                # nothing is a name
    assert reading.checked_meanings(None, ["That way."], ("red", "blue")) == [Meaning(first, .9)]


def test_readers_that_check_otherwise_share_nothing(lively, saved, tmp_path):
    plain, strict = (Reader("line", saved, names=names, cache=tmp_path / "kept") for names in ((), ("left", "right")))
    assert plain.kept != strict.kept and strict.spec()["names"] == ["left", "right"]
    assert Reader.from_spec(strict.spec(), [saved]).spec() == strict.spec()


# ---------------------------------------------------------------- goals as vectors


def test_goals_as_vectors_are_what_is_held_in_mind(lively):
    writer, encoder = Writer(lively), GoalEncoder(lively, batch_size=2)
    got = encoder.encode(TEXTS + TEXTS[:1])
    for text, v in zip(TEXTS, got):
        ids = torch.tensor([writer.start("generate", text) + writer.ids(MEANING)])
        with torch.no_grad():
            h = lively(torch.full_like(ids, TEXT), ids, torch.zeros(*ids.shape, 2))[0, -1]
        np.testing.assert_allclose(v, h / h.norm(), atol=1e-4)
    assert got.dtype == np.float32 and np.array_equal(got[0], got[-1]) and len(encoder.known) == 3
    assert np.array_equal(encoder.encode(TEXTS[1:2])[0], got[1])
    for texts, message in (([], "no sentences"), ([" "], "blank"), ("Go.", "expected a list")):
        with pytest.raises(ValueError, match=message):
            encoder.encode(texts)


def test_a_goal_encoder_is_found_by_its_weights_wherever_its_model_lies(lively, saved, tmp_path):
    encoder = GoalEncoder(lively, saved)
    spec = encoder.spec()
    assert spec == dict(type="grounded", domain="line", weights=sha256(saved/"model.safetensors")[:24])
    again = GoalEncoder.from_spec(spec, [tmp_path, saved])
    assert "lm" not in vars(again)   # nobody had to read
    np.testing.assert_allclose(again.encode(["Go."]), encoder.encode(["Go."]), atol=1e-5)
    with pytest.raises(ValueError, match="type 'sentence'"):
        GoalEncoder.from_spec(dict(type="sentence"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        GoalEncoder(lively).spec()   # no checkpoint ships for this domain
    with pytest.raises(FileNotFoundError, match="grounded again since"):
        GoalEncoder.from_spec(spec | dict(weights="others"), [saved])


def test_vectors_are_the_cached_decoder_s_too(lively):
    writer = Writer(lively)
    with torch.no_grad():
        h = CachedDecoder(lively, 1).read(np.array([0]), [meaning_prompt(writer, "Go.")])[0]
    np.testing.assert_allclose(GoalEncoder(lively).encode(["Go."])[0], h / h.norm(), atol=1e-4)
