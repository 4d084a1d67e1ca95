"""The command `loradrop`. Each part imports what it needs, so that `--help` is instant."""

import argparse
import difflib
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import loradrop

if TYPE_CHECKING:
    from loradrop.plan import Plan
    from loradrop.run_config import RunConfig

SENTENCES = (
    "The train to the coast leaves at seven, and it is rarely late.",
    "She had read the letter twice before she understood what it said.",
    "I would not recommend this film to anyone.",
)


def _train(args: argparse.Namespace) -> int:
    from loradrop.run import run
    from loradrop.run_config import folder_of

    _quiet()
    config = _config(args.settings)
    results = run(config, resume=args.resume)
    names = ("report.html", "importance.png", "loss.png", "plan.json", "config.yaml")
    files = [Path(config.output) / name for name in names]
    files += [folder_of(config, name) / "adapter" for name in results]
    return _wrote(*filter(Path.exists, files))


def _probe(args: argparse.Namespace) -> int:
    from loradrop.report.grid import plan_table
    from loradrop.run import warm_up_run

    _quiet()
    config = _config(args.settings)
    if args.adapter is not None:
        return _measure(args, config)
    if args.batches is not None or args.split is not None:
        raise ValueError("--batches and --split choose what --adapter is measured on: add it")
    print(plan_table(warm_up_run(config, resume=args.resume)))
    return _wrote(Path(config.output) / "plan.json")


def _measure(args: argparse.Namespace, config: "RunConfig") -> int:
    from loradrop.files import write_json
    from loradrop.report.grid import plan_table
    from loradrop.run import measure

    split, file = args.split or "train", Path(config.output) / "scores.json"
    scores = measure(config, args.adapter, split=split, batches=args.batches).to_dict()
    write_json(file, {"adapter": str(args.adapter), "split": split, **scores})
    print(plan_table(replace(_plan_at(args.adapter), scores=scores)))
    return _wrote(file)


def _plan(args: argparse.Namespace) -> int:
    from loradrop.report.grid import plan_table
    from loradrop.report.plots import plot_importance

    plan = _plan_at(args.path)
    if args.action == "show":
        print(plan_table(plan))
        return 0
    out = args.out or (args.path if args.path.is_dir() else args.path.parent) / "importance.png"
    plot_importance(plan, out)
    return _wrote(out)


def _export(args: argparse.Namespace) -> int:
    from loradrop.formats.peft import export
    from loradrop.run import load_base

    _quiet()
    merged = args.format == "merged"
    of_base, of_file = (args.dtype or "float32", None) if merged else ("float32", args.dtype)
    model, where = load_base(args.adapter, args.model, of_base)
    loradrop.load(model, args.adapter)
    for verdict in export(model, args.out, args.format, dtype=of_file, engines=args.engine):
        answer = "takes it" if verdict.ok else "refuses it"
        print(f"{verdict.engine:<10} {answer}{': ' * bool(verdict.reason)}{verdict.reason}")
    if merged and (tokenizer := _tokenizer(where)) is not None:
        tokenizer.save_pretrained(args.out)
    return _wrote(args.out)


def _verify(args: argparse.Namespace) -> int:
    from loradrop.run import load_base

    _quiet()
    model, where = load_base(args.adapter, args.model)
    loradrop.load(model, args.adapter)
    batches = _batches(model, where)
    if (args.export / "config.json").exists():
        return _verify_merged(model, args.export, batches)
    report = loradrop.verify(model, args.export, batches)
    print(report.table())
    return 0 if report.ok else 1


def _verify_merged(model: Any, path: Path, batches: Iterable[Any]) -> int:
    import torch

    merged = type(model).from_pretrained(path, dtype="auto").eval()
    with torch.no_grad():
        ours, theirs = (
            torch.cat([m(**batch).logits.double().flatten() for batch in batches])
            for m in (model, merged)
        )
    difference = float((ours - theirs).abs().max() / (ours.std(correction=0) or 1.0))
    tolerance = max(1e-4, 16 * torch.finfo(merged.dtype).eps)
    verdict = "ok" if difference <= tolerance else "DIFFER"
    print(f"logits (merged): {verdict}, {difference:.1e} of their standard deviation apart")
    return 0 if difference <= tolerance else 1


def _methods(args: argparse.Namespace) -> int:
    from loradrop.methods import available

    for name, method in available().items():
        about = sys.modules[method.__module__].__doc__ or method.__doc__ or name
        print(f"{name}: {' '.join(about.split(chr(10) * 2)[0].split())}")
        for option in fields(method):
            print(f"    {option.name:<16} {option.default!r}")
    return 0


def _env(args: argparse.Namespace) -> int:
    from loradrop import env

    if args.layer is None:
        print(env.format_report())
    else:
        print(env.explain(args.layer, args.rank, args.dropout, args.dtype, args.chip))
    return 0


def _config(settings: Sequence[str]) -> "RunConfig":
    """From CONFIG.yaml, which has no `=`, and the overrides after it."""
    from loradrop.run_config import read_config

    named = bool(settings) and "=" not in settings[0]
    return read_config(settings[0] if named else None, settings[named:])


def _plan_at(path: Path) -> "Plan":
    """The plan in a plan.json, a native adapter, or the folder of a run."""
    from loradrop.files import read_json
    from loradrop.formats.native import PLAN, TENSORS, read
    from loradrop.plan import Plan

    if path.suffix == ".json" or (path.is_dir() and not (path / TENSORS).exists()):
        return Plan.from_dict(read_json(path / PLAN if path.is_dir() else path))
    return read(path).plan


