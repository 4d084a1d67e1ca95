"""The CUDA kernels from their own source on an emulator, and that it notices a missing wait."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from planted import some

ROOT = Path(__file__).resolve().parent.parent
GEMM, DECODE = "gemm_ext_sm90", "decode_sm90"
STREAMS = "streams"  # the cases of gemm_ext that make h

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulator, compiled, in place of CUDA's headers and of the instructions."""
    folder = tmp_path_factory.mktemp("headers")
    emulator = folder / "cuda_emulator.h"
    shutil.copy(ROOT / "tests" / emulator.name, folder)
    for name in ("kernels.h", "smem_layout.h", "tile_walk.h"):
        shutil.copy(ROOT / "csrc" / name, folder)
    for name in ("cuda.h", "cuda_runtime.h", "ptx.cuh", "wgmma.cuh"):
        (folder / name).write_text('#include "cuda_emulator.h"\n')
    # `#pragma once` in what is compiled by itself is a warning.
    compiled(folder, emulator, "c++-header", "-w", "-o", folder / "cuda_emulator.h.gch")
    return folder


def compiled(headers: Path, source: Path, language: str, *more: Path | str) -> None:
    command = ["g++", "-O1", "-std=c++20", "-I", headers, "-x", language, source, *more]
    subprocess.run(command, check=True)


def kernel(name: str) -> str:
    """A kernel as C++: what CUDA adds to the language, beyond attributes, is spelt out."""
    text = (ROOT / "csrc" / f"{name}.cu").read_text(encoding="utf-8")
    stream = (ROOT / "csrc" / "stream.cuh").read_text(encoding="utf-8")
    text = text.replace('#include "stream.cuh"', stream.replace("#pragma once", ""))
    raw = "std::uint8_t* const raw = emulator::dynamic_memory();"
    text = text.replace("extern __shared__ std::uint8_t raw[];", raw)
    launch = r"emulator::run(dim3(\2), dim3(\3), 1, [=] { \1(\4); });"
    return re.sub(r"(\w+)<<<(\w+), (\w+), 0, stream>>>\((.*)\);", launch, text)


def build(headers: Path, folder: Path, name: str, text: str) -> Path:
    source, built = folder / f"{name}.cpp", folder / f"{name}.o"
    source.write_text(text, encoding="utf-8")
    # The compiled header counts only where it comes first.
    compiled(headers, source, "c++", "-include", "cuda_emulator.h", "-c", "-o", built)
    return built


