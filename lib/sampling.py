"""Sampling: one answer to each of many prompts at once, with a cache of keys and values."""

import torch

from model import move, pack_rows


@torch.no_grad()
def generate(
    model, prompts, max_new_tokens, ends, temperature=1.0, top_p=1.0, uniforms=None, top_k=0,
    longest=None, heard=None,
):  # fmt: skip
    """One sampled answer per prompt (lists of token ids). It ends in one of `ends` (token ids)
    where that came within max_new_tokens, and before prompt and answer were `longest` tokens; but
    each has one token at least.

    Prompts of different lengths are padded on the right. New tokens go behind the longest
    prompt for all of them, each at its own position. temperature = 0 takes the most probable
    token; top_k > 0 samples from as many most probable tokens, top_p < 1 then from the smallest set
    of these whose probabilities sum to top_p. uniforms (R, max_new_tokens), from [0, 1): the random
    number that each token is drawn with, so that an answer does not depend on the others; left out,
    they are new ones. heard: a function that gets the tokens of each step, as they are sampled.
    """
    device = model.embedding.weight.device
    if uniforms is None:
        uniforms = torch.rand(len(prompts), max_new_tokens)
    uniforms = uniforms.to(device)
    rows = move(pack_rows([(x, [[]]) for x in prompts]), device)
    R, L = rows.sequences.shape
    model.config.check_length(L + max_new_tokens)
    length = torch.tensor([len(x) for x in prompts], device=device)
    column = torch.arange(L + max_new_tokens, device=device)
    caches = [Cache(L + max_new_tokens) for _ in model.blocks]
    hidden = model.hidden(rows.tokens, rows.position, [rows.sequences], rows.slot, caches=caches)
    hidden = hidden[rows.sequences.gather(1, length[:, None] - 1).squeeze(1)]  # (R, d)
    # (R, columns): a prompt's own tokens, and everything that is sampled
    seen = (column < length[:, None]) | (column >= L)
    ends = torch.tensor(ends, device=device)
    answers = ends[0].expand(R, max_new_tokens).clone()
    room = torch.full_like(length, max_new_tokens)  # (R,) tokens for an answer
    if longest:
        room = room.minimum(longest - length).clamp(min=1)
    most = int(room.max())
    row = torch.arange(R, device=device)  # which prompts are still in the batch
    ended = torch.zeros(R, dtype=torch.bool, device=device)
    for t in range(most):
        logits = model.head(hidden).float()
        token = sample(logits, temperature, top_p, uniforms[row, t], top_k)
        answers[row, t] = token
        if heard:
            heard(token)
        ended |= torch.isin(token, ends) | (room[row] <= t + 1)
        unfinished = (~ended).nonzero().squeeze(1)
        if not len(unfinished):
            break
        if len(unfinished) <= len(ended) // 2:  # the others only cost time
            state = row, token, length, seen, ended
            row, token, length, seen, ended = (x[unfinished] for x in state)
            for cache in caches:
                cache.select(unfinished)
        slot = torch.arange(len(row), device=device)
        visible = seen[:, None, None, : L + t + 1]
        hidden = model.hidden(token, length + t, [slot[:, None]], slot, visible, caches)
    lengths = (torch.isin(answers, ends).cumsum(1) == 0).sum(1) + 1  # with the end, where it came
    return [y[:n] for y, n in zip(answers.tolist(), lengths.minimum(room).tolist())]


class Cache:
    """Keys and values of one layer, (R, heads, columns, D), filled from the left."""

    def __init__(self, columns):
        self.columns, self.filled, self.keys, self.values = columns, 0, None, None

    def extend(self, k, v):
        """Add columns; returns all that are filled."""
        if self.keys is None:
            shape = *k.shape[:2], self.columns, k.shape[3]
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        new = slice(self.filled, self.filled + k.shape[2])
        self.keys[:, :, new], self.values[:, :, new] = k, v
        self.filled = new.stop
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def select(self, rows):
        """Only these rows from now on."""
        k, v = self.keys[:, :, : self.filled][rows], self.values[:, :, : self.filled][rows]
        self.keys, self.values, self.filled = None, None, 0
        self.extend(k, v)


def sample(logits, temperature, top_p, uniform, top_k=0):
    """logits (R, V) → one token for each row, (R,): that where the probabilities' sum from the left
    passes uniform, (R,) float32 from [0, 1)."""
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)  # no overflow at a low temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.div_(temperature).softmax(-1)
    if top_p < 1:
        descending, token = probs.sort(-1, descending=True)
        before = descending.cumsum(-1) - descending
        outside = before >= top_p  # more probable tokens reach top_p without this one
        outside[..., 0] = False
        probs = probs.scatter(-1, token, descending.masked_fill(outside, 0.0))
    below = probs.cumsum(-1, dtype=torch.float64)  # there uniform · the last is less than the last
    return torch.searchsorted(below, below[:, -1:] * uniform[:, None], right=True).squeeze(1)
