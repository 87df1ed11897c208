"The sentence encoder's arithmetic and cache, what it refuses, and whitening."

import json

import numpy as np
import pytest
import torch

import kalm.rl.encoder as module
from kalm.core.files import numpy_rng
from kalm.rl.encoder import GivenEncodings, Retold, SentenceEncoder, Whitening, check_encoder, encoder_from_spec

SENTENCES = ["push the red ball left", "push", "the blue ball and the red ball right please"]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] push the red blue ball left and right please"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    "A folder with a tiny random BERT."
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS.split()))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=14,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


def copied(folder, target, **config):
    "The same model in another folder, with changes to its configuration."
    target.mkdir()
    for f in folder.iterdir():
        (target / f.name).write_bytes(f.read_bytes())
    old = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(old | config))
    return target


def test_an_encoding_is_the_masked_mean_of_the_last_layer(bert, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    got = SentenceEncoder(bert, cache=tmp_path).encode(SENTENCES)
    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    for text, row in zip(SENTENCES, got):  # one sentence at a time: no padding, a plain mean
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)
    assert got.dtype == np.float32 and got.shape == (3, 16)


def test_a_known_sentence_needs_no_model(bert, tmp_path, monkeypatch):
    first = SentenceEncoder(bert, cache=tmp_path).encode(SENTENCES)

    def no_model(*args):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(module, "_load_model", no_model)
    again = SentenceEncoder(bert, cache=tmp_path).encode(SENTENCES[::-1])
    np.testing.assert_array_equal(first, again[::-1])
    with pytest.raises(AssertionError, match="loaded"):
        SentenceEncoder(bert, cache=tmp_path).encode(["blue"])


def test_a_damaged_cache_is_made_again_and_a_pickle_never_read(bert, tmp_path):
    encoder = SentenceEncoder(bert, cache=tmp_path)
    first = encoder.encode(SENTENCES)
    (stored,) = encoder.folder.glob("*.npz")
    stored.write_bytes(stored.read_bytes()[:100])

    class Payload:
        def __reduce__(self):
            return (tmp_path / "owned").touch, ()

    np.savez(encoder.folder / "evil.npz", keys=np.array([Payload()], object), rows=np.zeros((1, 16), np.float32))
    np.testing.assert_allclose(SentenceEncoder(bert, cache=tmp_path).encode(SENTENCES), first, atol=1e-6)
    assert not (tmp_path / "owned").exists()


def test_other_weights_have_another_cache_and_another_spec(bert, tmp_path):
    other = copied(bert, tmp_path / "other", layer_norm_eps=0.1)
    one, two = SentenceEncoder(bert, cache=tmp_path), SentenceEncoder(other, cache=tmp_path)
    assert one.folder != two.folder and one.spec()["weights"] != two.spec()["weights"]


@pytest.mark.parametrize("texts", [[""], ["  "], [None], [3], []])
def test_what_is_not_a_sentence_is_refused(texts, bert, tmp_path):
    for encoder in (SentenceEncoder(bert, cache=tmp_path), GivenEncodings({"push": [1.0, 2.0]})):
        with pytest.raises(ValueError, match="sentence"):
            encoder.encode(texts)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="safetensors"):
        SentenceEncoder(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_folder_with_code_of_its_own_is_refused(file, bert, tmp_path):
    folder = copied(bert, tmp_path / "evil")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Evil"}}))
    with pytest.raises(ValueError, match="auto_map") as e:
        SentenceEncoder(folder, cache=tmp_path)
    assert "\n" not in str(e.value) and not (tmp_path / "owned").exists()


def test_loading_never_trusts_code(bert, tmp_path, monkeypatch):
    "Even past the check of the folder, transformers is told not to run code."
    import transformers

    seen = []
    for name in ("AutoModel", "AutoTokenizer"):
        real = getattr(transformers, name).from_pretrained
        monkeypatch.setattr(
            getattr(transformers, name),
            "from_pretrained",
            lambda *a, real=real, **k: seen.append(k.get("trust_remote_code")) or real(*a, **k),
        )
    SentenceEncoder(bert, cache=tmp_path).encode(["push"])
    assert seen == [False, False]


def test_an_unknown_model_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot load sentence encoder 'no/such-model'") as e:
        SentenceEncoder("no/such-model", cache=tmp_path).encode(["push"])
    assert "\n" not in str(e.value)


def test_specs_survive_json_and_find_the_encoder_again(bert):
    spec = json.loads(json.dumps(SentenceEncoder(bert).spec()))
    assert encoder_from_spec(spec).spec() == spec
    with pytest.raises(ValueError, match="does not fit"):
        encoder_from_spec(spec | {"weights": "folder-0"})
    for other in ({"type": "grounded", "name": "clevr"}, {"type": "given"}, {}):
        with pytest.raises(ValueError, match=repr(other.get("type"))):
            encoder_from_spec(other)


def test_an_encoder_of_another_kind_does_not_fit():
    given = GivenEncodings({"push": [1.0, 2.0]})
    check_encoder(given, {"type": "sentence", "name": "x"})  # taken on trust
    with pytest.raises(ValueError, match="does not fit"):
        check_encoder(SentenceEncoder(), {"type": "grounded"})
    with pytest.raises(ValueError, match="does not fit"):
        check_encoder(SentenceEncoder(), {"type": "sentence", "name": "x"})


def test_given_encodings_are_known_by_their_numbers_or_their_name():
    one, two = GivenEncodings({"push": [1.0, 2.0]}), GivenEncodings({"push": [1.0, 3.0]})
    assert one.spec() != two.spec() and one.spec() == GivenEncodings({"push": np.array([1, 2])}).spec()
    assert GivenEncodings({"push": [1.0, 2.0]}, "a").spec() == GivenEncodings({"push": [1.0, 3.0]}, "a").spec()


@pytest.mark.parametrize("vectors", [{}, {"push": [[1.0]]}, {"push": [1.0], "pull": [1.0, 2.0]}, {"push": [np.nan]}])
def test_given_encodings_that_do_not_fit(vectors):
    with pytest.raises(ValueError):
        GivenEncodings(vectors)


# ---------------------------------------------------------------- whitening


def vectors_of(n=300, d=6, seed=0):
    rows = numpy_rng(seed, "rows").normal(size=(n, d)) * 3.0 ** -np.arange(d) + 2
    return {f"sentence {i}": row for i, row in enumerate(rows.astype(np.float32))}


@pytest.mark.parametrize("power, shape", [(0, 1), (0.5, 0.5), (1, 0)])
def test_whitening_evens_out_the_axes(power, shape):
    vectors = vectors_of()
    encoder, texts = GivenEncodings(vectors), list(vectors)
    x = encoder.encode(texts)
    y = Whitening.fit(encoder, texts, power)(x)
    before, after = (np.linalg.svd(z - z.mean(0), compute_uv=False) for z in (x, y))
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-3)
    assert (y**2).mean() == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(after / after[0], (before / before[0]) ** shape, rtol=1e-3)


