"""accelerate for the length of a run: its process-wide state is as before after it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from attnzoo.errors import check_choice

#: Where every process holds the whole model, which is what checkpoints, averages and exports rely on.
_WHOLE = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def check_extras() -> None:
    """Raise ModuleNotFoundError, before anything starts, for a package of the extra `train` that is missing."""
    for name in ("torchmetrics", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}: pip install 'attnzoo[train]'", name=name)


@contextmanager
def accelerated(device: str = "auto", amp: str = "no", accumulate: int = 1) -> Iterator[Accelerator]:
    """An Accelerator for one run.

    Raises ValueError for a way of distributing that cuts the model (FSDP, DeepSpeed), and where accelerate is in use by
    the caller with another precision.
    """
    check_choice("device", device, ("auto", "cpu"))
    ours = not PartialState._shared_state
    try:
        accelerator = Accelerator(cpu=device == "cpu", mixed_precision=amp, gradient_accumulation_steps=accumulate)
        if accelerator.distributed_type not in _WHOLE:
            raise ValueError(
                f"training works with one or several processes that hold the whole model, "
                f"got {accelerator.distributed_type.value}"
            )
        yield accelerator
    finally:
        if ours:
            if PartialState._shared_state:
                PartialState().destroy_process_group()
            GradientState._reset_state()
            AcceleratorState._reset_state(reset_partial_state=True)
