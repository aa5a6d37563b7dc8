"""Methods that share keys and values between pictures of a batch, or between runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generator_models import FAMILIES, build, is_clean, run
from torch import Tensor
from torch.nn import functional as F

from attnzoo.errors import UnsupportedError
from attnzoo.generators import enable
from attnzoo.generators.chain import Layer
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.generators.style_aligned import StyleAligned, adain

PLAIN = dict.fromkeys(("share_attention", "adain_queries", "adain_keys", "share_group_norm"), False)


def stacked(output: Any) -> Tensor:
    return torch.stack(output) if isinstance(output, list) else output


def stock(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask)


@pytest.mark.parametrize("name", FAMILIES)
def test_style_aligned_on_every_family(name: str) -> None:
    torch.manual_seed(0)
    case = build(name)
    dense = stacked(run(case))
    with enable(case.model, "style_aligned", **PLAIN):
        assert torch.equal(stacked(run(case)), dense)
    if name == "mochi":
        with enable(case.model, "style_aligned"), pytest.raises(UnsupportedError, match="sample by sample"):
            run(case)
        return
    with enable(case.model, "style_aligned"):
        shared = stacked(run(case))
    # the first picture is its own reference, which changes nothing
    assert torch.allclose(shared[0], dense[0], atol=2e-4 * float(dense.abs().max()))
    if len(dense) > 1:
        assert not torch.allclose(shared[1], dense[1], atol=1e-3 * float(dense.abs().max()))
    assert torch.equal(stacked(run(case)), dense) and is_clean(case.model)


def test_style_aligned_appends_only_the_grid_and_leaves_text_alone() -> None:
    torch.manual_seed(0)
    layout = TokenLayout((2, 3), 4, "first")
    query, key, value = (torch.randn(4, 2, layout.length, 8, dtype=torch.float64) for _ in range(3))
    ctx, layer = StepContext(parts=("uncond", "cond")), Layer("layer", 0)
    method = StyleAligned(2, shared_score_scale=1.3, shared_score_shift=0.4)
    out = method.attend(query, key, value, None, layout, ctx, layer, stock)
    for row in range(4):
        first = row // 2 * 2
        moved = [t[[first, row]].clone() for t in (query, key)]
        for tensor in moved:
            tensor[..., 4:, :] = adain(tensor[..., 4:, :])
        q, k = moved[0][1:], moved[1][1:]
        factor = 1.0 if row == first else 1.3
        keys = torch.cat([k, factor * key[first : first + 1, :, 4:]], -2)
        values = torch.cat([value[row : row + 1], value[first : first + 1, :, 4:]], -2)
        logits = q @ keys.transpose(-1, -2) * 8**-0.5
        logits[..., layout.length :] += -torch.inf if row == first else 0.4
        # eps keeps a picture's own statistics from being reproduced exactly
        assert torch.allclose(out[row : row + 1], logits.softmax(-1) @ values, atol=1e-4)


def test_style_aligned_pads_masks_and_shares_to_all() -> None:
    torch.manual_seed(0)
    layout = TokenLayout((2, 3), 2, "last")
    query, key, value = (torch.randn(3, 2, layout.length, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(3, 1, 1, layout.length, dtype=torch.bool)
    mask[0, ..., -1] = False
    method = StyleAligned(2, full_attention_share=True)
    out = method.attend(query, key, value, mask, layout, StepContext(), Layer("layer", 0), stock)
    for row in range(3):
        own = layout.length - 1 if row == 0 else layout.length
        others = [i for i in range(3) if i != row]
        keys, values = (torch.cat([t[row, :, :own], *(t[i, :, :6] for i in others)], -2)[None] for t in (key, value))
        assert torch.allclose(out[row : row + 1], stock(query[row : row + 1], keys, values, None), atol=1e-12)


def test_style_aligned_refuses() -> None:
    case = build("dit")
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"share_attention": 1}, TypeError, "share_attention"),
        ({"only_self_level": 2}, ValueError, "only_self_level"),
        ({"shared_score_scale": "x"}, TypeError, "shared_score_scale"),
    ]
    for options, error, said in bad:
        with pytest.raises(error, match=said):
            enable(case.model, "style_aligned", **options)
    one = case._replace(inputs={n: t[:1] for n, t in case.inputs.items()})
    with enable(case.model, "style_aligned", guidance=True), pytest.raises((UnsupportedError, RuntimeError)):
        run(one)
    assert is_clean(case.model)
