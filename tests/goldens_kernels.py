"""The kernels' part of the goldens adapter: natten. Names are translated here, nothing is computed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.kernels import neighborhood_attention, neighborhood_logits


def run(meta: dict[str, Any], tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Any]:
    """The expected values of a natten file: per case out and lse, or out and logits where there is a relative bias."""
    results = {}
    for case in meta["config"]:
        given = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(case["case"] + ".")}
        window = {k: case[k] for k in ("kernel_size", "stride", "dilation", "is_causal", "scale") if k in case}
        if "rpb" in given:
            found = _relative_bias(given, window, backend)
        else:
            extra: dict[str, Any] = {k: given.get(k) for k in ("additional_keys", "additional_values")}
            out, lse = neighborhood_attention(
                given["q"], given["k"], given["v"], **window, **extra, return_lse=True, backend=backend or "auto"
            )
            found = {"out": out, "lse": lse}
        results.update({f"{case['case']}.{name}": value for name, value in found.items()})
    return results


def _relative_bias(given: dict[str, Tensor], window: dict[str, Any], backend: str | None) -> dict[str, Tensor]:
    """NATTEN 0.17.5's layout, heads before the grid, in and out."""
    query, key, value = (given[name].movedim(1, -2) for name in "qkv")
    out = neighborhood_attention(query, key, value, **window, bias=given["rpb"], backend=backend or "auto")
    logits = neighborhood_logits(query, key, **window, bias=given["rpb"])
    return {"out": out.movedim(-2, 1), "logits": logits.movedim(-2, 1)}
