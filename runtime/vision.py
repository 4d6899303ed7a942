"""Language models of mlx_vlm under a ragged batch.

The model is loaded by mlx_vlm itself. Where its language model was rewritten, its modules take the
rewritten classes: weights, quantisation and the vision tower stay as they are. The others run as
they are, once per sequence, over that sequence's own caches.

What mlx_vlm keeps on the model between calls (position ids, rope deltas) belongs to one sequence,
and is kept with it here: in `Prepared`, never on the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_vlm.models import cache as own_caches
from mlx_vlm.models import rope_utils
from mlxrewrite.kernels.ops import Ragged

from . import caches as specs
from .cache import PagedCache
from .errors import NotGenerated, RuntimeRefusal
from .manifest import Manifest, check, generated_folder, load_generated
from .rows import Rows
from .views import View
from .vision_rows import NO_ID, keeping_weights, row_ids, stacked

PACKAGE = "mlx_vlm"
_MODELS = "mlx_vlm.models."
# Routes of files whose classes run on rows of many sequences.
BY_ROWS = ("kernel", "gathered", "per-sequence")
# Kinds whose pages hold latents: what an original cache holds has another form.
_LATENT = frozenset({"latent_mla", "sparse_selection"})
# These take the largest position of a batch for all rows, to choose between two sets of factors.
_ONE_LENGTH_ROPES = (rope_utils.SuScaledRoPE,)

for _name in (
    "KVCache",
    "ConcatenateKVCache",
    "RotatingKVCache",
    "ChunkedKVCache",
    "ArraysCache",
    "CacheList",
):
    getattr(specs, _name).register(getattr(own_caches, _name))

ROUGH = 0.25  # of the spread of logits: above rounding of 16 bits, below any mistake

State = dict[tuple[int, str], Any]


@dataclass(slots=True, eq=False)
class Prepared:
    """A prompt as its language model gets it; made by `VisionModel.prepare`.

    ids [L], `NO_ID` where a row stands for no token; `embeds` [1, L, D] and `features`, the keyword
    arguments, come from the model's own `get_input_embeddings`. `positions` [3, L], or [L, 3] where
    the model stacks them last, and `delta`, what is added to positions behind the prompt. `state`
    is what the model keeps on itself about this sequence.
    """

    ids: list[int]
    embeds: mx.array
    features: dict[str, Any]
    positions: np.ndarray | None
    axis: int
    delta: int
    images: bool
    state: State = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)  # arguments of steps behind the prompt

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, eq=False)
class _Swap:
    module: nn.Module
    original: type
    rewritten: type


class VisionModel:
    """A model of mlx_vlm as `PagedCache` takes it: rewritten, or once per sequence.

    `route` is that of the rewritten file, or "model" (the whole language model once per sequence);
    `why` says why the latter. `whole` asks for it.
    """

    def __init__(
        self, model: nn.Module, generated: str | Path | None = None, *, whole: bool = False
    ) -> None:
        self.model = model
        self.language: Any = model.language_model
        self._swaps: list[_Swap] = []
        self._prompts: dict[int, Prepared] = {}
        self._axis = 0  # of a row's positions: 1 where the model stacks them last
        self.manifest, self.why = _manifest(self.language, generated)
        self._state = state_places(self.language, self.manifest)
        self._fresh = self._read_state()
        if whole:
            self.why = self.why or "asked for"
        told = any("_rope_deltas" in names for _, names in self._state)
        if not self.why and self.takes_positions and not (told or self._gives_positions()):
            self.why = "its positions are made while it runs"
        if not self.why and not self._embeds_alike():
            self.why = "its prompts are embedded in another way than the tokens that follow"
        if self.manifest is not None and not self.why:
            self._swaps = _swaps(self.language, generated_folder(generated, PACKAGE))
        self._take("rewritten")
        if self._swaps and not self._agrees():
            self._take("original")
            self._swaps, self.why = [], "it disagrees with the original on a short batch"

    def _agrees(self) -> bool:
        """Two short sequences in one batch have the logits that each has alone.

        Not a proof, but a rewritten file that mixes up rows or positions does not come this far.
        """
        texts = ([0, 1, 2, 3, 4, 3, 2, 1], [2, 0, 4])
        cache = PagedCache(self, 4, num_blocks=16)
        try:
            prompts = [self.prepare(ids[:-1]) for ids in texts]
            names = [cache.add_sequence() for _ in texts]
            for name, prompt in zip(names, prompts, strict=True):
                self.attach(name, prompt)
            parts = zip(names, texts, strict=True)
            cache.step({name: ids[:-1] for name, ids in parts})
            parts = zip(names, texts, strict=True)
            ours = cache.step({name: ids[-1:] for name, ids in parts})
            theirs = []
            for prompt, ids in zip(prompts, texts, strict=True):
                caches = self.original_caches()
                self.run_one(prompt, mx.array([ids[:-1]], mx.int32), caches, 0)
                last = mx.array([ids[-1:]], mx.int32)
                theirs.append(self.run_one(prompt, last, caches, len(prompt))[:, -1])
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
            return False
        finally:
            self._prompts.clear()
            self._write_state(self._fresh)
        wanted, got = (np.array(x.astype(mx.float32)) for x in (mx.concatenate(theirs), ours))
        return bool(np.abs(wanted - got).max() <= ROUGH * wanted.std())

    @property
    def rewritten(self) -> bool:
        """The language model runs on rows of many sequences."""
        return not self.why

    @property
    def route(self) -> str:
        return "model" if self.manifest is None or self.why else self.manifest.route

    @property
    def _kept_otherwise(self) -> bool:
        """Some class keeps what an original cache holds in another form, or in original caches."""
        kinds = self.manifest.kinds if self.manifest is not None else frozenset()
        return self.route == "per-sequence" or bool(kinds & _LATENT)

    @property
    def takes_positions(self) -> bool:
        """The language model takes explicit position ids."""
        contract = self.manifest.contract if self.manifest is not None else None
        return bool(contract and contract["positions"])

    def make_cache(self) -> list[Any]:
        """Specs of the caches if the model is rewritten, else mlx_vlm's own caches."""
        made = own_caches.make_prompt_cache(self.language)
        if not self.rewritten:
            return list(made)
        return [_spec(entry) for entry in made]

    def original_caches(self) -> list[Any]:
        """mlx_vlm's own caches for one sequence."""
        with self.original():
            return list(own_caches.make_prompt_cache(self.language))

    @contextmanager
    def original(self) -> Iterator[None]:
        """The original classes for the time being, with the same weights."""
        self._take("original")
        try:
            yield
        finally:
            self._take("rewritten")

    def _take(self, form: str) -> None:
        for swap in self._swaps:
            # The same object under another class: only methods differ.
            swap.module.__class__ = getattr(swap, form)

    # ---------------------------------------------------------------- prompts

    def prepare(self, ids: Sequence[int], **inputs: Any) -> Prepared:
        """Run the model's own `get_input_embeddings` on one prompt.

        `inputs` are what mlx_vlm's processor returns beside the ids: pixel values, grids, masks.
        """
        array = mx.array([list(ids)], mx.int32)
        self._write_state(self._fresh)
        given = {name: value for name, value in inputs.items() if value is not None}
        pixels = given.pop("pixel_values", None)
        mask = given.pop("mask", None)
        with self.original(), keeping_weights(self.model):
            found = self.model.get_input_embeddings(array, pixels, mask=mask, **given)
        features = dict(given)
        features |= {
            name: value
            for name, value in found.to_dict().items()
            if name != "inputs_embeds" and value is not None
        }
        prepared = Prepared(
            list(ids), found.inputs_embeds, features, None, 0, 0, pixels is not None
        )
        prepared.state = self._read_state()
        if self.takes_positions:
            self._set_positions(prepared)
        self._write_state(self._fresh)
        if found.inputs_embeds.shape[1] != len(ids):
            prepared.ids = self._rows_of(prepared)
        return prepared

    def _rows_of(self, prepared: Prepared) -> list[int]:
        """An id for each row of a prompt whose images became more (or fewer) rows than tokens.

        Raises RuntimeRefusal where something else than embeddings tells rows apart.
        """
        rows = prepared.embeds.shape[1]
        said = f"a prompt of {len(prepared.ids)} tokens became {rows} rows"
        looked = self._looked_at(prepared)
        if looked is None or looked:
            names = ", ".join(sorted(looked or ())) or "what is not known"
            raise RuntimeRefusal(f"{said}, and the language model looks at {names} besides")
        if self.takes_positions and prepared.positions is None:
            raise RuntimeRefusal(f"{said} without positions")
        if prepared.positions is not None and triples(prepared).shape[1] != rows:
            raise RuntimeRefusal(f"{said} and {triples(prepared).shape[1]} positions")
        if not self._needs_no_ids:
            raise RuntimeRefusal(f"{said}, and the language model looks at ids besides")
        text = self.embed([max(token, NO_ID) for token in prepared.ids])
        return row_ids(prepared.ids, prepared.embeds[0], text)

    @cached_property
    def _needs_no_ids(self) -> bool:
        """The original language model gives the same logits for embeddings without any ids."""
        embeds = self.embed([0, 1, 2])[None]
        given: dict[str, Any] = {}
        if self.takes_positions:
            shape = (1, 3, 3) if self._axis else (3, 1, 3)
            given["position_ids"] = mx.zeros(shape, mx.int32)
        found = []
        try:
            with self.original():
                for ids in (mx.array([[0, 1, 2]], mx.int32), None):
                    caches = own_caches.make_prompt_cache(self.language)
                    output = self.language(ids, inputs_embeds=embeds, cache=caches, **given)
                    found.append(output.logits)
            return bool(mx.array_equal(*found))
        except (ValueError, TypeError, AttributeError, IndexError, KeyError):
            return False
        finally:
            self._write_state(self._fresh)

    def _gives_positions(self) -> bool:
        """The model tells the positions of a prompt before its language model runs."""
        try:
            found = self.model.get_input_embeddings(mx.array([[0]], mx.int32), None)
        except (ValueError, TypeError, AttributeError, IndexError, KeyError):
            return False
        finally:
            self._write_state(self._fresh)
        return found.position_ids is not None

    def _embeds_alike(self) -> bool:
        """One token through ids or through embeddings gives the same logits.

        mlx_vlm reads prompts as embeddings and continues with ids. Where a language model scales
        one of them only, rows of a batch cannot be told apart: such a model runs once per sequence.
        """
        ids = mx.array([[0]], mx.int32)
        for self._axis, shape in enumerate(((3, 1, 1), (1, 1, 3))):
            given = {"position_ids": mx.zeros(shape, mx.int32)} if self.takes_positions else {}
            try:
                embeds = self.model.get_input_embeddings(ids, None).inputs_embeds
                caches = (own_caches.make_prompt_cache(self.language) for _ in range(2))
                both = [
                    self.language(ids, cache=next(caches), **given, **by)
                    for by in ({}, {"inputs_embeds": embeds})
                ]
                first, second = (np.array(output.logits.astype(mx.float32)) for output in both)
            except (ValueError, TypeError, AttributeError, IndexError, KeyError):
                continue
            finally:
                self._write_state(self._fresh)
            return bool(np.abs(first - second).max() <= 1e-2 * max(float(first.std()), 1e-6))
        return False

    def _set_positions(self, prepared: Prepared) -> None:
        given = prepared.features.get("position_ids")
        if given is None:
            return
        table = np.array(given)
        if table.ndim == 2:  # the same on all axes
            table = np.broadcast_to(table[None], (3, *table.shape))
        prepared.axis = 1 if table.shape[0] == 1 and table.shape[-1] == 3 else 0
        prepared.positions = table[0] if prepared.axis else table[:, 0]
        deltas = prepared.features.get("rope_deltas")
        if deltas is not None:
            prepared.delta = int(np.array(deltas).ravel()[0])

    def attach(self, sequence: int, prepared: Prepared) -> None:
        """The sequence of a `PagedCache` that reads this prompt."""
        self._prompts[sequence] = prepared

    def attach_all(self, prompts: Mapping[int, Prepared]) -> None:
        """The prompts of all sequences that have any, in place of those before."""
        self._prompts = dict(prompts)

    def embed(self, ids: Sequence[int]) -> mx.array:
        """Embeddings [L, D] of tokens as text."""
        with self.original():
            found = self.model.get_input_embeddings(mx.array([list(ids)], mx.int32), None)
        self._write_state(self._fresh)
        embeds: mx.array = found.inputs_embeds[0]
        return embeds

    def parameters(self) -> Any:
        """The weights, as those of a module."""
        return self.model.parameters()

    def detach(self, sequence: int) -> None:
        self._prompts.pop(sequence, None)

    def by_rows(self, prepared: Prepared) -> bool:
        """The prompt can be read row by row, mixed with others and in chunks.

        So it is if the language model looks at nothing but embeddings and positions.
        """
        if not self.rewritten or not prepared.images:
            return self.rewritten
        placed = prepared.positions is not None or not self.takes_positions
        return placed and not self._looked_at(prepared)

    def _looked_at(self, prepared: Prepared) -> set[str] | None:
        """Features of a prompt, but for embeddings and positions, that the language model reads.

        None if that is not known.
        """
        if self.manifest is None or self.manifest.contract is None:
            return None
        reads = set(self.manifest.contract["reads"])
        wanted = set(prepared.features) if "**" in reads else set(prepared.features) & reads
        wanted -= {"position_ids", "rope_deltas"}
        return wanted - _FOR_POSITIONS if self.takes_positions else wanted

    # ------------------------------------------------------------------- step

    def __call__(self, ids: mx.array, cache: list[View]) -> mx.array:
        """Logits of the wanted rows of a step, [S, 1, V]."""
        batch = cache[0].batch
        if not self.rewritten:
            return self._once_per_sequence(ids, cache)
        before = self._read_state(top=True)
        given: dict[str, Any] = {}
        if self.takes_positions:
            given["position_ids"] = self._row_positions(batch.rows)
        embeds = self._row_embeds(ids, batch.rows)
        if embeds is not None:
            given["inputs_embeds"] = embeds
        logits: mx.array = self.language(ids, cache=cache, **given).logits
        if any(self._read_state(top=True)[place] is not value for place, value in before.items()):
            raise RuntimeError("the language model kept state of a batch on itself")
        return logits

    def _row_positions(self, rows: Sequence[Rows]) -> mx.array:
        """[3, T, 1], or [T, 1, 3] where the model stacks them last."""
        columns, axis = [], self._axis
        for part in rows:
            prepared = self._prompts.get(part.sequence)
            places = np.arange(part.position, part.end)
            columns.append(np.broadcast_to(places, (3, part.length)))
            if prepared is None or prepared.positions is None:
                continue
            axis = prepared.axis
            table = prepared.positions.T if axis else prepared.positions
            inside = places < table.shape[1]
            known = table[:, places[inside]]
            behind = np.broadcast_to(places[~inside] + prepared.delta, (3, int((~inside).sum())))
            columns[-1] = np.concatenate([known, behind], axis=1)
        table = np.concatenate(columns, axis=1).astype(np.int32)
        return mx.array(table.T[:, None] if axis else table[:, :, None])

    def _row_embeds(self, ids: mx.array, rows: Sequence[Rows]) -> mx.array | None:
        """[T, 1, D], if some rows are of a prompt with images; ids are enough for the others."""
        if not any(self._reads_images(part) for part in rows):
            return None
        parts: list[mx.array | None] = []
        plain = []
        for part in rows:
            if self._reads_images(part):
                prompt = self._prompts[part.sequence]
                parts.append(prompt.embeds[0, part.position : part.end])
            else:
                plain.append(ids[part.start : part.stop, 0])
                parts.append(None)
        if plain:
            with self.original():
                text = self.model.get_input_embeddings(mx.concatenate(plain)[None], None)
            self._write_state(self._fresh)
            found, start = text.inputs_embeds[0], 0
            for index, part in enumerate(rows):
                if parts[index] is None:
                    parts[index] = found[start : start + part.length]
                    start += part.length
        dtype = next(self._prompts[p.sequence].embeds.dtype for p in rows if self._reads_images(p))
        return mx.concatenate([p.astype(dtype) for p in parts if p is not None])[:, None]

    def _reads_images(self, part: Rows) -> bool:
        prompt = self._prompts.get(part.sequence)
        return prompt is not None and prompt.images and part.position < len(prompt)

    # ----------------------------------------------------------- once per sequence

    def _once_per_sequence(self, ids: mx.array, cache: list[View]) -> mx.array:
        batch = cache[0].batch
        kept = []
        for part in batch.rows:
            prompt = self._prompts.get(part.sequence)
            tokens = ids[part.start : part.stop].reshape(1, -1)
            originals = batch.originals.of(part.sequence)
            logits = self.run_one(prompt, tokens, originals, part.position)[0]
            rows = [row - part.start for row in batch.wanted if part.start <= row < part.stop]
            if rows:
                kept.append(logits[mx.array(rows)])
        return stacked(kept)[:, None]

    def run_one(
        self, prompt: Prepared | None, tokens: mx.array, caches: list[Any], position: int
    ) -> mx.array:
        """The original language model on tokens [1, L] of one sequence: logits [1, L, V]."""
        count = tokens.shape[1]
        given: dict[str, Any] = {}
        if prompt is not None and position < len(prompt):
            if prompt.images and count + position < len(prompt):
                raise RuntimeRefusal("a prompt with images is read in one step")
            given = dict(prompt.features)
            embeds = prompt.embeds[:, position : position + count]
            if embeds.shape[1] == count:
                given["inputs_embeds"] = embeds
        elif prompt is not None:
            given = dict(prompt.step)
        self._write_state(prompt.state if prompt is not None else self._fresh)
        with self.original():
            output = self.language(tokens, cache=caches, **given)
        if prompt is not None:
            prompt.state = self._read_state()
            for name in ("cross_attention_states", "encoder_outputs"):
                if getattr(output, name, None) is not None:
                    prompt.step = {name: getattr(output, name)}
        self._write_state(self._fresh)
        logits: mx.array = output.logits
        return logits

    def read_alone(self, cache: PagedCache, prompt: Prepared) -> tuple[int, mx.array]:
        """Read a whole prompt by the original model and page its keys: the sequence, logits [1, V].

        For prompts whose masks or features have no form by rows. Raises RuntimeRefusal where the
        caches have no form in pages.
        """
        if self._kept_otherwise:
            raise RuntimeRefusal(
                "a prompt with images that this model cannot read row by row: its caches have "
                "another form in pages; use VisionModel(model, whole=True)"
            )
        logits, originals = self.read_original(prompt)
        sequence = cache.begin(len(prompt))
        cache.open_step()
        for path, held in cache.states.items():
            entry = specs.entry_at(originals, path)
            held.table.restore(sequence, [entry[index] for index in range(held.table.size)])
        for path, leaf in cache.leaves.items():
            entry = specs.entry_at(originals, path)
            table = cache.tables(sequence)[leaf.group]
            count = len(prompt) - table.dropped * cache.block_size
            keys, values = _in_order(entry, len(prompt), count)
            ragged = Ragged.build(
                [count], [len(prompt)], [table.blocks], cache.block_size, [table.dropped]
            )
            leaf.pool.write(keys, values, ragged, cache.serial)
        self.attach(sequence, prompt)
        return sequence, logits

    def read_original(self, prompt: Prepared) -> tuple[mx.array, list[Any]]:
        """Logits [1, V] behind a prompt by the original model, and its caches."""
        originals = self.original_caches()
        logits = self.run_one(prompt, mx.array([prompt.ids], mx.int32), originals, 0)[:, -1]
        mx.eval(logits, [entry.state for entry in originals])
        self._after_original(prompt)
        return logits, originals

    def _after_original(self, prompt: Prepared) -> None:
        """Position ids that the model only made while it ran. Raises RuntimeRefusal if it does not
        tell how they go on."""
        if not self.takes_positions or prompt.positions is not None:
            return
        for (_, name), value in prompt.state.items():
            if name == "_rope_deltas" and value is not None:
                prompt.delta = int(np.array(value).ravel()[0])
                # Only its last one and those behind it are asked for from now on.
                places = np.arange(len(prompt)) + prompt.delta
                prompt.axis = self._axis
                table = np.broadcast_to(places, (3, len(prompt)))
                prompt.positions = table.T if prompt.axis else table
                return
        raise RuntimeRefusal("the model does not tell the positions behind a prompt with images")

    # ------------------------------------------------------------------ state

    def _read_state(self, top: bool = False) -> State:
        found: State = {}
        for index, (module, names) in enumerate(self._state):
            if top and index:
                break
            for name in names:
                value = getattr(module, name, None)
                found[index, name] = value if top else own(value)
        return found

    def _write_state(self, state: State) -> None:
        for (index, name), value in state.items():
            setattr(self._state[index][0], name, own(value))


