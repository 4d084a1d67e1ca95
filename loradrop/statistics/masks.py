"""Which rows of a target's input are real tokens: the model's masks, fitted to what targets see."""

import difflib
import functools
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loradrop.scores import Target

MaskFn = Callable[[str, Tensor, Tensor | None], Tensor | None]
MASK = "attention_mask"
_IGNORED = -100  # the label that losses leave out
_log = logging.getLogger(__name__)


class Masking(NamedTuple):
    """Which tokens count.

    mask      the name of the model's input that marks real tokens, or None to count every token;
              the decoder of an encoder–decoder has its own, as decoder_attention_mask, or else
              counts what has a label or is no padding. A target whose rows are not its tokens,
              as a pooler's, counts whole
    mask_fn   (target name, x, that input) -> weights of the shape of x without its last axis, or
              None for all
    """

    mask: str | None = MASK
    mask_fn: MaskFn | None = None


MASKED, EVERY_TOKEN = Masking(), Masking(None)


class TokenMasks:
    """The masks of the forward pass that runs, and which of them belongs to a target.

    mask, mask_fn   of `Masking`
    current         the input named `mask`, or None
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target], masking: Masking) -> None:
        self.mask, self.mask_fn = masking
        self.current: Tensor | None = None
        self._weights: Tensor | None = None  # the same as the op reads it: once, not in each layer
        self._of_decoder: Tensor | None = None
        # What the decoder of an encoder–decoder attends to, and what the encoder gave.
        self._encoded: Tensor | None = None
        self._encoder_gave: Tensor | None = None
        self.cached = False
        self.known = True  # whether the layers that run now are of that forward pass
        self._said = set[str | None]()  # kinds of targets, and None
        taken = inspect.signature(model.forward).parameters
        if any(p.kind is p.VAR_POSITIONAL for p in taken.values()):  # a PeftModel of no task
            taken = inspect.signature(_base(model).forward).parameters
        self._names = list(taken)
        parts = zip(targets, in_decoder(model, targets), in_tower(model, targets), strict=True)
        self.of_targets = [TargetMask(self, *part) for part in parts]
        self._padding = getattr(getattr(model, "config", None), "pad_token_id", None)
        self._handles: list[RemovableHandle] = []
        if (decoder := _part(model, "get_decoder")) is not None:
            hook = self._enter_decoder
            self._handles.append(decoder.register_forward_pre_hook(hook, with_kwargs=True))
            if (encoder := _part(model, "get_encoder")) is not None:
                self._handles.append(encoder.register_forward_hook(self._leave_encoder))

    def enter(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A forward pass of the model begins. Returns its inputs by name."""
        given = dict(zip(self._names, args, strict=False)) | dict(kwargs)
        for value in list(given.values()):  # a batch that is passed as one input
            if isinstance(value, Mapping):
                given = {**value, **given}
        if self.mask is not None:
            if self.mask not in (MASK, *self._names, *given):
                known = difflib.get_close_matches(self.mask, {MASK, *self._names, *given}, 3, 0.5)
                near = f", but {', '.join(known)}" if known else ""
                raise ValueError(
                    f"mask={self.mask!r}: the model has no input of that name{near}. Choose one of "
                    "its inputs, or None (null) to count every token"
                )
            self.current = _tensor(given, self.mask)
            self._weights = _as_numbers(self.current)
            self._of_decoder = _as_numbers(self._decoder_mask(given))
        self.cached = given.get("past_key_values") is not None
        return given

    def _decoder_mask(self, given: Mapping[str, Any]) -> Tensor | None:
        """Which tokens of the decoder are real. Collators make no mask of them: they are those up
        to the last one with a label, or that are no padding, or the encoder's own, one later.
        """
        mask = _tensor(given, f"decoder_{self.mask}")
        if mask is not None or not self._handles:
            return mask
        labels, ids = given.get("labels"), given.get("decoder_input_ids")
        if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
            has_label: Tensor = labels != _IGNORED
            return has_label.flip(1).cumsum(1).flip(1) > 0
        if isinstance(ids, Tensor):
            if self._padding is None:
                return None
            real: Tensor = ids != self._padding
            real[:, 0] = True  # T5's decoder begins with padding
            return real
        mask = self._weights
        if given.get("decoder_inputs_embeds") is not None or mask is None or mask.ndim != 2:
            return None
        return torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1)

    def _enter_decoder(self, _: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        encoded = kwargs.get("encoder_hidden_states")
        self._encoded = encoded if isinstance(encoded, Tensor) else None

    def _leave_encoder(self, _: nn.Module, __: Any, output: Any) -> None:
        parts = list(output.values()) if isinstance(output, Mapping) else output
        first = parts[0] if isinstance(parts, tuple | list) and parts else parts
        self._encoder_gave = first if isinstance(first, Tensor) else None

    def forget(self) -> None:
        """Let go of what the last forward pass computed."""
        self._encoded = self._encoder_gave = None

    def detach(self) -> None:
        """Stop watching the model."""
        for handle in self._handles:
            handle.remove()

    def by_function(self, name: str, x: Tensor) -> Tensor | None:
        """What `mask_fn` says. Raises ValueError where it has another shape than x's rows."""
        assert self.mask_fn is not None
        weights = self.mask_fn(name, x, self.current if self.known else None)
        if weights is not None and weights.shape != x.shape[:-1]:
            raise ValueError(
                f"what mask_fn returned for {name} is {tuple(weights.shape)}, but its input is "
                f"{tuple(x.shape)}: return one weight per row, or None to count all of them"
            )
        return weights

    def mask_at(self, x: Tensor, in_decoder: bool) -> Tensor | None:
        """The mask of the tokens of x."""
        if not self.known:
            return None
        encoded = _same(x, self._encoded) or _same(x, self._encoder_gave)
        return self._of_decoder if in_decoder and not encoded else self._weights

    def say_unknown(self, target: Target) -> None:
        """A layer runs in a forward pass that did not begin at the model: all its rows count."""
        if self.mask_fn is None and None not in self._said:
            self._said.add(None)
            _log.warning(
                "%s ran outside of the model's own forward, as in model.bert(...), so it is not "
                "known which of its tokens are padding, and all count: call the model itself, or "
                "weigh them by mask_fn=", target.name,
            )  # fmt: skip

    def say_once(self, target: Target, x: Tensor, mask: Tensor) -> None:
        """The mask does not fit the rows of a target of this kind."""
        if target.kind not in self._said:
            self._said.add(target.kind)
            name = self.mask if mask is self._weights else f"decoder_{self.mask}"
            given, shape = f"{name!r} is {tuple(mask.shape)}", tuple(x.shape)
            why = "the rows are not those tokens, so all of them count. mask_fn= weighs them"
            _log.warning("%s, the input of %s %s: %s", given, target.name, shape, why)


class TargetMask:
    """The masks as one target sees them. Compiled code reads nothing here that differs between
    equal layers, so one graph serves them all.
    """

    def __init__(self, masks: TokenMasks, target: Target, in_decoder: bool, in_tower: bool) -> None:
        self.masks, self.target = masks, target
        self.in_decoder, self.in_tower = in_decoder, in_tower
        self.transposed = False  # a mask (B, S) was seen to go with rows (S, B)

    def weights(self, x: Tensor) -> Tensor | None:
        """The weights of the rows of x (..., K), the input of the target; None to count all.

        Raises ValueError for what `mask_fn` returns in another shape.
        """
        masks, rows = self.masks, x.shape[:-1]
        if masks.mask_fn is not None:
            weights = masks.by_function(self.target.name, x)
        else:
            mask = None if self.in_tower else masks.mask_at(x, self.in_decoder)
            if mask is None:
                return None
            weights = fitted(mask, rows, transposed=self.transposed, cached=masks.cached)
            if not torch.compiler.is_compiling():
                if weights is None:
                    masks.say_once(self.target, x, mask)
                elif mask.shape != rows == mask.shape[::-1]:
                    self.transposed = True
        return None if weights is None else weights.to(x.device)


def fitted(
    mask: Tensor, rows: Sequence[int], *, transposed: bool = False, cached: bool = False
) -> Tensor | None:
    """The mask as weights of an input whose shape without its last axis is `rows`.

    A mask (B, S) fits rows (B, S) and (S, B), its tokens in another grouping such as (B·S,) and,
    where keys and values of earlier tokens are `cached`, its last tokens alone. `transposed`
    decides where B = S. None where the rows are not the tokens of the mask (pooled, of another
    input, or (1, B·S) beside a batch, as DeBERTa's relative positions), and for a mask of pairs of
    tokens (4-D).
    """
    rows, shape = tuple(rows), tuple(mask.shape)
    if mask.ndim == 2 and rows == shape[::-1] and (transposed or rows != shape):
        return mask.T
    beside = len(rows) == len(shape) == 2 and rows[0] == 1 < shape[0]
    if mask.ndim < 4 and math.prod(rows) == mask.numel() and not beside:
        return mask.reshape(rows)
    if cached and mask.ndim == len(rows) == 2 and rows[0] == shape[0] and rows[1] < shape[1]:
        return mask[:, -rows[1] :]
    return None


def in_decoder(model: nn.Module, targets: Sequence[Target]) -> list[bool]:
    """Which targets are outside the encoder of an encoder–decoder, and see other tokens."""
    if (encoder := _part(model, "get_encoder")) is None:
        return [False] * len(targets)
    inside = set(encoder.modules())
    base = _base(model)
    return [base.get_submodule(target.name) not in inside for target in targets]


def in_tower(model: nn.Module, targets: Sequence[Target]) -> list[bool]:
    """Which targets are in a part that takes images or sound and no mask: its rows are patches or
    frames, however many tokens there are.
    """
    base, inside = _base(model), set[nn.Module]()
    for module in base.modules():
        kind: Any = type(module)
        if module is not base and _is_tower(kind):
            inside.update(module.modules())
    return [base.get_submodule(target.name) in inside for target in targets]


@functools.cache
def _is_tower(kind: Any) -> bool:
    taken = inspect.signature(kind.forward).parameters
    senses = {"pixel_values", "pixel_values_videos", "input_features", "input_values"}
    return bool(senses & taken.keys()) and not {"input_ids", MASK} & taken.keys()


def _base(model: nn.Module) -> nn.Module:
    """The model in which the names of targets are: the base model of a PeftModel."""
    found: nn.Module = getattr(model, "get_base_model", lambda: model)()
    return found


def _part(model: nn.Module, getter: str) -> nn.Module | None:
    """The encoder or the decoder of an encoder–decoder of transformers."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    found = getattr(model, getter, lambda: None)()
    return found if isinstance(found, nn.Module) and found is not model else None


def _tensor(given: Mapping[str, Any], name: str) -> Tensor | None:
    mask = given.get(name)
    if mask is not None and not isinstance(mask, Tensor):
        what = f"{name!r} is a {type(mask).__name__}, not a tensor"
        raise ValueError(f"the model's input {what}: pass mask=None or mask_fn=")
    return mask


def _as_numbers(mask: Tensor | None) -> Tensor | None:
    """As weights: 0 and 1 of integers, which may number the sequences that a row packs."""
    return mask if mask is None or mask.is_floating_point() else (mask > 0).float()


def _same(x: Tensor, other: Tensor | None) -> bool:
    """Whether both are the same values in memory, also where one was detached from the other, or
    is (S, B, K) of (B, S, K).
    """
    if x is other or other is None or torch.compiler.is_compiling():
        return x is other
    turned = x.ndim == other.ndim == 3 and x.shape == other.transpose(0, 1).shape
    return (turned or x.shape == other.shape) and x.data_ptr() == other.data_ptr() != 0
