"""The command `loradrop`. Each part imports what it needs, so that `--help` is instant."""

import io
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

import loradrop
from loradrop.machine import is_distributed, is_first_rank

if TYPE_CHECKING:
    from loradrop.command.run_config import RunConfig

Dtype = Literal["float32", "bfloat16", "float16"]
Debug = Annotated[bool, Option("--debug", help="Show where an error comes from.")]
Settings = Annotated[
    list[str] | None,
    Argument(
        metavar="CONFIG.yaml | section.key=value",
        help="A YAML file, and options as lora.r=8; the file may be left out.",
    ),
]
Resume = Annotated[bool, Option("--resume", help="Continue what the output folder holds.")]
Measured = Annotated[Path | None, Option(help="Measure this trained adapter, without training.")]
Batches = Annotated[int | None, Option(min=1, help="With --adapter: use only so many batches.")]
Split = Annotated[Literal["train", "dev"] | None, Option(help="With --adapter: train by default.")]
Action = Annotated[
    Literal["show", "plot", "sweep"], Argument(help="Print it, draw it, or compare other choices.")
]
Planned = Annotated[Path, Argument(help="A plan.json, an adapter, or the folder of a run.")]
Picture = Annotated[Path | None, Option(help="importance.png beside the plan by default.")]
Thresholds = Annotated[str | None, Option(help="Of sweep, as 0.5,0.7,0.9.")]
Budgets = Annotated[str | None, Option(help="Of sweep: parts of LoRA's parameters, as 0.25,0.5.")]
Native = Annotated[Path, Argument(help="An adapter: a native or PEFT folder, or a checkpoint.")]
Out = Annotated[Path, Argument(help="The folder to write.")]
Format = Annotated[Literal["peft", "merged"], Option(help="What to write.")]
Engine = Annotated[list[str] | None, Option(help="An engine that must take it; repeatable.")]
Asked = Annotated[list[str] | None, Option("--engine", help="An engine that counts; repeatable.")]
Push = Annotated[str | None, Option(help="Also push it to this repository of the Hub: user/name.")]
Private = Annotated[bool, Option("--private", help="Make that repository private.")]
Base = Annotated[str | None, Option(help="The base model, instead of the one in the plan.")]
Revision = Annotated[str | None, Option(help="Of the base model, instead of the one in the plan.")]
Exported = Annotated[Path, Argument(help="The folder that export or merge wrote.")]
Trained = Annotated[Path, Argument(help="A trained adapter: a native folder, or PEFT's.")]
Smaller = Annotated[Path, Option(help="The PEFT folder to write.")]
Budget = Annotated[float | None, Option(help="Part of the adapter to keep; 0.25 if none.")]
MaxLoss = Annotated[float | None, Option(help="Instead: the predicted rise of the loss to accept.")]
Multiple = Annotated[int, Option(help="Ranks are multiples of it.")]
StepTime = Annotated[
    float | None,
    Option(help="Part of a training step's time, in (0.5, 1]: no adapters in the lowest layers."),
]
Heal = Annotated[int, Option(help="Train what is left for so many steps, as train.* says.")]
Measure = Annotated[int | None, Option(min=1, help="Training rows to measure; 1,024 by default.")]
Padded = Annotated[bool, Option("--padded", help="One rank for all, 8 or more: SGLang, llama.cpp.")]
Unpadded = Annotated[
    bool, Option("--unpadded", help="A rank for each layer, none for those without an adapter.")
]
DtypeOfFile = Annotated[Dtype | None, Option(help="Of A and B; as in the adapter by default.")]
DtypeOfExport = Annotated[
    Dtype | None,
    Option(help="Of A and B, float32 by default; of a merged model, by default its base's."),
]
DtypeOfModel = Annotated[Dtype | None, Option(help="Of the model; its base's by default.")]
DryRun = Annotated[bool, Option("--dry-run", help="Only print the table.")]
Layer = Annotated[str | None, Option(metavar="MxKxN", help="Explain the backend chosen for it.")]
OfLayer = Annotated[int | None, Option("--rank", help="Of its adapter; 16 by default.")]
DropoutOfLayer = Annotated[float | None, Option("--dropout", help="0 by default.")]
DtypeOfTiming = Annotated[
    Dtype | None, Option("--dtype", help="bfloat16 by default, on a CPU float32.")
]
DtypeOfLayer = Annotated[Dtype | None, Option("--dtype", help="bfloat16 by default.")]
Chip = Annotated[str | None, Option(metavar="ARCH:SMS", help="As 90:132; the device's by default.")]
Source = Annotated[str, Argument(metavar="MODEL | CONFIG.yaml | KxN,KxN", help="Whose layers.")]
Sized = Annotated[str | None, Argument(metavar="MODEL | CONFIG.yaml", help="Count for it.")]
Rank = Annotated[int | None, Option(min=1, help="8 by default, or the file's.")]
Tokens = Annotated[str | None, Option(help="Of a batch, as 1024,2048; from 2048 on for more, too.")]
Ranks = Annotated[str | None, Option(help="As 8,16; 16 by default, or the file's.")]
Targets = Annotated[str | None, Option(help="all-linear, or a,b; query and value by default.")]
Training = Annotated[bool, Option("--train/--infer", help="With a backward pass, or without.")]
Dropout = Annotated[float | None, Option(help="0 by default, or the file's.")]
Device = Annotated[Literal["cpu", "cuda"] | None, Option(help="A GPU by default, if any.")]
Seconds = Annotated[float, Option(help="Of timing, for each line of the table.")]
Limit = Annotated[float, Option(help="Seconds for a backend at a layer, compiling included.")]
Points = Annotated[Path | None, Option(help="The user's cache by default, where loradrop looks.")]
Version = Annotated[bool, Option("--version", help="Show the version.", is_eager=True)]

