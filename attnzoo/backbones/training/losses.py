"""Losses beside the task's: the one place where a method hooks into the training loop.

A hook gets the model, the images and the forward that it stands around, and returns logits and a scalar:

    def spread(net, images, forward):
        logits = forward(images)
        return logits, logits.square().mean()

    train(config, data, output, auxiliary=[AuxiliaryLoss("spread", 0.1, spread)])

The scalar times the weight is added to the task's loss, and logged under its name. The hook runs inside the module that
accelerate wraps, so its gradients are averaged over processes and it runs under autocast like the rest. `forward` is
the next hook's, the last one's is the model; a hook that needs more than logits calls the model itself (then it stands
last). On the command line, --aux-loss NAME=WEIGHT takes the names in `AUXILIARY`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from attnzoo.backbones.blocks.mixture_of_heads import HeadRouter, balance_losses
from attnzoo.backbones.blocks.tap import attention_diversification_loss
from attnzoo.errors import check_choice, check_number

Forward = Callable[[Tensor], Tensor]
Hook = Callable[[nn.Module, Tensor, Forward], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class AuxiliaryLoss:
    """A hook with its name and weight.

    refuses: says why a model can't be trained with it, None if it can. replaces: the hook calls the model itself and
    not `forward`, so it stands last and there is at most one.
    """

    name: str
    weight: float
    hook: Hook
    refuses: Callable[[nn.Module], str | None] = lambda net: None
    replaces: bool = False


def _balance(net: nn.Module, images: Tensor, forward: Forward) -> tuple[Tensor, Tensor]:
    with balance_losses(net) as losses:
        logits = forward(images)
    return logits, sum(losses[1:], losses[0]) / len(losses)


def _no_routers(net: nn.Module) -> str | None:
    found = any(isinstance(m, HeadRouter) and m.routed_head for m in net.modules())
    return None if found else "it has no mixture of heads"


def _attention_diversity(net: nn.Module, images: Tensor, forward: Forward) -> tuple[Tensor, Tensor]:
    logits, attentions = net.forward_attentions(images)  # type: ignore[operator]
    return logits, attention_diversification_loss(attentions)


def _no_attentions(net: nn.Module) -> str | None:
    return None if hasattr(net, "forward_attentions") else "it has no forward_attentions"


#: Name -> the loss at weight 1: `balance` evens out the heads that tokens choose (MoH, arXiv:2410.11842),
#: `attention_diversity` keeps queries from looking at the same tokens (ADL, arXiv:2303.11126).
AUXILIARY = {
    "balance": AuxiliaryLoss("balance", 1.0, _balance, _no_routers),
    "attention_diversity": AuxiliaryLoss("attention_diversity", 1.0, _attention_diversity, _no_attentions, True),
}


def named_losses(weights: Mapping[str, float]) -> list[AuxiliaryLoss]:
    """The losses of `AUXILIARY` with these weights. Raises ValueError for an unknown name."""
    for name, weight in weights.items():
        check_choice("aux_loss", name, AUXILIARY)
        check_number(f"aux_loss {name}", weight)
    return [replace(AUXILIARY[name], weight=weight) for name, weight in weights.items()]


class Task(nn.Module):
    """A classifier with its auxiliary losses: images -> (logits, {name: unweighted scalar}).

    Raises ValueError where two losses replace the forward, two share a name, or one refuses the model.
    """

    def __init__(self, net: nn.Module, auxiliary: Sequence[AuxiliaryLoss] = ()) -> None:
        super().__init__()
        names = [loss.name for loss in auxiliary]
        if len(set(names)) < len(names):
            raise ValueError(f"auxiliary losses must have different names, got {', '.join(names)}")
        if len(whole := [loss.name for loss in auxiliary if loss.replaces]) > 1:
            raise ValueError(f"auxiliary losses {' and '.join(whole)} each call the model: give one of them")
        for loss in auxiliary:
            if why := loss.refuses(net):
                raise ValueError(f"auxiliary loss {loss.name!r} can't serve {type(net).__name__}: {why}")
        self.net = net
        self.auxiliary = sorted(auxiliary, key=lambda loss: loss.replaces)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found: dict[str, Tensor] = {}

        def call(depth: int, images: Tensor) -> Tensor:
            if depth == len(self.auxiliary):
                return self.net(images)
            loss = self.auxiliary[depth]
            logits, found[loss.name] = loss.hook(self.net, images, partial(call, depth + 1))
            return logits

        return call(0, images), found
