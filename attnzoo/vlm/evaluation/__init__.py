"""Scorers of hallucination: CHAIR on captions, POPE on yes/no questions. Pure functions of texts; no model here."""

from __future__ import annotations

from attnzoo.vlm.evaluation.chair import (
    CaptionScore,
    ChairScores,
    ObjectWords,
    chair,
    chair_truth,
    load_words,
    read_coco,
)
from attnzoo.vlm.evaluation.pope import (
    PARSERS,
    SPLITS,
    PopeQuestion,
    PopeScores,
    parse_answer,
    pope,
    pope_questions,
)

__all__ = [
    "PARSERS",
    "SPLITS",
    "CaptionScore",
    "ChairScores",
    "ObjectWords",
    "PopeQuestion",
    "PopeScores",
    "chair",
    "chair_truth",
    "load_words",
    "parse_answer",
    "pope",
    "pope_questions",
    "read_coco",
]