_SECTIONS = (
    "model=ID, data=FILE.csv|FOLDER|HUB_ID and output=FOLDER come first; MiniLM, the standard "
    "library's docstrings and runs/loradrop without them. Then section.key=value: model.revision, "
    "model.dtype; data.text, data.label, data.max_length; lora.r, lora.lora_alpha, "
    "lora.target_modules, method=NAME, method.OPTION (loradrop methods lists them); train.steps, "
    "train.epochs, train.batch_size, train.learning_rate. docs/reference/command.md has all keys."
)
_MEASURES = ("train.batch_size", "train.mask")  # what an adapter is measured with

app = typer.Typer(
    help="LoRA-drop: keep LoRA where its output matters, share one LoRA elsewhere.",
    epilog="loradrop COMMAND --help lists the options of a command.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _loradrop(context: typer.Context, version: Version = False) -> None:
    if version:
        print(f"loradrop {loradrop.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        context.fail("Missing command.")


@app.command(epilog=_SECTIONS)
def train(settings: Settings = None, resume: Resume = False, debug: Debug = False) -> None:
    """Run the whole pipeline, and any arms to compare with."""
    from loradrop.command.run import run
    from loradrop.command.run_config import folder_of

    _quiet()
    config = _config(settings)
    results = run(config, resume=resume)
    names = ("report.html", "importance.png", "loss.png", "plan.json", "config.yaml")
    files = [Path(config.output) / name for name in names]
    files += [folder_of(config, name) / "adapter" for name in results]
    _wrote(*filter(Path.exists, files))


@app.command(epilog=_SECTIONS)
def probe(
    settings: Settings = None, resume: Resume = False, adapter: Measured = None,
    batches: Batches = None, split: Split = None, debug: Debug = False,
) -> None:  # fmt: skip
    """Run only the warm-up and the decision, or measure an adapter."""
    from loradrop.command.run import measure, warm_up_run
    from loradrop.files import write_json
    from loradrop.report.terminal import plan_table

    _quiet()
    config = _config(settings)
    if adapter is None:
        if batches is not None or split is not None:
            raise ValueError("--batches and --split need --adapter, which they choose data for")
        made = warm_up_run(config, resume=resume)
        if is_first_rank():
            print(plan_table(made))
        return _wrote(Path(config.output) / "plan.json")
    if resume:
        raise ValueError("--resume goes on with a warm-up, and --adapter asks for none")
    for override in _parts(settings)[1]:
        name = override.partition("=")[0]
        if name not in _MEASURES and name.partition(".")[0] not in ("model", "data", "output"):
            raise ValueError(
                f"{override!r}: with --adapter only options of model and data, output, "
                f"{' and '.join(_MEASURES)} have a meaning: nothing is trained"
            )
    split, file = split or "train", Path(config.output) / "scores.json"
    model_id = config.model.id if "model.id" in _named(settings) else None
    found, scores = measure(config, adapter, model_id=model_id, split=split, batches=batches)
    if not is_first_rank():
        return None
    write_json(file, {"adapter": str(adapter), "split": split, **scores.to_dict()})
    print(plan_table(found))
    return _wrote(file)


@app.command()
def compress(
    adapter: Trained, settings: Settings = None, out: Smaller = Path("runs/compressed"),
    budget: Budget = None, max_loss: MaxLoss = None, multiple: Multiple = 1, heal: Heal = 0,
    measured: Measure = None, padded: Padded = False, budget_time: StepTime = None,
    dtype: DtypeOfFile = None, dry_run: DryRun = False, resume: Resume = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Keep the directions of a trained adapter that matter."""
    from loradrop.command.compression import PAGE, SPECTRUM, compress, open_adapter, require_apart
    from loradrop.plan_file import REPORT
    from loradrop.remarks import tell_time_in_vain
    from loradrop.report.budgets import BUDGETS, budget_table
    from loradrop.report.terminal import plan_table
    from loradrop.spectral.allocation import allocate, check_amounts, check_steps

    _quiet()
    config, named = _config(settings), _named(settings)
    _require_of_compress(settings, heal, resume)
    data = config if any(option.startswith("data.") for option in named) else None
    base: dict[str, Any] = {"model_id": config.model.id if "model.id" in named else None}
    base |= {"revision": config.model.revision, "dtype": config.model.dtype}
    part = 0.25 if budget is None and max_loss is None else budget
    amount: dict[str, Any] = {"budget": part, "max_loss": max_loss}
    check_amounts(amount)
    check_steps(multiple, budget_time)
    needing = {"--heal": heal or None, "--max-loss": max_loss, "--measured": measured}
    for option, needs in needing.items():
        if needs is not None and data is None:
            raise ValueError(f"{option} {needs:g} needs data: give data=SOURCE")
    if not dry_run:
        require_apart(out, adapter, resume)
    opened = open_adapter(adapter, data, measured=measured, **base)
    how: dict[str, Any] = {"multiple": multiple, "budget_time": budget_time}
    tell_time_in_vain(opened.model, budget_time)
    ranks = allocate(opened.spectrum, **amount, **how)
    label = f"--max-loss {max_loss:g}" if part is None else f"--budget {part:g}"
    asked = {} if part in BUDGETS else {label: ranks}
    kind = dtype or opened.dtypes.adapters
    print(budget_table(opened.spectrum, asked, padded=padded, dtype=kind, **how))
    if dry_run:
        return None
    made, metrics = compress(
        opened, ranks, out, heal=heal, train=config.train, padded=padded, dtype=dtype, resume=resume
    )
    if not is_first_rank():
        return None
    print(plan_table(made))
    for name in metrics.get("after", {}):
        before, after = (metrics[when][name] for when in ("before", "after"))
        print(f"dev {name:<12} {before:.4f} before, {after:.4f} after")
    return _wrote(out, out / REPORT, out / SPECTRUM, out / PAGE)


def _require_of_compress(settings: Settings, heal: int, resume: bool) -> None:
    """Raises ValueError for settings that `compress` would not use."""
    for override in _parts(settings)[1]:
        name = override.partition("=")[0]
        if name.partition(".")[0] not in ("model", "data", "train"):
            raise ValueError(
                f"{override!r}: this command takes options of model, data and train; --out is the "
                "folder that it writes"
            )
        if name in ("train.steps", "train.epochs"):
            raise ValueError(f"{override!r}: --heal says how many steps to train")
        if name.startswith("train.") and not heal and name not in ("train.seed", "train.mask"):
            raise ValueError(f"{override!r} is of training, and --heal asks for none: give --heal")
    if heal < 0:
        raise ValueError(f"--heal {heal}: give a number of steps, or 0")
    if resume and not heal:
        raise ValueError("--resume goes on with a healing: give its --heal STEPS again")


@app.command()
def plan(
    action: Action, path: Planned, out: Picture = None, thresholds: Thresholds = None,
    budgets: Budgets = None, debug: Debug = False,
) -> None:  # fmt: skip
    """Print or plot the importance of each layer, or what other thresholds would have kept."""
    from loradrop.files import require_writable
    from loradrop.plan_file import plan_at
    from loradrop.report.sweep import parts, sweep_table
    from loradrop.report.terminal import plan_table

    asked = parts("--thresholds", thresholds), parts("--budgets", budgets)
    if action != "sweep" and any(asked):
        raise ValueError("--thresholds and --budgets are of loradrop plan sweep")
    if action != "plot" and out is not None:
        raise ValueError("--out is of loradrop plan plot: the others print")
    found = plan_at(path)
    if action == "sweep":
        return print(sweep_table(found, *asked))
    if action == "show":
        return print(plan_table(found))
    from loradrop.report.plots import plot_importance

    out = out or (path if path.is_dir() else path.parent) / "importance.png"
    require_writable(out.parent, "name another file by --out", out)
    plot_importance(found, out)
    return _wrote(out)


@app.command()
def export(
    adapter: Native, out: Out, format: Format = "peft", engine: Engine = None,
    model: Base = None, revision: Revision = None, dtype: DtypeOfExport = None,
    unpadded: Unpadded = False, push: Push = None, private: Private = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Write an adapter as a PEFT folder, and to the Hub."""
    from loradrop.command.adapter_bases import (
        base_named_by,
        load_base,
        own_tokenizer,
        tokenizer_for,
    )
    from loradrop.command.base_models import pad_with
    from loradrop.files import require_writable
    from loradrop.formats import hub
    from loradrop.formats.peft import write

    _quiet()
    merged = format == "merged"
    if private and push is None:
        raise ValueError("--private is of --push user/name")
    if merged and push is not None:
        raise ValueError(
            "--push is of the PEFT format: write the merged model into a folder, and upload that "
            "(hf upload user/name folder)"
        )
    require_writable(out, "choose another folder")
    of_base, of_file = (dtype or "auto", None) if merged else ("auto", dtype)
    if not merged and base_named_by(adapter)[1]:  # tensors trained whole keep their digits
        of_base = "float32"
    base, _ = load_base(adapter, model, of_base, revision=revision, option="--model")
    loradrop.load(base, adapter)
    tokenizer = tokenizer_for(adapter, base) if merged else own_tokenizer(adapter)
    if merged and tokenizer is not None and "Classification" in type(base).__name__:
        pad_with(base, tokenizer)  # as in training: without, some take one text at a time
    how: dict[str, Any] = {"dtype": of_file, "padded": not unpadded, "engines": engine}
    for verdict in write(base, out, format, **how, restore=False):
        answer = "takes it" if verdict.ok else "refuses it"
        print(f"{verdict.engine:<10} {answer}{': ' * bool(verdict.reason)}{verdict.reason}")
    own = [] if tokenizer is None else tokenizer.save_pretrained(out)
    _wrote(out)
    if push is not None:
        names = [str(Path(file).relative_to(out)) for file in own if Path(file).exists()]
        print(f"pushed to {hub.push(out, push, private=private or None, also=names)}")


@app.command()
def merge(
    adapter: Native, out: Out, model: Base = None, revision: Revision = None,
    dtype: DtypeOfModel = None, debug: Debug = False,
) -> None:  # fmt: skip
    """Write the model with the adapter in it."""
    export(adapter, out, "merged", None, model, revision, dtype)


@app.command()
def verify(
    adapter: Native, exported: Exported, engine: Asked = None, model: Base = None,
    revision: Revision = None, debug: Debug = False,
) -> None:  # fmt: skip
    """Compare an export with the adapter it came from."""
    from loradrop.command.adapter_bases import load_base
    from loradrop.command.base_models import tokenizer_of
    from loradrop.formats.check import verify
    from loradrop.formats.peft_file import CONFIG, TENSORS
    from loradrop.text.samples import batches_for

    _quiet()
    base, _ = load_base(adapter, model, revision=revision, option="--model")
    loradrop.load(base, adapter)
    found = any((exported / name).exists() for name in ("config.json", CONFIG, TENSORS))
    if not found:
        raise FileNotFoundError(
            f"{exported} holds no adapter of PEFT and no merged model: give the folder that "
            "loradrop export or loradrop merge wrote"
        )
    batches = batches_for(base, tokenizer := tokenizer_of(base))
    if tokenizer is None:
        print("cannot load its tokenizer: comparing on arbitrary tokens")
    report = verify(base, exported, batches, engines=engine)
    print(report.table())
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def methods(
    model: Sized = None, rank: Rank = None, targets: Targets = None, debug: Debug = False
) -> None:
    """List the methods and their options, or what each trains on a model."""
    from loradrop.methods import available

    if model is not None:
        from loradrop.command.counting import parameters, table
        from loradrop.command.run_config import configured

        _quiet()
        base, config = configured(model, targets)
        config = config if rank is None else replace(config, r=rank)
        return print(table(parameters(base.id, config, base.revision)))
    if rank is not None or targets is not None:
        raise ValueError("--rank and --targets need a model: loradrop methods MODEL")
    for name, method in available().items():
        defaults = method()  # a default may be what None comes to
        about = sys.modules[method.__module__].__doc__ or method.__doc__ or name
        print(f"{name}: {' '.join(about.split(chr(10) * 2)[0].split())}")
        for option in fields(method):
            print(f"    {option.name:<16} {getattr(defaults, option.name)!r}")


@app.command()
def tune(
    source: Source, tokens: Tokens = None, rank: Ranks = None, targets: Targets = None,
    train: Training = True, dropout: Dropout = None, dtype: DtypeOfTiming = None,
    device: Device = None, seconds: Seconds = 1.0, limit: Limit = 120.0, out: Points = None,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Measure which backend is fastest for your layers here."""
    import torch

    from loradrop.command import tuning

    _quiet()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; leave it out")
    ranks = None if rank is None else tuning.numbers("--rank", rank)
    sizes = tuning.TOKENS[device] if tokens is None else tuning.numbers("--tokens", tokens)
    layers, p = tuning.layers_to_tune(source, ranks, targets)
    p = p if dropout is None else dropout
    kind = dtype or tuning.DEFAULT_DTYPE[device]
    cells = tuning.cells_of(layers, sizes, kind, p, train)
    path = tuning.tune(cells, device, print, seconds=seconds, limit=limit, out=out)
    if device == "cpu":
        print("\nOn a CPU the op runs as plain PyTorch calls all the same, unless these failed.")
    if path is not None:
        _wrote(path)


@app.command()
def env(
    layer: Layer = None, rank: OfLayer = None, dropout: DropoutOfLayer = None,
    dtype: DtypeOfLayer = None, chip: Chip = None, debug: Debug = False,
) -> None:  # fmt: skip
    """Show versions, devices, and which backends run here."""
    from loradrop.command.env import explain, format_report

    options = {"rank": rank, "dropout": dropout, "dtype": dtype, "chip": chip}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if layer is None and given:
        named = " and ".join(f"--{name} {value}" for name, value in given.items())
        raise ValueError(f"{named}: name the layer too, as --layer 8192x4096x4096")
    print(format_report() if layer is None else explain(layer, **given))


def _config(settings: Sequence[str] | None) -> "RunConfig":
    """From CONFIG.yaml, which is a file or has no `=`, and the overrides after it."""
    from loradrop.command.run_config import read_config

    return read_config(*_parts(settings))


def _named(settings: Sequence[str] | None) -> set[str]:
    """The options of model and data that the file or an override gives: the rest are defaults."""
    from loradrop.command.run_config import options_named

    return options_named(*_parts(settings))


def _parts(settings: Sequence[str] | None) -> tuple[str | None, Sequence[str]]:
    settings = settings or ()
    named = bool(settings) and ("=" not in settings[0] or Path(settings[0]).is_file())
    return settings[0] if named else None, settings[named:]


def _quiet() -> None:
    """Leave the terminal to our own messages and bars."""
    from transformers.utils import logging as theirs

    warnings.simplefilter("ignore", FutureWarning)  # of one library to another
    theirs.set_verbosity_error()  # type: ignore[no-untyped-call]
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]


def _wrote(*paths: Path) -> None:
    if is_first_rank():
        print("\nwrote " + "\n      ".join(map(str, paths)))


def _at_home(argument: str) -> str:
    """The argument, or option=value, with a ~ that the shell has left alone; alone it is null."""
    option, equals, value = argument.rpartition("=")
    return argument if equals and value == "~" else option + equals + os.path.expanduser(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: the process's own) and return its exit status.

    0: done; 1: `verify` found a difference; 2: an error, on stderr; 130: interrupted.
    """
    # Before torch is loaded: threads that spin while they wait stall each other on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):  # a terminal or a log may lack some characters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    argv = list(map(_at_home, sys.argv[1:] if argv is None else argv))
    log, handler = logging.getLogger("loradrop"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if is_first_rank() else logging.WARNING)
    status, was_in_group = 0, is_distributed()
    try:
        typer.main.get_command(app).main(argv, prog_name="loradrop")
    except SystemExit as stop:
        status = int(stop.code or 0)
    except Exception as error:
        # A traceback is for a fault of ours: other kinds than these.
        known = isinstance(error, (ValueError, OSError, RuntimeError, ImportError))
        if "--debug" in argv or not (known or type(error).__name__ == "SafetensorError"):
            raise
        print(f"loradrop: error: {error}", file=sys.stderr)
        status = 2
    finally:
        log.removeHandler(handler)
    if is_distributed() and not was_in_group and status == 0:  # else other ranks may wait for it
        sys.modules["torch.distributed"].destroy_process_group()
    if status == 130:
        again = shlex.join(["loradrop", *argv, *(["--resume"] if "--resume" not in argv else [])])
        measures = any(a.startswith("--adapter") for a in argv)
        trains = argv[0] == "train" or (argv[0] == "probe" and not measures)
        goes_on = trains or any(a.startswith("--heal") for a in argv)
        hint = f": {again} continues from the last checkpoint" * goes_on
        print(f"loradrop: interrupted{hint}", file=sys.stderr)
    return status
