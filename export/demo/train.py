"""Training of the demo cascade, stage by stage, each interruptible and resumed where it stopped.

A finished stage is its networks in the checkpoint folder. A stage in progress is one file, `state/<stage>.safetensors`
(weights, their average, the optimizer's moments), replaced atomically. Every batch is drawn from a generator seeded by
the step, so a resumed run continues as if it had not stopped: bit for bit on the CPU, up to the order of sums on a GPU.

Stages may train side by side, one process each, once those that they need are finished: all but vae need text, sr2
needs vae, interp starts from base's weights, sr1 from if2's.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from engines.errors import CheckpointError, OutputError, SettingsError
from engines.store import write_atomically
from export.demo import cascade, stages
from export.demo.muon import Muon
from export.demo.stages import FULL_SIZE, KEYFRAME_SIZE, LARGE_SIZE, Batch, Lesson, Pool, Stage
from runtime.config import INTERP_FRAMES

_TIMED_STEPS = 30  # at least, at the start of a lesson, to plan how many fit into its time
_TIMED_SECONDS, _TIMED_SHARE = 5.0, 0.05  # at least one of the two, the latter of the lesson's time
_EAGER_STEPS = 3  # of these, before a CUDA graph is captured: libraries choose their algorithms in them
_UNTIMED_STEPS = _EAGER_STEPS + 2
_MATRIX_RATE, _OTHER_RATE = 0.03, 3e-3  # learning rates of Muon and of AdamW
_WARM_UP = 100  # steps of rising learning rate
_FALL = 0.3  # share of a stage in which it falls to 0
_REPORT_EVERY = 5.0  # seconds
_LOST_AFTER = 10  # steps in a row without a finite loss


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained; `share` is its part of the training time, `parent` the stage whose weights it starts
    from, as far as they fit."""

    stage: type[Stage]
    share: float
    batch: int
    lessons: tuple[Lesson, ...]
    parent: str | None = None
    bfloat16: bool = True

    def without(self, lessons: int) -> "Recipe":
        """The same, less the first `lessons`; at least the last one stays."""
        left = self.lessons[lessons:] or self.lessons[-1:]
        total = sum(lesson.share for lesson in left)
        return replace(self, lessons=tuple(replace(lesson, share=lesson.share / total) for lesson in left))

    def plan(self, steps: int) -> list[int]:
        """Steps of each lesson, of `steps` in all."""
        ends = [round(end * steps) for end in accumulate(lesson.share for lesson in self.lessons)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]


# Base learns from still pictures what things look like, from slow clips that frames agree, then how things move.
# Pictures go on beside clips, whose frames show the same few things again and again: shapes were forgotten over them.
_PICTURES = Lesson(0, KEYFRAME_SIZE, batch=0.5)
_BASE_LESSONS = (
    Lesson(0.25, KEYFRAME_SIZE),
    Lesson(0.35, KEYFRAME_SIZE, 8, batch=0.25, speed=0, beside=_PICTURES),
    Lesson(0.4, KEYFRAME_SIZE, 8, batch=0.25, beside=_PICTURES),
)
# The last lesson of each stage is what the runtime asks for: whole frames, which norms see there, but in the
# autoencoder's.
RECIPES: dict[str, Recipe] = {
    "text": Recipe(stages.Text, 0.03, 1024, (Lesson(1, (1, 1)),), bfloat16=False),
    "vae": Recipe(stages.Vae, 0.14, 32, (Lesson(0.7, (64, 64)), Lesson(0.3, (128, 128), batch=1 / 4))),
    "base": Recipe(stages.Base, 0.5, 192, _BASE_LESSONS),
    "interp": Recipe(stages.Interp, 0.09, 48, (Lesson(1, KEYFRAME_SIZE, INTERP_FRAMES),), parent="base"),
    "if2": Recipe(stages.FirstFrame, 0.06, 96, (Lesson(0.5, (64, 64)), Lesson(0.5, LARGE_SIZE, batch=1 / 8))),
    "sr1": Recipe(
        stages.Sr1, 0.1, 12, (Lesson(0.6, (64, 64), 8), Lesson(0.4, LARGE_SIZE, 8, batch=1 / 8)), parent="if2"
    ),
    "sr2": Recipe(stages.Sr2, 0.08, 12, (Lesson(0.6, (192, 160), 4), Lesson(0.4, FULL_SIZE, 8, batch=1 / 12))),
}


