r"""Run a whole comparison: every arm with every seed, trained and judged; called again, it goes on where it stopped.

A training that breaks down (a loss or weights that are not finite, features that explode) is a result, and the others go on.

python -m training.campaign mae-64px --data ../tiny-imagenet-100 --seeds 0,1,2 --max_minutes 9 --at_once 3
"""

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout
from tqdm import tqdm

from models.files import Parser, anywhere, is_checkpoint, one_line_errors, read_json, require_writable, write_json
from models.registry import load_backbone, read_index
from training.checkpoint import BROKE, CONFIG, checkpoints
from training.comparisons import COMPARISONS, PROBE, RESULTS
from training.images import holds_images
from training.monitor import read_metrics
from training.presets import MAE_PRESETS, PRESETS

ROOT = Path(__file__).resolve().parent.parent
SAVING_S = 20.0  # what a training needs after it was told to stop
COMMAND = "command.json"  # in a run's folder: the training that it was made for
GRACE_S = 60.0  # after which it is ended; its last checkpoint stays
# flags of a training that the campaign gives, or that change the alphas, which tell arms apart
OWN = set("seed preset output_dir resume_from_checkpoint train_data_dir dataset_name alpha_min alpha_eff shortcut_schedule".split())


WINS_OVER = {"learning_rate": "base_learning_rate", "depth": "size"}  # where both are given


@dataclass
class Run:
    """One arm with one seed.

    Attributes:
        folder: of the training.
        result: file that says what became of it.
    """

    comparison: str
    arm: str
    seed: int
    folder: Path
    result: Path
    preset: str = field(init=False)
    flags: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.preset, self.flags = COMPARISONS[self.comparison].arms[self.arm]

    def training(self, data: str, more: list[str]) -> list[str]:
        """The command that trains it, but for how long and where to begin."""
        script = "training/train_mae.py" if self.preset in MAE_PRESETS else "training/train_diffusion.py"
        flags = [part for name, value in self.flags.items() for part in _flag(name, value)]
        source = "--train_data_dir" if (ROOT / data).is_dir() else "--dataset_name"
        looks = COMPARISONS[self.comparison].looks
        return [script, "--preset", self.preset, *flags, source, data, "--seed", str(self.seed), *looks, *more]

    def begin(self, data: str, more: list[str]) -> None:
        """Write down the training that the folder is for, or see that one that was begun there is the same.

        Raises:
            ValueError: it was not.
        """
        command, path = self.training(data, more), self.folder / COMMAND
        was_begun = path.is_file() and (self.folder / CONFIG).is_file()  # else its flags may have been refused, and mended since
        if was_begun and (before := read_json(path)) != command:
            then, now = _flags_of(before), _flags_of(command)
            gone, new = ([flag for flag in some if flag not in others] for some, others in ((then, now), (now, then)))
            differing = f"with {' '.join(gone)}" if gone else f"without {' '.join(new)}" if new else "with other flags"
            raise ValueError(f"{self.folder} was begun {differing}; give the same --data and flags, or another --output and --results")
        if not was_begun:
            write_json(path, command)

    @property
    def trained(self) -> bool:
        """Whether all steps were taken."""
        if not is_checkpoint(self.folder):
            return False
        return read_index(self.folder)["training"]["steps"] >= read_json(self.folder / CONFIG)["max_train_steps"]

    @property
    def broke(self) -> bool:
        """Whether the training broke down, which is its result: it is not tried again while its folder is there."""
        return (self.folder / BROKE).is_file()

    @property
    def log(self) -> Path:
        """What its commands said."""
        return self.folder / "log.txt"

    def judged(self, judge: str) -> Path:
        """The file with a judge's numbers."""
        return self.folder / "eval" / f"{judge}.json"

    def next_command(self, data: str, seconds: float, more: list[str]) -> list[str] | None:
        """What is to be done next, or None if nothing is."""
        if self.broke:
            return None
        if not self.trained:
            end = ["--max_train_minutes", f"{seconds / 60:.3f}"] if math.isfinite(seconds) else []
            resume = ["--resume_from_checkpoint", "latest"] if checkpoints(self.folder) else []
            return [*self.training(data, more), "--output_dir", str(self.folder), *end, *resume]
        for name, judge in COMPARISONS[self.comparison].judges.items():
            if not self.judged(name).is_file():
                return [judge.script, "--checkpoint", str(self.folder), judge.data, data, *judge.flags, "--json", str(self.judged(name))]
        return None

    def gather(self, more: list[str]) -> None:
        """Write the result file: what was run, its curves, what the judges said; or how it broke down.

        Args:
            more: flags of every training.
        """
        config = read_json(self.folder / CONFIG)
        found: dict[str, Any] = {
            "comparison": self.comparison,
            "arm": self.arm,
            "seed": self.seed,
            "flags": [part for word in more for part in word.split("=", 1)],
            "config": {name: value for name, value in config.items() if name not in ("output_dir", "resume_from_checkpoint")},
            "curves": read_metrics(self.folder),
        }
        if self.broke:
            told = read_json(self.folder / BROKE)
            found |= {"broke": told["why"], "training": {"images_seen": told["images_seen"]}, "alphas": told["alphas"]}
        else:
            found |= {"training": read_index(self.folder)["training"], "alphas": list(load_backbone(self.folder).alphas)}
            found |= {name: read_json(self.judged(name)) for name in COMPARISONS[self.comparison].judges}
        for row in found.get("probe", {}).get("results", ()):
            if any(row[field] != value for field, value in found["probe"]["best"].items() if field in row):
                row.pop("spectrum", None)  # most of the file; of one place it is enough
        write_json(self.result, anywhere(found))
        compared = comparison_of(self)
        if self.arm in _compared(compared):  # as it was before it was trained again
            compared.unlink()


