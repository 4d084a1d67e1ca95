"""The configuration of a run: its sections, overrides and short forms; what is wrong is named."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from loradrop import LoRA, LoRADrop, Spectral, methods
from loradrop.command.base_models import resolve_model
from loradrop.command.run_config import MINILM, RunConfig, folder_of, read_config
from loradrop.methods.nb_lora import NBLoRA
from loradrop.text.task import DataConfig


def test_defaults_and_the_demo() -> None:
    config = read_config(None)
    assert config.model.id == MINILM and config.data.source == "stdlib"
    assert config.lora.method == LoRADrop(budget=0.5) and not config.arms
    assert config == RunConfig()
    demo = read_config(Path(__file__).parent.parent / "examples" / "demo.yaml")
    assert demo.model.id == MINILM and demo.data.source == "stdlib"
    assert [lora.method.name for lora in demo.arms.values()] == ["lora", "lora"]
    assert demo.lora.method.name == "lora_drop"


def test_sections_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        """
        model: some/model          # short for {id: some/model}
        data: {source: films.csv, max_length: 20}
        lora:
          r: 4
          target_modules: [query, value]
          method: {name: lora_drop, threshold: 0.5}
        train: {learning_rate: 3e-3, steps: 100, extra: {adam_beta2: 0.98}}
        arms:
          plain: {method: lora}
          larger: {r: 16, rank_pattern: {value: 2}}
          as it is:
        """
    )
    overrides = ["train.steps=7", "train.weight_decay=1e-2", "model.revision=main"]
    overrides += ["data=other.tsv", "lora.lora_alpha=2", "arms.larger.r=32"]
    config = read_config(file, [*overrides, "arms.new.method=lora", "name=ours"])
    assert (config.model.id, config.model.revision) == ("some/model", "main")
    assert config.data == DataConfig(source="other.tsv")
    assert (config.train.steps, config.train.learning_rate) == (7, 0.003)
    assert config.train.weight_decay == 0.01 and config.train.extra == {"adam_beta2": 0.98}
    assert config.lora.method == LoRADrop(threshold=0.5) and config.lora.lora_alpha == 2
    assert list(config.arms) == ["plain", "larger", "as it is", "new"]
    assert config.arms["plain"].method == LoRA() == config.arms["new"].method
    assert config.arms["plain"].target_modules == ("query", "value")
    assert config.arms["larger"].r == 32 and config.arms["larger"].lora_alpha == 2
    assert config.arms["as it is"] == config.lora
    assert folder_of(config, "as it is") == Path("runs/loradrop/as-it-is")
    assert (config.name, config.output) == ("ours", "runs/loradrop")


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    config = read_config(None, ["output=~/runs", "model=~/bert"])
    assert (config.output, config.model.id) == ("/somebody/runs", "/somebody/bert")


@pytest.mark.parametrize(
    "text",
    [
        "reviews #1.csv",
        "part: one.csv",
        "[draft].csv",
        "{a}.csv",
        "[a]",
        "010",
        "1e5",
        "on",
        "*.c=d",
    ],
)
def test_a_name_or_a_path_is_taken_as_it_stands(text: str) -> None:
    keys = ("model", "data", "name", "output", "data.text", "data.dev", "model.revision")
    config = read_config(None, [f"{key}={text}" for key in keys])
    assert {config.model.id, config.data.source, config.name, config.output} == {text}
    assert {config.data.text, config.data.dev, config.model.revision} == {text}


def test_text_may_be_quoted_or_null_and_a_section_in_braces() -> None:
    config = read_config(None, ["data={source: a, label: b}", "data.text='null'", "data.label="])
    assert config.data == DataConfig(source="a", text="null")
    assert read_config(None, ["data={source: a, max_length: 9}"]).data.max_length == 9


def test_overrides_go_into_short_forms(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: some/model\nlora: {method: lora_drop}\n")
    config = read_config(file, ["model.dtype=bfloat16", "lora.method.keep=3"])
    assert (config.model.id, config.model.dtype) == ("some/model", "bfloat16")
    assert config.lora.method == LoRADrop(keep=3)
    assert read_config(None, ["lora.method=lora"]).lora.method == LoRA()
    short = read_config(file, ["method=spectral", "method.budget=0.1"])
    assert short.lora.method == Spectral(budget=0.1)
    assert read_config(None, ["lora.method.threshold=0.3"]).lora.method == LoRADrop(threshold=0.3)
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert read_config(empty) == read_config(None)


@pytest.mark.parametrize(
    "pattern", ["[qk].*", "[a-z.0-9]*query", "&query", ".*query # value", "(?i).*QUERY"]
)
@pytest.mark.parametrize("section", ["lora", "arms.LoRA"])
def test_a_pattern_is_taken_as_it_stands(pattern: str, section: str) -> None:
    found = read_config(None, [f"{section}.target_modules={pattern}"])
    config = found.lora if section == "lora" else found.arms["LoRA"]
    assert config.target_modules == pattern


def test_configuration_goes_through_yaml(tmp_path: Path) -> None:
    overrides = ["lora.target_modules=[query]", "arms.plain.method=lora", "train.report_to=[]"]
    config = read_config(None, overrides)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    again = read_config(file)
    assert again.to_dict() == config.to_dict() and again.lora == config.lora
    assert again.arms == config.arms


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trian.steps=3"], r"has no option 'trian': did you mean 'train'\?"),
        (["train.step=3"], r"train has no option 'step': did you mean 'steps'\?"),
        (["data.maxlength=3"], r"data has no option 'maxlength': did you mean 'max_length'\?"),
        (["model.name=x"], r"model has no option 'name'"),
        (["lora.lora_aplha=3"], r"lora has no option 'lora_aplha': did you mean 'lora_alpha'\?"),
        (["lora.method.treshold=1"], r"lora\.method has no option 'treshold': .*'threshold'"),
        (["arms.x.rr=1"], r"arms\.x has no option 'rr': did you mean 'r'\?"),
        (["lora.method=lora_drp"], r"method 'lora_drp' is unknown: choose one of adalora, lora, "),
        (["train.steps=many"], r"train\.steps='many': give a whole number or null"),
        (["train.steps=1.5"], r"train\.steps=1\.5: give a whole number or null"),
        (["train.batch_size=true"], r"train\.batch_size=True: give a whole number"),
        (["train.learning_rate=high"], r"train\.learning_rate='high': give a number"),
        (["train.gradient_checkpointing=1"], r"gradient_checkpointing=1: give true or false"),
        (["train.extra=3"], r"train\.extra=3: give a section"),
        (["train.seed="], r"train\.seed=None: give a whole number"),
        (["lora.target_modules=[3]"], r'target_modules=\[3\]: give names as text, as \["0", "2"\]'),
        (["lora.target_modules=.*(query|value"], r"value' is no regular expression: missing \)"),
        (["arms.LoRA.target_modules=*query"], r"'\*query' is no regular expression: nothing to"),
        (["lora.rank_pattern={'(': 4}"], r"a key of rank_pattern='\(' is no regular expression"),
        (["lora.method.threshold='a'"], r"lora\.method\.threshold='a': give a number or null"),
        (["method=nb_lora", "method.s=[1,a]"], r"s=\[1, 'a'\]: give a number or a list of num"),
        (["method=nb_lora", "method.s=1,a"], r"s='1,a': give a number or a list of numbers"),
        (["lora.method.threshold=2"], r"threshold=2: choose a number in \[0, 1\]"),
        (["lora.r=0"], r"r=0: the rank"),
        (["model.dtype=int8"], r"model\.dtype='int8': choose one of float32, bfloat16, float16"),
        (["lora.rank=8"], r"lora has no option 'rank': did you mean 'r'\?"),
        (["train.lr=1"], r"train has no option 'lr': did you mean 'learning_rate'\?"),
        (["lora.method.name=lora", "lora.lora_rank=8"], r"did you mean 'r'\?"),
        (["lora=8"], r"lora=8: write a section"),
        (["arms=[lora]"], r"arms=\['lora'\]: write a section"),
        (["arms.x=lora"], r"x='lora': write a section"),
        (["arms.LoRA drop.r=2"], r"'LoRA-drop' gives none of its own: rename it"),
        (["name=A B", "arms.a-b.r=2"], r"'A B' gives none of its own: rename it"),
        (["arms.?.r=2"], r"'\?' gives none of its own: rename it"),
        (["step"], r"'step' is not an override: write section\.key=value \(train\.steps=200\)"),
        (["=3"], r"'=3' is not an override"),
        (["model="], r"'model=' has no value: give one, or leave it out for the default"),
        (["data= "], r"'data= ' has no value"),
        (["output="], r"'output=' has no value"),
        (["lora.target_modules=[query"], r"target_modules='\[query' is no regular expression"),
        (["lora.modules_to_save=[query"], r"lora\.modules_to_save=\[query is not YAML"),
        (["train.warmup_ratio=10"], r"warmup_ratio=10: choose a part of all steps in \[0, 1\]"),
        (["train.weight_decay=-1"], r"weight_decay=-1: choose a number from 0 up"),
        (["train.seed=-1"], r"seed=-1: choose a whole number in \[0, 2\*\*32\)"),
        (["train.save_every=1.5"], r"save_every=1\.5: choose a whole number of steps, or a part"),
        (["train.epochs=.inf"], r"epochs=inf: choose a positive number"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_configuration_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(None, overrides)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("query", ("query",)),
        ("query, layer.0.value", ("query", "layer.0.value")),
        ("[query,value]", ("query", "value")),
        ("'query'", "query"),
        ("all-linear", "all-linear"),
        (r".*\.\d{1,2}\.(query|value)", r".*\.\d{1,2}\.(query|value)"),
        ("null", None),
    ],
)
def test_names_of_modules_are_a_list_and_a_pattern_is_not(text: str, expected: Any) -> None:
    keys = ("lora.target_modules", "lora.exclude_modules", "arms.plain.target_modules")
    config = read_config(None, [f"{key}={text}" for key in keys])
    found = (config.lora.target_modules, config.lora.exclude_modules)
    assert {*found, config.arms["plain"].target_modules} == {expected}


@pytest.mark.parametrize("text", ["[1,.5,.25]", "1,.5,.25", "1, 5e-1, 0.25"])
def test_a_list_of_numbers_for_a_method(text: str, tmp_path: Path) -> None:
    config = read_config(None, ["method=nb_lora", f"method.s={text}", "arms.x.method=nb_lora"])
    assert config.lora.method == NBLoRA(s=(1, 0.5, 0.25)) and config.arms["x"].method == NBLoRA()
    assert read_config(None, ["arms.x.method=nb_lora", f"arms.x.method.s={text}"]).arms["x"] == (
        config.lora
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    assert read_config(file).lora == config.lora


def test_any_list_may_be_written_with_commas() -> None:
    config = read_config(None, ["lora.modules_to_save=score", "train.report_to=wandb,tensorboard"])
    assert config.lora.modules_to_save == ("score",)
    assert list(config.train.report_to) == ["wandb", "tensorboard"]
    for one in ("train.report_to=wandb", "train.report_to='wandb'", "train.report_to=[wandb]"):
        assert list(read_config(None, [one]).train.report_to) == ["wandb"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", r"config\.yaml must hold sections \(model:, .*\), not a list"),
        ("lora: {r: 8\n", r"config\.yaml is not YAML: (.|\n)*line 2"),
        ("lora:\n  rank: 8\n", r"lora has no option 'rank': did you mean 'r'\?"),
        ("model: 3\n", r"model=3: write a section, as in model: \{id: \.\.\.\}"),
        ("optimizer: adam\n", r"config\.yaml has no option 'optimizer': known: arms, data"),
    ],
)
def test_bad_and_missing_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(file)
    with pytest.raises(FileNotFoundError, match=r"no\.yaml is not a file: give a YAML file, or "):
        read_config(tmp_path / "no.yaml")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "LoRA-drop"),
        (["lora.method=vera"], "vera"),
        (["lora.method=vera", "name=mine"], "mine"),
        (["lora.method=lora", "arms.LoRA.r=2"], "main"),
    ],
)
def test_a_run_has_the_name_of_its_method(overrides: list[str], name: str) -> None:
    assert read_config(None, overrides).name == name


def test_default_model_comes_from_its_package(
    minilm_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_model(MINILM) == str(minilm_path)
    assert resolve_model("some/model") == "some/model"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve_model(MINILM) == MINILM


def test_a_section_does_not_take_back_its_options() -> None:
    options = ("method.u_initial=2", "model.dtype=bfloat16", "method=tied_lora", "model=some/model")
    for given in (options, options[::-1]):
        config = read_config(None, [*given, "data=stdlib"])
        assert config.lora.method == methods.get("tied_lora")(u_initial=2.0)
        assert (config.model.id, config.model.dtype) == ("some/model", "bfloat16")
    assert read_config(None, ["method=vera", "method=lora"]).lora.method.name == "lora"
