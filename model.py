"""A small transformer of today's kind, in the family that Llama, Mistral and Qwen2 checkpoints belong to.

RMSNorm, rotary positions, grouped-query attention, SwiGLU; optional bias on q, k, v; a tied or a separate head.

The model's forward gives log π(y | x) of every answer in a batch of rows. A row holds a prompt once, and behind it each
of the answers to it; branches keep the answers apart:

    tokens     p p p p  w w w <eos>  l l <eos>
    branch     0 0 0 0  1 1 1 1      2 2 2
    position   0 1 2 3  4 5 6 7      4 5 6

A key is visible to a query if it is not later in the row, and its branch is 0 or the query's own. So each answer sees
the prompt and itself, as if it stood in a row of its own: exact, without computing the prompt twice.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**23  # elements; the head works through the answer tokens in chunks of this size


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    n_layer: int = 3
    n_head: int = 4
    n_kv_head: int = 2
    d_model: int = 128
    d_ff: int = 256
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    tied_head: bool = False

    def __post_init__(self):
        if self.d_model % self.n_head or (self.d_model // self.n_head) % 2:
            raise ValueError(f"d_model {self.d_model} must be n_head {self.n_head} times an even head size")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")


# ---------------------------------------------------------------------------------------------------------------------
# Rows: prompts with their answers, packed


class Rows(NamedTuple):
    """R rows of length L, padded on the right, holding A answers with N answer tokens in all."""

    tokens: torch.Tensor  # (R, L) int64
    branch: torch.Tensor  # (R, L) int64: 0 prompt, 1, 2, … answers
    position: torch.Tensor  # (R, L) int64: where the token would stand if its answer alone followed the prompt
    source: torch.Tensor  # (N,) int64: flat index into R·L of the token that predicts the n-th answer token
    target: torch.Tensor  # (N,) int64: the n-th answer token
    answer: torch.Tensor  # (N,) int64: which of the A answers it belongs to, counted row by row
    length: torch.Tensor  # (A,) int64: tokens of each answer

    def to(self, device):
        return Rows(*(t.to(device, non_blocking=True) for t in self))


def pack_rows(examples):
    """Rows of [(prompt ids, [answer ids, …]), …]. Prompts and answers are not empty; an answer's EOS is among its ids.

    Padding needs no mask of its own: it stands behind every real token, where none can see it.
    """
    width = max(len(x) + sum(map(len, answers)) for x, answers in examples)
    tokens, branch, position, source, target, answer, length = [], [], [], [], [], [], []
    for r, (x, answers) in enumerate(examples):
        row, marks, places = list(x), [0] * len(x), list(range(len(x)))
        for b, y in enumerate(answers, 1):
            start = r * width + len(row)
            source += [r * width + len(x) - 1, *range(start, start + len(y) - 1)]  # the prompt's last token predicts y[0]
            answer += [len(length)] * len(y)
            target += y
            length.append(len(y))
            row += y
            marks += [b] * len(y)
            places += range(len(x), len(x) + len(y))
        pad = [0] * (width - len(row))
        tokens.append(row + pad)
        branch.append(marks + pad)
        position.append(places + pad)
    return Rows(*map(torch.tensor, (tokens, branch, position, source, target, answer, length)))


def visible_keys(branch):
    """branch (R, L) → (R, 1, L, L) bool: may query i see key j."""
    L = branch.shape[1]
    causal = torch.ones(L, L, dtype=torch.bool, device=branch.device).tril()
    query, key = branch[:, :, None], branch[:, None, :]
    return (causal & ((key == 0) | (key == query)))[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()  # the mean of squares overflows in fp16
        return self.weight * (x32 * torch.rsqrt((x32 * x32).mean(-1, keepdim=True) + self.eps)).type_as(x)


def rotate(x, cos, sin):
    """Rotary positions on x (R, heads, L, D): the halves of each head are the two coordinates of D/2 planes."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).type_as(x)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head, self.n_kv_head, self.d_head = c.n_head, c.n_kv_head, c.d_model // c.n_head
        self.qkv = nn.Linear(c.d_model, (c.n_head + 2 * c.n_kv_head) * self.d_head, bias=c.qkv_bias)
        self.out = nn.Linear(c.d_model, c.d_model, bias=False)

    def forward(self, x, rotary, visible, cache=None):
        R, L, _ = x.shape
        qkv = self.qkv(x).view(R, L, -1, self.d_head).transpose(1, 2)  # (R, heads, L, D)
        qk, v = qkv.split((self.n_head + self.n_kv_head, self.n_kv_head), 1)
        q, k = rotate(qk, *rotary).split((self.n_head, self.n_kv_head), 1)
        if cache is not None:
            k, v = cache.extend(k, v)
        group = self.n_head // self.n_kv_head
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q.contiguous(), k, v, attn_mask=visible)  # compiled backwards ask for contiguous
        return self.out(y.transpose(1, 2).reshape(R, L, -1))


