"""Sampling with a cache against sampling without one; top-p and temperature by hand."""

import math

from lib.sampling import generate, sample

import pytest
import torch
from test_model import EOS, VARIANTS, examples, make, plain_logits


def draw(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def recomputed(net, x, steps, pick):
    """Sampling without a cache: the whole sequence through the model for every token."""
    ids = list(x)
    for _ in range(steps):
        ids.append(int(pick(plain_logits(net, ids)[:, -1])))
        if ids[-1] == EOS:
            break
    return ids[len(x) :]


@pytest.mark.parametrize("sizes", VARIANTS, ids=str)
def test_cached_greedy_sampling_equals_recomputation(sizes):
    net = make(**sizes)
    prompts = [x for x, _ in examples(seed=3, n=8)]
    answers = generate(net, prompts, 12, [EOS], temperature=0)
    assert answers == [recomputed(net, x, 12, lambda logits: logits.argmax(-1)) for x in prompts]


def test_a_prompt_is_computed_once_for_all_its_answers(monkeypatch):
    net, computed = make(), []
    hidden = net.hidden

    def counted(tokens, *where, **caches):
        computed.append(len(tokens))
        return hidden(tokens, *where, **caches)

    monkeypatch.setattr(net, "hidden", counted)
    uniforms = torch.stack([draw(5, seed) for seed in range(16)])
    many = generate(net, [[1, 2, 3]] * 16, 5, [EOS], uniforms=uniforms)
    assert computed[0] == 3 and len(set(map(tuple, many))) > 8
    assert many == [generate(net, [[1, 2, 3]], 5, [EOS], uniforms=u[None])[0] for u in uniforms]


def test_cached_random_sampling_equals_recomputation():
    net = make()
    for seed, top_p in ((0, 1.0), (1, 0.7)):
        uniforms = draw(20, seed)
        each = iter(uniforms.split(1))
        pick = lambda logits: sample(logits, 1.3, top_p, next(each))
        expected = recomputed(net, [1, 2, 3], 20, pick)
        assert generate(net, [[1, 2, 3]], 20, [EOS], 1.3, top_p, uniforms[None]) == [expected]


def test_a_token_is_drawn_where_the_sum_of_probabilities_passes_the_number():
    logits = torch.tensor([[0.5, 0.0, 0.25, 0.25, 0.0]]).log().repeat(6, 1)
    last = 1 - 2**-24  # the largest float32 below 1
    drawn = sample(logits, 1.0, 1.0, torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, last]))
    assert drawn.tolist() == [0, 0, 2, 2, 3, 3]


def test_an_answer_does_not_depend_on_the_prompts_beside_it():
    net = make()
    prompts, uniforms = [x for x, _ in examples(seed=3, n=8)], draw(8 * 12).view(8, 12)
    together = generate(net, prompts, 12, [EOS], uniforms=uniforms)
    alone = [generate(net, [x], 12, [EOS], uniforms=u[None])[0] for x, u in zip(prompts, uniforms)]
    assert together == alone and len(set(map(tuple, together))) > 4


def test_sampling_stops_at_eos_each_row_for_itself():
    net = make()
    prompts = [[i] for i in range(12)]
    full = generate(net, prompts, 30, ends=[-1], temperature=0)
    eos = full[0][5]
    for y, free in zip(generate(net, prompts, 30, [eos], temperature=0), full):
        assert y == (free[: free.index(eos) + 1] if eos in free else free)
    assert all(len(y) == 30 for y in full)


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    for top_p, kept in ((1e-50, 1), (0.4, 1), (0.6, 2), (0.81, 3), (1.0, 4)):
        drawn = sample(logits, 1.0, top_p, draw(4000))
        assert set(drawn.tolist()) == set(range(kept))
    share = (drawn == 0).float().mean().item()
    assert share == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 4000))


def test_top_k_keeps_the_most_probable_tokens_and_top_p_works_among_them():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().repeat(4000, 1)
    for top_k, top_p, kept in (
        (0, 1, 4),
        (1, 1, 1),
        (3, 1, 3),
        (9, 1, 4),
        (2, 0.5, 1),
        (3, 0.6, 2),
    ):
        drawn = sample(logits, 1.0, top_p, draw(4000), top_k)
        assert set(drawn.tolist()) == set(range(kept)), (top_k, top_p)
    drawn = sample(logits, 1.0, 1.0, draw(4000), top_k=2)
    assert (drawn == 0).float().mean().item() == pytest.approx(4 / 7, abs=0.03)


def test_prompt_and_answer_together_are_no_longer_than_asked():
    net = make()
    prompts = [list(range(1, n)) for n in (3, 9, 15, 20)]
    free = generate(net, prompts, 8, ends=[-1], temperature=0)
    cut = generate(net, prompts, 8, ends=[-1], temperature=0, longest=18)
    assert [len(y) for y in cut] == [8, 8, 4, 1]
    assert all(y == whole[: len(y)] for y, whole in zip(cut, free))
    eos = free[0][2]
    for y, whole in zip(generate(net, prompts, 8, [eos], 0, longest=18), cut):
        assert y == (whole[: whole.index(eos) + 1] if eos in whole else whole)


def test_temperature_sharpens():
    logits = torch.tensor([[0.6, 0.4]]).log().repeat(4000, 1)
    cold = sample(logits, 0.5, 1.0, draw(4000))
    assert (cold == 0).float().mean().item() == pytest.approx(0.36 / 0.52, abs=0.03)
    assert sample(logits, 1e-40, 1.0, draw(4000)).eq(0).all(), (
        "so cold that logits / temperature would overflow"
    )
