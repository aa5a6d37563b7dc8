"""The generator room: its floor on ten diffusers families, and GNA on that floor."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import diffusers
import goldens
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, AttnProcessor
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnzoo import generators
from attnzoo.errors import ReachError, SeamError, UnsupportedError
from attnzoo.generators.chain import Layer, Link
from attnzoo.generators.hooks import ATTENTION_HOOK, Frame, Intercept


class Case(NamedTuple):
    """A tiny model of one family, its forward's arguments, its grid and text, and a window that is not neutral."""

    model: nn.Module
    inputs: dict[str, Any]
    grid: tuple[int, ...]
    num_text: int
    kernel_size: tuple[int, ...]


def flux(height: int = 6, width: int = 5, text: int = 7) -> Case:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    inputs = {
        "hidden_states": torch.randn(2, height * width, 4),
        "encoder_hidden_states": torch.randn(2, text, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3),
    }
    return Case(model, inputs, (height, width), text, (3, 3))


def sd3() -> Case:
    model = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, 16),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.tensor([500.0, 500.0]),
    }
    return Case(model, inputs, (6, 8), 5, (3, 4))


def wan() -> Case:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 8, 12),
        "encoder_hidden_states": torch.randn(2, 6, 16),
        "timestep": torch.tensor([400, 400]),
    }
    return Case(model, inputs, (3, 4, 6), 0, (2, 3, 3))


def hunyuan_video() -> Case:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
    )
    inputs = {
        "hidden_states": torch.randn(3, 4, 3, 8, 8),
        "encoder_hidden_states": torch.randn(3, 7, 16),
        "encoder_attention_mask": (torch.arange(7) < torch.tensor([[5], [7], [5]])).long(),
        "pooled_projections": torch.randn(3, 8),
        "timestep": torch.tensor([5, 5, 5]),
        "guidance": torch.tensor([1000.0] * 3),
    }
    return Case(model, inputs, (3, 4, 4), 7, (2, 3, 3))


def cogvideox() -> Case:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=6,
    )
    inputs = {
        "hidden_states": torch.randn(1, 3, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.tensor([5]),
    }
    return Case(model, inputs, (3, 4, 4), 6, (2, 3, 3))


def ltx() -> Case:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=16,
    )
    inputs = {
        "hidden_states": torch.randn(1, 2 * 4 * 5, 8),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.tensor([5]),
        "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 5,
    }
    return Case(model, inputs, (2, 4, 5), 0, (1, 3, 3))


def qwen_image() -> Case:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    inputs = {
        "hidden_states": torch.randn(2, 24, 16),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1, 1]]).bool(),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_shapes": [[(1, 4, 6)]] * 2,
    }
    return Case(model, inputs, (1, 4, 6), 7, (1, 3, 3))


def pixart() -> Case:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=16,
        patch_size=2,
        caption_channels=16,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 12),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "timestep": torch.tensor([3, 3]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return Case(model, inputs, (8, 6), 0, (3, 3))


def dit() -> Case:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=100,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([3, 3]),
        "class_labels": torch.tensor([1, 2]),
    }
    return Case(model, inputs, (8, 8), 0, (3, 3))


def unet() -> Case:
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    inputs = {
        "sample": torch.randn(2, 4, 14, 10),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": torch.randn(2, 5, 8),
    }
    return Case(model, inputs, (14, 10), 0, (3, 3))


FAMILIES: dict[str, Callable[[], Case]] = {
    make.__name__: make for make in (flux, sd3, wan, hunyuan_video, cogvideox, ltx, qwen_image, pixart, dit, unet)
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(name: str) -> Case:
    """The family's tiny model with weights large enough for attention to be far from uniform."""
    case = FAMILIES[name]()
    with torch.no_grad():
        for parameter in case.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    case.model.eval().requires_grad_(False)
    return case


def as_double(case: Case) -> Case:
    """The same in float64."""
    inputs = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.inputs.items()
    }
    return case._replace(model=case.model.double(), inputs=inputs)


def run(case: Case, **changes: Any) -> Tensor:
    with torch.no_grad():
        return case.model(**{**case.inputs, **changes}, return_dict=False)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_neutral_window_is_dense_and_off_is_exact(name: str) -> None:
    case = build(name)
    dense = run(case)
    before = {n: set(vars(m)) for n, m in case.model.named_modules()}
    with generators.enable(case.model, "gna", kernel_size=1000) as handle:
        assert torch.equal(run(case), dense)
        assert handle.report()["denoisers"][0]["density"] == 1.0
    with generators.enable(case.model, "gna", kernel_size=case.kernel_size) as handle:
        on = run(case)
        row = handle.report()["denoisers"][0]
        assert row["grid"] == case.grid and row["num_text"] == case.num_text and row["layers"]
        assert 0 < row["density"] < 1
        assert torch.equal(run(case), on)
    assert (on - dense).abs().max() > 1e-3
    assert on.isfinite().all()
    assert torch.equal(run(case), dense)
    assert {n: set(vars(m)) for n, m in case.model.named_modules()} == before


# ---------------------------------------------------------------- what GNA computes


class Explicit(TorchFunctionMode):
    """Every self-attention of the grid as dense attention under an explicit [N, N] mask."""

    def __init__(self, case: Case, **window: Any) -> None:
        super().__init__()
        self.case, self.window, self.calls = case, window, 0

    def mask_of(self, num_tokens: int) -> Tensor | None:
        grid, num_text = self.case.grid, self.case.num_text
        if isinstance(self.case.model, diffusers.UNet2DConditionModel):
            while math.prod(grid) > num_tokens:
                grid = tuple(math.ceil(n / 2) for n in grid)
        if num_tokens not in (math.prod(grid), math.prod(grid) + num_text):
            return None
        joint = num_tokens - math.prod(grid)
        image_first = isinstance(
            self.case.model, (diffusers.SD3Transformer2DModel, diffusers.HunyuanVideoTransformer3DModel)
        )
        start = 0 if image_first or not joint else num_text
        mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
        own = slice(start, start + math.prod(grid))
        mask[own, own] = generators.window_mask(grid, **self.window)
        return mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query = kwargs["query"] if "query" in kwargs else args[0]
            key = kwargs["key"] if "key" in kwargs else args[1]
            mask = self.mask_of(query.shape[-2]) if query.shape[-2] == key.shape[-2] else None
            if mask is not None:
                self.calls += 1
                given = kwargs.get("attn_mask")
                kwargs["attn_mask"] = mask if given is None else mask & given
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", FAMILIES)
def test_gna_is_dense_attention_under_an_explicit_mask(name: str) -> None:
    case = as_double(build(name))
    kernel_size = case.kernel_size
    window = {"kernel_size": kernel_size, "stride": tuple(max(1, k - 1) for k in kernel_size)}
    with Explicit(case, **window) as explicit:
        wanted = run(case)
    with generators.enable(case.model, "gna", **window) as handle:
        got = run(case)
        assert explicit.calls == len(handle.report()["denoisers"][0]["layers"])
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"is_causal": True}, {"is_causal": (False, True), "stride": 2}])
def test_gna_dilated_and_causal(options: dict[str, Any]) -> None:
    case = as_double(build("flux"))
    with Explicit(case, kernel_size=(2, 2), **options):
        wanted = run(case)
    with generators.enable(case.model, "gna", kernel_size=(2, 2), **options):
        torch.testing.assert_close(run(case), wanted, rtol=1e-7, atol=1e-9)


