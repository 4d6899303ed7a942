"""The sub-commands. Those that run models load the runtime only when called."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .diagnostics import EXPLANATIONS, SLUGS
from .sources import SourceError, locate
from .usage import Parser, UsageError

# --------------------------------------------------------------------------- explain


def explain(words: Sequence[str]) -> int:
    """`explain MODEL|KIND|SLUG`: evidence of a match, what a kind is, what a refusal means."""
    parser = Parser(prog="mlxrewrite explain", description=explain.__doc__)
    parser.add_argument("subject", metavar="MODEL|KIND|SLUG")
    subject = parser.parse_args(words).subject
    if subject in SLUGS:
        print(f"{subject}: {SLUGS[subject]}")
        if subject in EXPLANATIONS:
            print(f"\n{EXPLANATIONS[subject]}")
        return 0
    from .kinds import all_kinds

    for kind in all_kinds():
        if kind.name == subject:
            print(kind.doc.strip())
            return 0
    return _explain_model(subject)


def _explain_model(subject: str) -> int:
    from .pipeline import Compiler

    try:
        request = locate(subject)
    except SourceError:
        try:
            request = locate(f"mlx_lm.models.{subject}")
        except SourceError:
            raise UsageError(f"{subject}: neither a model, a kind nor a slug") from None
    if request.modules is None:
        raise UsageError(f"{subject} is a folder: name one model of it")
    compiled = Compiler(request.package).compile(request.modules[0])
    from .diagnostics import render

    for problem in compiled.errors:
        print(render(problem), file=sys.stderr)
    if compiled.emitted is None:
        return 2
    plan = compiled.emitted.plan
    routes = {"model": "per-sequence (whole model)", "none": "nothing to rewrite"}
    print(f"{plan.module}: {routes.get(plan.route, plan.route)}, {len(plan.edits)} edits")
    for match in plan.matches:
        features = f" ({', '.join(match.features)})" if match.features else ""
        print(f"\n{match.class_name}\n  kind   {match.kind}{features}\n  route  {match.route}")
        for site in match.sites:
            print(f"  site   {site.place}: {site.rule}")
        for item in match.evidence:
            print(f"  because {item.role}\n    {item.place}: {item.place.text.strip()}")
    if plan.assumptions:
        print("\ntoken independence is proved, given that")
    for assumption in plan.assumptions:
        at = f"\n    {assumption.place}" if assumption.place is not None else ""
        print(f"  {assumption.text}{at}")
    told = [d for refusal in plan.refusals for d in refusal.diagnostics]
    for diagnostic in dict.fromkeys((*told, *plan.notes)):
        print(f"\n{render(diagnostic)}")
    return 1 if plan.route == "refused" else 0


# --------------------------------------------------------------------------- verify, generate


def verify(words: Sequence[str]) -> int:
    """Compare the rewritten model with the original on random ragged schedules."""
    parser = Parser(prog="mlxrewrite verify", description=verify.__doc__)
    add = parser.add_argument
    add("model", metavar="CONFIG.json|MODEL_DIR")
    add("--seed", type=int, default=0, help="of weights, prompts and schedules (default 0)")
    add(
        "--reference",
        choices=("same", "whole", "tokens"),
        default="same",
        help="how the original is fed: in the same chunks, whole prompts, or single tokens",
    )
    add("--generated", type=Path, help="folder of the rewritten files (default: the installed one)")
    add("--json", action="store_true", help="print the report as JSON")
    add(
        "--taint",
        action="store_true",
        help="change single tokens instead, and see that no other row changes",
    )
    got = parser.parse_args(words)
    from .runtime.errors import RuntimeRefusal
    from .runtime.verify import verify as run

    if got.taint:
        return _taint(got)
    try:
        report = run(got.model, seed=got.seed, generated=got.generated, reference=got.reference)
    except RuntimeRefusal as problem:
        raise UsageError(str(problem)) from problem
    print(report.to_json() if got.json else report.text())
    return 0 if report.passed else 1


def _taint(got: Any) -> int:
    from .runtime.errors import RuntimeRefusal
    from .runtime.taint import taint

    try:
        report = taint(got.model, seed=got.seed, generated=got.generated)
    except RuntimeRefusal as problem:
        raise UsageError(str(problem)) from problem
    print(report.to_json() if got.json else report.text())
    return 0 if report.passed else 1


def generate(words: Sequence[str]) -> int:
    """Generate text for several prompts at once with a rewritten model."""
    parser = Parser(prog="mlxrewrite generate", description=generate.__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR|REPO", help="a checkpoint as mlx_lm loads it")
    add("--prompt", action=_Asked, required=True, metavar="TEXT", help="may be given often")
    add(
        "--image",
        action=_Image,
        default=[],
        metavar="FILE",
        help="an image for the next --prompt, may be given often; loads the model with mlx_vlm",
    )
    add("--vlm", action="store_true", help="load the model with mlx_vlm, also without images")
    add("--max-tokens", type=int, default=256)
    add("--temp", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-p", type=float, default=0.0)
    add("--top-k", type=int, default=0)
    add("--min-p", type=float, default=0.0)
    add("--seed", type=int, help="of the sampler")
    add("--adapter-path", metavar="DIR", help="LoRA adapters, as mlx_lm loads them")
    add("--no-chat", action="store_true", help="give prompts as they are, without chat template")
    add("--kv-bits", type=int, metavar="8|4", help="keep keys and values as codes of so many bits")
    add("--kv-group-size", type=int, default=64, help="codes with one scale (default 64)")
    add("--generated", type=Path, help="folder of the rewritten files (default: the installed one)")
    add("--trust-remote-code", action="store_true")
    got = parser.parse_args(words)
    if got.max_tokens < 1:
        raise UsageError("--max-tokens takes a number from 1")
    if got.image:
        raise UsageError("--image belongs to the --prompt behind it, and none follows")
    from .runtime.errors import RuntimeRefusal

    try:
        return _generate(got)
    except RuntimeRefusal as problem:
        raise UsageError(str(problem)) from problem


class _Asked(argparse.Action):
    """`--prompt`: takes the images that came before it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.prompt = [*(namespace.prompt or []), values]
        namespace.images = [*getattr(namespace, "images", []), tuple(namespace.image)]
        namespace.image = []


