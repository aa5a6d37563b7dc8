"""Blocks whose authors published no code: LKCA, QAA, LookupViT, SSA, held to their formulas and what they promise."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attnzoo.backbones import blocks
from attnzoo.backbones.blocks import (
    LargeKernelConvAttention,
    LocallySubsampledAttention,
    LookupViT,
    QueryAggregation,
    SubsampledAttention,
    as_attn_layer,
    attach_aggregation,
    insert,
    local_shuffle,
)
from attnzoo.errors import UnsupportedError

VIT = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}
BARE = {**VIT, "class_token": False, "global_pool": "avg"}


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(module: nn.Module, scale: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def same_with_gradients(module: nn.Module, formula, x: Tensor) -> None:
    """module(x) and formula(x) agree in float64, and so do the gradients of both to x and every parameter."""
    results = []
    for call in (module, formula):
        x = x.detach().requires_grad_()
        out = call(x)
        weight = noise(*out.shape, seed=9)
        results.append((out, torch.autograd.grad((out * weight).sum(), [x, *module.parameters()])))
    (got, gradients), (want, wanted) = results
    torch.testing.assert_close(got, want)
    for one, other in zip(gradients, wanted):
        torch.testing.assert_close(one, other)


# ---- LKCA


def sliding_windows(attn: LargeKernelConvAttention, height: int, width: int) -> Tensor:
    """The paper's words: a window of the map's size slides over the kernel from the bottom right to the top left."""
    rows = [
        attn.kernel[:, height - 1 - y : 2 * height - 1 - y, width - 1 - x : 2 * width - 1 - x].flatten(1)
        for y in range(height)
        for x in range(width)
    ]
    return torch.stack(rows, 1)


@pytest.mark.parametrize("view", ["conv", "attention"])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6)])
def test_lkca_is_the_slid_window_times_the_values(view, grid):
    attn = perturbed(LargeKernelConvAttention(6, 3, qkv_bias=True, grid_size=grid, view=view)).double()
    x = noise(2, grid[0] * grid[1], 6)
    assert torch.equal(attn.weights(*grid), sliding_windows(attn, *grid))

    def formula(x: Tensor) -> Tensor:
        value = attn.value(x).unflatten(-1, (3, 2)).transpose(1, 2)
        return attn.proj((sliding_windows(attn, *grid) @ value).transpose(1, 2).flatten(2))

    same_with_gradients(attn, formula, x)


@pytest.mark.parametrize("size", [(4, 4), (3, 2), (9, 7), (5, 9)])
def test_lkca_is_a_plain_convolution_at_every_size(size):
    """One kernel per channel: torch's depthwise convolution; larger offsets than the kernel has weigh nothing."""
    both = [
        perturbed(LargeKernelConvAttention(4, 4, grid_size=(4, 3), view=view)).double()
        for view in ("conv", "attention")
    ]
    both[1].load_state_dict(both[0].state_dict())
    x = noise(2, *size, 4)
    value = both[0].value(x).permute(0, 3, 1, 2)
    want = F.conv2d(value, both[0].kernel[:, None], padding=(3, 2), groups=4)
    want = both[0].proj(want.permute(0, 2, 3, 1))
    for attn in both:
        torch.testing.assert_close(attn(x), want)


def test_lkca_follows_a_shift_of_the_map():
    attn = perturbed(LargeKernelConvAttention(4, 2, grid_size=3)).double()
    x = F.pad(noise(1, 3, 3, 4), (0, 0, 4, 4, 4, 4))  # nothing that moves reaches the border
    torch.testing.assert_close(attn.mix(x.roll((1, 2), (1, 2))), attn.mix(x).roll((1, 2), (1, 2)))


def test_lkca_in_a_vit_and_in_a_cnn():
    layer = as_attn_layer(LargeKernelConvAttention, grid_size=4)
    model = timm.create_model("vit_tiny_patch16_224", attn_layer=layer, dynamic_img_size=True, **BARE)
    x = noise(2, 3, 32, 32).float()
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model(noise(1, 3, 48, 48).float()).shape == (1, 5)
    with pytest.raises(ValueError, match="class_token=False"):
        timm.create_model("vit_tiny_patch16_224", attn_layer=layer, **VIT)(x)
    with pytest.raises(UnsupportedError, match="attn_mask"):
        model(x, is_causal=True)
    host = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 16, 16, 32), num_classes=5).eval()
    before = host(x)
    with insert(host, "lkca", grid_size=3) as handle:
        assert handle.blocks["layer1.0"].attn.kernel.shape == (8, 5, 5) and not torch.allclose(host(x), before)
    assert torch.equal(host(x), before)
    with pytest.raises(ValueError, match="grid_size must be given"):
        LargeKernelConvAttention(8)
    with pytest.raises(UnsupportedError, match="qk_norm"):
        LargeKernelConvAttention(8, qk_norm=True, grid_size=3)


