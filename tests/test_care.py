"""CARE Transformer: what is special about it, beside the model matrix and the goldens."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from backbone_families import FAMILIES
from torch import Tensor

from attnzoo.backbones import CAREBlock, CARETokenMixer, CARETransformer, convert
from attnzoo.kernels.dispatch import use_backend

_ENTRY, _SMALL, _, _ = FAMILIES["care"]


def small(**kwargs) -> CARETransformer:
    return timm.create_model(_ENTRY, **{"num_classes": 5, **_SMALL, **kwargs})


def plain_mixer(mixer: CARETokenMixer, x: Tensor) -> Tensor:
    """The attention group by the formula, with the matrix of all pairs."""
    start = x.shape[1] - 3 * mixer.mem_dim
    group = x[:, start : start + mixer.mem_dim]
    query, key = (torch.where(t > 0, t + 1, t.exp()) for t in mixer.qk(group).chunk(2, 1))
    query, key, value = (t.flatten(2).unflatten(1, (mixer.num_heads, -1)).transpose(2, 3) for t in (query, key, group))
    count = query.shape[2]
    weights = query @ key.transpose(2, 3) / count
    weights = weights / (query @ key.mean(2)[..., None] + 1e-6)
    return (weights @ value).transpose(2, 3).flatten(1, 2).unflatten(-1, x.shape[2:])


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_attention_and_gradients_against_the_formula(backend):
    mixer = CARETokenMixer(20, 6, 3).double()
    x = torch.randn(2, 20, 5, 7, dtype=torch.float64, requires_grad=True)
    with use_backend(backend):
        memory, features = mixer(x)
        got = features[:, :6]
        grads = torch.autograd.grad(got.square().sum(), [x, mixer.qk.weight])
    want = plain_mixer(mixer, x)
    torch.testing.assert_close(got, want)
    assert torch.equal(memory, x[:, :2])
    for got_grad, want_grad in zip(grads, torch.autograd.grad(want.square().sum(), [x, mixer.qk.weight])):
        torch.testing.assert_close(got_grad, want_grad)


def test_attention_weights_sum_to_one():
    mixer = CARETokenMixer(12, 4, 2).double()
    x = torch.randn(1, 12, 3, 4, dtype=torch.float64)
    x[:, :4] = 1.0  # the values are the group itself
    torch.testing.assert_close(mixer(x)[1][:, :4], torch.ones(1, 4, 3, 4, dtype=torch.float64), atol=1e-5, rtol=0)


def test_there_may_be_no_memory():
    memory, features = CARETokenMixer(12, 4)(torch.randn(1, 12, 6, 5))
    assert memory.shape == (1, 0, 6, 5) and features.shape == (1, 12, 6, 5)


def test_only_the_last_block_of_the_fourth_stage_widens():
    model = small()
    assert model.num_features == 32 and [i["num_chs"] for i in model.feature_info] == [8, 12, 16, 32]
    three = CARETransformer((1, 1, 1), (6, 9, 12), (2, 3, 4), ((2, 2),) * 3, (1, 1, 2), num_classes=3)
    assert three.num_features == 16 and three.stages[2].blocks[0].gamma is not None


def test_the_pair_of_heads():
    model, x = small().train(), torch.randn(2, 3, 32, 32)
    model.set_distilled_training()
    head, dist_head = model(x)
    assert head.shape == dist_head.shape == (2, 5) and not torch.equal(head, dist_head)
    model.set_distilled_training(False)
    torch.testing.assert_close(model(x), (head + dist_head) / 2)
    model.set_distilled_training()
    assert model.eval()(x).shape == (2, 5)
    assert [m.out_features for m in model.get_classifier()] == [5, 5]
    model.reset_classifier(3)
    assert [m.out_features for m in model.get_classifier()] == [3, 3] and model(x).shape == (2, 3)


def test_the_map_without_pooling():
    model, x = small(global_pool="").eval(), torch.randn(1, 3, 64, 96)
    assert model(x).shape == (1, 2, 3, 5)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (1, 32, 2, 3)


def test_pruning_keeps_what_is_asked_for():
    model, x = small().eval(), torch.randn(1, 3, 32, 32)
    want = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    model.prune_intermediate_layers([1])
    torch.testing.assert_close(model(x), want)


def test_published_counts(goldens_root):
    for entry in json.loads((goldens_root / "backbones/care/official_keys.json").read_text()):
        model = timm.create_model(entry["entrypoint"].lower(), device="meta")
        assert sum(p.numel() for p in model.parameters()) == entry["params"]
        assert str(entry["published"]["top1"]) in model.pretrained_cfg["notes"][0]


def test_conversion_finds_the_number_of_classes(tmp_path):
    model = timm.create_model("caretrans_s0", num_classes=7)
    torch.save({"model": model.state_dict()}, tmp_path / "care.pth")
    report = convert(tmp_path / "care.pth", tmp_path / "out", "caretrans_s0")
    assert report.loaded == len(model.state_dict()) and not report.dropped
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}").num_classes == 7


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: CARETokenMixer(10, 4), "mem_dim must be at most a third of in_channels=10"),
        (lambda: CARETokenMixer(16, 4, 3), "att_head_dim must divide mem_dim=4, got 3"),
        (lambda: CAREBlock(16, 4, (2,)), "ratio must hold two"),
        (lambda: small(cls_dim=48), "cls_dim must be 32"),
        (lambda: small(depths=(1, 1)), "feat_dims must have one entry per stage"),
        (lambda: small(drop_path_rate=2.0), "drop_path_rate"),
        (lambda: small()(torch.randn(1, 3, 31, 64)), "at least 32 x 32"),
    ],
)
def test_mistakes_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()
