"""Video-Infinity's dual-scope attention: every frame sees its neighbours and a few frames from the whole video.

Paper: Tan et al., "Video-Infinity: Distributed Long Video Generation", 2024, arXiv:2406.16260. Code:
Yuanshi9815/Video-Infinity acfcd17 (licence not verified), src/video_infinity/plugins.py; written from the formulas.

    visible(i) = frames i - padding to i + padding, and top_k frames spread over the video
    logits     = q . k * scale * attn_scale (* log(number of visible frames) / log 16 with token_num_scale)
                 + local_bias for the neighbours, + global_bias for the spread ones

The video is cut into clips of equal length, one for each rank of a torch.distributed group; what a rank needs of the
others is sent to it, and nothing else. In one process the result is the same.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from attnzoo.errors import UnsupportedError, check_choice, check_flag, check_number, check_range, check_tensor, per_axis
from attnzoo.generators.blocks import visible_keys
from attnzoo.generators.chain import SELF, Call, Layer, Method, Next, Stage
from attnzoo.generators.layout import StepContext, TokenLayout
from attnzoo.kernels import BACKENDS, BlockSparsity, block_sparse_attention, merge_attentions

COMPAT = ("default", "official")


class Scope(NamedTuple):
    """The frames that one clip's queries may see.

    frames: their numbers in the video, -1 for a frame of zeros. near, far: bool [clip's frames, len(frames)], True
    where a query sees a frame as a neighbour, as one of the spread ones; never both.
    """

    frames: list[int]
    near: Tensor
    far: Tensor


def spread_frames(num_frames: int, top_k: int, clips: int = 1, compat: str = "default") -> list[int]:
    """Numbers of the frames that all queries see: top_k (at most num_frames), spread evenly.

    compat="official": every clip gives its frames 0, s, 2 s, ..., with s = max(length // (top_k // clips), 1), or its
    first one where top_k < clips; in the clips' order, cut to top_k, so that the last clips may give none.
    """
    if compat == "official":
        length, share = num_frames // clips, top_k // clips
        stride = max(length // share, 1) if share else 1_000_000
        found = [clip * length + frame for clip in range(clips) for frame in range(0, length, stride)]
        return found[:top_k]
    count = min(top_k, num_frames)
    return [index * num_frames // count for index in range(count)]


def scope(num_frames: int, padding: int, top_k: int, clips: int = 1, clip: int = 0, compat: str = "default") -> Scope:
    """What the frames of clip number `clip` see of a video of num_frames frames in `clips` clips.

    Default: every frame once; a spread frame that is a neighbour counts as one; nothing beyond the ends.
    compat="official": 2 padding + 1 neighbours always, beyond the ends frames of zeros that take their part of the
    softmax; spread frames beside them, also those that are neighbours too. padding is at most a clip's length there.
    Raises ValueError for arguments that don't fit.
    """
    check_range("num_frames", num_frames, 1)
    check_range("padding", padding, 0)
    check_range("top_k", top_k, 0)
    check_range("clips", clips, 1)
    check_range("clip", clip, 0, clips - 1)
    check_choice("compat", compat, COMPAT)
    if num_frames % clips:
        raise ValueError(f"clips must divide the {num_frames} frames, got {clips}")
    length = num_frames // clips
    first, spread = clip * length, spread_frames(num_frames, top_k, clips, compat)
    own = torch.arange(first, first + length)[:, None]
    if compat == "official":
        if padding > length:
            raise ValueError(f"padding must be at most a clip's {length} frames in the authors' code, got {padding}")
        around = torch.arange(first - padding, first + length + padding)
        near = F.pad((around - own).abs() <= padding, (0, len(spread)))
        frames = [frame if 0 <= frame < num_frames else -1 for frame in around.tolist()] + spread
        far = torch.zeros_like(near)
        far[:, len(around) :] = True
        return Scope(frames, near, far)
    frames = sorted({*range(max(0, first - padding), min(num_frames, first + length + padding)), *spread})
    seen = torch.tensor(frames)
    near = (seen - own).abs() <= padding
    return Scope(frames, near, torch.isin(seen, torch.tensor(spread, dtype=torch.long)) & ~near)


def phase_biases(
    timestep: float, local_phase: Mapping[str, float] | None, global_phase: Mapping[str, float] | None
) -> tuple[float, float]:
    """(local_bias, global_bias) at a timestep of 0 to 1000.

    local_phase holds below its "t", global_phase from its "t" on; where both do, both are added.
    """
    local = spread = 0.0
    for phase, holds in (
        (local_phase, local_phase is not None and timestep < local_phase["t"]),
        (global_phase, global_phase is not None and timestep >= global_phase["t"]),
    ):
        if phase is not None and holds:
            local, spread = local + phase.get("local_bias", 0.0), spread + phase.get("global_bias", 0.0)
    return local, spread


def take_frames(frames: Tensor, wanted: list[int]) -> Tensor:
    """frames [B, T, ...] at the numbers `wanted`, zeros for -1."""
    index = torch.tensor([max(frame, 0) for frame in wanted], device=frames.device)
    found = frames.index_select(1, index)
    if min(wanted) < 0:
        empty = torch.tensor([frame < 0 for frame in wanted], device=frames.device)
        found = found.masked_fill(empty.view(1, -1, *(1,) * (frames.ndim - 2)), 0.0)
    return found


def exchange_frames(own: Tensor, scopes: list[Scope], group: Any) -> Tensor:
    """The frames that this rank's scope wants, from all ranks: [B, len(frames), ...] of own [B, length, ...].

    scopes: every rank's, in the group's order. Each frame is sent to the ranks that want it, once. No gradient.
    """
    rank, length = dist.get_rank(group), own.shape[1]
    wants = [sorted({frame for frame in each.frames if frame >= 0}) for each in scopes]
    held = {rank * length + index: own[:, index] for index in range(length)}
    operations, arriving = [], []
    for peer, theirs in enumerate(wants):
        if peer == rank:
            continue
        there = dist.get_global_rank(group, peer) if group is not None else peer
        sending = [frame for frame in theirs if frame // length == rank]
        coming = [frame for frame in wants[rank] if frame // length == peer]
        if sending:
            packed = torch.stack([held[frame] for frame in sending], 1).detach().contiguous()
            operations.append(dist.P2POp(dist.isend, packed, there, group))
        if coming:
            room = own.new_empty(own.shape[0], len(coming), *own.shape[2:])
            operations.append(dist.P2POp(dist.irecv, room, there, group))
            arriving.append((coming, room))
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    for coming, room in arriving:
        held.update({frame: room[:, index] for index, frame in enumerate(coming)})
    empty = torch.zeros_like(own[:, 0])
    return torch.stack([held[frame] if frame >= 0 else empty for frame in scopes[rank].frames], 1)


def _check_phase(name: str, phase: Any) -> dict[str, float] | None:
    if phase is None:
        return None
    if not isinstance(phase, Mapping):
        raise TypeError(f"{name} must be a mapping or None, got {type(phase).__name__}")
    if "t" not in phase or set(phase) - {"t", "local_bias", "global_bias"}:
        raise ValueError(f"{name} must hold t, and may hold local_bias and global_bias, got {sorted(phase)}")
    for key, number in phase.items():
        check_number(f"{name}[{key!r}]", number)
    return dict(phase)


class VideoInfinity(Method):
    """Dual-scope attention along the frames of a video model.

    padding: neighbours on each side (the authors' 24 latent frames); top_k: frames spread over the video (16).
    attn_scale: factor of the logits. token_num_scale: the logits are multiplied by log(visible frames) / log 16
        instead. local_phase, global_phase: {"t", "local_bias", "global_bias"}, see `phase_biases`.
    clips: into how many the video is cut: in one process it matters to compat="official" only.
    group: a torch.distributed process group whose ranks hold one clip each, all of one size, on the same steps; "world"
        for the default one; None: one process holds the video. Ranks exchange keys and values as the attention gets
        them, which is wrong behind a rotary embedding that begins at 0 on every rank: such models are refused there.
    block_size, backend: of `attnzoo.kernels.block_sparse_attention`.
    compat: see `scope`.

    The authors' method is for temporal attention, one place's frames; where a model attends to all tokens at once
    (Wan, CogVideoX, ...) a visible frame is all of its tokens. Text is always visible, and its queries stay dense. A
    padding that reaches over the whole video is neutral.
    """

    name: ClassVar[str] = "video_infinity"
    stage: ClassVar[Stage] = Stage.KERNEL
    roles: ClassVar[frozenset[str]] = SELF

    def __init__(
        self,
        rank: int,
        *,
        padding: int = 24,
        top_k: int = 16,
        attn_scale: float = 1.0,
        token_num_scale: bool = False,
        local_phase: Mapping[str, float] | None = None,
        global_phase: Mapping[str, float] | None = None,
        clips: int = 1,
        group: Any = None,
        block_size: int = 64,
        compat: str = "default",
        backend: str = "auto",
    ) -> None:
        """rank: axes of the model's grid, 3. Raises TypeError, ValueError or UnsupportedError, naming the argument."""
        super().__init__(rank)
        if rank != 3:
            raise UnsupportedError(f"video_infinity acts along frames, this model's grid has {rank} axes")
        per_axis("padding", padding, 1, low=0)
        per_axis("top_k", top_k, 1, low=0)
        per_axis("clips", clips, 1, low=1)
        per_axis("block_size", block_size, 1, low=1)
        check_number("attn_scale", attn_scale)
        check_flag("token_num_scale", token_num_scale)
        check_choice("compat", compat, COMPAT)
        check_choice("backend", backend, ("auto", *BACKENDS))
        self.padding, self.top_k, self.clips = padding, top_k, clips
        self.attn_scale, self.token_num_scale = attn_scale, token_num_scale
        self.local_phase = _check_phase("local_phase", local_phase)
        self.global_phase = _check_phase("global_phase", global_phase)
        if group is not None and not dist.is_initialized():
            raise ValueError("group is given, but torch.distributed is not initialised (init_process_group)")
        self.distributed = group is not None
        self.group = None if isinstance(group, str) else group
        if isinstance(group, str) and group != "world":
            raise ValueError(f"group must be a process group or 'world', got {group!r}")
        if self.distributed and clips != 1:
            raise ValueError(f"clips={clips}: with a group there are as many as it has ranks, leave it 1")
        self.block_size, self.compat, self.backend = block_size, compat, backend
        self._patterns: dict[tuple[Any, ...], BlockSparsity] = {}

    def settings(self) -> dict[str, Any]:
        return {
            "padding": self.padding,
            "top_k": self.top_k,
            "attn_scale": self.attn_scale,
            "token_num_scale": self.token_num_scale,
            "local_phase": self.local_phase,
            "global_phase": self.global_phase,
            "clips": self.clips,
            "distributed": self.distributed,
            "compat": self.compat,
            "backend": self.backend,
        }

    def _scopes(self, frames: int) -> tuple[list[Scope], int]:
        """(what every clip sees, frames of the whole video), for `frames` frames of this process."""
        clips = dist.get_world_size(self.group) if self.distributed else self.clips
        total = frames * clips if self.distributed else frames
        return [scope(total, self.padding, self.top_k, clips, i, self.compat) for i in range(clips)], total

    def density(self, layout: TokenLayout) -> float:
        scopes, total = self._scopes(layout.grid[0])
        share = sum(int((s.near | s.far).sum()) for s in scopes) / total**2
        return 1.0 - (1.0 - share) * layout.num_grid**2 / layout.length**2

    def state_bytes(self) -> int:
        made = list(self._patterns.values())
        return sum(t.nbytes for p in made for t in (p.counts, p.indices, p.tile_ids, p.tiles) if t is not None)

    def forget(self) -> None:
        self._patterns = {}

    def phase(self, ctx: StepContext) -> Hashable:
        if self.local_phase is None and self.global_phase is None:
            return 0.0, 0.0
        if ctx.timestep is None:
            raise UnsupportedError("video_infinity's phases need the timestep, which a compiled whole model can't read")
        now = ctx.timestep.reshape(-1)[0] if isinstance(ctx.timestep, Tensor) else ctx.timestep
        return phase_biases(float(now), self.local_phase, self.global_phase)

    def around(self, call: Call, layout: TokenLayout, ctx: StepContext, layer: Layer) -> Any:
        turned = [name for name in ("rotary_emb", "image_rotary_emb") if call.kwargs.get(name) is not None]
        if self.distributed and (turned or len(call.args) > 3):
            raise UnsupportedError(
                f"{layer.name}: its keys are turned by their place ({', '.join(turned) or 'rotary'}), which begins at "
                "0 on every rank: video_infinity can't exchange them; use one process"
            )
        return call()

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        layout: TokenLayout,
        ctx: StepContext,
        layer: Layer,
        next: Next,
    ) -> Tensor:
        biases = layer.phase if isinstance(layer.phase, tuple) else (0.0, 0.0)
        scopes, total = self._scopes(layout.grid[0])
        everything = all(bool(s.near.all()) for s in scopes) and all(-1 not in s.frames for s in scopes)
        plain = everything and not self.distributed and self.attn_scale == 1.0 and not self.token_num_scale
        if plain and self.compat == "default" and biases[0] == 0.0:
            return next(query, key, value, mask)
        if layer.dropout_p:
            raise UnsupportedError(
                f"{layer.name}: video_infinity has no attention dropout, got dropout_p={layer.dropout_p}"
            )
        if key.shape[-2] != layout.length or query.shape[-2] != layout.length or query.shape[1] != key.shape[1]:
            raise UnsupportedError(
                f"{layer.name}: video_infinity wants the layout's {layout.length} queries and keys of as many heads, "
                f"got {tuple(query.shape)} and {tuple(key.shape)}"
            )
        seen = visible_keys(mask)
        if mask is not None and seen is None:
            raise UnsupportedError(f"{layer.name}: video_infinity has no attention mask but padding, got {mask.shape}")
        start, stop, frames = layout.grid_start, layout.grid_start + layout.num_grid, layout.grid[0]
        grid = [t[:, :, start:stop].unflatten(2, (frames, -1)).transpose(1, 2) for t in (query, key, value)]
        outs = []
        if self.distributed:
            both = exchange_frames(torch.cat(grid[1:], -1), scopes, self.group)
            clips = [(grid[0], *both.split([key.shape[-1], value.shape[-1]], -1), scopes[dist.get_rank(self.group)])]
        else:
            length = frames // len(scopes)
            clips = []
            for number, own in enumerate(scopes):
                rows = grid[0][:, number * length : (number + 1) * length]
                clips.append((rows, take_frames(grid[1], own.frames), take_frames(grid[2], own.frames), own))
        others = torch.cat([torch.arange(start), torch.arange(stop, layout.length)]).to(query.device)
        extra = tuple(t.index_select(2, others).transpose(1, 2) for t in (key, value))
        extra_seen = None if seen is None else seen.index_select(1, others)
        for number, (rows, keys, values, own) in enumerate(clips):
            outs.append(self._clip(rows, keys, values, own, extra, extra_seen, biases, layer, number))
        image = torch.cat(outs, 1).transpose(1, 2)
        if layout.length == layout.num_grid:
            return image
        dense = next(torch.cat([query[:, :, :start], query[:, :, stop:]], dim=2), key, value, mask)
        return torch.cat([dense[:, :, :start], image, dense[:, :, start:]], dim=2)

    def _clip(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own: Scope,
        extra: tuple[Tensor, ...],
        extra_seen: Tensor | None,
        biases: tuple[float, float],
        layer: Layer,
        number: int,
    ) -> Tensor:
        """[B, length * places, heads, D]: one clip's queries [B, length, heads, places, D] over its frames and text.

        extra: keys and values [B, others, heads, D] that all see, and extra_seen bool [B or 1, others].
        """
        length, places, device = query.shape[1], query.shape[3], query.device
        scale = query.shape[-1] ** -0.5 if layer.scale is None else layer.scale
        if self.token_num_scale:
            count = (own.near | own.far).sum(1).to(device, torch.promote_types(query.dtype, torch.float32))
            query = query * (count.log() / math.log(16)).to(query.dtype)[:, None, None, None]
        else:
            scale *= self.attn_scale
        q, k, v = (t.transpose(2, 3).flatten(1, 2) for t in (query, key, value))
        inside, num_extra = k.shape[1], extra[0].shape[1]
        if places == 1 and not num_extra:  # temporal attention: few frames, one small mask
            bias = torch.full(own.near.shape, -math.inf, dtype=q.dtype)
            bias = bias.masked_fill(own.near, biases[0]).masked_fill(own.far, biases[1]).to(device)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2)
        keys, values = torch.cat([k, extra[0]], 1), torch.cat([v, extra[1]], 1)
        key_mask = None if extra_seen is None else F.pad(extra_seen, (inside, 0), value=True)

        def part(name: str, shown: Tensor | None, rows: slice) -> tuple[Tensor, Tensor]:
            """The attention over some of the keys, and its lse. shown: [length, frames]; None: these are not frames."""
            k, v, seen = keys[:, rows], values[:, rows], None if key_mask is None else key_mask[:, rows]
            pattern = self._pattern((name, number, length, places, k.shape[1], device), shown)
            found = block_sparse_attention(
                q, k, v, pattern, scale, key_mask=seen, return_lse=True, backend=self.backend
            )
            assert isinstance(found, tuple)
            return found

        if biases == (0.0, 0.0):
            return part("both", own.near | own.far, slice(None))[0]
        (near, near_lse), (far, far_lse) = (
            part(name, shown, slice(0, inside)) for name, shown in (("near", own.near), ("far", own.far))
        )
        outs, lses = [near, far], [near_lse + biases[0], far_lse + biases[1]]
        if num_extra:
            text, text_lse = part("text", None, slice(inside, None))
            outs, lses = [*outs, text], [*lses, text_lse]
        return merge_attentions(outs, lses)[0]

    def _pattern(self, name: tuple[Any, ...], shown: Tensor | None) -> BlockSparsity:
        """The blocks of tokens behind a table of frames; kept, for it is the same at every step."""
        if name not in self._patterns:
            _, _, length, places, num_keys, device = name
            if shown is None:
                sizes = (-(-length * places // self.block_size), -(-num_keys // self.block_size))
                mask = torch.ones(sizes, dtype=torch.bool, device=device)
                made = BlockSparsity.from_mask(mask, length * places, num_keys, self.block_size)
            else:
                table, inside = shown.to(device), shown.shape[1] * places
                made = BlockSparsity.from_function(
                    lambda q, k: table[q[0].long(), k[0].long()],
                    (length, places),
                    (shown.shape[1], places),
                    self.block_size,
                    dense_keys=[(inside, num_keys)] if num_keys > inside else (),
                    device=device,
                )
            self._patterns[name] = made
        return self._patterns[name]


def dual_scope_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    padding: int = 24,
    top_k: int = 16,
    clips: int = 1,
    group: Any = None,
    compat: str = "default",
    **options: Any,
) -> Tensor:
    """Temporal attention of every place: query, key, value [B, heads, frames, head_dim] to the same.

    For models whose temporal layers stand by themselves. With a group the frames are this rank's clip. options:
    attn_scale, token_num_scale, scale (of the dot products), local_bias, global_bias. Others as `VideoInfinity`.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor, 4)
    biases = options.pop("local_bias", 0.0), options.pop("global_bias", 0.0)
    scale = options.pop("scale", None)
    method = VideoInfinity(3, padding=padding, top_k=top_k, clips=clips, group=group, compat=compat, **options)
    layer = Layer("temporal", 0, scale, role="image", phase=biases)
    layout = TokenLayout((query.shape[2], 1, 1))

    def stock(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)

    return method.attend(query, key, value, None, layout, StepContext(), layer, stock)
