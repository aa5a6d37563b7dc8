"""The generator miniature's pipeline: diffusers' calling convention around diffusers' own SD3Transformer2DModel.

The class is made when it is first asked for, so that importing this module needs no diffusers:
`MiniatureGeneratorPipeline` (a module attribute) and `pipeline_class()` are the same class.

A prompt goes through a word-level tokenizer (transformers' PreTrainedTokenizerFast) and a small CLIPTextModel; its
tokens are the transformer's `encoder_hidden_states`, its pooled state the `pooled_projections`. Latents are the pixels
themselves, [batch, 3, height, width] in -1..1: there is no VAE. The flow is rectified (x_t = (1 - t) x + t noise, the
network predicts noise - x), stepped by FlowMatchEulerDiscreteScheduler. Guidance is ONE batched call a step,
[unconditional, conditional] along the batch, as in diffusers' StableDiffusion3Pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attnzoo.errors import check_choice, check_range
from attnzoo.miniatures.world import COLOURS, RELATIONS, SHAPES

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline as _Base
else:
    _Base = object  # `pipeline_class` adds the real one, when diffusers is wanted

#: Words that the text encoder knows, in the order of their token numbers after the special ones.
WORDS = tuple(dict.fromkeys(["a", *COLOURS, *SHAPES, *" ".join(RELATIONS).split()]))
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>", "eos_token": "<eos>"}

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_CALLBACK_INPUTS = ("latents", "prompt_embeds", "pooled_prompt_embeds")


def build_tokenizer(max_length: int) -> Any:
    """A PreTrainedTokenizerFast over `WORDS`: lower case, stops and commas left out, <bos> … <eos> around.

    max_length: tokens in a sequence, <bos> and <eos> included.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*SPECIAL.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[.,!]"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(word, vocabulary[word]) for word in ("<bos>", "<eos>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **SPECIAL)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """int64 [len(texts), tokenizer.model_max_length], padded; an empty text is <bos> <eos>, the unconditional one.

    Raises ValueError for words that the tokenizer doesn't know (it names them and lists the known ones) and for a text
    of too many words.
    """
    known = [word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens]
    split = tokenizer.backend_tokenizer
    for text in texts:
        words = [piece for piece, _ in split.pre_tokenizer.pre_tokenize_str(split.normalizer.normalize_str(text))]
        if unknown := [word for word in dict.fromkeys(words) if word not in known]:
            raise ValueError(
                f"prompt {text!r} has words that this miniature doesn't know: {', '.join(map(repr, unknown))}; "
                f"it knows {', '.join(sorted(known))}"
            )
        if len(words) > (limit := tokenizer.model_max_length - 2):
            raise ValueError(f"prompt may have {limit} words at most, got {len(words)}: {text!r}")
    return tokenizer(list(texts), padding="max_length", return_tensors="pt").input_ids


