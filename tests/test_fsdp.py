"""FSDP2 in two processes: a sharded base, and adapters that are sharded too or stay whole."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from test_distributed import found
from torchrun import script_in_ranks, torchrun

import loradrop

PEFT = ["peft callback"] * bool(importlib.util.find_spec("peft"))
MODES = ["shared", "callback", "spectral callback", "adalora callback", "prilora callback", *PEFT]
LOADED = [
    "shared [ram]",
    "callback [bf16]",
    "callback [recomputed]",
    "callback [parts]",
    *(f"{mode} [parts]" for mode in PEFT),
]


def run(name: str, *arguments: Any, processes: int = 2) -> None:
    done = script_in_ranks(name, *arguments, processes=processes)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Trainer's runs in one process, which are not sharded."""
    folder = tmp_path_factory.mktemp("alone")
    run("fsdp_trainer.py", folder, 8, *MODES, processes=1)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run("fsdp_trainer.py", folder, 4, *MODES, *LOADED, "refused")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `whole_fit.py` found in each rank."""
    folder = tmp_path_factory.mktemp("whole")
    run("whole_fit.py", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_a_sharded_model_trains_saves_and_loads(tmp_path: Path) -> None:
    done = torchrun("sharded_fit.py", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "found.json").read_text())
    assert result["same"] and result["gap"] < 1e-6 and result["moved"] > 1e-3
    assert len(result["gaps"]) == 3 and max(result["gaps"].values()) < 1e-5
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()
    if PEFT:
        of_peft = result["peft"]
        assert of_peft["sharded"] and of_peft["moved"] > 1e-3
        assert max(of_peft["gap"], of_peft["reloaded"]) < 1e-6
    before, after = result["mixed"].pop("alone")
    assert before - after > 0.04
    for losses in result["mixed"].values():
        assert losses == pytest.approx([before, after], abs=2e-2)  # of bfloat16 8e-3 is one place
    # torch.distributed.checkpoint goes on bit for bit, and the assignment is in it
    parts = result["checkpoint"]
    assert parts["equal"] and parts["moved"] > 1e-3
    assert "lora_bank._extra_state" in parts["keys"]
    assert not any(key.startswith("bert.") for key in parts["keys"])  # not the frozen base
    assert "Missing key" in parts["refused"] and "lora_bank.pairs.3" in parts["refused"]
    assert len(list((tmp_path / "parts").glob("*.distcp"))) == 2


@pytest.mark.parametrize("mode", [*MODES, *LOADED])
def test_the_trainer_and_accelerate(mode: str, alone: Path, sharded: Path) -> None:
    """Equal to one process that is not sharded, also where it shares or cuts in the middle of the
    run, and where it goes on from a checkpoint of before or of after that.
    """
    one = found(alone, mode.partition(" [")[0])
    assert max(abs(x) for delta in one["deltas"] for x in delta) > 1e-4
    for rank in (0, 1):
        other = found(sharded, mode, rank)
        assert other["sharded"] == [True, mode.startswith("shared")]
        for end in (other, other["resumed"]["2"], other["resumed"]["4"]):
            assert end["kept"] == one["kept"] and end["ranks"] == one["ranks"]
            if "[bf16]" in mode:
                assert end["losses"] == pytest.approx(one["losses"], abs=2e-2)
                continue
            assert end["losses"] == pytest.approx(one["losses"], abs=1e-5)
            assert end["tokens"] == one["tokens"]  # no row is measured twice
            assert end["cut"] == pytest.approx(one["cut"], rel=1e-3, abs=0.0)
            for mine, theirs in zip(one["deltas"], end["deltas"], strict=True):
                assert mine == pytest.approx(theirs, abs=1e-6)
        assert other["deltas"] == found(sharded, mode, 1 - rank)["deltas"]


@pytest.mark.parametrize("mode", ["callback", "spectral callback", *PEFT])
def test_a_checkpoint_of_after_the_sharing_says_what_to_load_first(
    mode: str, sharded: Path
) -> None:
    expected = "adapters have other ranks" if mode.startswith("spectral") else "other layers share"
    assert expected in found(sharded, mode)["refused"]
    assert "loradrop.load(model, folder)" in found(sharded, mode)["refused"]


def test_what_accelerate_cannot_do_with_whole_adapters(sharded: Path) -> None:
    assert "cpu_ram_efficient_loading" in found(sharded, "refused")["ram"]
    assert "use FSDP2" in found(sharded, "refused")["version 1"]


def test_whole_adapters_are_those_of_one_process(whole: list[dict[str, Any]]) -> None:
    """With gradients accumulated and clipped, over a share whose draw differs from rank to rank."""
    one, two = whole
    assert one["sharded"] == two["sharded"]
    assert one["sharded"]["norms"] == pytest.approx(one["alone"]["norms"], rel=1e-5)
    assert min(one["alone"]["norms"]) > 0.1  # so all of them were clipped
    for mine, theirs in zip(one["sharded"]["trained"], one["alone"]["trained"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


def test_whole_adapters_are_float32_on_a_sharded_base_in_bfloat16(
    whole: list[dict[str, Any]],
) -> None:
    for of_rank in whole:
        assert of_rank["dtypes"] == ["torch.float32"] and of_rank["in parts"] == [True, False]
        in_bfloat16, full = (of_rank[name]["norms"] for name in ("half", "sharded"))
        assert in_bfloat16 == pytest.approx(full, rel=0.03)
        # saved, trained on, and loaded again here; and loaded without FSDP
        assert of_rank["logits"][0] == of_rank["logits"][1]
    assert whole[0]["half"] == whole[1]["half"]


def test_a_copy_of_the_model_waits_for_nobody(whole: list[dict[str, Any]]) -> None:
    assert whole[0]["changed"] == whole[1]["changed"] == [True, False]


def test_a_layer_that_one_rank_calls_has_the_mean_of_the_gradients(
    whole: list[dict[str, Any]],
) -> None:
    """And one that none calls has no gradient."""
    first, second, third = zip(*(of_rank["unequal"]["own"] for of_rank in whole), strict=True)
    assert second[1] is None and third == (None, None) and first[0] != first[1]
    for of_rank in whole:
        averaged = of_rank["unequal"]["averaged"]
        for rows, own, other in zip(averaged[0], *first, strict=True):
            assert rows == pytest.approx([(a + b) / 2 for a, b in zip(own, other, strict=True)])
        for rows, own in zip(averaged[1], second[0], strict=True):
            assert rows == pytest.approx([a / 2 for a in own])
        assert averaged[2] is None


def test_keep_whole_needs_ranks() -> None:
    from training_runs import PLAIN, make_model

    model = make_model()
    with pytest.raises(ValueError, match=r"no loradrop adapters"):
        loradrop.keep_whole(model)
    loradrop.inject(model, PLAIN)
    with pytest.raises(ValueError, match=r"torch\.distributed has not begun.*init_process_group"):
        loradrop.keep_whole(model)
