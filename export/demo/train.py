"""Training of the demo cascade, stage by stage, each interruptible and resumed where it stopped.

A finished stage is its networks in the checkpoint folder. A stage in progress is one file, `state/<stage>.safetensors`
(weights, their average, the optimizer's moments), replaced atomically. Every batch is drawn from a generator seeded by
the step, so a resumed run continues as if it had not stopped: bit for bit on the CPU, up to the order of sums on a GPU.

Stages may train side by side, one process each: all but `text` and `vae` need only what those two have finished.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from engines.errors import CheckpointError, SettingsError
from engines.store import write_atomically
from export.demo import cascade, stages
from export.demo.stages import FULL_SIZE, KEYFRAME_SIZE, LARGE_SIZE, Lesson, Pool, Stage
from runtime.config import INTERP_FRAMES

_TIMED_STEPS = 30  # at the start of a stage, to plan how many fit into its time
_UNTIMED_STEPS = 5  # of these, slowed by compilation
_LEARNING_RATE = 2e-3
_WARM_UP = 100  # steps of rising learning rate
_REPORT_EVERY = 5.0  # seconds


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained; `share` is its part of the training time."""

    stage: type[Stage]
    share: float
    batch: int
    lessons: tuple[Lesson, ...]
    bfloat16: bool = False  # where errors of 0.4 % do no harm: not at the start of runs from pure noise
    compiled: bool = True  # on a GPU, where the stage lasts long enough to be worth the compiler's minute

    def without(self, lessons: int) -> "Recipe":
        """The same, less the first `lessons`; at least the last one stays."""
        left = self.lessons[lessons:] or self.lessons[-1:]
        total = sum(lesson.share for lesson in left)
        return replace(self, lessons=tuple(replace(lesson, share=lesson.share / total) for lesson in left))

    def lesson(self, progress: float) -> Lesson:
        """The lesson after this share of all steps."""
        ends = accumulate(lesson.share for lesson in self.lessons)
        return next(
            (lesson for lesson, end in zip(self.lessons, ends, strict=True) if progress < end), self.lessons[-1]
        )

    @property
    def mean_cost(self) -> float:
        """Of a step, in steps of the first lesson."""
        return sum(lesson.share * lesson.cost for lesson in self.lessons) / self.lessons[0].cost


# Base learns from still pictures what things look like, from small frames how they move, then both in its own size: a
# step costs what its pixels cost. The last lesson of each stage is what the runtime asks for.
_TINY = (32, 20)
RECIPES: dict[str, Recipe] = {
    "text": Recipe(stages.Text, 0.03, 1024, (Lesson(1, (1, 1)),), compiled=False),
    "vae": Recipe(
        stages.Vae,
        0.12,
        32,
        (Lesson(0.94, (64, 64)), Lesson(0.056, (192, 160)), Lesson(0.004, FULL_SIZE)),
        bfloat16=True,
    ),
    "base": Recipe(
        stages.Base,
        0.36,
        192,
        (
            Lesson(0.35, _TINY, 1),
            Lesson(0.15, _TINY, 8),
            Lesson(0.33, KEYFRAME_SIZE, 1),
            Lesson(0.17, KEYFRAME_SIZE, 8),
        ),
    ),
    "interp": Recipe(
        stages.Interp, 0.12, 192, (Lesson(0.8, _TINY, INTERP_FRAMES), Lesson(0.2, KEYFRAME_SIZE, INTERP_FRAMES))
    ),
    "if2": Recipe(stages.FirstFrame, 0.07, 96, (Lesson(0.92, (64, 64)), Lesson(0.08, LARGE_SIZE)), bfloat16=True),
    "sr1": Recipe(
        stages.Sr1,
        0.17,
        24,
        (Lesson(0.8, (64, 64), 2), Lesson(0.19, (64, 64), 8), Lesson(0.01, LARGE_SIZE, 8)),
        bfloat16=True,
    ),
    "sr2": Recipe(
        stages.Sr2,
        0.13,
        12,
        (Lesson(0.8, (128, 128), 4), Lesson(0.18, (192, 160), 8), Lesson(0.02, FULL_SIZE, 8)),
        bfloat16=True,
    ),
}


@dataclass(frozen=True)
class Run:
    """What a stage's result depends on, besides the code. Kept in its state; a resumed run must agree."""

    seed: int
    batch: int
    pool: int
    steps: int | None  # None until the first steps have been timed
    skipped: int = 0  # lessons


