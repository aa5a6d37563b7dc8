"""ShiftAddViT: PVT v2 with linear attention on binary codes, and Linears that are partly layers of powers of two.

Paper: "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer", You et al., NeurIPS
2023, https://arxiv.org/abs/2306.06446
Code: https://github.com/GATECH-EIC/ShiftAddViT (pvt/, 47671cf), whose README says Apache-2.0; written here from the
formulas. The host is timm's PVT v2 (models/pvt_v2.py); the layers are in blocks/shiftadd.py and
blocks/shiftadd_attention.py. `attn_type` chooses the attention of all stages but the last, which has the plain one
(unless it is "sra"): "LinAngular" (the published models'), "LinAngular_binary", "ecoformer", "performer_binary",
"linear", "msa_share_qk", "msa", "sra". With moe_attn and moe_mlp every projection of these attentions and every
Linear of the MLPs is a mixture of a Linear and a LinearShift, chosen by each token.

None of it is faster here than what it replaces: the savings are those of hardware that shifts and adds, and both
experts of a mixture are computed for all tokens.

Differences from the authors' code (compat="official" brings back what is marked *):
* * "LinAngular_binary" and "performer_binary" compare with the mean over an image. The authors' mean is over the whole
  batch, so that an image's output depends on its neighbours, at inference too.
* * A mixture is sum_i g_i y_i. The authors' is log(scatter(g_i exp(y_i)) + 2.2e-16): outputs below -36 are clipped,
  those above 88 infinite, and with two experts a token the second overwrites the first.
* The hash of "LinAngular" and "ecoformer" is fitted by `fit_hashes(model, images)`. The authors' code fits it in the
  first forward pass of every process, on that batch and at random, even after a checkpoint with a fitted hash was
  loaded. A new model has a random hash.
* No forward pass writes to parameters: theirs clamps shift (and LinearShiftQ's weight) in place. `clip_()` does it.
* The authors divide by a length that may be 0 (NaN): here 0 stays 0.
* Their Block hands moe_attn to every attention, which "msa", "msa_share_qk", "linear", "ecoformer" and
  "performer_binary" do not take, and the hash with sparse_reg reads names that it never sets. Here each attn_type
  builds, with mixtures too; sparse_reg with the hash is a ValueError.
* The gate has no gradient from the output, because its value is 1 (`unused_parameters()`), as in the authors' code.
  Their "performer", and the gates with noise and a balancing loss, which no published configuration uses, are not here.
* Conv2dShift's default rounding is a misspelt word there, an error; here it is "deterministic".
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, pvt_v2, register_model
from torch import nn

from attnzoo.backbones.blocks.contract import CheckedImages, StageFeatures
from attnzoo.backbones.blocks.neighborhood import refuse_attn_drop, unwrap_checkpoint
from attnzoo.backbones.blocks.shiftadd import COMPAT, Conv2dShift, Gate, LinearShift, MixtureLinear
from attnzoo.backbones.blocks.shiftadd_attention import ATTENTIONS, FullAttention
from attnzoo.errors import check_choice, check_range

__all__ = ["ShiftAddPVT", "checkpoint_filter_fn"]


class ShiftAddPVT(CheckedImages, pvt_v2.PyramidVisionTransformerV2):
    """timm's PyramidVisionTransformerV2 (its arguments, `linear` aside) with ShiftAddViT's layers, and

    attn_type: see the module's text.
    moe_attn, moe_mlp: mixtures for the projections of the attentions (the last stage's aside) and in the MLPs.
    nbits, m: bits and anchors of the hashes.
    num_features: of "performer_binary".
    sparse_reg: of "LinAngular_binary".
    compat: "default" or "official".
    """

    def __init__(
        self,
        *,
        attn_type: str = "LinAngular",
        moe_attn: bool = False,
        moe_mlp: bool = False,
        nbits: int = 16,
        m: int = 25,
        num_features: int = 256,
        sparse_reg: bool = False,
        compat: str = "default",
        qkv_bias: bool = True,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        check_choice("attn_type", attn_type, ATTENTIONS)
        check_choice("compat", compat, COMPAT)
        check_range("drop_path_rate", drop_path_rate, 0.0, 1.0)
        refuse_attn_drop(attn_drop_rate)
        if sparse_reg and attn_type != "LinAngular_binary":
            raise ValueError(f"sparse_reg is of attn_type='LinAngular_binary', got attn_type={attn_type!r}")
        if kwargs.get("linear"):
            raise ValueError("linear must be False, got True: choose the attention by attn_type")
        dd = {"device": device, "dtype": dtype}
        rates = {"proj_drop_rate": proj_drop_rate, "drop_path_rate": drop_path_rate}
        super().__init__(**{**kwargs, **dd, **rates, "qkv_bias": qkv_bias})
        mixture = partial(MixtureLinear, compat=compat)
        options_of: dict[str, dict[str, Any]] = {
            "LinAngular": {"nbits": nbits, "m": m},
            "ecoformer": {"nbits": nbits, "m": m},
            "performer_binary": {"num_features": num_features, "compat": compat},
            "LinAngular_binary": {"sparse_reg": sparse_reg, "compat": compat},
        }
        options = options_of.get(attn_type, {})
        stages: Any = self.stages
        for i, stage in enumerate(stages):
            plain = i == len(stages) - 1 and attn_type != "sra"
            for block in stage.blocks:
                dim, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
                shared = {"num_heads": block.attn.num_heads, "qkv_bias": qkv_bias, "proj_drop": proj_drop_rate, **dd}
                if plain:
                    block.attn = FullAttention(dim, **shared)
                else:
                    if attn_type == "sra":
                        options = {"sr_ratio": 1 if block.attn.sr is None else block.attn.sr.stride[0]}
                    chosen = mixture if moe_attn else nn.Linear
                    block.attn = ATTENTIONS[attn_type](dim, **shared, **options, linear=chosen)
                if moe_mlp:
                    block.mlp.fc1 = mixture(dim, hidden, **dd)
                    block.mlp.fc2 = mixture(hidden, dim, **dd)
        self.apply(self._init_weights)

    def unused_parameters(self) -> set[str]:
        """Parameters that get no gradient: the gates of the mixtures, whose value is the constant 1."""
        gates = [name for name, module in self.named_modules() if isinstance(module, Gate)]
        return {f"{name}.gate.{kind}" for name in gates for kind in ("weight", "bias")}

    @torch.jit.ignore
    def clip_(self) -> None:
        """Bring the shifts of all shift layers into range, for after an optimiser's step."""
        for module in self.modules():
            if isinstance(module, (LinearShift, Conv2dShift)):
                module.clip_()


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint (or one of ours) for `model`: the names of PVT v2 are brought to timm's."""
    return pvt_v2.checkpoint_filter_fn(unwrap_checkpoint(state_dict), model)


def _cfg(published: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2306.06446",
        "paper_name": "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer",
        "origin_url": "https://github.com/GATECH-EIC/ShiftAddViT",
        "notes": (published, "no weights published when this was written"),
    }


default_cfgs = generate_default_cfgs(
    {
        "shiftadd_pvt_v2_b0.untrained": _cfg("3.1M parameters"),
        "shiftadd_pvt_v2_b0_moe.untrained": _cfg("6.8M parameters, shift and sign counted apart"),
        "shiftadd_pvt_v2_b1.untrained": _cfg("11.9M parameters"),
        "shiftadd_pvt_v2_b2.untrained": _cfg("20.4M parameters"),
    }
)


def _create(variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> ShiftAddPVT:
    """Build `variant`: the caller's arguments win."""
    args = {"num_heads": (1, 2, 5, 8), "mlp_ratios": (8, 8, 4, 4), "sr_ratios": (8, 4, 2, 1), **model_args, **kwargs}
    return build_model_with_cfg(
        ShiftAddPVT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(args["depths"]))), "feature_cls": StageFeatures},
        **args,
    )


