"""The one training loop. It knows no task: a task supplies players, each with an optimiser and loss terms.

A step gives every player in turn its update: terms(random) -> weighted sum -> backward -> (average over
processes) -> clip -> optimiser. All randomness comes from `StepRandom(seed, step)`, so a run that was
interrupted and resumed gives bit for bit the weights of one that was not (on CPU, with as many threads).
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from mambastyle import images
from mambastyle.compute import check_precision
from mambastyle.files import sync_folder, write_error, write_whole
from mambastyle.nn.synced_norm import synchronise
from mambastyle.training.config import RunConfig
from mambastyle.training.random import StepRandom

logger = logging.getLogger(__name__)

Terms = dict[str, Tensor]


@dataclass
class Player:
    """One optimiser, what it moves, and the named unweighted terms that it minimises."""

    name: str
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    terms: Callable[[StepRandom], Terms]
    weights: Mapping[str, float]
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None


@runtime_checkable
class Task(Protocol):
    """What a file of training/ supplies. `modules` are saved; of `averaged` a moving average is kept too."""

    modules: dict[str, nn.Module]
    averaged: dict[str, nn.Module]
    players: list[Player]

    def state(self) -> dict[str, Any]:
        """Plain numbers and tensors beside the modules that a resumed run needs."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...

    def samples(self, averages: Mapping[str, nn.Module]) -> Tensor | None:
        """A batch of pictures to look at, (count, 3, h, w) in [-1, 1], or None."""
        ...

    def export(self, averages: Mapping[str, nn.Module], folder: Path, card: dict[str, Any]) -> None:
        """Write the averaged weights as the checkpoints that people load."""
        ...


@dataclass
class _Log:
    """Means of the terms since the last line."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + 1

    def flush(self) -> dict[str, float]:
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


class Interrupted(Exception):
    """Training stopped early on request; everything up to here is saved."""


def train(config: RunConfig, make_task: Callable[[torch.device], Task]) -> Path:
    """Run or resume training in `config.folder`; returns that folder.

    Writes run.yaml (the resolved settings), log.jsonl, samples/, checkpoints/step-N/ (exact state, the last
    `keep_checkpoints`), and the task's exported weights with every checkpoint. SIGTERM, SIGINT and
    `max_minutes` save before they end it.
    """
    # Without cpu=True accelerate ignores torchrun on a machine without a GPU: every process for itself.
    on_cpu = not torch.accelerator.is_available()
    # accelerate keeps the precision of a process's first run, and refuses another one to the next.
    AcceleratorState._reset_state()
    found = None if on_cpu else torch.accelerator.current_accelerator()
    computer = found or torch.device("cpu")
    config = config.model_copy(update={"precision": check_precision(config.precision, computer)})
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="bf16" if config.precision == "bf16" else "no")
    torch.manual_seed(config.seed)
    task = make_task(accelerator.device)
    for module in task.modules.values():
        module.to(accelerator.device)
        if accelerator.num_processes > 1:
            synchronise(module)
    averages = {name: _average(module, config.ema_decay) for name, module in task.averaged.items()}
    folder = config.folder
    first = _resume(folder, task, averages)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        write_whole(folder / "run.yaml", settings.encode())
        _rewind_log(folder / "log.jsonl", first)
        if first == config.steps:
            # Killed between its last checkpoint and what follows it.
            _export(folder, task, averages, first, config)
    writer = _tensorboard(folder) if config.tensorboard and accelerator.is_main_process else None

    stop = _StopRequest(config.max_minutes)
    log, started, done = _Log(), time.monotonic(), 0
    bar = tqdm(
        total=config.steps,
        initial=first,
        desc=config.name,
        unit="step",
        disable=not accelerator.is_main_process,
        mininterval=2.0,
    )
    step = first
    try:
        with stop:
            for step in range(first, config.steps):
                _step(step, task, config, accelerator, log)
                for name, average in averages.items():
                    average.update_parameters(task.averaged[name])
                done += 1
                bar.update()
                finished = step + 1
                ends = _any_process(stop.requested, accelerator) or finished == config.steps
                if accelerator.is_main_process:
                    if finished % config.log_every == 0 or ends:
                        line = log.flush() | {"step": finished, "pictures": finished * config.batch}
                        line["pictures_per_second"] = done * config.batch / (time.monotonic() - started)
                        _write_line(folder / "log.jsonl", line)
                        if writer is not None:
                            for name, value in line.items():
                                writer.add_scalar(name, value, finished)
                        rate = line["pictures_per_second"]
                        bar.set_postfix_str(f"{rate:.1f} pictures/s")
                    if finished % config.sample_every == 0 or ends:
                        _save_samples(task, averages, folder, finished)
                    if finished % config.checkpoint_every == 0 or ends:
                        _save(folder, task, averages, finished, config)
                accelerator.wait_for_everyone()
                if ends and finished < config.steps:
                    raise Interrupted(f"stopped after step {finished}; the same command goes on from there")
    except Interrupted as interruption:
        logger.warning("%s", interruption)
    finally:
        bar.close()
        if writer is not None:
            writer.close()
    return folder


def _step(step: int, task: Task, config: RunConfig, accelerator: Accelerator, log: _Log) -> None:
    """One update of every player."""
    shards = accelerator.num_processes * config.accumulate
    for player in task.players:
        player.optimizer.zero_grad(set_to_none=True)
        for part in range(config.accumulate):
            shard = accelerator.process_index * config.accumulate + part
            random = StepRandom(config.seed, step, config.batch, shard, shards, accelerator.device)
            with accelerator.autocast():
                terms = player.terms(random)
            if not terms:
                continue
            unknown = set(terms) - set(player.weights)
            if unknown:
                raise KeyError(f"terms without a weight: {sorted(unknown)}")
            loss = torch.stack([player.weights[name] * term.float() for name, term in terms.items()]).sum()
            loss = loss / config.accumulate
            if not torch.isfinite(loss):
                values = {name: float(term.detach()) for name, term in terms.items()}
                raise FloatingPointError(f"{player.name}: the loss of step {step} is not finite: {values}")
            loss.backward()
            for name, term in terms.items():
                log.add(name, float(term.detach()))
        gradients = [p.grad for p in player.parameters if p.grad is not None]
        if accelerator.num_processes > 1:
            # Averaged by hand instead of by a wrapper: players share networks and take higher derivatives.
            flat = process_mean(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        if config.clip_gradient is not None:
            norm = nn.utils.clip_grad_norm_(player.parameters, config.clip_gradient)
            log.add(f"{player.name}_gradient_norm", float(norm))
        player.optimizer.step()
        if player.scheduler is not None:
            player.scheduler.step()


def process_mean(value: Tensor) -> Tensor:
    """The mean of a number over the processes of this run; the number itself in a run of one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def _any_process(value: bool, accelerator: Accelerator) -> bool:
    """Whether it holds in any process of this run: clocks differ, and a signal may reach only one."""
    if accelerator.num_processes == 1:
        return value
    return bool(process_mean(torch.tensor(float(value), device=accelerator.device)) > 0)