class Trainer:
    """One stage in training: weights, their moving average, the optimizer, the step."""

    def __init__(self, stage: Stage, recipe: Recipe, run: Run, compiled: bool):
        self.stage, self.recipe, self.run = stage, recipe, run
        self.device = stage.pool.device
        modules = stage.modules().to(self.device).train()
        self.names = [name for name, _ in modules.named_parameters()]
        self.weights = [value for _, value in modules.named_parameters()]
        self.average = [value.detach().clone() for value in self.weights]
        self.moments = [[torch.zeros_like(value) for value in self.weights] for _ in range(2)]
        self.step = 0
        self.loss = torch.compile(stage.loss, dynamic=False) if compiled else stage.loss

    def advance(self) -> Tensor:
        """One step; the batch's loss, still on the device."""
        self.stage.lesson = self.recipe.lesson(self.step / self.run.steps if self.run.steps else 0.0)
        generator = torch.Generator(self.device).manual_seed(self.run.seed * 10**9 + self.step)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.recipe.bfloat16 and self.device == "cuda"):
            loss = self.loss(*self.stage.draw(self.run.batch, generator))
        gradients = torch.autograd.grad(loss, self.weights, allow_unused=True, materialize_grads=True)
        self._adam(list(gradients))
        return loss.detach()

    @torch.no_grad()
    def _adam(self, gradients: list[Tensor], betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8) -> None:
        """Adam (Kingma & Ba 2015) with clipped gradients, decoupled decay, and an average of the weights."""
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_mul_(gradients, (1.0 / norm.clamp(min=1e-6)).clamp(max=1.0))
        self.step += 1
        first, second = self.moments
        torch._foreach_lerp_(first, gradients, 1 - betas[0])
        torch._foreach_mul_(second, betas[1])
        torch._foreach_addcmul_(second, gradients, gradients, 1 - betas[1])
        corrections = [1 - beta**self.step for beta in betas]
        spread = torch._foreach_sqrt(second)
        torch._foreach_div_(spread, math.sqrt(corrections[1]))
        torch._foreach_add_(spread, eps)
        rate = self._rate()
        torch._foreach_mul_(self.weights, 1 - 0.01 * rate)
        torch._foreach_addcdiv_(self.weights, first, spread, -rate / corrections[0])
        torch._foreach_lerp_(self.average, self.weights, 1 - min(0.999, (1 + self.step) / (10 + self.step)))

    def _rate(self) -> float:
        """Rising over the first steps, then falling to 0 along a cosine."""
        total = self.run.steps or math.inf  # not planned yet
        warm = min(1.0, self.step / min(_WARM_UP, 1 + total / 10))
        return _LEARNING_RATE * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / total)))

    def tensors(self) -> dict[str, list[Tensor]]:
        return {"weights": self.weights, "average": self.average, "first": self.moments[0], "second": self.moments[1]}

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{kind}.{name}": value.detach().cpu().contiguous()
            for kind, values in self.tensors().items()
            for name, value in zip(self.names, values, strict=True)
        }
        about = {"step": self.step, "run": asdict(self.run)}
        write_atomically(path, save(tensors, {"about": json.dumps(about)}))

    def load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            kept = Run(**about["run"])
            asked = {**asdict(self.run), "steps": self.run.steps or kept.steps}
            if asdict(kept) != asked:
                raise SettingsError(f"{path} was made with {kept}, not {Run(**asked)}. Remove it to start again.")
            with torch.no_grad():
                for kind, values in self.tensors().items():
                    for name, value in zip(self.names, values, strict=True):
                        value.copy_(file.get_tensor(f"{kind}.{name}"))
        self.run, self.step = kept, about["step"]

    def finish(self, checkpoint: Path) -> None:
        """Ship the averaged weights."""
        with torch.no_grad():
            for weight, average in zip(self.weights, self.average, strict=True):
                weight.copy_(average)
        self.stage.finish(torch.Generator(self.device).manual_seed(self.run.seed))
        for name, network in self.stage.networks.items():
            cascade.save_network(checkpoint, name, network)


