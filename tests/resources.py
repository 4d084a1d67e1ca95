"""What the compilers make of the kernels, without a device: kernels/resources.md.

    python tests/resources.py                       of this checkout
    python tests/resources.py --before ../old       and of another one, beside it

Registers, bytes of stack (where registers are spilled, if they are), shared memory (of csrc/ the
static part), instructions in all and in one step of the loop that multiplies (the smallest with a
matrix instruction), and the barriers in that step. Of the launches of a layer of 8192 x 4096 x 4096
at r = 16 by Triton, numbered in their order, and of the kernels of csrc/ by nvcc.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "kernels" / "resources.md"
ARCHS = (90, 80, 120)
LAYERS: dict[str, dict[str, Any]] = {"": {}, "dropout": {"dropout": 0.1}, "norm": {"norm": True}}
MATRIX = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|QGMMA)\b")
BARRIER = re.compile(r"\b(BAR|SYNCS|WARPGROUP|DEPBAR)\b")
COLUMNS = ("registers", "stack", "shared", "instructions", "in a step", "barriers in a step")


def functions(code: str) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of each kernel in what nvdisasm prints."""
    parts = re.split(r"^\.text\.(\S+):$", code, flags=re.M)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        yield name, text.splitlines()


def counted(lines: list[str]) -> tuple[int, int, int]:
    """Instructions, those of the smallest loop that multiplies, and barriers in it; 0 without."""
    steps: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in lines:
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(steps)
        elif step := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            steps.append(step[1])
            back = re.search(r"\bBRA\b.*?(\.L_x_\d+)", step[1])
            if back and back[1] in labels:
                loops.append(steps[labels[back[1]] :])
    inner = min((loop for loop in loops if any(map(MATRIX.search, loop))), key=len, default=[])
    return len(steps), len(inner), sum(bool(BARRIER.search(step)) for step in inner)


def of_cubin(tools: Path, cubin: Path) -> dict[str, dict[str, int]]:
    """The figures of each kernel in a file, but shared memory that is asked for at its launch."""

    def tool(name: str, *options: str) -> str:
        command = [tools / name, *options, cubin]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    usage = tool("cuobjdump", "--dump-resource-usage")
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    resources = {name: tuple(map(int, numbers)) for name, *numbers in found}
    return {
        name: dict(zip(COLUMNS, (*resources[name], *counted(lines)), strict=True))
        for name, lines in functions(tool("nvdisasm", "-c"))
        if name in resources
    }


def measure() -> dict[str, dict[str, int]]:
    """Kernel -> its figures, of the loradrop and the tests that are on the path."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    try:
        from loradrop.kernels.tiles import Machine
        from loradrop.op import fused
    except ImportError:  # an older checkout
        from loradrop.kernels.config import Machine

        from loradrop import fused
    from launches import Layer, call, record

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arch in ARCHS:
            for what, options in LAYERS.items():
                with record(Machine(arch, {80: 108, 90: 132, 120: 170}[arch])) as made:
                    call(fused.TRITON, Layer(8192, 4096, 4096, 16, **options))
                seen: dict[str, int] = {}
                for launch, function in made.items():
                    seen[launch.kernel] = seen.get(launch.kernel, 0) + 1
                    names = function.arg_names
                    constants = {(names.index(n),): value for n, value in launch.constants}
                    whole = {(names.index(n),): [["tt.divisibility", 16]] for n in launch.aligned}
                    source = ASTSource(function, dict(launch.signature), constants, whole)
                    how = {"num_warps": launch.warps, "num_stages": launch.stages}
                    kernel = triton.compile(source, GPUTarget("cuda", arch, 32), how)
                    file = Path(folder) / "kernel.cubin"
                    file.write_bytes(kernel.asm["cubin"])
                    figures = next(iter(of_cubin(tools, file).values()))
                    name = f"sm_{arch} {launch.kernel} {seen[launch.kernel]} {what}".strip()
                    found[name] = figures | {"shared": kernel.metadata.shared}
        found |= of_csrc(tools, Path(folder))
    return found


def of_csrc(tools: Path, folder: Path) -> dict[str, dict[str, int]]:
    """The kernels of csrc/ of the checkout this runs in."""
    sys.path.insert(0, str(Path.cwd() / "csrc"))
    from build import build

    library, _ = build(folder)
    command = [tools / "cuobjdump", "-xelf", "all", library]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    found = {}
    for cubin in sorted(folder.glob("*.sm_90a.cubin")):
        for name, figures in of_cubin(tools, cubin).items():
            plain = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout
            short = re.sub(r"\((anonymous namespace|int|bool)\)(::)?|loradrop::|^void ", "", plain)
            found[f"csrc {short.rpartition('(')[0].strip()}"] = figures
    return found


def in_a_process(checkout: Path) -> dict[str, dict[str, int]]:
    """`measure` of a checkout."""
    path = {"PYTHONPATH": os.pathsep.join((str(checkout), str(checkout / "tests")))}
    command = [sys.executable, __file__, "--measure"]
    # Not the folder of this file, which python puts before everything.
    done = subprocess.run(
        command, env=os.environ | path | {"PYTHONSAFEPATH": "1"}, cwd=checkout, check=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def page(runs: dict[str, dict[str, dict[str, int]]], about: str) -> str:
    """The table: "before → after" where they differ, a dash where a checkout has no such kernel."""
    assert __doc__ is not None
    lines = ["# Resources of the compiled kernels", "", "Made by `python tests/resources.py`.", ""]
    lines += [__doc__.split("\n\n")[2].strip(), "", about, ""]
    lines += [f"| kernel | {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * len(COLUMNS)]
    for kernel in dict.fromkeys(name for run in runs.values() for name in run):
        cells = []
        for column in COLUMNS:
            values = [str(run[kernel][column]) if kernel in run else "–" for run in runs.values()]
            cells.append(" → ".join(dict.fromkeys(values)))
        lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--measure", action="store_true", help="one checkout: print and end")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure()))
        return
    import triton

    checkouts = [args.before.resolve(), ROOT] if args.before else [ROOT]
    git = ("git", "rev-parse", "--short", "HEAD")
    names = [subprocess.run(git, cwd=c, capture_output=True, text=True) for c in checkouts]
    runs = {str(checkout): in_a_process(checkout) for checkout in checkouts}
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", nvcc)
    about = f"Triton {triton.__version__}, nvcc {release[1] if release else 'unknown'}; commit "
    OUT.write_text(page(runs, about + " → ".join(n.stdout.strip() for n in names) + "."))


if __name__ == "__main__":
    main()
