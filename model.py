"""A small transformer of today's kind, in the family that Llama, Mistral, Qwen2 and Qwen3 checkpoints belong to.

RMSNorm, rotary positions, grouped-query attention, SwiGLU; optional bias on q, k, v, optional norms of q and k; a tied or a
separate head.

The model's forward gives log π(y | x) of every answer in a batch of prompts, each with any number of answers. A prompt's
tokens are computed once for all its answers:

    tokens     p p p p  w w w <eos>  l l <eos>
    position   0 1 2 3  4 5 6 7      4 5 6

Everything but attention works on these, one by one, without padding. Attention is causal, over one sequence an answer:

    p p p p w w w <eos>
    p p p p l l <eos> ·

A prompt's keys and values are the same in each of them, so that this is exact, and no mask is needed: the padding stands
behind every real token, where none can see it.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**25  # elements; the head works through the answer tokens in chunks of this size


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    n_layer: int = 2
    n_head: int = 4
    n_kv_head: int = 2
    d_model: int = 128
    d_ff: int = 256
    d_head: int = 0  # 0: d_model / n_head
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # rotary angles are divided by this
    rope_llama3: tuple = ()  # (low, high, length): only of planes that turn under `low` times over length, a part of them up to `high`
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head's q and k
    tied_head: bool = False
    window: int = 0  # how far back the checkpoint's attention looked, if not without limit; ours does, so that rows must be shorter

    def __post_init__(self):
        if not self.d_head:
            if self.d_model % self.n_head or (self.d_model // self.n_head) % 2:
                raise ValueError(
                    f"d_model {self.d_model} must be n_head {self.n_head} times an even head size"
                )
            object.__setattr__(self, "d_head", self.d_model // self.n_head)  # frozen
        if self.d_head % 2:
            raise ValueError(f"the head size {self.d_head} must be even")
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}"
            )

    def check_length(self, tokens):
        if 0 < self.window < tokens:
            raise ValueError(
                f"the model's sliding window is {self.window}, and rows have up to {tokens} tokens; expected shorter ones (--max_length)"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Rows: prompts with their answers, packed


class Rows(NamedTuple):
    """R prompts with A answers, N answer tokens, T tokens in all, the longest prompt and answer having L together."""

    tokens: torch.Tensor  # (T,) int64, row after row
    position: (
        torch.Tensor
    )  # (T,) int64: where the token would stand if its answer alone followed the prompt
    sequences: (
        torch.Tensor
    )  # (A, L) int64: which of the T tokens attention sees there; 0 behind the last one
    place: torch.Tensor  # (T,) int64: flat index into sequences of (one of) its places
    source: torch.Tensor  # (N,) int64: which of the T tokens predicts the n-th answer token
    target: torch.Tensor  # (N,) int64: the n-th answer token
    answer: torch.Tensor  # (N,) int64: which of the A answers it belongs to, counted row by row


def pack_rows(examples):
    """Rows of [(prompt ids, [answer ids, …]), …]. An answer's EOS is among its ids. Each prompt has an answer, if need be []."""
    L = max(len(x) + len(y) for x, answers in examples for y in answers)
    tokens, position, sequences, place, source, target, answer = ([] for _ in range(7))
    for x, answers in examples:
        prompt = range(len(tokens), len(tokens) + len(x))
        tokens += x
        position += range(len(x))
        place += range(len(sequences) * L, len(sequences) * L + len(x))
        for y in answers:
            own = range(len(tokens), len(tokens) + len(y))
            tokens += y
            position += range(len(x), len(x) + len(y))
            place += range(len(sequences) * L + len(x), len(sequences) * L + len(x) + len(y))
            source += [prompt[-1], *own][:-1]  # the prompt's last token predicts the answer's first
            target += y
            answer += [len(sequences)] * len(y)
            sequences.append([*prompt, *own] + [0] * (L - len(x) - len(y)))
    return Rows(*map(torch.tensor, (tokens, position, sequences, place, source, target, answer)))


def move(x, device):
    """A tensor, or a named tuple with tensors, on device. To CUDA it leaves from pinned memory, so that nothing waits."""
    if isinstance(x, tuple):
        return type(x)(*(move(field, device) for field in x))
    if not isinstance(x, torch.Tensor):
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()  # the mean of squares overflows in fp16
        return self.weight * (
            x32 * torch.rsqrt((x32 * x32).mean(-1, keepdim=True) + self.eps)
        ).type_as(x)


