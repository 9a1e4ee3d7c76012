"""Time our work beside an opponent's, in turn: python -m tests.benchmarks [NAME ...] --json OUT"""

from contextlib import ExitStack
from pathlib import Path

import torch

from models.files import Parser, one_line_errors, read_json, write_json, written_aside
from tests.benchmarks.cases import CASES, Inputs
from tests.benchmarks.measure import limits_of, machine, measure, peak_of
from tests.benchmarks.report import page, times_as_fast
from training.memory import keep_freed_memory

PAGE, TRIED = "RESULTS.md", "TRIED.md"
OF_PEERS = {"loop", "loop-compiled", "mae-loop", "mae-loop-compiled", "uvit-loop"}
NOT_ASKED = {"uvit-loop", *(["beside"] if torch.cuda.is_available() else ["tuned-xl"])}  # unless they are named


def main() -> None:
    """The command line."""
    flags = Parser(prog="python -m tests.benchmarks", description=__doc__)
    flags.add_argument("cases", nargs="*", metavar="NAME", help=f"{', '.join(CASES)} (default: all that suit this machine)")
    flags.add_argument("--pairs", type=int, help="timed runs of each side (default: 40, of the slow ones fewer)")
    flags.add_argument("--images", type=int, default=256, help="of each side of the case fid (default: %(default)s)")
    samples = "of each side of the case sampling, by which its quality is judged; the published sampler takes seconds for each"
    flags.add_argument("--samples", type=int, default=64, help=f"{samples} (default: %(default)s)")
    peers = "willisma/SiT or facebookresearch/DiT (loop), facebookresearch/mae (mae-loop), or baofff/U-ViT (uvit-loop)"
    flags.add_argument("--peer", type=Path, help=f"a checkout of {peers}")
    flags.add_argument("--label", default="", help="stands behind the names of the cases, so that rows of another day or machine stay")
    written = f"write the results to this file (folders are made), where those of other cases stay, and {PAGE} beside it"
    flags.add_argument("--json", type=Path, help=f"{written}, which takes in {TRIED} if that is there")
    parsed = flags.parse_args()
    with one_line_errors():
        if unknown := set(parsed.cases) - set(CASES):
            raise ValueError(f"there is no benchmark {unknown.pop()!r}; choose from {', '.join(CASES)}")
        if min(parsed.images, parsed.samples) < 2 or (parsed.pairs is not None and parsed.pairs < 1):
            raise ValueError("--images and --samples must be at least 2, and --pairs at least 1")
        if parsed.peer and not parsed.peer.is_dir():
            raise ValueError(f"--peer {parsed.peer} is not a folder; give a checkout")
        if parsed.peer and (not parsed.cases or set(parsed.cases) - OF_PEERS):
            raise ValueError(f"--peer is for the cases {', '.join(sorted(OF_PEERS))}; name only those beside it")
        keep_freed_memory()  # as our loop does; in one process opponents gain by it as well
        torch.backends.cuda.matmul.allow_tf32 = True  # as DiT and SiT train on GPUs
        results = read_json(parsed.json) if parsed.json and parsed.json.is_file() else {}
        for name in parsed.cases or [name for name in CASES if name not in NOT_ASKED]:
            with ExitStack() as kept:
                case = CASES[name](Inputs(parsed.images, parsed.samples, parsed.peer and parsed.peer.resolve(), kept.enter_context))
                found = {"about": case.about, "goal": case.goal, **measure(case, parsed.pairs or case.pairs), "machine": machine()}
                found |= {"notes": case.notes, "valid": case.valid, **case.figures}
                if case.of_torch:
                    found |= {"ours_peak_bytes": peak_of(case.ours), "theirs_peak_bytes": peak_of(case.theirs)}
                if case.parameters:
                    found["limits"] = limits_of(case)
                key = case.row(name, parsed.label)
                del case  # its workers end before their images go
            more = f", of processor time {1 / found['processor_ratio_median']:.3g}"
            if "ours_peak_bytes" in found:
                more += f", of their peak memory {found['ours_peak_bytes'] / found['theirs_peak_bytes']:.3f}"
            words = f"{key:14} {found['about']}: {times_as_fast(found)} times as fast{more}"
            print("\n  ".join([words, *found["notes"]]), flush=True)
            results[key] = found
            if parsed.json:
                write_json(parsed.json, results)
                with written_aside(parsed.json.with_name(PAGE)) as aside:
                    tried = parsed.json.with_name(TRIED)
                    aside.write_text(page(results, tried.read_text(encoding="utf-8") if tried.is_file() else ""), encoding="utf-8")


if __name__ == "__main__":
    main()
