"""State slots: what mixers with a recurrent state get, keep and share."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import StopSequences
from mlx_lm.models.cache import make_prompt_cache
from mlxrewrite.runtime import per_length, row_runs, row_states
from mlxrewrite.runtime.cache import PagedCache
from mlxrewrite.runtime.compare import compare, original_logits, rewritten_logits
from mlxrewrite.runtime.engine import Engine, Request
from mlxrewrite.runtime.errors import RuntimeRefusal
from mlxrewrite.runtime.extract import extract, restore
from mlxrewrite.runtime.memory import footprint
from mlxrewrite.runtime.schedule import random_schedule
from mlxrewrite.runtime.scheduler import Job
from mlxrewrite.runtime.states import StateTable
from mlxrewrite.runtime.store import PagedStore
from mlxrewrite.runtime.verify import _models, _read

CONFIGS = Path(__file__).parent / "configs"
LENGTHS = ((9, 5), (1, 9), (8, 4), (6, 6), (2, 7), (11, 2), (3, 3), (5, 5))


def models(name: str):
    _, config, _ = _read(CONFIGS / f"{name}.json")
    return _models(config, None, 0, None, None)[:2]


def run(name: str, seed: int = 1):
    original, rewritten = models(name)
    schedule = random_schedule(seed, LENGTHS, 60, 7)
    cache = PagedCache(rewritten, 4, num_blocks=60, poison=True)
    theirs = original_logits(original, schedule, "same")
    return compare(theirs, rewritten_logits(cache, schedule))


# ------------------------------------------------------------------------------------- tables


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_table_is_a_dictionary(data):
    """Any order of joins, leaves, snapshots and steps: every sequence finds its own state."""
    table, known, snapshots, names = StateTable(2), {}, {}, 0
    for step in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["step", "step", "step", "free", "snapshot", "adopt"]))
        held = sorted(known)
        if action == "free" and held:
            gone = data.draw(st.sampled_from(held))
            table.free(gone)
            del known[gone]
        elif action == "snapshot" and held:
            name = data.draw(st.sampled_from(held))
            snapshots[step] = (table.snapshot(name), known[name])
        elif action == "adopt" and snapshots:
            states, value = snapshots[data.draw(st.sampled_from(sorted(snapshots)))]
            table.restore(names, states)
            known[names] = value
            names += 1
        else:
            old = tuple(data.draw(st.permutations(held))[: data.draw(st.integers(0, len(held)))])
            new = tuple(range(names, names + data.draw(st.integers(0, 2))))
            names += len(new)
            for group in (old, new):
                if not group:
                    continue
                before = table.read(0, group)
                assert (before is None) == (group is new)
                if before is not None:
                    assert before.tolist() == [[known[name]] for name in group]
                values = [1000.0 * step + name for name in group]
                table.write(0, group, mx.array(values)[:, None])
                known.update(zip(group, values, strict=True))
    for name, value in known.items():
        assert table.read(0, (name,)).tolist() == [[value]]
        assert table.holds(name) == ((1,), None)
    assert len(list(table.arrays())) <= max(1, len(known))


def test_rows_stay_where_they_are_while_the_batch_does():
    table, states = StateTable(1), mx.arange(6).reshape(3, 2)
    table.write(0, (4, 7, 5), states)
    assert table.read(0, (4, 7, 5)) is states
    table.write(0, (4, 7, 5), states + 1)
    assert table.read(0, (7,)).tolist() == [[3, 4]]


def test_a_sequence_that_waits_does_not_keep_the_batch_in_memory():
    table = StateTable(1)
    table.write(0, tuple(range(8)), mx.zeros((8, 100)))
    table.write(0, tuple(range(7)), mx.ones((7, 100)))
    assert sorted(array.shape[0] for array in table.arrays()) == [1, 7]


def test_states_of_the_wrong_number_are_refused():
    table = StateTable(1)
    with pytest.raises(TypeError, match="one row for each sequence"):
        table.write(0, (1, 2), mx.zeros((3, 4)))
    table.write(0, (1,), mx.zeros((1, 4)))
    with pytest.raises(RuntimeError, match="with and without"):
        table.read(0, (1, 2))


# ------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["qwen3_next", "rwkv7", "longcat_flash_ngram"])
def test_random_batches_agree(name):
    result = run(name)
    assert result.within(1e-4), result


def _another_sequence_s_slot(patch):
    plain = StateTable.read

    def read(self, index, sequences):
        found = plain(self, index, sequences)
        return found if found is None or len(sequences) < 2 else mx.roll(found, 1, axis=0)

    patch.setattr(StateTable, "read", read)


def _a_freed_slot_s_state_for_a_new_sequence(patch):
    """Slots are not reset: a new sequence begins with what another one left."""
    plain, left = StateTable.write, {}

    def write(self, index, sequences, states):
        plain(self, index, sequences, states)
        left[id(self), index] = states[:1]

    def holds(self, sequence):
        found = [slots.get(sequence) for slots in self._slots]
        shapes = [left.get((id(self), index)) for index in range(self.size)]
        pairs = zip(found, shapes, strict=True)
        arrays = [a if slot is None else slot.rows.states for slot, a in pairs]
        return tuple(None if a is None else a.shape[1:] for a in arrays)

    def read(self, index, sequences):
        for sequence in sequences:
            if sequence not in self._slots[index] and (id(self), index) in left:
                plain(self, index, (sequence,), left[id(self), index])
        return plain_read(self, index, sequences)

    def known(self, index, sequences):
        slots = self._slots[index]
        return tuple(s in slots or (id(self), index) in left for s in sequences)

    plain_read = StateTable.read
    patch.setattr(StateTable, "known", known)
    patch.setattr(StateTable, "write", write)
    patch.setattr(StateTable, "holds", holds)
    patch.setattr(StateTable, "read", read)


def _convolution_state_off_by_one(patch):
    plain = StateTable.write

    def write(self, index, sequences, states):
        plain(self, index, sequences, mx.roll(states, 1, axis=1) if index == 0 else states)

    patch.setattr(StateTable, "write", write)


def _results_in_the_order_of_groups(patch):
    plain = per_length.rows_of

    def rows_of(results, groups, total, method):
        whole = [replace(group, rows=None) for group in groups]
        found = [plain([r], (g,), total, method) for r, g in zip(results, whole, strict=True)]
        return mx.concatenate(found)

    patch.setattr(per_length, "rows_of", rows_of)


def _results_in_the_order_of_runs(patch):
    plain = row_runs.Runs.joined

    def joined(self, outputs):
        order = None if self.order is None else self.order[::-1]
        return plain(replace(self, order=order), outputs)

    patch.setattr(row_runs.Runs, "joined", joined)


def _windows_without_what_is_held(patch):
    plain = row_states.window_rows
    patch.setattr(
        row_states, "window_rows", lambda parts, begun, taps: plain(parts, begun, taps) * 0 + taps
    )


ON_ROWS, PER_LENGTH = "qwen3_next", "plamo2"


@pytest.mark.parametrize(
    ("bug", "name"),
    [
        *itertools.product(
            (
                _another_sequence_s_slot,
                _a_freed_slot_s_state_for_a_new_sequence,
                _convolution_state_off_by_one,
            ),
            (ON_ROWS, PER_LENGTH),
        ),
        (_results_in_the_order_of_groups, PER_LENGTH),
        (_results_in_the_order_of_runs, ON_ROWS),
        (_windows_without_what_is_held, ON_ROWS),
    ],
)
def test_seeded_bugs_are_seen(bug, name, monkeypatch):
    bug(monkeypatch)
    assert not run(name).within(1e-4)


@pytest.mark.parametrize(
    "name", ["qwen3_next", "recurrent_gemma", "jamba", "baichuan_m1", "rwkv7", "bailing_hybrid"]
)
def test_a_snapshot_goes_on_as_the_sequence_it_is_of(name):
    original, rewritten = models(name)
    prompt, ends = [5, 9, 3, 7, 1, 2, 8, 4], ([6, 3, 1], [9, 9, 2, 5])
    cache = PagedCache(rewritten, 4, num_blocks=60, poison=True)
    assert not cache.snapshots_suffice
    first = cache.add_sequence()
    cache.step({first: prompt})
    assert cache.snapshots_suffice
    snapshot = cache.snapshot(first)
    tables = [type(t)(list(t.blocks), t.dropped) for t in cache.tables(first)]
    assert snapshot.length == len(prompt) and snapshot.nbytes > 0
    adopted = cache.adopt(tables, len(prompt), snapshot)
    rows = {first: [], adopted: []}
    for step in range(3):
        tokens = {first: ends[0][step : step + 1], adopted: ends[1][step : step + 1]}
        logits = np.array(cache.step(tokens))
        for place, sequence in enumerate(rows):
            rows[sequence].append(logits[place])
    cache.free(first)
    rows[adopted].append(np.array(cache.step({adopted: ends[1][3:]}))[0])
    for sequence, end in zip(rows, ends, strict=True):
        whole = np.array(original(mx.array([prompt + end]))[0, len(prompt) :])
        assert np.abs(whole - np.stack(rows[sequence])).max() < 1e-4 * whole.std()


def test_a_snapshot_of_another_length_is_refused():
    _, rewritten = models("rwkv7")
    cache = PagedCache(rewritten, 4, num_blocks=8)
    sequence = cache.add_sequence()
    with pytest.raises(RuntimeRefusal, match="keeps its own"):
        cache.snapshot(sequence)
    cache.step({sequence: [1, 2, 3]})
    with pytest.raises(RuntimeRefusal, match="after 3 positions"):
        cache.adopt(cache.tables(sequence), 2, cache.snapshot(sequence))


@pytest.mark.parametrize("name", ["qwen3_next", "rwkv7", "falcon_h1", "mamba", "baichuan_m1"])
def test_prompt_caches_go_in_and_out(name):
    """States begin where mlx_lm's caches end, and mlx_lm goes on where they end."""
    original, rewritten = models(name)
    prompt, middle, end = [5, 9, 3, 7, 1], [2, 8, 4], [6, 6]
    whole = np.array(original(mx.array([prompt + middle + end]))[0])
    caches = make_prompt_cache(original)
    mx.eval(original(mx.array([prompt]), cache=caches))
    known = footprint(rewritten, 4)
    assert known.states and known.state_bytes > 0
    cache = PagedCache(rewritten, 4, num_blocks=8)
    sequence = restore(cache, known, caches, len(prompt))
    ours = np.array(cache.step({sequence: middle}, logit_rows="all"))
    theirs = np.array(original(mx.array([end]), cache=extract(cache, sequence))[0])
    got, start = np.concatenate([ours, theirs]), len(prompt)
    assert np.abs(got - whole[start:]).max() < 1e-4 * whole.std()


