"""Model cards that are extended, and adapters pushed to a stand-in for the Hub."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub import Hub, serving
from models import adapt, bert, llama, outputs, share
from run_cases import write_tokenizer
from safetensors.torch import load
from typer.testing import CliRunner

import loradrop
from loradrop.formats.card import END, START

CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
THEIRS = """---
license: mit
tags:
- medical
model-index:
- name: mine
  results: []
---

# My model

Do not use it on patients.
"""


def parts(card: str) -> tuple[dict[str, Any], str]:
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.fixture
def adapted() -> Any:
    return adapt(llama(), r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def point(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sends huggingface_hub to a hub of ours."""

    def to(hub: Hub) -> None:
        for module in ("huggingface_hub.constants", "huggingface_hub.hf_api"):
            monkeypatch.setattr(f"{module}.ENDPOINT", hub.url, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)

    return to


# The card


def test_text_and_metadata_stay_and_our_part_is_renewed(adapted: Any, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(THEIRS)
    loradrop.export(adapted, tmp_path, base_id="someone/base")
    data, text = parts((tmp_path / CARD).read_text())
    assert data["license"] == "mit" and data["model-index"][0]["name"] == "mine"
    assert data["tags"] == ["medical", "lora", "loradrop", "base_model:adapter:someone/base"]
    assert data["base_model"] == "someone/base" and data["library_name"] == "peft"
    assert text.startswith("\n# My model\n\nDo not use it on patients.\n")
    assert text.count(START) == text.count(END) == 1 and "4 keep an adapter" in text

    more = (tmp_path / CARD).read_text() + "\nAnd ask me before you do.\n"
    (tmp_path / CARD).write_text(more)
    loradrop.share(adapted, [adapted.lora_bank.targets[0].name])
    loradrop.export(adapted, tmp_path, base_id="another/base")
    data, text = parts((tmp_path / CARD).read_text())
    assert data["base_model"] == "another/base" and "base_model:adapter:someone/base" not in text
    assert data["tags"] == ["medical", "lora", "loradrop", "base_model:adapter:another/base"]
    assert "Do not use it on patients." in text and text.endswith("\nAnd ask me before you do.\n")
    assert text.count(START) == 1 and "share 1," in text and "4 keep" not in text


def test_an_export_twice_is_the_same_card(adapted: Any, tmp_path: Path) -> None:
    loradrop.export(adapted, tmp_path)
    once = (tmp_path / CARD).read_text()
    loradrop.export(adapted, tmp_path)
    assert (tmp_path / CARD).read_text() == once


def test_where_all_share_the_card_says_that_none_is_own(adapted: Any, tmp_path: Path) -> None:
    loradrop.export(share(adapted, []), tmp_path)
    text = (tmp_path / CARD).read_text()
    assert "0 keep an adapter" in text and "\nOwn: none.\n" in text
    loradrop.export(share(adapted, [1]), tmp_path)
    text = (tmp_path / CARD).read_text()
    own = next(line for line in text.splitlines() if line.startswith("Own: "))
    assert adapted.lora_bank.targets[1].name in own and "none" not in own


def test_metadata_that_are_not_yaml_change_nothing(adapted: Any, tmp_path: Path) -> None:
    loradrop.export(adapted, tmp_path)
    (tmp_path / CARD).write_text("---\ntags: [\n---\nMine.\n")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"(?s)README\.md that is there are not YAML.*move the"):
        loradrop.export(adapted, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_how_to_load_is_said_for_who_takes_it(adapted: Any, tmp_path: Path) -> None:
    loradrop.export(adapted, tmp_path / "a", base_id="someone/base")
    text = (tmp_path / "a" / CARD).read_text()
    for line in (
        "ADAPTER=path/to/this/folder\n",
        "vllm serve someone/base --enable-lora --lora-modules adapter=$ADAPTER\n",
        "python -m sglang.launch_server --model-path someone/base --enable-lora --lora-paths",
        "--outfile adapter.gguf $ADAPTER\n",
        'model.load_adapter("path/to/this/folder")',
        'PeftModel.from_pretrained(base, "path/to/this/folder")',
    ):
        assert line in text, line
    assert "padded with zeros to rank 8, with its scale in B" in text
    loradrop.export(adapted, tmp_path / "own", padded=False)
    assert "at its own rank, with its scale in B" in (tmp_path / "own" / CARD).read_text()
    wide = adapt(llama(), r=20, target_modules=["q_proj"])  # q without v: not for SGLang
    loradrop.export(wide, tmp_path / "b", base_id="someone/base")
    text = (tmp_path / "b" / CARD).read_text()
    assert "vllm serve someone/base --enable-lora --max-lora-rank 32 --lora-modules" in text
    assert "sglang.launch_server" not in text
    loradrop.export(adapt(bert(), r=3, target_modules=["query"]), tmp_path / "c")
    text = (tmp_path / "c" / CARD).read_text()  # a classifier, with a head that is saved whole
    assert "vllm serve" not in text and "load_adapter" not in text and "PeftModel" in text


def test_transformers_loads_it_as_the_card_says(adapted: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    loradrop.export(adapted, tmp_path)
    base = llama()
    base.load_adapter(str(tmp_path))
    assert outputs(base).allclose(outputs(adapted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("more", [0, 2])
def test_the_card_says_how_many_tokens_the_base_gets(more: int, here: bool, tmp_path: Path) -> None:
    """Where it has other ones, or lies elsewhere; its code runs."""
    peft = pytest.importorskip("peft")
    llama().save_pretrained(tmp_path / "base")
    model = type(llama()).from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(50 + more, mean_resizing=False)
    whole = ["embed_tokens", "lm_head"]
    adapt(model, r=3, target_modules=["q_proj", "v_proj"], modules_to_save=whole)
    loradrop.export(model, tmp_path / "a", base_id=str(tmp_path / "base") if here else "some/base")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "a" / CARD).read_text(), re.S)
    resized = f"base.resize_token_embeddings({50 + more})"
    assert (resized in code) == (more > 0 or not here)
    code = re.sub("path/to/the/base/model|some/base", str(tmp_path / "base"), code)
    exec(code.replace("path/to/this/folder", str(tmp_path / "a")), found := dict[str, Any]())
    assert isinstance(found["model"], peft.PeftModel)
    assert outputs(found["model"].eval()).allclose(outputs(model), rtol=1e-5, atol=1e-5)


# The Hub


def test_a_push_is_one_commit(adapted: Any, point: Any, tmp_path: Path) -> None:
    with serving() as hub:
        point(hub)
        loradrop.export(
            adapted, tmp_path, push_to_hub="someone/adapter", private=True, token="hf_secret"
        )
    assert hub.commits == [[CARD, CONFIG, TENSORS]] and hub.tokens == {"Bearer hf_secret"}
    (made,) = hub.made
    assert (made["name"], made["organization"]) == ("adapter", "someone")
    assert made.get("private", made.get("visibility") == "private") is True
    assert hub.files[CONFIG] == (tmp_path / CONFIG).read_bytes()
    assert hub.files[TENSORS] == (tmp_path / TENSORS).read_bytes() and load(hub.files[TENSORS])
    card = hub.files[CARD].decode()
    assert "ADAPTER=$(hf download someone/adapter)\n" in card and "path/to/this" not in card
    assert 'PeftModel.from_pretrained(base, "someone/adapter")' in card
    assert "someone/adapter" not in (tmp_path / CARD).read_text()


def test_the_card_of_the_repository_is_extended(adapted: Any, point: Any, tmp_path: Path) -> None:
    with serving({CARD: THEIRS.encode()}) as hub:
        point(hub)
        for _ in range(2):
            loradrop.export(adapted, tmp_path, push_to_hub="someone/adapter", token="hf_secret")
    data, text = parts(hub.files[CARD].decode())
    assert data["license"] == "mit" and data["tags"][:2] == ["medical", "lora"]
    assert "Do not use it on patients." in text and text.count(START) == 1
    assert len(hub.commits) == 2 and "My model" not in (tmp_path / CARD).read_text()


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_a_card_that_the_hub_does_not_give_is_not_replaced(
    status: int, adapted: Any, point: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # before huggingface_hub asks again
    with serving({CARD: THEIRS.encode()}, fails=status) as hub:
        point(hub)
        with pytest.raises(OSError):
            loradrop.export(adapted, tmp_path, push_to_hub="someone/adapter", token="hf_secret")
    assert not hub.commits and hub.files == {CARD: THEIRS.encode()}


def test_a_public_repository_is_not_taken_for_a_private_one(
    adapted: Any, point: Any, tmp_path: Path
) -> None:
    with serving() as hub:
        point(hub)
        hub.private = False
        to: dict[str, Any] = {"push_to_hub": "someone/adapter", "token": "hf_secret"}
        with pytest.raises(ValueError, match=r"is there and public.*hf repos settings"):
            loradrop.export(adapted, tmp_path, private=True, **to)
        assert not hub.commits
        loradrop.export(adapted, tmp_path, **to)
    assert len(hub.commits) == 1


def test_what_the_hub_refuses(adapted: Any, point: Any, tmp_path: Path) -> None:
    with serving(refuses=True) as hub:
        point(hub)
        with pytest.raises(Exception, match="403"):
            loradrop.export(adapted, tmp_path, push_to_hub="someone/adapter", token="hf_secret")
    assert not hub.files and (tmp_path / CONFIG).exists()  # it is written, and can be pushed again
    with pytest.raises(ValueError, match=r"push_to_hub is of the PEFT format.*hf upload"):
        loradrop.export(adapted, tmp_path / "m", "merged", push_to_hub="someone/adapter")
    assert not (tmp_path / "m").exists()


def test_the_command_pushes(adapted: Any, point: Any, tmp_path: Path) -> None:
    from loradrop.command.cli import app

    base = llama()
    base.save_pretrained(tmp_path / "base")
    loradrop.save(adapted, tmp_path / "native")
    write_tokenizer(tmp_path / "native")
    given = ["export", str(tmp_path / "native"), str(tmp_path / "peft")]
    given += ["--model", str(tmp_path / "base")]
    with serving() as hub:
        point(hub)
        done = CliRunner().invoke(app, [*given, "--push", "someone/adapter"])
        assert done.exit_code == 0, done.output
        assert "pushed to http" in done.output
    (files,) = hub.commits
    assert {CARD, CONFIG, TENSORS, "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert hub.files["tokenizer.json"] == (tmp_path / "native" / "tokenizer.json").read_bytes()
    done = CliRunner().invoke(app, [*given, "--private"])
    assert done.exit_code != 0 and "--private is of --push" in str(done.exception) + done.output
    to = ("--push", "someone/adapter", "--format", "merged")
    done = CliRunner().invoke(app, [*given, *to])
    assert done.exit_code != 0 and "upload that (hf upload" in str(done.exception) + done.output
