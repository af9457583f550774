"""The command ``tdc``: plan, compress, calibrate, report, target, list, demo.

Exit status: 0 done; 2 refused (the message says why, nothing was written); 5 a result failed its check; 6 an output
could not be written; 70 a bug in TDC; 130 interrupted.
"""

from __future__ import annotations

from ._clash import check

check()

import argparse  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from contextlib import suppress  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

__all__ = ["main"]

_BUDGET = "what may stay, e.g. params=0.5 or params=0.5,macs=0.6; or what may be lost: loss=0.01 or loss=0.01,macs=min"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    _forget_checkout()
    _print_any_name()
    from .errors import DestinationError, TdcError

    try:
        options.run(options)
        sys.stdout.flush()
        return 0
    except TdcError as error:
        print(f"tdc: {_visible(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("tdc: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 0
    except Exception as error:
        if isinstance(error, OSError) and _drop_output():
            print(f"tdc: the result cannot be printed: {error.strerror or error}", file=sys.stderr)
            return DestinationError.exit_code
        if options.debug:
            raise
        print(f"tdc: internal error, {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        return 70


def _print_any_name() -> None:
    """Let names be printed that the terminal's encoding lacks: as escapes, instead of a failure after the work."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _visible(text: str) -> str:
    """Control characters as escapes: names in a model are data, and must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _drop_output() -> bool:
    """Whether standard output takes nothing any more; then nothing is tried again at exit."""
    try:
        sys.stdout.flush()
        return False
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


def _forget_checkout() -> None:
    """Take a checkout's root off the import path: other packages look for an optional 'kernels', and would find
    our folder.
    """
    root = Path(__file__).resolve().parent.parent
    if (root / "kernels").is_dir():
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tdc", description="A tensor decomposition compiler for neural networks.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an internal error")
    parser.add_argument("--version", action="version", version=f"tdc {_version()}")
    commands = parser.add_subparsers(required=True, metavar="command")

    plan = commands.add_parser("plan", help="decide and print, cut nothing")
    plan.add_argument("model", help="an ONNX file")
    plan.add_argument("-o", "--output", help="write the plan to this file (JSON)")
    plan.add_argument(
        "--explain", nargs="*", metavar="SITE", help="print what was considered for these sites (all), and why it lost"
    )
    plan.add_argument("--paths", action="store_true", help="print the contraction order of every replaced site")
    budget = plan.add_mutually_exclusive_group()
    budget.add_argument("--pareto", action="store_true", help="a table of plans that keep 0.9 to 0.1 of the parameters")
    budget.add_argument("--budget", help=_BUDGET)
    _deciding(plan)
    plan.set_defaults(run=_plan)

    compress = commands.add_parser("compress", help="write a smaller ONNX file")
    compress.add_argument("model", help="an ONNX file")
    compress.add_argument("destination", help="the file to write")
    compress.add_argument("--plan", help="apply this plan file instead of a budget")
    compress.add_argument("--budget", help=_BUDGET)
    _deciding(compress)
    compress.set_defaults(run=_compress)

    calibrate = commands.add_parser("calibrate", help="gather statistics for plan and compress")
    calibrate.add_argument("model", help="an ONNX file")
    calibrate.add_argument("data", help="an .npz file or a folder of them, arrays named as the inputs")
    calibrate.add_argument("-o", "--output", required=True, help="the statistics file to write")
    _common(calibrate)
    calibrate.set_defaults(run=_calibrate)

    report = commands.add_parser("report", help="what TDC did to an .onnx or .tdc file")
    report.add_argument("file")
    report.add_argument("--json", action="store_true")
    report.set_defaults(run=_report)

    target = commands.add_parser("target", help="machines: list, show, measure")
    _target_commands(target.add_subparsers(required=True, metavar="what"))

    listing = commands.add_parser("list", help="decompositions, targets, passes")
    listing.add_argument("what", choices=("decompositions", "targets", "passes"))
    listing.set_defaults(run=_list)

    demo = commands.add_parser("demo", help="compress a real sentence encoder, with figures")
    demo.add_argument("--budget", default="params=0.6", help="default: params=0.6")
    demo.set_defaults(run=_demo)
    return parser


def _target_commands(commands: Any) -> None:
    listing = commands.add_parser("list", help="all targets")
    listing.set_defaults(run=_target_list)
    show = commands.add_parser("show", help="the description of a target, and the times that were measured")
    show.add_argument("name", help="a target, a description (.toml) or a table of times (.json)")
    show.set_defaults(run=_target_show)
    measure = commands.add_parser("measure", help="measure this machine, so that plans know what layers take on it")
    measure.add_argument("--seconds", type=float, default=120.0, help="about how long (default 120)")
    measure.add_argument("--threads", type=int, help="threads to use (default: as torch has it)")
    measure.add_argument("-o", "--output", help="write the table to this file instead of the user's cache")
    measure.add_argument("--quiet", action="store_true", help="no progress bar")
    measure.set_defaults(run=_target_measure)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tensor-decomposition-compiler")
    except PackageNotFoundError:
        return "(not installed)"


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=16, help="examples per batch of a single .npz file (default 16)")
    parser.add_argument("--exclude", action="append", default=[], metavar="SITE", help="site or pattern to leave dense")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _deciding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration", metavar="DATA", help="an .npz file or a folder of them, arrays named as the inputs"
    )
    parser.add_argument("--statistics", metavar="FILE", help="what 'tdc calibrate' wrote")
    parser.add_argument("--metric", default="auto", help="weight, input, fisher or auto (default)")
    parser.add_argument("--target", default="auto", help="see 'tdc target list', or the path of a description (.toml)")
    parser.add_argument("--allow", action="append", metavar="NAME", help="decomposition to choose from, or all")
    parser.add_argument(
        "--allocation",
        default="lagrangian",
        help="lagrangian (default) or uniform; without a budget evbmf, energy or energy=0.9: ranks by each weight",
    )
    _common(parser)


