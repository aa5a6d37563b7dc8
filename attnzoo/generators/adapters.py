"""The only model-dependent code: how each diffusers family lays out its tokens. A few lines per family.

Families are found by the model's class name along its bases, so that nothing is imported before it is used.
Sources: diffusers 0.42.1, models/transformers/transformer_*.py, models/unets/unet_2d_condition.py.
"""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.errors import UnsupportedError
from attnzoo.generators.layout import TokenLayout

Arguments = Mapping[str, Any]

_OUTSIDE = "enable on the compiled model (torch.compile first, then enable), or compile its blocks instead"


class Family(ABC):
    """Base of the adapters, one object per denoiser. rank: axes of the grid; text: where text tokens stand.

    attention, cross, mlp: the last part of the names of self-attentions, of the cross-attentions that read the text
    ("" where there are none), and of the feed-forward layers. parts: the branches of a batch that holds both.
    masks: how padding text is kept out, see `TokenLayout`. positions: arguments that all samples of a batch share;
    per_sample: lists with an entry per sample.
    """

    rank = 2
    text = "none"
    pyramid = False
    attention = "attn1"
    cross = ""
    mlp: tuple[str, ...] = ("ff",)
    parts: tuple[str, ...] = ("uncond", "cond")
    masks: str = "keys"
    positions: tuple[str, ...] = ("img_ids", "txt_ids", "image_rotary_emb", "padding_mask")
    per_sample: tuple[str, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        self.config: Any = getattr(model, "config", None)
        self._parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The forward's given arguments by name."""
        return {**dict(zip(self._parameters, args)), **kwargs}

    def role(self, name: str) -> str | None:
        """What the module `name` is; None where it is none of these.

        "joint" or "image" (no text in its sequence): a self-attention over the grid; "cross": a cross-attention that
        reads the text; "mlp": a feed-forward layer.
        """
        last = name.rsplit(".", 1)[-1]
        if last == self.attention:
            return "image" if self.text == "none" else "joint"
        if last in self.mlp:
            return "mlp"
        return "cross" if self.cross and last == self.cross else None

    @abstractmethod
    def grid(self, given: Arguments) -> tuple[int, ...]:
        """The grid of one forward's arguments, in tokens."""

    @abstractmethod
    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """The grid of latents of `frames` x `height` x `width` latent pixels (before any packing)."""

    def grid_at(self, name: str, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The grid that the layer `name` sees, where the model's is `grid`."""
        return grid

    def references(self, given: Arguments, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Token counts of the reference images that follow the grid."""
        return self.filling(grid)

    def filling(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Token counts that follow any grid of that size, beside reference images."""
        return ()

    def padding(self, given: Arguments) -> Tensor | None:
        """bool [B, num_text], True where a text token is real; None where the model masks none."""
        return None

    def num_text(self, given: Arguments) -> int:
        """Text tokens in the joint sequence."""
        return int(given["encoder_hidden_states"].shape[1])

    def num_context(self, given: Arguments) -> int:
        """Text tokens that cross-attention layers read."""
        text = given.get("encoder_hidden_states")
        return int(text.shape[1]) if isinstance(text, Tensor) else 0

    def timestep(self, given: Arguments) -> Any:
        """The timestep among the arguments."""
        return given.get("timestep")

    def noise_level(self, given: Arguments) -> Any:
        """The timestep on the scale of the training schedule: 1000 is noise, 0 the picture."""
        return self.timestep(given)

    def layout(self, given: Arguments, grid: tuple[int, ...] | None = None) -> TokenLayout:
        """The layout of one forward. grid: the caller's own; read from the arguments where None."""
        grid = grid or self.grid(given)
        num_text = 0 if self.text == "none" else self.num_text(given)
        layout = TokenLayout(
            grid,
            num_text,
            self.text,
            self.references(given, grid),
            pyramid=self.pyramid,
            num_context=self.num_context(given) if self.cross else 0,
            masks=self.masks,
        )
        padding = self.padding(given) if num_text else None
        if padding is not None and torch.compiler.is_compiling():
            raise UnsupportedError(f"the text padding's values can't be read inside a compiled whole model: {_OUTSIDE}")
        return layout.with_padding(padding)


class _Patched2D(Family):
    """Latents [B, C, H, W] cut into squares of patch_size."""

    def grid(self, given: Arguments) -> tuple[int, ...]:
        return self.latent_grid(1, *given["hidden_states"].shape[-2:])

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        patch = self.config.patch_size
        return height // patch, width // patch


class DiT(_Patched2D):
    """DiT: image tokens only, a class label instead of text; its pipeline puts the conditional half first."""

    parts = ("cond", "uncond")


class PixArt(_Patched2D):
    """PixArt alpha and sigma: image tokens; text is read by attn2."""

    cross = "attn2"


class SD3(_Patched2D):
    """Stable Diffusion 3 and 3.5: [image, text]; 3.5 medium adds image-only attn2 in its first layers."""

    text = "last"
    attention = "attn"
    mlp = ("ff", "ff_context")

    def role(self, name: str) -> str | None:
        return "image" if name.rsplit(".", 1)[-1] == "attn2" else super().role(name)


class UNet(Family):
    """UNet2DConditionModel (Stable Diffusion 1, 2, XL): image tokens per level; text is read by attn2."""

    pyramid = True
    cross = "attn2"

    def grid(self, given: Arguments) -> tuple[int, ...]:
        return tuple(given["sample"].shape[-2:])

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        return height, width

    def grid_at(self, name: str, grid: tuple[int, ...]) -> tuple[int, ...]:
        deepest = len(self.config.block_out_channels) - 1
        part, index = name.split(".")[:2]
        levels = {"down_blocks": range(deepest + 1), "up_blocks": range(deepest, -1, -1)}
        for _ in range(levels[part][int(index)] if part in levels else deepest):
            grid = tuple((n + 1) // 2 for n in grid)
        return grid


class Flux(Family):
    """Flux: [text, image, references]; positions in img_ids [N, 3], whose first column is 0 on the image itself."""

    text = "first"
    attention = "attn"
    mlp = ("ff", "ff_context")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._seen: tuple[weakref.ref[Tensor], int | None, tuple[int, ...]] | None = None

    def grid(self, given: Arguments) -> tuple[int, ...]:
        ids: Tensor = given["img_ids"]
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                f"Flux's grid stands in the values of img_ids, which a compiled whole model can't read: pass "
                f"grid=(height, width) in tokens to enable, {_OUTSIDE}"
            )
        # The pipeline passes one img_ids to all steps: read the device once per run, not once per step. Inference
        # tensors don't count their changes, so they are read each time.
        version = None if ids.is_inference() else ids._version
        if self._seen is not None and self._seen[0]() is ids and self._seen[1] == version is not None:
            return self._seen[2]
        rows = (ids[0] if ids.ndim == 3 else ids).cpu().long()
        own = rows[rows[:, 0] == 0, 1:3]
        height, width = (own.amax(0) + 1).tolist() if len(own) else (0, 0)
        expected = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        if not len(own) or len(own) != len(expected) or not torch.equal(rows[: len(own), 1:3], expected):
            raise UnsupportedError(
                f"img_ids of {len(rows)} tokens is no {height} x {width} grid, row by row, followed by references: "
                "the token order of this Flux variant is not known here"
            )
        self._seen = (weakref.ref(ids), version, (height, width))
        return height, width

    def noise_level(self, given: Arguments) -> Any:
        return given["timestep"] * 1000

    def references(self, given: Arguments, grid: tuple[int, ...]) -> tuple[int, ...]:
        rest = given["hidden_states"].shape[1] - grid[0] * grid[1]
        if rest < 0:
            raise ValueError(f"grid={grid} has more tokens than the image's {given['hidden_states'].shape[1]}")
        return (rest,) if rest else ()

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        return height // 2, width // 2


class Flux2(Flux):
    """Flux 2: [text, image, references]; positions (t, y, x, l) in img_ids, whose t is 0 on the image itself."""

    def layout(self, given: Arguments, grid: tuple[int, ...] | None = None) -> TokenLayout:
        if given.get("kv_cache") is not None or given.get("num_ref_tokens"):
            raise UnsupportedError(
                "Flux 2 with a cache of its references' keys and values has its reference tokens in another place, or "
                "not in the sequence at all: run it without kv_cache and num_ref_tokens"
            )
        return super().layout(given, grid)


class ZImage(Family):
    """Z-Image: [image, text], each filled up to a multiple of 32 tokens; lists of samples as arguments.

    The tokens that fill up the image are attended like any other: they count as a reference that follows the grid. The
    noise refiner sees the image alone. Its pipeline puts the conditional half first.
    """

    text = "last"
    attention = "attention"
    mlp = ("feed_forward",)
    parts = ("cond", "uncond")
    per_sample = ("x", "cap_feats")
    _MULTIPLE = 32  # diffusers' SEQ_MULTI_OF

    def role(self, name: str) -> str | None:
        stage = name.split(".")[0]
        if stage in ("context_refiner", "siglip_refiner"):
            return None  # they see text, or the encoder's image, only
        role = super().role(name)
        return "image" if stage == "noise_refiner" and role == "joint" else role

    def grid(self, given: Arguments) -> tuple[int, ...]:
        images = given["x"]
        if isinstance(images[0], list):
            raise UnsupportedError("Z-Image with several images a sample (omni) has a token order not known here")
        shapes = {tuple(image.shape[1:]) for image in images}
        if len(shapes) > 1:
            raise UnsupportedError(f"the images of one batch must be of one size, got {sorted(shapes)}")
        frames, height, width = shapes.pop()
        patch, frame_patch = given.get("patch_size") or 2, given.get("f_patch_size") or 1
        if frames != frame_patch:
            raise UnsupportedError(f"Z-Image has one frame here, got {frames}")
        return height // patch, width // patch

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        return height // 2, width // 2

    def _filled(self, tokens: int) -> int:
        return tokens + -tokens % self._MULTIPLE

    def filling(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        filling = -(grid[0] * grid[1]) % self._MULTIPLE
        return (filling,) if filling else ()

    def num_text(self, given: Arguments) -> int:
        return max(self._filled(len(text)) for text in given["cap_feats"])

    def padding(self, given: Arguments) -> Tensor | None:
        lengths = [self._filled(len(text)) for text in given["cap_feats"]]
        if len(set(lengths)) == 1:
            return None
        return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def timestep(self, given: Arguments) -> Any:
        return given.get("t")

    def noise_level(self, given: Arguments) -> Any:
        return (1 - given["t"]) * 1000


class QwenImage(Family):
    """Qwen-Image and its edit models: [text, image, references]; grids in img_shapes, text padding masked."""

    rank = 3
    text = "first"
    attention = "attn"
    mlp = ("img_mlp", "txt_mlp")
    per_sample = ("img_shapes", "txt_seq_lens")

    def noise_level(self, given: Arguments) -> Any:
        return given["timestep"] * 1000

    @staticmethod
    def _shapes(given: Arguments) -> list[tuple[int, ...]]:
        """The grids of one sample, image first; samples of one batch must agree."""
        entries = [e if isinstance(e, list) else [e] for e in given["img_shapes"]]
        samples = [[tuple(int(n) for n in grid) for grid in entry] for entry in entries]
        if any(sample != samples[0] for sample in samples):
            raise UnsupportedError(f"img_shapes must be the same for all samples of a batch, got {given['img_shapes']}")
        return samples[0]

    def grid(self, given: Arguments) -> tuple[int, ...]:
        return self._shapes(given)[0]

    def references(self, given: Arguments, grid: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(frames * height * width for frames, height, width in self._shapes(given)[1:])

    def padding(self, given: Arguments) -> Tensor | None:
        return given.get("encoder_hidden_states_mask")

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        return frames, height // 2, width // 2


class _Volume(Family):
    """Latents [B, C, frames, H, W]."""

    rank = 3

    def grid(self, given: Arguments) -> tuple[int, ...]:
        return self.latent_grid(*given["hidden_states"].shape[-3:])


def _patched(sizes: tuple[int, ...], patches: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n // patch for n, patch in zip(sizes, patches))


class HunyuanVideo(_Volume):
    """HunyuanVideo: [video, text]; as many text tokens as the mask counts are real, the first ones."""

    text = "last"
    attention = "attn"
    mlp = ("ff", "ff_context")

    def role(self, name: str) -> str | None:
        return None if name.startswith("context_embedder.") else super().role(name)  # the refiner sees text only

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        patch = self.config.patch_size
        return frames // self.config.patch_size_t, height // patch, width // patch

    def padding(self, given: Arguments) -> Tensor | None:
        mask = given["encoder_attention_mask"]
        return torch.arange(mask.shape[1], device=mask.device) < mask.sum(dim=1, keepdim=True)


class HunyuanVideo15(HunyuanVideo):
    """HunyuanVideo 1.5: [video, text]; the text is image, glyph and prompt tokens, real ones of all three first."""

    masks = "pairs"

    def num_text(self, given: Arguments) -> int:
        names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
        return sum(int(given[name].shape[1]) for name in names)

    def padding(self, given: Arguments) -> Tensor | None:
        prompt, glyphs = given["encoder_attention_mask"].bool(), given["encoder_attention_mask_2"].bool()
        image = given["image_embeds"]
        real = prompt.sum(1) + glyphs.sum(1)
        if bool((image != 0).any()):
            real = real + image.shape[1]
        return torch.arange(self.num_text(given), device=real.device) < real[:, None]


class Mochi(_Volume):
    """Mochi: [video, text]; one attention call per sample, with its real text tokens only."""

    text = "last"
    mlp = ("ff", "ff_context")
    masks = "compact"

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        patch = self.config.patch_size
        return frames, height // patch, width // patch

    def padding(self, given: Arguments) -> Tensor | None:
        return given["encoder_attention_mask"].bool()


class Cosmos(_Volume):
    """Cosmos Predict 1, 2 and 2.5: video tokens; text (and 2.5's image) is read by attn2."""

    cross = "attn2"

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        return _patched((frames, height, width), self.config.patch_size)

    def noise_level(self, given: Arguments) -> Any:
        return given["timestep"] * 1000  # sigma / (sigma + 1); Cosmos 1 passes log(sigma) / 4, which has no such scale

    def num_context(self, given: Arguments) -> int:
        text = given["encoder_hidden_states"]
        return int((text[0] if isinstance(text, tuple) else text).shape[1])


class CogVideoX(Family):
    """CogVideoX: [text, video]; latents [B, frames, C, H, W]."""

    rank = 3
    text = "first"

    def grid(self, given: Arguments) -> tuple[int, ...]:
        frames, _, height, width = given["hidden_states"].shape[-4:]
        return self.latent_grid(frames, height, width)

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        patch = self.config.patch_size
        return frames // (self.config.patch_size_t or 1), height // patch, width // patch


class Wan(_Volume):
    """Wan 2.1 and 2.2: video tokens; text (and the image of image-to-video) is read by attn2."""

    cross = "attn2"
    mlp = ("ffn",)

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        return _patched((frames, height, width), self.config.patch_size)


class LTX(Family):
    """LTX-Video: packed video tokens [B, N, C]; num_frames, height and width are arguments of the forward."""

    rank = 3
    cross = "attn2"

    def grid(self, given: Arguments) -> tuple[int, ...]:
        sizes = tuple(given.get(name) for name in ("num_frames", "height", "width"))
        if None in sizes:
            raise UnsupportedError("LTX tells its grid by num_frames, height and width: pass them, or grid= to enable")
        return tuple(int(n) for n in sizes if n is not None)

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        patch = self.config.patch_size
        return frames // self.config.patch_size_t, height // patch, width // patch


FAMILIES: dict[str, type[Family]] = {
    "CogVideoXTransformer3DModel": CogVideoX,
    "CosmosTransformer3DModel": Cosmos,
    "DiTTransformer2DModel": DiT,
    "Flux2Transformer2DModel": Flux2,
    "FluxTransformer2DModel": Flux,
    "HunyuanVideo15Transformer3DModel": HunyuanVideo15,
    "HunyuanVideoTransformer3DModel": HunyuanVideo,
    "LTXVideoTransformer3DModel": LTX,
    "MochiTransformer3DModel": Mochi,
    "PixArtTransformer2DModel": PixArt,
    "QwenImageTransformer2DModel": QwenImage,
    "SD3Transformer2DModel": SD3,
    "UNet2DConditionModel": UNet,
    "WanTransformer3DModel": Wan,
    "ZImageTransformer2DModel": ZImage,
}
_LINEAR = "its self-attention is linear, without a softmax over keys, so there are no query-key pairs to edit or skip"
#: Denoisers that are known and can't be served, and why.
REFUSED: dict[str, str] = {
    "SanaTransformer2DModel": _LINEAR,
    "SanaControlNetModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
}


def family_of(model: nn.Module) -> Family | None:
    """A new adapter for `model`, None where its class (and no base of it) is known."""
    for base in type(model).__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__](model)
    return None
