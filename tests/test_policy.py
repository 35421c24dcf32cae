"""A model with its tokenizer: what it says of answers, and its own."""

from lib import policy
from lib.policy import load_model, sample_answers
from lib.settings import Settings

import torch

CPU = torch.device("cpu")


def test_answers_go_to_their_prompts_and_settings_reach_the_sampler(finished, monkeypatch):
    model, tokenizer = load_model(finished / "policy.pt", CPU)
    x = tokenizer.prompts([f"{'long ' * (5 - i)}prompt {i}" for i in range(5)])
    ask = lambda prompts, **changes: sample_answers(
        model, prompts, tokenizer.ends, Settings(max_new_tokens=12, **changes), CPU, "float32"
    )
    alone = [ask([p], temperature=0)[0] for p in x]
    monkeypatch.setattr(policy, "SAMPLES_AT_ONCE", 2)
    assert len(set(map(tuple, alone))) > 1 and ask(x, temperature=0) == alone
    assert (
        ask(x, temperature=0, seed=1)
        == ask(x, temperature=1e-46)
        == ask(x, top_p=1e-9)
        == ask(x, top_k=1)
        == alone
        != ask(x)
    )
    lengths = [len(prompt) + len(y) for prompt, y in zip(x, ask(x, sample_length=32))]
    assert max(lengths) <= 32 < max(len(prompt) + 12 for prompt in x)


def test_sampling_depends_on_the_seed_alone(finished, tmp_path):
    model, tokenizer = load_model(finished / "policy.pt", torch.device("cpu"))
    x = tokenizer.prompts([f"prompt {'long ' * i}" for i in range(5)])
    ask = lambda seed: sample_answers(
        model,
        x,
        tokenizer.ends,
        Settings(seed=seed, max_new_tokens=12),
        torch.device("cpu"),
        "float32",
    )
    assert ask(0) == ask(0) != ask(1)


def test_how_many_are_answered_at_once_follows_from_their_keys_and_values(finished, monkeypatch):
    """1 layer, 1 head of 8 numbers, keys and values in float32: 64 bytes a token."""
    model, _ = load_model(finished / "policy.pt", CPU)
    prompts = [[1] * n for n in (4, 20, 10, 4)]
    batches = lambda: list(policy.sample_batches(model, prompts, 12))
    assert batches() == [[1, 2, 0, 3]]
    monkeypatch.setattr(policy, "KEYS_AT_ONCE", 64 * (20 + 12) + 64)
    assert batches() == [[1], [2], [0, 3]]
    monkeypatch.setattr(policy, "KEYS_AT_ONCE", 1)
    assert batches() == [[1], [2], [0], [3]]


def test_how_many_answers_are_read_at_once_follows_from_their_tokens(finished, monkeypatch):
    """Slots are counted as attention has them: each answer takes as many as the longest row."""
    model, _ = load_model(finished / "policy.pt", CPU)
    examples = [([1] * n, [[2] * 3, [2] * 2]) for n in (2, 9, 1, 7)]
    read = lambda: policy.log_probs(model, examples, CPU, "float32")
    packed, expected = [], read()
    pack = policy.pack_rows
    monkeypatch.setattr(policy, "pack_rows", lambda some: packed.append(len(some)) or pack(some))
    for slots, sizes in ((2 * 2 * 12, [2, 2]), (2 * 2 * 12 - 1, [1, 2, 1]), (1, [1, 1, 1, 1])):
        packed.clear()
        monkeypatch.setattr(policy, "SLOTS_AT_ONCE", slots)
        torch.testing.assert_close(read(), expected)
        assert packed == sizes
