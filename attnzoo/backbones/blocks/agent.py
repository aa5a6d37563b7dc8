"""Agent attention: a few pooled queries collect from the values, and all queries read what they collected.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention", Han et al., ECCV 2024, arXiv:2312.08874,
section 3. Parameter names are those of the authors' published checkpoints.

    A     = mean of the projected, unscaled queries over a p x p partition of the map, p ** 2 = agents
    out   = softmax(s q A^T + B2) softmax(s A k^T + B1) v + DWConv3x3(v),  s = head_dim ** -0.5
    B1    = an_bias resampled to the keys' map + ah_bias (by row) + aw_bias (by column); B2 likewise from na, ha, wa

A class token is a query and a key (ca_bias, ac_bias), but neither pooled nor convolved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import init_normal
from attnzoo.backbones.hosts.mixers import MIXERS, Mixer, Site, Size, resample_axes
from attnzoo.kernels import pooled_attention

TABLE = 7  # side of the bias tables that are resampled to the map


class AgentMixer(Mixer):
    """Agent attention between a host's projections.

    agents: their number, a square.

    The row and column biases tie it to the sizes of its site; `set_size` resamples them linearly. A mask is ignored, as
    the authors' code ignores the one of shifted windows: agents are pooled across the seam.
    """

    an_bias: Tensor
    na_bias: Tensor
    ah_bias: Tensor
    aw_bias: Tensor
    ha_bias: Tensor
    wa_bias: Tensor
    ac_bias: Tensor
    ca_bias: Tensor

    def __init__(self, site: Site, agents: int = 49) -> None:
        super().__init__(site)
        side = int(agents**0.5)
        if agents < 1 or side * side != agents:
            raise ValueError(f"agent_num must be a square number of at least 1, got {agents}")
        self.side = side
        self.size, self.key_size = site.size, site.key_size
        h, dd = site.num_heads, site.dd
        shapes = {
            "an_bias": (h, agents, TABLE, TABLE),
            "na_bias": (h, agents, TABLE, TABLE),
            "ah_bias": (1, h, agents, self.key_size[0], 1),
            "aw_bias": (1, h, agents, 1, self.key_size[1]),
            "ha_bias": (1, h, self.size[0], 1, agents),
            "wa_bias": (1, h, 1, self.size[1], agents),
        }
        if site.num_prefix:
            shapes |= {"ac_bias": (1, h, agents, site.num_prefix), "ca_bias": (1, h, site.num_prefix, agents)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **dd)))
            init_normal(getattr(self, name))
        self.dwc = nn.Conv2d(site.dim, site.dim, 3, padding=1, groups=site.dim, **dd) if site.local_conv else None

    @property
    def pinned(self) -> Size:
        return self.size

    def set_size(self, size: Size, key_size: Size) -> None:
        rows = {
            "ah_bias": (3, key_size[0]),
            "aw_bias": (4, key_size[1]),
            "ha_bias": (2, size[0]),
            "wa_bias": (3, size[1]),
        }
        for name, (axis, count) in rows.items():
            old = getattr(self, name)
            shape = [*old.shape[:axis], count, *old.shape[axis + 1 :]]
            setattr(self, name, nn.Parameter(resample_axes(old.detach(), shape), requires_grad=old.requires_grad))
        self.size, self.key_size = size, key_size

    def agent_bias(self) -> Tensor:
        """Of the agents' logits with the keys: [1, heads, agents, P + keys]."""
        bias = F.interpolate(self.an_bias, size=self.key_size, mode="bilinear")[None] + (self.ah_bias + self.aw_bias)
        bias = bias.flatten(3)
        return torch.cat([self.ac_bias, bias], dim=3) if self.num_prefix else bias

    def query_bias(self) -> Tensor:
        """Of the queries' logits with the agents: [1, heads, P + queries, agents]."""
        table = F.interpolate(self.na_bias, size=self.size, mode="bilinear")[None].flatten(3).transpose(2, 3)
        bias = table + (self.ha_bias + self.wa_bias).flatten(2, 3)
        return torch.cat([self.ca_bias, bias], dim=2) if self.num_prefix else bias

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, size: Size, key_size: Size, mask: Tensor | None = None
    ) -> Tensor:
        if (size, key_size) != (self.size, self.key_size):
            raise ValueError(
                f"the agents' biases are for maps of {self.size} (keys {self.key_size}), got {size} (keys {key_size}): "
                "call set_input_size on the model"
            )
        prefix = self.num_prefix
        pooled = F.adaptive_avg_pool2d(query[:, prefix:].transpose(1, 2).unflatten(2, size), self.side)
        agents = pooled.flatten(2).transpose(1, 2)
        q, k, v, a = (self.heads(t) for t in (query, key, value, agents))
        return pooled_attention(q, k, v, a, agent_bias=self.agent_bias(), query_bias=self.query_bias()).flatten(2)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        size: Size,
        key_size: Size,
        context: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        prefix = self.num_prefix
        out = self.attend(query, key, value, size, key_size, mask)
        if self.dwc is None:
            return out
        local = value[:, prefix:].transpose(1, 2).unflatten(2, key_size)
        if key_size != size:
            local = F.interpolate(local, size=size, mode="bilinear")
        local = self.dwc(local).flatten(2).transpose(1, 2)
        return torch.cat([out[:, :prefix], out[:, prefix:] + local], dim=1) if prefix else out + local


def agent_mixer(agent_num: Sequence[int | str], by_block: Sequence[int] | None = None) -> Callable[[Site], AgentMixer]:
    """AgentMixer with agent_num[stage] agents; by_block instead gives the index into agent_num of every block."""
    numbers = [int(n) for n in agent_num]

    def make(site: Site) -> AgentMixer:
        return AgentMixer(site, numbers[site.stage if by_block is None else by_block[site.block]])

    return make


MIXERS["agent"] = AgentMixer
