"""A small transformer of today's kind, in the family of Llama, Mistral, Qwen2 and Qwen3.

RMSNorm, rotary positions, grouped-query attention, SwiGLU; optional bias on q, k, v; optional norms
of q and k; a tied or a separate head.

forward gives log π(y | x) of every answer in a batch of prompts, each with any number of answers.
A token's state depends only on the token and on those before it. So what rows have in common at
their beginning is computed once: a prompt once for all its answers.

    tokens     p p p p  w w w <eos>  l l <eos>
    position   0 1 2 3  4 5 6 7      4 5 6

Everything but attention works on these tokens one by one, without padding. Attention is causal over
one sequence an answer, gathered from the same tokens:

    p p p p w w w <eos>
    p p p p l l <eos> ·

The keys and values of shared tokens are the same in each sequence, so that this is exact. No mask
is needed: the padding (·) stands behind every real token, where causal attention cannot see it.

At a first reading leave out the hand-written gradients at the end.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SHORT = 64  # tokens: up to here padding costs less than a call for each sequence
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
    # (low, high, length): only those of planes that turn less than `low` times over length tokens,
    # a part of those that turn less than `high` times
    rope_llama3: tuple = ()
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head's q and k
    tied_head: bool = False
    # how far back the checkpoint's own attention looked; ours has no limit, so that rows must be
    # shorter than that; 0: no limit there either
    window: int = 0

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
                f"the model's sliding window is {self.window}, and rows have up to {tokens} "
                "tokens; expected shorter ones (--max_length)"
            )


# --------------------------------------------------------------------------------------------------
# Rows: prompts with their answers, packed


class Rows(NamedTuple):
    """Prompts with A answers in all, packed into T tokens; the answers have N.

    L: tokens of the longest prompt with its answer. All tensors are int64. See `pack_rows`.
    """

    tokens: torch.Tensor  # (T,) row after row; what an earlier row begins with too is left out
    position: torch.Tensor  # (T,) where in its row a token stands, from 0
    # (A, L) which tokens attention sees, an answer a line, padded with its own last one: were it
    # one token for all lines, the backward pass would add all paddings to one place in memory
    sequences: torch.Tensor
    slot: torch.Tensor  # (T,) where in sequences.flatten() a token stands (its first place there)
    predictor: torch.Tensor  # (N,) which of the T tokens predicts the n-th answer token
    target: torch.Tensor  # (N,) the n-th answer token
    answer: torch.Tensor  # (N,) which of the A answers it belongs to
    lengths: list  # [A ints] tokens of each sequence, without its padding
    answers: int  # A


def pack_rows(examples):
    """Rows of [(prompt ids, [answer ids, …]), …]. An answer's EOS is among its ids.

    One prompt 11 12 with the answers 13 14 and 15, so that T = 5, A = 2, L = 4, N = 3:

    >>> rows = pack_rows([([11, 12], [[13, 14], [15]])])
    >>> rows.tokens, rows.position
    (tensor([11, 12, 13, 14, 15]), tensor([0, 1, 2, 3, 2]))
    >>> rows.sequences  # 11 12 13 14, and 11 12 15 with a padding
    tensor([[0, 1, 2, 3],
            [0, 1, 4, 4]])
    >>> rows.slot  # 15 is number 4 of the tokens, and stands in slot 6 of the 8
    tensor([0, 1, 2, 3, 6])
    >>> rows.predictor, rows.target, rows.answer  # 12 predicts 13, 13 predicts 14, 12 predicts 15
    (tensor([1, 2, 1]), tensor([13, 14, 15]), tensor([0, 0, 1]))
    """
    L = max(len(x) + len(y) for x, answers in examples for y in answers)
    tokens, position, sequences, slot, predictor, target, answer, lengths = ([] for _ in range(8))
    numbers = {}  # {(number of the token before, token): its number}
    for x, answers in examples:
        for y in answers:
            number, sequence = -1, []
            for place, token in enumerate((*x, *y)):
                number = numbers.setdefault((number, token), len(tokens))
                if number == len(tokens):  # none began like this before
                    tokens.append(token)
                    position.append(place)
                    slot.append(len(sequences) * L + place)
                sequence.append(number)
            predictor += sequence[len(x) - 1 : -1]  # the prompt's last token predicts the first
            target += y
            answer += [len(sequences)] * len(y)
            sequences.append(sequence + sequence[-1:] * (L - len(sequence)))
            lengths.append(len(sequence))
    columns = (tokens, position, sequences, slot, predictor, target, answer)
    return Rows(*map(torch.tensor, columns), lengths, len(sequences))


def without_padding(rows):
    """([sequence (1, length), …], slot) of rows: each sequence alone, and where among all of their
    tokens each of the T stands.

    >>> without_padding(pack_rows([([11, 12], [[13, 14], [15]])]))  # slot 4: behind 0 1 2 3, 0 1
    ([tensor([[0, 1, 2, 3]]), tensor([[0, 1, 4]])], tensor([0, 1, 2, 3, 6]))
    """
    L = rows.sequences.shape[1]
    padding = L - torch.tensor(rows.lengths)
    before = padding.cumsum(0) - padding  # in the sequences before each
    sequences = [s[None, :n] for s, n in zip(rows.sequences, rows.lengths)]
    return sequences, rows.slot - before[rows.slot // L]


def without_answers(rows):
    """The same computation with no answer to report: for a process that has no pair of its own."""
    nothing = rows.target[:0]
    return rows._replace(predictor=nothing, target=nothing, answer=nothing, answers=0)


def move(x, device):
    """A tensor, or a named tuple with tensors, on device. Pinned memory: nothing waits for it."""
    if isinstance(x, tuple):
        return type(x)(*(move(field, device) for field in x))
    if not isinstance(x, torch.Tensor):
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


# --------------------------------------------------------------------------------------------------
# The transformer


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return Normed.apply(x, self.weight, self.eps)


def rotate(x, cos, sin):
    """Rotary positions on x (T, heads, D): a head's two halves are coordinates of D/2 planes."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).type_as(x)