def comparison_of(run: Run) -> Path:
    """Where the arms with a run's seed are compared with the first."""
    return run.result.with_name(f"compared-{run.seed}.json")


def _compared(path: Path) -> set[str]:
    """The arms that a comparison is about; none if it is not there."""
    found = read_json(path) if path.is_file() else []
    return {each[side] for each in found if isinstance(each, dict) for side in ("contender", "against") if side in each}


def compare(runs: list[Run], data: str, deadline: float) -> bool:
    """Write what the judges of all arms with one seed say against the first, when all were judged here.

    Probes are paired over the test images; images are drawn once more, from the same noise for all arms.

    Returns:
        False where there was something to do and, until the deadline (of `time.monotonic`), no time for it.

    Raises:
        ValueError: eval/compare.py failed, its last line says why.
    """
    judges = COMPARISONS[runs[0].comparison].judges
    if runs[0].broke:
        return True
    runs, result = [run for run in runs if not run.broke], comparison_of(runs[0])
    judged = all(run.result.is_file() and all(run.judged(name).is_file() for name in judges) for run in runs)
    if not judged or len(runs) < 2 or _compared(result) == {run.arm for run in runs}:  # it may have got more arms since
        return True
    tqdm.write(f"comparing the runs of seed {runs[0].seed}, which takes as long as judging them")
    arms, differences = {str(run.folder): run.arm for run in runs}, []
    for name, judge in judges.items():
        folder = runs[0].folder.parent / f"{result.stem}-{name}"
        sampling = () if judge.script == PROBE.script else (judge.data, data, *judge.flags)
        command = [sys.executable, "eval/compare.py", *arms, *sampling, "--output", str(folder)]
        environment, left = {**os.environ, "PYTHONPATH": str(ROOT)}, deadline - time.monotonic()
        if left < 2 * SAVING_S:
            return False
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left if math.isfinite(left) else None
            )
        except subprocess.TimeoutExpired:
            tqdm.write(f"comparing the runs of seed {runs[0].seed} was cut short, and begins anew")
            return False
        if done.returncode:
            raise ValueError(f"eval/compare.py failed: {last_words(done.stderr)}")
        differences += read_json(folder / "comparison.json")["differences"]
    write_json(result, [{**each, "contender": arms[each["contender"]], "against": arms[each["against"]]} for each in differences])
    return True


def require_common(comparison: str, flags: list[str]) -> None:
    """Raise ValueError for flags of all trainings that would make runs others than their names say."""
    arms = [{**{**PRESETS, **MAE_PRESETS}[preset].flags, **own} for preset, own in COMPARISONS[comparison].arms.values()]
    differing = {name for arm in arms for name in arm if any(other.get(name) != arm[name] for other in arms)}
    differing |= {wins for wins, name in WINS_OVER.items() if name in differing}
    for word in flags:
        name = word.split("=")[0].removeprefix("--").removeprefix("no-")
        if word.startswith("--") and name in OWN | differing:
            instead = "give --seeds" if name == "seed" else "leave it away"
            raise ValueError(f"--{name} tells the runs of {comparison} apart, and cannot be given to all; {instead}")


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def _flags_of(command: list[str]) -> list[str]:
    """Each flag with its value."""
    return [f"--{each}" for each in " ".join(command).split(" --")[1:]]


def runs_of(comparison: str, seeds: list[int], output: Path, results: Path) -> list[Run]:
    """All arms with the first seed, then all with the next: that of which all arms are there can be compared."""
    return [
        Run(comparison, arm, seed, output / comparison / f"{arm}-{seed}", results / comparison / f"{arm}-{seed}.json")
        for seed in seeds
        for arm in COMPARISONS[comparison].arms
    ]


