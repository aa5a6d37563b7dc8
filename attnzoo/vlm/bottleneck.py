"""TAB's editable bottleneck (arXiv 2412.18675; code anguyen8/TAB): the CLS token's map over patches, read and set.

TAB is a trained layer: one head, no residual, whose CLS row over the patches is scaled with its own sum, so that a map
of zeros lets nothing of the picture through. This is its map as a hook for CLIP-style towers (open_clip's, or anything
with blocks around torch.nn.MultiheadAttention), not a port of its training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.errors import UnsupportedError, check_tensor
from attnzoo.kernels.edited_attention import Visibility, attention_probs


def gated_map(attention: Tensor) -> Tensor:
    """A' = A_cls sum_i A_cls,i: the CLS row over patches [..., P] (its share for CLS itself left out) times its sum."""
    return attention * attention.sum(-1, keepdim=True)


class Bottleneck:
    """A hook on one block of a tower, from `with` (or `open`) to its end. See `bottleneck`."""

    def __init__(
        self,
        block: nn.Module,
        edit_map: Callable[[Tensor], Tensor] | None,
        gate: bool,
        residual: bool,
        batch_first: bool,
    ):
        self.block = block
        self.maps: list[Tensor] = []
        self._edit, self._gate, self._residual, self._batch_first = edit_map, gate, residual, batch_first
        self._handles: list[Any] = []

    def __enter__(self) -> Bottleneck:
        if self._handles:
            raise RuntimeError("this bottleneck is open already: make another with bottleneck(...)")
        attention: Any = self.block.attn
        self._handles = [
            self.block.register_forward_pre_hook(self._before, with_kwargs=True),
            attention.register_forward_hook(self._after, with_kwargs=True),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs["q_x"]
        self._cls = stream.select(1 if self._batch_first else 0, 0)

    def _after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        query = args[0] if args else kwargs["query"]
        tokens = query if self._batch_first else query.transpose(0, 1)
        heads = (*tokens.shape[:2], module.num_heads, -1)
        weight, bias = module.in_proj_weight.chunk(3), module.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q = nn.functional.linear(tokens[:, :1], weight[0], biases[0]).view(len(tokens), 1, module.num_heads, -1)
        k, v = (nn.functional.linear(tokens, weight[i], biases[i]).view(heads) for i in (1, 2))
        row = attention_probs(q, k, Visibility(is_causal=False), rows=None)[:, 0]  # [B, H, 1 + P]
        own, patches = row[..., :1], row[..., 1:]
        found = gated_map(patches) if self._gate else patches
        self.maps.append(found.detach())
        if self._edit is not None:
            found = self._edit(found)
            check_tensor("what edit_map returns", found)
            if found.shape != patches.shape:
                raise ValueError(f"edit_map must return {tuple(patches.shape)}, got {tuple(found.shape)}")
        # With the gate nothing but patches goes on, as in TAB; without, the CLS token's own share stays as it is.
        weights = found if self._gate else torch.cat([own, found], -1)
        values = v[:, 1:] if self._gate else v
        mixed = torch.einsum("bhp,bphd->bhd", weights.to(v.dtype), values).flatten(1)
        cls = module.out_proj(mixed)
        if not self._residual:
            cls = cls - self._cls
        attended, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        where = 1 if self._batch_first else 0
        changed = torch.cat([cls.unsqueeze(where), attended.narrow(where, 1, attended.shape[where] - 1)], where)
        return changed if rest is None else (changed, *rest)


def bottleneck(
    tower: nn.Module,
    edit_map: Callable[[Tensor], Tensor] | None = None,
    layer: int = -1,
    gate: bool = True,
    residual: bool = False,
) -> Bottleneck:
    """Read and edit the map that a CLIP-style tower's CLS token has over its patches.

        with attnzoo.vlm.bottleneck(clip.visual, lambda a: a * mask) as tab:
            features = clip.encode_image(pictures)
        tab.maps[0]   # [B, heads, patches], what the map was before the edit

    tower: open_clip's vision transformer, or a module with `transformer.resblocks` (or `resblocks`) whose blocks hold a
        torch.nn.MultiheadAttention as `attn` and a CLS token in front. Its class is not asked for: open_clip itself is
        not needed.
    edit_map: [B, heads, P] -> the same, what goes on instead: zeros to hide the picture, a mask to hide patches,
        numbers of your own to point. Its rows need not sum to anything. None only reads.
    layer: which block, from the end where negative.
    gate: the map is A_cls sum_i A_cls,i and patches alone go on (TAB). False: the plain row; the CLS token's own share
        goes on too, and edit_map=None then leaves the layer as it was.
    residual: False (TAB): the CLS token's stream is not added to the attention's output, so that nothing but the map
        carries the picture on. True: it is, as in a plain CLIP. Other tokens keep theirs.

    TAB trains such a layer with one head; a tower that wasn't trained with it only shows what it would read.
    Raises UnsupportedError for a tower or attention of another kind, ValueError for a layer that does not exist.
    """
    transformer = getattr(tower, "transformer", tower)
    blocks = getattr(transformer, "resblocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise UnsupportedError(f"{type(tower).__name__} has no transformer.resblocks: is it a CLIP-style tower?")
    if type(layer) is not int or not -len(blocks) <= layer < len(blocks):
        raise ValueError(f"layer must be from {-len(blocks)} to {len(blocks) - 1}, got {layer!r}")
    block = blocks[layer]
    attention = getattr(block, "attn", None)
    if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None:
        raise UnsupportedError(
            f"block {layer} attends with {type(attention).__name__}, not torch.nn.MultiheadAttention"
        )
    if not residual and not isinstance(getattr(block, "ls_1", nn.Identity()), nn.Identity):
        raise UnsupportedError(
            f"block {layer} scales its attention (LayerScale): only residual=True can be served there"
        )
    if edit_map is not None and not callable(edit_map):
        raise TypeError(f"edit_map must be a function or None, got {type(edit_map).__name__}")
    return Bottleneck(block, edit_map, gate, residual, attention.batch_first)