@pytest.mark.parametrize(
    "name",
    ["qwen3_next", "mamba2", "recurrent_gemma", "jamba", "baichuan_m1", "rwkv7", "bailing_hybrid"],
)
def test_equal_beginnings_are_read_once(name):
    """Prompts that begin alike share blocks and a snapshot of the states; answers stay the same."""
    original, rewritten = models(name)
    shared = [(7 * i) % 50 + 3 for i in range(22)]
    prompts = [[*shared, *end] for end in ([5], [9, 4], [4, 4, 8, 1, 2, 3], [])]
    engine = Engine(rewritten, block_size=4, max_rows=9, max_running=4)
    for prompt in prompts:
        name = engine.add(Request(prompt, 6))
        caches, wanted, new = make_prompt_cache(original), [], prompt
        for _ in range(6):
            logits = original(mx.array([new]), cache=caches)
            new = [int(logits[0, -1].argmax())]
            wanted += new
        assert engine.run() == {name: wanted}
    assert engine._store is not None and engine._store.stats.reused == 20 + 20 + 20


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "baichuan_m1", "rwkv7"])
def test_the_next_turn_goes_on_from_the_answer(name, overlap):
    """What was generated is not read again, wherever in a block it ended; also by two at once."""
    original, rewritten = models(name)
    engine = Engine(rewritten, block_size=4, max_rows=9, max_running=4)
    engine._overlap = overlap  # as on devices whose kernels write in place
    for first in (9, 11, 3):
        tokens = [(5 * i + first) % 50 + 3 for i in range(first)]
        for turn, new in enumerate([[], [9, 4], [8]]):
            known = len(tokens) - 1  # the last one was sampled and not read
            tokens += new
            before = 0 if engine._store is None else engine._store.stats.reused
            prompts = [tokens, [*tokens, 7]][: 1 + (turn == 2)]
            asked = [engine.add(Request(prompt, 6)) for prompt in prompts]
            found = engine.run()
            for request, prompt in zip(asked, prompts, strict=True):
                assert found[request] == greedy(original, prompt, 6)
            if turn:
                assert engine._store.stats.reused - before == known * len(prompts)
            tokens += found[asked[0]]


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2"])
def test_a_turn_that_differs_does_not_go_on_from_the_answer(name):
    original, rewritten = models(name)
    engine = Engine(rewritten, block_size=4, max_rows=9, max_running=4)
    prompt = [5, 9, 3, 7, 1, 2]
    engine.add(Request([1, 2, 3], 2))  # from then on it is known what blocks and states hold
    engine.run()
    engine.add(Request(prompt, 6))
    (answer,) = engine.run().values()
    other = [*prompt, *answer[:4], (answer[4] + 1) % 90, 3]
    request = engine.add(Request(other, 1))
    assert engine.run() == {request: greedy(original, other, 1)}
    assert engine._store.stats.reused == 4  # a whole block of the prompt


