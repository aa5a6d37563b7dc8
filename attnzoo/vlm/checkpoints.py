"""What methods' authors give for single checkpoints, and how their layers are carried to towers of another depth."""

from __future__ import annotations

from typing import Any

from attnzoo.configs.schema import read_toml


def published(text_config: Any, table: str = "vlm_checkpoints.toml") -> dict[str, Any]:
    """The row of attnzoo/configs/<table> for this text tower; empty where its authors name it nowhere."""
    for row in read_toml(table)["checkpoint"]:
        low, high = row["vocab_size"]
        facts = (text_config.model_type, text_config.hidden_size, text_config.num_hidden_layers)
        if (
            facts == (row["model_type"], row["hidden_size"], row["num_hidden_layers"])
            and low <= text_config.vocab_size <= high
        ):
            return row
    return {}


def carried(layer: int, depth: int, of: int = 32) -> int:
    """A layer of a tower of `of` layers, at the same share of `depth` layers."""
    return min(depth - 1, round(layer * depth / of))