def work(runs: list[Run], data: str, deadline: float, at_once: int, more: list[str]) -> Iterator[Run]:
    """Train and judge, `at_once` processes side by side, until the deadline (of `time.monotonic`); yields each run that is finished.

    Args:
        more: flags of every training, beside those of its preset.

    Raises:
        ValueError: a command failed, its last line says why; or a run was begun with other data or flags. A training that broke
            down has not failed: that is its result.
    """
    for run in runs:
        run.begin(data, more)
    waiting, busy = [run for run in runs if not run.result.is_file()], list[_Busy]()
    try:
        while True:
            left = deadline - time.monotonic()
            while waiting and len(busy) < at_once and left > 2 * SAVING_S:
                run = waiting.pop(0)
                if command := run.next_command(data, left - SAVING_S, more):
                    tqdm.write(f"{run.folder.name}: {Path(command[0]).name}, see {run.log}")
                    busy.append(_Busy(run, _start(command, run.log, at_once), is_training="training/" in command[0]))
                else:
                    run.gather(more)
                    yield run
            if not busy:
                return
            time.sleep(0.2)
            for each in [each for each in busy if each.ended(left)]:
                busy.remove(each)
                waiting.insert(0, each.run)  # for what comes next
    finally:
        for each in busy:
            each.process.send_signal(signal.SIGINT)
        for each in busy:
            each.wait()


@dataclass
class _Busy:
    """A command that is at work."""

    run: Run
    process: subprocess.Popen
    is_training: bool
    asked: bool = False  # to end

    def wait(self) -> None:
        """For its end, which was asked for; kill it if it takes too long, a training's last checkpoint stays."""
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ended(self, left: float) -> bool:
        """Whether it has ended, or was ended because the time is over; a training ends itself, a judge leaves nothing half-written."""
        if self.process.poll() is None and left < (-GRACE_S if self.is_training else 0):
            self.asked = True
            self.process.send_signal(signal.SIGINT)
            self.wait()
            if not self.is_training:
                tqdm.write(f"{self.run.folder.name}: judging was cut short, and begins anew; if it always is, give more --max_minutes")
        code = self.process.poll()
        as_asked = self.asked and code in (130, -signal.SIGINT, -signal.SIGKILL)
        broke_down = self.is_training and self.run.broke
        if code not in (None, 0) and not as_asked and not broke_down:
            last = last_words(self.run.log.read_text(encoding="utf-8", errors="replace"))
            killed = "it was killed, as a machine does that runs out of memory; " if code == -signal.SIGKILL else ""
            raise ValueError(f"{self.run.arm} with seed {self.run.seed} failed: {killed}{last} (see {self.run.log})")
        return code is not None


def last_words(text: str) -> str:
    """What a command said at its end, without the word that marks it as an error; nothing if it said nothing."""
    return "".join(text.strip().splitlines()[-1:]).removeprefix("error: ")


def _start(command: list[str], log: Path, at_once: int) -> subprocess.Popen:
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("a", encoding="utf-8") as file:
        # in a session of its own: Ctrl-C reaches this process, which then asks each of them
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)


@contextlib.contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM and a closed terminal, too, let the runs save: these are processes of their own, and would go on unseen."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]

    def interrupt(*_: object) -> NoReturn:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # a closed terminal may say so twice, and what follows must come to its end
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parser() -> Parser:
    """Flags of the command line."""
    listed = "\n".join(f"  {name:18} {each.about}" for name, each in COMPARISONS.items())
    flags = Parser(
        prog="python -m training.campaign",
        description=f"{__doc__}\nWhatever other flags are given, every training gets.",
        epilog=f"comparisons:\n{listed}",
    )
    flags.add_argument("name", choices=COMPARISONS, metavar="NAME", help="the comparison (listed below)")
    flags.add_argument("--data", required=True, help="labelled images: a folder of images or of parquet files, a hub name, or openmoji")
    flags.add_argument("--seeds", default="0,1,2", help="training seeds (default: %(default)s)")
    flags.add_argument("--arms", help="train these alone this time, such as plain,decayed (default: all)")
    flags.add_argument("--max_minutes", type=float, help="save and leave after so long (default: when all is done)")
    flags.add_argument("--at_once", type=int, default=1, help="runs side by side on this device (default: %(default)s)")
    flags.add_argument("--output", type=Path, default=Path("runs/campaign"), help="folder of the runs (default: %(default)s)")
    flags.add_argument("--results", type=Path, default=RESULTS, help="folder of the results, one file a run (default: %(default)s)")
    return flags