# What language models read only to find the positions that they are given.
_FOR_POSITIONS = frozenset({"attention_mask", "image_grid_thw", "video_grid_thw", "pixel_values"})


def _manifest(language: Any, generated: str | Path | None) -> tuple[Manifest | None, str]:
    """The manifest of a language model's class, and why it does not run on pages (or nothing)."""
    cls = type(language)
    if not cls.__module__.startswith(_MODELS):
        return None, f"{cls.__module__} is not a file of mlx_vlm"
    name = cls.__module__.removeprefix(_MODELS).replace(".", "/")
    try:
        manifest = check(generated_folder(generated, PACKAGE), name)
    except NotGenerated as problem:
        if (generated_folder(generated, PACKAGE) / f"{name}.json").is_file():
            raise
        return None, str(problem)
    if manifest.route not in BY_ROWS:
        return manifest, "its file is not rewritten"
    contract = manifest.contract or {}
    if contract.get("entry") != f"{cls.__module__}.{cls.__qualname__}":
        return manifest, f"{cls.__qualname__} is not the class that was rewritten"
    for module in language.modules():
        if isinstance(module, _ONE_LENGTH_ROPES):
            return manifest, "its rope depends on the length of one sequence"
    return manifest, ""


def _swaps(language: Any, folder: Path) -> list[_Swap]:
    """Every module of the language model whose class has a rewritten form."""
    found = []
    for module in language.modules():
        cls = type(module)
        if not cls.__module__.startswith(_MODELS):
            continue
        name = cls.__module__.removeprefix(_MODELS).replace(".", "/")
        if not (folder / f"{name}.py").is_file():
            continue
        rewritten = getattr(load_generated(folder, name), cls.__qualname__, None)
        if rewritten is not None:
            found.append(_Swap(module, cls, rewritten))
    return found