def attend(q, k, v, visible):
    """Attention of q (A, heads, L, D) to k and v, which may have fewer heads: (A, heads, L, D). It
    is causal where visible is None."""
    if visible is not None:  # one query: those that share a head of keys are rows of one matrix
        folded = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        return F.scaled_dot_product_attention(folded, k, v, visible).reshape(q.shape)
    q, k, v = widened(q), widened(k), widened(v)
    with torch.autocast("cpu", enabled=False):  # it would narrow them again
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1]
        )


def widened(x):
    """x as attention wants it: a CPU's is slower in bfloat16 than in float32, and compiles code for
    each new length, which it keeps."""
    return x.float() if x.device.type == "cpu" and x.dtype.itemsize < 4 else x


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head, self.n_kv_head, self.d_head = c.n_head, c.n_kv_head, c.d_head
        self.qkv = nn.Linear(c.d_model, (c.n_head + 2 * c.n_kv_head) * self.d_head, bias=c.qkv_bias)
        self.qk_norms = nn.ModuleList(RMSNorm(c.d_head, c.norm_eps) for _ in range(2 * c.qk_norm))
        self.out = nn.Linear(c.n_head * c.d_head, c.d_model, bias=False)

    def forward(self, x, rotary, sequences, slot, visible=None, cache=None):
        """x (T, d) → (T, d). sequences [(A, L), …], slot (T,): see Transformer.hidden; rotary: see
        Transformer.rotary.

        In the example of `pack_rows`, T = 5 tokens are gathered into A = 2 sequences of L = 4, and
        of the 8 outputs the 5 in `slot` are taken back: 0 1 2 3 of the first sequence and 2 of the
        second. The second sequence's prompt (slots 4 and 5) gives the same values once more, and
        its padding (slot 7) gives what nobody reads.
        """
        qkv = self.qkv(x).unflatten(-1, (-1, self.d_head))  # (T, heads, D)
        if cache is None:  # keys that are kept stay narrow
            qkv = widened(qkv)
        qk, v = qkv.split((self.n_head + self.n_kv_head, self.n_kv_head), 1)
        if self.qk_norms:
            q_norm, k_norm = self.qk_norms
            q, k = qk.split((self.n_head, self.n_kv_head), 1)
            qk = torch.cat((q_norm(q), k_norm(k)), 1)
        qkv = torch.cat((rotate(qk, *rotary), v), 1)
        gathered = qkv.index_select(0, torch.cat([s.flatten() for s in sequences]))
        heads, y = (self.n_head, self.n_kv_head, self.n_kv_head), []
        for part, s in zip(gathered.split([s.numel() for s in sequences]), sequences):
            q, k, v = part.unflatten(0, s.shape).transpose(1, 2).split(heads, 1)  # (A, heads, L, D)
            if cache is not None:
                k, v = cache.extend(k, v)
            y.append(attend(q, k, v, visible).transpose(1, 2).flatten(0, 1))  # (A·L, heads, D)
        return self.out(torch.cat(y).index_select(0, slot).flatten(1))


