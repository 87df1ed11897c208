"The backbone stays what it was, checkpoints come back as they went, and what does not belong is refused."
import json
import shutil
import socket

import numpy as np
import pytest
import torch

from conftest import liven, make_rollouts
from kalm.core import numpy_rng, sha256, torch_rng
from kalm.embeddings import (ACTION, BLUR, DISTANCES, FORMAT, PAD, STATE, TEXT, Adapter, KalmLM, Normaliser, Pairs, StateEmbedding, Head, backbone_folder, family, fingerprint,
                             grouped_attention, load_backbone)

pytestmark = pytest.mark.usefixtures("cache")

SENTENCES = ["Move the red ball behind the blue ball.", "Short.", "Could you, if it is no trouble, bring the cyan ball round to the left of the green one?"]

def sequence(lm, seed=0, steps=3, text="Goal: x Rollout:"):
    "One unpadded mixed sequence: kind (L,), ids (L,), states (L, S)."
    g = torch_rng(seed, "sequence"); ids = lm.tokenizer(text, add_special_tokens=False).input_ids
    kind = torch.tensor([TEXT] * len(ids) + [STATE, ACTION] * steps + [STATE])
    id_ = torch.cat([torch.tensor(ids), torch.randint(0, 40, (2 * steps + 1,), generator=g)])
    return kind, id_, torch.rand(len(kind), 10, generator=g) - .5

def hidden(lm, kind, ids, states, **kw):
    with torch.no_grad(): return lm(kind[None], ids[None], states[None], **kw)[0]

def own(lm): return {n: p.detach().clone() for n, p in lm.own_parameters().items()}

def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def awake(lm, adapter, seed=0):
    "An adapter that does something."
    lm.adapt(adapter); g = torch_rng(seed, "awake")
    with torch.no_grad():
        for n, p in lm.own_parameters().items():
            if "lora_B" in n: p.copy_(.2 * torch.randn(p.shape, generator=g))
    return lm.eval()

def outspoken(lm, seed=0):
    "A word head that has something to say."
    with torch.no_grad(): lm.word_head.out.weight.copy_(.3 * torch.randn(lm.word_head.out.weight.shape, generator=torch_rng(seed, "outspoken")))
    return lm

def lora(lm, name): return {n: p for n, p in lm.named_parameters() if "lora_" in n and f".{name}." in n}


# ---------------------------------------------------------------- parity on plain text

def text_parity(lm, backbone):
    backbone.set_attn_implementation(lm.backbone.config._attn_implementation)   # the same order of sums
    for text in SENTENCES:
        ids = lm.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            want = backbone(input_ids=ids).logits
            h = lm(torch.full_like(ids, TEXT), ids, torch.zeros(*ids.shape, 10)); got = lm.text_logits(h)
            if not lm.word_head.out.weight.any() and not torch.equal(lm.text_logits(h, torch.rand(*ids.shape, 10, generator=torch_rng(0))), got): return False
        if not torch.equal(got, want): return False
    return True

@pytest.mark.parametrize("adapter", [Adapter(rank=4), Adapter(rank=4, split=True), Adapter(rank=4, first=1)], ids=str)
def test_plain_text_gives_the_backbones_logits_exactly(adapter, tiny):
    backbone = load_backbone("tiny-random")[0]
    assert text_parity(tiny, backbone)
    assert not tiny.word_head.out.weight.any() and not tiny.word_head.out.bias.any()   # words about a state begin as the backbone's own
    tiny.adapt(adapter); assert text_parity(tiny, backbone)    # a new adapter changes nothing
    with tiny.merged(): assert text_parity(tiny, backbone)
    with torch.no_grad(): next(p for n, p in tiny.named_parameters() if "lora_B" in n).fill_(.1)
    assert not text_parity(tiny, backbone)                             # a trained one does

def attention_by_hand(q, k, v, mask):
    "Head by head, element by element: scores, softmax, mean."
    B, H, L, d = q.shape; out = np.zeros((B, L, H, d)); q, k, v, mask = (x.double().numpy() for x in (q, k, v, mask))
    for b in range(B):
        for h in range(H):
            g = h * k.shape[1] // H
            for i in range(L):
                w = np.exp([q[b, h, i] @ k[b, g, j] * .3 + mask[b, 0, i, j] for j in range(k.shape[2])]); out[b, i, h] = w @ v[b, g] / w.sum()
    return out

@pytest.mark.parametrize("heads, L, M", [((4, 2), 5, 5), ((6, 2), 1, 7), ((3, 3), 4, 6), ((4, 1), 5, 5)])
def test_grouped_attention_is_that_of_a_loop(heads, L, M):
    g = torch_rng(0, "attention"); (H, h) = heads; q, k, v = torch.randn(2, H, L, 3, generator=g), torch.randn(2, h, M, 3, generator=g), torch.randn(2, h, M, 3, generator=g)
    mask = torch.zeros(2, 1, L, M).masked_fill(torch.rand(2, 1, L, M, generator=g) < .4, torch.finfo(torch.float32).min); mask[..., 0] = 0
    for m in (mask, None): np.testing.assert_allclose(grouped_attention(None, q, k, v, m, .3)[0], attention_by_hand(q, k, v, torch.zeros_like(mask) if m is None else m), rtol=1e-4, atol=1e-5)

