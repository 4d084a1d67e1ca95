"""Compiles launches ahead of time, without a device, and reads what came out.

    python tests/aot.py ARCH [--every]

Compiles the named launches of `launches.py`, or every launch. One JSON line for each: its name,
either its registers, spills, shared memory and instructions or the error, and what is wrong with
them. The installed Triton compiles; put another version before it with PYTHONPATH.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from launches import MACHINES, Launch, launches, named
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may have; 101376 elsewhere
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "UTMASTG", "STG")


def compile_launch(launch: Launch, function: Any, arch: int) -> dict[str, Any]:
    """The resources and instructions of one binary."""
    names = function.arg_names
    kernel = triton.compile(
        ASTSource(
            function,
            signature=dict(launch.signature),
            constexprs={(names.index(name),): value for name, value in launch.constants},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
        ),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    found = {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
    return {
        "loads": Counter(re.findall(r"\b(LDG(?:STS)?\.[.\w]+)", code)),
        "registers": registers,
        "shared": kernel.metadata.shared,
        "instructions": {name: count for name, count in found.items() if count},
        "early": early_refills(code) if launch.warps > 4 else 0,
    } | _assembler(kernel.asm["ptx"], arch)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def early_refills(code: str) -> int:
    """The tensor loads that may overwrite what another warpgroup still multiplies.

    A WARPGROUP.DEPBAR waits for the products of its own warpgroup. Before memory is filled again,
    the others have to join it: on every way there, a BAR.SYNC lies between (triton#11047).
    """
    labels: dict[str, int] = {}
    steps: list[tuple[str, str]] = []  # its predicate, or nothing, and the instruction
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(steps)
        elif step := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@\S+)?\s*([^;]+);", line):
            steps.append((step[1] or "", step[2]))
    ways, seen, early = [(0, False)], set(), set()
    while ways:
        way = ways.pop()
        if way in seen or way[0] == len(steps):
            continue
        seen.add(way)
        (at, waited), (predicate, step) = way, steps[way[0]]
        if step.startswith("UTMALDG") and waited:
            early.add(at)
        if step.startswith(("WARPGROUP.DEPBAR", "BAR.SYNC")):
            waited = step.startswith("WARPGROUP")
        target = re.match(r"BRA\b.*(\.L_x_\d+)", step)
        if target:
            ways.append((labels[target[1]], waited))
        if predicate or not (target or step.startswith("EXIT")):
            ways.append((at + 1, waited))
    return len(early)


def _assembler(ptx: str, arch: int) -> dict[str, Any]:
    """What ptxas says: bytes spilled, and whether it serialised the warpgroup products."""
    name = "ptxas-blackwell" if arch >= 100 else "ptxas"
    target = f"sm_{arch}{'a' if arch >= 90 else ''}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [TOOLS / name, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    log = done.stdout + done.stderr
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return {
        "spilled": sum(int(number) for pair in spilled for number in pair),
        "serialised": "C751" in log,
    }


def faults(arch: int, launch: Launch, found: dict[str, Any]) -> list[str]:
    """What is wrong with a binary, in words."""
    if "error" in found:
        return [found["error"]]
    has, constants = found["instructions"], dict(launch.constants)
    half = constants.get("PRECISION") != "ieee"
    limit = SHARED.get(arch, 101376)
    products = launch.kernel not in ("_add_planes", "_add_blocks", "_cast", "_total", "_finish")
    spilled, shared = found["spilled"], found["shared"]
    wide = launch.kernel in ("_gemm_ext", "_shrink", "_outer") and half
    tall = constants["R" if launch.kernel == "_outer" else "BM"] >= 64 if wide else False
    newest = {90: "HGMMA", 100: "UTCHMMA"}.get(arch)
    tma, matrix = constants.get("TMA"), has.keys() & {"HGMMA", "HMMA", "UTCHMMA"}
    rows = {"_gemm_ext": "spm", "_shrink": "sxm", "_outer": "spm"}.get(launch.kernel)
    plain = wide and rows in launch.aligned and not tma
    rules = {
        "nothing is stored": not has.keys() & {"STG", "UTMASTG"},
        f"{spilled} bytes of registers are spilled": spilled,
        f"{shared} bytes of shared memory, more than {limit}": shared > limit,
        "ptxas serialises the warpgroup products": found["serialised"],
        "memory is filled again while another warpgroup may multiply it": found["early"],
        "no matrix instruction": products and half and not matrix,
        f"no {newest}": tall and newest is not None and newest not in has,
        "no tensor memory access": tma and not {"UTMALDG", "UTMASTG"} <= has.keys(),
        "loads are not asynchronous": plain and "LDGSTS" not in has,
    }
    return [words for words, broken in rules.items() if broken]


def examined(name: str, launch: Launch, function: Any, arch: int) -> dict[str, Any]:
    """The facts of one launch, compiled, with its faults."""
    try:
        found = compile_launch(launch, function, arch)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[-400:]}
    return {"name": name, **found, "faults": faults(arch, launch, found)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", type=int, choices=MACHINES)
    parser.add_argument("--every", action="store_true")
    args = parser.parse_args()
    chosen = named(args.arch)
    if args.every:
        every = launches(MACHINES[args.arch])
        chosen = {repr(launch): (launch, function) for launch, function in every.items()}
    print(json.dumps({"triton": triton.__version__, "launches": len(chosen)}))
    for name, (launch, function) in chosen.items():
        print(json.dumps(examined(name, launch, function, args.arch)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
