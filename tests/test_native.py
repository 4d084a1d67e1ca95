"""Native files: every tensor once, bit for bit, whole or not there, and damage has a name."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loradrop
from loradrop import LoRAConfig, LoraDropConfig, Plan
from loradrop.files import read_json, write_json
from loradrop.formats.native import FOLDER, PLAN, TENSORS, read
from loradrop.injection import injection_of, plan_of

IDS = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(5))


def bert(layers: int = 3, hidden: int = 32, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=48)
    config = hf.BertConfig(**sizes, num_attention_heads=4, initializer_range=0.2, **options)
    return hf.BertForSequenceClassification(config).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()


def adapt(model: nn.Module, config: LoRAConfig | None = None) -> nn.Module:
    loradrop.inject(model, config or LoraDropConfig(r=4, lora_alpha=12))
    return fill(model)


def fill(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every trained tensor a value that shows in the logits."""
    bank, state = model.lora_bank, model.state_dict()
    torch.manual_seed(seed)
    for tensor in (*bank.parameters(), *(state[name] for name in injection_of(model).originals)):
        tensor.data.add_((torch.randn(tensor.shape) * 0.3).to(tensor.dtype))
    return model


def shared(model: nn.Module, how: str = "group") -> nn.Module:
    bank = model.lora_bank
    loradrop.share(model, [bank.targets[0].name, bank.targets[3].name], share=how)
    return fill(model, 2)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def rewrite(
    file: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None] = lambda t, m: None
) -> None:
    """Write the file again with other tensors or another header."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A model, and the folder that holds its adapters."""
    model = adapt(bert())
    loradrop.save(model, tmp_path)
    return model, tmp_path


class TestRoundTrip:
    @pytest.mark.parametrize("how", ["own", "group", "none"])
    def test_bit_for_bit(self, how: str, tmp_path: Path) -> None:
        model, base = adapt(bert()), bert()
        if how != "own":
            shared(model, how)
        loradrop.save(model, tmp_path)
        found = bert()
        bank = loradrop.load(found, tmp_path)
        assert torch.equal(logits(found), logits(model))
        assert not torch.allclose(logits(found), logits(base), atol=1e-2)
        assert bank is found.lora_bank and bank.slots == model.lora_bank.slots
        assert bank.targets == model.lora_bank.targets
        assert injection_of(found).config == injection_of(model).config
        found.load_state_dict(model.state_dict())  # the very same keys

    def test_into_an_injected_model(self, saved: tuple[nn.Module, Path]) -> None:
        model, path = saved
        shared(model)
        loradrop.save(model, path)
        found = fill(adapt(bert()), 3)
        bank = found.lora_bank
        assert loradrop.load(found, path) is bank
        assert torch.equal(logits(found), logits(model))

    def test_rslora_and_patterns(self, tmp_path: Path) -> None:
        patterns = {"rank_pattern": {"value": 7}, "alpha_pattern": {"1.*query": 3}}
        model = adapt(bert(), LoRAConfig(r=4, use_rslora=True, **patterns))
        loradrop.save(model, tmp_path)
        found = bert()
        assert loradrop.load(found, tmp_path).scaling == model.lora_bank.scaling
        assert torch.equal(logits(found), logits(model))

    @pytest.mark.parametrize("adapter_dtype", ["float32", "base"])
    def test_half_precision(self, adapter_dtype: str, tmp_path: Path) -> None:
        config = LoRAConfig(r=4, adapter_dtype=adapter_dtype)
        model = adapt(bert().to(torch.bfloat16), config)
        loradrop.save(model, tmp_path)
        found = bert().to(torch.bfloat16)
        bank = loradrop.load(found, tmp_path)
        assert {p.dtype for p in bank.parameters()} == {
            p.dtype for p in model.lora_bank.parameters()
        }
        assert torch.equal(logits(found), logits(model))

    def test_trains_on(self, saved: tuple[nn.Module, Path]) -> None:
        model, path = saved
        shared(model)
        loradrop.save(model, path)
        found = bert()
        loradrop.load(found, path)
        found(input_ids=IDS, labels=torch.tensor([0, 1, 0])).loss.backward()
        trained = {name for name, p in found.named_parameters() if p.requires_grad}
        assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(found.get_parameter(name).grad.any() for name in trained)

    def test_remove_restores_the_base_after_a_load(self, saved: tuple[nn.Module, Path]) -> None:
        found, base = bert(), bert()
        loradrop.load(found, saved[1])
        loradrop.remove(found)
        assert torch.equal(logits(found), logits(base))

    def test_the_plan_is_kept(self, tmp_path: Path) -> None:
        model = adapt(bert())
        scores = loradrop.probe(model, [{"input_ids": IDS}])
        loradrop.share(model, loradrop.select(scores, keep=2))
        loradrop.save(model, tmp_path)
        plan = read(tmp_path).plan
        assert plan.kept is not None and len(plan.kept) == 2
        assert plan.scores["values"] == dict(scores)
        again = tmp_path / "again"
        found = bert()
        loradrop.load(found, tmp_path)
        assert plan_of(found) == plan
        loradrop.save(found, again)
        (plan, bank, saved), (same_plan, same_bank, same_saved) = read(tmp_path), read(again)
        tensors, same_tensors = bank | saved, same_bank | same_saved
        assert plan == same_plan and tensors.keys() == same_tensors.keys()
        assert all(torch.equal(tensors[key], same_tensors[key]) for key in tensors)
        assert (again / PLAN).read_bytes() == (tmp_path / PLAN).read_bytes()


