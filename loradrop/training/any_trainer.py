"""A method in one run of any Trainer: the callback, how it resumes, and what it cannot serve."""

import json
import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from loradrop.bank import AdapterBank, bank_of
from loradrop.files import write_json
from loradrop.formats.peft_file import CONFIG
from loradrop.injection import injection_of, plan_of, require_unmerged
from loradrop.loading import differences
from loradrop.methods.base import Method, Warmup
from loradrop.native import FOLDER, PLAN, TENSORS, checkpoint
from loradrop.optimizers import follow, groups_of, regroup
from loradrop.plan import Plan
from loradrop.plan_file import plan_at
from loradrop.probing import probe
from loradrop.quantised import require_gradients
from loradrop.ranks import world_size
from loradrop.sharing import conclude
from loradrop.statistics.batches import small_batches
from loradrop.statistics.masks import MASK, MaskFn, Masking
from loradrop.training.arguments import require_right_gradients
from loradrop.training.averaging import keep_whole
from loradrop.training.callbacks import EVENTS, MethodCallback

_log = logging.getLogger(__name__)


_OF_RUN = "loradrop_callback"  # the name of the one of a run, in its state
_LATE = (
    "LoraDropCallback did not see how the Trainer was made with this model, so the run cannot be "
    "resumed like that once it has decided: make the Trainer with model= and "
    "callbacks=[loradrop.LoraDropCallback()], not with model_init= or add_callback"
)


