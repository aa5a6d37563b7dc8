"""One forward of a denoiser as a value that methods may run again, with other arguments, or in another branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attnzoo.errors import UnsupportedError

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


def first_tensor(output: Any) -> Tensor:
    """The prediction in what a model returned: a tensor, a tuple, or an output class with `sample`."""
    if isinstance(output, Tensor):
        return output
    found = output[0]
    if not isinstance(found, Tensor):
        raise UnsupportedError(f"the denoiser returned no tensor first, but {type(found).__name__}")
    return found


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """`output` with its prediction replaced by `tensor`; the same kind of object."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple) and type(output) is tuple:
        return (tensor, *output[1:])
    return type(output)(**{**dict(output), next(iter(dict(output))): tensor})


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
