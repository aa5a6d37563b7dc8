"""Attention blocks for any timm model: limits and formulas of each, insertion and its undoing, probes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnzoo
from attnzoo.backbones import blocks
from attnzoo.backbones.blocks import attach_probe, insert
from attnzoo.errors import UnsupportedError


def perturbed(module: nn.Module, scale: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module.eval()


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def small_resnet(name: str = "resnet18", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    small = {"layers": (1, 2, 1, 1), "channels": (8, 16, 16, 32), "num_classes": 5}
    return timm.create_model(name, **{**small, **kwargs}).eval()


@pytest.mark.parametrize("name", sorted(blocks.BLOCKS))
def test_every_block_on_odd_maps_with_gradients(name):
    block = perturbed(blocks.BLOCKS[name](8)).double()
    x = noise(2, 8, 5, 7, dtype=torch.double).requires_grad_()
    out = block(x)
    assert out.shape == x.shape and out.isfinite().all()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (block.float()(x.float()) - out).norm() < 0.1 * out.norm()
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        block(x[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(blocks.BLOCKS))
def test_every_block_compiles(name):
    block = perturbed(blocks.BLOCKS[name](8))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(noise(2, 8, 6, 7)), block(noise(2, 8, 6, 7)), atol=1e-5)


def test_triplet_treats_its_axes_alike():
    """With equal gates, exchanging height and width of the input exchanges them in the output."""
    block = perturbed(blocks.TripletAttention())
    with torch.no_grad():
        block.hw.conv.conv.weight.copy_(block.hw.conv.conv.weight + block.hw.conv.conv.weight.mT)
    block.hc.load_state_dict(block.cw.state_dict())
    for gate in (block.cw, block.hc):  # cw sees (channel, width), hc (height, channel): transposed kernels
        weight = gate.conv.conv.weight
        weight.data.copy_((weight + weight.mT) / 2)
    x = noise(1, 6, 7, 7)
    assert torch.allclose(block(x.mT), block(x).mT, atol=1e-5)


def test_ulsam_is_local_to_its_group_and_doubles_at_most():
    block = perturbed(blocks.ULSAM(8, 4))
    x = noise(1, 8, 5, 5)
    other = x.clone()
    other[:, 2:4] += 1.0
    same = torch.isclose(block(x), block(other)).flatten(2).all(-1)[0]
    assert same.tolist() == [True, True, False, False, True, True, True, True]
    ratio = block(x) / x
    assert ratio.min() >= 1 and ratio.max() <= 2  # x + x * weight, weights of a softmax
    with pytest.raises(ValueError, match="num_splits must divide channels=8"):
        blocks.ULSAM(8, 3)


@pytest.mark.parametrize("kind", [blocks.PolarizedParallel, blocks.PolarizedSequential])
def test_polarized_readings_differ_as_documented(kind):
    paper, official = kind(16), kind(16, compat="official")
    official.load_state_dict(paper.state_dict())
    x = noise(2, 16, 6, 7)
    assert torch.equal(perturbed(paper).weigh_channels(x), perturbed(official).weigh_channels(x))
    weights = {}
    for name, block in (("paper", paper), ("official", official)):
        weights[name] = (block.weigh_positions(x) / x)[:, 0]
    assert not torch.allclose(weights["paper"], weights["official"])
    if kind is blocks.PolarizedParallel:  # sigmoid of a softmax: between sigmoid(0) and sigmoid(1)
        assert weights["official"].min() > 0.4999 and weights["official"].max() < 0.732
    with pytest.raises(ValueError, match="compat must be one of"):
        kind(16, compat="paper")


def test_efficient_attention_is_its_quadratic_form():
    """(softmax q)(softmax k)^T as a matrix of tokens has rows that sum to one, and gives the same."""
    block = perturbed(blocks.EfficientAttention(6, 8, 2, 4)).double()
    x = noise(2, 6, 4, 5, dtype=torch.double)
    flat = x.flatten(2)
    project = lambda conv: F.conv1d(flat, conv.weight[..., 0], conv.bias).unflatten(1, (2, -1))  # noqa: E731
    query, key = project(block.queries).softmax(2), project(block.keys).softmax(3)
    matrix = query.mT @ key
    assert torch.allclose(matrix.sum(-1), torch.ones_like(matrix.sum(-1)))
    out = (project(block.values) @ matrix.mT).flatten(1, 2).unflatten(-1, (4, 5))
    assert torch.allclose(block(x), x + block.reprojection(out), atol=1e-12)


def test_efficient_attention_in_a_vit():
    small = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}
    plain = timm.create_model("vit_tiny_patch16_224", **small)
    model = timm.create_model("vit_tiny_patch16_224", attn_layer=blocks.EfficientTokenAttention, **small)
    model.load_state_dict(plain.state_dict())  # timm's names
    assert model.eval()(noise(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(UnsupportedError, match="attn_mask"):
        model(noise(2, 3, 32, 32), is_causal=True)


@pytest.mark.parametrize("kernel, dilation", [(3, 1), ((5, 3), (1, 2)), (2, 2), ((4, 3), (2, 1))])
def test_msa_conv_is_an_unfolded_softmax(kernel, dilation):
    (kh, kw), (dh, dw) = (v if isinstance(v, tuple) else (v, v) for v in (kernel, dilation))
    query, key, value = (noise(3, 2, 4, 7, 6, dtype=torch.double)[i] for i in range(3))
    unfolded = [
        F.unfold(t, (kh, kw), (dh, dw), padding=(dh * (kh - 1) // 2, dw * (kw - 1) // 2)).unflatten(1, (4, -1))
        for t in (key, value)
    ]
    weights = ((query.flatten(2)[:, :, None] * unfolded[0]).sum(1) * 0.5).softmax(1)
    want = (weights[:, None] * unfolded[1]).sum(2).unflatten(-1, (7, 6))
    assert torch.allclose(blocks.window_attention(query, key, value, kernel, dilation), want, atol=1e-10)


def test_msa_conv_refuses_kernels_without_a_centre():
    for kernel, dilation in ((2, 1), (4, 3), ((3, 4), 1)):
        with pytest.raises(ValueError, match="no centre"):
            blocks.MSAConv2d(8, kernel_size=kernel, dilation=dilation)


@pytest.mark.parametrize("where", ["stages", "residual", [1, -1], ["layer2", "layer3.*"]])
@pytest.mark.parametrize("block", ["triplet", "ulsam"])
def test_insertion_is_undone_to_the_bit(where, block):
    model, x = perturbed(small_resnet(), 0.1), noise(2, 3, 48, 40)
    before, keys, text = model(x), list(model.state_dict()), repr(model)
    channels = {"channels": 16} if isinstance(where, list) and "layer2" in where else {}
    handle = insert(model, block, where[:1] if channels and block == "ulsam" else where, **channels)
    for layer in handle.blocks.values():
        perturbed(layer)
    assert len(handle.blocks) == len(set(handle.blocks)) and not torch.allclose(model(x), before)
    assert set(keys) < set(model.state_dict())
    model(x).sum().backward()
    assert all(p.grad is not None for layer in handle.blocks.values() for p in layer.parameters())
    handle.remove()
    assert torch.equal(model(x), before) and list(model.state_dict()) == keys and repr(model) == text
    handle.remove()


def test_residual_insertion_is_the_published_net():
    """resnet18_triplet is timm's resnet18 with triplet attention in its slots."""
    published, plain = perturbed(small_resnet("resnet18_triplet")), small_resnet()
    with insert(plain, "triplet", where="residual"):
        plain.load_state_dict(published.state_dict())
        assert torch.equal(plain(noise(2, 3, 64, 64)), published(noise(2, 3, 64, 64)))


