"""The only training loop: phases, turns, checkpoints, ranks, precision."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import PlanError, RecipeError, RunError, StateError
from gossamer.core.registry import options_of
from gossamer.core.schedule import Batch, Loader, Phase, Plan, Step, Turn
from gossamer.core.stack import Stack
from gossamer.engine.checkpoint import Checkpoints, write_json
from gossamer.engine.distributed import broadcast_data, broadcast_tensors, check_equal, make_accelerator, state_tensors
from gossamer.engine.interrupt import Interrupted, StopSignals
from gossamer.engine.logs import Logs
from gossamer.engine.optim import Optimisers
from gossamer.engine.options import Position, RunOptions, TrainTask
from gossamer.engine.pack import first_non_finite
from gossamer.engine.planning import check_plan
from gossamer.engine.seeding import preserved_generators, seed_globals
from gossamer.engine.turns import Tools, TurnRunner
from gossamer.kits.ema import Ema
from gossamer.recipe import TrainSettings

__all__ = ["Loop", "Position", "RunOptions", "TrainTask"]

_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Loop:
    """Trains a model under a stack of methods.

    Global generators are re-seeded from the step throughout. On several ranks every buffer follows
    rank 0, parameters too at the start of a phase. After a unit of work everything follows rank 0,
    the methods' state too; its steps carry rank 0, so that a loader that heeds them draws alike.

    Args:
        stack: The methods; a fresh stack for every loop.
        task: Gives outputs and loss terms.
        loaders: Loaders by name; the batch of a step is a function of the step (its rank included).
        plan: The recipe's own phases; methods add theirs once the model is prepared.
        settings: Optimiser, precision, averaging, checkpoint rhythm.
        run_dir: Run folder, or None for no files and no checkpoints.
        seed: Seed of the run.
        options: Resume, identity, progress bars, hooks.

    Raises:
        RecipeError: The device cannot do the precision asked for.
    """

    def __init__(
        self,
        stack: Stack,
        task: TrainTask,
        loaders: Mapping[str, Loader],
        plan: Sequence[Phase],
        *,
        settings: TrainSettings | None = None,
        run_dir: str | Path | None = None,
        seed: int = 0,
        options: RunOptions | None = None,
    ) -> None:
        self.stack = stack
        self.settings = settings or TrainSettings()
        self.options = options or RunOptions()
        self.seed = seed
        self.plan = Plan(plan)
        self.at = Position()
        self.accelerator = make_accelerator()
        self.device = self.accelerator.device
        self.checkpoints = Checkpoints(Path(run_dir)) if run_dir is not None else None
        if self.settings.precision == "fp16" and self.device.type == "cpu":
            raise RecipeError("train.precision='fp16': this machine trains on its CPU; use bf16 or no")
        self.ema = Ema(self.settings.ema) if self.settings.ema is not None else None
        self._loaders = {k: self._on_device(stack.loader(k, v)) for k, v in loaders.items()}
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.precision == "fp16")
        dtype = _DTYPES[self.settings.precision]
        self._tools = Tools(self.accelerator, stack, task.loss, dtype, self.settings.accumulate, scaler)
        self._optim = Optimisers(self.settings)
        self._stop = StopSignals(active=False)
        self._mark = (0.0, 0.0)
        main = self.accelerator.is_main_process
        self._logs = Logs(self._folder, main=main, quiet=self.options.quiet, on_row=self.options.on_row)

    # -- the run -----------------------------------------------------------------------------------
    def run(self, model: nn.Module) -> nn.Module:
        """Train the dense ``model`` and make every saving physical.

        Raises:
            Interrupted: A signal asked to stop; the run can be resumed.
            RunError: A loss or gradient is not finite, or the disk is full.
            StateError: The folder holds another run, or a changed recipe wants to resume.
            PlanError: The methods' phases do not fit together.
        """
        return self.finish(self.train(model))

    def train(self, model: nn.Module) -> nn.Module:
        """Prepare (or resume) ``model`` and run all phases; evaluate variants after this, before ``finish``."""
        self._mark = (time.perf_counter(), time.process_time())
        resumed = self._open()
        self.accelerator.wait_for_everyone()  # nobody writes before everybody has looked
        with ExitStack() as context:
            context.enter_context(preserved_generators(self.device))
            context.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*find_unused_parameters=True.*")
            self._stop = context.enter_context(StopSignals(active=self.checkpoints is not None))
            context.enter_context(self._logs)
            model = self._start(model) if resumed is None else self._resume(model, resumed)
            if self.checkpoints is not None and self.accelerator.is_main_process:
                self.checkpoints.clear_leftovers()
            self._logs.open(position=0 if resumed is None else resumed["metrics"], total=self.at.total)
            while self.at.phase < len(self.plan):
                model = self._phase(model, self.plan[self.at.phase])
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        """Let every method make its saving physical; returns the finished model in evaluation mode."""
        with preserved_generators(self.device):
            seed_globals(self._step("finish", 0, 0), "finish")
            model = self.stack.finish(model).to(self.device).eval()
        check_equal(self.accelerator, "finish edits", self.stack.edits)
        if self.checkpoints is not None and self.accelerator.is_main_process:
            self._write_edits()
            if self.options.mark_finished:
                self.checkpoints.mark_finished({"steps": self.at.total})
        self.accelerator.wait_for_everyone()
        return model

    def variants(self, model: nn.Module) -> dict[str, AbstractContextManager[None]]:
        """Return every state to evaluate ``model`` under, with the set of weights that it does not hold now."""
        other = "last" if self.at.phase > self._shipping() else "ema"
        own = {other: self.ema.applied(model)} if self.ema is not None else {}
        return {**self.stack.variants(model), **own}

    def _open(self) -> dict[str, Any] | None:
        if self.checkpoints is None:
            return None
        return self.checkpoints.open(resume=self.options.resume, device=self.device)

    # -- start and resume ----------------------------------------------------------------------------
    def _start(self, model: nn.Module) -> nn.Module:
        if self.stack.edits:
            raise PlanError("the stack has been prepared before; give every loop a fresh Stack with fresh methods")
        model = self._place(model)
        if self.options.dense_hook is not None:
            self.options.dense_hook(model)
        seed_globals(self._step("prepare", 0, 0), "prepare")
        model = self._place(self.stack.prepare(model))
        self.at.prepared = len(self.stack.edits)
        self._lay_out()
        return model

    def _lay_out(self) -> None:
        self.plan = self.stack.phases(self.plan)
        check_plan(self.stack, self.plan, self._loaders, self.settings)
        check_equal(self.accelerator, "prepare edits", self.stack.edits)

    def _resume(self, model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
        if self.checkpoints is not None:
            self.checkpoints.check_same_run(state, self._identity())
        self.at = Position(**state["position"])
        model = self._place(model)
        if self.options.dense_hook is not None:
            self.options.dense_hook(model)
        model = self._place(self.stack.replay(model, state["edits"][: self.at.prepared]))
        self._lay_out()
        if [p.name for p in self.plan] != state["phases"]:
            raise StateError(
                f"{self._folder}: the run has phases {state['phases']}, this gossamer plans "
                f"{[p.name for p in self.plan]}; resume it with the version that started it"
            )
        model = self._place(self.stack.replay(model, state["edits"][self.at.prepared :]))
        try:
            model.load_state_dict(state["model"])
        except RuntimeError as err:
            reason = str(err).splitlines()[-1].strip()
            raise StateError(
                f"{self._folder}: the checkpoint is of another model ({reason}); resume with its own"
            ) from err
        self.stack.load_state_dict(state["methods"])
        self._optim.load_state_dict(state["optimisers"], self._names(model))
        self._tools.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.follow(model)
        return self._place(model)

    def _identity(self) -> dict[str, Any]:
        own = self.options.identity
        if own is None:
            methods: list[Any] = [
                {type(m).__name__: options_of(m) if is_dataclass(m) else {}} for m in self.stack.methods
            ]
            settings = self.settings.model_dump(mode="json", exclude={"checkpoint_every"})
            own = {"train": settings, "seed": self.seed, "methods": methods}
        return json.loads(json.dumps({**own, "processes": self.accelerator.num_processes}))

    # -- phases and steps ------------------------------------------------------------------------------
    def _phase(self, model: nn.Module, phase: Phase) -> nn.Module:
        if not self.at.entered:
            seed_globals(self._step(phase.name, 0, phase.steps), "enter")
            model = self._place(self.stack.enter(model, phase))
            check_equal(self.accelerator, f"edits on entering phase {phase.name!r}", self.stack.edits)
            self.at.entered = True
        groups, extras = self.stack.groups(model), self._extras()
        broadcast_tensors(self.accelerator, state_tensors([model, *extras]))
        fresh = phase.fresh and self.at.step == 0
        self._optim.enter(model, phase, groups, self._names(model), fresh=fresh)
        if self.ema is not None:
            self.ema.follow(model)
        runner = TurnRunner(self._tools, phase, model, extras, groups)
        self._logs.phase(phase.name, phase.steps, self.at.step)
        while self.at.step < phase.steps and not self._ends(model, phase):
            terms, stop = self._work(model, phase) if phase.work is not None else self._turns(model, phase, runner)
            self.at.step += 1
            self.at.total += 1
            self._logs.advance(terms)
            if stop or self.at.step % self.settings.checkpoint_every == 0:
                self._save(model)
            if stop:
                self._interrupt(phase)
        runner.close()
        if self.ema is not None and self.at.phase == self._shipping():
            self.ema.exchange(model)  # before leave: what methods decide from here on is for these weights
        seed_globals(self._step(phase.name, self.at.step, phase.steps), "leave")
        model = self._place(self.stack.leave(model, phase))
        check_equal(self.accelerator, f"edits on leaving phase {phase.name!r}", self.stack.edits)
        self._optim.follow(self._names(model))
        if self.ema is not None:
            self.ema.follow(model)  # by object, while the objects are known: a resume knows names only
        if self.options.on_phase_end is not None:
            self.options.on_phase_end(self.at.phase, phase, model)
        self._tick()
        done = {"phase": phase.name, "event": "end", "steps": self.at.step, "seconds": round(self.at.seconds, 4)}
        self._logs.row({**done, "cpu_seconds": round(self.at.cpu_seconds, 4)}, self.at.total)
        self.at = Position(phase=self.at.phase + 1, total=self.at.total, prepared=self.at.prepared)
        self._save(model)
        return model

    def _ends(self, model: nn.Module, phase: Phase) -> bool:
        if phase.until is None:
            return False
        seed_globals(self._step(phase.name, self.at.step, phase.steps), "until")
        return bool(phase.until(model))

    def _shipping(self) -> float:
        """Return the index of the phase that ends with the average in the weights' place: the last to train them."""
        trains = [i for i, p in enumerate(self.plan) if p.work is None and any("weights" in t.trains for t in p.turns)]
        return trains[-1] if trains and self.settings.ship == "ema" else math.inf

    def _work(self, model: nn.Module, phase: Phase) -> tuple[dict[str, float], bool]:
        started = time.perf_counter()
        step = Step(phase.name, "work", self.at.step, phase.steps, self.seed, 0)
        seed_globals(step, "work")
        model.eval()
        with self.ema.adopting(model) if self.ema is not None else nullcontext():
            terms = (phase.work(model, self._loaders, step) if phase.work is not None else None) or {}
        self._follow_rank_zero(model)
        self._row(step, terms, {}, started)
        return terms, self._mean([float(self._stop.requested)])[0] > 0

    def _follow_rank_zero(self, model: nn.Module) -> None:
        broadcast_tensors(self.accelerator, state_tensors([model, *self._extras()]))
        if self.accelerator.num_processes > 1:
            state = broadcast_data(self.stack.state_dict(), self.device)
            if not self.accelerator.is_main_process:
                self.stack.load_state_dict(state)

    def _turns(self, model: nn.Module, phase: Phase, runner: TurnRunner) -> tuple[dict[str, float], bool]:
        shown: dict[str, float] = {}
        stop = False
        for turn in phase.turns:
            if self.at.step % turn.every == 0:
                terms, asked = self._turn(model, phase, turn, runner)
                shown, stop = {**shown, **terms}, stop or asked
        return shown, stop

    def _turn(self, model: nn.Module, phase: Phase, turn: Turn, runner: TurnRunner) -> tuple[dict[str, float], bool]:
        started = time.perf_counter()
        step = Step(phase.name, turn.name, self.at.step, phase.steps, self.seed, self.accelerator.process_index)
        model.train()
        batch = self._loaders[turn.loader](phase.drawn(step))
        optimisers = [self._optim.active[g] for g in turn.trains]
        with runner.only(turn):
            seed_globals(step, "turn")
            logs = runner.fill(model, turn, batch, step)
            norm = self._complete(optimisers, runner.trained[turn.name])
            values = self._mean([*(v.detach().float() for v in logs.values()), float(self._stop.requested)])
            terms = dict(zip(logs, values[:-1], strict=True))
            self._check_finite(step, batch, terms, norm)
            rates = self._optim.set_rates(phase, step.index, turn.trains)
            seed_globals(step, "before_step")
            self.stack.before_step(model, step)
            for opt in optimisers:
                if any(p.grad is not None for pg in opt.param_groups for p in pg["params"]):
                    self._tools.scaler.step(opt)
            self._tools.scaler.update()
        seed_globals(step, "after_step")
        self.stack.after_step(model, step)
        broadcast_tensors(self.accelerator, state_tensors([model, *self._extras()], buffers_only=True))
        if self.ema is not None:
            self.ema.update(model, runner.trained[turn.name], adopt="weights" not in turn.trains)
        self._row(step, terms, rates, started, norm)
        return terms, values[-1] > 0

    def _complete(self, optimisers: Iterable[torch.optim.Optimizer], params: Sequence[nn.Parameter]) -> float:
        """Unscale and clip finished gradients; returns their norm before clipping."""
        for opt in optimisers:
            if any(p.grad is not None for pg in opt.param_groups for p in pg["params"]):
                self._tools.scaler.unscale_(opt)
        held = [p for p in params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
        if self.settings.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(held, self.settings.clip_grad, norm)
        return float(norm)

    def _check_finite(self, step: Step, batch: Batch, terms: Mapping[str, float], norm: float) -> None:
        bad = {k: v for k, v in terms.items() if not math.isfinite(v)}
        if not bad and (math.isfinite(norm) or self._tools.scaler.is_enabled()):
            return  # an overflow under fp16 is skipped by the scaler
        what = f"loss terms {bad}" if bad else f"the norm of the gradients is {norm}"
        ids = [str(i) for i in batch.get("id", [])]
        raise RunError(
            f"phase {step.phase!r}, turn {step.turn!r}, step {step.index}: {what}; expected finite numbers. "
            f"Batch: {', '.join(ids) or 'without ids'}. Last good checkpoint: {self._last_good()}. "
            f"Lower train.lr, or look at these images"
        )

    # -- saving ------------------------------------------------------------------------------------------
    def _save(self, model: nn.Module) -> None:
        if self.checkpoints is None or not self.accelerator.is_main_process:
            return
        bad = first_non_finite(dict(model.named_parameters()))
        if bad is not None:
            where = self.plan[min(self.at.phase, len(self.plan) - 1)].name
            raise RunError(
                f"phase {where!r}, step {self.at.step}: parameter {bad!r} is no longer finite; last good checkpoint: "
                f"{self._last_good()}. Lower train.lr"
            )
        self._tick()
        state = {
            "position": vars(self.at),
            "phases": [p.name for p in self.plan],
            "edits": self.stack.edits,
            "model": model.state_dict(),
            "methods": self.stack.state_dict(),
            "optimisers": self._optim.state_dict(),
            "scaler": self._tools.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
            "metrics": self._logs.position(),
            "identity": self._identity(),
        }
        self.checkpoints.write(self.at.phase, self.at.step, state)
        self._write_edits()

    def _write_edits(self) -> None:
        if self._folder is not None:
            names = [type(m).__name__ for m in self.stack.methods]
            rows = [{"method": names[i], "index": i, "edit": e} for i, e in self.stack.edits]
            write_json(self._folder / "edits.json", {"format": 1, "edits": rows})

    def _last_good(self) -> str:
        latest = self.checkpoints.latest() if self.checkpoints is not None else None
        return str(latest) if latest is not None else "none yet"

    def _interrupt(self, phase: Phase) -> None:
        raise Interrupted(
            f"stopped on request in phase {phase.name!r} after step {self.at.step} of {phase.steps}; "
            f"everything is saved. Continue with: gossamer run {self._folder}/recipe.yaml --out {self._folder} --resume"
        )

    def _tick(self) -> None:
        """Add the time since the last call to the phase, so that no second of a run belongs to none."""
        now = (time.perf_counter(), time.process_time())
        self.at.seconds += now[0] - self._mark[0]
        self.at.cpu_seconds += now[1] - self._mark[1]
        self._mark = now

    # -- small things --------------------------------------------------------------------------------------
    @property
    def _folder(self) -> Path | None:
        return self.checkpoints.run_dir if self.checkpoints is not None else None

    def _step(self, phase: str, index: int, total: int) -> Step:
        return Step(phase, "loop", index, total, self.seed, 0)

    def _extras(self) -> list[nn.Module]:
        return [m.extra for m in self.stack.methods if m.extra is not None]

    def _place(self, model: nn.Module) -> nn.Module:
        """Move the model and every network a method holds to the device."""
        for method in self.stack.methods:
            owned: list[Any] = [getattr(method, f.name) for f in fields(method)] if is_dataclass(method) else []
            for value in (*owned, method.extra):
                if isinstance(value, nn.Module):
                    value.to(self.device)
        return model.to(self.device)

    def _names(self, model: nn.Module) -> dict[nn.Parameter, str]:
        names = {p: f"model.{n}" for n, p in model.named_parameters()}
        for i, method in enumerate(self.stack.methods):
            if method.extra is not None:
                for n, p in method.extra.named_parameters():
                    names.setdefault(p, f"method{i}.{n}")
        return names

    def _on_device(self, loader: Loader) -> Loader:
        def draw(step: Step) -> Batch:
            seed_globals(step, "loader", per_rank=True)
            return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in loader(step).items()}

        return draw

    def _mean(self, values: Sequence[Tensor | float]) -> list[float]:
        """Return the mean of each value over ranks; one small collective, so that all ranks log and decide alike."""
        vector = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values])
        return self.accelerator.reduce(vector, "mean").tolist()

    def _row(
        self, step: Step, terms: Mapping[str, float], lr: Mapping[str, float], started: float, norm: float | None = None
    ) -> None:
        row: dict[str, Any] = {"phase": step.phase, "turn": step.turn, "step": step.index, "terms": dict(terms)}
        row |= {"lr": dict(lr), "seconds": round(time.perf_counter() - started, 6)}
        if norm is not None:
            row["grad_norm"] = norm
        self._logs.row(row, self.at.total)
