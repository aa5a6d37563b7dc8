"""How the generator miniature is trained: the model's parts, the stages, checkpoints that a restart goes on from.

Rectified flow (Liu et al., "Flow Straight and Fast", ICLR 2023) with logit-normal times (Esser et al., "Scaling
Rectified Flow Transformers", 2024, section 3.1) on pixels. Two stages of one network: on patches of 4 pixels, then,
with the same blocks and the same place of every patch, on patches of 2.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from attnzoo.miniatures import training, world
from attnzoo.miniatures.generator_pipeline import build_tokenizer, pipeline_class, tokenize

STAGES = ("coarse", "fine")
CHECKPOINT = "checkpoint.pt"
_DRAWN, _NOISE, _STEPS = 1, 2, 10  # purposes of random streams; every step has its own from _STEPS on


class Scenes:
    """`n` placed scenes of one or two objects: uint8 images [n, 3, S, S] and token numbers [n, T], singles first."""

    def __init__(self, n: int, data: dict[str, Any], tokenizer: Any, rng: np.random.Generator) -> None:
        self.singles = min(max(1, round(n * data["single"])), n - 1)
        self.single_share = data["single"]
        drawn = [
            world.placed_scene(rng, data["size"], 1 if i < self.singles else 2, data["difficulty"]) for i in range(n)
        ]
        images = np.stack([scene.image for scene, _ in drawn])
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.tokens = tokenize(tokenizer, [prompt for _, prompt in drawn])
        self.empty = tokenize(tokenizer, [""])

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, rng: np.random.Generator, batch: int, drop: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(pixels float32 [batch, 3, S, S] in -1..1, tokens [batch, T]) of random scenes, some prompts dropped."""
        single = rng.random(batch) < self.single_share
        of_one, of_two = rng.integers(0, self.singles, batch), rng.integers(self.singles, len(self), batch)
        chosen = torch.from_numpy(np.where(single, of_one, of_two))
        dropped = torch.from_numpy(rng.random(batch) < drop)
        tokens = torch.where(dropped[:, None], self.empty, self.tokens[chosen])
        return self.images[chosen].float() / 127.5 - 1, tokens


class TrainingAttention:
    """Joint attention with the matrix written out, for training only: the same values as SD3's own processor.

    At a few hundred tokens on a CPU, the backward pass of torch's fused attention is slower than three matrix products.
    """

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [B, N, C] and encoder_hidden_states [B, T, C] attend to both; both come back."""

        def heads(states: torch.Tensor, norm: Any) -> torch.Tensor:
            split = states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        pixels, text = hidden_states, encoder_hidden_states
        q = torch.cat([heads(attn.to_q(pixels), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)], 2)
        k = torch.cat([heads(attn.to_k(pixels), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)], 2)
        v = torch.cat([heads(attn.to_v(pixels), None), heads(attn.add_v_proj(text), None)], 2)
        weights = (q * attn.scale @ k.transpose(-1, -2)).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        pixels, text = mixed.split([pixels.shape[1], text.shape[1]], 1)
        for part in attn.to_out:
            pixels = part(pixels)
        return pixels, text if attn.context_pre_only else attn.to_add_out(text)


class Network(nn.Module):
    """Transformer and text encoder as one module: pixels, times and tokens in, velocity out."""

    def __init__(self, recipe: dict[str, Any], patch_size: int, tokenizer: Any) -> None:
        from diffusers import SD3Transformer2DModel
        from transformers import CLIPTextConfig, CLIPTextModel

        super().__init__()
        wanted, text = dict(recipe["transformer"]), dict(recipe["text"])
        width = wanted["num_attention_heads"] * wanted["attention_head_dim"]
        largest = wanted["pos_embed_max_size"] * wanted["patch_size"]  # pixels that have a position
        wanted |= {"patch_size": patch_size, "pos_embed_max_size": largest // patch_size, "sample_size": largest}
        self.transformer: Any
        self.text_encoder: Any
        self.transformer = SD3Transformer2DModel(
            **wanted,
            in_channels=3,
            out_channels=3,
            joint_attention_dim=text["hidden_size"],
            pooled_projection_dim=text["hidden_size"],
            caption_projection_dim=width,
        )
        self.transformer.set_attn_processor(TrainingAttention())
        max_length = text.pop("max_length")
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                **text,
                vocab_size=len(tokenizer),
                max_position_embeddings=max_length,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        # As in DiT (Peebles and Xie, 2023, section 3.2): every modulation and the output start at zero.
        for name, module in self.transformer.named_modules():
            if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear")) or name == "proj_out":
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        # CLIP's own start (0.02) leaves the words alike for hundreds of steps.
        nn.init.normal_(self.text_encoder.get_input_embeddings().weight, std=0.5)

    def forward(self, pixels: torch.Tensor, times: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Velocity [B, 3, S, S] at `pixels`, `times` [B] in 0..1 (1 is noise) and `tokens` [B, T]."""
        text = self.text_encoder(tokens)
        return self.transformer(
            hidden_states=pixels,
            timestep=1000 * times,
            encoder_hidden_states=text.last_hidden_state,
            pooled_projections=text.pooler_output,
            return_dict=False,
        )[0]