@pytest.mark.parametrize("overlap", [True, False])
def test_the_turn_after_a_token_that_ends_the_text(overlap):
    """A step with that token may be under way when it is seen: then the states have it too."""
    original, rewritten = models("qwen3_next")
    engine = Engine(rewritten, block_size=4, max_rows=9, max_running=4)
    engine._overlap = overlap
    engine.add(Request([1, 2, 3], 2))
    engine.run()
    for prompt in ([5, 9, 3, 7, 1], [8, 8, 2, 6, 4, 4]):
        wanted = greedy(original, prompt, 8)
        end = next(i for i in range(1, 8) if wanted[i] not in wanted[:i])
        engine.add(Request(prompt, 20, stop=StopSequences([[wanted[end]]])))
        (answer,) = engine.run().values()
        assert answer == wanted[: end + 1]
        before, turn = engine._store.stats.reused, [*prompt, *answer, 9, 4]
        request = engine.add(Request(turn, 4))
        assert engine.run() == {request: greedy(original, turn, 4)}
        assert engine._store.stats.reused - before >= len(prompt) + len(answer) - 1


def greedy(original, prompt: list[int], count: int) -> list[int]:
    caches, found, rest = make_prompt_cache(original), [], prompt
    for _ in range(count):
        rest = [int(original(mx.array([rest]), cache=caches)[0, -1].argmax())]
        found += rest
    return found


def test_snapshots_give_way_when_there_is_no_memory():
    _, rewritten = models("qwen3_next")
    cache = PagedCache(rewritten, 4, num_blocks=40)
    size = footprint(rewritten, 4).state_bytes
    for room, left in ((0, 0), (size, 1), (2 * size, 2), (20 * size, 3)):
        store = PagedStore(cache, snapshot_bytes=room)
        job = Job(list(range(12)), 20)
        sequence, _ = store.admit(job, 0)
        for start in (0, 4, 8):
            cache.step({sequence: job.tokens[start : start + 4]})
            store.name(sequence, job.tokens, start + 4)
        assert len(store._snapshots) == left
        store.free(sequence)