def test_quick_attention_reads_what_the_backbones_own_reads(lively):
    assert lively.backbone.config._attn_implementation == "grouped"; rows = [sequence(lively, seed=i, steps=n, text=t) for i, (n, t) in enumerate([(1, "a"), (4, SENTENCES[0])])]
    kind, ids, states = padded(rows, left=True); attend = (kind != PAD).long(); left = dict(positions=(attend.cumsum(1) - 1).clamp(min=0), attend=attend); L = kind.shape[1]
    limbs = dict(positions=torch.arange(L)[None].expand(2, L), tree=torch.arange(L)[None].expand(2, L) // 30, branch=torch.arange(L)[None].expand(2, L) // 10 % 3); out = {}
    for how in ("grouped", "sdpa", "eager"):
        lively.backbone.set_attn_implementation(how)
        with torch.no_grad(): out[how] = [lively(kind, ids, states, **left)[kind != PAD], lively(*padded(rows, left=False)), lively(kind, ids, states, **limbs)]
    for how in ("sdpa", "eager"):
        for a, b in zip(out["grouped"], out[how], strict=True): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(out["sdpa"][1], out["sdpa"][2], atol=1e-2)

def test_full_tuning_starts_at_the_backbone(tiny):
    tiny.adapt(Adapter(full=True))
    assert text_parity(tiny, load_backbone("tiny-random")[0]) and all(p.requires_grad for p in tiny.parameters()) and len(own(tiny)) == len(list(tiny.named_parameters()))

@pytest.mark.parametrize("adapter", [Adapter(rank=4), Adapter(rank=4, split=True), Adapter(rank=4, first=1)], ids=str)
def test_only_our_weights_learn(adapter, tiny):
    tiny.adapt(adapter); names = set(tiny.own_parameters())
    for n, p in tiny.named_parameters(): assert p.requires_grad == (n in names) == (("lora_" in n) or not n.startswith("backbone."))

def test_every_own_weight_gets_a_gradient(lively):
    kind, ids, states = sequence(lively); outspoken(lively)
    h = lively(kind[None], ids[None], states[None])[0]
    (lively.text_logits(h[kind == TEXT], states[kind == TEXT]).logsumexp(-1).sum() + lively.action_logits(h[kind == STATE], states[kind == STATE]).logsumexp(-1).sum() + lively.next_states(h[kind == ACTION], states[kind == ACTION]).pow(2).sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lively.own_parameters().values())
    assert all(p.grad is None for n, p in lively.named_parameters() if n not in lively.own_parameters())

def test_logits_among_some_words_are_those_of_all(lively):
    h, among = torch.rand(3, 64, generator=torch_rng(0)), torch.tensor([200, 3, 3, 77])
    s = torch.rand(3, 10, generator=torch_rng(1)); outspoken(lively)
    with torch.no_grad():
        for about in ((), (s,)): torch.testing.assert_close(lively.text_logits(h, *about, among=among), lively.text_logits(h, *about)[:, among])

def test_words_about_a_state_are_those_of_a_hidden_vector_that_was_moved(lively):
    outspoken(lively); g = torch_rng(0); h, s = torch.randn(5, 64, generator=g), torch.rand(5, 10, generator=g) - .5; table = lively.backbone.get_input_embeddings().weight
    with torch.no_grad():
        want, got, plain = (h + lively.word_head(h, lively.features(s))) @ table.T, lively.text_logits(h, s), lively.text_logits(h)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4); torch.testing.assert_close(plain, h @ table.T, atol=1e-5, rtol=1e-4); assert not torch.allclose(got, plain, atol=1e-2) and not torch.allclose(lively.text_logits(h, s.flip(0)), got, atol=1e-2)

def test_only_words_about_a_known_state_are_moved(lively):
    outspoken(lively); g = torch_rng(0); h, s, known = torch.randn(2, 3, 64, generator=g), torch.rand(2, 3, 10, generator=g) - .5, torch.tensor([[True, False, True], [False, False, True]])
    with torch.no_grad(): got, moved, plain, some = lively.text_logits(h, s, known=known), lively.text_logits(h, s), lively.text_logits(h), lively.text_logits(h, s, among=torch.tensor([7, 3]), known=known)
    assert torch.equal(got, torch.where(known[..., None], moved, plain)) and not torch.allclose(moved, plain, atol=1e-2); torch.testing.assert_close(some, got[..., [7, 3]])

def test_embeddings_begin_as_words(tiny):
    table = tiny.backbone.get_input_embeddings().weight.detach(); rms = table.pow(2).mean().sqrt()
    word = lambda text: table[tiny.tokenizer(text, add_special_tokens=False).input_ids].mean(0)
    with torch.no_grad(): nowhere = StateEmbedding.forward(tiny.state_embed, torch.zeros(1, tiny.pairs.width)) - tiny.state_embed.scale * tiny.state_embed.out(torch.nn.functional.gelu(tiny.state_embed.bend.bias))
    torch.testing.assert_close(nowhere[0], word(" state"), atol=1e-5, rtol=1e-4)
    own = tiny.action_embed.weight.detach() - word(" action"); assert .9 < own.pow(2).mean().sqrt() / rms < 1.1 and own.mean(0).abs().max() < rms < 4 * word(" action").abs().max()

def test_embeddings_are_at_the_scale_of_the_tokens(tiny):
    rms = lambda x: x.detach().pow(2).mean().sqrt()
    tokens = rms(tiny.backbone.get_input_embeddings().weight)
    s = torch.rand(200, 10, generator=torch_rng(0)) - .5
    assert .5 < rms(tiny.state_embed(tiny.features(s))) / tokens < 2.5 and .8 < rms(tiny.action_embed.weight) / tokens < 1.25


# ---------------------------------------------------------------- features

