"""Ways to decode that `edit` knows by name beside the edits: OPERA's loop, contrastive decoding, DoLa's recipe.

A session holds at most one of them; `session.generate` runs it. Each is made with its arguments by name and knows how
to run `model.generate` under a session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attnzoo.errors import ReachError, UnsupportedError, check_choice, check_range
from attnzoo.vlm.checks import as_number
from attnzoo.vlm.contrast import Icd, PaiGuidance, Vcd
from attnzoo.vlm.opera_loop import OperaLoop, OperaStep

if TYPE_CHECKING:
    from attnzoo.vlm.session import Session


@dataclass(frozen=True, kw_only=True)
class Opera:
    """OPERA (arXiv 2311.17911): beam search that penalises leaning on one token, and takes it back where it goes on.

    num_beams: the default where `session.generate` gets none. scale_factor: sigma of the column products.
    threshold: a prompt goes back when more than so many steps of each of its beams leaned on one place; None: never.
    num_attn_candidates: C, tokens that each beam looks at. penalty_weights: alpha; 0 with threshold=None is
    transformers' beam search. window_size: how many steps back there are states to return to.
    tell: called with an OperaStep after every step.
    compat: "official" repeats the released loop. The default differs in this:

    - scores of columns keep their precision; the code rounds them to float16, where they become 0 below 3e-8 (then the
      first column wins) and infinite above 65504;
    - candidates share the probability that the model gives them together; the code sets all other tokens to -999 before
      it normalises, so that beams with flat distributions gain;
    - finished sequences are compared by the length of the answer, as transformers does now; the code counts the prompt;
    - a beam's history follows the beam; the code's stays where it was when beams change places;
    - what is rejected stays impossible and is forgotten when the search returns to an earlier place; the code gives it
      the smallest logit, in float32 after a shift by hundreds, and forgets the next place only;
    - image keys are the image's tokens; the code counts one more behind each image;
    - logits processors choose candidates too; the code applies them behind the penalty;
    - answers of more than window_size tokens go back as others do (within the window); the code then stops to.

    In both: every prompt of a batch goes back for itself (the code mixes a batch), C candidates are one forward, and
    the next step is the look-ahead of the token that was chosen.

    Raises TypeError or ValueError for arguments out of range.
    """

    num_beams: int = 5
    scale_factor: float = 50.0
    threshold: int | None = 15
    num_attn_candidates: int = 5
    penalty_weights: float = 1.0
    window_size: int = 512
    tell: Callable[[OperaStep], object] | None = None
    compat: str | None = None

    def __post_init__(self) -> None:
        for name, low in (("num_beams", 2), ("num_attn_candidates", 2), ("window_size", 2), ("threshold", 0)):
            value = getattr(self, name)
            if name == "threshold" and value is None:
                continue
            if type(value) is not int:
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}: {value!r}")
            check_range(name, value, low)
        if as_number("scale_factor", self.scale_factor, 0.0) == 0.0:
            raise ValueError("scale_factor must be above 0, got 0")
        as_number("penalty_weights", self.penalty_weights, 0.0)
        check_choice("compat", self.compat, (None, "official"))

    def generate(self, session: Session, args: Any, kwargs: dict[str, Any], image: Tensor | None) -> Any:
        if image is None or kwargs.get("inputs_embeds") is not None:
            raise UnsupportedError("opera begins with a prompt of tokens: give input_ids")
        for name in ("streamer", "assistant_model", "prompt_lookup_num_tokens", "custom_generate"):
            if kwargs.get(name) is not None:
                raise UnsupportedError(f"opera is a beam search of its own and can't be used with {name}")
        config = kwargs.get("generation_config") or session.model.generation_config
        if kwargs.get("do_sample", config.do_sample):
            raise UnsupportedError("opera is a beam search: pass do_sample=False")

        def own(name: str, default: Any) -> Any:
            value = kwargs.pop(name, None)
            value = getattr(config, name, None) if value is None else value
            return default if value is None else value

        num_beams = own("num_beams", 1)
        num_beams = self.num_beams if num_beams == 1 else num_beams
        count = own("num_return_sequences", 1)
        if count > num_beams:
            raise ValueError(f"num_return_sequences must be at most num_beams, {num_beams}, got {count}")
        official = self.compat == "official"
        if official:  # the key behind each image counts too
            image = image.clone()
            image[:, 1:] |= image[:, :-1].clone()
        loop = OperaLoop(
            num_beams,
            count,
            self.scale_factor,
            self.threshold,
            self.num_attn_candidates,
            self.penalty_weights,
            self.window_size,
            official,
            own("length_penalty", 1.0),
            own("early_stopping", False),
            image,
            session.adopt,
            session.also,
            self.tell,
        )
        kwargs = {**kwargs, "num_beams": 1, "num_return_sequences": 1, "do_sample": False, "use_cache": True}
        return session.model.generate(*args, **kwargs, custom_generate=loop)  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class Dola:
    """DoLa (ICLR 2024, arXiv 2309.03883) through transformers' public recipe, which contrasts layers of the text tower.

    dola_layers: "high", "low" or layer indices, as the recipe takes them. repo: a hub id or a folder that holds
    custom_generate/generate.py. trust_remote_code: the recipe is code from that place; it is run with True only.

    Raises ValueError without trust_remote_code, ReachError where the recipe can't be read.
    """

    dola_layers: str | list[int] = "high"
    repo: str = "transformers-community/dola"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.repo, str) or not self.repo:
            raise TypeError(f"repo must be a hub id or a folder, got {self.repo!r}")

    def generate(self, session: Session, args: Any, kwargs: dict[str, Any], image: Tensor | None) -> Any:
        if self.trust_remote_code is not True:
            raise ValueError(
                f"trust_remote_code must be True for dola, which runs the code of {self.repo!r}; got False"
            )
        model: Any = session.model
        try:
            recipe = model.load_custom_generate(self.repo, trust_remote_code=True)
        except Exception as error:  # no file, no network, no such repository: transformers and its client raise many
            told = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ReachError(
                f"dola's recipe {self.repo!r} can't be read ({told}): give repo= a folder that holds "
                "custom_generate/generate.py, or a hub id while the hub can be reached"
            ) from error
        named = dict(zip(("inputs", "generation_config"), args)) | kwargs
        return recipe(model=model, dola_layers=self.dola_layers, **named)


DECODINGS: dict[str, type] = {"opera": Opera, "vcd": Vcd, "icd": Icd, "pai_guidance": PaiGuidance, "dola": Dola}
Decoding = Opera | Vcd | Icd | PaiGuidance | Dola


def split_decoding(methods: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], Decoding | None]:
    """(what remains for edits, its arguments, the way to decode) of what `edit` was given.

    Raises TypeError for an argument that the way has not, UnsupportedError for two of them.
    """
    if isinstance(methods, str) and methods in DECODINGS:
        return [], {}, make_decoding(methods, kwargs)
    if (only := _way(methods)) is not None:
        return [], kwargs, only
    if isinstance(methods, str) or not isinstance(methods, Iterable) or _is_pair(methods):
        return methods, kwargs, None
    rest, ways = [], []
    for entry in methods:
        way = _way(entry)
        if way is None:
            rest.append(entry)
        else:
            ways.append(way)
    if len(ways) > 1:
        names = ", ".join(type(way).__name__ for way in ways)
        raise UnsupportedError(f"a session decodes in one way, got {len(ways)}: {names}")
    return rest, kwargs, ways[0] if ways else None


def _way(entry: Any) -> Decoding | None:
    if isinstance(entry, Opera | Vcd | Icd | PaiGuidance | Dola):
        return entry
    if isinstance(entry, str):
        return make_decoding(entry, {}) if entry in DECODINGS else None
    return make_decoding(*entry) if _is_pair(entry) and entry[0] in DECODINGS else None


def make_decoding(name: str, arguments: dict[str, Any]) -> Decoding:
    """DECODINGS[name] with these arguments; raises TypeError for one that it has not."""
    check_choice("decoding", name, DECODINGS)
    way: Any = DECODINGS[name]
    accepted = [f.name for f in fields(way) if f.init]
    for argument in arguments:
        if argument not in accepted:
            raise TypeError(f"{name!r} has no argument {argument!r}; it has {', '.join(accepted)}")
    return way(**arguments)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], dict)
