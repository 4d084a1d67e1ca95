"""What the pages show is run as it stands there: each page in one namespace, from top to bottom.

The models that the pages name are tiny ones here, in folders of these names.
"""

import functools
import importlib.util
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch

import loradrop

DOCS = Path(__file__).resolve().parent.parent / "docs"
ENCODER, DECODER = "FacebookAI/roberta-base", "meta-llama/Llama-3.2-1B"
ELSEWHERE = ("methods.md",)  # test_vera.py runs the method in one file
PAGES = sorted(
    str(page.relative_to(DOCS))
    for page in DOCS.rglob("*.md")
    if "```python" in page.read_text(encoding="utf-8") and page.name not in ELSEWHERE
)
# What a page needs that is not everywhere. Fragments, whose names a page leaves out, are in ```py.
NEEDS = {"how-to/sft.md": "trl", "how-to/export.md": "peft", "how-to/quantised.md": "bitsandbytes"}


def decoder() -> Any:
    """Of whole blocks of four-bit weights."""
    return models.llama(hidden_size=64, intermediate_size=64)


def given(page: str) -> dict[str, Any]:
    """The names that a page takes for granted."""
    if page != "compress.md":
        return {}
    ids = torch.randint(2, 50, (6, 2, 9), generator=torch.Generator().manual_seed(3))
    batches = [{"input_ids": batch} for batch in ids]
    return {"loradrop": loradrop, "model": decoder(), "batches": batches}


def snippets(page: str) -> list[str]:
    """The Python of a page, each block at its own line, for the traceback."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.finditer(r"^```python\n(.*?)^```", text, re.S | re.M)
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in blocks]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models by the names of real ones, an adapter, and data of numbers."""
    folder = tmp_path_factory.mktemp("user")
    llama = decoder()
    for name, model in ((ENCODER, models.roberta()), (DECODER, llama)):
        model.save_pretrained(folder / name)
        models.words().save_pretrained(folder / name)
    models.adapt(llama, r=4, target_modules=["q_proj", "v_proj"])
    models.share(llama, [0, 2])
    loradrop.save(llama, folder / "adapter")
    draw = random.Random(0)
    lines = ["text,label"]
    for i in range(80):
        words = [2 + i % 2, *(draw.randrange(4, 50) for _ in range(draw.randrange(3, 9)))]
        lines.append(f"{' '.join(map(str, words))},{i % 2}")
    (folder / "reviews.csv").write_text("\n".join(lines))
    rows = [{"prompt": f"{3 + i % 9} 5 6", "completion": f" {4 + i % 5} 9"} for i in range(48)]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def there(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a user in a copy of that folder, since several pages write an adapter, on a CPU, without a
    C++ compiler's minutes.
    """
    datasets = pytest.importorskip("datasets")
    own = shutil.copytree(place, tmp_path / "user")
    monkeypatch.chdir(own)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", own / "cache")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    each = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: each(self, backend="eager"))
    if importlib.util.find_spec("trl") is not None:
        import trl

        monkeypatch.setattr(trl, "SFTConfig", functools.partial(trl.SFTConfig, use_cpu=True))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.quantised] * (NEEDS.get(page) == "bitsandbytes"))
        for page in PAGES
    ],
)
def test_the_snippets_of_a_page(page: str, there: None) -> None:
    for library in NEEDS.get(page, "").split():
        pytest.importorskip(library)
    torch.manual_seed(0)
    namespace = {"__name__": "page"} | given(page)
    for code in snippets(page):
        exec(compile(code, str(DOCS / page), "exec"), namespace)
