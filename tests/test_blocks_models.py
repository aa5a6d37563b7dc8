"""Sparsifiner, DependencyViT and the ResNets with triplet attention: what is special about each."""

from __future__ import annotations

import json

import goldens as adapter
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import attnzoo  # noqa: F401  registers the names
from attnzoo.backbones import DependencyViT, Sparsifiner
from attnzoo.backbones.blocks.sparse import MaskPredictor, SparseAttention, SparseSettings, TokenMask
from attnzoo.backbones.dependencyvit import ReversedAttention
from attnzoo.backbones.sparsifiner import sparsifiner_loss, teacher_outputs
from attnzoo.errors import UnsupportedError

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def perturbed(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return module.eval()


def sparse(**kwargs) -> Sparsifiner:
    settings = {"reduce_n_factor": 2, "coef_topk": 4, **kwargs.pop("settings", {})}
    return perturbed(Sparsifiner(**{**SMALL, "settings": settings, **kwargs}))


def test_sparsifiner_that_keeps_all_is_the_vit():
    model = sparse(attn_keep_rate=1.0)
    vit = VisionTransformer(**SMALL).eval()
    vit.load_state_dict({k: v for k, v in model.state_dict().items() if "mask_predictor" not in k})
    x = noise(2, 3, 32, 32)
    assert torch.allclose(model(x), vit(x), atol=1e-5)
    assert torch.allclose(model.forward_details(x).logits, vit(x), atol=1e-5)


@pytest.mark.parametrize("prune_rows", [False, True])
@pytest.mark.parametrize("compat", [None, "official"])
def test_sparsifiner_has_one_meaning_with_and_without_details(prune_rows, compat):
    model = sparse(
        prune_blocks=(0, 1), token_keep_rate=(0.7, 0.5, 1.0), settings={"prune_rows": prune_rows}, compat=compat
    )
    x = noise(2, 3, 32, 32)
    details = model.forward_details(x)
    assert torch.allclose(model(x), details.logits, atol=1e-5)
    masks = [layer.token_mask for layer in details.layers]
    assert [m.kept for m in masks] == [12, 8, 8]
    assert all((m.mask.sum(1) == m.kept).all() for m in masks) and (masks[0].mask | ~masks[1].mask).all()
    gone = details.features[~masks[-1].mask]
    assert torch.allclose(gone, model.norm.bias.expand_as(gone))  # dropped patches are zeros under the final norm
    rows = details.layers[0].attn_mask[:, :, 1:].sum(-1)
    assert (rows == model.blocks[0].attn.mask_predictor.attn_budget).all()
    attention = details.layers[-1].masked_attn
    sums = attention.sum(-1)
    left = torch.nn.functional.pad(masks[1].mask, (1, 0), value=True)[:, None].expand_as(sums)
    assert torch.allclose(sums[left], torch.ones(()).expand_as(sums[left]))
    assert torch.allclose(sums[~left], torch.full((), 0.0 if prune_rows else 1.0).expand_as(sums[~left]))


def test_official_budget_stays_low_and_ours_does_not():
    query, key = noise(2, 3, 17, 8), noise(2, 3, 17, 8, seed=2)
    few = TokenMask(torch.arange(16).expand(2, 16) < 3, 3)
    for compat, budget in ((None, 9), ("official", 3)):
        predictor = MaskPredictor(
            24, 3, 17, SparseSettings(attn_keep_rate=0.5, coef_topk=None, reduce_n_factor=2, compat=compat)
        )
        assert predictor(query, key, few)[2][:, :, 1:].sum(-1).eq(3).all()
        assert predictor(query, key)[2][:, :, 1:].sum(-1).eq(budget).all()
    assert not predictor(query, key, few)[2][:, :, 1:, 4:].any()  # no row attends to a dropped patch


def test_sparsifiner_losses_train_what_they_should():
    model, vit = sparse(), VisionTransformer(**SMALL).eval()
    x, labels = noise(2, 3, 32, 32), torch.tensor([1, 2])
    teacher = teacher_outputs(vit, x)
    assert torch.allclose(teacher[0], vit(x), atol=1e-6)
    assert torch.allclose(teacher[2][0].sum(-1), torch.ones(2, 3, 17))

    def grads(use, **kwargs):
        model.zero_grad()
        total, parts = sparsifiner_loss(
            model.forward_details(x, reconstruct="attn_recon" in use), labels, teacher, use=use, **kwargs
        )
        assert torch.allclose(total, sum(parts.values())) and list(parts) == list(use)
        total.backward()
        return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    predictors = model.unused_parameters()
    assert not grads(("cls", "cls_distill", "token_distill")) & predictors
    assert grads(("attn_recon",)) >= {n for n in predictors if "proj_n" in n or "proj_back_n" in n}
    assert "head.weight" not in grads(("attn_self_distill",))
    assert "head.weight" in grads(("cls", "ratio"), token_criterion="kl")
    for wrong, said in (
        ({"use": ("clas",)}, "use must be of"),
        ({"use": ("cls",)}, "labels must be given"),
        ({"use": ("attn_recon",)}, "teacher must be given"),
        ({"token_criterion": "l1"}, "token_criterion must be one of"),
    ):
        with pytest.raises(ValueError, match=said):
            sparsifiner_loss(model.forward_details(x), **wrong)


def test_sparsifiner_refuses():
    for wrong, error, said in (
        ({"attn_keep_rate": (0.5, 0.5)}, ValueError, "one per block"),
        ({"prune_blocks": (3,)}, ValueError, "prune_blocks must be from 0 to 2"),
        ({"attn_keep_rate": 1.5}, ValueError, "attn_keep_rate must be"),
        ({"settings": {"coef_topk": 9}}, ValueError, "coef_topk must be at most the rank, 8"),
        ({"settings": {"score_threshold": 0.0}}, ValueError, "score_threshold must be above 0"),
        ({"compat": "paper"}, ValueError, "compat must be one of"),
        ({"dynamic_img_size": True}, UnsupportedError, "dynamic_img_size must be off"),
        ({"class_token": False, "global_pool": "avg"}, UnsupportedError, "class_token must be True"),
        ({"attn_drop_rate": 0.1}, UnsupportedError, "attn_drop must be 0.0"),
    ):
        with pytest.raises(error, match=said):
            sparse(**wrong)
    with pytest.raises(UnsupportedError, match="img_size="):
        sparse().set_input_size(64)
    with pytest.raises(ValueError, match="num_tokens=17"):
        SparseAttention(24, 3, 17, SparseSettings(coef_topk=None))(noise(1, 9, 24))


def test_sparsifiner_with_a_representation_layer():
    model = sparse(representation_size=16)
    assert model(noise(2, 3, 32, 32)).shape == (2, 5) and model.head.in_features == 16
    model.reset_classifier(3)
    assert model(noise(2, 3, 32, 32)).shape == (2, 3)
    assert model.forward_head(model.forward_features(noise(2, 3, 32, 32)), pre_logits=True).shape == (2, 16)


def test_reversed_attention_spreads_one_unit_per_sender():
    """Without selector and controller (equal heads, m = 1/2 exactly), columns sum to p * m."""
    attn = perturbed(ReversedAttention(12, 3))
    with torch.no_grad():
        attn.head_selector.weight.zero_()
        attn.message_controller.fc2.weight.zero_()
    weights, value, m = attn.dependencies(noise(2, 9, 12), torch.ones(1, 1, 1, 1))
    assert torch.allclose(m, torch.full((2, 1, 1, 9), 0.5))
    assert torch.allclose(weights.sum(-2), torch.full((2, 3, 9), 0.5 / 3), atol=1e-6)
    out, _ = attn(noise(2, 9, 12), torch.zeros(1, 1, 1, 1))
    assert torch.allclose(out, attn.proj.bias.expand_as(out))  # nobody sends


@pytest.mark.parametrize("float64", [False, True])
def test_the_forks_numbers(goldens_root, float64):
    """The yardstick only reports on cases that are not the authors' own; here they count."""
    paths = sorted((goldens_root / "backbones/dependencyvit_thirdparty").glob("*.json"))
    assert paths
    for path in paths:
        meta = {**json.loads(path.read_text()), "system": "dependencyvit_thirdparty"}
        tensors = load_file(path.with_suffix(".safetensors"))
        given = {k: v for k, v in tensors.items() if k not in meta["outputs"] and not k.startswith("inter.")}
        if float64:
            given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        got = adapter.run(meta, given)
        for name in meta["outputs"]:
            assert (got[name] - tensors[name]).norm() <= (5e-6 if float64 else 1e-4) * tensors[name].norm(), path.stem


def test_messages_only_fade():
    model = perturbed(DependencyViT(**SMALL, init_values=0.5))
    weights = [state.weight for _, state, _ in model._walk(noise(2, 3, 32, 32))]
    assert len(weights) == 3 and all((b <= a).all() for a, b in zip(weights, weights[1:]))
    masks = model.dependency_masks(noise(2, 3, 32, 32))
    assert [tuple(m.shape) for m in masks] == [(2, 16, 16)] * 3


def test_pruning_keeps_the_strongest_and_their_places():
    model = perturbed(DependencyViT(**SMALL, init_values=0.5, prune_blocks=(1, 3), prune_ratio=0.25))
    x = noise(2, 3, 32, 32)
    states = [(tokens, state) for tokens, state, _ in model._walk(x)]
    assert [tokens.shape[1] for tokens, _ in states] == [12, 12, 8]
    maps = model.forward_intermediates(x, intermediates_only=True)
    for level, (tokens, state) in zip(maps, states):
        flat = level.flatten(2).mT
        assert torch.equal(flat.gather(1, state.left[..., None].expand_as(tokens)), tokens)
        assert (flat.abs().sum(-1) > 0).sum(1).tolist() == [tokens.shape[1]] * 2
    for wrong, said in (
        ({"prune_blocks": (4,), "prune_ratio": 0.1}, "prune_blocks must be from 1"),
        ({"prune_blocks": (1, 2), "prune_ratio": 0.5}, "must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=said):
            DependencyViT(**SMALL, **wrong)


def test_dependency_blocks_know_no_order():
    plain = perturbed(DependencyViT(**SMALL, init_values=0.5))
    x = noise(1, 3, 32, 32)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    tokens = plain._pos_embed(plain.patch_embed(x))
    state, other = plain._start(tokens, (4, 4)), plain._start(tokens, (4, 4))
    shuffled = tokens[:, order]
    for block in plain.blocks:  # nothing but the tokens themselves says where they are
        tokens, state = block(tokens, state)
        shuffled, other = block(shuffled, other)
    assert torch.allclose(tokens[:, order], shuffled, atol=1e-5)


@pytest.mark.parametrize(
    "name, count", [("resnet18_triplet", 11691912), ("resnet50_triplet", 25561832), ("resnet101_triplet", 44559060)]
)
def test_published_parameter_counts(name, count):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == count


def test_authors_names_load_through_attnzoo(tmp_path):
    small = {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32), "num_classes": 5}
    model = perturbed(timm.create_model("resnet18_triplet", **small))
    theirs = {"cw": "ChannelGateH", "hc": "ChannelGateW", "hw": "SpatialGate"}
    state = {}
    for name, value in model.state_dict().items():
        for ours, published in theirs.items():
            name = name.replace(f".se.{ours}.conv.", f".triplet_attention.{published}.spatial.")
        state["module." + name] = value
    torch.save({"state_dict": state}, tmp_path / "triplet.pth")
    other = timm.create_model("resnet18_triplet", **small).eval()
    report = attnzoo.backbones.load_published(other, tmp_path / "triplet.pth")
    assert torch.equal(other(noise(1, 3, 64, 64)), model(noise(1, 3, 64, 64)))
    assert (
        report.renamed["layer1.0.triplet_attention.ChannelGateH.spatial.conv.weight"]
        == "layer1.0.se.cw.conv.conv.weight"
    )
