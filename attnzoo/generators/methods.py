"""The methods by name: one line each."""

from __future__ import annotations

from attnzoo.generators.adaspa import AdaSpa
from attnzoo.generators.agent import Agent
from attnzoo.generators.aligned_gen import AlignedGen
from attnzoo.generators.attention_regulation import AttentionRegulation
from attnzoo.generators.bounded_attention import BoundedAttention
from attnzoo.generators.chain import Method
from attnzoo.generators.conform import Conform
from attnzoo.generators.ditctrl import DiTCtrl
from attnzoo.generators.freecus import FreeCus
from attnzoo.generators.freeswim import FreeSwim
from attnzoo.generators.gna import GNA
from attnzoo.generators.ms_diffusion import MSDiffusion
from attnzoo.generators.pab import PAB
from attnzoo.generators.paro import Paro
from attnzoo.generators.rf_solver import RFEdit
from attnzoo.generators.seer import Seer
from attnzoo.generators.soft_pag import SoftPAG
from attnzoo.generators.sparge import Sparge
from attnzoo.generators.style_aligned import StyleAligned
from attnzoo.generators.t_gate import TGate
from attnzoo.generators.video_infinity import VideoInfinity

METHODS: dict[str, type[Method]] = {
    "adaspa": AdaSpa,
    "agent": Agent,
    "aligned_gen": AlignedGen,
    "attention_regulation": AttentionRegulation,
    "bounded_attention": BoundedAttention,
    "conform": Conform,
    "ditctrl": DiTCtrl,
    "freecus": FreeCus,
    "freeswim": FreeSwim,
    "gna": GNA,
    "ms_diffusion": MSDiffusion,
    "pab": PAB,
    "paro": Paro,
    "rf_edit": RFEdit,
    "seer": Seer,
    "soft_pag": SoftPAG,
    "sparge": Sparge,
    "style_aligned": StyleAligned,
    "t_gate": TGate,
    "video_infinity": VideoInfinity,
}
