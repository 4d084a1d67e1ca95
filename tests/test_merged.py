"""Merged exports: plain models with the same logits, read back; the adapted model stays."""

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import IDS, Make, adapt, assert_same, bert, llama, outputs, snapshot, wake
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import loradrop
from loradrop import export, verify
from loradrop.formats import peft

pytestmark = pytest.mark.numbers

BATCHES = [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:], "attention_mask": IDS[1:] > 20}]


def reload_merged(model: nn.Module, path: Path) -> None:
    """Export merged, and what transformers loads has the model's outputs."""
    assert export(model, path, "merged") == []
    found, report = type(model).from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(outputs(found.eval()), outputs(model), rtol=1e-4, atol=1e-5)


class Links(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(self.query(x).tanh())

    def save_pretrained(self, folder: Any, safe: bool = True) -> None:
        for name, link in self.named_children():
            (Path(folder) / name).mkdir(parents=True)
            save_file(link.state_dict(), Path(folder) / name / "model.safetensors")


class TestMerged:
    @pytest.mark.parametrize("make", [bert, models.roberta, llama, models.gpt2])
    def test_loads_to_the_same_logits(self, make: Make, tmp_path: Path) -> None:
        model = make()
        base = outputs(model)
        native = outputs(adapt(model, lora_alpha=3))
        assert (native - base).abs().max() > 1e-2
        reload_merged(model, tmp_path)
        assert not [key for key in load_file(tmp_path / "model.safetensors") if "lora" in key]
        assert torch.equal(outputs(model), native)

    def test_without_a_copy_of_what_the_weights_were(self, tmp_path: Path) -> None:
        """As the command does, which has no use for the model afterwards."""
        model = adapt(llama(), lora_alpha=3)
        export(model, tmp_path / "copied", "merged")
        assert peft.write(model, tmp_path / "in-place", "merged", restore=False) == []
        one, other = (
            load_file(tmp_path / name / "model.safetensors") for name in ("copied", "in-place")
        )
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
        name = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(model.get_parameter(name), other[name])

    def test_of_an_embedding_that_would_be_tied_again(self, tmp_path: Path) -> None:
        model = models.t5()
        model.shared = copy.deepcopy(model.shared)
        model.config.tie_word_embeddings = False
        adapt(model, target_modules=["q"], modules_to_save=["shared"])
        with torch.no_grad():
            model.shared.weight.add_(1.0)
        with pytest.raises(ValueError, match=r"leaves out \w+\.embed_tokens\.weight, which"):
            export(model, tmp_path, "merged")
        assert not [*tmp_path.iterdir()]

    def test_of_weights_that_are_fused_in_the_file(self, tmp_path: Path) -> None:
        """As transformers saves what it splits when it loads: no tensor there is the weight."""
        sizes = {"intermediate_size": 48, "max_position_embeddings": 32}
        model = models.build("NomicBertModel", "NomicBertConfig", **sizes)
        reload_merged(adapt(model, r=2, target_modules="all-linear"), tmp_path)
        names = {target.name for target in model.lora_bank.targets}
        assert (
            not {f"{n}.weight" for n in names} <= load_file(tmp_path / "model.safetensors").keys()
        )

    def test_of_a_class_with_a_save_of_its_own(self, tmp_path: Path) -> None:
        """It takes no state dict: its own one is of the merged model, and then as before."""
        hub = pytest.importorskip("huggingface_hub")

        class Hub(nn.Module, hub.PyTorchModelHubMixin):  # type: ignore[misc]
            def __init__(self, size: int = 4) -> None:
                super().__init__()
                self.query = nn.Linear(size, size)

            def forward(self, x: Tensor) -> Tensor:
                return self.query(x)

        torch.manual_seed(0)
        model, x = Hub(), torch.randn(3, 4)
        loradrop.inject(model, loradrop.LoRAConfig(r=2, target_modules=["query"]))
        models.wake(model)
        before, expected = snapshot(model), model(x)
        export(model, tmp_path / "merged", "merged")
        assert_same(model, before)
        torch.testing.assert_close(Hub.from_pretrained(tmp_path / "merged")(x), expected)
        model.save_pretrained(tmp_path / "base")
        assert set(load_file(tmp_path / "base" / "model.safetensors")) == {
            "query.weight", "query.bias",
        }  # fmt: skip
        found = Hub.from_pretrained(tmp_path / "base")
        loradrop.load(found, tmp_path / "base")
        assert torch.equal(found(x), expected)

    def test_of_a_class_that_saves_into_folders(self, tmp_path: Path) -> None:
        """As a SentenceTransformer: each of its links into one."""
        model, x = adapt(Links(), r=2), torch.randn(3, 4)
        before = snapshot(model)
        for _ in range(2):  # also over an earlier one
            export(model, tmp_path, "merged")
        assert_same(model, before)
        found = Links()
        for name, link in found.named_children():
            link.load_state_dict(load_file(tmp_path / name / "model.safetensors"))
        torch.testing.assert_close(found(x), model(x))
        names = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
        assert names == {"query/model.safetensors", "value/model.safetensors"}

    def test_what_was_written_is_read_back(self, tmp_path: Path) -> None:
        class Forgetful(nn.Module):
            """Its save_pretrained saves other weights than it has."""

            def __init__(self) -> None:
                super().__init__()
                self.query = nn.Linear(4, 4)
                self.first = self.query.weight.detach().clone()

            def save_pretrained(self, folder: str, **_: Any) -> None:
                save_file({"query.weight": self.first}, f"{folder}/model.safetensors")

        model = Forgetful()
        loradrop.inject(model, loradrop.LoRAConfig(r=2, target_modules=["query"]))
        models.wake(model)
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"Forgetful does not write.*loradrop\.merge"):
            export(model, tmp_path, "merged")
        assert not list(tmp_path.iterdir())
        assert_same(model, before)

    def test_what_was_fused_is_read_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A model of transformers whose file has the base's weights is refused as well."""
        model = adapt(bert())
        base = bert()
        save = type(base).save_pretrained
        monkeypatch.setattr(type(base), "save_pretrained", lambda _, folder: save(base, folder))
        with pytest.raises(ValueError, match="BertForSequenceClassification does not write"):
            export(model, tmp_path, "merged")
        assert not list(tmp_path.iterdir())

    def test_rounds_once(self, tmp_path: Path) -> None:
        model = adapt(llama().to(torch.bfloat16))
        export(model, tmp_path, "merged")
        found = load_file(tmp_path / "model.safetensors")
        for i, target in enumerate(model.lora_bank.targets):
            weight = model.get_submodule(target.name).weight
            exact = weight.double() + model.lora_bank.delta(i).double()
            assert torch.equal(found[f"{target.name}.weight"], exact.float().bfloat16())
            assert not torch.equal(found[f"{target.name}.weight"], weight)

    def test_of_a_reversible_merge_adds_nothing(self, tmp_path: Path) -> None:
        model = adapt(llama())
        native = outputs(model)
        loradrop.merge(model, keep_original=True)
        reload_merged(model, tmp_path)
        torch.testing.assert_close(outputs(model), native, rtol=1e-4, atol=1e-5)

    def test_replaces_a_save_in_parts(self, tmp_path: Path) -> None:
        model = llama()
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        reload_merged(adapt(model), tmp_path)
        assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
        assert not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize("format", ["merged", "peft"])
    def test_not_into_the_base_s_own_folder(self, format: str, tmp_path: Path) -> None:
        llama().save_pretrained(tmp_path)
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        model = adapt(AutoModelForCausalLM.from_pretrained(tmp_path))
        with pytest.raises(ValueError, match="is the base model's own folder: choose another"):
            export(model, tmp_path, format)
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before

    def test_nor_an_adapter_beside_it(self, tmp_path: Path) -> None:
        """Whoever loads the folder would add the adapter to weights that hold it already."""
        model = adapt(llama())
        export(model, tmp_path, "merged")
        before = {file.name for file in tmp_path.iterdir()}
        with pytest.raises(ValueError, match="holds a model, on which the adapter would be loaded"):
            export(model, tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == before
        export(model, tmp_path / "adapter")
        (tmp_path / "adapter" / "adapter_config.json").rename(tmp_path / "adapter_config.json")
        with pytest.raises(ValueError, match="holds a model and an adapter"):
            loradrop.verify(model, tmp_path, [{"input_ids": torch.arange(4)[None]}])

    def test_not_beside_an_adapter(self, tmp_path: Path) -> None:
        model = adapt(llama())
        export(model, tmp_path)
        loradrop.save(model, tmp_path / "native")
        for folder in (tmp_path, tmp_path / "native"):
            with pytest.raises(ValueError, match="holds an adapter"):
                export(model, folder, "merged")


# What `verify` makes of them


def test_a_merged_model_is_compared_as_well(tmp_path: Path) -> None:
    """By the one function; what is of PEFT's files is refused for it."""
    model = adapt(bert())
    loradrop.export(model, tmp_path, format="merged")
    report = verify(model, tmp_path, BATCHES)
    assert report.ok and report.loader == "merged" and not report.rows
    with pytest.raises(ValueError, match="is a merged model: engines and tolerance"):
        verify(model, tmp_path, BATCHES, engines=["vllm"])
    wake(model)
    assert not verify(model, tmp_path, BATCHES).ok


def test_a_merged_model_of_a_narrow_dtype_without_the_adapter(tmp_path: Path) -> None:
    """Its logits are rounded by more than this adapter moves them, and its weights tell."""
    model = adapt(llama().bfloat16(), r=2, target_modules=["q_proj", "v_proj"])
    with torch.no_grad():
        for B in model.lora_bank.B:
            B.mul_(1e-4)
    loradrop.export(model, tmp_path / "merged", format="merged")
    llama().bfloat16().save_pretrained(tmp_path / "base")
    merged, base = (verify(model, tmp_path / name, BATCHES) for name in ("merged", "base"))
    assert merged.ok and not merged.differing
    assert base.relative < base.tolerance and not base.ok and len(base.differing) == 4
    assert "weights: DIFFER from W + s·B·A in " in base.table() and "and 1 more" in base.table()
    file = tmp_path / "merged" / "model.safetensors"
    name = "model.layers.0.self_attn.v_proj"
    spoilt = load_file(file) | {f"{name}.weight": torch.full((16, 32), torch.nan).bfloat16()}
    save_file(spoilt, file, {"format": "pt"})
    assert verify(model, tmp_path / "merged", BATCHES).differing == (name,)
