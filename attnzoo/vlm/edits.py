"""The edits that methods are made of, as frozen values: what changes, in which layers and heads, for which query rows.

Rows are named by what they are for, not by where they lie in one forward:

    "answer"       rows that predict an answer token: the last prompt row and every generated row
    "last"         the last row of each forward, whatever it is (several authors' code)
    "after_image"  rows behind the last image token of their own sequence, and every generated row
    "prompt"       rows of the prompt, the last one included
    "all"          every row
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_choice

ROWS = ("answer", "last", "after_image", "prompt", "all")
KEYS = ("image", "text", "first")
READOUTS = ("probs", "head_max", "head_mean", "masses", "column_sums", "outputs")


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is known about a batch of prompts, padding included.

    image, real: bool [B, N], image tokens and what is no padding. ids: int64 [B, N]; None where embeddings were given,
    -1 where an earlier answer stands in the prompt. image_end: per sequence the position behind its last image token, 0
    where it has none. notes: what edits found out about these prompts, by their own keys.
    """

    image: Tensor
    real: Tensor
    ids: Tensor | None
    image_end: list[int]
    notes: dict[Any, Any]

    @property
    def behind_image(self) -> Tensor:
        """bool [B, N]: text behind the last image token; all text where a prompt has no image."""
        place = torch.arange(self.image.shape[1], device=self.image.device)
        ends = torch.tensor(self.image_end, device=self.image.device)
        return self.real & (place >= ends[:, None])


Keys = str | Callable[[Prompt], Tensor]


@dataclass(frozen=True)
class _Edit:
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError(f"layers must name at least one layer, got {self.layers!r}")


@dataclass(frozen=True)
class _LogitEdit(_Edit):
    keys: Keys = "image"
    heads: tuple[int, ...] | None = None
    rows: str = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.keys):
            check_choice("keys", self.keys, KEYS)
        check_choice("rows", self.rows, [r for r in ROWS if r != "after_image"])


@dataclass(frozen=True)
class LogitMap(_LogitEdit):
    """s <- s + alpha |s| on the logits s of some keys, before the softmax.

    keys, here and in KeyBias: "image", "text" (what is neither image nor padding, generated tokens included), "first"
    (the first real token), or a function of the Prompt that gives weights [B, N], bool or float, which alpha (value)
    is multiplied with; generated tokens then have weight 0.
    """

    alpha: float = 0.0


@dataclass(frozen=True)
class KeyBias(_LogitEdit):
    """s <- s + value on the logits s of some keys, before the softmax: their odds grow by exp(value)."""

    value: float = 0.0


