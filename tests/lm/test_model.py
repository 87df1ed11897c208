"The model is what it was before the wings, checkpoints come back as they went, and what does not belong is refused."
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lively import liven

from kalm.core import files
from kalm.core.actions import ContinuousActions, DiscreteActions
from kalm.core.domain import Features
from kalm.core.files import numpy_rng, sha256
from kalm.lm.backbone import backbone_folder, load_backbone
from kalm.lm.maps import Normaliser
from kalm.lm.model import (
    ACTION,
    FORMAT,
    PAD,
    STATE,
    TEXT,
    Adapter,
    KalmLM,
    keep_threshold,
    tree_attention_mask,
    upgrade_header,
)
from kalm.tensors.store import load_tensors, save_tensors, torch_rng

pytestmark = pytest.mark.usefixtures("cache")

POINTS = Features(points=tuple((i, i + 1) for i in range(0, 10, 2)))
BALLS = dict(state_dim=10, codec=DiscreteActions(40), features=POINTS, hidden=64)
SENTENCES = ["Move the red ball behind the blue ball.", "Short.",
             "Could you, if it is no trouble, bring the cyan ball round to the left of the green one?"]
OLD = Path(__file__).with_name("old_model.npz")


def fresh(**kw) -> KalmLM:
    return KalmLM.from_pretrained("tiny-random", **BALLS | kw)


@pytest.fixture
def tiny(cache) -> KalmLM:
    return fresh()


@pytest.fixture
def lively(tiny) -> KalmLM:
    return liven(tiny)


def sequence(lm, seed: int = 0, steps: int = 3, text: str = "Goal: x Rollout:"):
    "One unpadded mixed sequence: kind (L,), ids (L,), states (L, S)."
    g = torch_rng(seed, "sequence")
    words = lm.tokenizer(text, add_special_tokens=False).input_ids
    kind = torch.tensor([TEXT] * len(words) + [STATE, ACTION] * steps + [STATE])
    ids = torch.cat([torch.tensor(words), torch.randint(0, 40, (2 * steps + 1,), generator=g)])
    return kind, ids, torch.rand(len(kind), lm.state_dim, generator=g) - .5


def hidden(lm, kind, ids, states, **kw):
    with torch.no_grad():
        return lm(kind[None], ids[None], states[None], **kw)[0]


