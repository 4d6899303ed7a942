"""Load a model folder or a Hub repository as a rewritten model, through mlx_lm's own loader."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm import utils as upstream
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .errors import BadModel, RuntimeRefusal
from .manifest import generated_folder, load_generated, load_own

BROKEN = (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, AssertionError)


def load(
    path_or_repo: str | Path,
    *,
    adapter_path: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    generated: str | Path | None = None,
    lazy: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, TokenizerWrapper]:
    """The rewritten model and its tokenizer.

    Weights, quantisation, adapters and tokenizers are mlx_lm's: only the model's class is taken
    from the folder of rewritten files (`generated`, else MLXREWRITE_GENERATED, else the installed
    one).

    Raises:
        BadModel: no such model, an unusable config, missing or broken weights.
        NotGenerated: no rewritten file for the model type, or not a current one.
    """
    folder = model_folder(path_or_repo, revision)
    model, config = load_model(
        folder,
        model_config=model_config,
        generated=generated,
        lazy=lazy,
        trust_remote_code=trust_remote_code,
    )
    try:
        if adapter_path is not None:
            model = upstream.load_adapters(model, adapter_path)
            model.eval()
    except BROKEN as problem:
        raise BadModel(f"adapters {adapter_path}: {said(problem)}") from problem
    try:
        extra = {"trust_remote_code": True} if trust_remote_code else {}
        tokenizer = upstream.load_tokenizer(
            folder,
            {**extra, **(tokenizer_config or {})} or None,
            eos_token_ids=config.get("eos_token_id"),
        )
    except BROKEN as problem:
        raise BadModel(f"the tokenizer in {folder}: {said(problem)}") from problem
    return model, tokenizer


def load_model(
    folder: Path,
    *,
    model_config: dict[str, Any] | None = None,
    generated: str | Path | None = None,
    lazy: bool = False,
    trust_remote_code: bool = False,
    original: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a folder, rewritten or `original`, and its config."""
    config = {**read_config(folder), **(model_config or {})}
    if config.get("model_file") is not None and not trust_remote_code:
        raise BadModel(
            f"{folder} brings its own model file {config['model_file']!r}: pass "
            "trust_remote_code=True if you trust it"
        )

    own = {"model_file": config.get("model_file")}

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        asked = {**config, **own}  # mlx_lm is told below that there is no such file
        module = (
            original_module(asked, folder)
            if original
            else rewritten_module(asked, generated, folder)
        )
        return module.Model, module.ModelArgs

    try:
        # The classes above stand for `model_file`, so mlx_lm must not import it.
        model, config = upstream.load_model(
            folder,
            lazy,
            model_config={**(model_config or {}), "model_file": None},
            get_model_classes=classes,
        )
    except RuntimeRefusal:
        raise
    except BROKEN as problem:
        raise BadModel(f"{_broken_weights(folder) or folder}: {said(problem)}") from problem
    return model, config


def _broken_weights(folder: Path) -> Path | None:
    """The first weight file that cannot be opened."""
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            mx.load(str(path))
        except BROKEN:
            return path
    return None


def model_folder(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """A local folder, or the snapshot of a Hub repository."""
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    text = str(path_or_repo)
    if path.exists():
        raise BadModel(f"{path}: expected a model folder, got a file")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.startswith("."):
        raise BadModel(f"{path}: no such folder, and not the name of a Hub repository (owner/name)")
    try:
        return Path(upstream._download(text, revision=revision))
    except Exception as problem:  # whatever the Hub's client raises: offline, unknown, forbidden
        raise BadModel(
            f"{text}: no such folder here, and the Hub did not give it: {said(problem)}"
        ) from problem


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a model folder as mlx_lm reads it."""
    try:
        config = upstream.load_config(folder)
    except FileNotFoundError:
        raise BadModel(
            f"{folder}: expected a model folder with a config.json, found none"
        ) from None
    except (OSError, ValueError) as problem:
        raise BadModel(f"{folder / 'config.json'}: {said(problem)}") from None
    return checked_config(config, folder / "config.json")


def checked_config(config: Any, where: Path) -> dict[str, Any]:
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BadModel(f"{where}: expected an object with a `model_type`")
    return config


def module_name(config: dict[str, Any]) -> str:
    """The model file that a config asks for, after mlx_lm's renamings."""
    if config.get("model_file") is not None:
        return Path(config["model_file"]).stem
    model_type = str(config["model_type"])
    architectures = config.get("architectures") or ()
    if isinstance(architectures, str):
        architectures = (architectures,)
    for architecture in architectures:
        special = upstream.MODEL_ARCHITECTURE_REMAPPING.get((model_type, architecture))
        if special is not None:
            return str(special)
    return str(upstream.MODEL_REMAPPING.get(model_type, model_type))


def rewritten_module(
    config: dict[str, Any], generated: str | Path | None = None, checkpoint: Path | None = None
) -> ModuleType:
    """The rewritten model file for a config; of the `checkpoint`'s own file if it brings one."""
    folder, name = generated_folder(generated), module_name(config)
    if config.get("model_file") is not None and checkpoint is not None:
        return load_own(folder, checkpoint / str(config["model_file"]))
    if not (folder / f"{name}.json").is_file() and config.get("model_file") is None:
        known = Path(str(upstream.__file__)).parent / "models" / f"{name}.py"
        if not known.is_file() and generated is None:
            raise BadModel(f"model type {config['model_type']!r} is not one that mlx_lm has")
    return load_generated(folder, name)


def original_module(config: dict[str, Any], folder: Path | None = None) -> ModuleType:
    """mlx_lm's model file for a config, or the folder's own."""
    own = config.get("model_file")
    if own is not None and folder is not None:
        return import_file(folder / str(own))
    name = module_name(config)
    try:
        return importlib.import_module(f"mlx_lm.models.{name}")
    except (ImportError, SystemExit) as problem:  # some files exit where a package is missing
        raise BadModel(
            f"model type {config['model_type']!r}: mlx_lm cannot import {name}: {said(problem)}"
        ) from problem


def import_file(path: Path) -> ModuleType:
    """Run a Python file as a module."""
    spec = importlib.util.spec_from_file_location(f"_original_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise BadModel(f"{path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(problem: BaseException) -> str:
    """What went wrong, in one line."""
    missing = re.findall(
        r"missing \d+ required (?:positional|keyword-only) arguments?: (.*)", f"{problem}"
    )
    if missing:
        return f"the config lacks {missing[0]}"
    if isinstance(problem, json.JSONDecodeError):
        return f"not valid JSON: {problem}"
    if isinstance(problem, KeyError):
        return f"the config or the weights lack {problem.args[0]!r}"
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) < 300 else f"{text[:300]} ..."