# ---- QAA


def attention(mha: nn.MultiheadAttention, query: Tensor, key: Tensor) -> Tensor:
    """Multi-head attention with its matrix."""
    q, k, v = (
        F.linear(t, w, b).unflatten(-1, (mha.num_heads, -1)).transpose(-3, -2)
        for t, w, b in zip((query, key, key), mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3))
    )
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return mha.out_proj((weights @ v).transpose(-3, -2).flatten(-2))


@pytest.mark.parametrize("out_norm", [False, True])
def test_qaa_is_its_formula(out_norm):
    head = perturbed(QueryAggregation(12, 5, feature_dim=3, reference_dim=8, num_heads=4, out_norm=out_norm)).double()

    def own(queries: nn.Module) -> Tensor:
        q = queries.queries
        return queries.norm_q(q + attention(queries.self_attn, q, q))

    def formula(x: Tensor) -> Tensor:
        read = head.score.norm_out(attention(head.score.cross_attn, own(head.queries_score), x))
        features = read @ head.score.conv.weight[..., 0].mT + head.score.conv.bias  # P: [B, queries, feature_dim]
        reference = own(head.queries_feature)[0]  # F: [queries, reference_dim]
        similarity = reference.mT @ features
        columns = similarity / similarity.norm(dim=1, keepdim=True)
        return columns.flatten(1) / columns.flatten(1).norm(dim=1, keepdim=True)

    same_with_gradients(head, formula, noise(2, 7, 12))


def test_qaa_knows_no_order_of_tokens_and_gives_unit_descriptors():
    head = perturbed(QueryAggregation(12, 5, feature_dim=3, reference_dim=8, num_heads=4)).double().eval()
    x = noise(2, 9, 12)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    out = head(x)
    torch.testing.assert_close(head(x[:, order]), out)
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(head(x.repeat(1, 3, 1)), out)  # a softmax over copies
    torch.testing.assert_close(head(x[:1]), out[:1])
    assert head.codebook().shape == (5, 8) and out.shape == (2, head.out_features) == (2, 24)


def test_qaa_on_a_frozen_model():
    host = timm.create_model("vit_tiny_patch16_224", **VIT)
    model = attach_aggregation(host, num_queries=4, feature_dim=3, reference_dim=6, num_heads=3)
    frozen = {k: v.clone() for k, v in host.state_dict().items()}
    x = noise(2, 3, 32, 32).float()
    assert model.tokens(x).shape == (2, 16, 24)  # patches alone
    optimizer = torch.optim.SGD(model.head.parameters(), 0.1)
    model.train()(x).square()[:, 0].sum().backward()
    assert all(p.grad is not None for p in model.head.parameters())
    optimizer.step()
    assert all(torch.equal(v, frozen[k]) for k, v in host.state_dict().items()) and not host.training
    cnn = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 16, 16, 32))
    assert attach_aggregation(cnn, num_queries=4, reference_dim=16, num_heads=8)(x).shape == (2, 16 * 64)
    with pytest.raises(TypeError, match="timm classifier"):
        attach_aggregation(nn.Linear(3, 3))
    for wrong, said in (
        ({"num_heads": 5}, "num_heads must divide dim"),
        ({"num_heads": 4, "reference_dim": 6}, "num_heads must divide reference_dim"),
        ({"num_queries": 0}, "num_queries"),
    ):
        with pytest.raises(ValueError, match=said):
            QueryAggregation(24, **wrong)


# ---- LookupViT


def lookup(**kwargs) -> LookupViT:
    torch.manual_seed(0)
    model = LookupViT(**{**VIT, "compressed_size": 2, **kwargs})
    return perturbed(model).double().eval()