def rotate(x, cos, sin):
    """Rotary positions on x (T, heads, D): the halves of each head are the two coordinates of D/2 planes."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).type_as(x)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head, self.n_kv_head, self.d_head = c.n_head, c.n_kv_head, c.d_head
        self.qkv = nn.Linear(c.d_model, (c.n_head + 2 * c.n_kv_head) * self.d_head, bias=c.qkv_bias)
        self.qk_norms = nn.ModuleList(RMSNorm(c.d_head, c.norm_eps) for _ in range(2 * c.qk_norm))
        self.out = nn.Linear(c.n_head * c.d_head, c.d_model, bias=False)

    def forward(self, x, rotary, sequences, place, visible=None, cache=None):
        qk, v = (
            self.qkv(x)
            .unflatten(-1, (-1, self.d_head))
            .split((self.n_head + self.n_kv_head, self.n_kv_head), 1)
        )
        if self.qk_norms:
            qk = torch.cat(
                [
                    norm(x)
                    for norm, x in zip(self.qk_norms, qk.split((self.n_head, self.n_kv_head), 1))
                ],
                1,
            )
        qkv = torch.cat((rotate(qk, *rotary), v), 1)  # (T, heads, D)
        qkv = (
            qkv.index_select(0, sequences.flatten()).unflatten(0, sequences.shape).transpose(1, 2)
        )  # (A, heads, L, D)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), 1)
        if cache is not None:
            k, v = cache.extend(k, v)
        grouped = self.n_kv_head < self.n_head
        y = F.scaled_dot_product_attention(
            q, k, v, visible, is_causal=visible is None, enable_gqa=grouped
        )
        return self.out(y.transpose(1, 2).flatten(0, 1).index_select(0, place).flatten(1))


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

    def forward(self, x, *where):
        x = x + self.attention(self.attention_norm(x), *where)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.checkpointing = (
            False  # True: a block's inner values are computed again in the backward pass, not kept
        )
        self.tie()
        self.apply(self._init)

    def tie(self):
        """To be called again whenever weights were replaced."""
        if self.config.tied_head:
            self.head.weight = self.embedding.weight

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, rows):
        """log π(y | x) of every answer in the rows: (A,) float32, nats, summed over the answer's tokens."""
        hidden = self.hidden(rows.tokens, rows.position, rows.sequences, rows.place)
        logps = TokenLogps.apply(hidden[rows.source], self.head.weight, rows.target)
        return logps.new_zeros(len(rows.sequences)).index_add(0, rows.answer, logps)

    def hidden(self, tokens, position, sequences, place, visible=None, caches=None):
        """tokens, position, place (T,), sequences (A, L) → hidden states after the last norm, (T, d).

        visible (A, 1, L, keys) bool instead of a causal mask, where caches hold keys of earlier tokens.
        """
        self.config.check_length(sequences.shape[1])
        x = self.embedding(tokens)
        rotary = self.rotary(position)
        for i, block in enumerate(self.blocks):
            run = (
                functools.partial(checkpoint, block, use_reentrant=False)
                if self.checkpointing
                else block
            )
            x = run(x, rotary, sequences, place, visible, caches and caches[i])
        return self.norm(x)

    def rotary(self, position):
        """What `rotate` multiplies with: cos and ±sin of each position's angles, (T, 1, D), float32."""
        c, half = self.config, self.config.d_head // 2
        frequency = c.rope_theta ** (-torch.arange(half, device=position.device) / half)
        kept = 0.0
        if c.rope_llama3:
            low, high, length = c.rope_llama3
            kept = ((length * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = kept * frequency + (1 - kept) * frequency / c.rope_factor
        angle = position[:, None, None] * frequency
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
        rows = move(pack_rows([(x, [[]]) for x in prompts]), device)
        R, L = rows.sequences.shape
        self.config.check_length(L + max_new_tokens)
        length = torch.tensor([len(x) for x in prompts], device=device)
        column = torch.arange(L + max_new_tokens, device=device)
        caches = [Cache(L + max_new_tokens) for _ in self.blocks]
        hidden = self.hidden(rows.tokens, rows.position, rows.sequences, rows.place, caches=caches)
        hidden = hidden[length.cumsum(0) - 1]  # (R, d)
        seen = (column < length[:, None]) | (
            column >= L
        )  # (R, columns): the prompt, and what is sampled
        answers = torch.full((R, max_new_tokens), eos, device=device)
        row = torch.arange(R, device=device)  # which prompts are still in the batch
        ended = torch.zeros(R, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            token = sample(self.head(hidden).float(), temperature, top_p, generator)
            answers[row, t] = token
            ended |= token == eos
            going = (~ended).nonzero().squeeze(1)
            if not len(going) or t + 1 == max_new_tokens:
                break
            if len(going) <= len(ended) // 2:  # the others only cost time
                row, token, length, seen, ended = (
                    x[going] for x in (row, token, length, seen, ended)
                )
                for cache in caches:
                    cache.select(going)
            own = torch.arange(len(row), device=device)
            hidden = self.hidden(
                token, length + t, own[:, None], own, seen[:, None, None, : L + t + 1], caches
            )
        answers = answers.tolist()
        return [y[: y.index(eos) + 1] if eos in y else y for y in answers]


class Cache:
    """Keys and values of one layer, (R, heads, columns, D), filled from the left."""

    def __init__(self, columns):
        self.columns, self.filled, self.keys, self.values = columns, 0, None, None

    def extend(self, k, v):
        if self.keys is None:
            self.keys, self.values = (
                t.new_empty(*t.shape[:2], self.columns, t.shape[3]) for t in (k, v)
            )
        start, self.filled = self.filled, self.filled + k.shape[2]
        self.keys[:, :, start : self.filled], self.values[:, :, start : self.filled] = k, v
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def select(self, rows):
        kept = self.keys[:, :, : self.filled][rows], self.values[:, :, : self.filled][rows]
        self.keys, self.values, self.filled = None, None, 0
        self.extend(*kept)


def sample(logits, temperature, top_p, generator):
    """logits (R, V) → one token for each row, (R,)."""
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(-1)
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(
        -1
    )  # no overflow, however cold
    if top_p < 1:
        descending, token = probs.sort(-1, descending=True)
        outside = (
            descending.cumsum(-1) - descending >= top_p
        )  # those before it reach top_p without it
        outside[..., 0] = False
        probs = probs.scatter(-1, token, descending.masked_fill(outside, 0.0))
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities, without ever holding all logits


class TokenLogps(torch.autograd.Function):
    """log-softmax(hidden · headᵀ) at target: hidden (N, d), head (V, d), target (N,) → (N,) float32, nats.

    Works through chunks of LOGITS_AT_ONCE elements. The gradient is written out, ∂ logp / ∂ logits = onehot(target) − p, so
    that one chunk of p is all that is ever held: kept for the backward pass if it is the only one, else computed again.
    """

    @staticmethod
    def forward(ctx, hidden, head, target):
        ctx.size = max(1, LOGITS_AT_ONCE // len(head))
        logps = []
        for h, t in zip(hidden.split(ctx.size), target.split(ctx.size)):
            logits = F.linear(h, head)  # in autocast's type, if it is on
            all_logps = logits.float().log_softmax(-1)
            logps.append(all_logps.gather(1, t[:, None]).squeeze(1))
        ctx.dtype = logits.dtype
        ctx.save_for_backward(hidden, head, target, all_logps if len(logps) == 1 else None)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        hidden, head, target, kept = ctx.saved_tensors
        hidden, weight = hidden.to(ctx.dtype), head.to(ctx.dtype)
        grad_hidden, grad_head = [], None
        for h, t, g in zip(*(x.split(ctx.size) for x in (hidden, target, grad))):
            all_logps = F.linear(h, weight).float().log_softmax(-1) if kept is None else kept
            grad_logits = (
                all_logps.exp_()
                .mul_(-g[:, None])
                .scatter_add_(1, t[:, None], g[:, None])
                .to(ctx.dtype)
            )
            grad_hidden.append(grad_logits @ weight)
            part = (grad_logits.T @ h).to(head.dtype)
            grad_head = part if grad_head is None else grad_head.add_(part)
        return torch.cat(grad_hidden), grad_head, None
