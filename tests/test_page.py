"""Tables, pictures and the page say what the plan says."""

import itertools
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import models
import pytest
import torch

import loradrop
from loradrop.config import LoRAConfig, LoraDropConfig
from loradrop.injection import plan_of
from loradrop.native import TENSORS
from loradrop.plan import Plan
from loradrop.report.grid import Arm
from loradrop.report.page import file_size, how_to_load, write_report
from loradrop.report.plots import curves, plot_history, plot_importance
from loradrop.report.terminal import arms_table, plan_table
from loradrop.scores import Assignment, Target
from loradrop.selection import assign

QUERY, VALUE = "encoder.layer.{}.attention.self.query", "encoder.layer.{}.attention.self.value"
SCORES = [10.0, 5.0, 30.0, 5.0, 60.0, 90.0]  # query and value of layer 0, then 1, then 2
KEPT = [QUERY.format(2), VALUE.format(2)]
T5 = "block.0.layer.0.SelfAttention.q"
VOID = {"meta", "link", "br", "wbr", "img", "hr", "use", "path"}


def make_plan(
    names: Sequence[str] = [n.format(l) for l in range(3) for n in (QUERY, VALUE)],
    scores: Sequence[float] | None = SCORES,
    kept: Sequence[str] | None = KEPT,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    frequency: Mapping[str, float] | None = None,
    base: str = "someone/encoder",
    share: str = "group",
    **options: Any,
) -> Plan:
    pairs = [(name, (shapes or {}).get(name, (48, 32))) for name in names]
    targets = tuple(Target(name, name.split(".")[-1], K, N, 4) for name, (K, N) in pairs)
    values = None if scores is None else dict(zip(names, scores, strict=True))
    assignment = Assignment(targets, tuple(range(len(names))))
    if kept is not None:
        assignment = assign(targets, kept, share)
    return Plan(
        config=LoraDropConfig(r=4, **options),
        assignment=assignment,
        parameters=assignment.parameters,
        scores=values and {"source": "online", "tokens": 12345, "rows": 20, "values": values},
        warmup=values and {"steps": 20, "planned": 30, "settled": True, "frequency": frequency},
        base={"id": base},
    )


def make_arm(plan: Plan | None = None, name: str = "LoRA-drop", **changes: Any) -> Arm:
    history: list[dict[str, Any]] = [
        {"step": step, "stage": "warmup" if step <= 20 else "main", "loss": 1.0 + 10 / step}
        for step in range(5, 101, 5)
    ]
    history += [{"step": s, "stage": "main", "eval_f1": s / 200} for s in (50, 100)]
    metrics = {"f1": 0.87654, "runtime": 3.0}
    values = {"parameters": 1234567, "metrics": metrics, "seconds": 83.4, "steps": 100}
    return Arm(**({"name": name, "history": history, "plan": plan} | values | changes))


def bert(layers: int = 2) -> Plan:
    """Two modules of a layer are called dense; one target belongs to no layer."""
    suffixes = ("attention.self.query", "attention.output.dense", "output.dense")
    names = [f"bert.encoder.layer.{l}.{s}" for l in range(layers) for s in suffixes]
    names.append("bert.pooler.dense")
    shapes = {name: (64, 16) for name in names if name.endswith(".output.dense")}
    return make_plan(names, [float(i + 1) for i in range(len(names))], names[:2], shapes)


def grid_of(table: str) -> dict[str, list[tuple[str, str, str]]]:
    """Layer -> the shade, number and mark of its cells."""
    lines = itertools.takewhile(bool, table.splitlines()[2:])
    rows = itertools.dropwhile(lambda line: not line.startswith("layer"), lines)
    cell = re.compile(r"([ ░▒▓█]{2}) +(\S+) ([●○·])")
    return {line.split()[0]: cell.findall(line[1:]) for line in list(rows)[1:]}