def pairs_by_hand(s):
    "Normalised states (N, 2 n) -> features, number by number."
    rows = []
    for x in np.asarray(s, float):
        p = [(x[2 * i], x[2 * i + 1]) for i in range(len(x) // 2)]; couples = [(i, j) for i in range(len(p)) for j in range(i + 1, len(p))]
        offset = [(p[i][0] - p[j][0], p[i][1] - p[j][1]) for i, j in couples]; far = [np.sqrt(a * a + b * b + 1e-6) for a, b in offset]
        mark = [[np.exp(-((d - m) / BLUR)**2) for m in DISTANCES] for d in far]
        rows.append([*x, *(v for o in offset for v in o), *(m for ms in mark for m in ms), *(m * v / d for o, d, ms in zip(offset, far, mark) for m in ms for v in o)])
    return np.array(rows)

@pytest.mark.parametrize("state_dim", [2, 4, 10])
def test_pairs_are_those_of_a_loop(state_dim):
    s = 1.2 * numpy_rng(0, "pairs").normal(size=(20, state_dim)); n = state_dim // 2; want = pairs_by_hand(s)
    f = Pairs(state_dim); got = f(torch.from_numpy(s).float()); assert f.width == want.shape[1] == state_dim + n * (n - 1) // 2 * 11
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5); torch.testing.assert_close(f(torch.from_numpy(s).float()[None, :, None]), got[None, :, None]); assert not list(f.parameters()) and not f.state_dict()

def test_balls_in_one_place_have_finite_features_and_gradients():
    s = torch.zeros(1, 10, requires_grad=True); f = Pairs(10)(s); f.sum().backward(); assert f.isfinite().all() and s.grad.isfinite().all()

def test_features_are_of_normalised_states_up_to_ten_spreads(tiny):
    n = Normaliser(tuple(i / 10 for i in range(10)), tuple(.1 + i / 20 for i in range(10))); tiny.normalise(n); s = numpy_rng(0, "features").uniform(-1, 1, (30, 10))
    s[0, 3], s[1, 0], s[2, :] = 5., -1e3, 1e30
    np.testing.assert_allclose(tiny.features(torch.from_numpy(s).float()), pairs_by_hand(np.clip((s - np.array(n.mean)) / np.array(n.std), -10, 10)), rtol=1e-3, atol=1e-4)

def test_without_pairs_features_are_the_normalised_state(cache):
    lm = KalmLM.from_pretrained("tiny-random", pairs=False).normalise(Normaliser((.1,) * 10, (.2,) * 10)); s = torch.rand(5, 10, generator=torch_rng(0)) - .5
    torch.testing.assert_close(lm.features(s), (s - .1) / .2); assert lm.pairs.width == 10 and lm.state_embed.linear.in_features == 10
    odd = KalmLM.from_pretrained("tiny-random", state_dim=7, pairs=False); assert odd.features(torch.zeros(2, 7)).shape == (2, 7)
    with pytest.raises(ValueError, match="7 numbers.*pairs=False"): KalmLM.from_pretrained("tiny-random", state_dim=7)

def test_heads_are_those_of_a_loop():
    g = torch_rng(0, "heads"); head = Head(6, 4, 5, 3)
    with torch.no_grad():
        for p in head.parameters(): p.copy_(torch.randn(p.shape, generator=g))
    w = {n: p.detach().double().numpy() for n, p in head.named_parameters()}; h, f = torch.randn(7, 6, generator=g), torch.randn(7, 4, generator=g); gelu = lambda x: torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    def one(h, f):
        x = (h - h.mean()) / np.sqrt(h.var() + 1e-5) * w["norm.weight"] + w["norm.bias"]
        z = gelu((w["up.weight"] @ x + w["up.bias"]) * (1 + w["gate.weight"] @ f) + w["shift.weight"] @ f)
        return w["out.weight"] @ (z + gelu((w["mid.weight"] @ z + w["mid.bias"]) * (1 + w["gate2.weight"] @ f))) + w["out.bias"]
    with torch.no_grad(): np.testing.assert_allclose(head(h, f), [one(a, b) for a, b in zip(h.double().numpy(), f.double().numpy())], rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- a state in several elements

def in_parts(**kw): return liven(KalmLM.from_pretrained("tiny-random", state_tokens=5, **kw))

def spread_out(lm, kind, ids, states):
    "The same sequence with every state in as many elements as it has points."
    n = torch.where(kind == STATE, 5, 1); ids = torch.where(kind == STATE, 0, ids)
    at = torch.arange(len(kind)).repeat_interleave(n); part = torch.cat([torch.arange(k) for k in n])
    return kind[at], ids[at] + part, states[at]

@pytest.mark.parametrize("on", [True, False])
def test_what_is_about_a_point_is_what_changes_with_it(on):
    f = Pairs(10, on); about = f.about(10); rng = numpy_rng(0, "about"); assert about.shape == (5, f.width) and about.dtype == torch.bool
    for k in range(5):
        s = torch.from_numpy(rng.uniform(-1, 1, (50, 10))); new = s.clone(); new[:, 2 * k:2 * k + 2] += torch.from_numpy(rng.uniform(-.5, .5, (50, 2)))
        assert torch.equal((f(new) != f(s)).any(0), about[k])
    assert (about.sum(0) == torch.tensor([1] * 10 + [2] * (f.width - 10))).all()   # a number belongs to one point, a pair to two

@pytest.mark.parametrize("pairs", [True, False])
def test_every_point_has_an_element_of_its_own(pairs):
    lm = in_parts(pairs=pairs); kind, ids, states = spread_out(lm, *sequence(lm)); at = (kind == STATE).nonzero()[:, 0]; assert ids[at].tolist() == [0, 1, 2, 3, 4] * 4 and lm.part_embed.weight.shape == (5, 64)
    with torch.no_grad():
        x = lm.embed(kind[None], ids[None], states[None])[0]; f, about = lm.features(states), lm.pairs.about(10)
        for i in at: torch.testing.assert_close(x[i], lm.state_embed(torch.where(about[ids[i]], f[i], 0.)) + lm.part_embed.weight[ids[i]])
        for k in range(5):
            new = states.clone(); new[:, 2 * k] += .1; moved = (lm.embed(kind[None], ids[None], new[None])[0] - x).abs().amax(-1) > 0
            assert moved[at].tolist() == [pairs or i == k for i in ids[at]] and not moved[kind != STATE].any()

def test_parts_of_a_state_are_learnt_and_seeded():
    lm = in_parts(); kind, ids, states = spread_out(lm, *sequence(lm)); lm(kind[None], ids[None], states[None])[0].pow(2).sum().backward(); g = lm.part_embed.weight.grad
    assert (g.abs().amax(1) > 0).all() and "part_embed.weight" in lm.own_parameters() and "about" not in lm.state_dict(); table = lm.backbone.get_input_embeddings().weight
    assert .8 < lm.part_embed.weight.detach().pow(2).mean().sqrt() / table.pow(2).mean().sqrt() < 1.2 and torch.equal(in_parts().part_embed.weight, lm.part_embed.weight) and not torch.equal(in_parts(seed=1).part_embed.weight, lm.part_embed.weight)
    one = KalmLM.from_pretrained("tiny-random"); assert not hasattr(one, "part_embed") and one.shape["state_tokens"] == 1

@pytest.mark.parametrize("tokens, state_dim", [(0, 10), (2, 10), (10, 10), (-1, 10), (2, 5), (3, 7)])
def test_bad_numbers_of_elements(tokens, state_dim):
    with pytest.raises(ValueError, match=f"{tokens} tokens for a state of {state_dim} numbers"): KalmLM.from_pretrained("tiny-random", state_tokens=tokens, state_dim=state_dim, pairs=False)


# ---------------------------------------------------------------- what the model reads

def test_each_kind_reads_its_own_column_only(lively):
    kind, ids, states = sequence(lively); h = hidden(lively, kind, ids, states)
    other = states.clone(); other[kind != STATE] = 9.
    assert torch.equal(hidden(lively, kind, ids, other), h)
    noise = ids.clone(); noise[kind == STATE] = 3
    assert torch.equal(hidden(lively, kind, noise, states), h)
    for k in (TEXT, ACTION):
        changed = ids.clone(); at = (kind == k).nonzero()[0, 0]; changed[at] = (changed[at] + 1) % 40
        new = hidden(lively, kind, changed, states)
        assert torch.equal(new[:at], h[:at]) and not torch.allclose(new[at:], h[at:])   # and nobody sees the future

def test_family_is_that_of_a_loop():
    g = numpy_rng(0, "family"); tree, branch = np.repeat([[0, 0, 1, -1], [0, 1, 2, 2]], 6, 1), g.integers(0, 3, (2, 24)); mask = family(torch.from_numpy(tree), torch.from_numpy(branch), torch.float64)
    assert mask.shape == (2, 1, 24, 24) and mask.dtype == torch.float64
    for b in range(2):
        for i in range(24):
            for j in range(24):
                sees = j <= i and tree[b, i] == tree[b, j] and branch[b, j] in (0, branch[b, i])
                assert mask[b, 0, i, j] == 0 if sees else mask[b, 0, i, j] < -1e38

def test_one_tree_without_branches_is_a_plain_sequence(lively):
    kind, ids, states = sequence(lively); h = hidden(lively, kind, ids, states); L = len(kind); whole = dict(positions=torch.arange(L)[None], tree=torch.zeros(1, L, dtype=torch.long))
    for branch in ([0] * L, [0] * 5 + [1] * (L - 5)): torch.testing.assert_close(hidden(lively, kind, ids, states, branch=torch.tensor([branch]), **whole), h, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(hidden(lively, kind, ids, states, branch=torch.tensor([[0] * 5 + [1] * (L - 7) + [2, 2]]), **whole), h, atol=1e-3)

def padded(rows, left):
    "Stack unpadded (kind, ids, states); padding is garbage that must not matter."
    L = max(len(k) for k, _, _ in rows); B = len(rows)
    kind, ids, states = torch.full((B, L), PAD), torch.full((B, L), 5), torch.full((B, L, 10), 3.)
    for b, (k, i, s) in enumerate(rows):
        at = slice(L - len(k), L) if left else slice(0, len(k))
        kind[b, at], ids[b, at], states[b, at] = k, i, s
    return kind, ids, states

def test_left_padded_equals_right_padded_equals_alone(lively):
    rows = [sequence(lively, seed=i, steps=n, text=t) for i, (n, t) in enumerate([(1, "a"), (4, SENTENCES[0]), (2, SENTENCES[2])])]
    alone = [hidden(lively, *r) for r in rows]
    with torch.no_grad():
        right = lively(*padded(rows, left=False))
        kind, ids, states = padded(rows, left=True); attend = (kind != PAD).long()
        left = lively(kind, ids, states, positions=(attend.cumsum(1) - 1).clamp(min=0), attend=attend)
    for b, h in enumerate(alone):
        torch.testing.assert_close(right[b, :len(h)], h, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(left[b, -len(h):], h, atol=1e-5, rtol=1e-4)
    with torch.no_grad(): wrong = lively(kind, ids, states)   # the comparison can fail
    assert not torch.allclose(wrong[0, -len(alone[0]):], alone[0], atol=1e-3)

def test_cache_equals_one_pass(lively):
    kind, ids, states = sequence(lively); h = hidden(lively, kind, ids, states); past, pieces = None, []
    for part in (slice(0, 9), slice(9, 10), slice(10, None)):
        n = len(kind[:part.stop])
        with torch.no_grad(): out, past = lively(kind[None, part], ids[None, part], states[None, part], past=past, positions=torch.arange(n)[None, part], attend=torch.ones(1, n, dtype=torch.long), use_cache=True)
        pieces.append(out[0])
    torch.testing.assert_close(torch.cat(pieces), h, atol=1e-5, rtol=1e-4)

def test_heads_speak_in_metres_and_actions(lively):
    lively.normalise(Normaliser((.1,) * 10, (.2,) * 10, step=.05)); kind, ids, states = sequence(lively); h = hidden(lively, kind, ids, states)
    with torch.no_grad():
        torch.testing.assert_close(lively.next_states(h, states), states + .05 * lively.state_head(h, lively.features(states))); torch.testing.assert_close(lively.features(states)[:, :10], (states - .1) / .2)
        assert lively.action_logits(h, states).shape == (len(kind), 41) and lively.done == 40
    with pytest.raises(ValueError, match="9 numbers"): lively.normalise(Normaliser.default(9))

@pytest.mark.parametrize("directions, n_actions", [(8, 40), (2, 6), (5, 5)])
def test_factored_actions_are_sums_of_an_object_and_a_direction(directions, n_actions, cache):
    lm = KalmLM.from_pretrained("tiny-random", directions=directions, n_actions=n_actions); objects = n_actions // directions; g = torch_rng(0, "factored"); h, s = torch.randn(6, 64, generator=g), torch.rand(6, 10, generator=g) - .5
    with torch.no_grad(): lm.action_head.out.weight.mul_(30); z, logits = lm.action_head(h, lm.features(s)), lm.action_logits(h, s)
    assert z.shape == (6, directions + objects + 1) and logits.shape == (6, n_actions + 1) and lm.done == n_actions
    for a in range(n_actions): torch.testing.assert_close(logits[:, a], z[:, a % directions] + z[:, directions + a // directions])
    torch.testing.assert_close(logits[:, -1], z[:, -1])
    with torch.no_grad(): lm.action_head.out.bias[-1] += 5; new = lm.action_logits(h, s)   # the end is a choice of its own
    torch.testing.assert_close(new[:, :-1], logits[:, :-1]); torch.testing.assert_close(new[:, -1], logits[:, -1] + 5)
    assert lm.action_logits(h[None, :, None], s[None, :, None]).shape == (1, 6, 1, n_actions + 1)

@pytest.mark.parametrize("directions", [7, 3, 41, 100])
def test_bad_directions(directions, cache):
    with pytest.raises(ValueError, match=f"40 actions.*{directions} directions"): KalmLM.from_pretrained("tiny-random", directions=directions)

def test_normaliser_by_hand():
    r = make_rollouts(30, steps=6, least=0); n = Normaliser.fit(r)
    s = np.concatenate([one.states[:-1] for one in r]).astype(float); d = np.concatenate([np.diff(one.states, axis=0) for one in r]).astype(float)
    np.testing.assert_allclose(n.mean, s.mean(0), atol=1e-6); np.testing.assert_allclose(n.std, s.std(0) + 1e-3, atol=1e-6)
    np.testing.assert_allclose([n.step, n.jump], [d.std() + 1e-3, np.std([one.states[-1].astype(float) - one.states[0] for one in r]) + 1e-3], atol=1e-6)
    with pytest.raises(ValueError, match="empty"): Normaliser.fit(r[:0])


# ---------------------------------------------------------------- split adapters

SPLIT = Adapter(rank=4, split=True)

def test_split_adapters_act_before_states_and_elsewhere(tiny):
    "The adapter `state` where an action stands, `default` everywhere else: module by module, element by element."
    lm = awake(tiny, SPLIT); row = sequence(lm); at = row[0] == ACTION; seen = []; assert lora(lm, "state").keys() == {n.replace(".default.", ".state.") for n in lora(lm, "default")} and len(lora(lm, "state")) == 28
    hooks = [m.register_forward_hook(lambda m, x, y: seen.append((m, x[0][0], y[0]))) for m in lm.backbone.modules() if hasattr(m, "lora_A")]; hidden(lm, *row); assert len(seen) == 14
    for m, x, y in seen:
        with torch.no_grad(): want = torch.stack([m.get_base_layer()(v) + 8 * (m.lora_B[n].weight @ (m.lora_A[n].weight @ v)) for v, n in zip(x, ["state" if a else "default" for a in at])])
        torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-4)
    for hook in hooks: hook.remove()

def test_equal_adapters_are_one(tiny, cache):
    lm, one = awake(tiny, SPLIT), awake(KalmLM.from_pretrained("tiny-random"), Adapter(rank=4), seed=1); row = sequence(lm); assert not torch.allclose(hidden(lm, *row), hidden(one, *row), atol=1e-3)
    with torch.no_grad():
        for n, p in lora(one, "default").items(): lora(lm, "default")[n].copy_(p); lora(lm, "state")[n.replace(".default.", ".state.")].copy_(p)
    torch.testing.assert_close(hidden(lm, *row), hidden(one, *row), atol=1e-5, rtol=1e-4)

def test_split_adapters_learn_from_their_own_elements(tiny):
    lm = awake(tiny, SPLIT); kind, ids, states = sequence(lm); first = int((kind == ACTION).nonzero()[0, 0])
    def gradients(which):
        lm.zero_grad(set_to_none=True); lm(kind[None], ids[None], states[None])[0][which].pow(2).sum().backward()
        return {name: {n: 0. if p.grad is None else float(p.grad.abs().max()) for n, p in lora(lm, name).items()} for name in ("default", "state")}
    before = gradients(torch.arange(len(kind)) < first); assert not any(before["state"].values()) and all(before["default"].values())   # no action yet
    at, off = gradients(kind == ACTION), gradients(kind != ACTION); assert all(at["state"].values()) and all(off["default"].values())
    last = lambda g, name: [v for n, v in g[name].items() if "layers.1.mlp" in n]   # whose output nobody else reads
    assert last(at, "state") and not any(last(at, "default")) and not any(last(off, "state"))

def test_split_adapters_read_with_a_cache_too(tiny):
    lm = awake(tiny, SPLIT); kind, ids, states = sequence(lm); h = hidden(lm, kind, ids, states); past, pieces = None, []
    for i in range(len(kind)):
        with torch.no_grad(): out, past = lm(kind[None, i:i + 1], ids[None, i:i + 1], states[None, i:i + 1], past=past, positions=torch.tensor([[i]]), attend=torch.ones(1, i + 1, dtype=torch.long), use_cache=True)
        pieces.append(out[0])
    torch.testing.assert_close(torch.cat(pieces), h, atol=1e-4, rtol=1e-4)

def test_split_adapters_cannot_be_merged_but_may_be_asked(tiny):
    lm = awake(tiny, SPLIT); row = sequence(lm); before, h = {n: p.detach().clone() for n, p in lm.named_parameters()}, hidden(lm, *row)
    with lm.merged(): assert torch.equal(hidden(lm, *row), h)
    assert equal(before, dict(lm.named_parameters())) and torch.equal(hidden(lm, *row), h)

def test_first_leaves_the_blocks_before_it_alone(cache):
    blocks = lambda adapter: {n.split(".layers.")[1][0] for n in own(KalmLM.from_pretrained("tiny-random").adapt(adapter)) if "lora_" in n}
    assert blocks(Adapter(rank=2)) == {"0", "1"} and blocks(Adapter(rank=2, first=1)) == blocks(Adapter(rank=2, first=1, split=True)) == {"1"}

@pytest.mark.parametrize("adapter", [SPLIT, Adapter(rank=3, first=1), Adapter(rank=3, first=1, split=True)], ids=str)
def test_adapters_of_all_kinds_come_back(adapter, tiny, tmp_path):
    lm = awake(tiny, adapter); lm.save_pretrained(tmp_path, dtype=None); back = KalmLM.from_pretrained(tmp_path); row = sequence(lm)
    assert back.adapter == adapter and equal(own(lm), own(back)) and torch.equal(hidden(lm, *row), hidden(back, *row)) and not torch.equal(hidden(KalmLM.from_pretrained("tiny-random"), *row), hidden(lm, *row))


# ---------------------------------------------------------------- merging

def test_merged_computes_the_same_and_gives_the_weights_back(lively):
    row = sequence(lively); before = {n: p.detach().clone() for n, p in lively.named_parameters()}; h = hidden(lively, *row)
    with lively.merged():
        merged = hidden(lively, *row)
        assert any(not torch.equal(p, before[n]) for n, p in lively.named_parameters())
    torch.testing.assert_close(merged, h, atol=1e-4, rtol=1e-3)
    assert equal(before, dict(lively.named_parameters())) and torch.equal(hidden(lively, *row), h)

def test_merged_gives_the_weights_back_after_an_error(lively):
    before = {n: p.detach().clone() for n, p in lively.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        with lively.merged(): raise KeyboardInterrupt
    assert equal(before, dict(lively.named_parameters()))


# ---------------------------------------------------------------- seeds

def test_seeds_decide_the_initial_weights_whatever_the_global_generator():
    def make(seed, global_seed):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            return own(KalmLM.from_pretrained("tiny-random", seed=seed).adapt(Adapter(rank=4), seed=seed))
    a, b, c = make(0, 1), make(0, 2), make(1, 1)
    assert equal(a, b)
    random = {n for n in a if ("weight" in n and "norm" not in n and "lora_B" not in n and n != "word_head.out.weight")}
    assert random and not any(torch.equal(a[n], c[n]) for n in random)

def test_scratch_forgets_the_pretrained_weights_and_is_seeded(tiny):
    def make(seed, global_seed, **kw):
        with torch.random.fork_rng(): torch.manual_seed(global_seed); return KalmLM.from_pretrained("tiny-random", seed=seed, scratch=True, **kw)
    weights = lambda lm: {n: p.detach() for n, p in lm.backbone.named_parameters()}
    a, b, c, old = (weights(lm) for lm in (make(0, 1), make(0, 2), make(1, 1), tiny)); matrices = {n for n, p in a.items() if p.dim() > 1}
    assert a.keys() == old.keys() and equal(a, b) and len(matrices) == 15 and not any(torch.equal(a[n], other[n]) for n in matrices for other in (c, old))
    for n, p in a.items(): assert .9 < p.std() / .02 < 1.1 and p.mean().abs() < .002 if n in matrices else (p == 1).all()
    assert make(0, 1).backbone_id != tiny.backbone_id and text_parity(make(0, 1), make(0, 2).backbone) and len(make(0, 1, layers=1).backbone.model.layers) == 1

@pytest.mark.parametrize("make, message", [(lambda lm: Adapter(rank=0), "rank 0"), (lambda lm: Adapter(full=True, split=True), "split"), (lambda lm: lm.adapt().adapt(), "already")])
def test_bad_adapters(make, message, tiny):
    with pytest.raises(ValueError, match=message): make(tiny)


# ---------------------------------------------------------------- save and load

@pytest.fixture
def saved(lively, tmp_path):
    lively.normalise(Normaliser(tuple(i / 10 for i in range(10)), (.2,) * 10, step=.07, jump=.4))
    lively.save_pretrained(tmp_path/"lm", dtype=None)
    return lively, tmp_path/"lm"

def test_float32_comes_back_exactly(saved):
    lm, folder = saved; back = KalmLM.from_pretrained(folder); row = sequence(lm)
    assert equal(own(lm), own(back)) and back.normaliser == lm.normaliser and back.adapter == lm.adapter and torch.equal(hidden(lm, *row), hidden(back, *row))

def test_bfloat16_comes_back_close_and_smaller(saved, tmp_path):
    lm, folder = saved; lm.save_pretrained(tmp_path/"half"); back = KalmLM.from_pretrained(tmp_path/"half")
    for a, b in zip(own(lm).values(), own(back).values()): torch.testing.assert_close(b, a, rtol=2**-8, atol=0); assert b.dtype == torch.float32
    row = sequence(lm); torch.testing.assert_close(hidden(lm, *row), hidden(back, *row), rtol=.1, atol=.1)
    assert (tmp_path/"half"/"model.safetensors").stat().st_size < .6 * (folder/"model.safetensors").stat().st_size

def test_full_tuning_comes_back(tiny, tmp_path):
    tiny.adapt(Adapter(full=True))
    with torch.no_grad():
        for p in tiny.parameters(): p.add_(.01)
    tiny.save_pretrained(tmp_path, dtype=None); row = sequence(tiny)
    assert torch.equal(hidden(KalmLM.from_pretrained(tmp_path), *row), hidden(tiny, *row))

def test_other_state_and_action_spaces_come_back(tmp_path):
    lm = KalmLM(*load_backbone("tiny-random"), "tiny-random", state_dim=4, n_actions=7, hidden=32); lm.save_pretrained(tmp_path)
    back = KalmLM.from_pretrained(tmp_path)
    assert back.shape == dict(state_dim=4, n_actions=7, hidden=32, pairs=True, directions=0, state_tokens=1) and back.done == 7 and len(back.normaliser.mean) == 4

@pytest.mark.parametrize("kw", [dict(directions=8), dict(pairs=False), dict(pairs=False, state_dim=7, directions=3, n_actions=9), dict(state_tokens=5), dict(state_tokens=2, state_dim=4, pairs=False)], ids=str)
def test_other_maps_come_back(kw, tmp_path, cache):
    lm = outspoken(liven(KalmLM.from_pretrained("tiny-random", **kw))); lm.save_pretrained(tmp_path, dtype=None); back = KalmLM.from_pretrained(tmp_path); S = lm.shape["state_dim"]; h, s = torch.rand(3, 64, generator=torch_rng(0)), torch.rand(3, S, generator=torch_rng(1))
    assert back.shape == lm.shape and lm.shape.items() >= kw.items() and equal(own(lm), own(back))
    with torch.no_grad(): assert torch.equal(lm.text_logits(h, s), back.text_logits(h, s)) and torch.equal(lm.action_logits(h, s), back.action_logits(h, s)) and torch.equal(lm.next_states(h, s), back.next_states(h, s)) and lm.action_logits(h, s).shape == (3, lm.done + 1)

def test_a_shortened_backbone_comes_back(tmp_path):
    lm = liven(KalmLM.from_pretrained("tiny-random", layers=1)); lm.save_pretrained(tmp_path, dtype=None); back = KalmLM.from_pretrained(tmp_path)
    assert len(back.backbone.model.layers) == 1 and torch.equal(hidden(lm, *sequence(lm)), hidden(back, *sequence(lm)))
    with pytest.raises(ValueError, match="3 layers"): KalmLM.from_pretrained("tiny-random", layers=3)

@pytest.fixture
def moved(tmp_path):
    "A copy of the tiny backbone elsewhere."
    return shutil.copytree(backbone_folder("tiny-random"), tmp_path/"elsewhere")

def test_a_backbone_that_moved_is_accepted_and_a_changed_one_is_not(saved, moved):
    from safetensors.torch import load_file, save_file
    lm, folder = saved
    assert equal(own(KalmLM.from_pretrained(folder, backbone=str(moved))), own(lm))
    w = load_file(moved/"model.safetensors"); key = next(k for k in w if "mlp" in k)
    save_file(w | {key: w[key] + .01}, moved/"model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="trained on backbone 'tiny-random'"): KalmLM.from_pretrained(folder, backbone=str(moved))

def test_fingerprint_does_not_depend_on_the_float_type(tiny):
    assert fingerprint(load_backbone("tiny-random", torch.bfloat16)[0]) == fingerprint(load_backbone("tiny-random")[0]) == tiny.backbone_id

def resign(path): path.with_name(path.name + ".sha256").write_text(sha256(path) + "\n")

def test_damaged_weights_are_refused(saved):
    folder = saved[1]; f = folder/"model.safetensors"; whole = f.read_bytes()
    f.write_bytes(whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1:])
    with pytest.raises(ValueError, match="checksum"): KalmLM.from_pretrained(folder)
    for bad in (whole[:-100], b"", b"\xff" * 50):
        f.write_bytes(bad); resign(f)
        with pytest.raises(ValueError, match="model.safetensors"): KalmLM.from_pretrained(folder)
    f.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"): KalmLM.from_pretrained(folder)

def test_a_pickle_in_disguise_is_not_opened(saved, tmp_path):
    from test_core import Payload
    folder = saved[1]; torch.save(Payload(tmp_path/"owned"), folder/"model.safetensors"); resign(folder/"model.safetensors")
    with pytest.raises(ValueError, match="safetensors"): KalmLM.from_pretrained(folder)
    assert not (tmp_path/"owned").exists()

def test_weights_of_another_shape_or_name_are_refused(saved):
    from safetensors.torch import load_file, save_file
    folder = saved[1]; f = folder/"model.safetensors"; w = load_file(f)
    for change, message in [({"action_embed.weight": torch.zeros(41, 64)}, r"action_embed.weight has shape \(41, 64\), expected \(40, 64\)"), ({"stranger": torch.zeros(1)}, "stranger")]:
        save_file(w | change, f); resign(f)
        with pytest.raises(ValueError, match=message): KalmLM.from_pretrained(folder)
    save_file({k: v for k, v in w.items() if k != "action_embed.weight"}, f); resign(f)
    with pytest.raises(ValueError, match="action_embed"): KalmLM.from_pretrained(folder)

REMOVE = "(removed)"

@pytest.mark.parametrize("change", [
    dict(format="kalm-lm-1"), dict(format=REMOVE), dict(pairs=False), dict(pairs=REMOVE), dict(directions=8), dict(directions=7), dict(directions="8"), dict(directions=REMOVE), dict(state_tokens=REMOVE), dict(state_tokens=5), dict(state_tokens=3), dict(state_tokens="1"), dict(adapter=dict(rank=4, split=True)), dict(adapter=dict(rank=4, first=1)), dict(backbone=REMOVE), dict(backbone="../../etc"), dict(backbone="/etc"), dict(backbone="evil/model"), dict(backbone=7), dict(backbone_id=REMOVE),
    dict(backbone_id="0" * 16), dict(state_dim=11), dict(hidden=256), dict(hidden="512"), dict(n_actions=REMOVE), dict(layers="two"), dict(layers=99), dict(adapter="lora"), dict(adapter=dict(rank=4, code="x")),
    dict(adapter=dict(rank=8)), dict(adapter=None), dict(normaliser=REMOVE), dict(normaliser=dict(mean=[0])), dict(normaliser=dict(mean=["x"] * 10, std=[1] * 10, step=1, jump=1))], ids=str)
def test_a_header_that_was_tampered_with_is_refused(change, saved, no_network):
    path = saved[1]/"kalm.json"; KalmLM.from_pretrained(saved[1]); assert json.loads(path.read_text())["format"] == FORMAT; c = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in c.items() if v != REMOVE}))
    with pytest.raises(ValueError): KalmLM.from_pretrained(saved[1])

@pytest.mark.parametrize("content", ["", "[]", "null", '"kalm-lm-2"', "{", "kalm"])
def test_a_header_that_is_no_header_is_refused(content, saved):
    (saved[1]/"kalm.json").write_text(content)
    with pytest.raises(ValueError, match="kalm.json"): KalmLM.from_pretrained(saved[1])

def test_unknown_keys_in_a_header_do_nothing(saved, tmp_path):
    path = saved[1]/"kalm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(trust_remote_code=True, auto_map={"AutoModel": "evil.py"}, path=str(tmp_path))))
    assert equal(own(KalmLM.from_pretrained(saved[1])), own(saved[0]))

@pytest.mark.parametrize("fail", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_checkpoint(fail, saved, monkeypatch):
    import kalm.core as core
    lm, folder = saved; old = own(lm)
    with torch.no_grad(): lm.action_embed.weight.add_(1)
    def full(*a): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(core.os, fail, full)
        with pytest.raises(OSError): lm.save_pretrained(folder, dtype=None)
    assert equal(own(KalmLM.from_pretrained(folder)), old) and not list(folder.glob(".*"))


# ---------------------------------------------------------------- backbones

@pytest.fixture
def no_network(monkeypatch):
    "Any attempt to connect fails the test."
    calls = []
    def refuse(self, address): calls.append(address); raise OSError("no network in tests")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not calls, f"tried to reach {calls}"

@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "smollm2-136m", "", "../..", "a/b/c/d"])
def test_unknown_backbones_say_what_is_known(name, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="smollm2-135m.*tiny-random.*folder.*hub"): KalmLM.from_pretrained(name)

def test_code_and_pickles_in_a_backbones_folder_are_not_run(moved, tmp_path, no_network):
    from test_core import Payload
    trap = f"from pathlib import Path\nPath({str(tmp_path/'owned')!r}).touch()\n"
    (moved/"evil.py").write_text(trap + "class Evil: pass\n")
    config = json.loads((moved/"config.json").read_text())
    (moved/"config.json").write_text(json.dumps(config | dict(model_type="evil", architectures=["Evil"], auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})))
    with pytest.raises(ValueError): KalmLM.from_pretrained(moved)
    (moved/"config.json").write_text(json.dumps(config)); (moved/"model.safetensors").unlink(); torch.save(Payload(tmp_path/"owned"), moved/"pytorch_model.bin")
    with pytest.raises(ValueError): KalmLM.from_pretrained(moved)
    assert not (tmp_path/"owned").exists()

def test_two_processes_may_build_the_cache_at_once(tmp_path, monkeypatch):
    from kalm.embeddings import _publish
    def build(folder):
        (folder/"x").write_text("mine")
        (tmp_path/"out").mkdir(exist_ok=True); (tmp_path/"out"/"x").write_text("rival")   # the rival finishes first
    assert (_publish(build, tmp_path/"out")/"x").read_text() == "rival" and [p.name for p in tmp_path.iterdir()] == ["out"]
    def broken(folder): (folder/"x").write_text("half"); raise OSError(28, "No space left on device")
    with pytest.raises(OSError): _publish(broken, tmp_path/"other")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

def test_the_shipped_checkpoint_is_named_when_missing(monkeypatch, tmp_path):
    import kalm.embeddings as embeddings
    monkeypatch.setattr(embeddings, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="kalm ground"): KalmLM.grounded()