class _Image(argparse.Action):
    """`--image`: waits for the next prompt."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.image = [*namespace.image, values]


def _generate(got: Any) -> int:
    import mlx.core as mx

    from .runtime.generate import encode_prompt, stream_generate
    from .runtime.load import load

    if got.seed is not None:
        mx.random.seed(got.seed)
    if got.vlm or any(got.images):
        return _generate_with_images(got)
    model, tokenizer = load(
        got.model,
        adapter_path=got.adapter_path,
        generated=got.generated,
        trust_remote_code=got.trust_remote_code,
    )
    prompts = [encode_prompt(tokenizer, text, chat=not got.no_chat) for text in got.prompt]
    return _show(got, _answers(got, stream_generate, model, tokenizer, prompts))


def _generate_with_images(got: Any) -> int:
    try:
        from .runtime.vision_generate import Asked, load, prepare, stream_generate
    except ImportError as problem:
        raise UsageError(
            f"mlx_vlm is not installed (`pip install mlxrewrite[vlm]`): {problem}"
        ) from problem

    model, processor = load(
        got.model,
        adapter_path=got.adapter_path,
        generated=got.generated,
        trust_remote_code=got.trust_remote_code,
    )
    asked = [Asked(text, images) for text, images in zip(got.prompt, got.images, strict=True)]
    prompts = [prepare(model, processor, one, chat=not got.no_chat) for one in asked]
    return _show(got, _answers(got, stream_generate, model, processor, prompts))


def _answers(
    got: Any, stream: Callable[..., Iterable[Any]], model: Any, processor: Any, prompts: list[Any]
) -> Iterable[Any]:
    """What the engine says to prepared prompts, with the options that text and images share."""
    from mlx_lm.sample_utils import make_sampler

    return stream(
        model,
        processor,
        prompts,
        max_tokens=got.max_tokens,
        sampler=make_sampler(temp=got.temp, top_p=got.top_p, min_p=got.min_p, top_k=got.top_k),
        kv_bits=got.kv_bits,
        kv_group_size=got.kv_group_size,
    )


def _show(got: Any, events: Iterable[Any]) -> int:
    """Print the pieces of one answer as they come, of several one answer after the other."""
    prompts = got.prompt
    if len(prompts) == 1:
        for event in events:
            print(event.text, end="", flush=True)
        print()
        return 0
    texts = [""] * len(prompts)
    shown = 0  # prompts are shown in order: the first unfinished one streams
    done = [False] * len(prompts)
    print(f"[1] {got.prompt[0]}")
    for event in events:
        texts[event.prompt] += event.text
        done[event.prompt] |= event.finish_reason is not None
        if event.prompt == shown:
            print(event.text, end="", flush=True)
        while shown < len(prompts) and done[shown]:
            shown += 1
            print("\n")
            if shown < len(prompts):
                print(f"[{shown + 1}] {got.prompt[shown]}\n{texts[shown]}", end="", flush=True)
    return 0


def serve(words: Sequence[str]) -> int:
    """mlx_lm's server on rewritten models."""
    try:
        from .runtime.serve import main
    except ImportError as problem:
        raise UsageError(f"serve is not available: {problem}") from problem
    return int(main(list(words)))


# --------------------------------------------------------------------------- kernels


def kernels(words: Sequence[str]) -> int:
    """`kernels list` names the specialisations; `kernels show SPEC` prints the Metal text."""
    parser = Parser(prog="mlxrewrite kernels", description=kernels.__doc__)
    parser.add_argument("action", choices=("list", "show"))
    parser.add_argument("spec", nargs="?", metavar="SPEC")
    got = parser.parse_args(words)
    from .kernels import inspect

    if got.action == "list":
        for name in inspect.list_specs():
            print(name)
        return 0
    if got.spec is None:
        raise UsageError("kernels show needs the name of a specialisation")
    try:
        print(inspect.show(got.spec))
    except (KeyError, ValueError) as problem:
        raise UsageError(f"kernels show {got.spec}: {problem}") from problem
    return 0