class LoraDropCallback(TrainerCallback):
    """The whole method in one run of any Trainer: warm-up, select, share, and on.

        loradrop.inject(model, loradrop.LoraDropConfig(...))
        Trainer(model, args, ..., callbacks=[loradrop.LoraDropCallback()]).train()

    The Trainer's first steps are the warm-up. At its end the best model so far is forgotten, and
    the optimiser forgets what it knew of adapters that begin anew; the schedule goes on.
    Checkpoints resume on either side of it; one outside output_dir is named in
    TrainingArguments(resume_from_checkpoint=...), too. A method without a warm-up gets its events
    alone. A PeftModel needs no `inject`, but a `loradrop.integrations.peft.LoraDropConfig`.

    mask, mask_fn   of the statistics, as for `probe`

    Under FSDP2 it keeps what is trained whole on every rank (`keep_whole`), for a method that does
    something in the middle of a run. It raises ValueError for options of the warm-up that need
    `fit` (sample_ratio, source="offline" of lora_drop), for a stream of rows, and a model
    without logits, that a method measures offline, for a checkpoint that it cannot find, and where
    sharing could not reach every process (DeepSpeed, FSDP1, DDP without find_unused_parameters),
    and for reentrant checkpointing in several processes, as `fit` does.
    """

    def __init__(self, *, mask: str | None = MASK, mask_fn: MaskFn | None = None) -> None:
        self.masking = Masking(mask, mask_fn)
        self.events: MethodCallback | None = None
        self.warmup: Warmup | None = None
        self._bank: AdapterBank | None = None  # of the model that the Trainer was made with

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
        **_: Any,
    ) -> None:  # fmt: skip
        method, plugin = injection_of(model).config.method, _fsdp(args)
        # A resume brings the adapters before there is an optimiser; under FSDP there is one then.
        self._bank = bank = bank_of(model)
        bank.adopts = plugin is None
        if optimizer is not None and plugin is None:  # one of the user's own is there, too
            groups = groups_of(model, optimizer)
            bank.changed = lambda: regroup(model, optimizer, groups)
        if plugin and (method.acts or method.warms_up):
            _keep_whole(model, plugin)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, model: Any = None,
        optimizer: Any = None, train_dataloader: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        require_right_gradients(args)
        require_unmerged(model)
        require_gradients(model)
        bank, injection = bank_of(model), injection_of(model)
        late = not (bank.adopts or bank is self._bank)
        if getattr(state, _OF_RUN, self) is not self:
            raise ValueError("the Trainer has two LoraDropCallbacks: give it one")
        setattr(state, _OF_RUN, self)
        if _fsdp(args) is None:
            bank.changed = None  # from here on the optimiser follows a decision, and holds the rest
            bank.adopts = False
            if not args.deepspeed:
                _require_held(bank, optimizer)
        if self.events is not None:  # a run before this one, which may have ended with an error
            self.events.detach()
        method, folder = injection.config.method, None
        if state.global_step:
            folder = _resumed(args, state) / FOLDER
            injection.plan = self._plan_in(folder, model) or injection.plan
        # A bank of somebody else's says nothing of a decision; the plan does.
        after = folder is not None and injection.plan is not None and injection.plan.warmup
        decided = bank.assignment.decided or bool(after)
        self.warmup = None if decided else method.stage(state.max_steps)
        if self.warmup is not None:
            method.check(bank.targets)
            _require_one_run(self.warmup, method, args, model)
            if late and _fsdp(args) is None:
                _log.warning(_LATE)
        statistics = () if decided and method.warms_up else method.statistics
        self.events = MethodCallback(
            model, statistics=statistics, masking=self.masking, warmup=self.warmup
        )
        self.events.require_measurable(train_dataloader)
        if folder is not None:
            if (folder / EVENTS).exists():
                self.events.load(folder)
            else:
                _log.warning("%s is not there: the statistics count from here on", folder / EVENTS)
        self.events.begin()

    @staticmethod
    def _plan_in(folder: Path, model: nn.Module) -> Plan | None:
        """The plan of the checkpoint that a run resumes from, None where it has none. Raises
        ValueError for one of another configuration.
        """
        if not (folder / PLAN).exists():
            return None
        plan, names = plan_at(folder), [target.name for target in bank_of(model).targets]
        if differing := differences(injection_of(model).config, plan.config, names):
            raise ValueError(
                f"{folder} was trained with {differing} than the model was injected with: resume "
                "with a model that is injected as it was then"
            )
        return plan

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self._complete(args, state, control, model)

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self._complete(args, state, control, model)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **objects: Any
    ) -> None:
        self._complete(args, state, control, model)
        if self.events is not None:
            self.events.on_pre_optimizer_step(args, state, control, **objects)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **o: Any
    ) -> None:
        assert self.events is not None
        self.events.on_step_end(args, state, TrainerControl(), **o)
        self._complete(args, state, control, model)  # what it has is of before a decision
        step, collector = state.global_step, self.events.collector
        if self.warmup is None or not (self.events.settled or step >= self.warmup.steps):
            return
        assert collector is not None
        record = self.events.record(step)
        self.events.watch(collector, last=True)
        groups = groups_of(model, o["optimizer"])
        set_seed(args.seed)
        if self.warmup.source == "offline":
            rows = o["train_dataloader"]
            batches = small_batches(rows.dataset, rows.collate_fn, args.seed)
            scores = probe(model, batches, gram=True, **self.masking._asdict())
        else:
            scores = collector.scores()
        update = conclude(model, scores, record)
        follow(model, o["optimizer"], groups, update)
        self.warmup = None
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self.events.detach()
        self.events = MethodCallback(model, masking=self.masking)
        self.events.begin()

    def on_save(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any
    ) -> None:
        if self.events is not None:
            # A trial's folder is found by what is in it, once the first rank has written that.
            found = _written(args, state) if args.should_save else None
            folder = (found or _of_step(args, state)) / FOLDER
            self.events.save(folder, found is not None)
            if found is not None:
                if bank_of(model).changed is not None:  # FSDP2 may write the checkpoint in parts
                    _save_whole(model, folder)
                if not (folder / TENSORS).exists():  # PEFT writes the adapters
                    write_json(folder / PLAN, plan_of(model).to_dict())

    def _complete(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any
    ) -> None:
        """The rest of a checkpoint that transformers' enable_jit_checkpoint has just written: it
        tells no callback. Of several processes each one stops where it is, which nobody can join.
        """
        if control.should_training_stop and world_size() == 1:
            folder = _of_step(args, state)
            there = _logged(folder / TRAINER_STATE_NAME, state)
            if there and not (folder / FOLDER / EVENTS).exists():
                self.on_save(args, state, control, model)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self.events is not None:
            self.events.on_train_end(args, state, control)
        if self.warmup is not None and state.global_step < self.warmup.steps:
            _log.warning(
                "the run ended at step %d, in the warm-up of %d steps: nothing is decided. A "
                "callback that ends runs, as EarlyStoppingCallback, counts from the first step on",
                state.global_step, self.warmup.steps,
            )  # fmt: skip


def _require_held(bank: AdapterBank, optimizer: Any) -> None:
    """Raises ValueError for an optimiser that holds none of the adapters that are trained."""
    held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
    trained = [p for p in bank.parameters() if p.requires_grad]
    if held and trained and not any(id(p) in held for p in trained):
        raise ValueError(
            "LoraDropCallback: the optimiser holds none of the adapters. They changed after it was "
            "made, as by a cut, or by inject or load: make a new Trainer with a new optimiser"
        )


