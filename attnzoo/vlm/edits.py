"""The edits that methods are made of, as frozen values: what changes, in which layers and heads, for which query rows.

Rows are named by what they are for, not by where they lie in one forward:

    "answer"       rows that predict an answer token: the last prompt row and every generated row
    "last"         the last row of each forward, whatever it is (several authors' code)
    "after_image"  rows behind the last image token of their own sequence, and every generated row
    "all"          every row
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnzoo.errors import UnsupportedError, check_choice

ROWS = ("answer", "last", "after_image", "all")
KEYS = ("image", "text", "first")
READOUTS = ("probs", "head_max", "head_mean", "masses", "column_sums", "outputs")


@dataclass(frozen=True)
class _Edit:
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError(f"layers must name at least one layer, got {self.layers!r}")


@dataclass(frozen=True)
class _LogitEdit(_Edit):
    keys: str = "image"
    heads: tuple[int, ...] | None = None
    rows: str = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("keys", self.keys, KEYS)
        check_choice("rows", self.rows, [r for r in ROWS if r != "after_image"])


@dataclass(frozen=True)
class LogitMap(_LogitEdit):
    """s <- s + alpha |s| on the logits s of some keys, before the softmax."""

    alpha: float = 0.0


@dataclass(frozen=True)
class KeyBias(_LogitEdit):
    """s <- s + value on the logits s of some keys, before the softmax: their odds grow by exp(value)."""

    value: float = 0.0


@dataclass(frozen=True)
class Regroup(_Edit):
    """Keys fall into groups; a row multiplies each group's probabilities by a factor that depends on the masses.

    assign: (hidden_states [B, N, C], image [B, N], real [B, N], memory dict) -> uint8 [B, N], the groups of the
        prompt's keys, from the residual stream that enters the layer. Called once per chunk of a prompt, with one
        memory for the layer and the call. Generated tokens are in group 0.
    rule: (masses [B, R, H, G], sizes [B, G]) -> factors [B, R, H, G].
    """

    assign: Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
    rule: Callable[[Tensor, Tensor], Tensor]
    num_groups: int
    rows: str = "after_image"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rows", self.rows, ROWS)


@dataclass(frozen=True)
class HeadScale(_Edit):
    """A head's output, before the output projection, times factor."""

    heads: tuple[int, ...]
    factor: float
    rows: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rows", self.rows, ROWS)


@dataclass(frozen=True, eq=False)
class Reading:
    """What a Probe read in one layer of one forward.

    value: as `what` says (see Probe). rows: positions first .. last - 1 (padding counted) of the rows that were read.
    first_key: the position of key slot 0, above 0 in a sliding layer whose cache has let go of the oldest keys.
    answer_start: position of the row that predicts the first answer token. image, real: bool [B0, prompt], the prompt's
    image tokens and what is no padding; B0 divides the batch (beams of one sequence are neighbours).
    """

    layer: int
    what: str
    value: Tensor
    rows: tuple[int, int]
    first_key: int
    answer_start: int
    image: Tensor
    real: Tensor


@dataclass(frozen=True)
class Probe(_Edit):
    """Reads what a layer's attention does in some rows, R of them, and hands it to `tell`; changes nothing.

    tell: called with one Reading per layer and forward that has such rows, in the thread that runs the model.
    what:
        "probs"        softmax rows, [B, R, H, K]
        "head_max"     their largest over heads, [B, R, K] (OPERA)
        "head_mean"    their mean over heads, [B, R, K] (CARVE)
        "masses"       what text and image keys get, [B, R, H, 2]
        "column_sums"  what each key gets from these rows, [B, H, K]; no gradient
        "outputs"      the heads' outputs before the output projection, [B, R, H, Dv]
    rows: "answer", "last" or "all", as for other edits.

    All but "outputs" are float32 (float64 for float64 models) and show the softmax with masks and logit edits in it,
    before a Regroup re-weights it; "outputs" are what goes on to the projection. The n x n matrix is formed
    only by asking "probs" for all rows.
    """

    tell: Callable[[Reading], object]
    what: str = "probs"
    rows: str = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("what", self.what, READOUTS)
        check_choice("rows", self.rows, [r for r in ROWS if r != "after_image"])
        if not callable(self.tell):
            raise TypeError(f"tell must be a function of one Reading, got {type(self.tell).__name__}")


Edit = LogitMap | KeyBias | Regroup | HeadScale | Probe
ROW_EDITS = (LogitMap, KeyBias, Regroup)  # that change the rows' softmax, or what it reads
Plan = dict[int, tuple[Edit, ...]]


def make_plan(edits: tuple[Edit, ...], num_layers: int, num_heads: int) -> Plan:
    """layer -> its edits.

    Raises ValueError for a layer or head that does not exist, UnsupportedError for two Regroups on one layer.
    """
    plan: dict[int, list[Edit]] = {}
    for edit in edits:
        for layer in edit.layers:
            if type(layer) is not int or not 0 <= layer < num_layers:
                raise ValueError(f"layers must hold integers from 0 to {num_layers - 1}, got {layer!r}")
            plan.setdefault(layer, []).append(edit)
        for head in getattr(edit, "heads", None) or ():
            if type(head) is not int or not 0 <= head < num_heads:
                raise ValueError(f"heads must hold integers from 0 to {num_heads - 1}, got {head!r}")
    for layer, own in plan.items():
        if sum(isinstance(edit, Regroup) for edit in own) > 1:
            raise UnsupportedError(
                f'layer {layer} has two edits that re-weight key groups (two of "var"): their order matters'
            )
    return {layer: tuple(own) for layer, own in sorted(plan.items())}
