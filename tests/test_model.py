"""The transformer against plain recomputation: the packed row, the chunks, the cache, the parts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as room
from model import (
    Attention,
    Gated,
    ModelConfig,
    Normed,
    RMSNorm,
    TokenLogps,
    Transformer,
    pack_rows,
    rotate,
)
from safedpo import response_logps

VOCAB, EOS = 50, 49


def make(seed=0, **sizes):
    torch.manual_seed(seed)
    config = dict(vocab_size=VOCAB, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48)
    net = Transformer(ModelConfig(**{**config, **sizes}))
    for p in net.parameters():  # far enough from 0 for attention and positions to matter
        torch.nn.init.normal_(p, std=0.25) if p.dim() > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return net


def examples(seed=0, n=5):
    g = torch.Generator().manual_seed(seed)
    ids = lambda low, high: torch.randint(
        0, EOS, (int(torch.randint(low, high, (1,), generator=g)),), generator=g
    ).tolist()
    return [(ids(1, 9), [ids(0, 7) + [EOS], ids(0, 12) + [EOS]]) for _ in range(n)]


def alone(T):
    """position, sequences and slot of one sequence of T tokens."""
    return torch.arange(T), [torch.arange(T)[None]], torch.arange(T)


def plain_logits(net, ids):
    """One sequence alone: (1, T, V)."""
    return net.head(net.hidden(torch.tensor(ids), *alone(len(ids))))[None]


def plain_logps(net, rows):
    """Each answer behind its own copy of the prompt, through safedpo.response_logps."""
    out = []
    for x, answers in rows:
        for y in answers:
            mask = torch.tensor([[0] * len(x) + [1] * len(y)])
            out.append(response_logps(plain_logits(net, x + y), torch.tensor([x + y]), mask)[0])
    return torch.stack(out)


def gradients(net, value):
    return torch.autograd.grad(value, list(net.parameters()))


VARIANTS = [{}, {"tied_head": True}, {"qkv_bias": True}, {"n_kv_head": 4}, {"n_kv_head": 1}]


@pytest.mark.parametrize("short", [0, 64], ids=["alone", "padded"])
@pytest.mark.parametrize("sizes", VARIANTS, ids=str)
def test_packed_rows_equal_separate_sequences(sizes, short, monkeypatch):
    monkeypatch.setattr(room, "SHORT", short)  # see Transformer.attended
    net, rows = make(**sizes), examples()
    (x, (y, z)), (_, others) = rows[:2]  # rows that begin alike: in the prompt, and beyond it
    rows += [(x, others), (x + y[:-1], [[1, *z], z])]
    packed, plain = net(pack_rows(rows)), plain_logps(net, rows)
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5)
    weight = torch.linspace(-1, 1, len(plain))
    for a, b in zip(
        gradients(net, (packed * weight).sum()), gradients(net, (plain * weight).sum())
    ):
        # a gradient is a sum of many parts: its rounding is that of its largest numbers
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1, b.abs().max()))


def test_row_order_batch_mates_and_padding_change_nothing():
    net, rows = make(), examples(n=6)
    together = net(pack_rows(rows)).view(6, 2)
    backwards = net(pack_rows(rows[::-1])).view(6, 2).flip(0)
    single = torch.stack([net(pack_rows([row])) for row in rows])
    longest = net(pack_rows(rows + [([1] * 40, [[2] * 40 + [EOS], [EOS]])])).view(7, 2)[:6]
    for other in (backwards, single, longest):
        torch.testing.assert_close(other, together, rtol=1e-5, atol=1e-5)


def test_the_other_answer_is_invisible():
    net = make()
    x, y = [1, 2, 3], [4, 5, EOS]
    for other in ([6, EOS], [7] * 20 + [EOS]):
        first, second = net(pack_rows([(x, [y, other])]))[0], net(pack_rows([(x, [other, y])]))[1]
        torch.testing.assert_close(first, second)
        torch.testing.assert_close(first, net(pack_rows([(x, [y])]))[0])


def test_row_layout_as_documented():
    rows = pack_rows([([1, 2, 3, 4], [[5, 6, 7, 9], [8, 8, 9]]), ([2], [[9], [9]])])
    assert rows.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 9, 8, 8, 9, 2, 9]
    assert rows.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 0, 1]
    assert rows.sequences.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 8, 9, 10, 10],
        [11, 12, 12, 12, 12, 12, 12, 12],
        [11, 12, 12, 12, 12, 12, 12, 12],  # the same answer once more
    ]
    assert rows.sequences.flatten()[rows.slot].tolist() == list(range(13))
    assert rows.predictor.tolist() == [
        3,
        4,
        5,
        6,
        3,
        8,
        9,
        11,
        11,
    ]  # both first tokens come from the last prompt token
    assert rows.target.tolist() == [5, 6, 7, 9, 8, 8, 9, 9, 9]
    assert rows.answer.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 3]


def test_rows_that_begin_alike_share_these_tokens():
    rows = pack_rows([([1, 2, 3], [[4, 9], [4, 5]]), ([1, 2], [[3, 4, 9], [2]])])
    assert rows.tokens.tolist() == [1, 2, 3, 4, 9, 5, 2]  # the last 2 does not stand where 2 did
    assert rows.position.tolist() == [0, 1, 2, 3, 4, 4, 2]
    beginnings = [0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4], [0, 1, 6, 6, 6]
    assert rows.sequences.tolist() == list(beginnings)
    assert rows.slot.tolist() == [0, 1, 2, 3, 4, 9, 17]
    assert rows.predictor.tolist() == [2, 3, 2, 3, 1, 2, 3, 1]  # where a prompt ends is its own
    assert rows.target.tolist() == [4, 9, 4, 5, 3, 4, 9, 2]


# --------------------------------------------------------------------------------------------------


def test_chunked_logps_equal_plain_ones(monkeypatch):
    torch.manual_seed(0)
    hidden, head = torch.randn(37, 8, requires_grad=True), torch.randn(VOCAB, 8, requires_grad=True)
    target, weight = torch.randint(0, VOCAB, (37,)), torch.randn(37)
    plain = F.linear(hidden, head).log_softmax(-1).gather(1, target[:, None])[:, 0]
    expected = torch.autograd.grad((plain * weight).sum(), (hidden, head))
    for at_once in (1, 5 * VOCAB, 10**9):
        monkeypatch.setattr(room, "LOGITS_AT_ONCE", at_once)
        chunked = TokenLogps.apply(hidden, head, target)
        torch.testing.assert_close(chunked, plain)
        for a, b in zip(torch.autograd.grad((chunked * weight).sum(), (hidden, head)), expected):
            torch.testing.assert_close(a, b)
        frozen = TokenLogps.apply(hidden, head.detach(), target)
        torch.testing.assert_close(frozen, plain)
        (grad,) = torch.autograd.grad((frozen * weight).sum(), hidden)
        torch.testing.assert_close(grad, expected[0])


def test_the_gated_product_is_silu_times_up():
    torch.manual_seed(0)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(Gated.apply(x), F.silu(gate) * up)
    assert torch.autograd.gradcheck(Gated.apply, (x,))


def test_the_norm_divides_by_the_root_of_the_mean_square():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 6), torch.randn(6)
    x.requires_grad_(), weight.requires_grad_()
    expected = F.rms_norm(x, (6,), weight, 0.1)
    torch.testing.assert_close(Normed.apply(x, weight, 0.1), expected)
    direction = torch.randn(2, 5, 6)
    of_ours = torch.autograd.grad((Normed.apply(x, weight, 0.1) * direction).sum(), (x, weight))
    for a, b in zip(of_ours, torch.autograd.grad((expected * direction).sum(), (x, weight))):
        torch.testing.assert_close(a, b)
    (of_ours,) = torch.autograd.grad((Normed.apply(x, weight.detach(), 0.1) * direction).sum(), x)
    (frozen,) = torch.autograd.grad((F.rms_norm(x, (6,), weight, 0.1) * direction).sum(), x)
    torch.testing.assert_close(of_ours, frozen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_narrow_numbers_is_computed_in_float32(dtype):
    x = torch.tensor([[300.0, -400.0]], dtype=dtype, requires_grad=True)  # squares: no fp16
    normed = Normed.apply(x, torch.ones(2, dtype=dtype), 0.0)
    assert normed.dtype == dtype
    torch.testing.assert_close(
        normed.float(), torch.tensor([[0.6, -0.8]]) * 2**0.5, rtol=1e-2, atol=0
    )
    normed.backward(torch.tensor([[1.0, 0.0]], dtype=dtype))
    expected = torch.tensor([[0.64, 0.48]]) * 2**0.5 / 500  # (1 - 0.6²)/|x|, 0.6 · 0.8/|x|
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.float(), expected, rtol=1e-2, atol=0)


class Largest(TorchDispatchMode):
    """The most elements that a tensor made under it had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_all_logits_are_never_held(monkeypatch):
    monkeypatch.setattr(room, "LOGITS_AT_ONCE", 20 * 3000)
    net = make(vocab_size=3000, d_model=16, d_ff=16)
    rows = pack_rows([([1, 2], [[3] * 100, [4] * 100])])
    with Largest() as largest:
        net(rows).sum().backward()
    assert largest.elements < 200 * 3000 / 2  # 200 answer tokens; a chunk holds 20