def test_lookup_block_is_its_formula():
    block = lookup().blocks[0]
    compressed = noise(2, 5, 24, seed=3)

    def formula(lookups: Tensor) -> Tensor:
        cross, heads = block.cross, (3, 8)
        few, many = block.norm_compressed(compressed), block.norm_lookup(lookups)
        key, value = cross.kv(many).chunk(2, -1)
        q, k, v = (t.unflatten(-1, heads).transpose(1, 2) for t in (cross.q(few), key, value))
        weights = (q @ k.mT / 8**0.5).softmax(-1)
        c = compressed + cross.proj((weights @ v).transpose(1, 2).flatten(2))
        normed = block.norm1(c)
        q, k, v = block.attn.qkv(normed).unflatten(-1, (3, *heads)).permute(2, 0, 3, 1, 4)
        c = c + block.attn.proj(((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
        c = c + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(c))))
        back = cross.v_back(block.norm_back(c)).unflatten(-1, heads).transpose(1, 2)
        out = lookups + cross.proj_back((weights.mT @ back).transpose(1, 2).flatten(2))
        out = out + block.lookup_mlp.fc2(F.gelu(block.lookup_mlp.fc1(block.norm_lookup_mlp(out))))
        return torch.cat([out, c], 1)

    block.forward_both = lambda x: torch.cat(block(x, compressed), 1)
    results = []
    for call in (block.forward_both, formula):
        x = noise(2, 16, 24).requires_grad_()
        out = call(x)
        results.append((out, torch.autograd.grad((out * noise(*out.shape, seed=9)).sum(), [x, *block.parameters()])))
    torch.testing.assert_close(results[0][0], results[1][0])
    for one, other in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(one, other)


def flops(model: nn.Module, side: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, side, side))
    return counter.get_total_flops()


def test_lookup_cost_grows_linearly_with_the_image():
    """16, 64 and 144 patches: with as many compressed tokens, every further patch costs the same; a ViT's cost more."""
    model = LookupViT(**{**VIT, "compressed_size": 2, "dynamic_img_size": True}).eval()
    plain = timm.create_model("vit_tiny_patch16_224", **BARE, dynamic_img_size=True, exportable=True).eval()

    def per_patch(net: nn.Module) -> tuple[float, float]:
        few, more, most = (flops(net, side) for side in (32, 64, 96))
        return (more - few) / 48, (most - more) / 80

    first, then = per_patch(model)
    assert first == then
    first, then = per_patch(plain)
    assert then > first


def test_lookup_at_several_resolutions_with_one_set_of_weights():
    model = lookup()
    x = noise(2, 3, 32, 32)
    out = {}
    for size in (1, (2, 3), 4):
        model.set_compressed_size(size)
        out[size] = model(x)
        count = size * size if isinstance(size, int) else size[0] * size[1]
        assert model.forward_features(x).shape == (2, count, 24) and out[size].shape == (2, 5)
        final, maps = model.forward_intermediates(x)
        assert [m.shape for m in maps] == [(2, 24, 4, 4)] * 2
        torch.testing.assert_close(model.forward_head(final), out[size])
    assert not torch.allclose(out[1], out[4])
    model.set_compressed_size(4)  # as many compressed tokens as patches: the resizing is the identity
    tokens = model._pos_embed(model.patch_embed(x))
    torch.testing.assert_close(model._start(tokens, (4, 4)), tokens)
    with pytest.raises(ValueError, match="compressed_size"):
        model.set_compressed_size(0)


def test_lookup_trains_and_refuses():
    model = lookup().train()
    x = noise(2, 3, 32, 32)
    model(x).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == model.unused_parameters()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for name, want in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, want)
    model.zero_grad()
    sum(m.square().sum() for m in model.forward_intermediates(x, intermediates_only=True)).backward()
    assert all(model.get_parameter(n).grad is not None for n in model.unused_parameters())
    model.reset_classifier(3)
    assert model.double()(x).shape == (2, 3)
    for wrong, error, said in (
        ({"class_token": True}, UnsupportedError, "class_token"),
        ({"reg_tokens": 2}, UnsupportedError, "reg_tokens"),
        ({"lookup_mlp_ratio": 0.0}, ValueError, "lookup_mlp_ratio"),
        ({"compressed_size": (2, 2, 2)}, ValueError, "compressed_size"),
    ):
        with pytest.raises(error, match=said):
            lookup(**wrong)
    with pytest.raises(ValueError, match="img_size 32 x 32"):
        lookup()(noise(1, 3, 40, 32))


# ---- SSA


def test_every_subset_of_sources_is_as_likely():
    """Uniform over the subsets of k sources, and then the sums of a softmax are right in expectation, up to n / k."""
    torch.manual_seed(0)
    attn = SubsampledAttention(8, 2, keep_rate=0.4, prefix_tokens=0)
    subsets = list(itertools.combinations(range(5), 2))
    counts = dict.fromkeys(subsets, 0)
    for _ in range(4000):
        counts[tuple(sorted(attn.sources(5, torch.device("cpu")).tolist()))] += 1
    chi_square = sum((c - 400) ** 2 / 400 for c in counts.values())
    assert chi_square < 27.9  # 0.999 of the distribution with 9 degrees of freedom
    weights, values = noise(5).exp(), noise(5, 3, seed=2)
    for full in (weights[:, None] * values, weights[:, None]):  # the softmax' numerator and denominator
        mean = torch.stack([full[list(kept)].sum(0) * 5 / 2 for kept in subsets]).mean(0)
        torch.testing.assert_close(mean, full.sum(0))


