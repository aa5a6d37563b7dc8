"""What decoding loops cost per token, against transformers' own decoding of the same model, in one run.

    python -m benchmarks.vlm_loops [--model small] [--model miniature] [--model qwen] [--prompt 1000] [--tokens 16]

Models: "small", a tiny LLaVA with random weights, where all is Python; "miniature", the one that ships; "qwen", random
weights in the shape of a 0.3B Qwen2.5-VL text tower. Loops are compared with their peer first, at the setting at which
they must say the same (no number where they don't, and exit status 1). Printed are medians of the thread's CPU time
between two tokens on one thread, the prompt left out, and their ratio to the peer's. "authors' way" is what OPERA's
released code does per step: 1 + C forwards on eager attention that returns the attention of all layers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import StoppingCriteria

from attnzoo import miniatures, vlm

BEAMS, CANDIDATES = 5, 5
IMAGE = 5


class Stamps(StoppingCriteria):
    """The time of each token: every loop asks its stopping criteria once a step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.at.append(time.thread_time())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def median(self) -> float:
        """Milliseconds; the first step, which has the prompt in it, left out."""
        return 1e3 * statistics.median(b - a for a, b in zip(self.at[1:], self.at[2:]))


def qwen() -> Any:
    text = {
        "vocab_size": 32000, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 20,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
        "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 896}
    vision |= {"fullatt_block_indexes": [0]}
    names = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **names)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen_inputs(length: int) -> dict[str, Tensor]:
    side = 2 * int((0.6 * length) ** 0.5)
    count = side * side // 4
    ids = torch.randint(10, 32000, (1, length))
    ids[0, 8 : 8 + count] = IMAGE
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(side * side, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def small() -> Any:
    text = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=4096, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


def small_inputs(length: int) -> dict[str, Tensor]:
    ids = torch.randint(10, 99, (1, 96))
    ids[0, 8:72] = IMAGE
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 32, 32),
    }


def miniature() -> Any:
    return miniatures.load("llava")[0]


def miniature_inputs(length: int) -> dict[str, Tensor]:
    picture = miniatures.sample_scene(np.random.default_rng(0), "broken").image
    return dict(miniatures.load("llava")[1](images=picture, text="<image>Describe the image.", return_tensors="pt"))


MODELS = {"small": (small, small_inputs), "miniature": (miniature, miniature_inputs), "qwen": (qwen, qwen_inputs)}


def authors_way(model: Any, inputs: dict[str, Tensor], steps: int) -> float:
    """Milliseconds of 1 + C forwards of one token of each beam, eager, all layers' attention returned."""
    key = "text_config"
    model.set_attn_implementation({key: "eager"})
    try:
        output = model(**inputs, use_cache=True)
        cache = next(output[name] for name in ("cache", "past_key_values") if name in output)
        cache.batch_repeat_interleave(BEAMS)
        token, named = torch.full((BEAMS, 1), 11), "cache" if "cache" in output else "past_key_values"
        taken = []
        for _ in range(steps):
            begun = time.thread_time()
            for _ in range(1 + CANDIDATES):
                out = model(input_ids=token, use_cache=True, output_attentions=True, **{named: cache})
                out.attentions[-1].max(1)
                cache.crop(-1)
            taken.append(1e3 * (time.thread_time() - begun))
    finally:
        model.set_attn_implementation({key: "sdpa"})
    return statistics.median(taken)


def run(generate: Any, inputs: dict[str, Tensor], tokens: int, **how: Any) -> tuple[Tensor, float]:
    stamps = Stamps()
    found = generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        stopping_criteria=[stamps],
        **how,
    )
    return found, stamps.median()


def measure(name: str, prompt: int, tokens: int) -> bool:
    """Print a model's rows; whether all loops agreed with their peers."""
    torch.manual_seed(0)
    build, make = MODELS[name]
    model, inputs = build().eval(), make(prompt)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    length = inputs["input_ids"].shape[1]
    print(f"\n{name}: {size:.0f} M parameters, {length} prompt tokens, {tokens} answer tokens\n")
    print("| loop | peer | ms per token | peer's | ratio |\n| --- | --- | ---: | ---: | ---: |")
    good = True

    def row(title: str, peer: str, own: float, theirs: float) -> None:
        print(f"| {title} | {peer} | {own:.1f} | {theirs:.1f} | {own / theirs:.2f} |", flush=True)

    with torch.inference_mode():
        stock, theirs = run(model.generate, inputs, tokens, num_beams=BEAMS)
        with vlm.edit(
            model, "opera", penalty_weights=0.0, threshold=None, num_attn_candidates=CANDIDATES, num_beams=BEAMS
        ) as session:
            neutral, _ = run(session.generate, inputs, tokens)
        with vlm.edit(model, "opera", num_attn_candidates=CANDIDATES, num_beams=BEAMS) as session:
            _, own = run(session.generate, inputs, tokens)
        title = f"opera, C = {CANDIDATES}"
        peer = f"beam search, {BEAMS} beams"
        if torch.equal(neutral, stock):
            row(title, peer, own, theirs)
        else:
            good = False
            print(f"{title}: not {peer} where it must be")
        row("authors' way of opera (eager, 1 + C forwards)", peer, authors_way(model, inputs, 4), theirs)
        stock, theirs = run(model.generate, inputs, tokens)
        for method, off in (("vcd", {"alpha": 0.0}), ("pai_guidance", {"gamma": 1.0})):
            with vlm.edit(model, method, **off) as session:
                neutral, own = run(session.generate, inputs, tokens)
            if torch.equal(neutral, stock):
                row(method, "greedy", own, theirs)
            else:
                good = False
                print(f"{method}: not greedy where it must be")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", choices=sorted(MODELS), help="all where none is named")
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = [measure(name, arguments.prompt, arguments.tokens) for name in arguments.model or MODELS]
    return int(not all(done))


if __name__ == "__main__":
    sys.exit(main())