class Page(HTMLParser):
    """Tables as rows of texts, the text of everything, and what is never closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.cells: list[tuple[str, str]] = []
        self.text = ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append((dict(attrs).get("class") or "", ""))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            kind, text = self.cells[-1]
            self.cells[-1] = kind, text + data


def page_of(tmp_path: Path, *arms: Arm, title: str = "a run", **facts: str) -> Page:
    write_report(tmp_path / "report.html", arms, title=title, facts=facts)
    page = Page(tmp_path / "report.html")
    assert page.open == []
    return page


def size_of(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_plan_table_has_the_shares_and_marks_of_the_plan() -> None:
    table = plan_table(make_plan())
    assert grid_of(table) == {
        "0": [("░░", "10", "○"), ("░░", "5.0", "○")],
        "1": [("▒▒", "30", "○"), ("░░", "5.0", "○")],
        "2": [("▓▓", "60", "●"), ("██", "90", "●")],
    }
    assert "query 48→32 r4   1   2   0     100        60 %" in table
    assert "value 48→32 r4   1   2   0     100        90 %" in table
    assert "all              2   4   0     200        75 %" in table
    assert "640 own + 640 shared = 1,280, 67 % of LoRA's 1,920" in table
    assert "online, 12,345 tokens in 20 steps" in table
    assert "20 of 30 steps, settled" in table
    assert table.startswith("someone/encoder:")
    plain = plan_table(make_plan(), encoding="ascii")
    assert "# own adapter   o shared adapter   . no adapter" in plain
    assert table.translate(str.maketrans("●○·░▒▓█", "#o..:+#")) == plain


def test_dropped_targets_cost_nothing_joint_ones_are_parts_of_all_and_norms_are_roots() -> None:
    table = plan_table(make_plan(share="none"))
    assert [mark for cells in grid_of(table).values() for _, _, mark in cells] == list("····●●")
    assert "640 own + 0 shared = 640, 33 % of LoRA's 1,920" in table
    joint = grid_of(plan_table(make_plan(scope="joint")))
    assert [number for _, number, _ in joint["2"]] == ["30", "45"]
    rooted = grid_of(plan_table(make_plan(scores=[1, 1, 4, 1, 49, 4], importance="root")))
    assert [number for _, number, _ in rooted["2"]] == ["70", "50"]


def test_modules_of_the_same_type_have_columns_of_their_own() -> None:
    table = plan_table(bert())
    assert grid_of(table)["–"] == [("██", "100", "●")]  # nobody shares it
    heads = table[table.index("\n") : table.index("\n0 ")].split()
    above = ["attention.", "output.", "output.", "pooler."]
    assert heads == [*above, "layer", "query", *["dense"] * 3]
    assert "attention.output.dense, output.dense 64→16 r4   1   3   0" in table
    assert "pooler.dense 48→32 r4" in table


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", ["up_proj", "q_proj"]),
        ("h.0.attn.c_proj", "h.0.mlp.c_proj", ["attn.​c_proj", "mlp.​c_proj"]),
        (f"encoder.{T5}", f"decoder.{T5}", ["encoder…​q", "decoder…​q"]),
        ("0", "2", ["*"]),
        ("dense", "layer.0.dense", ["dense", "dense"]),
    ],
)
def test_columns_are_named_by_what_tells_them_apart(
    tmp_path: Path, first: str, second: str, labels: list[str]
) -> None:
    page = page_of(tmp_path, make_arm(make_plan([first, second], [1.0, 1.0], [first])))
    texts = [text for _, text in page.cells]
    start = texts.index("layer") + 1
    assert texts[start : start + len(labels)] == labels


def test_a_number_above_the_layers_is_not_theirs() -> None:
    names = [f"1.layers.{i}.{kind}" for i in range(3) for kind in ("query", "value")]
    table = plan_table(make_plan(names, kept=names[4:]))
    assert list(grid_of(table)) == ["0", "1", "2"] and re.search(r"layer +query +value", table)


def test_a_plan_without_scores_or_decision(tmp_path: Path) -> None:
    made = make_plan(scores=None, kept=None)
    plan = Plan(config=LoRAConfig(r=4), assignment=made.assignment, parameters=made.parameters)
    table = plan_table(plan)
    assert grid_of(table) == {layer: [("  ", "–", "●")] * 2 for layer in "012"}
    assert "1,920 own + 0 shared = 1,920, 100 % of LoRA's 1,920" in table
    plot_importance(plan, tmp_path / "map.png")
    assert min(size_of(tmp_path / "map.png")) > 300
    page = page_of(tmp_path, make_arm(plan))
    assert [kind for kind, _ in page.cells if kind.startswith("cell")] == ["cell "] * 6


def test_an_adapter_that_is_composed_is_not_called_its_own(tmp_path: Path) -> None:
    """VeRA's matrices, and others, are everybody's: only the bank of pairs has adapters apart."""
    made = make_plan(kept=None)
    plan = replace(made, parameters=made.parameters // 4)
    table, page = plan_table(plan), page_of(tmp_path, make_arm(plan)).text
    for text in (table, page):
        assert "adapter, as the method makes it" in text and "own adapter" not in text
    assert "own adapter" in plan_table(make_plan())


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_scores_of_zero_or_not_finite_are_shown_as_they_are(tmp_path: Path, value: float) -> None:
    plan = make_plan(scores=[value] * 6)
    grid = grid_of(plan_table(plan))
    marks = {"0": "○", "1": "○", "2": "●"}
    assert grid == {layer: [("  ", f"{value:.0f}", mark)] * 2 for layer, mark in marks.items()}
    plot_importance(plan, tmp_path / "map.png")
    assert min(size_of(tmp_path / "map.png")) > 300
    page = page_of(tmp_path, make_arm(plan))
    squares = [text for kind, text in page.cells if kind.startswith("cell")]
    assert [text.partition("encoder")[0] for text in squares] == [f"{value:.0f}"] * 6


def test_arms_table_rows() -> None:
    arms = [make_arm(), make_arm(name="LoRA", parameters=99, seconds=3723, metrics={})]
    assert arms_table(arms, "f1").splitlines() == [
        "            adapter parameters   dev f1         time",
        "LoRA-drop            1,234,567   0.8765   1 min 23 s",
        "LoRA                        99        –   1 h 02 min",
    ]


def test_heat_map_grows_with_the_plan_and_shows_it(tmp_path: Path) -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = [f"model.layers.{l}.{kind}" for l in range(32) for kind in kinds]
    big = make_plan(names, [float(i) for i in range(224)], names[100:])
    plot_importance(big, tmp_path / "map.png")
    width, height = size_of(tmp_path / "map.png")
    assert width / 7 > 100 and height / 32 > 40
    images = set()  # another number, or another mark, is another picture
    for plan in (make_plan(), make_plan(scores=SCORES[::-1]), make_plan(kept=KEPT[:1])):
        plot_importance(plan, tmp_path / "map.png")
        images.add((tmp_path / "map.png").read_bytes())
        assert size_of(tmp_path / "map.png")[1] < height / 3
    assert len(images) == 3 and [path.name for path in tmp_path.iterdir()] == ["map.png"]


@pytest.mark.parametrize("losses", [0, 1, 40], ids=lambda n: f"{n} losses")
def test_plot_history(tmp_path: Path, losses: int) -> None:
    numbers = [math.nan if s == 3 else s for s in range(losses)]
    history = [{"step": s, "stage": "main", "loss": loss} for s, loss in enumerate(numbers)]
    arms = [make_arm(name=f"arm {i}", history=history) for i in range(8)]
    plot_history(arms, tmp_path / "loss.png")
    plot_history([make_arm()], tmp_path / "with_dev.png")
    width, height = size_of(tmp_path / "loss.png")
    assert width > 1000 and height > 500
    assert size_of(tmp_path / "with_dev.png")[1] > 1.3 * height


def test_one_loss_is_a_point() -> None:
    history = [{"step": 3, "stage": "main", "loss": 0.5}]
    lines = curves([make_arm(history=history)]).axes[0].lines
    assert [line.get_marker() for line in lines if len(line.get_xdata()) == 1][-1] == "o"


def test_a_decision_that_saves_nothing_says_so(tmp_path: Path) -> None:
    everything = make_plan(kept=[n.format(l) for l in range(3) for n in (QUERY, VALUE)])
    says = "all 6 targets keep their own adapter"
    assert says in plan_table(everything) and says in page_of(tmp_path, make_arm(everything)).text
    assert says not in plan_table(make_plan()) and says not in plan_table(make_plan(kept=None))


def test_how_to_load_and_what_it_takes(tmp_path: Path) -> None:
    model = models.bert(12)
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    loradrop.save(models.adapt(model, r=8), tmp_path / "own")
    loradrop.save(models.share(model, []), tmp_path / "shared")
    plan = plan_of(model)
    code = how_to_load(plan, tmp_path / "shared")
    found: dict[str, Any] = {}
    exec(code, found)
    assert torch.equal(models.outputs(found["model"].eval()), models.outputs(model))
    assert "<pre>import loradrop" in rendered_page(tmp_path, code)
    named = replace(plan, base=dict(plan.base) | {"id": "org/m", "revision": "v1"})
    assert "from_pretrained('org/m', revision='v1')" in how_to_load(named, "a")
    assert "from_pretrained('org/m', revision='v1', num_labels=2" in how_to_load(named, "a", 2)
    says = file_size(plan, tmp_path / "shared")
    size, about = (int(n.replace(",", "")) for n in re.findall("[0-9,]{3,}", says))
    assert size == (tmp_path / "shared" / TENSORS).stat().st_size
    assert about == pytest.approx((tmp_path / "own" / TENSORS).stat().st_size, rel=0.1)


def rendered_page(tmp_path: Path, code: str) -> str:
    write_report(tmp_path / "page.html", [make_arm()], title="t", facts={"load it": code})
    return (tmp_path / "page.html").read_text()


def test_a_loss_that_is_no_number_leaves_the_curves_as_they_are(tmp_path: Path) -> None:
    history = [{"step": step, "stage": "main", "loss": 1 / step} for step in range(1, 40)]
    broken = [*history, {"step": 20.5, "stage": "main", "loss": math.nan}]
    for name, entries in (("whole", history), ("broken", broken)):
        plot_history([make_arm(history=entries)], tmp_path / name)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "broken").read_bytes()


def test_report_has_the_results_and_the_plan(tmp_path: Path) -> None:
    frequency = dict(zip(make_plan().scores["values"], [0, 0, 0.3, 0, 1, 0.52], strict=True))
    plan = make_plan(frequency=frequency)
    page = page_of(tmp_path, make_arm(name="LoRA"), make_arm(plan), model="m", command="c --x y")
    texts = [text for _, text in page.cells]
    assert texts[:5] == ["", "adapter parameters", "dev f1", "steps", "time"]
    assert texts[5:10] == ["LoRA", "1,234,567", "0.8765", "100", "1 min 23 s"]
    squares = [(kind, text) for kind, text in page.cells if kind.startswith("cell")]
    assert [kind for kind, _ in squares] == ["cell shared"] * 4 + ["cell own high"] * 2
    numbers = [text.partition("encoder")[0] for _, text in squares]
    assert numbers == ["10", "5.0", "30", "5.0", "60", "90"]
    tip = next(text for _, text in squares if QUERY.format(1) in text)
    assert "shared adapter, 320 parameters" in tip
    assert "score 30: 30 % of its module type" in tip
    assert "rank 2 of 3" in tip and "kept in 30 % of" in tip
    says = ["own adapter: 1 of 3", "shared adapter: 2 of 3", "0–1", "c --x y", '"lora_alpha"']
    says += ["4 of 6 targets alike in every draw", "online, 12,345 tokens in 20 steps"]
    assert all(part in page.text for part in [*says, "20 of 30 steps, settled"])
    calls = texts[texts.index("the closest calls") + 3 :]
    assert calls[:3] == [VALUE.format(2), "52 %", "● own adapter"]
    assert calls[3:6] == [QUERY.format(1), "30 %", "○ shared adapter"]
    assert "runtime" not in page.text


def test_report_asks_nobody_for_anything(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_arm(make_plan()), link="see https://example.org/x")
    assert page.source.count("https://example.org/x") == 1
    assert "http" not in page.source.replace("https://example.org/x", "").replace("http-equiv", "")
    assert "@import" not in page.source
    assert {tag for tag, _, _ in page.attributes} & {"script", "link", "img", "iframe"} == set()
    links = [value for _, name, value in page.attributes if name.endswith(("src", "href"))]
    assert links and all(value.startswith("#") for value in links)
    assert all(inside.startswith("#") for inside in re.findall(r"url\(([^)]*)\)", page.source))
    assert "prefers-color-scheme: dark" in page.source


def test_report_escapes_what_users_write(tmp_path: Path) -> None:
    evil = '<script>alert("&")</script>$title'
    names = [f"layer.{l}.{evil}" for l in (0, 1)]
    plan = make_plan(names, [1.0, 2.0], [], base=evil, frequency=dict.fromkeys(names, 0.4))
    arm = make_arm(plan, name=evil, metrics={evil: 1.0})
    page = page_of(tmp_path, arm, title=evil, **{evil: evil})
    assert "<script" not in page.source
    assert page.text.count(evil) >= 6
    plot_importance(plan, tmp_path / "map.png")
    plot_history([make_arm(name=r"$\no maths$"), make_arm(name="_hidden")], tmp_path / "loss.png")
    assert min(size_of(tmp_path / "map.png")) > 300


def test_report_replaces_a_file_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("before")
    with pytest.raises(AttributeError):
        write_report(tmp_path / "report.html", [None], title="", facts={})  # type: ignore[list-item]
    assert (tmp_path / "report.html").read_text() == "before"
    page_of(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_every_decided_arm_has_a_map(tmp_path: Path) -> None:
    arms = [make_arm(make_plan(), name=name) for name in ("one", "two")]
    page = page_of(tmp_path, *arms, make_arm(make_plan(scores=None, kept=None), name="plain"))
    assert re.findall("Importance by layer: (.*)", page.text) == ["one", "two"]


def cut_plan(ranks: Sequence[int]) -> Plan:
    """Of two adapters of two directions: one worth 6, and one of three members, worth 3."""
    names = [QUERY.format(l) for l in range(4)]
    left, slots = dict(zip(names, ranks, strict=True)), [0, 1, 1, 1]
    targets = tuple(Target(name, "query", 48, 32, k or 2) for name, k in left.items())
    now = tuple(slot if k else None for slot, k in zip(slots, ranks, strict=True))
    made = Assignment(targets, now)
    values = {name: [2.0, 1.0] for name in names} | {names[0]: [4.0, 2.0]}
    plan = replace(make_plan(names, None, None), assignment=made, parameters=made.parameters)
    record = {"metric": "loss", "values": values, "slots": slots, "ranks": left, "loss": 0.5}
    return plan.after_cut(record | {"compensated": None})


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_cut_shows_what_each_direction_was_worth(encoding: str) -> None:
    """A bar for each, one lower for a third, none for nothing; for every second of nine."""
    plan = cut_plan([2, 1, 1, 1])
    names = [*plan.cut["values"]]
    nine = [729.0 / 3**i for i in range(9)]
    odd = [math.inf, math.nan]  # of a file that somebody wrote
    values = dict(zip(names, (nine, [729.0, 81.0], [0.0, *odd], []), strict=True))
    grid = plan_table(plan.after_cut({**plan.cut, "values": values}), encoding)
    bars = "▂▄▆█" if encoding == "utf-8" else ":=*#"
    low, mid, high, top = bars
    lines = [line for line in grid.splitlines() if re.match(r"\d ", line)]
    assert f" {top}{high}{mid}{low}  " in lines[0] and f" {top}{high}    " in lines[1]
    assert not {*bars} & {*lines[2]} and not {*bars} & {*lines[3]}
    assert "each step three times as much" in grid
    assert "three times" not in plan_table(make_plan(), encoding)


@pytest.mark.parametrize("shared", [1, 0])
def test_a_shared_adapter_that_was_cut_counts_once(tmp_path: Path, shared: int) -> None:
    """Also where it is gone, and nobody shares any more."""
    plan = cut_plan([2, shared, shared, shared])
    table = plan_table(plan)
    assert re.findall(r"(\d+) r[012]\b", table)[:4] == ["67", "11", "11", "11"]
    assert f"by loss; {2 + shared} of 4 directions, predicted rise of the loss 0.5" in table
    assert re.search(r"all .* 9 +67 %", table)
    squares = [text for kind, text in page_of(tmp_path, make_arm(plan)).cells if "cell" in kind]
    assert [text.partition(" ")[0] for text in squares] == ["67", "11", "11", "11"]


def test_a_cut_of_before_says_nothing_of_who_shared() -> None:
    plan = cut_plan([1] * 4)
    cut = {key: value for key, value in plan.cut.items() if key not in ("slots", "earlier")}
    before = Plan.from_dict(plan.to_dict() | {"cut": cut})
    assert plan_table(before) == plan_table(plan)


def test_all_numbers_of_a_second_cut_are_its_own() -> None:
    once = cut_plan([2, 1, 1, 1])
    record = {**once.cut, "ranks": dict.fromkeys(once.cut["ranks"], 1), "loss": 0.125}
    left = once.cut["ranks"]
    record["values"] = {name: v[: left[name]] for name, v in once.cut["values"].items()}
    twice = plan_table(once.after_cut(record))
    assert "several" not in plan_table(once)
    said = "the last of several, by loss; 2 of 3 directions, predicted rise of the loss 0.12"
    assert said in twice


def test_a_bank_without_pairs_has_one_number(tmp_path: Path) -> None:
    """Its elements do not divide into those of targets."""
    plan = replace(make_plan(kept=None, scores=None), parameters=4800)
    assert "parameters  4,800, 250 % of LoRA's 1,920" in plan_table(plan)
    page = page_of(tmp_path, make_arm(plan))
    assert "320 parameters" not in page.text and "4,800" in page.text
    assert "320 parameters" in page_of(tmp_path, make_arm(make_plan())).text