def _spec(entry: Any) -> Any:
    """The spec of a cache; a rewritten `make_cache` returns specs by itself."""
    if type(entry) is own_caches.KVCache:
        return specs.KVCache()
    if type(entry) is own_caches.RotatingKVCache:
        return specs.RotatingKVCache(entry.max_size, entry.keep)
    if type(entry) is own_caches.ChunkedKVCache:
        return specs.ChunkedKVCache(entry.chunk_size)
    if type(entry) is own_caches.ConcatenateKVCache:
        return specs.ConcatenateKVCache()
    if type(entry) is own_caches.ArraysCache:
        return specs.ArraysCache(len(entry.cache))
    if type(entry) is own_caches.CacheList:
        return specs.CacheList(*map(_spec, entry.caches))
    return entry


def state_places(language: Any, manifest: Manifest | None) -> list[tuple[Any, tuple[str, ...]]]:
    """Modules and the attributes that a forward pass leaves on them; the language model first.

    Of the language model itself everything that is no module counts: larger models write there too.
    """
    state: Mapping[str, list[str]] = {}
    if manifest is not None and manifest.contract is not None:
        state = manifest.contract["state"]
    own = [name for name, value in language.items() if not _holds_modules(value)]
    own += [name for name in vars(language) if name not in ("_no_grad", "_training")]
    places: list[tuple[Any, tuple[str, ...]]] = []
    for module in language.modules():
        names = set(own) if module is language else set()
        for cls in type(module).__mro__:
            names |= set(state.get(f"{cls.__module__}.{cls.__qualname__}", ()))
        if module is language:
            places.insert(0, (module, tuple(sorted(names))))
        elif names:
            places.append((module, tuple(sorted(names))))
    return places


def own(value: Any) -> Any:
    """A copy of a container that others may add to; everything else as it is."""
    return value.copy() if type(value) in (list, dict, set) else value


def _holds_modules(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return True
    if isinstance(value, list | tuple):
        return any(_holds_modules(part) for part in value)
    return isinstance(value, dict) and any(_holds_modules(part) for part in value.values())


def triples(prepared: Prepared) -> np.ndarray:
    """Positions of a prompt that has any, [3, R]."""
    assert prepared.positions is not None
    return prepared.positions.T if prepared.axis else prepared.positions


def _in_order(entry: Any, length: int, count: int) -> tuple[mx.array, mx.array]:
    """The last `count` keys and values of a cache of `length` positions, rows [count, H, 1, D]."""
    keys, values = entry.keys, entry.values
    if hasattr(entry, "_temporal_order"):
        keys, values = entry._temporal_order(keys), entry._temporal_order(values)
    keys, values = keys[..., :length, :], values[..., :length, :]
    if keys.shape[0] != 1 or keys.shape[2] < count:
        raise RuntimeRefusal(f"a cache of {keys.shape[2]} positions lacks some of {count}")
    keys, values = (rows[..., -count:, :].transpose(2, 1, 0, 3) for rows in (keys, values))
    return keys, values