class SwiGLU(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_up = nn.Linear(c.d_model, 2 * c.d_ff, bias=False)
        self.down = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x):
        return self.down(Gated.apply(self.gate_up(x)))


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
        self.compiled = False  # whether its blocks are
        self.adapters = None  # what is known of those on it: see lib/policy.py
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
        """log π(y | x) of every answer: (A,) float32, nats, summed over the answer's tokens."""
        hidden = self.hidden(rows.tokens, rows.position, *self.attended(rows))
        logps = TokenLogps.apply(hidden[rows.predictor], self.head.weight, rows.target)
        return logps.new_zeros(rows.answers).index_add(0, rows.answer, logps)

    def attended(self, rows):
        """(sequences, slot) of rows, see `hidden`. A CPU takes long sequences one by one. Together,
        with their padding, they are one call for a GPU, and one graph for a compiled block."""
        is_long = rows.sequences.shape[1] > SHORT
        if is_long and rows.tokens.device.type == "cpu" and not self.compiled:
            return without_padding(rows)
        return [rows.sequences], rows.slot

    def hidden(self, tokens, position, sequences, slot, visible=None, caches=None):
        """tokens, position (T,) → states after the last norm, (T, d).

        sequences [(A, L), …]: which tokens attention sees, in groups of one length each.
        slot (T,): where among all of these, group after group, a token stands.
        visible (A, 1, L, keys) bool takes the causal mask's place where caches hold earlier keys.
        """
        self.config.check_length(max(s.shape[1] for s in sequences))
        x = self.embedding(tokens).float()  # the sum over the blocks stays in float32
        rotary = self.rotary(position)
        if self.compiled:  # rows have ever new lengths: one graph for all
            for tensor in (x, *rotary, slot):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            for sequence in sequences:
                torch._dynamo.maybe_mark_dynamic(sequence, (0, 1))
            if torch.is_grad_enabled():  # one for all blocks, also where nothing before them learns
                x.requires_grad_()
        for i, block in enumerate(self.blocks):
            arguments = x, rotary, sequences, slot, visible, caches and caches[i]
            if self.checkpointing:
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*arguments)
        return self.norm(x)

    def rotary(self, position):
        """What `rotate` multiplies with: cos and ±sin of each position's angles, (T, 1, D)."""
        c, half = self.config, self.config.d_head // 2
        frequency = c.rope_theta ** (-torch.arange(half, device=position.device) / half)
        unchanged = 0.0  # the share of a frequency that is not divided by rope_factor
        if c.rope_llama3:
            low, high, length = c.rope_llama3
            turns = length * frequency / (2 * math.pi)
            unchanged = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = unchanged * frequency + (1 - unchanged) * frequency / c.rope_factor
        angle = position[:, None, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


# --------------------------------------------------------------------------------------------------
# Gradients that are written out, for the memory that autograd would take


class Normed(torch.autograd.Function):
    """w · x̂ of x (…, d) and w (d,): (…, d), with x̂ = x / √(mean x² + ε). Autograd would keep x̂ too.

    The gradient of x is (w·g − x̂ · mean(w·g·x̂)) / √(mean x² + ε), where g is that of the result.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        x32 = x.float()  # squares overflow in fp16
        square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square()
        r = torch.rsqrt(square / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, r)
        return weight * (x32 * r).type_as(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, r = ctx.saved_tensors
        normed, grad = x.float() * r, grad.float()
        along, grad_weight = grad * normed, None
        if ctx.needs_input_grad[1]:
            grad_weight = along.flatten(0, -2).sum(0).to(weight.dtype)
        mean = (along @ weight.float())[..., None] / x.shape[-1]
        grad_x = torch.addcmul(grad * weight, normed, mean, value=-1).mul_(r)
        return grad_x.type_as(x), grad_weight, None


class Gated(torch.autograd.Function):
    """silu(gate) · up of gate_up (T, 2·d_ff): (T, d_ff). Autograd would keep silu(gate) too."""

    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up  # in place, PyTorch 2.11 would compile it without its gradient

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors[0].chunk(2, -1)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat((grad_gate, grad * F.silu(gate)), -1)


def product_type(x):
    """The type in which a matrix product with x is computed: autocast's where it is on, or x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class TokenLogps(torch.autograd.Function):
    """log-softmax(hidden · headᵀ) at target: (N,) float32, nats.

    hidden (N, d), head (V, d), target (N,). Works through chunks of LOGITS_AT_ONCE elements. The
    gradient is written out, with p = softmax(logits):

        ∂ logp / ∂ logits = onehot(target) − p      ∂ logp / ∂ hidden = head[target] − p · head

    so that one chunk of p is all that is ever held. A frozen head allows the second line as soon as
    p is known. For the head's own gradient each p is computed again in the backward pass, unless
    there is only one.
    """

    @staticmethod
    def forward(ctx, hidden, head, target):
        ctx.size = max(1, LOGITS_AT_ONCE // len(head))
        ctx.dtype = product_type(hidden)
        ctx.is_frozen = not ctx.needs_input_grad[1]
        hidden, weight = hidden.to(ctx.dtype), head.to(ctx.dtype)
        logps, directions = [], []
        for h, t in zip(hidden.split(ctx.size), target.split(ctx.size)):
            p, of_chunk = TokenLogps.softmax(h, weight, t)
            logps.append(of_chunk)
            if ctx.is_frozen and ctx.needs_input_grad[0]:
                directions.append(weight[t].float() - (p.to(ctx.dtype) @ weight).float())
        if ctx.is_frozen:
            ctx.save_for_backward(torch.cat(directions) if directions else None)
        else:
            ctx.head_dtype = head.dtype
            ctx.save_for_backward(hidden, weight, target, p if len(logps) == 1 else None)
        return torch.cat(logps)

    @staticmethod
    def softmax(h, weight, target):
        """(p, log p[target]) of a chunk, float32; all in the memory of its logits."""
        logits = F.linear(h, weight).float()
        logits -= logits.amax(1, keepdim=True)
        at_target = logits.gather(1, target[:, None])
        p = logits.exp_()
        total = p.sum(1, keepdim=True)
        return p.div_(total), (at_target - total.log()).squeeze(1)

    @staticmethod
    def backward(ctx, grad):
        if ctx.is_frozen:
            (directions,) = ctx.saved_tensors
            return directions * grad[:, None], None, None
        hidden, weight, target, only_chunk = ctx.saved_tensors
        grad_hidden, grad_head = [], None
        for h, t, g in zip(*(x.split(ctx.size) for x in (hidden, target, grad))):
            p = TokenLogps.softmax(h, weight, t)[0] if only_chunk is None else only_chunk
            grad_logits = p.mul_(-g[:, None])  # in place: there is no second copy
            grad_logits = grad_logits.scatter_add_(1, t[:, None], g[:, None]).to(ctx.dtype)
            grad_hidden.append(grad_logits @ weight)
            if grad_head is None:
                grad_head = (grad_logits.T @ h).float()
            elif ctx.dtype == grad_head.dtype:
                grad_head.addmm_(grad_logits.T, h)  # as large as the head: there is no second one
            else:
                grad_head.add_(grad_logits.T @ h)
        return torch.cat(grad_hidden), grad_head.to(ctx.head_dtype), None
