"""GNA: what it computes, its density, its goldens, and what `plan` foretells."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers
import goldens
from generator_models import FAMILIES, Case, as_double, build, flux_pipeline, run
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnzoo import generators
from attnzoo.errors import ReachError, UnsupportedError
from attnzoo.generators.chain import Layer, Link
from attnzoo.generators.interception import ATTENTION_HOOK, Frame, Intercept


class Explicit(TorchFunctionMode):
    """Every self-attention of the grid as dense attention under an explicit [N, N] mask."""

    def __init__(self, case: Case, **window: Any) -> None:
        super().__init__()
        self.case, self.window, self.calls = case, window, 0

    def mask_of(self, num_tokens: int) -> Tensor | None:
        grid, num_text = self.case.grid, self.case.num_text
        if isinstance(self.case.model, diffusers.UNet2DConditionModel):
            while math.prod(grid) > num_tokens:
                grid = tuple(math.ceil(n / 2) for n in grid)
        lengths = {math.prod(grid), math.prod(grid) + num_text}
        if isinstance(self.case.model, diffusers.MochiTransformer3DModel):  # a call per sample, its real text only
            lengths = {math.prod(grid) + int(n) for n in self.case.inputs["encoder_attention_mask"].sum(1)}
        if isinstance(self.case.model, diffusers.ZImageTransformer2DModel):  # the image filled up to 32 tokens
            lengths = {32, 32 + num_text}
        if num_tokens not in lengths:
            return None
        joint = num_tokens - math.prod(grid)
        image_first = isinstance(
            self.case.model,
            (
                diffusers.SD3Transformer2DModel,
                diffusers.HunyuanVideoTransformer3DModel,
                diffusers.HunyuanVideo15Transformer3DModel,
                diffusers.MochiTransformer3DModel,
                diffusers.ZImageTransformer2DModel,
            ),
        )
        start = 0 if image_first or not joint else num_text
        mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
        own = slice(start, start + math.prod(grid))
        mask[own, own] = generators.window_mask(grid, **self.window)
        return mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query = kwargs["query"] if "query" in kwargs else args[0]
            key = kwargs["key"] if "key" in kwargs else args[1]
            mask = self.mask_of(query.shape[-2]) if query.shape[-2] == key.shape[-2] else None
            if mask is not None:
                self.calls += 1
                given = kwargs.get("attn_mask")
                kwargs["attn_mask"] = mask if given is None else mask & given
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", FAMILIES)
def test_gna_is_dense_attention_under_an_explicit_mask(name: str) -> None:
    single = name in ("mochi", "cosmos", "z_image", "hunyuan_video15")  # parts of them are float32 whatever is asked
    case = build(name) if single else as_double(build(name))
    kernel_size = case.kernel_size
    window = {"kernel_size": kernel_size, "stride": tuple(max(1, k - 1) for k in kernel_size)}
    with Explicit(case, **window) as explicit:
        wanted = run(case)
    with generators.enable(case.model, "gna", **window) as handle:
        got = run(case)
        samples = len(wanted) if name == "mochi" else 1
        assert explicit.calls == samples * len(handle.report()["denoisers"][0]["layers"])
    close = {"rtol": 1e-4, "atol": 1e-5 * float(wanted.abs().max())} if single else {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(got, wanted, **close)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"is_causal": True}, {"is_causal": (False, True), "stride": 2}])
def test_gna_dilated_and_causal(options: dict[str, Any]) -> None:
    case = as_double(build("flux"))
    with Explicit(case, kernel_size=(2, 2), **options):
        wanted = run(case)
    with generators.enable(case.model, "gna", kernel_size=(2, 2), **options):
        torch.testing.assert_close(run(case), wanted, rtol=1e-7, atol=1e-9)


def test_causal_full_window_is_not_neutral() -> None:
    case = build("dit")
    with generators.enable(case.model, "gna", kernel_size=8, is_causal=True):
        on = run(case)
    assert (on - run(case)).abs().max() > 1e-3


def attend(
    layout: generators.TokenLayout, mask: Tensor | None = None, batch: int = 2, **options: Any
) -> tuple[Tensor, Tensor]:
    """GNA on random tensors, and the same by dense attention under `dense_mask`."""
    query, key, value = torch.randn(3, batch, 4, layout.length, 8, dtype=torch.float64)
    method = generators.METHODS["gna"](len(layout.grid), **options)
    stock = F.scaled_dot_product_attention
    layer = Layer("layer", 0)
    got = method.attend(query, key, value, mask, layout, generators.StepContext(), layer, stock)
    seen = torch.ones(layout.length, layout.length, dtype=torch.bool)
    own = slice(layout.grid_start, layout.grid_start + layout.num_grid)
    seen[own, own] = generators.window_mask(layout.grid, **{k: v for k, v in options.items() if k != "backend"})
    if mask is None:
        return got, stock(query, key, value, seen)
    whole = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)
    return got, stock(query, key, value, whole)


@pytest.mark.parametrize("text", ["first", "last"])
def test_references_and_text_are_seen_by_all_and_stay_dense(text: str) -> None:
    layout = generators.TokenLayout((4, 5), num_text=3, text=text, references=(6, 2))
    got, wanted = attend(layout, kernel_size=(3, 3))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("text", ["first", "last"])
@pytest.mark.parametrize("rows", [[[1, 0, 1], [1, 1, 1]], [[1, 0, 1], [0, 1, 1]], [[0, 0, 0], [1, 1, 0]]])
def test_padded_text_is_seen_by_nobody(text: str, rows: list[list[int]]) -> None:
    padding = torch.tensor(rows).bool()
    layout = generators.TokenLayout((4, 5), num_text=3, text=text, references=(2,)).with_padding(padding)
    image = torch.ones(2, 22, dtype=torch.bool)
    order = [padding, image] if text == "first" else [image, padding]
    got, wanted = attend(layout, torch.cat(order, dim=1)[:, None, None], kernel_size=(3, 3))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("shape", [(2, 1, 1, 23), (2, 4, 23, 23), (23, 23), (1, 1, 23, 23)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_any_other_mask_is_anded_with_the_window(shape: tuple[int, ...], kind: str) -> None:
    layout = generators.TokenLayout((4, 5), num_text=3, text="first")
    mask = torch.rand(shape) > 0.3 if kind == "bool" else torch.randn(shape, dtype=torch.float64)
    got, wanted = attend(layout, mask, kernel_size=(3, 4), stride=(1, 2))
    torch.testing.assert_close(got, wanted)


def test_a_general_mask_over_too_many_tokens_is_refused() -> None:
    layout = generators.TokenLayout((1, 20000))
    query = torch.zeros(1, 1, 20000, 8)
    method = generators.METHODS["gna"](2, kernel_size=(1, 3))
    with pytest.raises(UnsupportedError, match="all pairs of 20000 tokens"):
        method.attend(
            query,
            query,
            query,
            torch.zeros(1, 1, 1, 20000),
            layout,
            generators.StepContext(),
            Layer("x", 0),
            F.scaled_dot_product_attention,
        )


def test_heads_left_out_stay_dense() -> None:
    case = build("sd3")
    dense = run(case)
    with generators.enable(case.model, "gna", kernel_size=3):
        all_heads = run(case)
    with generators.enable(case.model, "gna", kernel_size=3, heads=range(4)):
        torch.testing.assert_close(run(case), all_heads)
    with generators.enable(case.model, "gna", kernel_size=3, heads=[2, 0]):
        some = run(case)
    assert (some - dense).abs().max() > 1e-3 and (some - all_heads).abs().max() > 1e-3
    query = torch.randn(1, 4, 12, 8)
    layout, ctx, layer = generators.TokenLayout((3, 4)), generators.StepContext(), Layer("x", 0)
    method = generators.METHODS["gna"](2, kernel_size=(1, 2))
    stock = F.scaled_dot_product_attention
    full = method.attend(query, query, query, None, layout, ctx, layer, stock)
    part = Link(method, 0, (1, 3)).attend(query, query, query, None, layout, ctx, layer, stock)
    torch.testing.assert_close(part[:, [1, 3]], full[:, [1, 3]])
    torch.testing.assert_close(part[:, [0, 2]], stock(query, query, query)[:, [0, 2]])


def test_references_of_flux_kontext() -> None:
    case = as_double(build("flux"))
    reference = torch.ones(6, 3)
    reference[:, 1:] = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    changes = {
        "img_ids": torch.cat([case.inputs["img_ids"], reference]),
        "hidden_states": torch.cat([case.inputs["hidden_states"], torch.randn(2, 6, 4, dtype=torch.float64)], dim=1),
    }
    dense = run(case, **changes)
    with generators.enable(case.model, "gna", kernel_size=100):
        assert torch.equal(run(case, **changes), dense)
    with generators.enable(case.model, "gna", kernel_size=3) as handle:
        on = run(case, **changes)
        assert handle.report()["denoisers"][0]["grid"] == (6, 5)
    assert (on - dense).abs().max() > 1e-3


def test_reference_images_of_qwen_edit() -> None:
    case = build("qwen_image")
    changes = {
        "img_shapes": [[(1, 4, 6), (1, 2, 3)]] * 2,
        "hidden_states": torch.cat([case.inputs["hidden_states"], torch.randn(2, 6, 16)], dim=1),
    }
    dense = run(case, **changes)
    with generators.enable(case.model, "gna", kernel_size=(1, 3, 3)):
        assert (run(case, **changes) - dense).abs().max() > 1e-3
    with generators.enable(case.model, "gna", kernel_size=100):
        assert torch.equal(run(case, **changes), dense)


def test_training_through_gna() -> None:
    case = build("dit")
    case.model.requires_grad_(True)
    with generators.enable(case.model, "gna", kernel_size=3):
        case.model(**case.inputs, return_dict=False)[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in case.model.transformer_blocks.parameters())
    assert case.model.transformer_blocks[0].attn1.to_q.weight.grad.abs().max() > 0


def test_permuted_sequence_is_put_in_order_and_back() -> None:
    """A context-parallel rank order: the chain sees canonical tokens, the model gets its own order back."""
    case = build("dit")
    order = torch.randperm(64)
    inputs = torch.randn(1, 2, 64, 8)
    module = case.model.transformer_blocks[0].attn1
    with generators.enable(case.model, "gna", kernel_size=3):
        hook = module._diffusers_hook.get_hook(ATTENTION_HOOK)
        stock = F.scaled_dot_product_attention

        def through(tensor: Tensor, layout: generators.TokenLayout) -> Tensor:
            mode = Intercept(hook, hook.links, Frame(layout, generators.StepContext(), (True,)))
            with mode:
                return F.scaled_dot_product_attention(tensor, tensor, tensor)

        plain = through(inputs, generators.TokenLayout((8, 8)))
        moved = through(inputs[:, :, order], generators.TokenLayout((8, 8), permutation=order))
    torch.testing.assert_close(moved, plain[:, :, order])
    assert (plain - stock(inputs, inputs, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((7,), {"kernel_size": 3}),
        ((6, 8), {"kernel_size": (3, 4), "stride": (2, 3)}),
        ((6, 9), {"kernel_size": (3, 2), "dilation": (2, 3), "is_causal": (False, True)}),
        ((3, 4, 5), {"kernel_size": (1, 4, 2)}),
    ],
)
def test_density_is_the_share_of_the_mask(grid: tuple[int, ...], options: dict[str, Any]) -> None:
    wanted = generators.window_mask(grid, **options).double().mean().item()
    assert generators.density(grid, **options) == pytest.approx(wanted, rel=1e-12)


def test_density_of_known_windows() -> None:
    assert generators.density((256, 256), 80) == pytest.approx((80 / 256) ** 2)
    assert generators.density((4,), 4, is_causal=True) == 10 / 16
    for bad, words in (
        ({"kernel_size": 9}, "kernel_size * dilation"),
        ({"kernel_size": 3, "stride": 4}, "stride"),
        ({"kernel_size": (3, 3)}, "kernel_size"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            generators.density((8,), **bad)
    with pytest.raises(ValueError, match="16384"):
        generators.window_mask((256, 256), 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_plan_foretells_what_a_forward_reports(name: str) -> None:
    case = build(name)
    told = generators.plan(case.model, "gna", grid=case.grid, num_text=case.num_text, kernel_size=case.kernel_size)
    with generators.enable(case.model, "gna", kernel_size=case.kernel_size) as handle:
        run(case)
        row = handle.report()["denoisers"][0]
    assert told["grid"] == row["grid"]
    if name not in ("sd3", "unet", "z_image"):  # their layers differ; the report tells the finest, joint one
        assert told["density"] == pytest.approx(row["density"])
    assert told["flops_ratio"] == pytest.approx(told["attention_flops_dense"] / told["attention_flops"])
    assert told["window_density"] == pytest.approx(generators.density(case.grid, case.kernel_size))
    sizes = {"flux": (1, 12, 10), "sd3": (1, 12, 16), "wan": (3, 8, 12), "hunyuan_video": (3, 8, 8)}
    sizes |= {"cogvideox": (3, 8, 8), "ltx": (2, 4, 5), "qwen_image": (1, 8, 12), "pixart": (1, 16, 12)}
    sizes |= {"dit": (1, 16, 16), "unet": (1, 14, 10), "flux2": (1, 12, 10), "hunyuan_video15": (3, 4, 4)}
    sizes |= {"mochi": (3, 8, 8), "cosmos": (3, 8, 12), "z_image": (1, 12, 10)}
    frames, height, width = sizes[name]
    by_size = generators.plan(
        case.model, "gna", num_frames=frames, height=height, width=width, num_text=case.num_text,
        kernel_size=case.kernel_size,
    )  # fmt: skip
    assert by_size == told


def test_plan_of_a_pipeline_counts_pixels_and_layers() -> None:
    pipe = flux_pipeline()
    told = generators.plan(pipe, "gna", height=4096, width=4096, kernel_size=80, stride=16, num_text=512)
    assert told["grid"] == (256, 256)
    assert told["window_density"] == pytest.approx((80 / 256) ** 2, rel=1e-2)
    assert told["flops_ratio"] == pytest.approx(1 / told["density"])
    half = generators.plan(pipe, "gna", height=4096, width=4096, kernel_size=80, layers=[0])
    assert 1 < half["flops_ratio"] < 1.5 and half["density"] < 0.1
    dense = generators.plan(pipe, "gna", height=96, width=80, kernel_size=80)
    assert dense["flops_ratio"] == 1.0
    for options, words in (
        ({"height": 96}, "height and width"),
        ({"height": 1, "width": 1}, "no tokens"),
        ({"height": -1, "width": 8}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            generators.plan(pipe, "gna", kernel_size=3, **options)
    with pytest.raises(ValueError, match="num_text"):
        generators.plan(build("dit").model, "gna", grid=(8, 8), num_text=7, kernel_size=3)


class Painter:
    """A pipeline in diffusers' calling convention around the tiny Flux, from a prompt to a picture."""

    def __init__(self) -> None:
        self.inner = flux_pipeline()
        self.components = {"transformer": self.inner.transformer}
        self.scheduler = self.inner.scheduler

    def __call__(
        self, prompt: str, num_inference_steps: int = 2, height: int = 96, width: int = 80, generator: Any = None
    ) -> Any:
        torch.manual_seed(len(prompt))
        return self.inner(
            prompt_embeds=torch.randn(1, 7, 32),
            pooled_prompt_embeds=torch.randn(1, 32),
            num_inference_steps=num_inference_steps,
            height=height,
            width=width,
            output_type="latent",
            generator=generator,
        )