def check(asked: argparse.Namespace, more: list[str]) -> tuple[list[int], list[str]]:
    """The seeds and the arms that are asked for.

    Raises:
        ValueError: flags that say nothing or contradict each other, images that are not there, folders that cannot be written: not
            after hours of training.
    """
    require_common(asked.name, more)
    try:
        seeds = list(dict.fromkeys(int(seed) for seed in asked.seeds.split(",")))
    except ValueError:
        raise ValueError(f"--seeds {asked.seeds!r} cannot be read; give whole numbers, such as 0,1,2") from None
    if min(seeds) < 0:
        raise ValueError(f"--seeds {asked.seeds}: {min(seeds)} is below 0; give whole numbers, such as 0,1,2")
    arms = list(COMPARISONS[asked.name].arms)
    chosen = arms if asked.arms is None else asked.arms.split(",")
    if unknown := [arm for arm in chosen if arm not in arms]:
        raise ValueError(f"--arms: {asked.name} has no {', '.join(map(repr, unknown))}; choose from {', '.join(arms)}")
    if asked.at_once < 1:
        raise ValueError(f"--at_once is {asked.at_once}; at least one run must go on")
    if asked.max_minutes is not None and not 60 * asked.max_minutes > 2 * SAVING_S:
        raise ValueError(f"--max_minutes is {asked.max_minutes:g}; nothing can be done in less than {2 * SAVING_S / 60:.1f}, give more")
    if asked.data.startswith(("/", ".", "~")) and not Path(asked.data).exists():
        raise ValueError(f"--data {asked.data} does not exist; give a folder, a hub name, or openmoji")
    if Path(asked.data).exists() and not holds_images(Path(asked.data)):
        raise ValueError(f"--data {asked.data} holds no images; point to a folder that does")
    for flag, folder in {"--output": asked.output, "--results": asked.results}.items():
        require_writable(folder.resolve() / asked.name, f"choose another {flag}")
    return seeds, chosen


@contextlib.contextmanager
def _alone(output: Path, comparison: str) -> Iterator[None]:
    """While it lasts no other campaign works on these runs; ValueError if one does."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / f".{comparison}.lock", blocking=False):
            yield
    except Timeout:
        taken = f"{output / comparison} is being worked on by another campaign"
        raise ValueError(f"{taken}; wait for it, or give another --output") from None


def as_seen_from_here(data: str) -> str:
    """Where the commands find the images: they run in the project's folder, and what lies there moves along with it."""
    if not Path(data).exists():
        return data
    path = Path(data).resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def main() -> None:
    """The command line."""
    asked, more = parser().parse_known_args()
    with one_line_errors(), _ended_as_by_ctrl_c():
        seeds, arms = check(asked, more)
        data = as_seen_from_here(asked.data)
        deadline = time.monotonic() + 60 * asked.max_minutes if asked.max_minutes else math.inf
        runs = runs_of(asked.name, seeds, asked.output.resolve(), asked.results.resolve())
        mine = [run for run in runs if run.arm in arms]

        def compare_arms(seed: int) -> bool:
            return compare([run for run in runs if run.seed == seed], data, deadline)

        noted: set[str] = set()
        with _alone(asked.output, asked.name):
            done = sum(run.result.is_file() for run in mine)
            with tqdm(total=len(mine), initial=done, desc=asked.name, unit=" runs", disable=None) as bar:
                for run in work(mine, data, deadline, asked.at_once, more):
                    bar.update()
                    found = read_json(run.result)
                    told = ", ".join(f"{name} {found[name]['value']:.4g}" for name in COMPARISONS[asked.name].judges if name in found)
                    tqdm.write(f"{run.result}: {told or found['broke']}")
                    judges = [name for name in COMPARISONS[asked.name].judges if name in found]
                    for note in [f"note ({name}): {note}" for name in judges for note in found[name].get("notes", ())]:
                        if note not in noted:
                            tqdm.write(note)
                        noted.add(note)
                    compare_arms(run.seed)  # as soon as all of its arms are there, whatever becomes of other seeds
            compared = [compare_arms(seed) for seed in seeds]
        done, mine_done = (sum(run.result.is_file() for run in some) for some in (runs, mine))
        broke = sum(run.broke for run in runs)
        told = f" ({broke} broke down; to train one again, delete its folder and its result)" if broke else ""
        alike = "the same command without --arms" if mine_done == len(mine) < len(runs) else "the same command"
        rest = "" if done == len(runs) and all(compared) else f"; {alike} goes on"
        print(f"{asked.name}: {done} of {len(runs)} runs are done{told}{rest}")


if __name__ == "__main__":
    main()
