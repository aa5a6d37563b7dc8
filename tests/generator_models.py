"""Tiny models of the diffusers families, and what the generator room's tests do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import diffusers


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


def flux2(height: int = 6, width: int = 5, text: int = 7) -> Case:
    model = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    ids = torch.zeros(height, width, 4)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    inputs = {
        "hidden_states": torch.randn(2, height * width, 4),
        "encoder_hidden_states": torch.randn(2, text, 32),
        "timestep": torch.tensor([0.5, 0.5]),
        "guidance": torch.tensor([4.0, 4.0]),
        "img_ids": ids.reshape(-1, 4),
        "txt_ids": torch.zeros(text, 4),
    }
    return Case(model, inputs, (height, width), text, (3, 3))


def hunyuan_video15() -> Case:
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(4, 4, 4),
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 4, 4),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_attention_mask": (torch.arange(7) < torch.tensor([[5], [7]])).long(),
        "encoder_hidden_states_2": torch.randn(2, 3, 8),
        "encoder_attention_mask_2": (torch.arange(3) < torch.tensor([[2], [1]])).long(),
        "image_embeds": torch.zeros(2, 2, 8),
        "timestep": torch.tensor([5.0, 5.0]),
    }
    return Case(model, inputs, (3, 4, 4), 12, (2, 3, 3))


def mochi() -> Case:
    model = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=6,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 8, 8),
        "encoder_hidden_states": torch.randn(2, 6, 16),
        "encoder_attention_mask": torch.arange(6) < torch.tensor([[6], [4]]),
        "timestep": torch.tensor([5, 5]),
    }
    return Case(model, inputs, (3, 4, 4), 6, (2, 3, 3))


def cosmos() -> Case:
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=True,
        extra_pos_embed_type="learnable",
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 8, 12),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "timestep": torch.tensor([0.5, 0.5]),
        "fps": 16,
        "padding_mask": torch.zeros(1, 1, 64, 96),
    }
    return Case(model, inputs, (3, 4, 6), 0, (2, 3, 3))


def z_image() -> Case:
    model = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 8],
        axes_lens=[128, 32, 32],
    )
    inputs = {
        "x": [torch.randn(4, 1, 12, 10), torch.randn(4, 1, 12, 10)],
        "t": torch.tensor([0.5, 0.5]),
        "cap_feats": [torch.randn(5, 16), torch.randn(40, 16)],
    }
    return Case(model, inputs, (6, 5), 64, (3, 3))


FAMILIES: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        flux,
        sd3,
        wan,
        hunyuan_video,
        cogvideox,
        ltx,
        qwen_image,
        pixart,
        dit,
        unet,
        flux2,
        hunyuan_video15,
        mochi,
        cosmos,
        z_image,
    )
}


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

    def double(value: Any) -> Any:
        if isinstance(value, list):
            return [double(v) for v in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    inputs = {name: double(value) for name, value in case.inputs.items()}
    return case._replace(model=case.model.double(), inputs=inputs)


def run(case: Case, **changes: Any) -> Tensor:
    with torch.no_grad():
        out = case.model(**{**case.inputs, **changes}, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def is_clean(model: nn.Module) -> bool:
    """No hook and no replaced forward anywhere; cache_context leaves an empty registry of its own on a denoiser."""
    registries = [vars(m)["_diffusers_hook"] for m in model.modules() if "_diffusers_hook" in vars(m)]
    return not any(r.hooks for r in registries) and not any("forward" in vars(m) for m in model.modules())


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


class UNetLoop(diffusers.DiffusionPipeline):
    """The loop of Stable Diffusion without its encoders.

    guided: the batch holds both branches, the unconditional one first. shift: moves the latents by one, in the model's
    units, before each step.
    """

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.shift = False
        self.guided = False

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guided

    @torch.no_grad()
    def __call__(self, latents: Tensor, text: Tensor, steps: int = 3) -> Tensor:
        self.scheduler.set_timesteps(steps)
        latents = latents * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(latents, t)
            if self.guided:
                both = torch.cat([scaled] * 2)
                noise = self.unet(both, t, encoder_hidden_states=torch.cat([text * 0, text]), return_dict=False)[0]
                uncond, cond = noise.chunk(2)
                noise = uncond + 3.0 * (cond - uncond)
            else:
                noise = self.unet(scaled, t, encoder_hidden_states=text, return_dict=False)[0]
            if self.shift:
                latents = latents + latents.mean() / scaled.mean()
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents
