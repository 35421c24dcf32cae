"""What the machine is told: whose products, which memory."""

import subprocess
import sys

from lib import device

import pytest
import torch
from conftest import ROOT

from model import ModelConfig, Transformer

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch has no oneDNN here"
)


@pytest.fixture
def counted(monkeypatch):
    """The types of the products that oneDNN computed."""
    device.onednn_products()
    calls, judge = [], device.by_onednn

    def by_onednn(a, b):
        calls.append(judge(a, b))
        return calls[-1]

    monkeypatch.setattr(device, "by_onednn", by_onednn)
    return calls


LARGE = device.LARGE


def matrix(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)])
def test_a_large_product_is_onednns_and_right(counted, turned):
    a, b = matrix(LARGE + 1, LARGE), matrix(LARGE, LARGE + 2, seed=1)
    exact = a.double() @ b.double()
    a, b = (x.T.contiguous().T if turn else x for x, turn in zip((a, b), turned))
    torch.testing.assert_close((a @ b).double(), exact, rtol=1e-4, atol=1e-4)
    assert sum(counted) == 1  # not the exact one


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_its_gradients(counted, bias):
    layer, exact = torch.nn.Linear(LARGE, 2 * LARGE, bias), torch.nn.Linear(LARGE, 2 * LARGE, bias)
    exact.load_state_dict(layer.state_dict())
    exact.double()
    x = matrix(LARGE, LARGE).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    weight = matrix(LARGE, 2 * LARGE, seed=1)
    (layer(x) * weight).sum().backward()
    assert counted == [True] * 3  # the product, and both gradients
    (exact(x64) * weight).sum().backward()
    for a, b in zip((x, *layer.parameters()), (x64, *exact.parameters())):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "a, b",
    [
        (matrix(3000, LARGE), matrix(LARGE, LARGE - 1)),  # as in a small model
        (matrix(0, LARGE), matrix(LARGE, LARGE)),
        (matrix(LARGE, 0), matrix(0, LARGE)),
        (matrix(LARGE, LARGE, dtype=torch.bfloat16), matrix(LARGE, LARGE, dtype=torch.bfloat16)),
        (matrix(LARGE, LARGE, dtype=torch.float64), matrix(LARGE, LARGE, dtype=torch.float64)),
        (matrix(LARGE, device.LARGEST // LARGE).T, matrix(LARGE, LARGE)),  # would be copied
        # gaps between rows: oneDNN would take 500 times as long
        (matrix(LARGE, 3 * LARGE)[:, :LARGE].T, matrix(LARGE, 3 * LARGE)[:, LARGE : 2 * LARGE]),
    ],
    ids=["small", "no rows", "no columns", "bfloat16", "float64", "copied", "gaps"],
)
def test_other_products_are_pytorchs_own(counted, a, b):
    torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), rtol=0.02, atol=0.2)
    assert not any(counted)


def test_addmm_scales_as_pytorchs(counted):
    bias, a, b = matrix(LARGE), matrix(LARGE, LARGE), matrix(LARGE, LARGE, seed=1)
    for beta, alpha, added in ((1, 1, bias), (2, 0.5, bias), (1, 1, matrix(LARGE, LARGE, seed=2))):
        exact = beta * added.double() + alpha * a.double() @ b.double()
        result = torch.addmm(added, a, b, beta=beta, alpha=alpha)
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-4)


def test_types_that_do_not_fit_are_refused_as_before(counted):
    with pytest.raises(RuntimeError, match="same dtype"):
        matrix(LARGE, LARGE) @ matrix(LARGE, LARGE, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        matrix(LARGE, LARGE) @ matrix(LARGE + 1, LARGE)


def test_only_a_process_with_a_wide_model_has_other_products():
    program = (
        "import torch, train\n"
        "from lib import device\n"
        "from model import ModelConfig, Transformer\n"
        "a = torch.randn(300, 300)\n"
        "before = a @ a\n"
        "device.tune_cpu()\n"
        "device.is_amd = lambda: True\n"
        "for width in (128, 128, device.LARGE, device.LARGE):\n"
        "    device.use_cpu(Transformer(ModelConfig(300, d_model=width)))\n"
        "    print(bool(device.ATEN))\n"
        "print(torch.allclose(a @ a, before, atol=1e-3))\n"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False", "True", "True", "True"], done.stderr
    assert not done.stderr


def test_other_makers_processors_keep_pytorchs_products(monkeypatch):
    asked = []
    monkeypatch.setattr(device, "onednn_products", lambda: asked.append(True))
    wide = Transformer(ModelConfig(300, n_layer=1, d_model=LARGE))
    for amd in (False, True):
        monkeypatch.setattr(device, "is_amd", lambda amd=amd: amd)
        device.use_cpu(wide)
        assert bool(asked) == amd
