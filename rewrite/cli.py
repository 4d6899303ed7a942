"""The command line: `mlxrewrite SRC...` and its sub-commands.

Exit 0: clean. 1: something differs, is refused, or does not agree. 2: an error.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .build import Built, build, diagnostic_json, with_siblings
from .diagnostics import error, render
from .passes.write import Difference, compare, write
from .sources import Package, Request, SourceError, locate
from .usage import Parser, UsageError

DEFAULT_SOURCE = "mlx_lm.models"
COMMANDS = ("explain", "verify", "generate", "serve", "kernels")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the return value is its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and words[0] in COMMANDS:
            return _command(words[0], words[1:])
        return rewrite(_rewrite_options(words))
    except UsageError as problem:
        print(f"mlxrewrite: {problem}", file=sys.stderr)
        return 2
    except SourceError as problem:
        print(f"mlxrewrite: {problem}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except KeyboardInterrupt:
        print("mlxrewrite: interrupted; nothing half-written", file=sys.stderr)
        return 2


def entry() -> NoReturn:
    sys.exit(main())


# --------------------------------------------------------------------------- rewrite


@dataclass(frozen=True, slots=True)
class Options:
    sources: tuple[str, ...]
    out: Path | None
    mode: str  # "write" | "check" | "diff" | "upstream"
    report: Path | None
    jobs: int
    only: tuple[str, ...]
    quiet: bool
    use_cache: bool


def _rewrite_options(words: list[str]) -> Options:
    parser = Parser(
        prog="mlxrewrite",
        description="Rewrite model source for paged caches and ragged batches.",
        epilog=f"Sub-commands: {', '.join(COMMANDS)} (each has its own --help).",
    )
    add = parser.add_argument
    add("sources", nargs="*", metavar="SRC", help="a folder, a file or an import name")
    add("-o", "--out", type=Path, help="the folder to write to")
    add("--check", action="store_true", help="write nothing; exit 1 if the output is not current")
    add("--diff", action="store_true", help="write nothing; show what would change")
    add("--upstream", action="store_true", help="with --diff: generated against the source")
    add("--report", type=Path, metavar="FILE.json", help="write what was found as JSON")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    add("--only", action="append", default=[], metavar="NAME", help="only these modules")
    add("-q", "--quiet", action="store_true", help="no progress bar and no table")
    add("--no-cache", action="store_true", help="compile everything anew")
    add("--version", action="version", version=f"mlxrewrite {__version__}")
    got = parser.parse_args(words)
    if got.check and got.diff:
        raise UsageError("--check and --diff exclude each other")
    if got.upstream and not got.diff:
        raise UsageError("--upstream goes with --diff")
    if got.jobs < 1:
        raise UsageError("--jobs takes a number from 1")
    if "\0" in f"{got.out}{got.report}":
        raise UsageError("a file name cannot hold a null byte")
    mode = "check" if got.check else "diff" if got.diff else "write"
    mode = "upstream" if got.upstream else mode
    sources = tuple(got.sources) or (DEFAULT_SOURCE,)
    only = tuple(got.only)
    return Options(sources, got.out, mode, got.report, got.jobs, only, got.quiet, not got.no_cache)


def rewrite(options: Options) -> int:
    """Compile every SRC, then write, check or show; one code path for all modes."""
    status = 0
    report: list[dict[str, Any]] = []
    requests = [locate(source) for source in options.sources]
    for request in requests:
        modules = _selected(request, options.only)
        whole = request.modules is None and not options.only
        built = _build(request.package, modules, options, whole)
        folder = options.out or default_folder(request.package)
        if len(requests) > 1 and options.out is not None:
            folder = options.out / _folder_name(request.package)
        if whole:
            built += [_unusable(*found) for found in request.package.unusable()]
        status = max(status, _finish(request.package, built, folder, whole, options))
        report += [_report_row(item) for item in built]
    if options.report is not None:
        text = json.dumps({"version": __version__, "modules": report}, indent=1)
        try:
            options.report.write_text(text + "\n")
        except OSError as problem:
            raise UsageError(f"--report {options.report}: {problem.strerror}") from problem
    return status


def default_folder(package: Package) -> Path:
    """Where the runtime looks for models of installed packages; `generated/` here for others."""
    from . import generated

    root = Path(str(generated.__file__)).parent if package.upstream else Path("generated")
    return root / _folder_name(package)


def _folder_name(package: Package) -> str:
    """`mlx_lm.models` goes to `mlx_lm`: the models are the package's point."""
    return package.name.removesuffix(".models").replace(".", "/")


def _selected(request: Request, only: tuple[str, ...]) -> list[str]:
    package = request.package
    modules = list(request.modules) if request.modules is not None else package.targets()
    if not only:
        return modules
    wanted = {name if name.startswith(package.name) else f"{package.name}.{name}" for name in only}
    unknown = wanted - set(modules)
    if unknown:
        short = sorted(name.removeprefix(f"{package.name}.") for name in unknown)
        raise UsageError(f"--only {', '.join(short)}: no such module in {package.name}")
    return [name for name in modules if name in wanted]