def _tokenizer(where: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError):
        return None
    bare = len(tokenizer) <= len(tokenizer.all_special_ids)  # what some classes are without files
    return None if bare else tokenizer


def _batches(model: Any, where: str) -> list[dict[str, Any]]:
    """Some text for the model, or arbitrary tokens where its tokenizer cannot be had."""
    import torch

    if (tokenizer := _tokenizer(where)) is not None:
        return [dict(tokenizer(sentence, return_tensors="pt")) for sentence in SENTENCES]
    print("its tokenizer cannot be had: comparing on arbitrary tokens")
    ids = torch.arange(1, 49).reshape(3, 1, 16) * 7919 % model.config.vocab_size
    return [{"input_ids": row} for row in ids]


def _quiet() -> None:
    """Leave the terminal to our own messages and bars."""
    from transformers.utils import logging as theirs

    warnings.simplefilter("ignore", FutureWarning)  # of one library to another
    theirs.set_verbosity_error()  # type: ignore[no-untyped-call]
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]


def _wrote(*paths: Path) -> int:
    print("\nwrote " + "\n      ".join(map(str, paths)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "loradrop",
        description="LoRA-drop: keep LoRA where its output matters, share one LoRA elsewhere.",
        epilog="loradrop COMMAND --help tells the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {loradrop.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    both = argparse.ArgumentParser(add_help=False)  # options of train and probe
    both.add_argument("settings", nargs="*", metavar="CONFIG.yaml | section.key=value")
    both.add_argument("--resume", action="store_true", help="go on with what the output folder has")
    export = argparse.ArgumentParser(add_help=False)  # options of export and merge
    export.add_argument("adapter", type=Path, help="the folder that loradrop.save wrote")
    export.add_argument("out", type=Path, help="the folder to write")
    export.add_argument("--model", help="the base model; default: the one the plan names")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))

    def command(
        name: str, act: Callable[[argparse.Namespace], int], text: str, **options: Any
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False, **options)
        sub.add_argument("--debug", action="store_true", help="show where an error comes from")
        sub.set_defaults(act=act)
        return sub

    command("train", _train, "the whole pipeline, and any arms to compare with", parents=[both])
    text = "the warm-up and the decision alone, or the scores of a trained adapter"
    sub = command("probe", _probe, text, parents=[both])
    sub.add_argument("--adapter", type=Path, help="a native adapter to measure, offline")
    sub.add_argument("--batches", type=int, help="measure on so many batches; default: on all")
    sub.add_argument("--split", choices=("train", "dev"), help="measure on it; default: train")
    sub = command("plan", _plan, "print or draw the importance of each layer and module")
    sub.add_argument("action", choices=("show", "plot"))
    sub.add_argument("path", type=Path, help="plan.json, a native adapter, or the folder of a run")
    sub.add_argument("--out", type=Path, help="default: importance.png beside the plan")
    sub = command("export", _export, "write an adapter as a PEFT folder", parents=[export])
    sub.add_argument("--format", choices=("peft", "merged"), default="peft")
    sub.add_argument("--engine", action="append", help="it has to take the file; repeatable")
    sub = command("merge", _export, "write the model with the adapter in it", parents=[export])
    sub.set_defaults(format="merged", engine=None)
    sub = command("verify", _verify, "compare an export with the adapter it came from")
    sub.add_argument("adapter", type=Path, help="the folder that loradrop.save wrote")
    sub.add_argument("export", type=Path, help="the folder that loradrop export wrote")
    sub.add_argument("--model", help="the base model; default: the one the plan names")
    command("methods", _methods, "the methods and their options")
    sub = command("env", _env, "versions, devices, and which backends run here")
    sub.add_argument("--layer", metavar="MxKxN", help="explain the choice of a backend for it")
    sub.add_argument("--rank", type=int, default=16)
    sub.add_argument("--dropout", type=float, default=0.0)
    sub.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    sub.add_argument("--chip", metavar="ARCH:SMS", help="as 90:132; default: the first device")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments. Exits with 2 for what is unknown, naming the nearest that is known."""
    parser = _parser()
    (choices,) = (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    name = next((arg for arg in argv if not arg.startswith("-")), None)
    if name is not None and name not in choices:
        parser.error(f"there is no command {name!r}{_nearest(name, choices)}")
    args, rest = parser.parse_known_args(argv)
    for extra in rest:
        sub = choices[args.command]
        if extra.startswith("-"):
            known = [option for action in sub._actions for option in action.option_strings]
            sub.error(f"there is no option {extra!r}{_nearest(extra, known)}")
        if not hasattr(args, "settings"):
            sub.error(f"{extra!r} is one argument too many")
        args.settings.append(extra)
    return args


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f": did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: the process's own) and return its exit status."""
    # Before torch is loaded: threads that spin while they wait stall each other on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    log, handler = logging.getLogger("loradrop"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        return int(args.act(args))
    except KeyboardInterrupt:
        again = shlex.join(["loradrop", *argv, *(["--resume"] if "--resume" not in argv else [])])
        hint = f": {again} goes on from the last checkpoint" if hasattr(args, "resume") else ""
        print(f"loradrop: interrupted{hint}", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if args.debug:
            raise
        print(f"loradrop: error: {error}", file=sys.stderr)
        return 2
    finally:
        log.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