class TestSize:
    def test_each_tensor_once(self, tmp_path: Path) -> None:
        model = shared(adapt(bert()))
        loradrop.save(model, tmp_path)
        tensors = load_file(tmp_path / TENSORS)
        pairs = {f"bank.{side}.{k}" for side in "AB" for k in range(4)}  # 2 own, 1 for each type
        assert set(tensors) == pairs | {"saved.classifier.weight", "saved.classifier.bias"}
        numbers = sum(tensor.numel() for tensor in tensors.values())
        assert numbers == 4 * 4 * (32 + 32) + 2 * 32 + 2
        assert (tmp_path / TENSORS).stat().st_size < 4 * numbers + 8192  # and its header

    def test_sharing_makes_the_file_smaller(self, tmp_path: Path) -> None:
        model = adapt(bert(12))
        loradrop.save(model, tmp_path / "own")
        loradrop.share(model, [])
        loradrop.save(model, tmp_path / "shared")
        own, shared = (load_file(tmp_path / name / TENSORS) for name in ("own", "shared"))
        assert (len(own), len(shared)) == (2 * 24 + 2, 2 * 2 + 2)

    def test_only_two_files(self, saved: tuple[nn.Module, Path]) -> None:
        assert sorted(file.name for file in saved[1].iterdir()) == [TENSORS, PLAN]


class TestModulesToSave:
    def test_the_head_by_itself(self, saved: tuple[nn.Module, Path]) -> None:
        model, path = saved
        found = bert()
        assert not torch.equal(found.classifier.weight, model.classifier.weight)
        loradrop.load(found, path)
        assert torch.equal(found.classifier.weight, model.classifier.weight)
        assert torch.equal(found.classifier.bias, model.classifier.bias)

    def test_named_ones(self, tmp_path: Path) -> None:
        model = adapt(bert(), LoRAConfig(r=4, modules_to_save=["pooler"]))
        loradrop.save(model, tmp_path)
        names = {key for key in load_file(tmp_path / TENSORS) if key.startswith("saved.")}
        assert names == {"saved.bert.pooler.dense.weight", "saved.bert.pooler.dense.bias"}
        found = bert()
        loradrop.load(found, tmp_path)
        assert torch.equal(logits(found), logits(model))