@pytest.fixture(scope="module")
def objects(headers: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The check and both kernels, compiled."""
    folder = tmp_path_factory.mktemp("emulated")
    check = (ROOT / "tests" / "emulated_kernels_check.cpp").read_text(encoding="utf-8")
    texts = {"check": check, GEMM: kernel(GEMM), DECODE: kernel(DECODE)}
    return {name: build(headers, folder, name, text) for name, text in texts.items()}


def run(program: Path, name: str, seed: int) -> subprocess.CompletedProcess[str]:
    command = [program, name, str(seed)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", [GEMM, STREAMS, DECODE])
def test_kernel(name: str, objects: dict[str, Path], tmp_path: Path) -> None:
    subprocess.run(["g++", *objects.values(), "-o", tmp_path / "right"], check=True)
    for seed in (0, 100):
        done = run(tmp_path / "right", name, seed)
        assert done.returncode == 0, done.stdout


def staged_whole() -> str:
    """gemm_ext that stages all of a tile before it stores it: the other side of its switch."""
    text = kernel(GEMM)
    assert text.count("kStageWhole = false") == 1
    return text.replace("kStageWhole = false", "kStageWhole = true")


@pytest.mark.every_fault
def test_a_tile_that_is_staged_whole(
    headers: Path, objects: dict[str, Path], tmp_path: Path
) -> None:
    """Right for both ways to make h, and a wait too few for it is noticed."""
    text, outcomes = staged_whole(), {}
    for name, change in {"right": "0 : 1>()", "wrong": "4 : 1>()"}.items():
        (tmp_path / name).mkdir()
        changed = text.replace("kStageWhole ? 0 : 1>()", f"kStageWhole ? {change}")
        parts = objects | {GEMM: build(headers, tmp_path / name, GEMM, changed)}
        subprocess.run(["g++", *parts.values(), "-o", tmp_path / name / "run"], check=True)
        outcomes[name] = {
            (cases, seed): run(tmp_path / name / "run", cases, seed)
            for cases in (GEMM, STREAMS) for seed in (0, 100)
        }  # fmt: skip
    for done in outcomes["right"].values():
        assert done.returncode == 0, done.stdout
    assert any(done.returncode != 0 for done in outcomes["wrong"].values())


FAULTS = {
    "a slot is filled before it is free": (
        GEMM,
        "ptx::wait(memory.emptied(ring.slot), ring.emptied());\n"
        "      ptx::arrive_and_expect(barrier, slot_bytes",
        "ptx::arrive_and_expect(barrier, slot_bytes",
    ),
    "a slot is let go while wgmma reads it": (
        GEMM,
        "if (before >= 0) release(memory, before, cluster);",
        "release(memory, ring.slot, cluster);",
    ),
    "only the own producer learns that a slot is free": (
        GEMM,
        "if (lane < cluster) ptx::arrive_peer(memory.emptied(slot), lane);",
        "if (lane < cluster) ptx::arrive_peer(memory.emptied(slot), ptx::cluster_rank());",
    ),
    "the peer's bytes are not counted": (
        GEMM,
        "arrive_and_expect(barrier, slot_bytes(TileN))",
        "arrive_and_expect(barrier, slot_bytes(TileN) - q_bytes(TileN) / 2)",
    ),
    "wgmma begins without a fence": (
        GEMM,
        "wgmma_fence();\n#pragma unroll\n  for (int step = 0; step < Steps",
        "for (int step = 0; step < Steps",
    ),
    "wgmma begins on what the compiler may still write": (
        GEMM,
        "  pin(acc);\n  for (int i = 0; i < count - 1; ++i)",
        "  for (int i = 0; i < count - 1; ++i)",
    ),
    "the compiler may read the sums before wgmma has ended": (
        GEMM,
        "wgmma_wait<0>();\n  pin(acc);\n  release",
        "wgmma_wait<0>();\n  release",
    ),
    "the sums are pinned before wgmma has ended": (
        GEMM,
        "wgmma_wait<0>();\n  pin(acc);\n  release",
        "pin(acc);\n  wgmma_wait<0>();\n  release",
    ),
    "h is read before it is written": (GEMM, "if (now.thin && early)", "if (false)"),
    "the output is written while it may be read": (GEMM, "if (shape.r == 0) {", "if (false) {"),
    "a staging buffer is overwritten before it is stored": (
        GEMM,
        "ptx::wait_stores_read<kStageWhole ? 0 : 1>()",
        "ptx::wait_stores_read<2>()",
    ),
    "the staging buffer is stored without a fence": (GEMM, "ptx::fence_async_proxy();", ""),
    "a CTA leaves while its stores still read": (GEMM, "ptx::wait_stores_read<0>()", "(void)0"),
    "the sums are not scaled back": (
        GEMM,
        "<T, TileN, false>(acc, bias, args, memory, at, group, scale)",
        "<T, TileN, false>(acc, bias, args, memory, at, group, 1.0f)",
    ),
    "a scale alone is left out": (GEMM, "args.bias == nullptr && scale == 1.0f", "!args.bias"),
    "a bias alone is left out": (
        GEMM,
        "args.bias == nullptr && scale == 1.0f",
        "scale == 1.0f",
    ),
    "the pairs of a bias change places": (GEMM, "+ threadIdx.x % 4;", "+ 3 - threadIdx.x % 4;"),
    "a bias is read beyond its end": (GEMM, "8 * j < left ?", "8 * j <= left ?"),
    "the peer's barriers are used before they exist": (
        GEMM,
        "  ptx::cluster_arrive_relaxed();\n  ptx::cluster_wait();\n  if",
        "  if",
    ),
    "a CTA leaves while its peer still arrives there": (
        GEMM,
        "  ptx::cluster_arrive();\n  ptx::cluster_wait();\n}",
        "}",
    ),
    "single CTAs are launched as clusters": (
        GEMM,
        "attributes + (cluster > 1 ? 0 : 1);  // single CTAs are launched without clusters\n"
        "  config.numAttrs = (cluster > 1 ? 1 : 0) + ",
        "attributes;\n  config.numAttrs = 1 + ",
    ),
    "the last chunk of a tile has too few steps": (GEMM, "if (steps == 1) {", "if (steps < 4) {"),
    "h is loaded before it is made": (STREAMS, "ptx::await(args.ready + at.m / kTileM);", ""),
    "the copy engine does not know that h is made": (
        STREAMS,
        "        ptx::fence_async_proxy_global();\n      }",
        "      }",
    ),
    "h is made known before all have written it": (
        STREAMS,
        "ptx::sync_threads(1, kStreamThreads);",
        "",
    ),
    "h is written without a fence": (
        STREAMS,
        "ptx::fence_async_proxy_global();  // the copy engine will",
        "// the copy engine will",
    ),
    "an old call's word is taken for this one's": (
        STREAMS,
        "error = cudaMemsetAsync(args.ready, 0, flags, stream);",
        "",
    ),
    "h is not scaled": (STREAMS, "args.h_scale * acc[4 * j + 2 * half]", "acc[4 * j + 2 * half]"),
    "a streaming slot is filled before it is free": (
        STREAMS,
        "ptx::wait(memory.emptied(ring.slot), ring.emptied());\n"
        "      ptx::arrive_and_expect(barrier, memory",
        "ptx::arrive_and_expect(barrier, memory",
    ),
    "a streaming slot is let go while wgmma reads it": (
        STREAMS,
        "ptx::arrive(memory.emptied(before))",
        "ptx::arrive(memory.emptied(ring.slot))",
    ),
    "both warpgroups make the same rows": (STREAMS, "+ 64 * group * kRowBytes, Major", ", Major"),
    "the tiles of the streaming clusters are left out": (
        STREAMS,
        "const int clusters = gridDim.x / shape.cluster - shape.streams, count",
        "const int clusters = gridDim.x / shape.cluster, count",
    ),
    "single CTAs decode as clusters": (DECODE, "if (how.cluster == 1) config.numAttrs = 0;", ""),
    "the last barrier of a cluster orders nothing": (
        GEMM,
        "  ptx::cluster_arrive();\n",
        "  ptx::cluster_arrive_relaxed();\n",
    ),
    "a cluster of one waits for its cluster": (
        DECODE,
        "  if (cluster > 1) ptx::cluster_arrive_relaxed();\n"
        "  if (threadIdx.x == kConsumers) produce(args, memory, walk);  "
        "// W need not wait for the others\n"
        "  if (cluster > 1) ptx::cluster_wait();\n",
        "  ptx::cluster_arrive_relaxed();\n"
        "  if (threadIdx.x == kConsumers) produce(args, memory, walk);\n"
        "  ptx::cluster_wait();\n",
    ),
    "a slot of A is filled before it is free": (
        DECODE,
        "step < at.slots ? step : step < at.stages ? walk.own : step - lag",
        "step",
    ),
    "the last chunks of A do not come": (
        DECODE,
        "walk.own > at.slots ? larger(walk.chunks, walk.own + lag) : walk.chunks",
        "walk.chunks",
    ),
    "A is read from the slot of W": (DECODE, "half_of_a(ring_of_a.slot", "half_of_a(ring.slot"),
    "the partial h of the others is not waited for": (
        DECODE,
        "ptx::wait<true>(memory.partial_left(), 0);",
        "",
    ),
    "h is used before it is complete": (DECODE, "ptx::wait<true>(memory.h_complete(), 0);", ""),
    "a partial h is left, not published": (
        DECODE,
        "ptx::publish_peer(memory.partial_left(), threadIdx.x)",
        "ptx::arrive_peer(memory.partial_left(), threadIdx.x)",
    ),
    "a part of h is written, not published": (
        DECODE,
        "ptx::publish_peer(memory.h_complete(), threadIdx.x)",
        "ptx::arrive_peer(memory.h_complete(), threadIdx.x)",
    ),
    "the partial h of the others is waited for as the own": (
        DECODE,
        "ptx::wait<true>(memory.partial_left(), 0)",
        "ptx::wait(memory.partial_left(), 0)",
    ),
    "h is waited for as if all of it were the own": (
        DECODE,
        "ptx::wait<true>(memory.h_complete(), 0)",
        "ptx::wait(memory.h_complete(), 0)",
    ),
    "a barrier awaits more bytes than it can count": (
        DECODE,
        "ptx::arrive_and_expect(memory.b_filled(), at.boxes * at.rows * kRowBytes);\n"
        "      for (int box = 0; box < at.boxes; ++box) {\n",
        "ptx::arrive_and_expect(memory.b_filled(), 32 * at.boxes * at.rows * kRowBytes);\n"
        "      for (int i = 0; i < 32 * at.boxes; ++i) {\n"
        "        const int box = i % at.boxes;\n",
    ),
    "B is taken to have landed when the ends of its boxes have": (
        DECODE,
        "  ptx::wait(memory.b_filled(), 0);\n",
        "  for (int box = 1; box <= at.boxes; ++box) {\n"
        "    const auto end = memory.base + at.b() + box * at.rows * kRowBytes - 4;\n"
        "    while (std::isnan(ptx::load_peer(end))) ptx::wait_for_earlier_kernels();\n"
        "  }\n",
    ),
    "B is not waited for": (DECODE, "ptx::wait(memory.b_filled(), 0);", ""),
    "a pair does not wait for its barriers": (
        DECODE,
        "if (cluster > 1) ptx::cluster_wait();",
        "if (cluster > 2) ptx::cluster_wait();",
    ),
    "the peer and the copy engine do not know the barriers": (
        GEMM,
        "ptx::barrier_init_fence();",
        "",
    ),
    "the others and the copy engine do not know the barriers": (
        DECODE,
        "ptx::barrier_init_fence();",
        "",
    ),
    "the producer keeps its registers": (GEMM, "ptx::give_registers<40>();", ""),
    "more registers are taken than given": (GEMM, "take_registers<232>", "take_registers<240>"),
    "the warps add up at the same time": (DECODE, "if (warp % 4 == turn)", "if (turn == 0)"),
    "0 times NaN": (DECODE, "if (weight > 0.0f) squares", "squares"),
}


@pytest.mark.parametrize("fault", some(FAULTS))
def test_a_fault_is_noticed(
    fault: str, headers: Path, objects: dict[str, Path], tmp_path: Path
) -> None:
    cases, right, wrong = FAULTS[fault]
    name = GEMM if cases == STREAMS else cases
    text = kernel(name)
    assert text.count(right) == 1, f"{right!r} does not stand once in {name}.cu"
    parts = objects | {name: build(headers, tmp_path, name, text.replace(right, wrong))}
    subprocess.run(["g++", *parts.values(), "-o", tmp_path / "wrong"], check=True)
    assert any(run(tmp_path / "wrong", cases, seed).returncode != 0 for seed in (0, 100))