@dataclass(frozen=True)
class Run:
    """What a stage's result depends on, besides the code. Kept in its state; a resumed run must agree."""

    seed: int
    batch: int
    pool: int
    steps: int | None  # None: planned by the clock
    skipped: int = 0  # lessons


class _Graph:
    """A step of one lesson, captured after a few that run as they are: all of them count."""

    def __init__(self, lesson: int):
        self.lesson, self._left = lesson, _EAGER_STEPS
        self._captured: torch.cuda.CUDAGraph | None = None

    def run(self, learn: Callable[[list[Batch]], Tensor], batches: list[Batch]) -> Tensor:
        if self._left:
            self._left -= 1
            return learn(batches)
        if self._captured is None:
            self._batches = [tuple(tensor.clone() for tensor in batch) for batch in batches]
            self._captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._captured):  # recorded, not run
                self._loss = learn(self._batches)
        for kept, tensor in zip(chain(*self._batches), chain(*batches), strict=True):
            kept.copy_(tensor)
        self._captured.replay()
        return self._loss.clone()


def _set(variable: Any, value: float) -> Any:
    """In place where it is a tensor."""
    return variable.fill_(value) if isinstance(variable, Tensor) else value


class Trainer:
    """One stage in training: weights, their moving average, the optimizers, the step.

    Matrices and filters of blocks are trained by Muon (Jordan et al. 2024), everything else by AdamW.
    """

    def __init__(self, stage: Stage, recipe: Recipe, run: Run):
        self.stage, self.recipe, self.run = stage, recipe, run
        self.device = stage.pool.device
        self.weights = dict(stage.modules().to(self.device).train().named_parameters())
        self.average = {name: value.detach().clone() for name, value in self.weights.items()}
        matrices = {name for name, value in self.weights.items() if value.ndim > 1 and "_block" in name}
        # Muon takes matrices alone: views of filters, one row an output channel.
        self.trained = {
            name: nn.Parameter(value.detach().flatten(1)) if name in matrices else value
            for name, value in self.weights.items()
        }
        muon = [value for name, value in self.trained.items() if name in matrices]
        adamw = [value for name, value in self.trained.items() if name not in matrices]
        captured = self.device == "cuda"  # so what changes from step to step lies there, in place
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                adamw,
                self._variable(_OTHER_RATE),
                betas=(0.9, 0.99),
                weight_decay=0.01,
                capturable=captured,
                fused=captured or None,
            )
        ]
        if muon:
            self.optimizers.append(Muon(muon, self._variable(_MATRIX_RATE), weight_decay=0.01))
        self._pull = self._variable(1.0)  # of the weights on their average
        self._graph: _Graph | None = None
        self.plan = [] if run.steps is None else recipe.plan(run.steps)  # steps of the lessons planned so far
        self.step = 0
        on_cpu = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.bfloat16 = recipe.bfloat16 and (self.device == "cuda" or on_cpu)

    @property
    def lesson(self) -> int:
        """Number of the current lesson; after the last step, that of the last."""
        ends = accumulate(self.plan)
        done = next((number for number, end in enumerate(ends) if self.step < end), len(self.plan))
        return min(done, len(self.recipe.lessons) - 1)

    @property
    def done(self) -> bool:
        return len(self.plan) == len(self.recipe.lessons) and self.step == sum(self.plan)

    @property
    def progress(self) -> float:
        """Share of the training that is over; lessons that are not planned yet have just begun."""
        number, lessons = self.lesson, self.recipe.lessons
        before = sum(lesson.share for lesson in lessons[:number])
        if number == len(self.plan):
            return before
        return before + lessons[number].share * (self.step - sum(self.plan[:number])) / max(1, self.plan[number])

    def advance(self) -> Tensor:
        """One step; the batch's loss, still on the device."""
        generator = torch.Generator(self.device).manual_seed(self.run.seed * 10**9 + self.step)
        batches = []
        for part in self.recipe.lessons[self.lesson].parts:
            self.stage.lesson = part
            batches.append(self.stage.draw(max(1, round(self.run.batch * part.batch)), generator))
        self._set_rates()
        loss = self._replay(batches) if self.device == "cuda" else self._learn(batches)
        self.step += 1
        return loss

    def _replay(self, batches: list[Batch]) -> Tensor:
        """`_learn` as a CUDA graph of the lesson: thousands of small kernels, launched one by one, leave a GPU idle."""
        if self._graph is None or self._graph.lesson != self.lesson:
            self._graph = _Graph(self.lesson)
        return self._graph.run(self._learn, batches)

    def _learn(self, batches: list[Batch]) -> Tensor:
        """Change the weights; the batches' mean loss."""
        kind = {"enabled": self.bfloat16, "cache_enabled": self.device != "cuda"}  # a graph would keep what is cached
        with torch.autocast(self.device, torch.bfloat16, **kind):
            loss = torch.stack([self.stage.loss(*batch) for batch in batches]).mean()
        self._update(torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True))
        return loss.detach()

    @torch.no_grad()
    def _update(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Weights that the batch did not use stay as they are: no decay either.

        A batch whose gradient is not finite counts as one that asks for no change.
        """
        found = [gradient.flatten() for gradient in gradients if gradient is not None]
        whole = torch.cat(found)
        norm = whole.norm()
        whole = (whole / norm.clamp(min=1)).masked_fill(~norm.isfinite(), 0)
        parts = iter(whole.split([len(gradient) for gradient in found]))
        for value, gradient in zip(self.trained.values(), gradients, strict=True):
            value.grad = None if gradient is None else next(parts).view_as(value)
        for optimizer in self.optimizers:
            optimizer.step()
        changes = torch._foreach_sub(list(self.weights.values()), list(self.average.values()))
        torch._foreach_mul_(changes, self._pull)
        torch._foreach_add_(list(self.average.values()), changes)

    def _variable(self, value: float) -> Any:
        """A number that changes from step to step, where a CUDA graph finds it."""
        return torch.tensor(value, device=self.device) if self.device == "cuda" else value

    def _set_rates(self) -> None:
        """For the next step."""
        rate = self._rate()
        for optimizer, full in zip(self.optimizers, (_OTHER_RATE, _MATRIX_RATE), strict=False):
            (group,) = optimizer.param_groups
            group["lr"] = _set(group["lr"], full * rate)
        self._pull = _set(self._pull, 1 - min(0.999, (2 + self.step) / (11 + self.step)))

    def _rate(self) -> float:
        """Rising over the first steps, falling over the last; in shares of the full rates.

        Muon's steps are as long on noisy gradients as on clear ones: smaller batches than the recipe's take shorter
        ones.
        """
        share = self.recipe.lessons[self.lesson].batch * self.run.batch / self.recipe.batch
        return min(1.0, (self.step + 1) / _WARM_UP, (1 - self.progress) / _FALL) * min(1.0, share) ** 0.5

    def tensors(self) -> dict[str, Tensor]:
        """All that changes; what optimizers keep is there after the first step only."""
        found = {f"weights/{name}": value for name, value in self.weights.items()}
        found |= {f"average/{name}": value for name, value in self.average.items()}
        for name, value in self.trained.items():
            for optimizer in self.optimizers:
                found |= {f"{key}/{name}": kept for key, kept in optimizer.state.get(value, {}).items()}
        return found

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tensors().items()}
        about = {"step": self.step, "plan": self.plan, "run": asdict(self.run)}
        write_atomically(path, save(tensors, {"about": json.dumps(about)}))

    def load(self, path: Path) -> None:
        """Raises SettingsError for the state of another run, CheckpointError for one that cannot be read."""
        try:
            self._load(path)
        except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged, or another version's ({type(error).__name__}). Remove it to start again."
            ) from error

    def _load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            kept = Run(**about["run"])
            if kept != self.run:
                raise SettingsError(
                    f"{path} was made with {kept}, not {self.run}. Give the same options, or remove it to start again."
                )
            owners = {id(p): o for o in self.optimizers for group in o.param_groups for p in group["params"]}
            with torch.no_grad():
                mine = {f"{kind}/{n}": v for kind in ("weights", "average") for n, v in getattr(self, kind).items()}
                for key, value in mine.items():
                    value.copy_(file.get_tensor(key))
                for key in set(file.keys()) - mine.keys():
                    kind, name = key.split("/")
                    value = self.trained[name]
                    owners[id(value)].state[value][kind] = file.get_tensor(key).to(self.device)
        self.plan, self.step = about["plan"], about["step"]

    def finish(self, checkpoint: Path) -> None:
        """Ship the averaged weights."""
        self.stage.lesson = self.recipe.lessons[-1]
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.average[name])
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
    for settings other than the state's and for a stage that another process trains, CheckpointError where an earlier
    stage or a network of `init` is missing.
    """
    if (minutes is None) == (steps is None):
        raise SettingsError("give either minutes or steps.")
    for what, number in {"lessons to skip": skip_lessons, "stop after": stop_after}.items():
        if number is not None and not 0 <= number < math.inf:
            raise SettingsError(f"{what}: {number}; allowed: 0 or more.")
    numbers = {"minutes": minutes, "steps": steps, "batch": batch, "pool": pool}
    for what, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            raise SettingsError(f"{what}: {number}; allowed: above 0.")
    if not 0 <= seed < 2**32:
        raise SettingsError(f"seed: {seed}; allowed: 0 to {2**32 - 1}.")
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
        if _finished(out, name) and not (out / "state" / f"{name}.safetensors").is_file():
            report(f"{name}: finished before")
            continue
        with _alone(out, name):
            recipe, state = RECIPES[name].without(skip_lessons), out / "state" / f"{name}.safetensors"
            if _finished(out, name):
                report(f"{name}: finished before")
                state.unlink(missing_ok=True)  # of a run that ended between the two
                continue
            clips = clips or Pool(pool, seed, device)
            run = Run(seed, batch or recipe.batch, pool, steps, skip_lessons)
            torch.manual_seed(seed)  # for the first weights
            trainer = Trainer(_make(recipe, clips, out, init, fresh=not state.is_file()), recipe, run)
            if state.is_file():
                trainer.load(state)
                report(f"{name}: continues from {state}" + (", --init is not read" if init else ""))
            count = sum(weight.numel() for weight in trainer.weights.values())
            report(f"{name}: {count:,} weights, step {trainer.step}, {device}")
            budget = None if minutes is None else minutes * 60 * recipe.share / sum(RECIPES[n].share for n in names)
            if ship and trainer.step:
                report(f"{name}: shipped at step {trainer.step}, {trainer.progress:.0%} of its training")
            elif not _run(name, trainer, state, budget, deadline, save_every, report):
                return False
            trainer.finish(out)
            state.unlink(missing_ok=True)
            del trainer
    return True


@contextmanager
def _alone(out: Path, name: str) -> Iterator[None]:
    """Two processes that train one stage would each ship what the other's later stages do not fit."""
    lock = FileLock(out / f".{name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise SettingsError(f"{out}: another process trains {name}. Wait until it has ended, or stop it.") from None
    except OSError as error:
        raise OutputError(f"{lock.lock_file} cannot be locked ({error.strerror}). Choose another place.") from None
    try:
        yield
    finally:
        lock.release()


def _make(recipe: Recipe, clips: Pool, out: Path, init: Path | None, fresh: bool) -> Stage:
    """A stage with its first weights; those of a run in progress (not `fresh`) are about to be loaded."""
    try:
        stage = recipe.stage(clips, out)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error}: an earlier stage is not finished. Train text, for sr2 vae too.") from None
    if not fresh:
        return stage
    try:
        for name, network in stage.networks.items() if init else ():
            network.load_state_dict(cascade.load_network(init, name).state_dict())
    except FileNotFoundError as error:
        raise CheckpointError(f"{error}: --init needs a finished demo checkpoint.") from None
    if init is None and recipe.parent:
        if not _finished(out, recipe.parent):
            raise CheckpointError(f"{out}: {stage.ships[0]} starts from {recipe.parent}'s weights. Train that first.")
        stage.inherit(cascade.load_network(out, recipe.parent))
    elif init is None:
        stage.prepare()
    return stage


def _finished(out: Path, name: str) -> bool:
    return all(cascade.has_network(out, network) for network in RECIPES[name].stage.ships)


def _run(
    name: str,
    trainer: Trainer,
    state: Path,
    budget: float | None,
    deadline: float,
    save_every: float,
    report: Callable[[str], None],
) -> bool:
    """Steps until all lessons are over (True) or the deadline is (False; the state is saved).

    Lessons end when their shares of `budget` seconds have passed: a number of steps, planned once the first have been
    timed. What one leaves over goes to the next, which gives what one overruns, but no more than half of its share.
    """
    saved = reported = timed = _now(trainer)
    origin = saved - trainer.progress * (budget or 0)
    losses: list[Tensor] = []
    first = trainer.step  # of this call, or of the lesson
    while not trainer.done:
        losses.append(trainer.advance())
        here, in_lesson = trainer.step - first, trainer.step - sum(trainer.plan)
        if budget is not None and trainer.lesson == len(trainer.plan):
            if here == _UNTIMED_STEPS:
                timed = _now(trainer)
            elif here > _UNTIMED_STEPS and in_lesson >= _TIMED_STEPS and (trainer.device != "cuda" or here % 10 == 0):
                now = _now(trainer)
                shares = [lesson.share for lesson in trainer.recipe.lessons[: trainer.lesson + 1]]
                # Of what a card does in a second a busy moment would decide; short calls would never time more.
                if now - timed >= min(_TIMED_SECONDS, _TIMED_SHARE * budget * shares[-1]) or now > deadline:
                    each = (now - timed) / (here - _UNTIMED_STEPS)
                    left = max(origin + budget * sum(shares) - now, budget * shares[-1] / 2 - in_lesson * each)
                    steps = in_lesson + max(0, int(left / each))
                    trainer.plan.append(steps)
                    report(f"{name}: lesson {len(trainer.plan)}: {each:.3f} s a step, {steps} steps planned")
        if trainer.step == sum(trainer.plan):
            first = trainer.step
        if trainer.device == "cuda" and here % 10 and not trainer.done:
            continue  # reading the clock there means waiting for the device
        now = _now(trainer)
        if now - reported > _REPORT_EVERY or trainer.done:
            found = torch.stack(losses)
            sound = found[found.isfinite()]
            if len(sound):
                skipped = f", batches skipped: {len(found) - len(sound)}" if len(sound) < len(found) else ""
                loss = f"loss {sound.mean():.4f}{skipped}"
                report(f"{name}: step {trainer.step}, {trainer.progress:.1%} of the training, {loss}")
                losses = []
            elif trainer.done or len(found) >= _LOST_AFTER:
                raise SettingsError(
                    f"{name}: the loss has not been a number for {len(found)} steps, at step {trainer.step}. Remove "
                    f"{state} to start again, with another --seed or a larger --batch."
                )
            reported = now
        unplanned = budget is not None and trainer.lesson == len(trainer.plan)
        over = now > deadline and not (unplanned and here <= _UNTIMED_STEPS)  # else short calls would never plan
        if over or now - saved > save_every:
            trainer.save(state)
            saved = _now(trainer)
            timed += saved - now  # which is none of the lesson's steps
        if over and not trainer.done:
            report(f"{name}: stopped at step {trainer.step}; run again to continue")
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
    for folder in (arguments.out, *([arguments.pack.parent] if arguments.pack else [])):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be made or written ({error.strerror}). Choose another place."
            ) from None
    done = train(arguments.out, names, **options, report=lambda line: print(line, flush=True))
    if not done or not arguments.pack:
        return
    if missing := [name for name in RECIPES if not _finished(arguments.out, name)]:
        print(f"{arguments.pack}: not written yet, for want of {', '.join(missing)}")
        return
    cascade.pack(arguments.out, arguments.pack)
    print(f"{arguments.pack}: {arguments.pack.stat().st_size / 1e6:.2f} MB")
