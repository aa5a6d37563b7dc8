"""The goldens of vlm/chair and vlm/pope in the library's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnzoo.vlm.evaluation import chair, chair_truth, load_words, parse_answer, pope


def run(meta: dict[str, Any], tensors: dict[str, Any], backend: str | None = None) -> dict[str, Any]:
    return {"chair": _chair, "pope": _pope}[meta["system"]](meta["inputs"])


def _chair(given: dict[str, Any]) -> dict[str, Any]:
    tokens = {text.lower(): own for text, own in given["tokens"].items()}
    lemmas, tags = given["lemma_overrides"], given["pos_overrides"]

    def singular(words: Sequence[str]) -> list[str]:
        return [given["singular"][word] for word in words]

    def lemma(words: Sequence[str]) -> list[str]:
        kinds = [{"V": "v", "J": "a", "R": "r"}.get(tags.get(word, "NN")[0], "n") for word in words]
        return [lemmas.get(f"{w}|{kind}", lemmas.get(w, w)) for w, kind in zip(words, kinds)]

    words = load_words()
    names = given["categories"]
    out = {}
    for variant, base_forms in (("original", singular), ("lvlm_standalone", lemma)):
        how: dict[str, Any] = {"words": words, "tokenize": tokens.__getitem__, "base_forms": base_forms}
        instances = [(image_id, names[str(category)]) for image_id, category in given["instances"]]
        truth = chair_truth(instances, [tuple(row) for row in given["reference_captions"]], **how)
        scores = chair([tuple(row) for row in given["captions"]], truth, compat="official", **how)
        out[variant] = scores.official(variant)
    return out


def _pope(given: dict[str, Any]) -> dict[str, Any]:
    answers = [row["answer"] for row in given["rows"]]
    labels = [row["label"] for row in given["rows"]]
    own, vcd = pope(answers, labels, "pope"), pope(answers, labels, "vcd")
    return {
        "pred": [parse_answer(answer, "pope") for answer in answers],
        "TP": own.tp,
        "FP": own.fp,
        "TN": own.tn,
        "FN": own.fn,
        "accuracy": own.accuracy,
        "precision": own.precision,
        "recall": own.recall,
        "f1": own.f1,
        "yes_ratio": own.yes_ratio,
        "printed": own.report(),
        "opera_recorder_pred": [int(parse_answer(answer, "opera") == "yes") for answer in answers],
        "vcd_eval_pope": {
            "true_pos": vcd.tp,
            "true_neg": vcd.tn,
            "false_pos": vcd.fp,
            "false_neg": vcd.fn,
            "accuracy": vcd.accuracy,
            "precision": vcd.precision,
            "recall": vcd.recall,
            "f1": vcd.f1,
            "yes_proportion": vcd.yes_ratio,
        },
    }