class TestAtomic:
    def test_a_failing_save_leaves_the_last_one(
        self, saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, path = saved
        before = {file.name: file.read_bytes() for file in path.iterdir()}

        def full(*args: Any) -> None:
            raise OSError("no space left on device")

        fill(model, 3)
        for call in ("fsync", "replace"):
            with monkeypatch.context() as patch:
                patch.setattr(os, call, full)
                with pytest.raises(OSError, match="no space left"):
                    loradrop.save(model, path)
            assert {file.name: file.read_bytes() for file in path.iterdir()} == before

    def test_killed_while_it_saves(self, tmp_path: Path) -> None:
        code = f"""
import itertools, torch, loradrop
from torch import nn
model = nn.Sequential(nn.Linear(400, 400))
loradrop.inject(model, loradrop.LoRAConfig(r=200, target_modules=["0"]))
for step in itertools.count():
    for parameter in model.lora_bank.parameters():
        parameter.data.fill_(step)
    loradrop.save(model, {str(tmp_path)!r})
    print(step, flush=True)
"""
        command, seen = [sys.executable, "-c", code], -1
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while seen < 5:
                seen = int(process.stdout.readline())
            process.kill()
            seen = max([seen, *map(int, process.stdout.read().split())])
        model = nn.Sequential(nn.Linear(400, 400))
        bank = loradrop.load(model, tmp_path)
        values = {float(value) for p in bank.parameters() for value in p.detach().aminmax()}
        assert values in ({float(seen)}, {float(seen + 1)})  # of one step, the last or the next


class TestDamage:
    @pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9, 0.9999])
    def test_truncated(self, part: float, saved: tuple[nn.Module, Path]) -> None:
        file = saved[1] / TENSORS
        whole = file.read_bytes()
        file.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(ValueError, match=rf"{TENSORS} is damaged or half-written .* bytes\)"):
            loradrop.load(bert(), saved[1])

    @pytest.mark.parametrize("part", [0.5, 0.75, 0.999])
    def test_a_flipped_bit_of_a_tensor(self, part: float, saved: tuple[nn.Module, Path]) -> None:
        file = saved[1] / TENSORS
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start + int(part * (len(data) - start))] ^= 1
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{TENSORS} is damaged: .* checksum"):
            loradrop.load(bert(), saved[1])

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (rb"\"lora_alpha\": 12", rb"\"lora_alpha\": 13"),
            (rb"query", rb"kuery"),
            (rb'"dtype":"F32"', rb'"dtype":"I32"'),
            (rb"bank.A.0", rb"bank.A.9"),
        ],
    )
    def test_a_changed_header(self, old: bytes, new: bytes, saved: tuple[nn.Module, Path]) -> None:
        file = saved[1] / TENSORS
        data = file.read_bytes()
        assert old in data
        file.write_bytes(data.replace(old, new, 1))
        with pytest.raises(ValueError, match=rf"{TENSORS}.* damaged"):
            loradrop.load(bert(), saved[1])

    def test_the_model_is_untouched_by_a_file_that_is_refused(
        self, saved: tuple[nn.Module, Path]
    ) -> None:
        rewrite(saved[1] / TENSORS, lambda tensors, _: tensors["bank.B.1"].add_(1))
        found, base = bert(), bert()
        with pytest.raises(ValueError, match="checksum"):
            loradrop.load(found, saved[1])
        assert not hasattr(found, "lora_bank") and torch.equal(logits(found), logits(base))