@pytest.mark.parametrize("at_once", [10**9, 5 * VOCAB], ids=["kept", "recomputed"])
def test_bf16_autocast_keeps_log_probs_in_float32(monkeypatch, at_once):
    monkeypatch.setattr(room, "LOGITS_AT_ONCE", at_once)
    net, rows = make(), pack_rows(examples())
    with torch.autocast("cpu", torch.bfloat16):
        low = net(rows)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, net(rows), rtol=0.1, atol=0.5)
    for a, b in zip(gradients(net, low.sum()), gradients(net, net(rows).sum())):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.08 * b.norm()


def test_attention_on_a_cpu_is_float32s_whatever_its_type():
    q, k, v = (torch.randn(2, n, 7, 8, dtype=torch.bfloat16) for n in (6, 2, 2))
    widened = [x.float() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(
        widened[0], *(x.repeat_interleave(3, 1) for x in widened[1:]), is_causal=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = room.attend(q, k, v, None)
    assert found.dtype == torch.float32 and torch.equal(found, room.attend(*widened, None))
    double = room.attend(*(x.double() for x in (q, k, v)), None)
    assert double.dtype == torch.float64
    assert 0 < (double - expected).abs().max() < 1e-6  # not float32 behind it
    torch.testing.assert_close(found, expected)


def test_attention_may_lay_its_result_out_as_a_gpu_does(monkeypatch):
    """A GPU's kernels put a query's heads beside each other in memory."""
    q, k, v = (torch.randn(2, n, length, 8) for n, length in ((6, 1), (2, 7), (2, 7)))
    visible, plain = torch.ones(2, 1, 1, 7, dtype=torch.bool), F.scaled_dot_product_attention
    expected = room.attend(q, k, v, visible)

    def of_a_gpu(*args, **kwargs):
        return plain(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", of_a_gpu)
    assert torch.equal(room.attend(q, k, v, visible), expected)


def test_the_log_probs_gradient_is_kept_once():
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(VOCAB, 8, requires_grad=True)
    logps = TokenLogps.apply(hidden, head, torch.tensor([1, 2, 3, 4])).sum()
    logps.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):  # an error, never a wrong gradient
        logps.backward()


def test_checkpointing_changes_memory_and_nothing_else():
    net, rows = make(), pack_rows(examples())
    plain = net(rows)
    expected, kept = gradients(net, plain.sum()), []
    net.checkpointing = True
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        again = net(rows)
    assert torch.equal(again, plain)
    for a, b in zip(gradients(net, again.sum()), expected):
        torch.testing.assert_close(a, b)
    few, net.checkpointing = sum(kept), False
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        net(rows)
    assert few < 0.5 * sum(kept)


# --------------------------------------------------------------------------------------------------


# --------------------------------------------------------------------------------------------------


def test_rms_norm_against_torch():
    norm, x = RMSNorm(16, 1e-5), torch.randn(3, 16)
    torch.nn.init.uniform_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-5))
    large = torch.full((1, 16), 1e4, dtype=torch.float16)  # its squares overflow fp16
    torch.testing.assert_close(norm(large)[0], norm.weight)


