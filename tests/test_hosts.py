"""Agent Attention, InLine attention and the hosts that they live in: what the model matrix does not ask."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from attnzoo.backbones import AgentPVT, AgentSwin, InLineCSwin, InLinePVT, InLineSwin
from attnzoo.backbones.agent import checkpoint_filter_fn
from attnzoo.backbones.blocks.agent import AgentMixer
from attnzoo.backbones.blocks.agent_sd import AgentCrossAttention, AgentSDBlock, TokenMerge
from attnzoo.backbones.blocks.inline import InLineMixer
from attnzoo.backbones.hosts.mixers import Mixer, Site, attn_schedule
from attnzoo.backbones.hosts.pvt import PVT
from attnzoo.backbones.hosts.swin import from_windows, to_windows
from attnzoo.errors import UnsupportedError

DOUBLE = {"dtype": torch.float64}


def close(got, want, tolerance=1e-9):
    assert got.shape == want.shape
    assert (got - want).norm() <= tolerance * want.norm().clamp_min(1e-6)


def site(size=(5, 4), key_size=None, prefix=0):
    return Site(12, 3, size, key_size or size, 0, 0, prefix, dd=DOUBLE)


def tokens(count, batch=2, seed=0):
    return torch.randn(batch, count, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prefix, key_size", [(0, (5, 4)), (1, (5, 4)), (0, (2, 2))])
def test_agents_are_the_formula(prefix, key_size):
    """Value and gradients of every table against two explicit softmaxes."""
    place = site((5, 4), key_size, prefix)
    mixer = AgentMixer(place, 4)
    query, key, value = tokens(prefix + 20), *(tokens(prefix + key_size[0] * key_size[1], seed=s) for s in (1, 2))
    got = mixer(query, key, value, (5, 4), key_size, query)

    def heads(x):
        return x.unflatten(-1, (3, 4)).transpose(1, 2)

    agents = F.adaptive_avg_pool2d(query[:, prefix:].transpose(1, 2).unflatten(2, (5, 4)), 2).flatten(2).transpose(1, 2)
    q, k, v, a = (heads(x) for x in (query, key, value, agents))
    first = (a @ k.transpose(2, 3) / 2 + mixer.agent_bias()).softmax(-1) @ v
    out = ((q @ a.transpose(2, 3) / 2 + mixer.query_bias()).softmax(-1) @ first).transpose(1, 2).flatten(2)
    grid = value[:, prefix:].transpose(1, 2).unflatten(2, key_size)
    if key_size != (5, 4):
        grid = F.interpolate(grid, size=(5, 4), mode="bilinear")
    local = mixer.dwc(grid).flatten(2).transpose(1, 2)
    want = torch.cat([out[:, :prefix], out[:, prefix:] + local], 1)
    close(got, want)
    weight = torch.randn_like(got)
    for have, wanted in zip(*(torch.autograd.grad((o * weight).sum(), mixer.parameters()) for o in (got, want))):
        close(have, wanted)


def test_inline_weights_sum_to_one_and_are_the_formula():
    mixer = InLineMixer(site())
    query, key = tokens(20), tokens(20, seed=1)
    constant = tokens(1, seed=2).expand(-1, 20, -1)
    with torch.no_grad():
        for parameter in mixer.residual[2].parameters():
            parameter.zero_()
    close(mixer(query, key, constant, (5, 4), (5, 4), query), constant)
    value = tokens(20, seed=3)
    q, k, v = (x.unflatten(-1, (3, 4)).transpose(1, 2) for x in (query, key, value))
    weights = q @ k.transpose(2, 3) / 2
    weights = weights / 20 + (1 - weights.mean(-1, keepdim=True)) / 20
    close(mixer(query, key, value, (5, 4), (5, 4), query), (weights @ v).transpose(1, 2).flatten(2))


def test_the_inline_filter_belongs_to_its_image():
    mixer = InLineMixer(site())
    x = tokens(20)
    both = mixer(x, x, x, (5, 4), (5, 4), x)
    close(mixer(x[1:], x[1:], x[1:], (5, 4), (5, 4), x[1:]), both[1:])


@pytest.mark.parametrize("size", [(56, 56), (112, 56)])
def test_the_swin_host_is_timms_swin(size):
    """With softmax in every block, timm's parameters give timm's output, shifted windows with masks included."""
    small = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3), "num_classes": 5}
    timms = timm.models.swin_transformer.SwinTransformer(img_size=size, window_size=7, strict_img_size=False, **small)
    timms = timms.double().eval()
    ours = InLineSwin(size, attn_type="SS", **small, **DOUBLE).eval()
    state = {}
    for name, value in timms.state_dict().items():
        name = name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head")
        name = name.replace("relative_position_bias_table", "mixer.rel_pos.relative_position_bias_table")
        if not name.endswith(("relative_position_index", "attn_mask")):
            state[name] = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(state))).double() * 0.3
            value.copy_(state[name])
    ours.load_state_dict(state)
    x = torch.randn(2, 3, *size, **DOUBLE)
    with torch.no_grad():
        close(ours(x), timms(x), 1e-8)


def test_windows_there_and_back():
    x = torch.randn(2, 6, 8, 3)
    windows = to_windows(x, (3, 4))
    assert windows.shape == (8, 12, 3)
    assert torch.equal(windows[1], x[0, :3, 4:].flatten(0, 1))
    assert torch.equal(from_windows(windows, (3, 4), (6, 8)), x)


def test_attn_schedule():
    mixers = {"A": "agent", "B": "softmax"}
    assert attn_schedule("AMB2", (1, 3, 2), mixers) == [["A"], ["A", "A", "B"], ["B", "B"]]
    for wrong in ("AB", "AMB", "AAB2", "AXB", "AMBx"):
        with pytest.raises(ValueError, match="attn_type must"):
            attn_schedule(wrong, (1, 3, 2), mixers)


def test_a_callable_is_a_mixer():
    """A host takes one's own attention, too."""

    class Mean(Mixer):
        def forward(self, query, key, value, size, key_size, context, mask=None):
            return value.mean(1, keepdim=True).expand_as(query)

    model = PVT(
        32, 4, (8, 8), (1, 1), (2, 2), (2, 2), sr_ratios={"X": (2, 1), "S": (2, 1)}, attn_type="XS",
        mixers={"X": Mean, "S": "softmax"}, num_classes=3,
    )  # fmt: skip
    assert model(torch.randn(1, 3, 40, 32)).shape == (1, 3)
    with pytest.raises(ValueError, match="mixer of 'X'"):
        PVT(32, 4, (8,), (1,), (2,), (2,), sr_ratios={"X": (1,)}, attn_type="X", mixers={"X": "hyena"})