def test_local_shuffle_is_a_permutation_near_its_place():
    torch.manual_seed(0)
    assert local_shuffle(4, 7, 0.0).tolist() == list(range(28))
    moved = {}
    for sigma in (0.5, 2.0, 1000.0):
        order = torch.stack([local_shuffle(9, 9, sigma) for _ in range(50)])
        assert all(sorted(o.tolist()) == list(range(81)) for o in order)
        place = torch.arange(81)
        moved[sigma] = ((order // 9 - place // 9).abs() + (order % 9 - place % 9).abs()).double().mean().item()
    assert 0 < moved[0.5] < moved[2.0] < moved[1000.0]
    # Without locality a source comes from anywhere: two uniform coordinates out of nine differ by 80 / 27 on average.
    assert moved[1000.0] == pytest.approx(2 * 80 / 27, rel=0.05)


def local(**kwargs) -> LocallySubsampledAttention:
    torch.manual_seed(0)
    attn = LocallySubsampledAttention(
        8, 2, qkv_bias=True, **{"kernel_size": 3, "grid_size": (4, 5), "prefix_tokens": 1, **kwargs}
    )
    return perturbed(attn).double()


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_locally_biased_attention_is_a_window_over_shuffled_sources(prefix):
    attn = local(sigma=1.5, prefix_tokens=prefix)

    def formula(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        order = local_shuffle(4, 5, 1.5)
        seen = torch.ones(prefix + 20, prefix + 20, dtype=torch.bool)
        for query in range(20):
            top, left = (min(max(c - 1, 0), n - 3) for c, n in ((query // 5, 4), (query % 5, 5)))
            places = [(top + i) * 5 + left + j for i in range(3) for j in range(3)]
            seen[prefix + query, prefix:] = False
            seen[prefix + query, prefix + order[places]] = True
        query, key, value = attn.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        logits = (query @ key.mT / 2).masked_fill(~seen, float("-inf"))
        return attn.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return attn.train()(x)

    results = []
    for call in (seeded, formula):
        x = noise(2, prefix + 20, 8).requires_grad_()
        out = call(x)
        results.append((out, torch.autograd.grad((out * noise(*out.shape, seed=9)).sum(), [x, *attn.parameters()])))
    torch.testing.assert_close(results[0][0], results[1][0])
    for one, other in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(one, other)


def test_locally_biased_attention_ends():
    """The whole map as a window is full attention, whatever the shuffle; inference is; and timm's weights are."""
    x = noise(2, 21, 8)
    whole = local(kernel_size=(4, 5), sigma=7.0)
    torch.testing.assert_close(whole.train()(x), whole.eval()(x))
    attn = local(sigma=0.5)
    assert not torch.allclose(attn.train()(x), attn.eval()(x))
    plain = timm.layers.Attention(8, 2, qkv_bias=True).double().eval()
    plain.load_state_dict(attn.state_dict())
    assert torch.equal(attn.eval()(x), plain(x))
    torch.manual_seed(0)
    layer = as_attn_layer(LocallySubsampledAttention, kernel_size=3)
    model = timm.create_model("vit_tiny_patch16_224", attn_layer=layer, **VIT)
    host = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    host.load_state_dict(model.state_dict())
    images = noise(2, 3, 32, 32).float()
    assert torch.equal(model.eval()(images), host(images))
    model.train()(images).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for call, error, said in (
        (lambda: local(grid_size=(4, 4)).train()(x), ValueError, "grid_size 4 x 4, got 20"),
        (lambda: local(grid_size=None).train()(x), ValueError, "a square of tokens"),
        (lambda: local(kernel_size=6).train()(x), ValueError, "kernel_size"),
        (lambda: local(sigma=-1.0), ValueError, "sigma"),
        (lambda: local(attn_drop=0.1), UnsupportedError, "attn_drop"),
        (lambda: attn.train()(x, is_causal=True), UnsupportedError, "is_causal"),
    ):
        with pytest.raises(error, match=said):
            call()


@pytest.mark.slow
def test_adapted_blocks_compile():
    x = noise(2, 3, 32, 32).float()
    layer = as_attn_layer(LargeKernelConvAttention, grid_size=4)
    for model in (
        timm.create_model("vit_tiny_patch16_224", attn_layer=layer, **BARE),
        LookupViT(**VIT, compressed_size=2),
        blocks.attach_aggregation(timm.create_model("vit_tiny_patch16_224", **VIT), num_queries=4, num_heads=8),
    ):
        model = model.float().eval()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