@dataclass(frozen=True)
class Regroup(_Edit):
    """Keys fall into groups; a row multiplies each group's probabilities by a factor that depends on the masses.

    assign: with source="residual", (hidden_states [B, N, C], image [B, N], real [B, N], memory dict) -> uint8 [B, N],
        the groups of the prompt's keys, from the residual stream that enters the layer; called once per chunk of a
        prompt, with one memory for the layer and the call. With source="prompt", (Prompt, layer) -> uint8 [B, N], or
        [B, H, N] where heads group their keys for themselves. Generated tokens are in group 0.
    rule: (masses [B, R, H, G], sizes [B, G] or [B, H, G]) -> factors [B, R, H, G].
    copied, log_weights: besides its own mass, group `copied` stands a second time, each key weighted with the exp of
        log_weights(Prompt) [B, N]; its mass is the last of the G + 1 that the rule then gets and gives factors for. So
        a rule can choose per row and head between the plain and the weighted keys (GIFT).
    """

    assign: Callable[..., Tensor]
    rule: Callable[[Tensor, Tensor], Tensor]
    num_groups: int
    rows: str = "after_image"
    source: str = "residual"
    copied: int | None = None
    log_weights: Callable[[Prompt], Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rows", self.rows, ROWS)
        check_choice("source", self.source, ("residual", "prompt"))


@dataclass(frozen=True)
class Spread(_Edit):
    """As Regroup, and a group may also be given a mass that its keys share equally (ViF).

    assign: (Prompt, layer) -> uint8 [B, N].
    rule: (masses [B, R, H, G], counts of the keys that each row sees [B, R, 1, G]) -> (factors, gifts), both
        [B, R, H, G]; a gift is added to the group's mass.
    temperature: divides the logits. leaky: also keys that a row does not see share in a gift (ViF's released code).
    """

    assign: Callable[[Prompt, int], Tensor]
    rule: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    num_groups: int
    rows: str = "all"
    temperature: float = 1.0
    leaky: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rows", self.rows, ROWS)


@dataclass(frozen=True)
class Mask(_Edit):
    """Who sees whom.

    mark: Prompt -> integer kinds of its tokens [B, N]; generated tokens are of kind 0.
    rule: (seen [B or 1, 1, R, K], row kinds [B, 1, R, 1], key kinds [B, 1, 1, K], itself [R, K]) -> bool
        [B, 1 or H, R, K]: what the rows see instead of `seen`; `itself` is True where row and key are one token.
        Padding is taken out afterwards. Called for a run of rows at a time.
    looks_ahead: rows see keys behind them, so the prompt must come in one forward.
    """

    mark: Callable[[Prompt], Tensor]
    rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    looks_ahead: bool = False
    rows: str = "all"


@dataclass(frozen=True)
class HeadScale(_Edit):
    """A head's output, before the output projection, times factor."""

    heads: tuple[int, ...]
    factor: float
    rows: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rows", self.rows, ROWS)


@dataclass(frozen=True)
class HeadChoice(_Edit):
    """As HeadScale, for heads that are chosen per sequence when the prompt has been read, and kept.

    choose: (layer, outputs [B, H, Dv] of the last prompt row, Prompt) -> bool [B, H].
    """

    choose: Callable[[int, Tensor, Prompt], Tensor]
    factor: float
    rows: str = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rows", self.rows, ROWS)


@dataclass(frozen=True)
class Observe(_Edit):
    """Looks at a layer's attention over a whole prompt before the layer's other edits, and notes what it finds.

    look: (layer, view, Prompt) -> None; view.rows(first, last) gives the attention of a run of prompt rows (an
    attnzoo.vlm.attention.Rows: probs, column_sums, masses), without any edit but masks. The prompt must come in one
    forward.
    """

    look: Callable[[int, Any, Prompt], None]
    rows: str = "all"


@dataclass(frozen=True)
class Rehearse:
    """A forward that runs before a prompt's own, for what must be known before its first layer.

    edits: (Prompt) -> the edits that are open in it; they write into the Prompt's notes.
    inputs: "same" as the prompt; "blind": its text without the image tokens; "both": a batch of the prompts and, behind
        them, the blind ones.
    """

    edits: Callable[[Prompt], tuple[Any, ...]]
    inputs: str = "same"

    def __post_init__(self) -> None:
        check_choice("inputs", self.inputs, ("same", "blind", "both"))


@dataclass(frozen=True)
class Tap:
    """Reads modules outside of the text tower while a prompt's forward runs.

    find: model -> the modules; raises UnsupportedError where there are none. read: (index among them, module, its
    positional and keyword arguments, notes of the prompt) -> None, called before the module's forward.
    """

    find: Callable[[Any], list[Any]]
    read: Callable[[int, Any, tuple[Any, ...], dict[str, Any], dict[Any, Any]], None]


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
    rows: "answer", "last", "prompt" or "all", as for other edits.

    All but "outputs" are float32 (float64 for float64 models) and show the softmax with masks and logit edits in it,
    before a Regroup or Spread re-weights it; "outputs" are what goes on to the projection. The n x n matrix is formed
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


LayerEdit = LogitMap | KeyBias | Regroup | Spread | Mask | HeadScale | HeadChoice | Observe | Probe
Edit = LayerEdit | Rehearse | Tap
ROW_EDITS = (LogitMap, KeyBias, Regroup, Spread, Mask)  # that change the rows' softmax, or what it reads
Plan = dict[int, tuple[LayerEdit, ...]]


def make_plan(edits: tuple[Edit, ...], num_layers: int, num_heads: int) -> Plan:
    """layer -> its edits.

    Raises ValueError for a layer or head that does not exist, UnsupportedError for two edits on one layer whose order
    would matter.
    """
    plan: dict[int, list[LayerEdit]] = {}
    for edit in edits:
        if isinstance(edit, Rehearse | Tap):
            continue
        for layer in edit.layers:
            if type(layer) is not int or not 0 <= layer < num_layers:
                raise ValueError(f"layers must hold integers from 0 to {num_layers - 1}, got {layer!r}")
            plan.setdefault(layer, []).append(edit)
        for head in getattr(edit, "heads", None) or ():
            if type(head) is not int or not 0 <= head < num_heads:
                raise ValueError(f"heads must hold integers from 0 to {num_heads - 1}, got {head!r}")
    for layer, own in plan.items():
        if sum(isinstance(edit, Regroup | Spread) for edit in own) > 1:
            raise UnsupportedError(
                f'layer {layer} has two edits that re-weight key groups ("var", "gift", "act" and "vif" do): '
                "their order matters"
            )
        if sum(isinstance(edit, Mask) for edit in own) > 1:
            raise UnsupportedError(f"layer {layer} has two edits that say who sees whom: their order matters")
    return {layer: tuple(own) for layer, own in sorted(plan.items())}