def test_rotation_turns_by_angle_and_keeps_lengths():
    x, angle = torch.randn(1, 1, 4), torch.tensor([0.3, 1.1])
    turned = rotate(x, angle.cos().repeat(2), torch.cat((-angle.sin(), angle.sin())))[0, 0]
    for i in range(2):  # plane i is (x_i, x_{i + D/2})
        before, after = complex(x[0, 0, i], x[0, 0, i + 2]), complex(turned[i], turned[i + 2])
        assert abs(after - before * complex(math.cos(angle[i]), math.sin(angle[i]))) < 1e-6


def test_angles_follow_rope_theta():
    net = make(rope_theta=100.0)
    cos, sin = net.rotary(torch.tensor([3]))
    half = net.config.d_model // net.config.n_head // 2
    angles = torch.tensor([3 * 100.0 ** (-i / half) for i in range(half)])
    torch.testing.assert_close(cos[0, 0], angles.cos().repeat(2))
    torch.testing.assert_close(sin[0, 0], torch.cat((-angles.sin(), angles.sin())))


def test_only_relative_positions_matter():
    net, tokens = make(), torch.tensor([1, 2, 3, 4])
    position, *where = alone(4)
    expected = net.hidden(tokens, position, *where)
    torch.testing.assert_close(
        net.hidden(tokens, position + 7, *where), expected, rtol=1e-4, atol=1e-4
    )
    assert (net.hidden(tokens, position.flip(0), *where) - expected).abs().max() > 1e-2


