"""LoRA (Hu et al., arXiv 2106.09685): beside each W, only a product of two thin matrices learns.

    y = W x + b + s · B A x        s = α / r, A (r, in), B (out, r)

It stands on every linear layer of the blocks; all else is frozen. B begins at zero: the first model
is its base. Our qkv is three layers in one and gate_up two: each part has its own A and B.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import product_type


class LowRank(torch.autograd.Function):
    """W x + b + s · B A x for x (T, in): (T, out). A (parts · r, in), B (out, r): a block for each
    part, one below the other; rows: how many of W and B are each part's. The gradient is written
    out: the second product is added in place, and no copy of W in another type is kept."""

    @staticmethod
    def forward(ctx, x, W, b, A, B, s, rows):
        ctx.dtype, ctx.s, ctx.rows = product_type(x), s, rows
        x, W_, A_, B_ = (t.to(ctx.dtype) for t in (x, W, A, B))
        y = F.linear(x, W_, None if b is None else b.to(ctx.dtype))
        low = F.linear(x, A_) * s  # (T, parts · r)
        for y_i, low_i, B_i in zip(y.split(rows, 1), low.chunk(len(rows), 1), B_.split(rows)):
            y_i.addmm_(low_i, B_i.T)
        ctx.save_for_backward(x, W, low, A, B)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, W, low, A, B = ctx.saved_tensors
        W, A_, B_ = (t.to(ctx.dtype) for t in (W, A, B))
        grads = grad.split(ctx.rows, 1)
        grad_low = torch.cat([g @ B_i for g, B_i in zip(grads, B_.split(ctx.rows))], 1) * ctx.s
        grad_B = torch.cat([g.T @ low_i for g, low_i in zip(grads, low.chunk(len(grads), 1))])
        grad_x = (grad @ W).addmm_(grad_low, A_) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, (grad_low.T @ x).to(A.dtype), grad_B.to(B.dtype), None, None


class LoRALinear(nn.Module):
    def __init__(self, linear, rows, rank, alpha, generator):
        super().__init__()
        self.weight, self.bias, self.rows, self.s = linear.weight, linear.bias, rows, alpha / rank
        device, (out, width) = linear.weight.device, linear.weight.shape
        A = torch.empty(len(rows) * rank, width).uniform_(-1, 1, generator=generator) / width**0.5
        self.lora_A = nn.Parameter(A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, device=device))

    def forward(self, x):
        adapters = self.lora_A, self.lora_B, self.s, self.rows
        return LowRank.apply(x, self.weight, self.bias, *adapters)

    def parts(self):
        return zip(self.lora_A.chunk(len(self.rows)), self.lora_B.split(self.rows))


def add(model, rank, alpha, seed):
    """Freeze the model and put adapters on it, in place. Their first values depend on the seed."""
    model.requires_grad_(False)
    generator, c = torch.Generator().manual_seed(seed), model.config
    qkv = tuple(heads * c.d_head for heads in (c.n_head, c.n_kv_head, c.n_kv_head))
    layers = {"attention.qkv": qkv, "attention.out": (c.d_model,)}
    layers |= {"mlp.gate_up": (c.d_ff, c.d_ff), "mlp.down": (c.d_model,)}
    for block in model.blocks:
        for name, rows in layers.items():
            layer = LoRALinear(block.get_submodule(name), rows, rank, alpha, generator)
            block.set_submodule(name, layer)


@torch.no_grad()
def merge(model):
    """Add every product to its W, which is float32 from then on, in place; B is zero again."""
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            BA = torch.cat([B @ A for A, B in layer.parts()])
            layer.weight.data = layer.weight + layer.s * BA
            layer.lora_B.zero_()
