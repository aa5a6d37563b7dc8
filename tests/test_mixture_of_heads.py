"""Mixture of heads: gates, limits, the balancing loss, and MoH-DiT."""

from __future__ import annotations

import threading

import pytest
import torch
from timm.layers import Attention
from torch import nn

from attnzoo.backbones import MOH_DIT, MoHDiT, moh_dit
from attnzoo.backbones.blocks.mixture_of_heads import MixedHeads, MoHAttention, balance_losses

SMALL = {"input_size": (8, 12), "hidden_size": 24, "depth": 2, "num_heads": 4, "num_classes": 5}


def test_gates():
    layer = MoHAttention(12, 6, 2, 3)
    gates = layer.head_gates(torch.randn(2, 7, 12))
    assert gates.shape == (2, 7, 6)
    assert torch.equal((gates[..., 2:] > 0).sum(-1), torch.full((2, 7), 3))
    part = 2 * layer.wg_0(torch.zeros(12)).softmax(-1)
    assert torch.allclose(part, torch.ones(2))
    # both parts together: 2 (shared) w0 + 3 (routed) w1, with w0 + w1 = 2
    x = torch.randn(1, 4, 12)
    w = 2 * layer.wg_0(x).softmax(-1)
    assert torch.allclose(layer.head_gates(x).sum(-1), 2 * w[..., 0] + 3 * w[..., 1])


def test_even_gates_are_plain_attention():
    plain = Attention(12, 3, qkv_bias=True)
    x = torch.randn(2, 9, 12)
    want = plain(x)
    mixed = MixedHeads(plain, 12, 3, shared_head=3)
    with torch.no_grad():
        mixed.wg_1.weight.zero_()
    assert torch.allclose(mixed(x), want, atol=1e-6)
    own = MoHAttention(12, 3, 3, qkv_bias=True)
    own.load_state_dict({k.replace("inner.", ""): v for k, v in mixed.state_dict().items()})
    assert torch.allclose(own(x), want, atol=1e-6)


def test_one_shared_head_has_weight_one():
    layer = MoHAttention(12, 4, 1, 2)
    assert not hasattr(layer, "wg_1")
    x = torch.randn(1, 3, 12)
    assert torch.allclose(layer.head_gates(x)[..., 0], 2 * layer.wg_0(x).softmax(-1)[..., 0])


@pytest.mark.parametrize("shared, routed, said", [(1, 0, "shared_head must be num_heads"), (2, 3, "routed_head")])
def test_settings_that_cannot_work(shared, routed, said):
    with pytest.raises(ValueError, match=said):
        MoHAttention(12, 4, shared, routed)


def test_the_balancing_loss_is_of_one_model_and_thread():
    model, other = (MoHDiT(**SMALL, shared_head=[2, 4], routed_head=[1, 0]) for _ in range(2))
    inputs = torch.randn(2, 4, 8, 12), torch.tensor([3, 7]), torch.tensor([0, 4])
    with balance_losses(model) as losses:
        model(*inputs)
        other(*inputs)
        elsewhere = threading.Thread(target=model, args=inputs)
        elsewhere.start()
        elsewhere.join()
    assert len(losses) == 1
    losses[0].backward()
    assert model.blocks[0].attn.wg.weight.grad is not None
    model(*inputs)
    assert len(losses) == 1
    # chosen evenly with even gates: mean(1/E * k/E) * E^2 = k
    layer = MoHAttention(12, 4, 0, 4)
    assert torch.allclose(layer.balance_loss(torch.randn(2, 5, 12)), torch.tensor(4.0))


COUNTS = {
    "moh_dit_xl_2_90": 675666464, "moh_dit_xl_2_75": 675689504, "moh_dit_l_2_90": 458512416,
    "moh_dit_l_2_75": 458528800, "moh_dit_b_2_90": 130638368, "moh_dit_b_2_75": 130638368,
    "moh_dit_s_2_90": 32997152, "moh_dit_s_2_75": 32998688,
}  # fmt: skip


@pytest.mark.parametrize("name", MOH_DIT)
def test_published_parameter_counts(name):
    assert sum(p.numel() for p in moh_dit(name, device="meta").parameters()) == COUNTS[name]


def test_dit():
    model = MoHDiT(**SMALL, shared_head=2, routed_head=1).eval()
    x, t, y = torch.randn(4, 4, 8, 12), torch.arange(4), torch.tensor([0, 1, 5, 5])
    assert torch.equal(model(x, t, y), torch.zeros(4, 8, 8, 12))  # adaLN-zero
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    out = model(x, t, y)
    pairs = model(torch.cat([x[:2], x[:2]]), t, y)
    guided = model.forward_with_cfg(x, t, y, 1.0)
    assert torch.allclose(guided[:2, :3], pairs[:2, :3], atol=1e-5) and torch.allclose(guided[:, 3:], pairs[:, 3:])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, t, y), out, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (model(x, t, y).float() - out).norm() <= 0.1 * out.norm()
    with pytest.raises(ValueError, match="x must be"):
        model(x.transpose(2, 3), t, y)
    with pytest.raises(ValueError, match="shared_head must be one value or one per block"):
        MoHDiT(**SMALL, shared_head=[1])
    assert MoHDiT(**SMALL, head_dim=8, shared_head=4).blocks[0].attn.head_dim == 8
    assert MoHDiT(**SMALL, head_dim=8, shared_head=4, compat="official").blocks[0].attn.head_dim == 6
    assert MoHDiT(**SMALL)(x, t, y).shape == (4, 8, 8, 12)  # plain attention
    model.train()(x, t, y).sum().backward()