class TestPickle:
    @pytest.mark.parametrize("name", ["adapter.bin", "adapter.pt", TENSORS])
    @pytest.mark.parametrize("legacy", [False, True])
    def test_refused(self, name: str, legacy: bool, tmp_path: Path) -> None:
        file = tmp_path / name
        tensors = {"bank.A.0": torch.ones(2, 3)}
        torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match=rf"{name} is a pickle, which can run any code"):
            loradrop.load(bert(), file)

    def test_a_good_file_that_begins_like_one(self, saved: tuple[nn.Module, Path]) -> None:
        """Its first byte is that of the header's length, and 0x80 is as good as any."""
        model, path = saved
        file = path / TENSORS
        for pad in range(0, 2100, 8):
            rewrite(file, lambda _, metadata, pad=pad: metadata.update(pad="x" * pad))
            if file.read_bytes()[0] == 0x80:
                break
        assert file.read_bytes()[0] == 0x80
        found = bert()
        loradrop.load(found, path)
        assert torch.equal(logits(found), logits(model))


class TestOtherModels:
    def test_fewer_layers(self, saved: tuple[nn.Module, Path]) -> None:
        message = (
            r"another model.*\n  bert\.encoder\.layer\.2\.attention\.self\.query: 32 -> 32 in the "
            r"file, not there in the model\n  bert\.encoder\.layer\.2\.attention\.self\.value"
        )
        with pytest.raises(ValueError, match=message):
            loradrop.load(bert(2), saved[1])

    def test_another_width(self, saved: tuple[nn.Module, Path]) -> None:
        with pytest.raises(ValueError, match=r"query: 32 -> 32 in the file, 64 -> 64 in the model"):
            loradrop.load(bert(hidden=64), saved[1])

    def test_another_head(self, saved: tuple[nn.Module, Path]) -> None:
        message = r"classifier\.weight: \(2, 32\) in the file, \(5, 32\) in the model"
        found = bert(num_labels=5)
        with pytest.raises(ValueError, match=message):
            loradrop.load(found, saved[1])
        assert not hasattr(found, "lora_bank")

    def test_another_architecture(self, saved: tuple[nn.Module, Path]) -> None:
        with pytest.raises(
            ValueError, match=r"These differ:\n  bert\.encoder\.layer\.0.*not there"
        ):
            loradrop.load(llama(), saved[1])

    def test_injected_with_other_targets(self, saved: tuple[nn.Module, Path]) -> None:
        found = adapt(bert(), LoRAConfig(r=4, target_modules=["key"]))
        with pytest.raises(ValueError, match=r"adapts other targets.*loradrop\.remove\(model\)"):
            loradrop.load(found, saved[1])

    def test_injected_with_another_scale(self, saved: tuple[nn.Module, Path]) -> None:
        """The file's own scale holds, or the model is refused; never another scale in silence."""
        model, path = saved
        found = adapt(bert(), LoRAConfig(r=4, lora_alpha=40))
        try:
            loradrop.load(found, path)
        except ValueError as error:
            assert "lora_alpha" in str(error)
        else:
            assert torch.equal(logits(found), logits(model))