def refine(coarse: dict[str, torch.Tensor], fine: Network) -> dict[str, torch.Tensor]:
    """The state of `fine` that goes on from `coarse`, the state of a network on patches twice as large.

    Blocks, text encoder and time embedding are taken over. A fine patch is embedded as a coarse one of four copies of
    it would be (the embedding's kernel summed over the copies), and put out as the mean of the coarse one's four. The
    table of positions stays the fine network's own: it gives the four patches the places around the coarse one's.
    """
    state = fine.state_dict()
    taken = {name: value for name, value in coarse.items() if value.shape == state[name].shape}
    kernel = coarse["transformer.pos_embed.proj.weight"]  # [width, 3, 4, 4]
    taken["transformer.pos_embed.proj.weight"] = kernel.unflatten(3, (2, -1)).unflatten(2, (2, -1)).sum((2, 4))
    patch, channels = fine.transformer.config.patch_size, fine.transformer.config.out_channels
    for name in ("transformer.proj_out.weight", "transformer.proj_out.bias"):  # rows are (row, column, channel)
        grid = coarse[name].unflatten(0, (2, patch, 2, patch, channels))
        taken[name] = grid.mean((0, 2)).flatten(0, 2)
    return state | taken


def copy_positions(coarse: Network, fine: Network) -> None:
    """Give each coarse patch the mean of the positions of the fine patches that it covers."""
    table = fine.transformer.pos_embed.pos_embed
    side = math.isqrt(table.shape[1])
    ratio = coarse.transformer.config.patch_size // fine.transformer.config.patch_size
    grid = table.unflatten(1, (side // ratio, ratio, side // ratio, ratio)).mean((2, 4))
    coarse.transformer.pos_embed.pos_embed.copy_(grid.flatten(1, 2))


def flow_loss(
    network: Network, pixels: torch.Tensor, tokens: torch.Tensor, rng: np.random.Generator, noise: dict[str, float]
) -> torch.Tensor:
    """Mean squared error of the velocity `noise - pixels` at logit-normal times; all randomness from `rng`."""
    drawn = rng.standard_normal(len(pixels), dtype=np.float32)
    times = torch.sigmoid(torch.from_numpy(noise["mean"] + noise["std"] * drawn).float()).to(pixels.device)
    epsilon = torch.from_numpy(rng.standard_normal(tuple(pixels.shape), dtype=np.float32)).to(pixels.device)
    t = times[:, None, None, None]
    # bfloat16 multiplies at twice the speed on CPUs that have it; weights, gradients and the loss stay float32.
    with torch.autocast(pixels.device.type, torch.bfloat16):
        velocity = network((1 - t) * pixels + t * epsilon, times, tokens)
    return (velocity.float() - (epsilon - pixels)).square().mean()


class Run:
    """One stage under way: network, averaged weights, optimizer, and how far it is."""

    def __init__(self, network: Network, recipe: dict[str, Any], stage: str) -> None:
        self.network, self.recipe, self.stage = network, recipe, recipe[stage]
        self.average = {name: value.detach().clone() for name, value in network.named_parameters()}
        settings = recipe["optimizer"]
        self.adam = torch.optim.AdamW(
            network.parameters(),
            lr=self.stage["learning_rate"],
            betas=tuple(settings["betas"]),
            weight_decay=settings["weight_decay"],
        )
        self.step, self.best = 0, math.inf
        self.best_state: dict[str, torch.Tensor] = {}
        self.history: list[dict[str, float]] = []

    def begin(self, state: dict[str, torch.Tensor]) -> None:
        """Start from `state`, network and average alike."""
        self.network.load_state_dict(state)
        self.average = {name: value.detach().clone() for name, value in self.network.named_parameters()}

    def advance(self, scenes: Scenes, rng: np.random.Generator, device: str) -> float:
        """One step on scenes and noise drawn from `rng`; the loss. Raises FloatingPointError if it isn't finite."""
        settings, stage, done = self.recipe["optimizer"], self.stage, self.step / self.stage["steps"]
        low = stage["final_fraction"]
        cosine = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
        for group in self.adam.param_groups:
            group["lr"] = stage["learning_rate"] * min(1.0, (self.step + 1) / settings["warmup"]) * cosine
        pixels, tokens = scenes.draw(rng, stage["batch"], self.recipe["data"]["drop_prompt"])
        loss = flow_loss(self.network, pixels.to(device), tokens.to(device), rng, self.recipe["noise"])
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(f"the loss is {value} at step {self.step}")
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), settings["clip"])
        self.adam.step()
        self.step += 1
        with torch.no_grad():
            keep = min(settings["ema"], self.step / (self.step + 10))
            parameters = dict(self.network.named_parameters())
            torch._foreach_lerp_(list(self.average.values()), [parameters[n] for n in self.average], 1 - keep)
        return value

    def averaged(self) -> dict[str, torch.Tensor]:
        """A copy of the network's state with the averaged parameters."""
        state = self.network.state_dict() | self.average
        return {name: value.detach().clone() for name, value in state.items()}

    def validate(self, scenes: Scenes, noise: dict[str, float], seed: int) -> float:
        """Loss of the averaged weights on all `scenes`, the same noise every time; the best state is kept."""
        trained = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.averaged())
        device = next(self.network.parameters()).device
        rng = training.generator("validation", seed, _NOISE)
        total = 0.0
        with torch.no_grad():
            for images, tokens in zip(scenes.images.split(64), scenes.tokens.split(64)):
                pixels = images.to(device).float() / 127.5 - 1
                total += flow_loss(self.network, pixels, tokens.to(device), rng, noise).item() * len(images)
        self.network.load_state_dict(trained)
        loss = total / len(scenes)
        if loss < self.best:
            self.best, self.best_state = loss, self.averaged()
        return loss

    def state(self) -> dict[str, Any]:
        """All that a restart needs; plain tensors and numbers, so that torch.load(weights_only=True) reads it."""
        return {
            "network": self.network.state_dict(),
            "average": self.average,
            "adam": self.adam.state_dict(),
            "step": self.step,
            "best": self.best,
            "best_state": self.best_state,
            "history": self.history,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`."""
        self.network.load_state_dict(state["network"])
        self.average = dict(state["average"])
        self.adam.load_state_dict(state["adam"])
        self.step, self.best, self.best_state = state["step"], state["best"], state["best_state"]
        self.history = list(state["history"])


def train(out: Path, seed: int, device: str, steps: int | None, progress: bool) -> tuple[Any, dict[str, Any]]:
    """Train by configs/recipes/generator.toml: (pipeline on `device`, what training.json says).

    `out`/checkpoint.pt is written at every validation; where there is one of the same recipe and seed, training goes on
    from it, to the same result on the same machine.
    """
    recipe = training.capped(training.read_recipe("generator"), steps)
    if steps is not None:
        recipe["data"]["placed"] = min(recipe["data"]["placed"], 2 * steps * recipe["fine"]["batch"])
    checkpoint = out / CHECKPOINT
    tokenizer = build_tokenizer(recipe["text"]["max_length"])
    with training.seeded(seed, device):
        networks = {stage: Network(recipe, recipe[stage]["patch_size"], tokenizer).to(device) for stage in STAGES}
    with torch.no_grad():
        copy_positions(networks["coarse"], networks["fine"])
    data = recipe["data"]
    scenes = Scenes(data["placed"], data, tokenizer, training.generator("train", seed, _DRAWN))
    held_out = Scenes(recipe["validation"]["scenes"], data, tokenizer, training.generator("validation", seed, _DRAWN))

    settings = {name: part for name, part in recipe.items() if name not in ("card", "bars")}
    label = {"recipe": repr(settings), "seed": seed}
    saved = torch.load(checkpoint, map_location=device, weights_only=True) if checkpoint.exists() else {}
    if saved and saved["label"] != label:
        raise ValueError(
            f"out has a checkpoint of another recipe or seed: remove {checkpoint} or choose another folder"
        )
    report = saved.get("report", {"cpu_seconds": 0.0, "wall_seconds": 0.0, "history": {stage: [] for stage in STAGES}})
    taken: dict[str, torch.Tensor] | None = None
    for number, name in enumerate(STAGES):
        if saved and number < STAGES.index(saved["stage"]):
            continue
        run = Run(networks[name], recipe, name)
        if saved and saved["stage"] == name:
            run.restore(saved["run"])
        elif taken is not None:
            run.begin(refine(taken, run.network))
        report = run_stage(run, name, scenes, held_out, seed, report, progress, checkpoint, label)
        taken = run.averaged()
    network = networks["fine"]
    network.load_state_dict(run.best_state)
    best = min(report["history"]["fine"], key=lambda entry: entry["validation"])
    return assemble(network.eval(), recipe, tokenizer), {
        **training.Clock().report(seed, steps, device),
        **report,
        "cpu_seconds_by_stage": _by_stage(report),
        "kept_step": best["step"],
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def _by_stage(report: dict[str, Any]) -> dict[str, float]:
    ends = [report["history"][name][-1]["cpu_seconds"] for name in STAGES]
    return {name: round(end - start, 1) for name, start, end in zip(STAGES, [0.0, *ends], ends)}


def run_stage(
    run: Run,
    name: str,
    scenes: Scenes,
    held_out: Scenes,
    seed: int,
    report: dict[str, Any],
    progress: bool,
    checkpoint: Path,
    label: dict[str, Any],
) -> dict[str, Any]:
    """Train `run` to its last step, with a checkpoint every `validation.every` steps; `report` brought up to date."""
    recipe, every = run.recipe, run.recipe["validation"]["every"]
    device = str(next(run.network.parameters()).device)
    losses: list[float] = []
    clock = training.Clock()
    with tqdm(total=run.stage["steps"], initial=run.step, desc=name, disable=not progress, mininterval=5.0) as bar:
        while run.step < run.stage["steps"]:
            rng = training.generator("train", seed, _STEPS + len(STAGES) * run.step + STAGES.index(name))
            losses.append(run.advance(scenes, rng, device))
            bar.update()
            if run.step % every and run.step < run.stage["steps"]:
                continue
            entry = {
                "step": run.step,
                "train": round(float(np.mean(losses)), 5),
                "validation": round(run.validate(held_out, recipe["noise"], seed), 5),
            }
            spent, clock, losses = clock.report(seed, None, device), training.Clock(), []
            report = {
                "cpu_seconds": round(report["cpu_seconds"] + spent["cpu_seconds"], 1),
                "wall_seconds": round(report["wall_seconds"] + spent["wall_seconds"], 1),
                "history": report["history"] | {name: [*report["history"][name], entry]},
            }
            report["history"][name][-1]["cpu_seconds"] = report["cpu_seconds"]
            bar.set_postfix(report["history"][name][-1])
            save_checkpoint(checkpoint, {"stage": name, "label": label, "report": report, "run": run.state()})
    return report


def assemble(network: Network, recipe: dict[str, Any], tokenizer: Any) -> Any:
    """The pipeline of a trained network, with diffusers' own attention."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    network.transformer.set_attn_processor(JointAttnProcessor2_0())

    return pipeline_class()(
        transformer=network.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=recipe["scheduler"]["shift"]),
        text_encoder=network.text_encoder,
        tokenizer=tokenizer,
    )


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that an interruption leaves the old file or the new one, whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