def own(lm) -> dict:
    return {n: p.detach().clone() for n, p in lm.own_parameters().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def outspoken(lm, seed: int = 0):
    "A word head that has something to say."
    weight = lm.word_head.out.weight
    with torch.no_grad():
        weight.copy_(.3 * torch.randn(weight.shape, generator=torch_rng(seed, "outspoken")))
    return lm


# ---------------------------------------------------------------- as before the wings

@pytest.fixture(scope="module")
def shipped() -> KalmLM:
    "Its backbone is in the real cache: fixtures of a module come before the one that moves the cache."
    return KalmLM.grounded("clevr")


def old_model(name: str, shipped: KalmLM) -> KalmLM:
    if name == "shipped":
        return shipped
    if name == "scratch":
        return fresh(hidden=512, seed=3, scratch=True)
    lm = fresh(hidden=512, seed=3).adapt(Adapter(rank=4), seed=2)
    with torch.no_grad():
        for n, p in lm.own_parameters().items():
            if "lora_B" in n:
                p.copy_(.01 * torch.arange(p.numel()).reshape(p.shape).sin())
    return lm


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["tiny", "scratch", "shipped"])
def test_the_model_is_what_it_was(name, one_thread, shipped):
    "Hidden vectors, logits, next states and weights that the old code gave for the same inputs."
    lm, old = old_model(name, shipped), np.load(OLD, allow_pickle=False)
    assert lm.weights_id == str(old[f"{name}.weights_id"])
    weights = dict(sorted(lm.own_parameters().items()))
    assert list(weights) == old[f"{name}.own_names"].tolist()
    sums = [[p.detach().double().sum().item(), p.detach().double().abs().sum().item()] for p in weights.values()]
    np.testing.assert_allclose(sums, old[f"{name}.own_sums"], rtol=1e-9, atol=1e-7)
    step = 977 if name == "shipped" else 7
    for i in range(2):
        kind, ids, states = (torch.from_numpy(old[f"{name}.{i}.{key}"]) for key in ("kind", "ids", "states"))
        at = torch.arange(kind.shape[1])[None]
        with torch.no_grad():
            h = lm(kind, ids, states)
            got = dict(hidden=h, outputs=lm.action_outputs(h, states), next_states=lm.next_states(h, states),
                       text=lm.text_logits(h, states)[..., ::step], plain=lm.text_logits(h)[..., ::step],
                       tree=lm(kind, ids, states, positions=at, tree=at // 8, branch=at // 3 % 3)[..., ::8])
        for key, value in got.items():
            want = old[f"{name}.{i}.{key}"]
            np.testing.assert_allclose(value, want, atol=1e-5 * max(1, abs(want).max()), rtol=1e-4, err_msg=key)


def test_what_ships_says_what_it_is(shipped):
    lm = shipped
    assert (lm.domain, lm.state_dim, lm.codec, lm.features_spec) == ("clevr", 10, DiscreteActions(40), POINTS)
    assert lm.adapter == Adapter(rank=16, alpha=32) and lm.begin == [] and not lm.training
    assert lm.normaliser.step == .07276624964618698 and lm.normaliser.jump == .20900092762003292
    assert set(lm.prompts) == {"generate", "dynamics", "explain", "consequence", "caption", "question"}
    assert lm.prompts["generate"] == (("Goal: {goal} Rollout:",),) and len(lm.prompts["explain"]) == 8


def test_a_missing_checkpoint_is_named():
    for name in ("nowhere", "../clevr", ""):
        with pytest.raises(FileNotFoundError, match="no shipped checkpoint.*there is: clevr.*kalm ground"):
            KalmLM.grounded(name)


# ---------------------------------------------------------------- parity on plain text

def text_parity(lm, backbone) -> bool:
    backbone.set_attn_implementation(lm.backbone.config._attn_implementation)   # the same order of sums
    for text in SENTENCES:
        ids = lm.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            want = backbone(input_ids=ids).logits
            got = lm.text_logits(lm(torch.full_like(ids, TEXT), ids, torch.zeros(*ids.shape, 10)))
        if not torch.equal(got, want):
            return False
    return True


@pytest.mark.parametrize("adapter", [Adapter(rank=4), Adapter(full=True)], ids=str)
def test_plain_text_gives_the_backbones_logits_exactly(adapter, tiny):
    backbone = load_backbone("tiny-random")[0]
    assert text_parity(tiny, backbone)
    tiny.adapt(adapter)
    assert text_parity(tiny, backbone)                                 # a new adapter changes nothing
    with tiny.merged():
        assert text_parity(tiny, backbone)
    with torch.no_grad():
        next(p for n, p in tiny.named_parameters() if ("lora_B" in n or adapter.full)).add_(.1)
    assert not text_parity(tiny, backbone)                             # a trained one does


def test_words_about_a_state_begin_as_the_backbones_own(tiny):
    h, s = torch.randn(5, 64, generator=torch_rng(0)), torch.rand(5, 10, generator=torch_rng(1))
    with torch.no_grad():
        assert torch.equal(tiny.text_logits(h, s), tiny.text_logits(h))


def test_quick_attention_gives_what_the_backbones_own_gives(lively):
    assert lively.backbone.config._attn_implementation == "grouped"
    kind, ids, states = padded([sequence(lively, 0, 1, "a"), sequence(lively, 1, 4, SENTENCES[0])], left=True)
    attend = (kind != PAD).long()
    left = dict(positions=(attend.cumsum(1) - 1).clamp(min=0), attend=attend)
    at = torch.arange(kind.shape[1])[None].expand(2, -1)
    trees = dict(positions=at, tree=at // 30, branch=at // 10 % 3)
    out = {}
    for how in ("grouped", "sdpa", "eager"):
        lively.backbone.set_attn_implementation(how)
        with torch.no_grad():
            out[how] = [lively(kind, ids, states, **left)[kind != PAD], lively(kind, ids, states),
                        lively(kind, ids, states, **trees)]
    for how in ("sdpa", "eager"):
        for a, b in zip(out["grouped"], out[how], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(out["sdpa"][1], out["sdpa"][2], atol=1e-2)


# ---------------------------------------------------------------- what learns

@pytest.mark.parametrize("adapter", [Adapter(rank=4), Adapter(full=True)], ids=str)
def test_our_weights_learn_and_no_other(adapter, tiny):
    tiny.adapt(adapter)
    names = set(tiny.own_parameters())
    for n, p in tiny.named_parameters():
        assert p.requires_grad == (n in names) == (adapter.full or "lora_" in n or not n.startswith("backbone."))


def test_an_adapter_comes_once(tiny):
    with pytest.raises(ValueError, match="already has Adapter"):
        tiny.adapt().adapt()


def test_seeds_decide_the_initial_weights_whatever_the_global_generator():
    def make(seed, global_seed):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            return own(fresh(seed=seed).adapt(Adapter(rank=4), seed=seed))

    a, b, c = make(0, 1), make(0, 2), make(1, 1)
    assert equal(a, b)
    fixed = ("norm", "lora_B", "word_head.out.weight")
    random = {n for n in a if "weight" in n and not any(f in n for f in fixed)}
    assert random and not any(torch.equal(a[n], c[n]) for n in random)


# ---------------------------------------------------------------- words

def test_logits_among_some_words_are_those_of_all(lively):
    h, among = torch.rand(3, 64, generator=torch_rng(0)), torch.tensor([200, 3, 3, 77])
    s = torch.rand(3, 10, generator=torch_rng(1))
    outspoken(lively)
    with torch.no_grad():
        for about in ((), (s,)):
            some, every = lively.text_logits(h, *about, among=among), lively.text_logits(h, *about)
            torch.testing.assert_close(some, every[:, among])


def test_words_about_a_state_are_those_of_a_hidden_vector_that_was_moved(lively):
    outspoken(lively)
    g = torch_rng(0)
    h, s = torch.randn(5, 64, generator=g), torch.rand(5, 10, generator=g) - .5
    table = lively.backbone.get_input_embeddings().weight
    with torch.no_grad():
        want = (h + lively.word_head(h, lively.features(s))) @ table.T
        got, plain = lively.text_logits(h, s), lively.text_logits(h)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(plain, h @ table.T, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-2)


def test_only_words_about_a_known_state_are_moved(lively):
    outspoken(lively)
    g = torch_rng(0)
    h, s = torch.randn(2, 3, 64, generator=g), torch.rand(2, 3, 10, generator=g) - .5
    known = torch.tensor([[True, False, True], [False, False, True]])
    with torch.no_grad():
        got, moved, plain = lively.text_logits(h, s, known=known), lively.text_logits(h, s), lively.text_logits(h)
        some = lively.text_logits(h, s, among=torch.tensor([7, 3]), known=known)
    assert torch.equal(got, torch.where(known[..., None], moved, plain)) and not torch.allclose(moved, plain, atol=1e-2)
    torch.testing.assert_close(some, got[..., [7, 3]])


# ---------------------------------------------------------------- what the model reads

def test_embeddings_begin_as_words(tiny):
    table = tiny.backbone.get_input_embeddings().weight.detach()

    def word(text):
        return table[tiny.tokenizer(text, add_special_tokens=False).input_ids].mean(0)

    e = tiny.state_embed
    with torch.no_grad():
        at_zero = e(torch.zeros(1, e.linear.in_features)) - e.scale * e.out(torch.nn.functional.gelu(e.bend.bias))
    torch.testing.assert_close(at_zero[0], word(" state"), atol=1e-5, rtol=1e-4)
    added = tiny.action_embed.weight.detach() - word(" action")
    assert .9 < added.pow(2).mean().sqrt() / table.pow(2).mean().sqrt() < 1.1


def test_features_are_of_normalised_states_up_to_ten_standard_deviations(tiny):
    n = Normaliser(tuple(i / 10 for i in range(10)), tuple(.1 + i / 20 for i in range(10)))
    tiny.normalise(n)
    s = numpy_rng(0, "features").uniform(-1, 1, (30, 10))
    s[0, 3], s[1, 0], s[2, :] = 5., -1e3, 1e30
    want = torch.from_numpy(np.clip((s - np.array(n.mean)) / np.array(n.std), -10, 10)).float()
    got = tiny.features(torch.from_numpy(s).float())
    torch.testing.assert_close(got, tiny.state_features(want, want), rtol=1e-3, atol=1e-4)


def test_each_kind_reads_its_own_column_only(lively):
    kind, ids, states = sequence(lively)
    h = hidden(lively, kind, ids, states)
    other = torch.where((kind != STATE)[:, None], 9., states)
    assert torch.equal(hidden(lively, kind, ids, other), h)
    noise = torch.where(kind == STATE, 3, ids)
    assert torch.equal(hidden(lively, kind, noise, states), h)
    for k in (TEXT, ACTION):
        changed, at = ids.clone(), int((kind == k).nonzero()[0, 0])
        changed[at] = (changed[at] + 1) % 40
        new = hidden(lively, kind, changed, states)
        assert torch.equal(new[:at], h[:at]) and not torch.allclose(new[at:], h[at:])   # and nobody sees the future


def test_continuous_actions_are_read_where_actions_are(cache):
    lm = liven(fresh(codec=ContinuousActions((-1., 0.), (1., 2.))))
    kind, ids, states = sequence(lm)
    actions = torch.from_numpy(lm.codec.sample(numpy_rng(0, "a"), len(kind)))
    h = hidden(lm, kind, ids, states, actions=actions[None])
    elsewhere = torch.where((kind != ACTION)[:, None], 99., actions)
    assert torch.equal(hidden(lm, kind, ids, states, actions=elsewhere[None]), h)
    assert torch.equal(hidden(lm, kind, torch.where(kind == TEXT, ids, 0), states, actions=actions[None]), h)
    at = int((kind == ACTION).nonzero()[0, 0])
    changed = actions.clone()
    changed[at] += .5
    new = hidden(lm, kind, ids, states, actions=changed[None])
    assert torch.equal(new[:at], h[:at]) and not torch.allclose(new[at:], h[at:])
    assert lm.action_outputs(h, states).shape == (len(kind), 5)
    with pytest.raises(ValueError, match="no action vectors"):
        hidden(lm, kind, ids, states)


def test_the_tree_mask_is_that_of_a_loop():
    g = numpy_rng(0, "tree")
    tree, branch = np.repeat([[0, 0, 1, -1], [0, 1, 2, 2]], 6, 1), g.integers(0, 3, (2, 24))
    at = g.integers(0, 9, (2, 24))
    for window in (None, 3):
        given = (torch.from_numpy(x) for x in (tree, branch))
        mask = tree_attention_mask(*given, torch.float64, torch.from_numpy(at), window)
        assert mask.shape == (2, 1, 24, 24) and mask.dtype == torch.float64
        for b, i, j in np.ndindex(2, 24, 24):
            sees = j <= i and tree[b, i] == tree[b, j] and branch[b, j] in (0, branch[b, i])
            sees = sees and (window is None or at[b, i] - at[b, j] < window)
            assert mask[b, 0, i, j] == 0 if sees else mask[b, 0, i, j] < -1e38


def test_one_tree_without_branches_is_a_plain_sequence(lively):
    kind, ids, states = sequence(lively)
    h, L = hidden(lively, kind, ids, states), len(kind)
    whole = dict(positions=torch.arange(L)[None], tree=torch.zeros(1, L, dtype=torch.long))
    for branch in ([0] * L, [0] * 5 + [1] * (L - 5)):
        same = hidden(lively, kind, ids, states, branch=torch.tensor([branch]), **whole)
        torch.testing.assert_close(same, h, atol=1e-4, rtol=1e-4)
    cut = torch.tensor([[0] * 5 + [1] * (L - 7) + [2, 2]])
    assert not torch.allclose(hidden(lively, kind, ids, states, branch=cut, **whole), h, atol=1e-3)
    with pytest.raises(ValueError, match="a tree without positions"):
        hidden(lively, kind, ids, states, branch=cut, tree=whole["tree"])


def padded(rows, left: bool):
    "Stack unpadded (kind, ids, states); padding is garbage that must not matter."
    L, B = max(len(k) for k, _, _ in rows), len(rows)
    kind, ids, states = torch.full((B, L), PAD), torch.full((B, L), 5), torch.full((B, L, 10), 3.)
    for b, (k, i, s) in enumerate(rows):
        at = slice(L - len(k), L) if left else slice(0, len(k))
        kind[b, at], ids[b, at], states[b, at] = k, i, s
    return kind, ids, states


def test_left_padded_equals_right_padded_equals_alone(lively):
    rows = [sequence(lively, i, n, t) for i, (n, t) in enumerate([(1, "a"), (4, SENTENCES[0]), (2, SENTENCES[2])])]
    alone = [hidden(lively, *r) for r in rows]
    with torch.no_grad():
        right = lively(*padded(rows, left=False))
        kind, ids, states = padded(rows, left=True)
        attend = (kind != PAD).long()
        left = lively(kind, ids, states, positions=(attend.cumsum(1) - 1).clamp(min=0), attend=attend)
        wrong = lively(kind, ids, states)
    for b, h in enumerate(alone):
        torch.testing.assert_close(right[b, :len(h)], h, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(left[b, -len(h):], h, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(wrong[0, -len(alone[0]):], alone[0], atol=1e-3)      # the comparison can fail


def test_a_cache_equals_one_pass(lively):
    kind, ids, states = sequence(lively)
    h, past, pieces = hidden(lively, kind, ids, states), None, []
    for part in (slice(0, 9), slice(9, 10), slice(10, None)):
        n = len(kind[:part.stop])
        with torch.no_grad():
            out, past = lively(kind[None, part], ids[None, part], states[None, part], past=past, use_cache=True,
                               positions=torch.arange(n)[None, part], attend=torch.ones(1, n, dtype=torch.long))
        pieces.append(out[0])
    torch.testing.assert_close(torch.cat(pieces), h, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- what it says of states

@pytest.mark.parametrize("step", [.05, tuple(.01 * i for i in range(1, 11))], ids=["one scale", "a scale each"])
def test_next_states_are_in_units_of_a_state(step, lively):
    lively.normalise(Normaliser((.1,) * 10, (.2,) * 10, step=step))
    kind, ids, states = sequence(lively)
    h = hidden(lively, kind, ids, states)
    with torch.no_grad():
        delta = lively.state_head(h, lively.features(states))
        torch.testing.assert_close(lively.predict_delta(h, states), delta)
        torch.testing.assert_close(lively.next_states(h, states), states + torch.tensor(step) * delta)
        torch.testing.assert_close(lively.features(states)[:, :10], (states - .1) / .2)
    with pytest.raises(ValueError, match="9 numbers: this model has states of 10"):
        lively.normalise(Normaliser.default(9))


def test_classes_stay_whole(cache):
    lm = liven(fresh(features=Features(one_of=((3, 4), (5, 2)))))
    lm.normalise(Normaliser((0.,) * 10, (1.,) * 10, step=5.))
    h, states = torch.randn(50, 64, generator=torch_rng(0)), torch.rand(50, 10, generator=torch_rng(1)).round()
    with torch.no_grad():
        after, delta = lm.next_states(h, states), lm.predict_delta(h, states)
    assert set(after[:, 3].tolist()) <= {0., 1., 2., 3.} and set(after[:, 5].tolist()) <= {0., 1.}
    assert len(set(after[:, 3].tolist())) > 1
    torch.testing.assert_close(after[:, [0, 4]], (states + 5 * delta)[:, [0, 4]])


# ---------------------------------------------------------------- merging

def test_merged_gives_the_weights_back_after_an_error(lively):
    before = {n: p.detach().clone() for n, p in lively.named_parameters()}
    row = sequence(lively)
    h = hidden(lively, *row)
    with pytest.raises(KeyboardInterrupt):
        with lively.merged():
            torch.testing.assert_close(hidden(lively, *row), h, atol=1e-4, rtol=1e-3)
            assert any(not torch.equal(p, before[n]) for n, p in lively.named_parameters() if n in before)
            raise KeyboardInterrupt
    assert equal(before, dict(lively.named_parameters())) and torch.equal(hidden(lively, *row), h)


# ---------------------------------------------------------------- save and load

@pytest.fixture
def saved(lively, tmp_path):
    lively.normalise(Normaliser(tuple(i / 10 for i in range(10)), (.2,) * 10, step=.07, jump=(.4,) * 10))
    lively.save_pretrained(tmp_path/"lm", dtype=None)
    return lively, tmp_path/"lm"


def test_float32_comes_back_exactly(saved):
    lm, folder = saved
    back, row = KalmLM.from_pretrained(folder), sequence(lm)
    assert equal(own(lm), own(back)) and back.normaliser == lm.normaliser and back.adapter == lm.adapter
    assert torch.equal(hidden(lm, *row), hidden(back, *row))


def test_bfloat16_comes_back_close_and_smaller(saved, tmp_path):
    lm, folder = saved
    lm.save_pretrained(tmp_path/"half")
    back, row = KalmLM.from_pretrained(tmp_path/"half"), sequence(lm)
    for a, b in zip(own(lm).values(), own(back).values()):
        torch.testing.assert_close(b, a, rtol=2**-8, atol=0)
        assert b.dtype == torch.float32
    torch.testing.assert_close(hidden(lm, *row), hidden(back, *row), rtol=.1, atol=.1)
    sizes = [(f/"model.safetensors").stat().st_size for f in (tmp_path/"half", folder)]
    assert sizes[0] < .6 * sizes[1]


def test_full_tuning_comes_back(tiny, tmp_path):
    tiny.adapt(Adapter(full=True))
    with torch.no_grad():
        for p in tiny.parameters():
            p.add_(.01)
    tiny.save_pretrained(tmp_path, dtype=None)
    row = sequence(tiny)
    assert torch.equal(hidden(KalmLM.from_pretrained(tmp_path), *row), hidden(tiny, *row))


@pytest.mark.parametrize("kw", [
    dict(state_dim=7, codec=DiscreteActions(3), features=Features(angles=(2,), one_of=((0, 3),)), hidden=16),
    dict(state_dim=3, codec=ContinuousActions((-1., 0.), (1., 5.)), features=None, domain="arm"),
    dict(prompts=dict(generate=(("Aim: {goal}",),), caption=[["a", "b"], ["c", "d"]])),
    dict(scratch=True, seed=4)], ids=str)
def test_what_a_model_knows_of_its_domain_comes_back(kw, tmp_path):
    lm = fresh(**kw)
    lm.save_pretrained(tmp_path, dtype=None)
    back = KalmLM.from_pretrained(tmp_path)
    assert back.header() == lm.header() == json.loads((tmp_path/"kalm.json").read_text()) and equal(own(lm), own(back))
    for name in ("state_dim", "codec", "features_spec", "prompts", "domain", "hidden", "weights_id"):
        assert getattr(back, name) == getattr(lm, name), name
    h, s = torch.rand(3, 64, generator=torch_rng(0)), torch.rand(3, lm.state_dim, generator=torch_rng(1))
    with torch.no_grad():
        assert torch.equal(lm.action_outputs(h, s), back.action_outputs(h, s))
        assert torch.equal(lm.next_states(h, s), back.next_states(h, s))


def test_a_backbone_that_moved_is_accepted_and_a_changed_one_is_not(saved, tmp_path):
    from safetensors.torch import load_file, save_file
    lm, folder = saved
    moved = shutil.copytree(backbone_folder("tiny-random"), tmp_path/"elsewhere")
    assert equal(own(KalmLM.from_pretrained(folder, backbone=str(moved))), own(lm))
    w = load_file(moved/"model.safetensors")
    key = next(k for k in w if "mlp" in k)
    save_file(w | {key: w[key] + .01}, moved/"model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="trained on backbone 'tiny-random'"):
        KalmLM.from_pretrained(folder, backbone=str(moved))


def test_a_fresh_model_needs_a_domain_and_a_checkpoint_brings_its_own(saved):
    with pytest.raises(ValueError, match="expected codec, state_dim of its domain"):
        KalmLM.from_pretrained("tiny-random")
    for given, what in ((dict(state_dim=10), "state_dim"), (dict(scratch=True), "weights")):
        with pytest.raises(ValueError, match=f"is a checkpoint and brings its own {what}"):
            KalmLM.from_pretrained(saved[1], **given)


# ---------------------------------------------------------------- the old format

def old_header(lm, **changes) -> dict:
    "What `kalm-lm-2` wrote."
    n, a = lm.normaliser, lm.adapter
    header = dict(format="kalm-lm-2", backbone=lm.name, layers=2, backbone_id=lm.weights_id, scratch=None, state_dim=10,
                  n_actions=40, hidden=64, pairs=True, directions=0, state_tokens=1,
                  adapter=dict(rank=a.rank, alpha=a.alpha, full=a.full, split=False, first=0),
                  normaliser=dict(mean=list(n.mean), std=list(n.std), step=.07, jump=.4))
    return header | changes


def test_an_old_checkpoint_is_read(saved):
    lm, folder = saved
    (folder/"kalm.json").write_text(json.dumps(old_header(lm)))
    back, row = KalmLM.from_pretrained(folder), sequence(lm)
    assert equal(own(back), own(lm)) and torch.equal(hidden(back, *row), hidden(lm, *row))
    assert back.domain == "clevr" and back.features_spec == POINTS and back.codec == DiscreteActions(40)
    assert back.normaliser.step == .07 and back.prompts["caption"][0] == ("What moved, and which way?", ":")
    back.save_pretrained(folder, dtype=None)
    assert json.loads((folder/"kalm.json").read_text())["format"] == FORMAT
    assert equal(own(KalmLM.from_pretrained(folder)), own(lm))


@pytest.mark.parametrize("change, name", [
    (dict(directions=8), "directions=8"), (dict(state_tokens=5), "state_tokens=5"),
    (dict(adapter=dict(rank=4, alpha=8, full=False, split=True, first=0)), "split=True"),
    (dict(adapter=dict(rank=4, alpha=8, full=False, split=False, first=1)), "first=1"), (dict(layers=1), "layers=1")])
def test_old_checkpoints_with_options_that_left_are_refused(change, name, saved):
    lm, folder = saved
    (folder/"kalm.json").write_text(json.dumps(old_header(lm, **change)))
    with pytest.raises(ValueError, match=f"{name}.*has left"):
        KalmLM.from_pretrained(folder)


def test_an_old_header_without_pairs_has_no_points(lively):
    assert upgrade_header(old_header(lively, pairs=False))["features"] == dict(points=[])


# ---------------------------------------------------------------- damage

def resign(path) -> None:
    path.with_name(path.name + ".sha256").write_text(sha256(path) + "\n")


def test_damaged_weights_are_refused(saved):
    f = saved[1]/"model.safetensors"
    whole = bytearray(f.read_bytes())
    whole[len(whole) // 2] ^= 1
    f.write_bytes(bytes(whole))
    with pytest.raises(ValueError, match="checksum"):
        KalmLM.from_pretrained(saved[1])
    for bad in (bytes(whole[:-100]), b"", b"\xff" * 50):
        f.write_bytes(bad)
        resign(f)
        with pytest.raises(ValueError, match="model.safetensors"):
            KalmLM.from_pretrained(saved[1])
    f.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        KalmLM.from_pretrained(saved[1])


def test_weights_of_another_shape_or_name_are_refused(saved):
    from safetensors.torch import load_file, save_file
    f = saved[1]/"model.safetensors"
    w = load_file(f)
    fewer = {k: v for k, v in w.items() if k != "action_embed.weight"}
    for changed, message in [
            (w | {"action_embed.weight": torch.zeros(41, 64)}, r"shape \(41, 64\), expected \(40, 64\)"),
            (w | {"stranger": torch.zeros(1)}, "stranger"), (fewer, "action_embed")]:
        save_file(changed, f)
        resign(f)
        with pytest.raises(ValueError, match=message):
            KalmLM.from_pretrained(saved[1])


REMOVE = "(removed)"
BAD_NORMALISERS = [dict(mean=[0]), dict(mean=["x"] * 10, std=[1] * 10, step=1, jump=1),
                   dict(mean=[0] * 9, std=[1] * 9, step=1, jump=1), dict(mean=[0] * 10, std=[1] * 10, step=[1], jump=1)]


CHANGES = [
    dict(format="kalm-lm-1"), dict(format=REMOVE), dict(features=REMOVE), dict(features={}),
    dict(features=dict(points=[[0, 99]])), dict(features=dict(planes=[])), dict(features=dict(points=[[0, 0]])),
    dict(backbone=REMOVE), dict(backbone="../../etc"), dict(backbone="evil/model"), dict(backbone=7),
    dict(weights_id=REMOVE), dict(weights_id="0" * 16), dict(state_dim=11), dict(state_dim="10"), dict(hidden=256),
    dict(hidden="64"), dict(actions=REMOVE), dict(actions=dict(type="discrete")), dict(actions=7),
    dict(actions=dict(type="discrete", n=41)), dict(actions=dict(type="continuous", low=[0], high=[1])),
    dict(adapter="lora"), dict(adapter=dict(rank=4, code="x")), dict(adapter=dict(rank=8)), dict(adapter=None),
    dict(prompts=REMOVE), dict(prompts=7), dict(prompts=dict(explain=3)), dict(normaliser=REMOVE),
    *[dict(normaliser=n) for n in BAD_NORMALISERS]]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_header_that_was_tampered_with_is_refused(change, saved):
    path = saved[1]/"kalm.json"
    c = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in c.items() if v != REMOVE}))
    with pytest.raises(ValueError):
        KalmLM.from_pretrained(saved[1])


@pytest.mark.parametrize("content", ["", "[]", "null", '"kalm-lm-3"', "{", "kalm"])
def test_a_header_that_is_no_header_is_refused(content, saved):
    (saved[1]/"kalm.json").write_text(content)
    with pytest.raises(ValueError, match="kalm.json"):
        KalmLM.from_pretrained(saved[1])


def test_a_threshold_belongs_to_one_checkpoint(saved):
    lm, folder = saved
    keep_threshold(folder, .7)
    assert KalmLM.from_pretrained(folder).sure == .7
    lm.sure = .4
    lm.save_pretrained(folder)   # another one by now
    assert KalmLM.from_pretrained(folder).sure == .4
    for content in ("{", "[]", "7", '{"checkpoint": "x"}'):
        (folder/"calibration.json").write_text(content)
        with pytest.raises(ValueError, match="calibration.json"):
            KalmLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="sure 2: expected"):
        keep_threshold(folder, 2)


def test_a_changed_header_is_refused(saved):
    path = saved[1]/"kalm.json"
    about = json.loads(path.read_text())
    about["normaliser"]["mean"][0] -= 9
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="kalm.json differs from what .* was stored with"):
        KalmLM.from_pretrained(saved[1])


def test_unknown_keys_in_a_header_do_nothing(saved, tmp_path):
    path, weights = saved[1]/"kalm.json", saved[1]/"model.safetensors"
    save_tensors(weights, load_tensors(weights))   # as of a version that did not keep the header's digest
    more = dict(trust_remote_code=True, auto_map={"AutoModel": "evil.py"}, path=str(tmp_path))
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    assert equal(own(KalmLM.from_pretrained(saved[1])), own(saved[0]))


@pytest.mark.parametrize("fail", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_checkpoint(fail, saved, monkeypatch):
    lm, folder = saved
    old = own(lm)
    with torch.no_grad():
        lm.action_embed.weight.add_(1)

    def full(*a):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(files.os, fail, full)
        with pytest.raises(OSError):
            lm.save_pretrained(folder, dtype=None)
    assert equal(own(KalmLM.from_pretrained(folder)), old) and not list(folder.glob(".*"))


def test_a_weight_of_the_wrong_shape_changes_none(lively):
    before = own(lively)
    wrong = {n: torch.ones_like(p) for n, p in before.items()}
    wrong[list(wrong)[-1]] = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="has shape"):
        lively.load_own(wrong)
    assert equal(own(lively), before)


@pytest.mark.parametrize("width", [1, 2])
def test_the_narrowest_model_can_be_made_saved_and_loaded(width, cache, tmp_path):
    lm = KalmLM.from_pretrained("tiny-random", state_dim=1, codec=DiscreteActions(1), hidden=width)
    lm.save_pretrained(tmp_path, dtype=None)
    assert equal(own(KalmLM.from_pretrained(tmp_path)), own(lm))
    for wrong in (dict(hidden=0), dict(hidden=2.5), dict(state_dim=0)):
        with pytest.raises(ValueError, match="expected a whole number, at least 1"):
            KalmLM.from_pretrained("tiny-random", **dict(state_dim=1, codec=DiscreteActions(1)) | wrong)