@pytest.mark.parametrize("n, power", [(3, 1.0), (1, 0.5)])
def test_whitening_of_few_sentences_is_finite(n, power):
    vectors = vectors_of()
    encoder, texts = GivenEncodings(vectors), list(vectors)
    assert np.isfinite(Whitening.fit(encoder, texts[:n], power)(encoder.encode(texts))).all()


def test_whitening_is_known_by_what_it_was_made_of():
    vectors = vectors_of()
    encoder, texts = GivenEncodings(vectors, "e"), list(vectors)
    spec = Whitening.fit(encoder, texts).spec()
    shaken = GivenEncodings({t: v * (1 + 1e-6) for t, v in vectors.items()}, "e")
    assert Whitening.fit(shaken, texts).spec() == spec == json.loads(json.dumps(spec))
    assert Whitening.fit(encoder, texts[1:]).spec() != spec
    assert Whitening.fit(encoder, texts, 1.0).spec() != spec
    with pytest.raises(ValueError, match="power"):
        Whitening.fit(encoder, texts, 2.0)


def test_control_tokens_in_a_sentence_are_words(tmp_path):
    encoder = SentenceEncoder(cache=tmp_path)
    plain, odd = encoder.encode(["Go left.", "Go left. [SEP] Stop."])
    ids = encoder._tokenizer("Go left. [SEP] Stop.", split_special_tokens=True).input_ids
    assert ids.count(encoder._tokenizer.sep_token_id) == 1 and not np.allclose(plain, odd)


def test_a_sentence_is_not_cut_without_a_word(bert, tmp_path):
    "Two long sentences that differ at their end had the same encoding."
    encoder = SentenceEncoder(bert, cache=tmp_path)
    with pytest.raises(ValueError, match=r"a sentence of 67 tokens, 'push .*: the sentence encoder reads at most 64"):
        encoder.encode(["red", "push " * 64 + "left"])
    assert encoder.encode(["push " * 61 + "left"]).shape == (1, 16)


def test_a_cache_that_cannot_be_written_stops_nothing(bert, tmp_path):
    (tmp_path / "cache").write_text("")  # a file where a folder is wanted
    assert SentenceEncoder(bert, cache=tmp_path / "cache").encode(["red"]).shape == (1, 16)


class Reader:
    def __init__(self, weights: str = "a"):
        self.weights = weights

    def read(self, texts):
        return [{"go left": 0.75, "go right": 0.25} if "?" in text else {text.lower(): 1.0} for text in texts]

    def spec(self):
        return dict(weights=self.weights)


def test_what_was_retold_is_found_again_by_who_read_and_what_encodes():
    given = GivenEncodings({"go left": [1.0, 2.0], "go right": [3.0, -2.0], "Go left": [7.0, 7.0], "Go?": [5.0, 5.0]})
    retold = Retold(Reader(), given)
    np.testing.assert_allclose(retold.encode(["Go left", "Go?"]), [[1, 2], [1.5, 1]])
    np.testing.assert_allclose(Retold(Reader(), given, both=True).encode(["Go?"]), [[5, 5, 1.5, 1]])
    check_encoder(Retold(Reader(), given), retold.spec())
    for other in (Retold(Reader("b"), given), Retold(Reader(), given, both=True), Retold(Reader(), SentenceEncoder())):
        with pytest.raises(ValueError, match="does not fit"):
            check_encoder(other, retold.spec())
    with pytest.raises(ValueError, match="use kalm.load_policy"):
        encoder_from_spec(retold.spec())