def test_inserted_blocks_survive_copies_checkpointing_and_feature_extraction():
    model, x = small_resnet(), noise(2, 3, 64, 64)
    handle = insert(model, "triplet")
    want = model(x)
    other = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(other(x), want) and not torch.allclose(model(x), want)
    other.set_grad_checkpointing()
    assert torch.allclose(other.train().eval()(x), want)
    features = small_resnet(features_only=True)
    plain = features(x)
    with insert(features, "triplet", where=[-1]):
        assert not torch.allclose(features(x)[-1], plain[-1]) and torch.equal(features(x)[-2], plain[-2])


@pytest.mark.parametrize(
    "name, small, size",
    [
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)}, 64),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 8, "num_heads": (1, 2), "img_size": 56}, 56),
        ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8}, 32),
        ("mobilenetv3_small_050", {}, 64),
        ("densenet121", {"block_config": (1, 2), "growth_rate": 8}, 64),
        ("cait_xxs24_224", {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32, "patch_size": 8}, 32),
        (
            "dinat_mini",
            {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "kernel_size": 3, "dilations": ((1,), (1,))},
            32,
        ),
    ],
)
def test_insertion_into_other_hosts(name, small, size):
    model = perturbed(timm.create_model(name, num_classes=5, **small), 0.1)
    x = noise(2, 3, size, size)
    before = model(x)
    with insert(model, "efficient") as handle:
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), model(x))
        assert len(handle.blocks) >= 2 and not torch.allclose(model(x), before)
    assert torch.equal(model(x), before)