class TestPlan:
    def test_a_newer_schema(self, saved: tuple[nn.Module, Path]) -> None:
        def newer(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
            metadata["plan"] = json.dumps(json.loads(metadata["plan"]) | {"schema": 99})

        rewrite(saved[1] / TENSORS, newer)
        with pytest.raises(ValueError, match=rf"{TENSORS}.*schema 99.*upgrade loradrop"):
            loradrop.load(bert(), saved[1])

    def test_no_plan(self, saved: tuple[nn.Module, Path]) -> None:
        rewrite(saved[1] / TENSORS, lambda _, metadata: metadata.pop("plan"))
        with pytest.raises(ValueError, match=r"not a native loradrop adapter.*load a PEFT"):
            loradrop.load(bert(), saved[1])

    def test_a_plan_beside_it_that_disagrees(
        self, saved: tuple[nn.Module, Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        model, path = saved
        plan = json.loads((path / PLAN).read_text())
        (path / PLAN).write_text(json.dumps(plan | {"slots": [0] * 6}))
        found = bert()
        with caplog.at_level(logging.WARNING, "loradrop"):
            bank = loradrop.load(found, path)
        assert "plan.json is not the plan in the header" in caplog.text
        assert bank.slots == tuple(range(6)) and torch.equal(logits(found), logits(model))

    @pytest.mark.parametrize("text", [None, '{"schema": 1, "tar'])
    def test_a_plan_beside_it_that_is_gone_or_damaged(
        self, text: str | None, saved: tuple[nn.Module, Path]
    ) -> None:
        model, path = saved
        (path / PLAN).unlink() if text is None else (path / PLAN).write_text(text)
        found = bert()
        loradrop.load(found, path)
        assert torch.equal(logits(found), logits(model))

    def test_an_equal_plan_warns_of_nothing(
        self, saved: tuple[nn.Module, Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "loradrop"):
            loradrop.load(bert(), saved[1])
        assert not caplog.text


class TestSavePretrained:
    def test_loses_nothing(self, tmp_path: Path) -> None:
        model = shared(adapt(bert()))
        model.save_pretrained(tmp_path)
        assert not [key for key in load_file(tmp_path / "model.safetensors") if "lora" in key]
        found, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert (tmp_path / FOLDER / TENSORS).exists()
        loradrop.load(found.eval(), tmp_path)
        assert torch.equal(logits(found), logits(model))

    def test_the_base_model_beside_it_is_the_base_model(self, tmp_path: Path) -> None:
        model, base = adapt(llama()), llama()
        model.save_pretrained(tmp_path)
        found = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(logits(found), logits(base))

    def test_plain_again_after_remove(self, tmp_path: Path) -> None:
        model = adapt(bert())
        loradrop.remove(model)
        model.save_pretrained(tmp_path)
        assert not (tmp_path / FOLDER).exists()

    def test_not_while_merged(self, tmp_path: Path) -> None:
        model = adapt(bert())
        loradrop.merge(model, keep_original=True)
        with pytest.raises(ValueError, match=r"merged for now: call loradrop\.remove"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{TENSORS} is not there: give the folder"):
        loradrop.load(bert(), tmp_path)


def test_without_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"call loradrop\.inject"):
        loradrop.save(bert(), tmp_path)
    assert not list(tmp_path.iterdir())


class TestEarlierReleases:
    """`data/adapter-0.1.0` was written by loradrop 0.1.0, whose plan has schema 1."""

    FOLDER = Path(__file__).parent / "data" / "adapter-0.1.0"

    def model(self) -> nn.Module:
        sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2)
        config = hf.BertConfig(
            **sizes, intermediate_size=32, max_position_embeddings=32, num_labels=3
        )
        return hf.BertForSequenceClassification(config)

    def test_an_adapter(self) -> None:
        model = self.model()
        bank = loradrop.load(model, self.FOLDER)
        deltas = load_file(self.FOLDER / "deltas.safetensors")
        assert len(bank.targets) == len(deltas) == 8
        for i, target in enumerate(bank.targets):
            assert deltas[target.name].abs().max() > 1e-3
            torch.testing.assert_close(bank.delta(i), deltas[target.name], rtol=1e-5, atol=1e-7)
        head = read(self.FOLDER).trained
        assert torch.equal(model.classifier.weight, head["classifier.weight"])

    def test_its_plan(self, tmp_path: Path) -> None:
        plan = Plan.from_dict(read_json(self.FOLDER / PLAN))
        assert plan.slots == (0, 1, 2, 1, 3, 1, 2, 4) and plan.parameters == 576
        layer = "bert.encoder.layer.{}.attention.self.{}".format
        assert plan.kept == (layer(2, "query"), layer(3, "value"))
        assert plan.config.method.importance == "root"  # it was called "norm"
        assert plan.warmup["steps"] == 10 and plan.scores["rows"] == 10
        write_json(tmp_path / PLAN, plan.to_dict())
        assert Plan.from_dict(read_json(tmp_path / PLAN)) == plan