def test_generate_switches_the_method_on_for_one_picture() -> None:
    pipe = Painter()
    pipe.inner.set_progress_bar_config(disable=True)
    dense = generators.generate("a", pipeline=pipe)
    on = generators.generate("a", pipeline=pipe, method="gna", kernel_size=3, steps=[0])
    assert (on - dense).abs().max() > 1e-4
    assert torch.equal(generators.generate("a", pipeline=pipe, method="gna", kernel_size=30), dense)
    assert torch.equal(generators.generate("a", pipeline=pipe), dense)
    assert not torch.equal(generators.generate("a", pipeline=pipe, seed=1), dense)
    assert generators.generate("a", pipeline=pipe, num_inference_steps=1, height=64, width=64).shape[0] == 16
    with pytest.raises(TypeError, match="kernel_size need a method"):
        generators.generate("a", pipeline=pipe, kernel_size=3)
    with pytest.raises(ValueError, match="seed"):
        generators.generate("a", pipeline=pipe, seed=-1)
    with pytest.raises(UnsupportedError, match="takes no prompt"):
        generators.generate("a", pipeline=build("dit").model)


def test_generate_says_what_can_not_be_reached(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (str(tmp_path / "nowhere"), "./nowhere", "nowhere", "a/b/c"):
        with pytest.raises(ReachError, match="there is no folder"):
            generators.generate("a", pipeline=name)
    with pytest.raises(ReachError, match="model_index.json"):
        generators.generate("a", pipeline=tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": ["diffusers", "X"]}')
    with pytest.raises((ReachError, ValueError, AttributeError)):
        generators.generate("a", pipeline=tmp_path)

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", unreachable)
    with pytest.raises(ReachError, match="'some/model': no route to the hub"):
        generators.generate("a", pipeline="some/model")


def test_a_saved_pipeline_is_loaded_from_its_folder(tmp_path: Any) -> None:
    case = build("dit")
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipe = diffusers.DiTPipeline(case.model, vae, diffusers.DPMSolverMultistepScheduler())
    pipe.save_pretrained(tmp_path)
    loaded = generators.load_pipeline(tmp_path, device="cpu")
    assert isinstance(loaded, diffusers.DiTPipeline)
    assert torch.equal(run(case._replace(model=loaded.transformer)), run(case))
    with pytest.raises(UnsupportedError, match="DiTPipeline takes no prompt"):
        generators.generate("a", pipeline=str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_goldens(goldens_root: Path, dtype: torch.dtype) -> None:
    """The authors' numbers, by the adapter and by the method itself with the extra keys as text."""
    paths = sorted((goldens_root / "generators" / "gna").glob("*.json"))
    assert paths
    for path in paths:
        meta = {**json.loads(path.read_text()), "system": "gna", "variant": "case"}
        tensors = load_file(path.with_suffix(".safetensors"))
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        found = goldens.run(meta, {k: v for k, v in tensors.items() if k.startswith("in.")})
        wanted = {k: v for k, v in tensors.items() if k.startswith("out.")}
        assert set(found) >= set(wanted)
        for name, value in wanted.items():
            if value.dtype == torch.bool:
                assert torch.equal(found[name], value)
            else:
                torch.testing.assert_close(found[name].to(dtype), value, rtol=1e-4, atol=1e-5)
        if "in.additional_keys" not in tensors:
            continue
        config = meta["config"]
        grid, extra = tuple(config["token_layout"]), tensors["in.additional_keys"].shape[1]
        joint = [
            torch.cat([tensors[f"in.additional_{n}s"], tensors[f"in.{n}"].flatten(1, -3)], 1) for n in ("key", "value")
        ]
        query = torch.cat([torch.zeros_like(tensors["in.additional_keys"]), tensors["in.query"].flatten(1, -3)], 1)
        options = {n: tuple(config[n]) for n in ("kernel_size", "stride", "dilation", "is_causal")}
        layout = generators.TokenLayout(grid, num_text=extra, text="first")
        got = generators.METHODS["gna"](len(grid), **options).attend(
            *(t.transpose(1, 2) for t in (query, *joint)), None, layout, generators.StepContext(), Layer("golden", 0),
            F.scaled_dot_product_attention,
        )  # fmt: skip
        merged = tensors["out.merged_out"].flatten(1, -3).transpose(1, 2)
        torch.testing.assert_close(got[:, :, extra:], merged, rtol=1e-4, atol=1e-5)