class _GeneratorPipeline(_Base):
    """What the pipeline does; `pipeline_class` puts it on diffusers' DiffusionPipeline."""

    transformer: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any

    model_cpu_offload_seq: Any = "text_encoder->transformer"
    _callback_tensor_inputs = list(_CALLBACK_INPUTS)

    def __init__(self, transformer: Any, scheduler: Any, text_encoder: Any, tokenizer: Any) -> None:
        from diffusers.image_processor import VaeImageProcessor

        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.transformer.config.patch_size)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers, but in float32 unless `dtype` (or `torch_dtype`) says otherwise: a CPU is slow in half."""
        if "dtype" not in kwargs and "torch_dtype" not in kwargs:
            kwargs["dtype"] = torch.float32
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the call under way, or of the last one."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether each step's batch holds the unconditional half too."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the call under way, or of the last one."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to leave the remaining steps out, as in diffusers."""
        return self._interrupt

    def check_inputs(
        self,
        prompt: str | list[str],
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        negative_prompt: str | list[str] | None,
        num_images_per_prompt: int,
        output_type: str,
        callback_inputs: Sequence[str],
    ) -> None:
        """Raise TypeError or ValueError, naming the argument, for anything that `__call__` can't serve."""
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"prompt must be a string or a list of them, at least one, got {prompt!r}")
        for text in texts:
            if not text.strip():
                raise ValueError("prompt must name one or two objects (such as 'a red circle'), got an empty one")
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            if not isinstance(negative_prompt, list) or not all(isinstance(text, str) for text in negative_prompt):
                raise TypeError(f"negative_prompt must be a string, a list of them or None, got {negative_prompt!r}")
            if len(negative_prompt) != len(texts):
                raise ValueError(
                    f"negative_prompt must hold one text per prompt, got {len(negative_prompt)} for {len(texts)}"
                )
        patch, largest = self.transformer.config.patch_size, self.largest_size
        for name, value in (("height", height), ("width", width)):
            if type(value) is not int or value % patch or not patch <= value <= largest:
                raise ValueError(
                    f"{name} must be a multiple of {patch} (the patch) from {patch} to {largest} pixels, got {value!r}"
                )
        for name, count in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_prompt", num_images_per_prompt),
        ):
            if type(count) is not int:
                raise TypeError(f"{name} must be a whole number, got {count!r}")
            check_range(name, count, 1)
        check_range("guidance_scale", guidance_scale, 0.0)
        check_choice("output_type", output_type, _OUTPUT_TYPES)
        for name in callback_inputs:
            check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)

    @property
    def largest_size(self) -> int:
        """The largest height and width in pixels for which there are position embeddings."""
        config = self.transformer.config
        return config.pos_embed_max_size * config.patch_size

    def encode_prompt(self, texts: Sequence[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(token states [B, T, C], pooled state [B, C]) of `texts`. Raises ValueError for unknown words."""
        states = self.text_encoder(tokenize(self.tokenizer, texts).to(device))
        dtype = self.transformer.dtype
        return states.last_hidden_state.to(dtype), states.pooler_output.to(dtype)

    def prepare_latents(
        self,
        shape: tuple[int, int, int, int],
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """The start of the flow: `latents` if given, else Gaussian noise of `shape`.

        Raises ValueError for latents of another shape, or a list of generators that is not one per image.
        """
        from diffusers.utils.torch_utils import randn_tensor

        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
            return latents.to(device=device, dtype=self.transformer.dtype)
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"generator must be one, or one per image ({shape[0]}), got {len(generator)}")
        return randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int = 32,
        width: int = 32,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draw `num_images_per_prompt` pictures of each prompt, in the order of the prompts.

        prompt: "a red circle", "a red circle left of a blue square", "a red circle above a blue square": the form of
        the training prompts. height, width: multiples of 2 up to `largest_size`; the miniature was trained at 32 x 32.
        guidance_scale: at most 1 turns guidance off. negative_prompt: what to steer away from, None for the empty text
        that training dropped prompts to. generator: one, or one per image (then a batch draws what single calls draw).
        latents: the noise to start from, [images, 3, height, width]. output_type: "pil", "np" (float32 [B, H, W, 3] in
        0..1), "pt" (float [B, 3, H, W] in 0..1) or "latent" (-1..1, not clipped).
        callback_on_step_end(pipe, step, timestep, tensors) -> tensors is called after each step with those named in
        `callback_on_step_end_tensor_inputs` ("latents", "prompt_embeds", "pooled_prompt_embeds").

        Returns ImagePipelineOutput (`.images`), or a tuple of it if `return_dict` is False.
        Raises TypeError and ValueError that name the argument, before anything is computed.
        """
        from diffusers import ImagePipelineOutput

        self.check_inputs(
            prompt,
            height,
            width,
            num_inference_steps,
            guidance_scale,
            negative_prompt,
            num_images_per_prompt,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        texts = [prompt] if isinstance(prompt, str) else prompt
        texts = [text for text in texts for _ in range(num_images_per_prompt)]
        away = [negative_prompt or ""] * len(texts) if not isinstance(negative_prompt, list) else negative_prompt
        if isinstance(negative_prompt, list):
            away = [text for text in away for _ in range(num_images_per_prompt)]
        device = self._execution_device
        self._guidance_scale = guidance_scale
        self._interrupt = False
        guided = self.do_classifier_free_guidance
        prompt_embeds, pooled_prompt_embeds = self.encode_prompt([*away, *texts] if guided else texts, device)
        shape = (len(texts), self.transformer.config.in_channels, height, width)
        latents = self.prepare_latents(shape, device, generator, latents)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=num_inference_steps) as bar:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                stacked = torch.cat([latents, latents]) if guided else latents
                velocity = self.transformer(
                    hidden_states=stacked,
                    timestep=timestep.expand(len(stacked)),
                    encoder_hidden_states=prompt_embeds,
                    pooled_projections=pooled_prompt_embeds,
                    return_dict=False,
                )[0]
                if guided:
                    unconditional, conditional = velocity.chunk(2)
                    velocity = unconditional + guidance_scale * (conditional - unconditional)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "pooled_prompt_embeds": pooled_prompt_embeds,
                    }
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, step, timestep, given) or {}
                    latents = tensors["latents"]
                    prompt_embeds, pooled_prompt_embeds = tensors["prompt_embeds"], tensors["pooled_prompt_embeds"]
                bar.update()

        images: torch.Tensor | np.ndarray | list = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(latents.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


@lru_cache(maxsize=1)
def pipeline_class() -> Any:
    """`MiniatureGeneratorPipeline`, a subclass of diffusers' DiffusionPipeline."""
    from diffusers import DiffusionPipeline

    body = {"__doc__": __doc__, "__module__": __name__}
    return type("MiniatureGeneratorPipeline", (_GeneratorPipeline, DiffusionPipeline), body)


def __getattr__(name: str) -> Any:
    if name == "MiniatureGeneratorPipeline":
        return pipeline_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
