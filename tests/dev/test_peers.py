"""Our transformer against transformers' Llama with the same weights."""

from lib.sampling import generate

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model import ModelConfig, Transformer, pack_rows
from safedpo import response_logps

EOS = 59


def both(n_kv_head=2, tied=False):
    torch.manual_seed(0)
    ours = ModelConfig(
        60,
        n_layer=3,
        n_head=4,
        n_kv_head=n_kv_head,
        d_model=32,
        d_ff=40,
        norm_eps=1e-6,
        tied_head=tied,
    )
    theirs = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=n_kv_head,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    peer, net = LlamaForCausalLM(theirs).eval(), Transformer(ours)
    copy_weights(peer, net)
    return net, peer


@torch.no_grad()
def copy_weights(peer, net):
    """Llama's weights into ours."""
    net.embedding.weight.copy_(peer.model.embed_tokens.weight)
    net.head.weight.copy_(peer.lm_head.weight)
    net.norm.weight.copy_(peer.model.norm.weight)
    for a, b in zip(net.blocks, peer.model.layers):
        a.attention_norm.weight.copy_(b.input_layernorm.weight)
        a.mlp_norm.weight.copy_(b.post_attention_layernorm.weight)
        a.attention.qkv.weight.copy_(
            torch.cat([getattr(b.self_attn, f"{n}_proj").weight for n in "qkv"])
        )
        a.attention.out.weight.copy_(b.self_attn.o_proj.weight)
        a.mlp.gate_up.weight.copy_(torch.cat([b.mlp.gate_proj.weight, b.mlp.up_proj.weight]))
        a.mlp.down.weight.copy_(b.mlp.down_proj.weight)


@pytest.mark.parametrize("n_kv_head, tied", [(4, False), (2, True), (1, False)])
def test_log_probs_equal_llamas(n_kv_head, tied):
    net, peer = both(n_kv_head, tied)
    rows = [([3, 4, 5], [[6, 7, EOS], [8, 9, 10, 11, EOS]]), ([1], [[2, EOS], [2, 2, 2, EOS]])]
    expected = []
    with torch.no_grad():
        for x, answers in rows:
            for y in answers:
                ids = torch.tensor([x + y])
                mask = torch.arange(ids.shape[1])[None] >= len(x)
                expected.append(response_logps(peer(ids).logits, ids, mask))
        torch.testing.assert_close(net(pack_rows(rows)), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_greedy_samples_equal_llamas():
    net, peer = both()
    for prompt in ([3], [5, 6, 7, 8], list(range(20))):
        theirs = peer.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=15,
            do_sample=False,
        )
        assert generate(net, [prompt], 15, [EOS], temperature=0) == [
            theirs[0, len(prompt) :].tolist()
        ]