def test_causal_full_window_is_not_neutral() -> None:
    case = build("dit")
    with generators.enable(case.model, "gna", kernel_size=8, is_causal=True):
        on = run(case)
    assert (on - run(case)).abs().max() > 1e-3


def attend(
    layout: generators.TokenLayout, mask: Tensor | None = None, batch: int = 2, **options: Any
) -> tuple[Tensor, Tensor]:
    """GNA on random tensors, and the same by dense attention under `dense_mask`."""
    query, key, value = torch.randn(3, batch, 4, layout.length, 8, dtype=torch.float64)
    method = generators.METHODS["gna"](len(layout.grid), **options)
    stock = F.scaled_dot_product_attention
    layer = Layer("layer", 0)
    got = method.attend(query, key, value, mask, layout, generators.StepContext(), layer, stock)
    seen = torch.ones(layout.length, layout.length, dtype=torch.bool)
    own = slice(layout.grid_start, layout.grid_start + layout.num_grid)
    seen[own, own] = generators.window_mask(layout.grid, **{k: v for k, v in options.items() if k != "backend"})
    if mask is None:
        return got, stock(query, key, value, seen)
    whole = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)
    return got, stock(query, key, value, whole)


@pytest.mark.parametrize("text", ["first", "last"])
def test_references_and_text_are_seen_by_all_and_stay_dense(text: str) -> None:
    layout = generators.TokenLayout((4, 5), num_text=3, text=text, references=(6, 2))
    got, wanted = attend(layout, kernel_size=(3, 3))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("text", ["first", "last"])
