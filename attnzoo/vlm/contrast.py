"""Contrastive decoding: the model's logits against those of a second, spoiled view of the same prompt."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from attnzoo.errors import SeamError, UnsupportedError, check_range, check_same, check_tensor
from attnzoo.vlm.checks import as_number
from attnzoo.vlm.lookahead import CACHES, Stream
from attnzoo.vlm.rehearsal import kept_positions

if TYPE_CHECKING:
    from attnzoo.vlm.session import Session


def contrastive_logits(logits: Tensor, other: Tensor, alpha: float = 1.0, beta: float = 0.1) -> Tensor:
    """(1 + alpha) logits - alpha other, and -inf where logits < log(beta) + their maximum (VCD's vcd_sample.py).

    logits, other: [..., V], raw or log-probabilities. beta: how plausible a token must be, as a share of the most
    plausible one's probability; 0 keeps all.
    """
    check_same("shape", logits=logits, other=other)
    found = (1 + alpha) * logits - alpha * other
    if beta == 0:
        return found
    return found.masked_fill(logits < math.log(beta) + logits.max(-1, keepdim=True).values, -torch.inf)


def noisy_image(
    image: Tensor, noise_step: int = 500, noise: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """A picture after noise_step of 1000 steps of forward diffusion (VCD's vcd_add_noise.py): sigmoid schedule of betas
    from 1e-5 to 5e-3.

    image: floating point, any shape. noise: standard normal, of image's shape; None: drawn from generator.
    """
    check_tensor("image", image)
    check_range("noise_step", noise_step, 0, 999)
    steps = torch.linspace(-6, 6, 1000)
    betas = torch.sigmoid(steps) * (5e-3 - 1e-5) + 1e-5
    kept = torch.cumprod(1 - betas, 0)[noise_step]
    if noise is None:
        noise = torch.randn(image.shape, generator=generator, dtype=torch.float32).to(image)
    return kept.sqrt().to(image) * image + (1 - kept).sqrt().to(image) * noise.to(image)


# --- the second view -------------------------------------------------------------------------------------------------

IMAGES = ("pixel_values", "pixel_values_videos")
_TOKENWISE = ("token_type_ids", "mm_token_type_ids")


def noisy_inputs(inputs: dict[str, Any], noise_step: int, seed: int) -> dict[str, Any]:
    """The same prompt with noise on its pictures: for each the one that `seed` gives, so that a batch is its rows."""
    found = dict(inputs)
    for name, grid in zip(IMAGES, ("image_grid_thw", "video_grid_thw")):
        pixels = inputs.get(name)
        if pixels is None:
            continue
        if (sizes := inputs.get(grid)) is not None:  # patches of all pictures in one row
            pictures = list(pixels.split(sizes.prod(-1).tolist()))
        else:
            pictures = list(pixels.flatten(0, 1) if pixels.ndim == 5 else pixels)
        noisy = [noisy_image(p, noise_step, generator=torch.Generator().manual_seed(seed)) for p in pictures]
        found[name] = torch.cat(noisy) if sizes is not None else torch.stack(noisy).view_as(pixels)
    return found


def without_images(inputs: dict[str, Any], image: Tensor, pad: int) -> dict[str, Any]:
    """The same prompt without its image tokens, which image [B, N] marks, and without pictures."""
    rows = [(real & ~own).nonzero()[:, 0] for real, own in zip(inputs["attention_mask"].bool(), image)]
    kept = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
    return _rows(kept, rows, [None] * len(rows), pad)


def with_instruction(inputs: dict[str, Any], image: Tensor, instruction: Sequence[int], pad: int) -> dict[str, Any]:
    """The same prompt with an instruction's tokens behind the last image token of each row (in front, without one)."""
    rows = [real.nonzero()[:, 0] for real in inputs["attention_mask"].bool()]
    where: list[tuple[int, Sequence[int]] | None] = []
    for row, own in zip(rows, image):
        marked = own[row].nonzero()[:, 0]
        where.append((int(marked[-1]) + 1 if len(marked) else 0, instruction))
    return _rows(dict(inputs), rows, where, pad)


def _rows(
    inputs: dict[str, Any], rows: list[Tensor], inserts: Sequence[tuple[int, Sequence[int]] | None], pad: int
) -> dict[str, Any]:
    """Inputs whose row b holds the tokens at rows[b], with tokens put in, padded on the left."""
    found = dict(inputs)
    longest = max(len(row) + (len(put[1]) if put else 0) for row, put in zip(rows, inserts))
    for name, fill in (("input_ids", pad), ("attention_mask", 0), *((name, 0) for name in _TOKENWISE)):
        if (value := inputs.get(name)) is None:
            continue
        lines = []
        for line, row, put in zip(value, rows, inserts):
            line = line[row]
            if put is not None:
                own = list(put[1]) if name == "input_ids" else [int(name == "attention_mask")] * len(put[1])
                line = torch.cat([line[: put[0]], line.new_tensor(own), line[put[0] :]])
            lines.append(torch.nn.functional.pad(line, (longest - len(line), 0), value=fill))
        found[name] = torch.stack(lines)
    return found


class SecondView:
    """Logits of a second view of a batch of prompts, behind the answers that the first view has so far.

    edited: whether the session's edits hold in it.

    It has a cache of its own. Each new row of ids, one token longer, is found among the rows before by its prefix, so
    that greedy, sampled and beam search need not say which row continues which.
    """

    def __init__(self, session: Session, inputs: dict[str, Any], edited: bool = True):
        model: Any = session.model
        ids = inputs["input_ids"]
        kwargs = {name: value for name, value in inputs.items() if name != "input_ids"}
        kwargs["use_cache"] = True
        accepted = inspect.signature(model.forward).parameters
        if "position_ids" in accepted:
            with kept_positions(model):
                kwargs["position_ids"] = model._prepare_position_ids_for_generation(ids, kwargs)
        if "logits_to_keep" in accepted:
            kwargs["logits_to_keep"] = 1
        cache = DynamicCache(config=model.config.get_text_config())
        run = functools.partial(session.forward, prompt_length=ids.shape[1]) if edited else session.plain_forward
        self.stream = Stream(model, kwargs, cache, run)
        self.ids = ids
        self.known: Tensor | None = None

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """[R, V] for the first view's ids [R, L], R a multiple of the prompts."""
        stream = self.stream
        if self.known is None:
            with kept_positions(stream.model):
                found = stream.prompt(self.ids)
            repeats, rest = divmod(len(input_ids), len(found))
            if rest:
                raise SeamError(f"{len(input_ids)} rows are no multiple of the {len(found)} prompts of the second view")
            stream.cache.batch_repeat_interleave(repeats)
            self.known = input_ids
            return found.repeat_interleave(repeats, 0)
        length, repeats = self.known.shape[1], len(input_ids) // stream.samples
        if input_ids.shape != (len(self.known), length + 1):
            raise SeamError(
                f"contrastive decoding went from ids {tuple(self.known.shape)} to {tuple(input_ids.shape)}: it follows "
                "decoding of one token at a time"
            )
        now, before = (ids[:, :length].view(stream.samples, repeats, length) for ids in (input_ids, self.known))
        same = (now[:, :, None] == before[:, None]).all(-1)
        if not bool(same.any(-1).all()):
            raise SeamError("a sequence continues none of those of the step before")
        rows = same.int().argmax(-1) + torch.arange(stream.samples, device=same.device)[:, None] * repeats
        stream.cache.reorder_cache(rows.flatten())
        found = stream.forward(input_ids[:, -1:], repeats)[:, -1]
        stream.tokens += 1
        self.known = input_ids
        return found


class Contrast(LogitsProcessor):
    """transformers' logits processor of a contrast: combine(scores, the second view's logits)."""

    def __init__(self, view: SecondView, combine: Callable[[Tensor, Tensor], Tensor], normalise: bool):
        self.view, self.combine, self.normalise = view, combine, normalise

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        found = self.combine(scores, self.view.logits(input_ids).to(scores.dtype))
        return found.log_softmax(-1) if self.normalise else found


# --- the methods -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Contrastive:
    """What the contrastive ways share; see Vcd, Icd, PaiGuidance."""

    beta: float = 0.1
    edited: ClassVar[bool] = True  # whether the session's edits hold in the second view too

    def __post_init__(self) -> None:
        as_number("beta", self.beta, 0.0, 1.0)

    def generate(self, session: Session, args: Any, kwargs: dict[str, Any], image: Tensor | None) -> Any:
        model: Any = session.model
        for name in ("assistant_model", "prompt_lookup_num_tokens", "custom_generate"):
            if kwargs.get(name) is not None:
                raise UnsupportedError(f"contrastive decoding goes token by token and can't be used with {name}")
        if self._neutral():
            return model.generate(*args, **kwargs)
        config = kwargs.get("generation_config") or model.generation_config
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if not isinstance(ids, Tensor) or kwargs.get("inputs_embeds") is not None or image is None:
            raise UnsupportedError("contrastive decoding spoils a prompt of tokens: give input_ids")
        if any(kwargs.get(n) is not None and kwargs[n].get_seq_length() for n in CACHES):
            raise UnsupportedError("contrastive decoding begins with a prompt, not with a cache that holds some of it")
        inputs = {
            name: value
            for name, value in kwargs.items()
            if isinstance(value, Tensor) and name not in ("inputs", "input_ids", "position_ids")
        }
        inputs["input_ids"] = ids
        pad = kwargs.get("pad_token_id", config.pad_token_id)
        if inputs.get("attention_mask") is None:
            inputs["attention_mask"] = _mask(ids, pad, kwargs.get("eos_token_id", config.eos_token_id))
        pad = pad if type(pad) is int else 0
        view = SecondView(session, self._second(inputs, image, pad), self.edited)
        beams = kwargs.get("num_beams") or config.num_beams or 1
        processors = [*(kwargs.pop("logits_processor", None) or ()), Contrast(view, self._combine, beams > 1)]
        return model.generate(*args, **kwargs, logits_processor=LogitsProcessorList(processors))

    def _neutral(self) -> bool:
        raise NotImplementedError

    def _second(self, inputs: dict[str, Any], image: Tensor, pad: int) -> dict[str, Any]:
        raise NotImplementedError

    def _combine(self, scores: Tensor, other: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Vcd(_Contrastive):
    """VCD (CVPR 2024, arXiv 2311.16922; code DAMO-NLP-SG/VCD): against the same prompt with noisy pictures.

    alpha: strength; the paper's 1 (the code's default is 0.5). beta: tokens with less than this share of the likeliest
    one's probability are dropped. Both 0: nothing changes. noise_step: of 1000 steps of diffusion. seed: of the noise.

    Differences from the authors' code: greedy, sampling and beams (theirs replaces sampling); batches; the contrast
    comes behind transformers' own logits processors, before temperature and the like (theirs before all of them); the
    noise has its own generator and is the same for every picture. With beams the contrast is normalised again.

    Raises TypeError or ValueError for arguments out of range.
    """

    alpha: float = 1.0
    noise_step: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        as_number("alpha", self.alpha, 0.0)
        for name, high in (("noise_step", 999), ("seed", None)):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name} must be an integer, got {getattr(self, name)!r}")
            check_range(name, getattr(self, name), 0, high)

    def _neutral(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def _second(self, inputs: dict[str, Any], image: Tensor, pad: int) -> dict[str, Any]:
        if all(inputs.get(name) is None for name in IMAGES):
            raise ValueError(f"vcd needs a prompt with a picture, got none of {', '.join(IMAGES)}")
        return noisy_inputs(inputs, self.noise_step, self.seed)

    def _combine(self, scores: Tensor, other: Tensor) -> Tensor:
        return contrastive_logits(scores, other, self.alpha, self.beta)


ICD_INSTRUCTION = "You are a confused object detector to provide a fuzzy overview or impression of the image."


@dataclass(frozen=True, kw_only=True)
class Icd(_Contrastive):
    """ICD (ACL Findings 2024, arXiv 2403.18715): against the same picture under an instruction that disturbs.

    instruction_ids: its tokens, put behind each row's last image token:
    processor.tokenizer(attnzoo.vlm.ICD_INSTRUCTION, add_special_tokens=False).input_ids. attnzoo.vlm.ask fills them in.
    alpha: strength (the paper's lambda). beta: as in VCD.

    The formula and the instruction are written from the paper's description and compared with no code of the authors.
    Raises TypeError or ValueError for arguments out of range, or without an instruction.
    """

    instruction_ids: tuple[int, ...] | list[int] | None = None
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        as_number("alpha", self.alpha, 0.0)
        own = self.instruction_ids
        if own is not None and (not len(own) or any(type(i) is not int for i in own)):
            raise TypeError(f"instruction_ids must hold integers, at least one, got {own!r}")

    def _neutral(self) -> bool:
        return self.alpha == 0 and self.beta == 0

    def _second(self, inputs: dict[str, Any], image: Tensor, pad: int) -> dict[str, Any]:
        if self.instruction_ids is None:
            raise TypeError(
                "icd needs instruction_ids: processor.tokenizer(attnzoo.vlm.ICD_INSTRUCTION, "
                "add_special_tokens=False).input_ids"
            )
        return with_instruction(inputs, image, self.instruction_ids, pad)

    def _combine(self, scores: Tensor, other: Tensor) -> Tensor:
        return contrastive_logits(scores, other, self.alpha, self.beta)


@dataclass(frozen=True, kw_only=True)
class PaiGuidance(_Contrastive):
    """The guidance of PAI (arXiv 2407.21771; code LALBJ/PAI CFG.py): against the prompt without its picture.

    gamma: strength, gamma (l - u) + u of log-probabilities; 1 with beta=0 changes nothing. PAI itself is
    edit(model, ["pai", "pai_guidance"]). beta: as in VCD.

    As in the authors' code, the session's edits hold in the first view only. Difference from it: the picture's tokens
    are taken out of each row's own prompt, in batches and with beams too.
    Raises TypeError or ValueError for arguments out of range.
    """

    gamma: float = 1.1
    edited: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        as_number("gamma", self.gamma, 1.0)

    def _neutral(self) -> bool:
        return self.gamma == 1 and self.beta == 0

    def _second(self, inputs: dict[str, Any], image: Tensor, pad: int) -> dict[str, Any]:
        return without_images(inputs, image, pad)

    def _combine(self, scores: Tensor, other: Tensor) -> Tensor:
        return contrastive_logits(scores.log_softmax(-1), other.log_softmax(-1), self.gamma - 1, self.beta)


def _mask(ids: Tensor, pad: Any, eos: Any) -> Tensor:
    """What `generate` assumes where it is given no mask: padding where the pad token is none that ends answers."""
    ends = eos if isinstance(eos, list | tuple) else [eos]
    if not isinstance(pad, int) or pad in ends:
        return torch.ones_like(ids)
    return (ids != pad).long()
