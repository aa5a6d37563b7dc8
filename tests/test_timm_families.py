"""timm's own families: the authors' names that timm can't read, and MaxViT on our kernel against timm's."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import attnzoo  # noqa: F401  registers the names
from attnzoo.backbones.maxvit_cells import CellAttention, use_cell_attention
from attnzoo.backbones.timm_families import load_official_shvit, rename_official_shvit

SMALL = {"img_size": 96, "embed_dim": (8, 16), "depths": (1, 1), "stem_width": 8, "transformer_dim_head": 4}


def perturbed(name: str, **kwargs) -> nn.Module:
    model = timm.create_model(name, **{"num_classes": 5, **SMALL, **kwargs}).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", ["maxvit_tiny_tf_224", "maxvit_tiny_rw_224", "maxvit_rmlp_pico_rw_256"])
def test_cells_are_timms_attention(name):
    """Outputs and every parameter's gradient, for the three kinds of relative position bias."""
    theirs = perturbed(name)
    ours = copy.deepcopy(theirs)
    assert use_cell_attention(ours) == 4
    assert use_cell_attention(ours) == 0
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    want, got = theirs(x), ours(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    want.square().sum().backward()
    got.square().sum().backward()
    for (key, p), q in zip(theirs.named_parameters(), ours.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-8, msg=key)


def test_weights_go_both_ways():
    theirs = perturbed("maxvit_tiny_tf_512")
    ours = perturbed("maxvit_tiny_tf_512_attnzoo")
    assert any(isinstance(m, CellAttention) for m in ours.modules())
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 96, 96, dtype=torch.double)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    maps = timm.create_model("maxvit_tiny_tf_512_attnzoo", features_only=True, **SMALL)
    assert sum(isinstance(m, CellAttention) for m in maps.modules()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_published_variants(size):
    names = [f"maxvit_{size}_tf_512{suffix}" for suffix in ("", "_attnzoo")]
    theirs, ours = (timm.create_model(name, device="meta") for name in names)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert ours.pretrained_cfg["hf_hub_id"] == theirs.pretrained_cfg["hf_hub_id"]
    assert ours.pretrained_cfg["input_size"] == theirs.pretrained_cfg["input_size"]


def test_attention_dropout_trains_by_timms_path():
    model = perturbed("maxvit_tiny_tf_512_attnzoo", transformer_attn_drop=0.5).train()
    x = torch.randn(2, 3, 96, 96, dtype=torch.double)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="PartitionAttentionCl"):
        use_cell_attention(nn.Linear(2, 2))


def test_official_shvit_names():
    model = timm.create_model("shvit_s1", num_classes=3)
    state = model.state_dict()
    official = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "stages":
            stage, kind, index = int(parts[1]), parts[2], int(parts[3])
            if kind == "blocks":
                head = [str(index + (3 if stage else 0))]
            else:
                head = {0: ["0", "0"], 1: ["0", "1"], 2: ["1"], 3: ["2", "0"], 4: ["2", "1"]}[index]
            key = ".".join([f"blocks{stage + 1}", *head, *parts[4:]])
        official[key] = torch.randn_like(value) if value.is_floating_point() else value
    assert rename_official_shvit({"model": official}).keys() == state.keys()
    assert rename_official_shvit(state).keys() == state.keys()
    load_official_shvit(model, official)
    assert torch.equal(model.state_dict()["head.l.weight"], official["head.l.weight"])
    official.pop("blocks2.1.se.fc1.bias")
    with pytest.raises(RuntimeError, match="stages.1.downsample.2.se.fc1.bias"):
        load_official_shvit(model, official)