def train(
    out: Path,
    names: list[str],
    *,
    minutes: float | None = None,
    steps: int | None = None,
    stop_after: float | None = None,
    seed: int = 0,
    batch: int | None = None,
    pool: int = 32768,
    save_every: float = 30.0,
    compiled: bool | None = None,
    ship: bool = False,
    init: Path | None = None,
    skip_lessons: int = 0,
    report: Callable[[str], None] = print,
) -> bool:
    """Train stages into the checkpoint `out`, in order; False when `stop_after` minutes ended it early.

    Each stage gets its share of `minutes`, planned as a number of steps once the first have been timed, or `steps`.
    Interrupted at any moment, the same call continues from the last state, written every `save_every` seconds and at
    `stop_after`. `ship` ends stages that have a state as they are, for want of time. `init` is a finished checkpoint
    whose weights to start from, `skip_lessons` how many of each stage's lessons these have had. Raises SettingsError
    for settings other than the state's, CheckpointError where an earlier stage or a network of `init` is missing.
    """
    if (minutes is None) == (steps is None):
        raise SettingsError("give either minutes or steps.")
    if skip_lessons < 0:
        raise SettingsError(f"lessons to skip: {skip_lessons}; allowed: 0 or more.")
    unknown = set(names) - set(RECIPES)
    if unknown:
        raise SettingsError(f"unknown stage {', '.join(sorted(unknown))}; allowed: {', '.join(RECIPES)}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    torch.backends.cudnn.benchmark = True
    deadline = time.monotonic() + (stop_after * 60 if stop_after is not None else math.inf)
    cascade.save_rest(out)
    clips = None
    for name in (name for name in RECIPES if name in names):
        recipe, state = RECIPES[name].without(skip_lessons), out / "state" / f"{name}.safetensors"
        if _finished(out, name):
            report(f"{name}: finished before")
            continue
        start = time.monotonic()
        clips = clips or Pool(pool, seed, device)
        run = Run(seed, batch or recipe.batch, pool, steps, skip_lessons)
        torch.manual_seed(seed)  # for the first weights
        fast = recipe.compiled and device == "cuda" if compiled is None else compiled
        trainer = Trainer(_make(recipe, clips, out, init), recipe, run, fast)
        if state.is_file():
            trainer.load(state)
        report(f"{name}: {sum(w.numel() for w in trainer.weights):,} weights, step {trainer.step}, {device}")
        budget = None if minutes is None else minutes * 60 * recipe.share / sum(RECIPES[n].share for n in names)
        if ship and trainer.step:
            report(f"{name}: shipped at step {trainer.step} of {trainer.run.steps}")
        elif not _run(name, trainer, state, start, budget, deadline, save_every, report):
            return False
        trainer.finish(out)
        state.unlink(missing_ok=True)
        del trainer
    return True


def _make(recipe: Recipe, clips: Pool, out: Path, init: Path | None) -> Stage:
    try:
        stage = recipe.stage(clips, out)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename}: an earlier stage is not finished. Train text and vae first."
        ) from None
    for name, network in stage.networks.items() if init else ():
        try:
            network.load_state_dict(cascade.load_network(init, name).state_dict())
        except FileNotFoundError as error:
            raise CheckpointError(f"{error.filename}: --init needs a finished demo checkpoint.") from None
    return stage


def _finished(out: Path, name: str) -> bool:
    return all(cascade.has_network(out, network) for network in RECIPES[name].stage.ships)


def _run(
    name: str,
    trainer: Trainer,
    state: Path,
    start: float,
    budget: float | None,
    deadline: float,
    save_every: float,
    report: Callable[[str], None],
) -> bool:
    """Steps until the plan is done (True) or the deadline is over (False; the state is saved)."""
    saved = reported = timed = time.monotonic()
    losses: list[Tensor] = []
    here = 0  # steps of this call
    while trainer.run.steps is None or trainer.step < trainer.run.steps:
        losses.append(trainer.advance())
        here += 1
        if trainer.run.steps is None and budget is not None:
            if here == _UNTIMED_STEPS:
                timed = _now(trainer)
            elif here == _TIMED_STEPS:
                each = (_now(trainer) - timed) / (_TIMED_STEPS - _UNTIMED_STEPS)
                left = max(0.0, budget - (_now(trainer) - start))
                steps = trainer.step + int(left / (each * trainer.recipe.mean_cost))
                trainer.run = replace(trainer.run, steps=steps)
                report(f"{name}: {each:.3f} s a step, {trainer.run.steps} steps planned")
        if trainer.device == "cuda" and here % 10 and trainer.step != trainer.run.steps:
            continue  # reading the clock there means waiting for the device
        now = _now(trainer)
        if now - reported > _REPORT_EVERY or trainer.step == trainer.run.steps:
            report(f"{name}: step {trainer.step} of {trainer.run.steps}, loss {torch.stack(losses).mean():.4f}")
            losses, reported = [], now
        if now > deadline or now - saved > save_every:
            trainer.save(state)
            saved = now
        if now > deadline:
            report(f"{name}: stopped at step {trainer.step} of {trainer.run.steps}; run again to continue")
            return False
    return True


def _now(trainer: Trainer) -> float:
    if trainer.device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def main(arguments: Any) -> None:
    names = list(RECIPES) if arguments.stage == "all" else arguments.stage.split(",")
    keys = ("minutes", "steps", "stop_after", "seed", "batch", "pool", "ship", "init", "skip_lessons")
    options = {key: getattr(arguments, key) for key in keys}
    done = train(arguments.out, names, **options, report=lambda line: print(line, flush=True))
    if done and arguments.pack and all(_finished(arguments.out, name) for name in RECIPES):
        cascade.pack(arguments.out, arguments.pack)
        print(f"{arguments.pack}: {arguments.pack.stat().st_size / 1e6:.2f} MB")
