"""Native files: every tensor once, bit for bit, and damage has a name."""

import copy
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import IDS, Make, Options, assert_same, bert, fill, llama, outputs, share, snapshot
from native_cases import OURS, adapt, loaded, model, path, same
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loradrop
from loradrop import LoRAConfig, Plan
from loradrop.bank import has_bank
from loradrop.command.adapter_bases import load_base
from loradrop.files import read_json, write_json
from loradrop.injection import injection_of, plan_of
from loradrop.native import FOLDER, PLAN, TENSORS, read

__all__ = ["model", "path"]  # fixtures


def rewrite(file: Path, change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> None:
    """Write the file again with other tensors or another header."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def refused(message: str, path: Path, found: Any = None) -> None:
    """By a ValueError, and the model is as it was."""
    found = bert() if found is None else found
    before = snapshot(found)
    with pytest.raises(ValueError, match=message):
        loradrop.load(found, path)
    assert_same(found, before)


def test_a_pattern_without_effect_does_not_stop_a_load(tmp_path: Path) -> None:
    loose = replace(OURS, exclude_modules=("gone",), rank_pattern={"gone": 2}, strict=False)
    model = adapt(bert(), loose)
    injection_of(model).config = replace(loose, strict=True)  # as earlier versions allowed
    loradrop.save(model, tmp_path)
    found = loaded(tmp_path)
    assert same(found, model) and injection_of(found).config == injection_of(model).config


@pytest.mark.parametrize("ties", [True, False], ids=["saved tied", "saved apart"])
def test_what_is_tied_otherwise_than_as_it_was_saved(ties: bool, tmp_path: Path) -> None:
    """One value would go into both, or only into one of them."""

    def base(tied: bool) -> Any:
        model = llama(tie_word_embeddings=True)
        if not tied:
            model.model.embed_tokens = copy.deepcopy(model.model.embed_tokens)
        return model

    model = models.adapt(base(ties), modules_to_save=["embed_tokens"])
    loradrop.save(model, tmp_path)
    assert same(loaded(tmp_path, base(ties)), model)
    name = r"lm_head\.weight {} the same tensor as model\.embed_tokens\.weight"
    refused(name.format("was" if ties else "is"), tmp_path, found := base(not ties))
    remedy = "tie them as they were, (.*)" if ties else r"first \((.*), and of"
    with pytest.raises(ValueError) as refusal:
        loradrop.load(found, tmp_path)
    told = re.search(remedy, str(refusal.value))
    assert told is not None
    exec(told[1], {"model": found, "copy": copy})
    torch.testing.assert_close(outputs(loaded(tmp_path, found)), outputs(model))


def test_a_base_is_untied_for_an_adapter_that_was_saved_apart(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = type(llama()).from_pretrained(tmp_path / "base").eval()
    model.model.embed_tokens = copy.deepcopy(model.model.embed_tokens)
    loradrop.save(models.adapt(model, modules_to_save=["embed_tokens"]), tmp_path / "adapter")
    found, _ = load_base(tmp_path / "adapter")
    torch.testing.assert_close(outputs(loaded(tmp_path / "adapter", found)), outputs(model))


class TestRoundTrip:
    @pytest.mark.parametrize("how", ["own", "group", "none"])
    def test_bit_for_bit(self, how: str, model: Any, tmp_path: Path) -> None:
        if how != "own":
            share(model, [0, 3], how)
        loradrop.save(model, tmp_path)
        found = bert()
        bank = loradrop.load(found, tmp_path)
        assert same(found, model)
        assert not torch.allclose(outputs(found), outputs(bert()), atol=1e-2)
        assert bank is found.lora_bank and bank.slots == model.lora_bank.slots
        assert bank.targets == model.lora_bank.targets
        assert injection_of(found).config == injection_of(model).config
        found.load_state_dict(model.state_dict())  # the very same keys

    def test_into_an_injected_model(self, model: Any, tmp_path: Path) -> None:
        loradrop.save(share(model, [0, 3]), tmp_path)
        found = fill(adapt(bert()), 3)
        assert loradrop.load(found, tmp_path) is found.lora_bank
        assert same(found, model)

    def test_rslora_and_patterns(self, tmp_path: Path) -> None:
        patterns = {"rank_pattern": {"value": 7}, "alpha_pattern": {"1.*query": 3}}
        model = adapt(bert(), LoRAConfig(r=4, use_rslora=True, **patterns))
        loradrop.save(model, tmp_path)
        found = loaded(tmp_path)
        assert found.lora_bank.scaling == model.lora_bank.scaling and same(found, model)

    @pytest.mark.parametrize("adapter_dtype", ["float32", "base"])
    def test_half_precision(self, adapter_dtype: str, tmp_path: Path) -> None:
        model = adapt(bert().bfloat16(), LoRAConfig(r=4, adapter_dtype=adapter_dtype))
        loradrop.save(model, tmp_path)
        found = loaded(tmp_path, bert().bfloat16())
        here, there = ({p.dtype for p in m.lora_bank.parameters()} for m in (found, model))
        assert here == there and same(found, model)

    def test_trains_on(self, model: Any, tmp_path: Path) -> None:
        loradrop.save(share(model, [0, 3]), tmp_path)
        found = loaded(tmp_path)
        found(input_ids=IDS, labels=torch.tensor([0, 1, 0])).loss.backward()
        trained = {name for name, p in found.named_parameters() if p.requires_grad}
        assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(found.get_parameter(name).grad.any() for name in trained)

    def test_remove_restores_the_base_after_a_load(self, path: Path) -> None:
        found = loaded(path)
        loradrop.remove(found)
        assert same(found, bert())

    def test_the_plan_is_kept(self, model: Any, tmp_path: Path) -> None:
        scores = loradrop.probe(model, [{"input_ids": IDS}])
        loradrop.share(model, loradrop.select(scores, keep=2))
        loradrop.save(model, tmp_path)
        plan = read(tmp_path).plan
        assert plan.kept is not None and len(plan.kept) == 2
        assert plan.scores["values"] == dict(scores)
        again, found = tmp_path / "again", loaded(tmp_path)
        assert plan_of(found) == plan
        loradrop.save(found, again)
        (plan, bank, saved, _), (same_plan, same_bank, same_saved, _) = read(tmp_path), read(again)
        tensors, same_tensors = bank | saved, same_bank | same_saved
        assert plan == same_plan and tensors.keys() == same_tensors.keys()
        assert all(torch.equal(tensors[key], same_tensors[key]) for key in tensors)
        assert (again / PLAN).read_bytes() == (tmp_path / PLAN).read_bytes()


class TestSize:
    def test_each_tensor_once_in_one_of_two_files(self, model: Any, tmp_path: Path) -> None:
        loradrop.save(share(model, [0, 3]), tmp_path)
        tensors = load_file(tmp_path / TENSORS)
        slots = range(4)  # 2 own, 1 for each type
        pairs = {f"bank.{side}.{k}" for side in "AB" for k in slots}
        assert set(tensors) == pairs | {"saved.classifier.weight", "saved.classifier.bias"}
        numbers = sum(tensor.numel() for tensor in tensors.values())
        assert numbers == 4 * 4 * (32 + 32) + 2 * 32 + 2
        assert (tmp_path / TENSORS).stat().st_size < 4 * numbers + 8192  # and its header
        assert sorted(file.name for file in tmp_path.iterdir()) == [TENSORS, PLAN]

    def test_sharing_makes_the_file_smaller(self, tmp_path: Path) -> None:
        model = adapt(bert(12))
        loradrop.save(model, tmp_path / "own")
        loradrop.share(model, [])
        loradrop.save(model, tmp_path / "shared")
        own, shared = (load_file(tmp_path / name / TENSORS) for name in ("own", "shared"))
        assert (len(own), len(shared)) == (2 * 24 + 2, 2 * 2 + 2)


@pytest.mark.parametrize("name", ["classifier", "bert.pooler.dense"])
def test_modules_to_save(name: str, tmp_path: Path) -> None:
    model = adapt(bert(), LoRAConfig(r=4, modules_to_save=[name.removesuffix(".dense")]))
    loradrop.save(model, tmp_path)
    names = {key for key in load_file(tmp_path / TENSORS) if key.startswith("saved.")}
    assert names == {f"saved.{name}.weight", f"saved.{name}.bias"}
    found = bert()
    assert not torch.equal(found.get_submodule(name).weight, model.get_submodule(name).weight)
    assert same(loaded(tmp_path, found), model)


def test_a_model_without_values(path: Path) -> None:
    """On the meta device what is read would be lost."""
    found = bert().to("meta")
    with pytest.raises(ValueError, match="is on the meta device, where no adapter can have values"):
        loradrop.load(found, path)
    assert not has_bank(found)


def test_what_only_an_adapter_before_trained_whole(tmp_path: Path) -> None:
    """The next one that is loaded leaves no trace of it."""
    loradrop.save(adapt(bert(), LoRAConfig(r=4, modules_to_save=["classifier"])), tmp_path / "a")
    loradrop.save(adapt(bert(), LoRAConfig(r=4, modules_to_save=[])), tmp_path / "b")
    found, fresh = bert(), bert()
    for name in ("a", "b"):
        loradrop.load(found, tmp_path / name)
    loradrop.load(fresh, tmp_path / "b")
    trained = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (found, fresh)]
    assert trained[0] == trained[1] and same(found, fresh)
    loradrop.save(found, tmp_path / "c")
    assert not [key for key in load_file(tmp_path / "c" / TENSORS) if key.startswith("saved.")]


class TestDamage:
    @pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9, 0.9999])
    def test_truncated(self, part: float, path: Path) -> None:
        whole = (path / TENSORS).read_bytes()
        (path / TENSORS).write_bytes(whole[: int(part * len(whole))])
        refused(rf"{TENSORS} is damaged or half-written .* bytes\)", path)

    @pytest.mark.parametrize("part", [0.5, 0.75, 0.999])
    def test_a_flipped_bit_of_a_tensor(self, part: float, path: Path) -> None:
        data = bytearray((path / TENSORS).read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start + int(part * (len(data) - start))] ^= 1
        (path / TENSORS).write_bytes(data)
        refused(rf"{TENSORS} is damaged: .* checksum", path)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (rb"\"lora_alpha\": 12", rb"\"lora_alpha\": 13"),
            (rb"query", rb"kuery"),
            (rb'"dtype":"F32"', rb'"dtype":"I32"'),
            (rb"bank.A.0", rb"bank.A.9"),
        ],
    )
    def test_a_changed_header(self, old: bytes, new: bytes, path: Path) -> None:
        data = (path / TENSORS).read_bytes()
        assert old in data
        (path / TENSORS).write_bytes(data.replace(old, new, 1))
        refused(rf"{TENSORS}.* damaged", path)


@pytest.mark.parametrize("name", ["adapter.bin", "adapter.pt", TENSORS])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_refused(name: str, legacy: bool, tmp_path: Path) -> None:
    tensors = {"bank.A.0": torch.ones(2, 3)}
    torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    refused(rf"{name} is a pickle, which can run any code", tmp_path / name)


def test_a_good_file_that_begins_like_a_pickle(model: Any, path: Path) -> None:
    """Its first byte is that of the header's length, and 0x80 is as good as any."""
    for pad in range(0, 2100, 8):
        rewrite(path / TENSORS, lambda _, metadata, pad=pad: metadata.update(pad="x" * pad))
        if (path / TENSORS).read_bytes()[0] == 0x80:
            break
    assert (path / TENSORS).read_bytes()[0] == 0x80
    assert same(loaded(path), model)


def injected(**options: Any) -> Any:
    return adapt(bert(), LoRAConfig(**{"r": 4} | options))


HEAD = r"classifier\.weight: \(2, 32\) in the file, \(5, 32\) in the model"
FEWER = (
    r"another model.*\n  bert\.encoder\.layer\.2\.attention\.self\.query: 32 -> 32 in the file, "
    r"not there in the model\n  bert\.encoder\.layer\.2\.attention\.self\.value"
)
OTHERS: list[tuple[Make, Options, str]] = [
    (bert, {"layers": 2}, FEWER),
    (bert, {"hidden": 64}, "query: 32 -> 32 in the file, 64 -> 64 in the model"),
    (bert, {"num_labels": 5}, HEAD),
    (llama, {}, r"These differ:\n  bert\.encoder\.layer\.0.*not there"),
    (injected, {"target_modules": ["key"]}, r"adapts other targets.*loradrop\.remove\(model\)"),
    (injected, {"lora_alpha": 40}, "another scale .*lora_alpha"),  # never in silence
    (injected, {"r": 2, "lora_alpha": 6}, r"another rank \(r or rank_pattern\)"),
]


@pytest.mark.parametrize(("make", "options", "message"), OTHERS)
def test_another_model(make: Make, options: Options, message: str, path: Path) -> None:
    refused(message, path, make(**options))


def test_another_base_of_the_same_shapes(
    model: Any, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its name alone tells it apart; a folder of the same name is the same model."""
    model.config._name_or_path = "org/a-bert"
    loradrop.save(model, path)
    for name, said in (("org/other-bert", True), ("/models/a-bert", False), ("", False)):
        other = bert()
        other.config._name_or_path = name
        caplog.clear()
        loradrop.load(other, path)
        assert ("was trained on org/a-bert, and this model is" in caplog.text) == said


def test_a_base_that_was_saved_beside_its_adapter(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a Trainer's `save_model` does: it has the name of the folder then."""
    model.config._name_or_path = "org/a-bert"
    loradrop.save(model, tmp_path / FOLDER)
    found = bert()
    found.config._name_or_path = str(tmp_path)
    loradrop.load(found, tmp_path)
    assert "was trained on" not in caplog.text


def test_another_revision_of_the_base(
    model: Any, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, other_one = "1f" * 20, "2e" * 20
    model.config._name_or_path, model.config._commit_hash = "org/a-bert", first
    loradrop.save(model, path)
    for revision, said in ((other_one, True), (first, False), ("v1", False), (None, False)):
        other = bert()
        other.config._name_or_path, other.config._commit_hash = "org/a-bert", revision
        caplog.clear()
        loradrop.load(other, path)
        told = f"on org/a-bert at revision {first}, and this model is of revision {other_one}"
        assert (told in caplog.text) == said


@pytest.mark.parametrize("shared", [False, True])
def test_into_adapters_of_another_dtype_and_number(shared: bool, tmp_path: Path) -> None:
    """What is in the file holds: its dtype, and as many adapters as it has."""
    half = adapt(bert().bfloat16(), LoRAConfig(r=4, adapter_dtype="base"))
    loradrop.save(half, tmp_path)
    found = share(injected(), []) if shared else injected()
    loradrop.load(found, tmp_path)
    assert found.lora_bank.A[0].dtype == torch.bfloat16 and len(found.lora_bank.A) == 6
    for i in range(6):
        assert torch.equal(found.lora_bank.delta(i), half.lora_bank.delta(i))


class TestPlan:
    def test_follows_the_model(self, path: Path) -> None:
        found = loaded(path)
        assert plan_of(found).parameters == found.lora_bank.trainable == read(path).plan.parameters
        loradrop.share(found, [])
        plan = plan_of(found)
        assert plan.parameters == found.lora_bank.trainable < read(path).plan.parameters
        assert plan.assignment == found.lora_bank.assignment and plan.kept == ()

    def test_a_newer_schema(self, path: Path) -> None:
        def newer(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
            metadata["plan"] = json.dumps(json.loads(metadata["plan"]) | {"schema": 99})

        rewrite(path / TENSORS, newer)
        refused(rf"{TENSORS}.*schema 99.*upgrade loradrop", path)

    def test_not_there(self, path: Path) -> None:
        rewrite(path / TENSORS, lambda _, metadata: metadata.pop("plan"))
        refused(r"not a native loradrop adapter.*load a PEFT file with its folder", path)

    @pytest.mark.parametrize("beside", ["equal", "another", "damaged", "gone"])
    def test_the_one_in_the_header_counts(
        self, beside: str, model: Any, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        if beside == "another":
            write_json(path / PLAN, read_json(path / PLAN) | {"slots": [0] * 6})
        elif beside == "damaged":
            (path / PLAN).write_text('{"schema": 1, "tar')
        elif beside == "gone":
            (path / PLAN).unlink()
        with caplog.at_level(logging.WARNING, "loradrop"):
            found = loaded(path)
        warned = "plan.json is not the plan in the header" in caplog.text
        assert warned == (beside in ("another", "damaged")) and bool(caplog.text) == warned
        assert found.lora_bank.slots == tuple(range(6)) and same(found, model)


class TestSavePretrained:
    def test_loses_nothing(self, model: Any, tmp_path: Path) -> None:
        share(model, [0, 3]).save_pretrained(tmp_path)
        assert not [key for key in load_file(tmp_path / "model.safetensors") if "lora" in key]
        found, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert (tmp_path / FOLDER / TENSORS).exists()
        assert same(loaded(tmp_path, found.eval()), model)

    def test_the_base_model_beside_it_is_the_base_model(self, tmp_path: Path) -> None:
        model = adapt(llama(), replace(OURS, method=loradrop.LoRA()))
        model.save_pretrained(tmp_path)
        assert same(type(model).from_pretrained(tmp_path).eval(), llama())

    @pytest.mark.parametrize("folder", ["model", "checkpoint-3"])
    def test_of_a_class_of_its_own(self, folder: str, tmp_path: Path) -> None:
        """It takes no state_dict, and writes whatever it holds."""
        hub = pytest.importorskip("huggingface_hub")

        class Net(nn.Module, hub.PyTorchModelHubMixin):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.query = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.query(x)

        model, base = Net(), Net()
        base.load_state_dict(model.state_dict())
        models.adapt(model, r=2, target_modules=["query"], method=loradrop.LoRA())
        keys = list(model.state_dict())
        model.save_pretrained(tmp_path / folder)
        found, x = Net.from_pretrained(tmp_path / folder), torch.randn(2, 4)
        assert torch.equal(found(x), base(x)) and list(model.state_dict()) == keys
        loradrop.load(found, tmp_path / folder)
        assert torch.equal(found(x), model(x)) and not torch.allclose(found(x), base(x))

    def test_plain_again_after_remove(self, model: Any, tmp_path: Path) -> None:
        loradrop.remove(model)
        model.save_pretrained(tmp_path)
        assert not (tmp_path / FOLDER).exists()

    def test_not_while_merged(self, model: Any, tmp_path: Path) -> None:
        loradrop.merge(model, keep_original=True)
        with pytest.raises(ValueError, match=r"merged for now: loradrop\.save"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{TENSORS} is not there: give the folder"):
        loradrop.load(bert(), tmp_path)
    with pytest.raises(ValueError, match=r"call loradrop\.inject"):
        loradrop.save(bert(), tmp_path)
    assert not list(tmp_path.iterdir())


class TestEarlierReleases:
    """`data/adapter-0.1.0` was written by loradrop 0.1.0, whose plan has schema 1."""

    FOLDER = Path(__file__).parent / "data" / "adapter-0.1.0"

    def test_an_adapter(self) -> None:
        model = loaded(self.FOLDER, bert(4, 16, num_labels=3))
        bank, deltas = model.lora_bank, load_file(self.FOLDER / "deltas.safetensors")
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

    @pytest.mark.parametrize(
        ("name", "value"),
        [("scores", [1]), ("scores", {"values": {}}), ("cut", {"x": 1}), ("warmup", 3),
         ("base", None), ("facts", [])],
    )  # fmt: skip
    def test_a_section_that_is_damaged(self, name: str, value: Any) -> None:
        data = read_json(self.FOLDER / PLAN)
        assert Plan.from_dict(data)
        with pytest.raises(ValueError, match=rf"the plan is damaged: .*{name} is "):
            Plan.from_dict({**data, name: value})