def test_insertion_refuses():
    model = small_resnet()
    keys = list(model.state_dict())
    for arguments, said in (
        ({"block": "triplets"}, "did you mean 'triplet'"),
        ({"block": "triplet", "where": "blocks"}, "where must be"),
        ({"block": "triplet", "where": [7]}, "levels from 0 to 4"),
        ({"block": "triplet", "where": ["layer9"]}, "no module of ResNet; did you mean layer"),
        ({"block": "triplet", "where": ["layer1.0.conv1"]}, "channels must be given"),
        ({"block": "triplet", "where": []}, "must name a place"),
        ({"block": "ulsam", "num_splits": 3}, "num_splits must divide"),
    ):
        with pytest.raises(ValueError, match=said):
            insert(model, **arguments)
    assert list(model.state_dict()) == keys
    insert(model, "triplet")
    with pytest.raises(ValueError, match="in already"):
        insert(model, "triplet", where=[2])
    with pytest.raises(ValueError, match="needs free slots"):
        insert(timm.create_model("seresnet18"), "triplet", where="residual")
    with pytest.raises(ValueError, match="ResNet-like"):
        insert(timm.create_model("convnext_atto", depths=(1, 1, 1, 1)), "triplet", where="residual")
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, dynamic_img_size=True)
    insert(vit, "triplet")
    with pytest.raises(ValueError, match="no map of"):
        vit(noise(1, 3, 64, 32))


@pytest.mark.parametrize("pooling", ["efficient", "simpool"])
def test_probe_trains_its_head_alone(pooling):
    host = small_resnet(num_classes=0)
    probe = attach_probe(host, 7, pooling, **({"num_queries": 4} if pooling == "efficient" else {}))
    frozen = {k: v.clone() for k, v in host.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in probe.parameters() if p.requires_grad], 0.1)
    loss = probe.train()(noise(4, 3, 40, 48)).square().mean()
    loss.backward()
    optimizer.step()
    assert all(torch.equal(v, frozen[k]) for k, v in host.state_dict().items())  # batch norms' statistics too
    assert all(p.grad is not None for p in probe.head.parameters()) and not host.training
    assert probe.eval()(noise(1, 3, 40, 48)).shape == (1, 7)