def _of_step(args: Any, state: TrainerState) -> Path:
    """The run's checkpoint of this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _written(args: Any, state: TrainerState) -> Path | None:
    """The checkpoint that the run has just written. A trial of a search has a folder of its own,
    whose name a Trainer tells nobody: it is the last one that logged what the run did; None where
    there is none in output_dir.
    """
    here = _of_step(args, state)
    if not state.is_hyper_param_search:
        return here
    files = Path(args.output_dir).rglob(f"{here.name}/{TRAINER_STATE_NAME}")
    logged = [(file.stat().st_mtime_ns, file) for file in files if _logged(file, state)]
    return max(logged)[1].parent if logged else None


def _resumed(args: Any, state: TrainerState) -> Path:
    """The checkpoint that the run resumes from, which a Trainer tells nobody: the one that logged
    what the run remembers.
    """
    given = args.resume_from_checkpoint
    named = [Path(given)] if isinstance(given, str) else []
    for folder in (*named, _of_step(args, state)):
        if _logged(folder / TRAINER_STATE_NAME, state):
            return folder
    raise ValueError(
        f"LoraDropCallback: the checkpoint that the run resumes from, of step {state.global_step}, "
        f"is not the one in {args.output_dir}, so what it measured cannot be found: name it in "
        "TrainingArguments(resume_from_checkpoint=...), too"
    )


def _logged(file: Path, state: TrainerState) -> bool:
    """Whether the file is the state of a run that logged the same up to the same step."""
    try:
        return _history(TrainerState.load_from_json(str(file))) == _history(state)
    except (OSError, ValueError):  # not there, or of a run beside this one that is writing it
        return False


def _history(state: TrainerState) -> str:
    """As text, in which NaN is equal to itself."""
    return json.dumps([state.global_step, state.total_flos, state.log_history], sort_keys=True)


def _fsdp(args: Any) -> Any:
    """accelerate's plugin, where it shards the model; None where not, as on a CPU."""
    from accelerate.state import AcceleratorState

    return getattr(AcceleratorState(), "fsdp_plugin", None) if args.fsdp else None


def _keep_whole(model: Any, plugin: Any) -> None:
    """Before the Trainer shards the model: FSDP2 leaves out what is trained.

    Raises ValueError for FSDP1, and for what accelerate cannot do then.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            "LoraDropCallback: sharing changes the parameters, which FSDP1 holds itself: use "
            "FSDP2, fsdp_config={'version': 2}"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "LoraDropCallback: adapters that are shared in the middle of a run stay whole under "
            "FSDP2, and cpu_ram_efficient_loading takes every tensor apart: leave it out of "
            "fsdp_config"
        )
    trained = keep_whole(model)
    owners = [m for m in model.modules() if trained & set(m.parameters(recurse=False))]
    plugin.ignored_modules = [*(plugin.ignored_modules or ()), *owners]


def _save_whole(model: Any, folder: Path) -> None:
    """Adapters that are whole, where no file of the checkpoint has them: a run that goes on after
    the sharing begins with them.
    """
    if hasattr(model, "peft_config"):
        if not (folder.parent / CONFIG).exists():
            model.save_pretrained(folder.parent)
    elif not (folder / TENSORS).exists():
        checkpoint(model, folder)


def _require_one_run(warmup: Warmup, method: Method, args: Any, model: Any) -> None:
    why = None
    if warmup.sample_ratio < 1.0 or (warmup.source != "online" and method.keeps_parameters):
        why = 'sample_ratio below 1 and source="offline" need a run of their own'
    elif args.deepspeed:
        why = "sharing changes the parameters, which DeepSpeed holds itself"
    elif _fsdp(args) is not None:
        return
    elif world_size() > 1 and not method.keeps_parameters:
        why = f"the method {method.name!r} makes new parameters, which DDP does not know"
    elif world_size() > 1:
        unused = args.ddp_find_unused_parameters
        if unused is False or (unused is None and args.gradient_checkpointing):
            why = "sharing leaves parameters unused: pass ddp_find_unused_parameters=True"
    if why is not None:
        instead = "loradrop.fit makes a new Trainer for each stage"
        if hasattr(model, "peft_config"):
            instead = (
                "Train for the warm-up alone, call loradrop.probe and loradrop.share, and train on "
                "with a new Trainer; or give LoraDropConfig the plan of another run"
            )
        raise ValueError(f"LoraDropCallback: {why}. {instead}")