class SwiGLU(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_up = nn.Linear(c.d_model, 2 * c.d_ff, bias=False)
        self.down = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(c.d_model, c.norm_eps), Attention(c)
        self.mlp_norm, self.mlp = RMSNorm(c.d_model, c.norm_eps), SwiGLU(c)

    def forward(self, x, rotary, visible, cache=None):
        x = x + self.attention(self.attention_norm(x), rotary, visible, cache)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.tied_head:
            self.head.weight = self.embedding.weight
        self.apply(self._init)

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, rows):
        """log π(y | x) of every answer in the rows: (A,) float32, nats, summed over the answer's tokens."""
        hidden = self.hidden(rows.tokens, rows.position, visible_keys(rows.branch)).flatten(0, 1)  # (R·L, d)
        logps = token_logps(hidden[rows.source], self.head.weight, rows.target)
        return logps.new_zeros(len(rows.length)).index_add(0, rows.answer, logps)

    def hidden(self, tokens, position, visible, caches=None):
        """tokens, position (R, L), visible (R, 1, L, keys) → hidden states after the last norm, (R, L, d)."""
        x = self.embedding(tokens)
        rotary = self.rotary(position)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, visible, caches and caches[i])
        return self.norm(x)

    def rotary(self, position):
        """What `rotate` multiplies with: cos and ±sin of each position's angles, (R, 1, L, D), float32."""
        half = self.config.d_model // self.config.n_head // 2
        frequency = self.config.rope_theta ** (-torch.arange(half, device=position.device) / half)
        angle = position[:, None, :, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, eos, temperature=1.0, top_p=1.0, generator=None):
        """One sampled answer per prompt (lists of token ids), EOS included where it came within max_new_tokens.

        Prompts of different lengths are padded on the right; new tokens go behind the longest one for all of them, each
        at its own position. temperature = 0 takes the most probable token; top_p < 1 samples from the smallest set of
        tokens whose probabilities sum to top_p.
        """
        device = self.embedding.weight.device
        rows = pack_rows([(x, []) for x in prompts]).to(device)
        R, L = rows.tokens.shape
        length = torch.tensor([len(x) for x in prompts], device=device)
        column = torch.arange(L + max_new_tokens, device=device)
        caches = [Cache(L + max_new_tokens) for _ in self.blocks]
        hidden = self.hidden(rows.tokens, rows.position, visible_keys(rows.branch), caches)
        hidden = hidden[torch.arange(R, device=device), length - 1]  # (R, d)
        seen = (column < length[:, None]) | (column >= L)  # (R, columns): the prompt, and what is sampled
        answers = torch.full((R, max_new_tokens), eos, device=device)
        ended = torch.zeros(R, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            token = sample(self.head(hidden).float(), temperature, top_p, generator).masked_fill(ended, eos)
            answers[:, t] = token
            ended |= token == eos
            if ended.all() or t + 1 == max_new_tokens:
                break
            visible = seen[:, None, None, : L + t + 1]
            hidden = self.hidden(token[:, None], (length + t)[:, None], visible, caches)[:, 0]
        answers = answers.tolist()
        return [y[: y.index(eos) + 1] if eos in y else y for y in answers]


class Cache:
    """Keys and values of one layer, (R, heads, columns, D), filled from the left."""

    def __init__(self, columns):
        self.columns, self.filled, self.keys, self.values = columns, 0, None, None

    def extend(self, k, v):
        if self.keys is None:
            self.keys, self.values = (t.new_empty(*t.shape[:2], self.columns, t.shape[3]) for t in (k, v))
        start, self.filled = self.filled, self.filled + k.shape[2]
        self.keys[:, :, start : self.filled], self.values[:, :, start : self.filled] = k, v
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]


def sample(logits, temperature, top_p, generator):
    """logits (R, V) → one token for each row, (R,)."""
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(-1)
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # no overflow, however cold
    if top_p < 1:
        descending, token = probs.sort(-1, descending=True)
        outside = descending.cumsum(-1) - descending >= top_p  # those before it reach top_p without it
        outside[..., 0] = False
        probs = probs.scatter(-1, token, descending.masked_fill(outside, 0.0))
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities, without ever holding all logits


def token_logps(hidden, head, target):
    """log-softmax(hidden · headᵀ) at target: hidden (N, d), head (V, d), target (N,) → (N,) float32, nats.

    Works through chunks of LOGITS_AT_ONCE elements; if there are several, the backward pass computes a chunk's logits
    again.
    """
    size = max(1, LOGITS_AT_ONCE // len(head))
    if len(hidden) <= size:
        return _chunk_logps(hidden, head, target)
    chunks = zip(hidden.split(size), target.split(size))
    return torch.cat([checkpoint(_chunk_logps, h, head, t, use_reentrant=False) for h, t in chunks])


def _chunk_logps(hidden, head, target):
    return -F.cross_entropy(F.linear(hidden, head).float(), target, reduction="none")
