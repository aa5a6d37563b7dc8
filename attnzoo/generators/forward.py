"""One forward of a denoiser as a value that methods may run again, with other arguments, or in another branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError
from attnzoo.generators.adapters import Family

if TYPE_CHECKING:
    from attnzoo.generators.chain import Method
    from attnzoo.generators.hooks import Denoiser, Frame


class Forward:
    """What `Method.denoise` gets: `forward()` runs the rest of the chain and at its end the model.

    given: the model's arguments by name. model: the module itself.
    """

    def __init__(self, denoiser: Denoiser, given: Mapping[str, Any], frame: Frame, stock: Callable[..., Any]) -> None:
        self._denoiser = denoiser
        self._frame = frame
        self._stock = stock
        self._slot = -1
        self.given: dict[str, Any] = dict(given)

    @property
    def model(self) -> Any:
        """The denoiser."""
        return self._denoiser.model

    @property
    def latents(self) -> Tensor:
        """The latents among the arguments, as the model takes them."""
        return self.given[self.latents_name]

    @property
    def latents_name(self) -> str:
        """Name of the latents among the arguments."""
        return "sample" if "sample" in self.given else "hidden_states"

    def __call__(self, *, branch: str | None = None, parts: tuple[str, ...] | None = None, **changed: Any) -> Any:
        """Run with `changed` arguments in place of the given ones; branch: name of the branch that this call is.

        parts: the branches that its batch holds in equal parts, where it is not the one branch.
        Token layout and phases are those of the new call; the step is the same. Returns what the model returns.
        """
        given = {**self.given, **changed}
        frame = self._frame
        if changed or branch is not None or parts is not None:
            ctx = frame.ctx if branch is None else replace(frame.ctx, branch=branch, parts=(branch,))
            ctx = ctx if parts is None else replace(ctx, parts=parts)
            frame = self._denoiser.frame_for(given, ctx)
        return self._denoiser.run(given, frame, self._stock, self._slot)

    def running_parts(self) -> tuple[str, ...]:
        """`StepContext.parts` of the forward that is running now, which may be one that a method asked for."""
        frame = self._denoiser.frame
        return self._frame.ctx.parts if frame is None else frame.ctx.parts

    @property
    def family(self) -> Family:
        """The denoiser's adapter."""
        return self._denoiser.family

    def part(self, branch: str) -> dict[str, Any]:
        """The arguments of the rows of `branch` alone, for `forward(branch=, **forward.part(branch))`.

        Raises UnsupportedError where the batch does not hold it in equal parts.
        """
        parts = self._frame.ctx.parts
        if len(parts) == 1:
            return dict(self.given)
        batch = len(
            next(self.given[name] for name in (*self.family.per_sample, self.latents_name) if name in self.given)
        )
        if branch not in parts or batch % len(parts):
            raise UnsupportedError(f"a batch of {batch} holds no {branch!r} among {len(parts)} equal parts ({parts})")
        size, place = batch // len(parts), parts.index(branch)
        return take_rows(self.given, slice(place * size, (place + 1) * size), batch, self.family)

    def layers(self, method: Method) -> dict[str, tuple[int, ...]]:
        """The modules that `method` acts on, by name, each with the grid that it sees (a UNet's levels)."""
        return self._denoiser.layers_of(method, self._frame.layout.grid)

    def move_latents(self, shift: Tensor) -> None:
        """Add `shift` to the pipeline's latents before its scheduler takes this step.

        shift: [b, ...] in the model's input units, b the pipeline's own batch (without the doubling of guidance).
        Raises UnsupportedError on a bare model: its caller owns the latents.
        """
        self._denoiser.tracker.move_latents(shift)

    def at(self, slot: int) -> Forward:
        """The same seen by the method at `slot` of the chain around the model."""
        seen = Forward(self._denoiser, self.given, self._frame, self._stock)
        seen._slot = slot
        return seen


def take_rows(given: Mapping[str, Any], rows: slice, batch: int, family: Family) -> dict[str, Any]:
    """A forward's arguments with some samples of its batch; what all samples share stays as it is."""

    def taken(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            shared = name in family.positions and value.ndim < 3
            return value if shared or not value.ndim or value.shape[0] != batch else value[rows]
        if name in family.per_sample and isinstance(value, list):
            return value[rows]
        if isinstance(value, dict):
            return {key: taken(key, entry) for key, entry in value.items()}
        return type(value)(taken(name, entry) for entry in value) if type(value) in (list, tuple) else value

    return {name: taken(name, value) for name, value in given.items()}


def first_tensor(output: Any) -> Tensor:
    """The prediction in what a model returned: a tensor, a tuple, or an output class with `sample`.

    One of a list of samples (Z-Image) is stacked.
    """
    if isinstance(output, Tensor):
        return output
    found = output[0]
    if isinstance(found, list) and found and all(isinstance(sample, Tensor) for sample in found):
        found = torch.stack(found)
    if not isinstance(found, Tensor):
        raise UnsupportedError(f"the denoiser returned no tensor first, but {type(found).__name__}")
    return found


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """`output` with its prediction replaced by `tensor`; the same kind of object."""
    if isinstance(output, Tensor):
        return tensor
    new: Any = list(tensor.unbind()) if isinstance(output[0], list) else tensor
    if type(output) is tuple:
        return (new, *output[1:])
    return type(output)(**{**dict(output), next(iter(dict(output))): new})


def map_batch(given: Mapping[str, Any], batch: int, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """`given` with `change` applied to every tensor of `batch` rows, in dicts, lists and tuples too."""

    def mapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value) if value.ndim and value.shape[0] == batch else value
        if isinstance(value, dict):
            return {name: mapped(entry) for name, entry in value.items()}
        if type(value) in (list, tuple):
            return type(value)(mapped(entry) for entry in value)
        return value

    return {name: mapped(value) for name, value in given.items()}