_B0 = {"depths": (2, 2, 2, 2), "embed_dims": (32, 64, 160, 256)}
_B1 = {"depths": (2, 2, 2, 2), "embed_dims": (64, 128, 320, 512)}
_B2 = {"depths": (3, 4, 6, 3), "embed_dims": (64, 128, 320, 512)}


@register_model
def shiftadd_pvt_v2_b0(pretrained: bool = False, **kwargs: Any) -> ShiftAddPVT:
    """PVT v2 B0 with hashed linear angular attention (the authors' pvt_v2_b0)."""
    return _create("shiftadd_pvt_v2_b0", pretrained, _B0, kwargs)


@register_model
def shiftadd_pvt_v2_b0_moe(pretrained: bool = False, **kwargs: Any) -> ShiftAddPVT:
    """The same with mixtures of Linears and shift layers (the authors' pvt_v2_b0 with --moe_attn --moe_mlp)."""
    return _create("shiftadd_pvt_v2_b0_moe", pretrained, {**_B0, "moe_attn": True, "moe_mlp": True}, kwargs)


@register_model
def shiftadd_pvt_v2_b1(pretrained: bool = False, **kwargs: Any) -> ShiftAddPVT:
    """PVT v2 B1 with hashed linear angular attention (the authors' pvt_v2_b1)."""
    return _create("shiftadd_pvt_v2_b1", pretrained, _B1, kwargs)


@register_model
def shiftadd_pvt_v2_b2(pretrained: bool = False, **kwargs: Any) -> ShiftAddPVT:
    """PVT v2 B2 with hashed linear angular attention (the authors' pvt_v2_b2)."""
    return _create("shiftadd_pvt_v2_b2", pretrained, _B2, kwargs)
