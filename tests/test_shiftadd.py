"""ShiftAddViT: powers of two, mixtures, binary codes and what the authors' versions do otherwise."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch

from attnzoo.backbones import ShiftAddPVT
from attnzoo.backbones.blocks.shiftadd import (
    Conv2dShift,
    LinearShift,
    LinearShiftQ,
    MixtureLinear,
    MixtureMlp,
    fixed_point,
    straight_through,
)
from attnzoo.backbones.blocks.shiftadd_attention import (
    ATTENTIONS,
    AngularAttention,
    BinaryAngularAttention,
    BinaryPerformerAttention,
    EcoformerAttention,
    KernelHash,
    fit_hashes,
    random_features,
)
from attnzoo.backbones.shiftadd import checkpoint_filter_fn

SMALL = {"embed_dims": (8, 16), "depths": (1, 1), "num_heads": (2, 2), "mlp_ratios": (2, 2), "sr_ratios": (2, 1)}
COUNTS = {"b0": 3_136_472, "b0_moe": 6_771_484, "b1": 11_891_512, "b2": 20_367_897}


@pytest.mark.parametrize("size", COUNTS)
def test_published_counts(size):
    model = timm.create_model(f"shiftadd_pvt_v2_{size}", device="meta")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[size]


def test_straight_through_is_exact():
    value, source = torch.randn(1000) * 1e-3, (torch.randn(1000) * 1e3).requires_grad_()
    out = straight_through(value, source)
    assert torch.equal(out, value)
    out.sum().backward()
    assert torch.equal(source.grad, torch.ones(1000))


def test_fixed_point_rounds_down_and_saturates():
    x = torch.tensor([-1e9, -0.3, 0.24, 0.25, 7.9, 1e9])
    assert fixed_point(x, 4, 2).tolist() == [-8.0, -0.5, 0.0, 0.25, 7.0, 7.0]
    assert fixed_point(torch.tensor([1 / 3], dtype=torch.float64)).item() == math.floor(2**16 / 3) / 2**16


def test_shift_weights_are_powers_of_two_with_their_gradients():
    layer = LinearShift(6, 5, weight_bits=4).double()
    with torch.no_grad():
        layer.shift.copy_(torch.linspace(-9, 3, 30, dtype=torch.float64).view(5, 6))
        layer.sign.copy_(torch.linspace(-1.6, 1.6, 30, dtype=torch.float64).view(5, 6))
        layer.sign[0, :3] = torch.tensor([-0.5, 0.5, 1.5])
    kept = copy.deepcopy(layer.state_dict())
    x = torch.randn(3, 6, dtype=torch.float64)
    weight = layer.weight()
    sizes = weight.abs()[weight != 0].detach()
    assert torch.equal(sizes.log2(), sizes.log2().round()) and sizes.min() >= 2**-6 and sizes.max() <= 1
    assert layer.weight()[0, :2].tolist() == [0.0, 0.0] and weight[0, 2] > 0  # halves go to the even side
    grad = torch.randn(3, 5, dtype=torch.float64)
    layer(x).backward(grad)
    outer = grad.T @ fixed_point(x)
    assert torch.allclose(layer.sign.grad, outer)
    assert torch.allclose(layer.shift.grad, outer * weight.detach() * math.log(2))
    assert all(torch.equal(kept[k], v) for k, v in layer.state_dict().items())  # a forward pass writes nothing
    layer.clip_()
    assert layer.shift.min() == -6 and layer.shift.max() == 0 and torch.equal(layer.weight(), weight)


def test_quantised_weights():
    layer = LinearShiftQ(4, 1, bias=False, weight_bits=3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, -5.0, 0.01, 0.36]]))  # 0.36 is above 2^-1.5
    assert layer.quantised().tolist() == [[0.0, -1.0, 0.125, 0.5]]
    layer(torch.ones(1, 4)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(1, 4))
    assert layer.weight[0, 1] == -5


def test_shift_convolution_is_a_convolution():
    layer = Conv2dShift(4, 6, 3, 2, 1, groups=2).double()
    x = fixed_point(torch.randn(2, 4, 7, 5, dtype=torch.float64))
    want = torch.nn.functional.conv2d(x, layer.weight(), fixed_point(layer.bias), 2, 1, 1, 2)
    assert torch.equal(layer(x), want)
    stochastic = LinearShift(400, 300, rounding="stochastic")
    assert not torch.equal(stochastic.weight(), stochastic.weight())


def test_mixtures():
    layer, x = MixtureLinear(8, 6), torch.randn(2, 9, 8)
    chosen = layer.gate(x).argmax(-1)
    assert set(chosen.unique().tolist()) == {0, 1}
    want = torch.where(chosen[..., None] == 0, layer.experts[0](x), layer.experts[1](x))
    assert torch.equal(layer(x), want)
    layer(x).sum().backward()
    assert layer.gate.gate.weight.grad is None and layer.experts[1].shift.grad is not None
    official = MixtureLinear(8, 6, compat="official")
    official.load_state_dict(layer.state_dict())
    assert torch.allclose(official(x), want, atol=1e-5)
    with torch.no_grad():  # what exp and log do to large outputs
        for mixture in (layer, official):
            mixture.experts[0].bias.copy_(torch.tensor([-60.0, -40.0, 0.0, 0.0, 0.0, 100.0]))
        first = chosen == 0
        assert (official(x)[first][:, 0] - math.log(2.0**-52)).abs().max() < 1e-4
        assert official(x)[first][:, 5].isinf().all() and layer(x)[first].isfinite().all()


def test_two_experts_a_token():
    layer, x = MixtureLinear(8, 6, top_k=2).double(), torch.randn(2, 9, 8, dtype=torch.float64)
    gates = layer.gate.gate(x).softmax(-1)
    first, second = layer.experts[0](x), layer.experts[1](x)
    assert torch.allclose(layer(x), gates[..., :1] * first + gates[..., 1:] * second)
    layer.compat = "official"
    assert torch.allclose(layer(x), gates[..., 1:].log() + second)  # the first is lost
    assert MixtureMlp(8, 16)(x.float()).shape == x.shape


@pytest.mark.parametrize("cls, extra", [(BinaryAngularAttention, {}), (BinaryPerformerAttention, {"num_features": 9})])
def test_binary_attention_of_one_image_is_the_authors_and_of_two_is_not(cls, extra):
    x = torch.randn(2, 12, 8) * torch.tensor([0.2, 3.0])[:, None, None] + torch.tensor([0.5, -0.5])[:, None, None]
    ours = cls(8, 2, qkv_bias=True, **extra).eval()
    theirs = cls(8, 2, qkv_bias=True, compat="official", **extra).eval()
    theirs.load_state_dict(ours.state_dict())
    alone = torch.cat([theirs(image) for image in x.split(1)])
    assert torch.allclose(ours(x), alone, atol=1e-6)
    assert (theirs(x) - alone).abs().max() > 1e-2


def plain_hash(ksh: KernelHash, x: torch.Tensor) -> torch.Tensor:
    distance = (x[..., :, None, :] - ksh.anchor[..., None, :, :]).square().sum(-1)
    kernel = torch.exp(-distance / (2 * distance.mean((-2, -1), keepdim=True))) - ksh.mvec
    return (torch.einsum("bhnm,hkm->bhnk", kernel, ksh.A) > 0).double()


def test_hashed_attentions_are_their_formulas():
    torch.manual_seed(0)
    x = torch.randn(2, 20, 12, dtype=torch.float64, requires_grad=True)
    layers = [cls(12, 3, nbits=5, m=4).double() for cls in (AngularAttention, EcoformerAttention)]
    for layer in layers:
        hashed = layer.qk_quant if isinstance(layer, AngularAttention) else layer.fast_attention
        qk, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (layer.to_qk(x), layer.to_v(x)))
        bits = plain_hash(hashed.ksh, qk / qk.norm(dim=-1, keepdim=True))
        assert 0.1 < bits.mean() < 0.9
        weights = bits @ bits.mT
        if isinstance(layer, AngularAttention):
            mixed = 0.5 * v + weights @ v / math.pi
            mixed = mixed / mixed.norm(dim=-1, keepdim=True) + layer.dconv(v)
        else:
            mixed = (weights @ v + 6 * v) / (weights.sum(-1, keepdim=True) + 20 * 6)
        want = layer.proj(mixed.transpose(1, 2).flatten(2))
        got = layer(x)
        assert torch.allclose(got, want, atol=1e-10)
        got_v, want_v = (torch.autograd.grad(y.square().sum(), layer.to_v.weight)[0] for y in (got, want))
        assert torch.allclose(got_v, want_v, atol=1e-9)


def test_a_value_of_zero_stays_finite():
    layer = BinaryAngularAttention(8, 2, qkv_bias=False)
    x = torch.zeros(1, 6, 8, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


def test_sparse_part_is_the_strong_half_of_softmax():
    torch.manual_seed(0)
    layer = BinaryAngularAttention(8, 2, sparse_reg=True).double()
    q, k, v = torch.randn(3, 1, 90, 2, 4, dtype=torch.float64).unbind(0)
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(0.5).softmax(-1)
    weights = weights * (weights > 0.02)
    assert 0 < weights.sum(-1).mean() < 1
    assert torch.allclose(layer._sparse(q, k, v), torch.einsum("bhnm,bmhd->bnhd", weights, v))


def test_fitting_a_hash_makes_neighbours_alike():
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)
    x = torch.nn.functional.normalize(centres.repeat(10, 1) + 0.1 * torch.randn(60, 8), dim=-1).expand(2, 1, 60, 8)
    ksh = KernelHash(1, 8, nbits=12, m=10)
    again = copy.deepcopy(ksh)

    def contrast() -> float:
        bits, likeness = ksh(x)[0, 0], x[0, 0] @ x[0, 0].T
        same = (bits[:, None] == bits[None]).float().mean(-1)
        return (same[likeness > 0.8].mean() - same[likeness < 0.2].mean()).item()

    ksh.fit(x, steps=50, lr=0.5, generator=torch.Generator().manual_seed(3))
    fitted = contrast()
    assert fitted > 0.4
    again.fit(x, steps=50, lr=0.5, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(ksh.state_dict().values(), again.state_dict().values()))
    ksh.A.normal_()
    assert fitted > contrast()


def test_fit_hashes_and_a_forward_pass_that_changes_nothing():
    model = ShiftAddPVT(**SMALL, nbits=4, m=5, num_classes=3).eval()
    images, before = torch.randn(2, 3, 32, 32), copy.deepcopy(model.state_dict())
    model(images)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    fit_hashes(model, images, neighbours=4, steps=3)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
    assert changed and {k.rpartition(".")[2] for k in changed} <= {"A", "mvec", "anchor"}
    ksh = model.stages[0].blocks[0].attn.qk_quant.ksh
    assert not ksh._forward_pre_hooks and ksh.mvec.abs().sum() > 0
    with pytest.raises(ValueError, match="at least m=5 and 2 \\* neighbours=20 tokens"):
        fit_hashes(model, images[..., :16, :16])
    assert not ksh._forward_pre_hooks
    with pytest.raises(ValueError, match="must hold a KernelHash"):
        fit_hashes(ShiftAddPVT(**SMALL, attn_type="msa"), images)


@pytest.mark.parametrize("attn_type", ATTENTIONS)
def test_every_attention_with_mixtures(attn_type):
    kwargs = {"attn_type": attn_type, "num_features": 9, "num_classes": 3, "moe_attn": True, "moe_mlp": True}
    model = ShiftAddPVT(**SMALL, **kwargs)
    out = model(torch.randn(2, 3, 40, 33))
    out.square().sum().backward()
    assert out.shape == (2, 3) and out.isfinite().all()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without == model.unused_parameters()
    last = model.stages[1].blocks[0].attn
    assert hasattr(last, "q") if attn_type == "sra" else isinstance(last.qkv, torch.nn.Linear)
    model.clip_()


def test_the_authors_names():
    model = ShiftAddPVT(**SMALL, moe_mlp=True)
    names = {
        "block1.0.attn.qk_quant.ksh.A": "stages.0.blocks.0.attn.qk_quant.ksh.A",
        "block2.0.mlp.dwconv.dwconv.weight": "stages.1.blocks.0.mlp.dwconv.weight",
        "block1.0.mlp.fc1.experts.1.shift": "stages.0.blocks.0.mlp.fc1.experts.1.shift",
        "norm1.weight": "stages.0.norm.weight",
        "patch_embed2.proj.weight": "stages.1.downsample.proj.weight",
    }
    fitted = checkpoint_filter_fn({"model": {name: torch.zeros(1) for name in names}}, model)
    assert set(fitted) == set(names.values()) <= set(model.state_dict())


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"attn_type": "performer"}, "attn_type must be one of"),
        ({"compat": "old"}, "compat must be one of"),
        ({"sparse_reg": True}, "sparse_reg is of attn_type='LinAngular_binary'"),
        ({"linear": True}, "linear must be False"),
        ({"nbits": 0}, "nbits must be from 1"),
        ({"drop_path_rate": 2.0}, "drop_path_rate must be from"),
        ({"num_heads": (3, 2)}, "num_heads"),
    ],
)
def test_bad_configurations_are_named(wrong, said):
    with pytest.raises((ValueError, AssertionError), match=said):
        ShiftAddPVT(**{**SMALL, **wrong})


def test_bad_layers_are_named():
    with pytest.raises(ValueError, match="weight_bits must be from 2"):
        LinearShift(2, 2, weight_bits=1)
    with pytest.raises(ValueError, match="groups must divide"):
        Conv2dShift(3, 4, 3, groups=2)
    with pytest.raises(ValueError, match="top_k must be from 1 to 2"):
        MixtureLinear(4, 4, top_k=3)
    with pytest.raises(ValueError, match="num_heads must divide"):
        AngularAttention(8, 3)
    with pytest.raises(ValueError, match=r"feat_size must be at least 2 x 2 for sr_ratio=2, got \(1, 10\)"):
        ShiftAddPVT(**SMALL, attn_type="sra")(torch.randn(1, 3, 4, 40))
    with pytest.raises(NotImplementedError, match="attn_drop must be 0"):
        ShiftAddPVT(**SMALL, attn_drop_rate=0.1)


def test_random_features_are_orthogonal_within_a_block():
    rows = random_features(11, 4)
    assert rows.shape == (11, 4)
    gram = rows[:4] @ rows[:4].T
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-4


def test_gates_decide_in_full_precision_under_autocast():
    layer, x = MixtureLinear(32, 8), torch.randn(4, 500, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gates = layer.gate(x)
    assert torch.equal(gates, layer.gate(x))