def small_swin(**kwargs):
    settings = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2), "agent_num": (4, 4), "window_size": None}
    return AgentSwin(**{"img_size": 56, "attn_type": "AB", "num_classes": 3, **settings, **kwargs}).eval()


def test_set_input_size_is_building_for_it_and_loading():
    """Both ways to another size give the same model, and the way back at the same size changes nothing."""
    model = small_swin()
    x = torch.randn(1, 3, 56, 56)
    want = model(x)
    model.set_input_size(56)
    assert torch.equal(model(x), want)
    built = small_swin(img_size=(84, 56))
    built.load_state_dict(checkpoint_filter_fn(model.state_dict(), model=built))
    model.set_input_size((84, 56))
    y = torch.randn(1, 3, 84, 56)
    assert torch.allclose(model(y), built(y), atol=1e-6)
    with pytest.raises(ValueError, match="set_input_size"):
        model(x)


@pytest.mark.parametrize(
    "name, size", [("agent_deit_tiny", (48, 32)), ("agent_pvt_tiny", (64, 96)), ("agent_cswin_tiny", 64)]
)
def test_other_sizes_on_request(name, size):
    from backbone_families import FAMILIES

    entry, small, _, _ = FAMILIES[name.removesuffix("_tiny")]
    model = timm.create_model(entry, **small, num_classes=3).eval()
    model.set_input_size(size)
    height, width = size if isinstance(size, tuple) else (size, size)
    assert model(torch.randn(1, 3, height, width)).shape == (1, 3)
    again = timm.create_model(entry, **{**small, "img_size": size}, num_classes=3)
    again.load_state_dict(model.state_dict())


def test_pvt_at_twice_the_size():
    """The second stage's map is then the first's of before, whose position embedding the authors would not resample."""
    small = {"embed_dims": (8, 8), "depths": (1, 1), "num_heads": (2, 2), "mlp_ratios": (2, 2), "sr_ratios": (1, 1)}
    model = InLinePVT(32, **small, attn_type="II", la_sr_ratios="11", num_classes=3).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    with torch.no_grad():
        model.pos_embed2.copy_(torch.randn(1, 1, 8).expand(1, 16, 8))
    x = torch.randn(1, 8, 8, 8)
    embedded = model.patch_embed2(F.pad(x, (0, 8, 0, 8)))
    assert torch.allclose(
        model._enter(1, F.pad(x, (0, 8, 0, 8)).permute(0, 2, 3, 1)) - embedded, model.pos_embed2[:, :1]
    )