@pytest.mark.parametrize("rows", [[[1, 0, 1], [1, 1, 1]], [[1, 0, 1], [0, 1, 1]], [[0, 0, 0], [1, 1, 0]]])
def test_padded_text_is_seen_by_nobody(text: str, rows: list[list[int]]) -> None:
    padding = torch.tensor(rows).bool()
    layout = generators.TokenLayout((4, 5), num_text=3, text=text, references=(2,)).with_padding(padding)
    image = torch.ones(2, 22, dtype=torch.bool)
    order = [padding, image] if text == "first" else [image, padding]
    got, wanted = attend(layout, torch.cat(order, dim=1)[:, None, None], kernel_size=(3, 3))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("shape", [(2, 1, 1, 23), (2, 4, 23, 23), (23, 23), (1, 1, 23, 23)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_any_other_mask_is_anded_with_the_window(shape: tuple[int, ...], kind: str) -> None:
    layout = generators.TokenLayout((4, 5), num_text=3, text="first")
    mask = torch.rand(shape) > 0.3 if kind == "bool" else torch.randn(shape, dtype=torch.float64)
    got, wanted = attend(layout, mask, kernel_size=(3, 4), stride=(1, 2))
    torch.testing.assert_close(got, wanted)


def test_a_general_mask_over_too_many_tokens_is_refused() -> None:
    layout = generators.TokenLayout((1, 20000))
    query = torch.zeros(1, 1, 20000, 8)
    method = generators.METHODS["gna"](2, kernel_size=(1, 3))
    with pytest.raises(UnsupportedError, match="all pairs of 20000 tokens"):
        method.attend(
            query,
            query,
            query,
            torch.zeros(1, 1, 1, 20000),
            layout,
            generators.StepContext(),
            Layer("x", 0),
            F.scaled_dot_product_attention,
        )


def test_heads_left_out_stay_dense() -> None:
    case = build("sd3")
    dense = run(case)
    with generators.enable(case.model, "gna", kernel_size=3):
        all_heads = run(case)
    with generators.enable(case.model, "gna", kernel_size=3, heads=range(4)):
        torch.testing.assert_close(run(case), all_heads)
    with generators.enable(case.model, "gna", kernel_size=3, heads=[2, 0]):
        some = run(case)
    assert (some - dense).abs().max() > 1e-3 and (some - all_heads).abs().max() > 1e-3
    query = torch.randn(1, 4, 12, 8)
    layout, ctx, layer = generators.TokenLayout((3, 4)), generators.StepContext(), Layer("x", 0)
    method = generators.METHODS["gna"](2, kernel_size=(1, 2))
    stock = F.scaled_dot_product_attention
    full = method.attend(query, query, query, None, layout, ctx, layer, stock)
    part = Link(method, 0, (1, 3)).attend(query, query, query, None, layout, ctx, layer, stock)
    torch.testing.assert_close(part[:, [1, 3]], full[:, [1, 3]])
    torch.testing.assert_close(part[:, [0, 2]], stock(query, query, query)[:, [0, 2]])


def test_references_of_flux_kontext() -> None:
    case = as_double(build("flux"))
    reference = torch.ones(6, 3)
    reference[:, 1:] = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    changes = {
        "img_ids": torch.cat([case.inputs["img_ids"], reference]),
        "hidden_states": torch.cat([case.inputs["hidden_states"], torch.randn(2, 6, 4, dtype=torch.float64)], dim=1),
    }
    dense = run(case, **changes)
    with generators.enable(case.model, "gna", kernel_size=100):
        assert torch.equal(run(case, **changes), dense)
    with generators.enable(case.model, "gna", kernel_size=3) as handle:
        on = run(case, **changes)
        assert handle.report()["denoisers"][0]["grid"] == (6, 5)
    assert (on - dense).abs().max() > 1e-3


def test_reference_images_of_qwen_edit() -> None:
    case = build("qwen_image")
    changes = {
        "img_shapes": [[(1, 4, 6), (1, 2, 3)]] * 2,
        "hidden_states": torch.cat([case.inputs["hidden_states"], torch.randn(2, 6, 16)], dim=1),
    }
    dense = run(case, **changes)
    with generators.enable(case.model, "gna", kernel_size=(1, 3, 3)):
        assert (run(case, **changes) - dense).abs().max() > 1e-3
    with generators.enable(case.model, "gna", kernel_size=100):
        assert torch.equal(run(case, **changes), dense)


def test_training_through_gna() -> None:
    case = build("dit")
    case.model.requires_grad_(True)
    with generators.enable(case.model, "gna", kernel_size=3):
        case.model(**case.inputs, return_dict=False)[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in case.model.transformer_blocks.parameters())
    assert case.model.transformer_blocks[0].attn1.to_q.weight.grad.abs().max() > 0


def test_permuted_sequence_is_put_in_order_and_back() -> None:
    """A context-parallel rank order: the chain sees canonical tokens, the model gets its own order back."""
    case = build("dit")
    order = torch.randperm(64)
    inputs = torch.randn(1, 2, 64, 8)
    module = case.model.transformer_blocks[0].attn1
    with generators.enable(case.model, "gna", kernel_size=3):
        hook = module._diffusers_hook.get_hook(ATTENTION_HOOK)
        stock = F.scaled_dot_product_attention

        def through(tensor: Tensor, layout: generators.TokenLayout) -> Tensor:
            mode = Intercept(hook, hook.links, Frame(layout, generators.StepContext(), (True,)))
            with mode:
                return F.scaled_dot_product_attention(tensor, tensor, tensor)

        plain = through(inputs, generators.TokenLayout((8, 8)))
        moved = through(inputs[:, :, order], generators.TokenLayout((8, 8), permutation=order))
    torch.testing.assert_close(moved, plain[:, :, order])
    assert (plain - stock(inputs, inputs, inputs)).abs().max() > 1e-3


# ---------------------------------------------------------------- the floor: on and off, owners, misses


def is_clean(model: nn.Module) -> bool:
    """No hook and no replaced forward anywhere; cache_context leaves an empty registry of its own on a denoiser."""
    registries = [vars(m)["_diffusers_hook"] for m in model.modules() if "_diffusers_hook" in vars(m)]
    return not any(r.hooks for r in registries) and not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", ["flux", "unet"])
def test_exception_in_a_forward_leaves_the_model_clean(name: str) -> None:
    case = build(name)
    dense = run(case)
    broken = {"timestep": "no tensor"}
    with generators.enable(case.model, "gna", kernel_size=3):
        on = run(case)
        with pytest.raises((TypeError, AttributeError, ValueError)):
            run(case, **broken)
        assert torch.equal(run(case), on)
    assert torch.equal(run(case), dense)
    with pytest.raises(KeyError), generators.enable(case.model, "gna", kernel_size=3):
        raise KeyError
    assert is_clean(case.model) and torch.equal(run(case), dense)
    assert not torch.overrides._get_current_function_mode_stack()


def test_second_owner_is_refused_and_changes_nothing() -> None:
    case = build("flux")
    first = generators.enable(case.model, "gna", kernel_size=3)
    on = run(case)
    with pytest.raises(ValueError, match="already on"):
        generators.enable(case.model, "gna", kernel_size=5)
    with pytest.raises(ValueError, match="must differ"):
        generators.enable(build("dit").model, [("gna", {"kernel_size": 3}), ("gna", {"kernel_size": 5})])
    assert torch.equal(run(case), on)
    first.disable()
    first.disable()
    assert is_clean(case.model) and not first.enabled
    with pytest.raises(ValueError, match="disabled"):
        first.new_run(3)
    with generators.enable(case.model, [("gna", {"kernel_size": 3})]):
        assert torch.equal(run(case), on)


def test_another_hook_of_diffusers_stays() -> None:
    """Hooks registered before, between and after ours survive ours."""
    case = build("dit")
    attention = case.model.transformer_blocks[0].attn1
    seen: list[str] = []

    class Note(ModelHook):
        def __init__(self, label: str) -> None:
            super().__init__()
            self.label = label

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(self.label)
            return args, kwargs

    registry = HookRegistry.check_if_exists_or_initialize(attention)
    registry.register_hook(Note("before"), "before")
    handle = generators.enable(case.model, "gna", kernel_size=3)
    on = run(case)
    registry.register_hook(Note("after"), "after")
    seen.clear()
    assert torch.equal(run(case), on) and seen == ["after", "before"]
    handle.disable()
    seen.clear()
    off = run(case)
    assert seen == ["after", "before"] and (on - off).abs().max() > 1e-3
    registry.remove_hook("before")
    registry.remove_hook("after")
    assert torch.equal(run(case), off)


@pytest.mark.parametrize("first", ["accelerate", "attnzoo"])
def test_accelerate_hooks_in_either_order(first: str) -> None:
    """enable_model_cpu_offload takes its hooks off and on at the end of every run: ours must stay below them."""
    hooks = pytest.importorskip("accelerate.hooks")
    case = build("dit")
    dense = run(case)
    modules = [case.model, case.model.transformer_blocks[0].attn1]

    def put() -> None:
        for module in modules:
            hooks.add_hook_to_module(module, hooks.ModelHook())

    if first == "accelerate":
        put()
    handle = generators.enable(case.model, "gna", kernel_size=3)
    if first == "attnzoo":
        put()
    on = run(case)
    assert (on - dense).abs().max() > 1e-3
    for module in modules:
        hooks.remove_hook_from_module(module)
    assert torch.equal(run(case), on)
    put()
    assert torch.equal(run(case), on)
    handle.disable()
    assert torch.equal(run(case), dense) and all(hasattr(m, "_hf_hook") for m in modules)
    for module in modules:
        hooks.remove_hook_from_module(module)
    assert torch.equal(run(case), dense)
    assert not any("_diffusers_hook" in vars(m) for m in case.model.modules())


def test_group_offload_stays(tmp_path: Any) -> None:
    case = build("dit")
    dense = run(case)
    with generators.enable(case.model, "gna", kernel_size=3):
        on = run(case)
    cpu = torch.device("cpu")
    diffusers.hooks.apply_group_offloading(
        case.model, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
    assert torch.equal(run(case), dense)
    with generators.enable(case.model, "gna", kernel_size=3):
        assert torch.equal(run(case), on)
    assert torch.equal(run(case), dense)


def test_two_threads_with_two_models_do_not_meet() -> None:
    cases = [build("flux"), build("dit"), build("flux")]
    windows: list[Any] = [3, (1, 5), 1000]
    wanted = []
    for case, window in zip(cases, windows):
        with generators.enable(case.model, "gna", kernel_size=window):
            wanted.append(run(case))
    dense = [run(case) for case in cases]
    start = threading.Barrier(len(cases) + 1)
    problems: list[str] = []

    def work(index: int, window: Any) -> None:
        start.wait()
        for _ in range(4):
            if window is None:
                if not torch.equal(run(plain), plain_dense):
                    problems.append("the plain model changed")
                continue
            with generators.enable(cases[index].model, "gna", kernel_size=window):
                if not torch.equal(run(cases[index]), wanted[index]):
                    problems.append(f"case {index} differs")

    plain = build("dit")
    plain_dense = run(plain)
    threads = [threading.Thread(target=work, args=(i, w)) for i, w in enumerate([*windows, None])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert all(torch.equal(run(case), d) for case, d in zip(cases, dense))


def test_two_threads_on_one_model_wait_for_each_other() -> None:
    case, other = build("flux"), flux(4, 7)
    with generators.enable(case.model, "gna", kernel_size=3):
        wanted = [run(case), run(case, **other.inputs)]
        problems: list[int] = []

        def work(index: int) -> None:
            for _ in range(5):
                if not torch.equal(run(case, **(other.inputs if index else {})), wanted[index]):
                    problems.append(index)

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems


def test_a_silent_miss_is_an_error_that_names_the_backend() -> None:
    case = build("flux")
    dense = run(case)
    case.model.set_attention_backend("native")
    with generators.enable(case.model, "gna", kernel_size=3):
        on = run(case)
    case.model.set_attention_backend("flex")
    try:
        with generators.enable(case.model, "gna", kernel_size=3):
            with pytest.raises(SeamError, match="'flex'.*native"):
                run(case)
            case.model.set_attention_backend("native")
            assert torch.equal(run(case), on)
    finally:
        case.model.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    assert torch.equal(run(case), dense)
    unet = build("unet")
    for module in unet.model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    with generators.enable(unet.model, "gna", kernel_size=3), pytest.raises(SeamError, match="AttnProcessor never"):
        run(unet)


def test_a_layer_outside_of_its_model_is_an_error() -> None:
    case = build("dit")
    case.model.requires_grad_(True).train().enable_gradient_checkpointing()
    with generators.enable(case.model, "gna", kernel_size=3):
        loss = case.model(**case.inputs, return_dict=False)[0].sum()
        with pytest.raises(SeamError, match="gradient checkpointing"):
            loss.backward()


def test_image_prompt_adapter_calls_are_left_alone() -> None:
    """A second attention in a module, here with as many keys as there are image tokens, is no self-attention."""
    case = build("flux")
    attention = case.model.transformer_blocks[0].attn
    plain = attention.processor
    calls: list[tuple[int, int]] = []

    class WithAdapter:
        _attention_backend = None
        _parallel_config = None

        def __call__(
            self,
            attn: nn.Module,
            hidden_states: Tensor,
            encoder_hidden_states: Any = None,
            attention_mask: Any = None,
            image_rotary_emb: Any = None,
        ) -> Any:
            hidden, text = plain(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
            query = hidden_states.unflatten(-1, (2, -1)).transpose(1, 2)
            calls.append((query.shape[-2], query.shape[-2]))
            wanted = torch.softmax(query @ query.transpose(-1, -2) * query.shape[-1] ** -0.5, -1) @ query
            got = F.scaled_dot_product_attention(query, query, query)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
            return hidden, text

    attention.processor = WithAdapter()
    with generators.enable(case.model, "gna", kernel_size=3):
        run(case)
    assert calls == [(30, 30)]


def test_fused_projections_give_the_same() -> None:
    for name in ("flux", "pixart", "unet"):
        case = build(name)
        with generators.enable(case.model, "gna", kernel_size=3):
            split = run(case)
            case.model.fuse_qkv_projections()
            torch.testing.assert_close(run(case), split, rtol=1e-4, atol=1e-4)
            case.model.unfuse_qkv_projections()
            assert torch.equal(run(case), split)


def test_pyramid_attention_broadcast_above_is_served_and_beneath_is_refused() -> None:
    case = build("flux")
    cache = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    )
    moved = {"hidden_states": case.inputs["hidden_states"] + 0.1}
    with generators.enable(case.model, "gna", kernel_size=3):
        on, on_moved = run(case), run(case, **moved)
        case.model.enable_cache(cache)
        assert torch.equal(run(case), on)
        assert (run(case, **moved) - on_moved).abs().max() > 1e-5  # reused
        case.model.disable_cache()
        assert torch.equal(run(case, **moved), on_moved)
    case.model.enable_cache(cache)
    with generators.enable(case.model, "gna", kernel_size=3):
        run(case)
        with pytest.raises(SeamError, match="pyramid_attention_broadcast.*first"):
            run(case)
    case.model.disable_cache()


def test_a_guider_that_skips_scores_on_the_same_layer_is_refused() -> None:
    case = build("dit")
    skip = diffusers.LayerSkipConfig(
        [1], fqn="transformer_blocks", skip_attention=False, skip_ff=False, skip_attention_scores=True
    )
    diffusers.hooks.apply_layer_skip(case.model, skip)
    with (
        generators.enable(case.model, "gna", kernel_size=3),
        pytest.raises(UnsupportedError, match=r"transformer_blocks\.1\.attn1.*PAG"),
    ):
        run(case)
    with generators.enable(case.model, "gna", kernel_size=3, layers="*.0.*"):
        run(case)


def test_context_parallel_is_refused() -> None:
    case = build("flux")
    case.model._parallel_config = object()
    with (
        generators.enable(case.model, "gna", kernel_size=3),
        pytest.raises(UnsupportedError, match="context parallelism"),
    ):
        run(case)


# ---------------------------------------------------------------- steps, runs, branches


def flux_pipeline(scheduler: Any = None) -> Any:
    return diffusers.FluxPipeline(
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=build("flux").model,
    )


class Trace(NamedTuple):
    """Latents after each step, and the report at each step."""

    latents: list[Tensor]
    rows: list[dict[str, Any]]


def draw(pipe: Any, handle: Any = None, steps: int = 4, **options: Any) -> Trace:
    """A run of a Flux pipeline from embeddings to latents."""
    generator = torch.Generator().manual_seed(0)
    trace = Trace([], [])

    def note(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        trace.latents.append(given["latents"].clone())
        trace.rows.extend(handle.report()["denoisers"] if handle is not None else [])
        return given

    pipe.set_progress_bar_config(disable=True)
    pipe(
        prompt_embeds=torch.randn(1, 7, 32, generator=generator),
        pooled_prompt_embeds=torch.randn(1, 32, generator=generator),
        num_inference_steps=steps,
        height=96,
        width=80,
        output_type="latent",
        generator=generator,
        callback_on_step_end=note,
        **options,
    )
    return trace


def test_steps_and_runs_come_from_the_scheduler() -> None:
    pipe = flux_pipeline()
    dense = draw(pipe)
    with generators.enable(pipe, "gna", kernel_size=3, steps=range(1, 3)) as handle:
        some = draw(pipe, handle)
        assert [(r["step"], r["total"], r["run"]) for r in some.rows] == [(i, 4, 0) for i in range(4)]
        assert some.rows[0]["grid"] == (6, 5) and some.rows[0]["component"] == "transformer"
        again = draw(pipe, handle)
        assert {r["run"] for r in again.rows} == {1}
        assert all(torch.equal(a, b) for a, b in zip(some.latents, again.latents))
        draw(pipe, handle, steps=1)
        assert [r["run"] for r in draw(pipe, handle, steps=1).rows] == [3]
    assert torch.equal(some.latents[0], dense.latents[0])
    assert (some.latents[1] - dense.latents[1]).abs().max() > 1e-4
    with generators.enable(pipe, "gna", kernel_size=3):
        every = draw(pipe)
    assert (every.latents[0] - dense.latents[0]).abs().max() > 1e-4
    with generators.enable(pipe, "gna", kernel_size=3, steps=[0, 1, -2, -1]):
        assert all(torch.equal(a, b) for a, b in zip(draw(pipe).latents, every.latents))
    with generators.enable(pipe, "gna", kernel_size=3, steps=slice(4, None)):
        assert all(torch.equal(a, b) for a, b in zip(draw(pipe).latents, dense.latents))
    assert all(torch.equal(a, b) for a, b in zip(draw(pipe).latents, dense.latents))


def test_an_exception_in_mid_denoising_leaves_pipeline_and_count_clean() -> None:
    pipe = flux_pipeline()
    dense = draw(pipe)
    with generators.enable(pipe, "gna", kernel_size=3, steps=slice(1, 3)) as handle:
        wanted = draw(pipe, handle)

        class Stop(Exception):
            pass

        def stop(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == 2:
                raise Stop
            return given

        with pytest.raises(Stop):
            pipe(
                prompt_embeds=torch.zeros(1, 7, 32),
                pooled_prompt_embeds=torch.zeros(1, 32),
                num_inference_steps=4,
                height=96,
                width=80,
                output_type="latent",
                callback_on_step_end=stop,
            )
        after = draw(pipe, handle)
        assert [r["step"] for r in after.rows] == [0, 1, 2, 3]
        assert all(torch.equal(a, b) for a, b in zip(wanted.latents, after.latents))
    assert all(torch.equal(a, b) for a, b in zip(draw(pipe).latents, dense.latents))


def test_branches_are_the_names_that_the_pipeline_gives() -> None:
    pipe = flux_pipeline()
    negative = {
        "negative_prompt_embeds": torch.randn(1, 7, 32),
        "negative_pooled_prompt_embeds": torch.randn(1, 32),
        "true_cfg_scale": 3.0,
    }
    dense = draw(pipe, **negative)
    ends = {}
    for branches in ("cond", "uncond", ["cond", "uncond"], None):
        with generators.enable(pipe, "gna", kernel_size=3, branches=branches) as handle:
            trace = draw(pipe, handle, **negative)
            assert {r["branch"] for r in trace.rows} == {"uncond"}  # the call that comes last in a step
            assert [r["step"] for r in trace.rows] == [0, 1, 2, 3]
            ends[str(branches)] = trace.latents[-1]
    assert torch.equal(ends["None"], ends["['cond', 'uncond']"])
    different = [dense.latents[-1], ends["cond"], ends["uncond"], ends["None"]]
    assert all((a - b).abs().max() > 1e-5 for i, a in enumerate(different) for b in different[:i])
    case = build("flux")
    with (
        generators.enable(case.model, "gna", kernel_size=3, branches="cond"),
        pytest.raises(UnsupportedError, match="cache_context"),
    ):
        run(case)


def test_image_to_image_begins_later_in_the_schedule_and_shares_the_denoiser() -> None:
    pipe = flux_pipeline()
    with generators.enable(pipe, "gna", kernel_size=3) as handle:
        sibling = diffusers.FluxImg2ImgPipeline.from_pipe(pipe)
        with pytest.raises(ValueError, match="from_pipe"):
            generators.enable(sibling, "gna", kernel_size=3)
        sibling.scheduler.set_timesteps(4, mu=1.0)
        sibling.scheduler.set_begin_index(2)
        run(build("flux")._replace(model=pipe.transformer))
        row = handle.report()["denoisers"][0]
        assert (row["step"], row["total"]) == (2, 4)


def test_a_scheduler_exchanged_after_enable_is_followed() -> None:
    pipe = flux_pipeline()
    with generators.enable(pipe, "gna", kernel_size=3, steps=[1]) as handle:
        pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.set_timesteps(3)
        case = build("flux")._replace(model=pipe.transformer)
        run(case)
        row = handle.report()["denoisers"][0]
        assert (row["step"], row["total"]) == (0, len(pipe.scheduler.timesteps))


def test_bare_models_and_schedulers_without_step_index_need_new_run() -> None:
    case = build("dit")
    dense = [run(case, timestep=torch.tensor([t, t])) for t in (9, 6, 3)]

    class Bare:
        components: ClassVar[dict[str, Any]] = {"transformer": case.model}
        scheduler = diffusers.DDIMScheduler()

    for target in (case.model, Bare()):
        with generators.enable(target, "gna", kernel_size=3, steps=[1]) as handle:
            with pytest.raises(UnsupportedError, match="new_run"):
                run(case)
            for number in range(2):
                handle.new_run(3)
                outs = []
                for t in (9, 6, 3):
                    run(case, timestep=torch.tensor([t, t]))  # guidance by two calls repeats the timestep
                    outs.append(run(case, timestep=torch.tensor([t, t])))
                assert [torch.equal(a, b) for a, b in zip(outs, dense)] == [True, False, True]
                assert handle.report()["denoisers"][0]["run"] == number
            with pytest.raises(UnsupportedError, match="run of 3"):
                run(case, timestep=torch.tensor([1, 1]))


def test_two_denoisers_of_one_pipeline_share_their_steps() -> None:
    case = build("wan")
    with torch.no_grad():
        second = diffusers.WanTransformer3DModel.from_config(case.model.config).eval().requires_grad_(False)
        second.load_state_dict(case.model.state_dict())
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        transformer=case.model,
        transformer_2=second,
        boundary_ratio=0.5,
    )
    pipe.set_progress_bar_config(disable=True)

    def draw_video() -> Tensor:
        torch.manual_seed(1)
        return pipe(
            prompt_embeds=torch.randn(1, 6, 16),
            negative_prompt_embeds=torch.randn(1, 6, 16),
            height=64,
            width=96,
            num_frames=9,
            num_inference_steps=4,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames

    dense = draw_video()
    with generators.enable(pipe, "gna", kernel_size=(2, 3, 3)) as handle:
        on = draw_video()
        rows = handle.report()["denoisers"]
        assert [r["component"] for r in rows] == ["transformer", "transformer_2"]
        assert [r["run"] for r in rows] == [0, 0] and rows[1]["step"] == 3 and 0 <= rows[0]["step"] < 3
        assert rows[0]["grid"] == (3, 4, 6)
    assert (on - dense).abs().max() > 1e-4
    with generators.enable(pipe.transformer_2, "gna", kernel_size=(2, 3, 3)):
        half = draw_video()
    assert (half - dense).abs().max() > 1e-4 and (half - on).abs().max() > 1e-4
    assert torch.equal(draw_video(), dense) and is_clean(case.model) and is_clean(second)


# ---------------------------------------------------------------- torch.compile


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """Number of graphs that Dynamo has made since the test began."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    yield lambda: counters["unique_graphs"] - before
    torch._dynamo.reset()


def schedule_of(case: Case, call: Callable[..., Any], steps: int = 4) -> list[Tensor]:
    """The outputs of `steps` timesteps."""
    with torch.no_grad():
        return [
            call(**{**case.inputs, "timestep": case.inputs["timestep"] * 0 + (steps - i)}, return_dict=False)[0]
            for i in range(steps)
        ]


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_compiled_whole_model_equals_eager_over_a_schedule(name: str, graphs: Callable[[], int]) -> None:
    case = build(name)
    dense = schedule_of(case, case.model)
    options = {"kernel_size": 3, "steps": slice(1, 3)}
    with generators.enable(case.model, "gna", **options) as handle:
        handle.new_run(4)
        wanted = schedule_of(case, case.model)
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(schedule_of(case, compiled), dense))
    with generators.enable(compiled, "gna", **options) as handle:
        handle.new_run(4)
        got = schedule_of(case, compiled)
        assert handle.report()["denoisers"][0]["step"] == 3
        made = graphs()
        handle.new_run(4)
        schedule_of(case, compiled)
        assert graphs() == made  # a graph per phase, not per step
        with pytest.raises(Exception, match="timestep|NoneType|str"):
            compiled(**{**case.inputs, "timestep": "none"})
        handle.new_run(4)
        assert all(torch.equal(a, b) for a, b in zip(schedule_of(case, compiled), got))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert [torch.equal(a, b) for a, b in zip(got, dense)] == [True, False, False, True]
    assert all(torch.equal(a, b) for a, b in zip(schedule_of(case, compiled), dense))
    assert not compiled._forward_hooks and not compiled._forward_pre_hooks


@pytest.mark.parametrize("name", ["flux", pytest.param("hunyuan_video", marks=pytest.mark.slow)])
def test_compiled_blocks_equal_eager_over_a_schedule(name: str, graphs: Callable[[], int]) -> None:
    case = build(name)
    dense = schedule_of(case, case.model)
    options = {"kernel_size": 3, "steps": slice(1, 3)}
    with generators.enable(case.model, "gna", **options) as handle:
        handle.new_run(4)
        wanted = schedule_of(case, case.model)
    case.model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for a, b in zip(schedule_of(case, case.model), dense):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with generators.enable(case.model, "gna", **options) as handle:
        handle.new_run(4)
        got = schedule_of(case, case.model)
        made = graphs()
        handle.new_run(4)
        schedule_of(case, case.model)
        assert graphs() == made
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert [(a - b).abs().max() > 1e-3 for a, b in zip(got, dense)] == [False, True, True, False]
    for a, b in zip(schedule_of(case, case.model), dense):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compiling_after_enable_needs_the_grid_and_no_schedule(graphs: Callable[[], int]) -> None:
    case = build("flux")
    with generators.enable(case.model, "gna", kernel_size=3, grid=(6, 5)):
        wanted = run(case)
        compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(**case.inputs, return_dict=False)[0], wanted, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    for options, words in (({}, "img_ids"), ({"steps": [0], "grid": (6, 5)}, "steps= and branches=")):
        with generators.enable(case.model, "gna", kernel_size=3, **options):
            compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
            with torch.no_grad(), pytest.raises(Exception, match=words):
                compiled(**case.inputs)
        torch._dynamo.reset()


# ---------------------------------------------------------------- layers, bad input


def test_layers_are_chosen_by_name_pattern_index_and_slice() -> None:
    case = build("flux")
    names = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"]
    for layers, wanted in (
        (None, names),
        ("single*", names[1:]),
        ("transformer_blocks.0", names[:1]),
        (["*.1.attn", 0], [names[0], names[2]]),
        (-1, names[2:]),
        (slice(1, None), names[1:]),
        (range(2), names[:2]),
    ):
        with generators.enable(case.model, "gna", kernel_size=3, layers=layers) as handle:
            assert handle.report()["denoisers"][0]["layers"] == wanted
            chosen = run(case)
    with generators.enable(case.model, "gna", kernel_size=3):
        assert (run(case) - chosen).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, "kernel_size must be one value or one per axis", {"kernel_size": (3, 3, 3)}),
        (ValueError, "kernel_size must be at least 1", {"kernel_size": 0}),
        (TypeError, "kernel_size must hold int", {"kernel_size": 3.0}),
        (TypeError, "kernel_size must hold int", {"kernel_size": True}),
        (TypeError, "kernel_size", {}),
        (ValueError, "stride must be at most kernel_size", {"kernel_size": 3, "stride": (1, 4)}),
        (ValueError, "stride must be at least 1", {"kernel_size": 3, "stride": 0}),
        (ValueError, "dilation must be at least 1", {"kernel_size": 3, "dilation": -1}),
        (TypeError, "is_causal must hold bool", {"kernel_size": 3, "is_causal": 1}),
        (ValueError, "backend must be one of", {"kernel_size": 3, "backend": "cuda"}),
        (ValueError, "layers='nothing.*' matches none", {"kernel_size": 3, "layers": "nothing.*"}),
        (ValueError, "layers=7 matches none", {"kernel_size": 3, "layers": [0, 7]}),
        (ValueError, "chooses none", {"kernel_size": 3, "layers": []}),
        (TypeError, "layers must", {"kernel_size": 3, "layers": 1.5}),
        (TypeError, "steps must", {"kernel_size": 3, "steps": "first"}),
        (TypeError, "steps must", {"kernel_size": 3, "steps": [0.5]}),
        (ValueError, "steps must name", {"kernel_size": 3, "steps": []}),
        (ValueError, "heads must hold indices", {"kernel_size": 3, "heads": [-1]}),
        (TypeError, "heads must be", {"kernel_size": 3, "heads": "all"}),
        (TypeError, "branches must be names", {"kernel_size": 3, "branches": [0]}),
        (ValueError, "branches must name", {"kernel_size": 3, "branches": []}),
        (ValueError, "grid must be one value or one per axis", {"kernel_size": 3, "grid": (1, 6, 5)}),
        (TypeError, "windows", {"kernel_size": 3, "windows": 3}),
    ],
)
def test_bad_options_are_named_before_anything_changes(error: type, words: str, options: dict[str, Any]) -> None:
    case = build("flux")
    with pytest.raises(error, match=re.escape(words)):
        generators.enable(case.model, "gna", **options)
    assert is_clean(case.model)


def test_bad_targets_and_methods_are_named() -> None:
    case = build("flux")
    with pytest.raises(ValueError, match=r"method must be one of .*'gna'.*'natten'"):
        generators.enable(case.model, "natten", kernel_size=3)
    with pytest.raises(TypeError, match="diffusers pipeline or model, got str"):
        generators.enable("flux", "gna", kernel_size=3)
    with pytest.raises(UnsupportedError, match=r"known family in Linear; known are .*FluxTransformer2DModel"):
        generators.enable(nn.Linear(2, 2), "gna", kernel_size=3)
    with pytest.raises(TypeError, match="belong in the list"):
        generators.enable(case.model, [("gna", {"kernel_size": 3})], steps=[1])
    for methods in ([], [("gna",)], 3, ["gna"]):
        with pytest.raises(TypeError, match="method must"):
            generators.enable(case.model, methods)
    handle = generators.enable(case.model, "gna", kernel_size=3)
    for total, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="total must"):
            handle.new_run(total)
    handle.disable()
    assert is_clean(case.model)


def test_bad_inputs_of_a_forward_are_named() -> None:
    case = build("flux")
    with (
        generators.enable(case.model, "gna", kernel_size=3, heads=[2]),
        pytest.raises(UnsupportedError, match="heads="),
    ):
        run(case)
    with generators.enable(case.model, "gna", kernel_size=3, dilation=6), pytest.raises(ValueError, match="dilation="):
        run(case)
    ids = case.inputs["img_ids"]
    with generators.enable(case.model, "gna", kernel_size=3), pytest.raises(UnsupportedError, match="img_ids of 30"):
        run(case, img_ids=ids[torch.randperm(30)])
    with generators.enable(case.model, "gna", kernel_size=3, grid=(4, 5)) as handle:
        run(case)  # a smaller grid leaves the rest as references
        assert handle.report()["denoisers"][0]["grid"] == (4, 5)
    with generators.enable(case.model, "gna", kernel_size=3, grid=(7, 5)), pytest.raises(ValueError, match="grid"):
        run(case)
    video = build("ltx")
    with generators.enable(video.model, "gna", kernel_size=3), pytest.raises((UnsupportedError, TypeError)):
        run(video, num_frames=None)
    unet = build("unet")
    with generators.enable(unet.model, "gna", kernel_size=3, grid=(9, 9)), pytest.raises(SeamError, match="halving"):
        run(unet)
    with generators.enable(unet.model, "gna", kernel_size=3, dilation=6), pytest.raises(ValueError, match="layers="):
        run(unet)
    edit = build("qwen_image")
    with generators.enable(edit.model, "gna", kernel_size=3), pytest.raises(UnsupportedError, match="img_shapes"):
        run(edit, img_shapes=[[(1, 4, 6)], [(1, 6, 4)]])


# ---------------------------------------------------------------- density, plan, generate, goldens


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((7,), {"kernel_size": 3}),
        ((6, 8), {"kernel_size": (3, 4), "stride": (2, 3)}),
        ((6, 9), {"kernel_size": (3, 2), "dilation": (2, 3), "is_causal": (False, True)}),
        ((3, 4, 5), {"kernel_size": (1, 4, 2)}),
    ],
)
def test_density_is_the_share_of_the_mask(grid: tuple[int, ...], options: dict[str, Any]) -> None:
    wanted = generators.window_mask(grid, **options).double().mean().item()
    assert generators.density(grid, **options) == pytest.approx(wanted, rel=1e-12)


def test_density_of_known_windows() -> None:
    assert generators.density((256, 256), 80) == pytest.approx((80 / 256) ** 2)
    assert generators.density((4,), 4, is_causal=True) == 10 / 16
    for bad, words in (
        ({"kernel_size": 9}, "kernel_size * dilation"),
        ({"kernel_size": 3, "stride": 4}, "stride"),
        ({"kernel_size": (3, 3)}, "kernel_size"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            generators.density((8,), **bad)
    with pytest.raises(ValueError, match="16384"):
        generators.window_mask((256, 256), 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_plan_foretells_what_a_forward_reports(name: str) -> None:
    case = build(name)
    told = generators.plan(case.model, "gna", grid=case.grid, num_text=case.num_text, kernel_size=case.kernel_size)
    with generators.enable(case.model, "gna", kernel_size=case.kernel_size) as handle:
        run(case)
        row = handle.report()["denoisers"][0]
    assert told["grid"] == row["grid"]
    if name not in ("sd3", "unet"):  # their layers differ; the report tells the finest, joint one
        assert told["density"] == pytest.approx(row["density"])
    assert told["flops_ratio"] == pytest.approx(told["attention_flops_dense"] / told["attention_flops"])
    assert told["window_density"] == pytest.approx(generators.density(case.grid, case.kernel_size))
    sizes = {"flux": (1, 12, 10), "sd3": (1, 12, 16), "wan": (3, 8, 12), "hunyuan_video": (3, 8, 8)}
    sizes |= {"cogvideox": (3, 8, 8), "ltx": (2, 4, 5), "qwen_image": (1, 8, 12), "pixart": (1, 16, 12)}
    sizes |= {"dit": (1, 16, 16), "unet": (1, 14, 10)}
    frames, height, width = sizes[name]
    by_size = generators.plan(
        case.model, "gna", num_frames=frames, height=height, width=width, num_text=case.num_text,
        kernel_size=case.kernel_size,
    )  # fmt: skip
    assert by_size == told


def test_plan_of_a_pipeline_counts_pixels_and_layers() -> None:
    pipe = flux_pipeline()
    told = generators.plan(pipe, "gna", height=4096, width=4096, kernel_size=80, stride=16, num_text=512)
    assert told["grid"] == (256, 256)
    assert told["window_density"] == pytest.approx((80 / 256) ** 2, rel=1e-2)
    assert told["flops_ratio"] == pytest.approx(1 / told["density"])
    half = generators.plan(pipe, "gna", height=4096, width=4096, kernel_size=80, layers=[0])
    assert 1 < half["flops_ratio"] < 1.5 and half["density"] < 0.1
    dense = generators.plan(pipe, "gna", height=96, width=80, kernel_size=80)
    assert dense["flops_ratio"] == 1.0
    for options, words in (
        ({"height": 96}, "height and width"),
        ({"height": 1, "width": 1}, "no tokens"),
        ({"height": -1, "width": 8}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            generators.plan(pipe, "gna", kernel_size=3, **options)
    with pytest.raises(ValueError, match="num_text"):
        generators.plan(build("dit").model, "gna", grid=(8, 8), num_text=7, kernel_size=3)


class Painter:
    """A pipeline in diffusers' calling convention around the tiny Flux, from a prompt to a picture."""

    def __init__(self) -> None:
        self.inner = flux_pipeline()
        self.components = {"transformer": self.inner.transformer}
        self.scheduler = self.inner.scheduler

    def __call__(
        self, prompt: str, num_inference_steps: int = 2, height: int = 96, width: int = 80, generator: Any = None
    ) -> Any:
        torch.manual_seed(len(prompt))
        return self.inner(
            prompt_embeds=torch.randn(1, 7, 32),
            pooled_prompt_embeds=torch.randn(1, 32),
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            output_type="latent",
            generator=generator,
        )


def test_generate_switches_the_method_on_for_one_picture() -> None:
    pipe = Painter()
    pipe.inner.set_progress_bar_config(disable=True)
    dense = generators.generate("a", pipeline=pipe)
    on = generators.generate("a", pipeline=pipe, method="gna", kernel_size=3, steps=[0])
    assert (on - dense).abs().max() > 1e-4
    assert torch.equal(generators.generate("a", pipeline=pipe, method="gna", kernel_size=30), dense)
    assert torch.equal(generators.generate("a", pipeline=pipe), dense)
    assert not torch.equal(generators.generate("a", pipeline=pipe, seed=1), dense)
    assert generators.generate("a", pipeline=pipe, num_inference_steps=1, height=64, width=64).shape[0] == 16
    with pytest.raises(TypeError, match="kernel_size need a method"):
        generators.generate("a", pipeline=pipe, kernel_size=3)
    with pytest.raises(ValueError, match="seed"):
        generators.generate("a", pipeline=pipe, seed=-1)
    with pytest.raises(UnsupportedError, match="takes no prompt"):
        generators.generate("a", pipeline=build("dit").model)


def test_generate_says_what_can_not_be_reached(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (str(tmp_path / "nowhere"), "./nowhere", "nowhere", "a/b/c"):
        with pytest.raises(ReachError, match="there is no folder"):
            generators.generate("a", pipeline=name)
    with pytest.raises(ReachError, match="model_index.json"):
        generators.generate("a", pipeline=tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": ["diffusers", "X"]}')
    with pytest.raises((ReachError, ValueError, AttributeError)):
        generators.generate("a", pipeline=tmp_path)

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", unreachable)
    with pytest.raises(ReachError, match="'some/model': no route to the hub"):
        generators.generate("a", pipeline="some/model")


def test_a_saved_pipeline_is_loaded_from_its_folder(tmp_path: Any) -> None:
    case = build("dit")
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipe = diffusers.DiTPipeline(case.model, vae, diffusers.DPMSolverMultistepScheduler())
    pipe.save_pretrained(tmp_path)
    loaded = generators.load_pipeline(tmp_path, device="cpu")
    assert isinstance(loaded, diffusers.DiTPipeline)
    assert torch.equal(run(case._replace(model=loaded.transformer)), run(case))
    with pytest.raises(UnsupportedError, match="DiTPipeline takes no prompt"):
        generators.generate("a", pipeline=str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_goldens(dtype: torch.dtype) -> None:
    """The authors' numbers, by the adapter and by the method itself with the extra keys as text."""
    root = goldens.root()
    if root is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no goldens: set ATTNZOO_GOLDENS")
        pytest.skip("no goldens beside this checkout; set ATTNZOO_GOLDENS to run this")
    paths = sorted((root / "generators" / "gna").glob("*.json"))
    assert paths
    for path in paths:
        meta = {**json.loads(path.read_text()), "system": "gna", "variant": "case"}
        tensors = load_file(path.with_suffix(".safetensors"))
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        found = goldens.run(meta, {k: v for k, v in tensors.items() if k.startswith("in.")})
        wanted = {k: v for k, v in tensors.items() if k.startswith("out.")}
        assert set(found) >= set(wanted)
        for name, value in wanted.items():
            if value.dtype == torch.bool:
                assert torch.equal(found[name], value)
            else:
                torch.testing.assert_close(found[name].to(dtype), value, rtol=1e-4, atol=1e-5)
        if "in.additional_keys" not in tensors:
            continue
        config = meta["config"]
        grid, extra = tuple(config["token_layout"]), tensors["in.additional_keys"].shape[1]
        joint = [
            torch.cat([tensors[f"in.additional_{n}s"], tensors[f"in.{n}"].flatten(1, -3)], 1) for n in ("key", "value")
        ]
        query = torch.cat([torch.zeros_like(tensors["in.additional_keys"]), tensors["in.query"].flatten(1, -3)], 1)
        options = {n: tuple(config[n]) for n in ("kernel_size", "stride", "dilation", "is_causal")}
        layout = generators.TokenLayout(grid, num_text=extra, text="first")
        got = generators.METHODS["gna"](len(grid), **options).attend(
            *(t.transpose(1, 2) for t in (query, *joint)), None, layout, generators.StepContext(), Layer("golden", 0),
            F.scaled_dot_product_attention,
        )  # fmt: skip
        merged = tensors["out.merged_out"].flatten(1, -3).transpose(1, 2)
        torch.testing.assert_close(got[:, :, extra:], merged, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- upstream seams: what this room relies on


class TestUpstreamSeams:
    """Facts of diffusers and torch; a release that changes one fails here, with its name."""

    def test_attention_modules_have_the_two_known_bases(self) -> None:
        for name in FAMILIES:
            model = FAMILIES[name]().model
            found = [n for n, m in model.named_modules() if hasattr(m, "to_q") or hasattr(m, "to_qkv")]
            kinds = (Attention, diffusers.models.attention.AttentionModuleMixin)
            assert found and all(isinstance(model.get_submodule(n), kinds) for n in found)

    def test_known_families_exist_under_their_names(self) -> None:
        assert len(generators.FAMILIES) == 10
        for name in generators.FAMILIES:
            assert issubclass(getattr(diffusers, name), nn.Module)

    def test_processors_call_the_public_function_with_heads_second(self) -> None:
        seen: list[tuple[int, ...]] = []

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is F.scaled_dot_product_attention:
                    seen.append(tuple((kwargs or {})["query"].shape if "query" in (kwargs or {}) else args[0].shape))
                return func(*args, **(kwargs or {}))

        case = build("flux")
        with Watch():
            run(case)
        assert seen == [(2, 2, 37, 16)] * 3

    def test_a_mode_is_off_inside_its_own_answer(self) -> None:
        inner: list[int] = []

        class Once(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                inner.append(1)
                return func(*args, **(kwargs or {}))

        x = torch.randn(1, 1, 4, 8)
        with Once():
            F.scaled_dot_product_attention(x, x, x)
        assert inner == [1]

    def test_sdpa_s_arguments_have_their_names(self) -> None:
        x = torch.randn(1, 2, 4, 8)
        mask = torch.ones(4, 4, dtype=torch.bool)
        F.scaled_dot_product_attention(x, x, x, mask, 0.0, False, scale=0.5, enable_gqa=False)
        F.scaled_dot_product_attention(query=x, key=x, value=x, attn_mask=mask, dropout_p=0.0, is_causal=False)

    def test_hook_registry_behaves_as_we_undo_it(self) -> None:
        class Pass(ModelHook):
            pass

        module = nn.Linear(2, 2)
        registry = HookRegistry.check_if_exists_or_initialize(module)
        assert module._diffusers_hook is registry
        registry.register_hook(Pass(), "one")
        assert "forward" in vars(module) and list(registry.hooks) == ["one"]
        registry.remove_hook("one", recurse=False)
        assert vars(module)["forward"].__func__ is nn.Linear.forward and not registry.hooks
        registry.invalidate_child_registries_cache()

    def test_cache_context_reaches_state_managers_of_stateful_hooks(self) -> None:
        class Stateful(ModelHook):
            _is_stateful = True

            def __init__(self) -> None:
                super().__init__()
                self.manager = StateManager(dict)

            def reset_state(self, module: nn.Module) -> nn.Module:
                return module

        model = build("flux").model
        hook = Stateful()
        HookRegistry.check_if_exists_or_initialize(model).register_hook(hook, "stateful")
        assert hook.manager._context is None
        with model.cache_context("cond"):
            assert hook.manager._context.name == "cond"
        assert hook.manager._context is None

    @pytest.mark.parametrize(
        "name", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"]
    )
    def test_schedulers_step_index_is_none_until_the_first_step(self, name: str) -> None:
        scheduler = getattr(diffusers, name)()
        x = torch.zeros(1, 4)
        for _ in range(2):
            scheduler.set_timesteps(3)
            timesteps = scheduler.timesteps
            assert scheduler.step_index is None and getattr(scheduler, "begin_index", None) is None
            scheduler.step(x, timesteps[0], x)
            assert scheduler.step_index == 1 and scheduler.timesteps is timesteps
        assert not hasattr(diffusers.DDIMScheduler(), "step_index")

    def test_accelerate_keeps_the_wrapped_forward_in_old_forward(self) -> None:
        hooks = pytest.importorskip("accelerate.hooks")
        module = nn.Linear(2, 2)
        hooks.add_hook_to_module(module, hooks.ModelHook())
        assert {"_hf_hook", "_old_forward", "forward"} <= set(vars(module))
        module._old_forward = lambda x: x + 1
        assert torch.equal(module(torch.ones(1)), torch.full((1,), 2.0))

    def test_layer_skip_enters_the_same_kind_of_mode(self) -> None:
        from diffusers.hooks.layer_skip import AttentionProcessorSkipHook, AttentionScoreSkipFunctionMode

        assert issubclass(AttentionScoreSkipFunctionMode, TorchFunctionMode)
        assert AttentionProcessorSkipHook(lambda: None, skip_attention_scores=True).skip_attention_scores

    def test_torch_compile_keeps_the_model_in_orig_mod(self) -> None:
        model = nn.Linear(2, 2)
        assert torch.compile(model)._orig_mod is model