def _build(package: Package, modules: list[str], options: Options, whole: bool) -> list[Built]:
    if not whole:
        return with_siblings(package, modules, jobs=options.jobs, use_cache=options.use_cache)
    quiet = options.quiet or not sys.stderr.isatty()
    if quiet:
        return build(package, modules, jobs=options.jobs, use_cache=options.use_cache)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(package.name, total=len(modules))
        return build(
            package,
            modules,
            jobs=options.jobs,
            use_cache=options.use_cache,
            progress=lambda _: bar.advance(task),
        )


def _unusable(shown: str, problem: str) -> Built:
    """What looks like a model file and cannot be one is an error, never left out in silence."""
    return Built(shown, None, None, (error("unreadable", f"{shown}: {problem}"),))


def _finish(
    package: Package, built: list[Built], folder: Path, whole: bool, options: Options
) -> int:
    outputs: dict[str, bytes] = {}
    for item in built:
        name = item.module.removeprefix(f"{package.name}.").replace(".", "/")
        if item.manifest is not None:
            outputs[f"{name}.json"] = item.manifest
        if item.code is not None:
            outputs[f"{name}.py"] = item.code
            source = package.path_of(item.module)
            if source is not None and (folder / f"{name}.py").resolve() == source.resolve():
                raise UsageError(f"-o {folder}: the output would replace its own source {source}")
    errors = [problem for item in built for problem in item.errors]
    for problem in errors:
        print(render(problem), file=sys.stderr)
    status = 2 if errors else 0
    if options.mode == "upstream":
        _show_upstream(package, built)
    else:
        differences = compare(folder, outputs, whole=whole and not errors)
        status = max(status, _settle(folder, differences, options))
    # A manifest that says `refused` and is current is no difference: `--check` has nothing to add.
    if options.mode != "check" and any(item.content.get("route") == "refused" for item in built):
        status = max(status, 1)
    if not options.quiet and options.mode in ("write", "check"):
        _print_table(package, built)
    return status


def _settle(folder: Path, differences: list[Difference], options: Options) -> int:
    if options.mode == "write":
        try:
            write(folder, differences)
        except OSError as problem:
            place = problem.filename or folder
            raise UsageError(f"cannot write {place}: {problem.strerror}") from problem
        return 0
    for difference in differences:
        if options.mode == "diff":
            print(difference.diff(), end="")
        else:
            print(f"{difference.state}: {folder / difference.name}")
    if differences and options.mode == "check":
        out = f" -o {options.out}" if options.out is not None else ""
        print(f"to bring it up to date: mlxrewrite {' '.join(options.sources)}{out}")
    return 1 if differences else 0


def _show_upstream(package: Package, built: list[Built]) -> None:
    for item in built:
        source = package.read(item.module)
        if item.code is not None and source is not None:
            print(Difference(source.path, "stale", source.data, item.code).diff(), end="")


def _report_row(item: Built) -> dict[str, Any]:
    row = {"module": item.module, **item.content}
    row["errors"] = [diagnostic_json(problem) for problem in item.errors]
    return row


def _print_table(package: Package, built: list[Built]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("file", "class", "kind", "route", "sites", "refusals"):
        table.add_column(title, justify="right" if title == "sites" else "left")
    routes: Counter[str] = Counter()
    for item in built:
        if item.manifest is None:
            continue
        content = item.content
        routes[content["route"]] += 1
        name = item.module.removeprefix(f"{package.name}.")
        _add_rows(table, name.partition(".")[0] if package.nested else name, content)
    width = None if sys.stdout.isatty() else 140
    console = Console(width=width)
    console.print(table)
    total = ", ".join(f"{count} {route}" for route, count in sorted(routes.items()))
    console.print(f"{sum(routes.values())} model files: {total}", highlight=False)
    if package.nested:
        _print_folders(console, package, {item.module for item in built if item.manifest})


def _print_folders(console: Any, package: Package, done: set[str]) -> None:
    """The folders without a language model of their own."""
    own = {name.removeprefix(f"{package.name}.").partition(".")[0] for name in done}
    others = {name: sorted(f) for name, f in package.followed(own).items() if name not in own}
    rest = sorted(name for name, follows in others.items() if not follows)
    shown = ", ".join(f"{name} ({' '.join(f)})" for name, f in sorted(others.items()) if f)
    console.print(f"use the language model of another folder: {shown}", highlight=False)
    console.print(f"nothing to rewrite: {', '.join(rest)}", highlight=False)


def _add_rows(table: Any, name: str, content: dict[str, Any]) -> None:
    refused = ", ".join(
        f"{row['class'].rsplit('.', 1)[-1]}: {row['diagnostics'][0]['slug']}"
        for row in content["refused"]
    )
    if content["route"] == "model":
        table.add_row(name, "Model", "", "per-sequence (whole model)", "1", refused)
        return
    if not content["classes"]:
        table.add_row(name, "", "follows what it imports", content["route"], "", refused)
    for row in content["classes"]:
        sites = str(len(row["sites"])) if row["sites"] else ""
        short = row["class"].rsplit(".", 1)[-1]
        table.add_row(name, short, row["kind"], row["route"], sites, refused)


# --------------------------------------------------------------------------- sub-commands


def _command(name: str, words: list[str]) -> int:
    from . import commands

    return int(getattr(commands, name)(words))


if __name__ == "__main__":
    entry()