def test_probe_reads_any_layout():
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, patch_size=8)
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=8, num_heads=(1, 2), img_size=56)
    assert attach_probe(vit, 3).tokens(noise(1, 3, 32, 32)).shape == (1, 17, 192)
    assert attach_probe(vit, 3, prefix_tokens=False).tokens(noise(1, 3, 32, 32)).shape == (1, 16, 192)
    assert attach_probe(swin, 3, num_queries=4).tokens(noise(1, 3, 56, 56)).shape == (1, 49, 16)
    with pytest.raises(TypeError, match="timm classifier"):
        attach_probe(nn.Linear(3, 3), 3)
    with pytest.raises(ValueError, match="num_queries must divide"):
        attach_probe(vit, 3, num_queries=7)
    with pytest.raises(ValueError, match="pooling must be one of"):
        attach_probe(vit, 3, "mean")


def test_probing_pools_evenly_without_preference():
    """Queries of zero and tokens alike: the mean of the values."""
    pool = blocks.EfficientProbing(12, 4)
    with torch.no_grad():
        pool.cls_token.zero_()
    x = noise(2, 9, 12)
    assert torch.allclose(pool(x), pool.v(x).mean(1), atol=1e-6)
    same = noise(2, 1, 12).expand(-1, 9, -1)
    sim = perturbed(blocks.SimPool(12, 3))
    assert torch.allclose(sim(same), sim.norm_patches(same[:, 0]), atol=1e-5)
    assert sim(same[:1]).shape == (1, 12) and blocks.SimPool(12, compat="official")(same[:1]).shape == (12,)


def test_names_are_public():
    assert set(blocks.__all__) <= set(dir(blocks)) and attnzoo.backbones.blocks.insert is insert


def test_subsampled_attention_is_the_model_at_inference_and_a_part_of_it_in_training():
    small = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}
    plain = timm.create_model("vit_tiny_patch16_224", **small).eval()
    layer = blocks.SubsampledAttention.with_rate(0.25)
    model = timm.create_model("vit_tiny_patch16_224", attn_layer=layer, **small).eval()
    model.load_state_dict(plain.state_dict())
    x = noise(2, 3, 32, 32)
    assert torch.equal(model(x), plain(x))
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(x), plain(x))
    attn = model.blocks[0].attn
    counts = torch.zeros(17)
    for _ in range(400):
        kept = attn.sources(17, torch.device("cpu"))
        assert len(kept) == len(kept.unique()) == 1 + 4 and 0 in kept
        counts[kept] += 1
    assert counts[0] == 400 and (counts[1:] / 400 - 0.25).abs().max() < 0.1  # every source alike
    tokens = noise(1, 17, 24)
    torch.manual_seed(3)
    got = attn(tokens)
    torch.manual_seed(3)
    mask = torch.full((17,), float("-inf"))
    mask[attn.sources(17, tokens.device)] = 0.0
    assert torch.allclose(got, attn.eval()(tokens, attn_mask=mask.expand(17, 17)), atol=1e-6)
    full = blocks.SubsampledAttention(24, 3, keep_rate=1.0).train()
    assert torch.equal(full(tokens), full.eval()(tokens))
    with pytest.raises(ValueError, match="nothing would be left"):
        blocks.SubsampledAttention(24, 3, keep_rate=0.0, prefix_tokens=0)


def test_context_broadcasting_is_half_uniform_attention():
    x = noise(2, 7, 12)
    uniform = torch.full((7, 7), 1 / 7)
    out = blocks.ContextBroadcasting()(x)
    assert torch.allclose(out, (torch.eye(7) + uniform) @ x / 2, atol=1e-6)
    assert torch.allclose(out.mean(1), x.mean(1), atol=1e-6)
    small = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}
    plain = timm.create_model("vit_tiny_patch16_224", **small).eval()
    model = timm.create_model("vit_tiny_patch16_224", mlp_layer=blocks.BroadcastingMlp, **small).eval()
    model.load_state_dict(plain.state_dict())
    hidden = noise(1, 17, 24)
    assert torch.allclose(model.blocks[0].mlp(hidden), blocks.ContextBroadcasting()(plain.blocks[0].mlp(hidden)))
    assert model(noise(2, 3, 32, 32)).shape == (2, 5)