def _average(module: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average whose memory grows to `decay` over the first steps."""

    @torch.no_grad()
    def blend(average: Any, current: Any, count: Tensor | int) -> None:
        keep = min(decay, (1 + int(count)) / (10 + int(count)))
        for mean, value in zip(average, current, strict=True):
            mean.lerp_(value, 1 - keep)

    averaged = AveragedModel(module, multi_avg_fn=blend)
    averaged.requires_grad_(False)
    averaged.eval()
    return averaged


def _save(folder: Path, task: Task, averages: Mapping[str, nn.Module], step: int, config: RunConfig) -> None:
    """Exact state for resuming (written aside, then renamed), then the weights for people."""
    state = {
        "step": step,
        "modules": {name: module.state_dict() for name, module in task.modules.items()},
        "averages": {name: average.state_dict() for name, average in averages.items()},
        "optimizers": {player.name: player.optimizer.state_dict() for player in task.players},
        "schedulers": {p.name: p.scheduler.state_dict() for p in task.players if p.scheduler is not None},
        "task": task.state(),
    }
    checkpoints = folder / "checkpoints"
    target, partial = checkpoints / f"step-{step:08d}", checkpoints / f"step-{step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with open(partial / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        # torch may answer the system's error with one of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise write_error(partial / "state.pt", cause) from error
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    sync_folder(checkpoints)
    for old in find_checkpoints(folder)[: -config.keep_checkpoints]:
        shutil.rmtree(old)
    _export(folder, task, averages, step, config)


def _export(
    folder: Path, task: Task, averages: Mapping[str, nn.Module], step: int, config: RunConfig
) -> None:
    """The averaged weights as checkpoints for people."""
    task.export(
        {name: _unwrap(average) for name, average in averages.items()},
        folder,
        {"run": config.name, "step": step, "pictures": step * config.batch},
    )


def find_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted(path for path in found if path.suffix != ".partial" and (path / "state.pt").is_file())


def _resume(folder: Path, task: Task, averages: Mapping[str, nn.Module]) -> int:
    """Load the newest checkpoint; the number of steps already done (0 for a new run)."""
    found = find_checkpoints(folder)
    if not found:
        return 0
    state = torch.load(found[-1] / "state.pt", weights_only=True, map_location="cpu")
    for name, module in task.modules.items():
        module.load_state_dict(state["modules"][name])
    for name, average in averages.items():
        average.load_state_dict(state["averages"][name])
    for player in task.players:
        player.optimizer.load_state_dict(state["optimizers"][player.name])
        if player.scheduler is not None:
            player.scheduler.load_state_dict(state["schedulers"][player.name])
    task.load_state(state["task"])
    logger.info("resumed from %s", found[-1])
    return int(state["step"])


def _unwrap(average: nn.Module) -> nn.Module:
    return average.module if isinstance(average, AveragedModel) else average


def _save_samples(task: Task, averages: Mapping[str, nn.Module], folder: Path, step: int) -> None:
    with torch.no_grad():
        pictures = task.samples({name: _unwrap(average) for name, average in averages.items()})
    if pictures is not None:
        (folder / "samples").mkdir(exist_ok=True)
        columns = max(1, int(len(pictures) ** 0.5))
        images.write(
            folder / "samples" / f"step-{step:08d}.png", images.grid(list(pictures.float().cpu()), columns)
        )


def _write_line(path: Path, values: Mapping[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(
            json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}) + "\n"
        )


def _rewind_log(path: Path, step: int) -> None:
    """Drop what the log tells of steps that a resumed run does again, and a line that a crash cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
    write_whole(path, b"".join(kept))


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # an optional package, imported where used

    return SummaryWriter(str(folder / "tensorboard"))


class _StopRequest:
    """Set by SIGTERM, SIGINT or the time limit; the loop saves and ends at the next step."""

    def __init__(self, max_minutes: float | None) -> None:
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.signalled = False
        self.previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signalled or (self.deadline is not None and time.monotonic() > self.deadline)

    def __enter__(self) -> None:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._on_signal)
        except ValueError:
            # Only the main thread may set handlers; elsewhere the caller stops the run by max_minutes.
            logger.debug("not in the main thread: signals do not stop this run gently")

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _on_signal(self, *_: object) -> None:
        self.signalled = True