def test_attention_against_a_plain_loop():
    torch.manual_seed(0)
    config = ModelConfig(VOCAB, n_head=4, n_kv_head=2, d_model=16, qkv_bias=True)
    layer, x = Attention(config), torch.randn(5, 16)
    earlier = torch.ones(5, 5, dtype=torch.bool).tril()
    qkv = layer.qkv(x).view(5, 8, 4)  # 4 query heads, 2 key heads, 2 value heads, of size 4
    heads = []
    for h in range(4):
        q, k, v = qkv[:, h], qkv[:, 4 + h // 2], qkv[:, 6 + h // 2]
        scores = (q @ k.T / 2).masked_fill(~earlier, -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    still = torch.ones(5, 1, 4), torch.zeros(5, 1, 4)  # no rotation
    torch.testing.assert_close(layer(x, still, *alone(5)[1:]), layer.out(torch.cat(heads, -1)))


def test_tied_head_is_the_embedding():
    tied, separate = make(tied_head=True), make()
    assert (
        tied.head.weight is tied.embedding.weight
        and separate.head.weight is not separate.embedding.weight
    )


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="n_kv_head 3"):
        ModelConfig(VOCAB, n_head=4, n_kv_head=3)
    with pytest.raises(ValueError, match="d_model 130"):
        ModelConfig(VOCAB, n_head=4, d_model=130)


def test_the_worked_example_of_attention():
    """Attention.forward's docstring, in numbers: prompt 11 12 with the answers 13 14 and 15."""
    net = make()
    attention = net.blocks[0].attention
    rows = pack_rows([([11, 12], [[13, 14], [15]])])
    x = net.embedding(rows.tokens)  # (5, d)
    packed = attention(x, net.rotary(rows.position), [rows.sequences], rows.slot)
    every_slot = torch.arange(8)
    padded = attention(x, net.rotary(rows.position), [rows.sequences], every_slot)
    torch.testing.assert_close(packed, padded[[0, 1, 2, 3, 6]])
    torch.testing.assert_close(padded[[4, 5]], padded[[0, 1]])  # the prompt once more
    for tokens in ([0, 1, 2, 3], [0, 1, 4]):  # each answer's own sequence, alone
        alone_there = attention(
            x[tokens], net.rotary(rows.position[tokens]), *alone(len(tokens))[1:]
        )
        torch.testing.assert_close(packed[tokens], alone_there)
