"""The generator room's floor: on and off, owners, other hooks, threads, misses; and what it relies on upstream."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import diffusers
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, AttnProcessor
from generator_models import FAMILIES, build, flux, is_clean, run
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attnzoo import generators
from attnzoo.errors import SeamError, UnsupportedError


@pytest.mark.parametrize("name", FAMILIES)
def test_neutral_window_is_dense_and_off_is_exact(name: str) -> None:
    case = build(name)
    dense = run(case)
    before = {n: set(vars(m)) for n, m in case.model.named_modules()}
    with generators.enable(case.model, "gna", kernel_size=1000) as handle:
        assert torch.equal(run(case), dense)
        assert handle.report()["denoisers"][0]["density"] == 1.0
    with generators.enable(case.model, "gna", kernel_size=case.kernel_size) as handle:
        on = run(case)
        row = handle.report()["denoisers"][0]
        assert row["grid"] == case.grid and row["num_text"] == case.num_text and row["layers"]
        assert 0 < row["density"] < 1
        assert torch.equal(run(case), on)
    assert (on - dense).abs().max() > 1e-3
    assert on.isfinite().all()
    assert torch.equal(run(case), dense)
    assert {n: set(vars(m)) for n, m in case.model.named_modules()} == before


@pytest.mark.parametrize("name", ["flux", "unet"])
def test_exception_in_a_forward_leaves_the_model_clean(name: str) -> None:
    case = build(name)
    dense = run(case)
    broken = {"timestep": "no tensor"}
    with generators.enable(case.model, "gna", kernel_size=3):
        on = run(case)
        with pytest.raises((TypeError, AttributeError, ValueError)):
            run(case, **broken)
        assert torch.equal(run(case), on)
    assert torch.equal(run(case), dense)
    with pytest.raises(KeyError), generators.enable(case.model, "gna", kernel_size=3):
        raise KeyError
    assert is_clean(case.model) and torch.equal(run(case), dense)
    assert not torch.overrides._get_current_function_mode_stack()


def test_second_owner_is_refused_and_changes_nothing() -> None:
    case = build("flux")
    first = generators.enable(case.model, "gna", kernel_size=3)
    on = run(case)
    with pytest.raises(ValueError, match="already on"):
        generators.enable(case.model, "gna", kernel_size=5)
    with pytest.raises(ValueError, match="must differ"):
        generators.enable(build("dit").model, [("gna", {"kernel_size": 3}), ("gna", {"kernel_size": 5})])
    assert torch.equal(run(case), on)
    first.disable()
    first.disable()
    assert is_clean(case.model) and not first.enabled
    with pytest.raises(ValueError, match="disabled"):
        first.new_run(3)
    with generators.enable(case.model, [("gna", {"kernel_size": 3})]):
        assert torch.equal(run(case), on)


def test_another_hook_of_diffusers_stays() -> None:
    """Hooks registered before, between and after ours survive ours."""
    case = build("dit")
    attention = case.model.transformer_blocks[0].attn1
    seen: list[str] = []

    class Note(ModelHook):
        def __init__(self, label: str) -> None:
            super().__init__()
            self.label = label

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(self.label)
            return args, kwargs

    registry = HookRegistry.check_if_exists_or_initialize(attention)
    registry.register_hook(Note("before"), "before")
    handle = generators.enable(case.model, "gna", kernel_size=3)
    on = run(case)
    registry.register_hook(Note("after"), "after")
    seen.clear()
    assert torch.equal(run(case), on) and seen == ["after", "before"]
    handle.disable()
    seen.clear()
    off = run(case)
    assert seen == ["after", "before"] and (on - off).abs().max() > 1e-3
    registry.remove_hook("before")
    registry.remove_hook("after")
    assert torch.equal(run(case), off)


@pytest.mark.parametrize("first", ["accelerate", "attnzoo"])
def test_accelerate_hooks_in_either_order(first: str) -> None:
    """enable_model_cpu_offload takes its hooks off and on at the end of every run: ours must stay below them."""
    hooks = pytest.importorskip("accelerate.hooks")
    case = build("dit")
    dense = run(case)
    modules = [case.model, case.model.transformer_blocks[0].attn1]

    def put() -> None:
        for module in modules:
            hooks.add_hook_to_module(module, hooks.ModelHook())

    if first == "accelerate":
        put()
    handle = generators.enable(case.model, "gna", kernel_size=3)
    if first == "attnzoo":
        put()
    on = run(case)
    assert (on - dense).abs().max() > 1e-3
    for module in modules:
        hooks.remove_hook_from_module(module)
    assert torch.equal(run(case), on)
    put()
    assert torch.equal(run(case), on)
    handle.disable()
    assert torch.equal(run(case), dense) and all(hasattr(m, "_hf_hook") for m in modules)
    for module in modules:
        hooks.remove_hook_from_module(module)
    assert torch.equal(run(case), dense)
    assert not any("_diffusers_hook" in vars(m) for m in case.model.modules())


def test_group_offload_stays(tmp_path: Any) -> None:
    case = build("dit")
    dense = run(case)
    with generators.enable(case.model, "gna", kernel_size=3):
        on = run(case)
    cpu = torch.device("cpu")
    diffusers.hooks.apply_group_offloading(
        case.model, onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
    assert torch.equal(run(case), dense)
    with generators.enable(case.model, "gna", kernel_size=3):
        assert torch.equal(run(case), on)
    assert torch.equal(run(case), dense)


def test_two_threads_with_two_models_do_not_meet() -> None:
    cases = [build("flux"), build("dit"), build("flux")]
    windows: list[Any] = [3, (1, 5), 1000]
    wanted = []
    for case, window in zip(cases, windows):
        with generators.enable(case.model, "gna", kernel_size=window):
            wanted.append(run(case))
    dense = [run(case) for case in cases]
    start = threading.Barrier(len(cases) + 1)
    problems: list[str] = []

    def work(index: int, window: Any) -> None:
        start.wait()
        for _ in range(4):
            if window is None:
                if not torch.equal(run(plain), plain_dense):
                    problems.append("the plain model changed")
                continue
            with generators.enable(cases[index].model, "gna", kernel_size=window):
                if not torch.equal(run(cases[index]), wanted[index]):
                    problems.append(f"case {index} differs")

    plain = build("dit")
    plain_dense = run(plain)
    threads = [threading.Thread(target=work, args=(i, w)) for i, w in enumerate([*windows, None])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert all(torch.equal(run(case), d) for case, d in zip(cases, dense))


def test_two_threads_on_one_model_wait_for_each_other() -> None:
    case, other = build("flux"), flux(4, 7)
    with generators.enable(case.model, "gna", kernel_size=3):
        wanted = [run(case), run(case, **other.inputs)]
        problems: list[int] = []

        def work(index: int) -> None:
            for _ in range(5):
                if not torch.equal(run(case, **(other.inputs if index else {})), wanted[index]):
                    problems.append(index)

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems


def test_a_silent_miss_is_an_error_that_names_the_backend() -> None:
    case = build("flux")
    dense = run(case)
    case.model.set_attention_backend("native")
    with generators.enable(case.model, "gna", kernel_size=3):
        on = run(case)
    case.model.set_attention_backend("flex")
    try:
        with generators.enable(case.model, "gna", kernel_size=3):
            with pytest.raises(SeamError, match="'flex'.*native"):
                run(case)
            case.model.set_attention_backend("native")
            assert torch.equal(run(case), on)
    finally:
        case.model.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    assert torch.equal(run(case), dense)
    unet = build("unet")
    for module in unet.model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    with generators.enable(unet.model, "gna", kernel_size=3), pytest.raises(SeamError, match="AttnProcessor never"):
        run(unet)


def test_a_layer_outside_of_its_model_is_an_error() -> None:
    case = build("dit")
    case.model.requires_grad_(True).train().enable_gradient_checkpointing()
    with generators.enable(case.model, "gna", kernel_size=3):
        loss = case.model(**case.inputs, return_dict=False)[0].sum()
        with pytest.raises(SeamError, match="gradient checkpointing"):
            loss.backward()


def test_image_prompt_adapter_calls_are_left_alone() -> None:
    """A second attention in a module, here with as many keys as there are image tokens, is no self-attention."""
    case = build("flux")
    attention = case.model.transformer_blocks[0].attn
    plain = attention.processor
    calls: list[tuple[int, int]] = []

    class WithAdapter:
        _attention_backend = None
        _parallel_config = None

        def __call__(
            self,
            attn: nn.Module,
            hidden_states: Tensor,
            encoder_hidden_states: Any = None,
            attention_mask: Any = None,
            image_rotary_emb: Any = None,
        ) -> Any:
            hidden, text = plain(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
            query = hidden_states.unflatten(-1, (2, -1)).transpose(1, 2)
            calls.append((query.shape[-2], query.shape[-2]))
            wanted = torch.softmax(query @ query.transpose(-1, -2) * query.shape[-1] ** -0.5, -1) @ query
            got = F.scaled_dot_product_attention(query, query, query)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
            return hidden, text

    attention.processor = WithAdapter()
    with generators.enable(case.model, "gna", kernel_size=3):
        run(case)
    assert calls == [(30, 30)]


def test_fused_projections_give_the_same() -> None:
    for name in ("flux", "pixart", "unet"):
        case = build(name)
        with generators.enable(case.model, "gna", kernel_size=3):
            split = run(case)
            case.model.fuse_qkv_projections()
            torch.testing.assert_close(run(case), split, rtol=1e-4, atol=1e-4)
            case.model.unfuse_qkv_projections()
            assert torch.equal(run(case), split)


def test_pyramid_attention_broadcast_above_is_served_and_beneath_is_refused() -> None:
    case = build("flux")
    cache = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    )
    moved = {"hidden_states": case.inputs["hidden_states"] + 0.1}
    with generators.enable(case.model, "gna", kernel_size=3):
        on, on_moved = run(case), run(case, **moved)
        case.model.enable_cache(cache)
        assert torch.equal(run(case), on)
        assert (run(case, **moved) - on_moved).abs().max() > 1e-5  # reused
        case.model.disable_cache()
        assert torch.equal(run(case, **moved), on_moved)
    case.model.enable_cache(cache)
    with generators.enable(case.model, "gna", kernel_size=3):
        run(case)
        with pytest.raises(SeamError, match="pyramid_attention_broadcast.*first"):
            run(case)
    case.model.disable_cache()


def test_a_guider_that_skips_scores_on_the_same_layer_is_refused() -> None:
    case = build("dit")
    skip = diffusers.LayerSkipConfig(
        [1], fqn="transformer_blocks", skip_attention=False, skip_ff=False, skip_attention_scores=True
    )
    diffusers.hooks.apply_layer_skip(case.model, skip)
    with (
        generators.enable(case.model, "gna", kernel_size=3),
        pytest.raises(UnsupportedError, match=r"transformer_blocks\.1\.attn1.*PAG"),
    ):
        run(case)
    with generators.enable(case.model, "gna", kernel_size=3, layers="*.0.*"):
        run(case)


def test_context_parallel_is_refused() -> None:
    case = build("flux")
    case.model._parallel_config = object()
    with (
        generators.enable(case.model, "gna", kernel_size=3),
        pytest.raises(UnsupportedError, match="context parallelism"),
    ):
        run(case)


# ---------------------------------------------------------------- upstream seams: what this room relies on


class TestUpstreamSeams:
    """Facts of diffusers and torch; a release that changes one fails here, with its name."""

    def test_attention_modules_have_a_processor(self) -> None:
        for name in FAMILIES:
            model = FAMILIES[name]().model
            found = [n for n, m in model.named_modules() if any(hasattr(m, q) for q in ("to_q", "to_qkv"))]
            assert found and all(hasattr(model.get_submodule(n), "processor") for n in found if "pooler" not in n)

    def test_known_families_exist_under_their_names(self) -> None:
        assert len(generators.FAMILIES) == 15
        for name in generators.FAMILIES:
            assert issubclass(getattr(diffusers, name), nn.Module)

    def test_processors_call_the_public_function_with_heads_second(self) -> None:
        seen: list[tuple[int, ...]] = []

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is F.scaled_dot_product_attention:
                    seen.append(tuple((kwargs or {})["query"].shape if "query" in (kwargs or {}) else args[0].shape))
                return func(*args, **(kwargs or {}))

        case = build("flux")
        with Watch():
            run(case)
        assert seen == [(2, 2, 37, 16)] * 3

    def test_a_mode_is_off_inside_its_own_answer(self) -> None:
        inner: list[int] = []

        class Once(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                inner.append(1)
                return func(*args, **(kwargs or {}))

        x = torch.randn(1, 1, 4, 8)
        with Once():
            F.scaled_dot_product_attention(x, x, x)
        assert inner == [1]

    def test_sdpa_s_arguments_have_their_names(self) -> None:
        x = torch.randn(1, 2, 4, 8)
        mask = torch.ones(4, 4, dtype=torch.bool)
        F.scaled_dot_product_attention(x, x, x, mask, 0.0, False, scale=0.5, enable_gqa=False)
        F.scaled_dot_product_attention(query=x, key=x, value=x, attn_mask=mask, dropout_p=0.0, is_causal=False)

    def test_hook_registry_behaves_as_we_undo_it(self) -> None:
        class Pass(ModelHook):
            pass

        module = nn.Linear(2, 2)
        registry = HookRegistry.check_if_exists_or_initialize(module)
        assert module._diffusers_hook is registry
        registry.register_hook(Pass(), "one")
        assert "forward" in vars(module) and list(registry.hooks) == ["one"]
        registry.remove_hook("one", recurse=False)
        assert vars(module)["forward"].__func__ is nn.Linear.forward and not registry.hooks
        registry.invalidate_child_registries_cache()

    def test_cache_context_reaches_state_managers_of_stateful_hooks(self) -> None:
        class Stateful(ModelHook):
            _is_stateful = True

            def __init__(self) -> None:
                super().__init__()
                self.manager = StateManager(dict)

            def reset_state(self, module: nn.Module) -> nn.Module:
                return module

        model = build("flux").model
        hook = Stateful()
        HookRegistry.check_if_exists_or_initialize(model).register_hook(hook, "stateful")
        assert hook.manager._context is None
        with model.cache_context("cond"):
            assert hook.manager._context.name == "cond"
        assert hook.manager._context is None

    @pytest.mark.parametrize(
        "name", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"]
    )
    def test_schedulers_step_index_is_none_until_the_first_step(self, name: str) -> None:
        scheduler = getattr(diffusers, name)()
        x = torch.zeros(1, 4)
        for _ in range(2):
            scheduler.set_timesteps(3)
            timesteps = scheduler.timesteps
            assert scheduler.step_index is None and getattr(scheduler, "begin_index", None) is None
            scheduler.step(x, timesteps[0], x)
            assert scheduler.step_index == 1 and scheduler.timesteps is timesteps
        assert not hasattr(diffusers.DDIMScheduler(), "step_index")

    def test_accelerate_keeps_the_wrapped_forward_in_old_forward(self) -> None:
        hooks = pytest.importorskip("accelerate.hooks")
        module = nn.Linear(2, 2)
        hooks.add_hook_to_module(module, hooks.ModelHook())
        assert {"_hf_hook", "_old_forward", "forward"} <= set(vars(module))
        module._old_forward = lambda x: x + 1
        assert torch.equal(module(torch.ones(1)), torch.full((1,), 2.0))

    def test_layer_skip_enters_the_same_kind_of_mode(self) -> None:
        from diffusers.hooks.layer_skip import AttentionProcessorSkipHook, AttentionScoreSkipFunctionMode

        assert issubclass(AttentionScoreSkipFunctionMode, TorchFunctionMode)
        assert AttentionProcessorSkipHook(lambda: None, skip_attention_scores=True).skip_attention_scores

    def test_torch_compile_keeps_the_model_in_orig_mod(self) -> None:
        model = nn.Linear(2, 2)
        compiled = torch.compile(model, backend="eager")
        assert compiled._orig_mod is model and callable(vars(compiled)["forward"])