def _keywords(options: argparse.Namespace) -> dict[str, Any]:
    from .data import NpzBatches

    data = NpzBatches(options.calibration, options.batch) if options.calibration else None
    names = ("budget", "statistics", "metric", "target", "allow", "exclude", "allocation", "seed")
    keywords = {name: getattr(options, name) for name in names}
    return {**keywords, "calibration": data, "progress": not options.quiet}


def _plan(options: argparse.Namespace) -> None:
    from .api import pareto, plan
    from .errors import OptionError
    from .files import atomic_write

    keywords = _keywords(options)
    if options.pareto:
        if options.output:
            raise OptionError("--pareto prints several plans: give --budget for the one to write")
        if options.paths or options.explain is not None:
            raise OptionError("--pareto prints several plans: give --budget for the one to explain")
        del keywords["budget"]
        print(_visible(str(pareto(options.model, **keywords))))
        return
    if options.output:
        _check_output(options.output, options.model, options.statistics, options.calibration)
    made = plan(options.model, **keywords)
    if options.output:
        atomic_write(options.output, made.to_json().encode())
    print(_visible(str(made) if options.explain is None else made.explain(*options.explain)))
    if options.paths:
        from ._paths import paths

        print("\n" + _visible(paths(made, target=options.target)))


def _check_output(output: str, *read: str | None) -> None:
    """Raise DestinationError if a file cannot be put there, or if it is one that this command reads."""
    from .errors import DestinationError
    from .files import checked_destination

    path = checked_destination(output)
    for name in read:
        if name and path.exists() and Path(name).exists() and path.samefile(name):
            raise DestinationError(f"{path} is the input file: choose another name for the output")


def _compress(options: argparse.Namespace) -> None:
    from .api import compress_onnx
    from .errors import OptionError
    from .frontends.onnx import file_size

    if options.plan and (options.allow or options.metric != "auto"):
        raise OptionError("the plan has its decompositions and its metric already: leave out --allow and --metric")
    _check_output(options.destination, options.model, options.plan, options.statistics, options.calibration)
    made = compress_onnx(options.model, options.destination, plan=options.plan, **_keywords(options))
    print(_visible(str(made)))
    before, after = file_size(options.model), file_size(options.destination)
    print(f"\nfiles: {before:,} -> {after:,} bytes, keep {after / before:.4f}")


def _calibrate(options: argparse.Namespace) -> None:
    from .api import calibrate
    from .data import NpzBatches

    _check_output(options.output, options.model, options.data)
    batches = NpzBatches(options.data, options.batch)
    keywords = {"exclude": options.exclude, "seed": options.seed, "progress": not options.quiet}
    statistics = calibrate(options.model, batches, **keywords)
    statistics.save(options.output)
    print(f"{len(statistics.sites)} sites, {statistics.batches} batches, digest {statistics.digest[:12]}")


def _report(options: argparse.Namespace) -> None:
    from .api import report

    made = report(options.file)
    print(made.to_json() if options.json else _visible(str(made)))


def _target_list(options: argparse.Namespace) -> None:
    from ._target_command import listed

    print(_visible(listed()))


def _target_show(options: argparse.Namespace) -> None:
    from ._target_command import shown

    print(_visible(shown(options.name)))


def _target_measure(options: argparse.Namespace) -> None:
    from . import targets
    from ._target_command import measured
    from .targets._measure import measure
    from .targets._table import made_folder, save

    if options.output:
        _check_output(options.output, None)
    else:
        made_folder()
    table = measure(options.seconds, options.threads, progress=not options.quiet)
    where = save(table, options.output)
    print(_visible(f"{measured(table, targets.get('cpu').machine)}\n\nwritten: {where}"))


def _list(options: argparse.Namespace) -> None:
    from . import decompositions, targets
    from .ir.text import format_table
    from .passes.pipeline import COMPRESSING

    if options.what == "decompositions":
        found = [decompositions.get(name) for name in decompositions.names()]
        lines = [(d.name, ", ".join(d.layers), "yes" if d.by_default else "by name", d.summary) for d in found]
        print(format_table(("name", "layers", "tried", "good for"), lines, left=4))
        for decomposition in found:
            for variant, equation in decomposition.equations.items():
                print(f"\n{decomposition.name}{'/' if variant else ''}{variant}: {equation}")
    elif options.what == "targets":
        names = (*targets.names(), *targets.described())
        print(format_table(("name", "what"), [(n, targets.get(n).summary) for n in names], left=2))
    else:
        rows = [(p.name, ((type(p).__doc__ or "").strip().splitlines() or [""])[0]) for p in COMPRESSING]
        print(format_table(("name", "what"), rows, left=2))


def _demo(options: argparse.Namespace) -> None:
    from .demo import run

    run(options.budget)


if __name__ == "__main__":
    sys.exit(main())
