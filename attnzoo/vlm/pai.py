"""PAI, "Paying More Attention to Image" (ECCV 2024, arXiv 2407.21771; code LALBJ/PAI, MIT): louder image logits."""

from __future__ import annotations

from typing import Any

from attnzoo.errors import check_choice
from attnzoo.vlm.checks import as_layers, as_number
from attnzoo.vlm.edits import Edit, LogitMap


def pai(text_config: Any, alpha: float = 0.2, layers: object = None, compat: str | None = None) -> tuple[Edit, ...]:
    """The edit of PAI: s <- s + alpha |s| on the image keys' logits of the rows that predict the answer.

    alpha: the authors' README uses 0.2; the paper's captioning runs 0.5. 0 changes nothing.
    layers: an iterable of layer indices; None means all from the third on (2, 3, ...), as the authors do.
    compat: "official" edits the last row of each forward, as the authors' code does. The default edits every row that
        predicts an answer token, which is the same in plain decoding and differs where one forward carries several
        of them (assisted decoding, no cache, scoring of a given answer).

    Other differences from the authors' code: image positions come from each row's own tokens (several images, padding
    and beams included) instead of one fixed span; the logits are edited in float32, not in the model's type. The
    paper's second part, guidance against a text-only prompt (gamma), is "pai_guidance", which stacks with this.

    Raises TypeError or ValueError for an alpha below 0 or not a number, a layer that does not exist, another compat.
    """
    check_choice("compat", compat, (None, "official"))
    rows = "last" if compat == "official" else "answer"
    return (
        LogitMap(as_layers(layers, text_config.num_hidden_layers, 2), rows=rows, alpha=as_number("alpha", alpha, 0.0)),
    )