COUNTS = {
    "agent_deit_tiny": 6015640, "agent_deit_small_448": 23070472, "agent_deit_base": 87204904,
    "agent_pvt_medium_256": 36083682, "agent_swin_small_288": 49707964, "agent_swin_base_384": 88305016,
    "Agent_CSWin_64_24181_tiny_224": 20458672, "agent_cswin_base_384": 73328416,
    "inline_deit_base": 23797096, "inline_pvt_large": 51154280, "inline_swin_base": 88350120,
    "inline_cswin_base": 73413640,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.filterwarnings("ignore:Mapping deprecated model name")
def test_published_parameter_counts(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="agent_num must be a square"):
        AgentMixer(site(), 5)
    with pytest.raises(ValueError, match="la_sr_ratios"):
        InLinePVT(64, la_sr_ratios="8421")
    with pytest.raises(ValueError, match="la_split_size must be the side of the map, 16"):
        InLineCSwin(64, 4, (1, 1), (2, 2), attn_type="IS", la_split_size="2-2", split_size=(2, 2))
    with pytest.raises(ValueError, match="agent_sr_ratios must have"):
        AgentPVT(64, agent_sr_ratios="11")
    with pytest.raises(ValueError, match="kernel must be one of"):
        InLineMixer(site(), "cosine")
    with pytest.raises(UnsupportedError, match="attn_drop"):
        AgentSwin(56, attn_drop_rate=0.1)
    with pytest.raises(UnsupportedError, match="dynamic_img_size must be off"):
        timm.create_model("inline_deit_tiny", dynamic_img_size=True)
    with pytest.raises(UnsupportedError, match="attn_mask"):
        model = timm.create_model("inline_deit_tiny", embed_dim=12, depth=1, num_heads=2, img_size=32)
        model.forward_features(torch.randn(1, 3, 32, 32), attn_mask=torch.zeros(5, 5))


def test_merging_tokens_and_back():
    x = torch.randn(2, 63, 5, **DOUBLE)
    merges = [TokenMerge(x, 7, 9, 0.5, 0.8, 2, 4, compat=compat) for compat in ("default", "official")]
    outs = [m.merge(x) for m in merges]
    close(*(m.unmerge(out) for m, (out, _) in zip(merges, outs)))
    assert outs[0][0].shape == (2, 63 - 31, 5) and outs[0][1].shape == (2, 63 - 50, 5)
    assert torch.equal(merges[0].dst_index, torch.tensor([0, 4, 18, 22, 36, 40]))
    nothing = TokenMerge(x, 7, 9, 0.0, 0.0)
    out, agents = nothing.merge(x)
    assert agents is None and torch.equal(nothing.unmerge(out), x)
    drawn = TokenMerge(x, 7, 9, 0.5, 0.8, generator=torch.Generator().manual_seed(0))
    assert len(drawn.dst_index) == 12 and sorted(torch.cat([drawn.dst_index, drawn.src_index]).tolist()) == list(
        range(63)
    )
    with pytest.raises(ValueError, match="height \\* width must be"):
        TokenMerge(x, 7, 8, 0.5, 0.8)


def test_agent_sd_without_agents_is_plain_attention():
    layer = AgentCrossAttention(16, None, 2, 8, **DOUBLE)
    x = torch.randn(2, 12, 16, **DOUBLE)
    close(layer(x, agent=x[:, :6]), layer(x))
    assert (layer(x, agent=x[:, :5]) - layer(x)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="agent must be None in cross-attention"):
        layer(x, agent=x[:, :2], context=x[:, :3])
    ff = nn.Sequential(nn.Linear(16, 16, **DOUBLE))
    block = AgentSDBlock(16, 2, 8, 12, ff, ratio=0.4, agent_ratio=0.95, **DOUBLE)
    tokens_, context = torch.randn(2, 64, 16, **DOUBLE), torch.randn(2, 3, 12, **DOUBLE)
    assert block(tokens_, context, (8, 8)).shape == (2, 64, 16)
    whole = block(tokens_, context, (16, 16))  # a reduced map stays whole
    block.merging["ratio"] = block.merging["agent_ratio"] = 0.0
    close(block(tokens_, context, (8, 8)), whole)
