"""Mutants of mlx_lm's files are kept right or refused: a sample, and every miss ever found."""

from __future__ import annotations

import subprocess
import sys
import types
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from mutation.corpus import Mutant, config_names, config_of, mutants, sample, stratified
from mutation.judge import (
    BUG,
    INVALID,
    KEPT,
    LOUD,
    MODEL,
    REFUSED,
    SILENT,
    TOLERANCE,
    UNSTEADY,
    Judge,
    Verdict,
)
from mutation.operators import all_operators
from mutation.report import Row, summary
from mutation.running import Died, Job, rows_of
from mutation.source import File
from mutation.worlds import Library, Rewritten
from uncompiled import without_compile  # noqa: F401 - for all tests here

# One file of each structure: plain, handwritten softmax, latent, windows, packed, states, experts.
FILES = (
    "llama", "gemma2", "deepseek_v3", "cohere2", "gpt2", "mamba2", "qwen3_next", "mixtral",
    "stablelm", "lfm2", "gpt_oss", "minicpm3", "starcoder2", "gemma3_text", "plamo", "olmoe",
    "rwkv7", "phi3", "llama4_text", "nanochat",
)  # fmt: skip
EACH = 5
# Files that are judged quickly, for the sample of a hundred that every run of the suite judges.
QUICK = (
    "llama", "gemma2", "deepseek_v3", "cohere2", "gpt2", "mamba2", "mixtral", "stablelm", "lfm2",
    "minicpm3", "starcoder2", "plamo", "phi3", "llama4_text", "nanochat", "mamba", "gpt_bigcode",
    "recurrent_gemma", "dbrx", "olmo3",
)  # fmt: skip


@cache
def library() -> Library:
    sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    return Library()


@cache
def judge(config: str) -> Judge:
    name = config.split("@", maxsplit=1)[0]
    return Judge(library(), name, config_of(config))


def verdicts(config: str, operator: str) -> list[Verdict]:
    """What becomes of each mutant of a file by an operator."""
    file = File(config.split("@", maxsplit=1)[0], library().text(config.split("@", maxsplit=1)[0]))
    found = [
        judge(config).of(mutant.texts(file)) for mutant in mutants(library(), config, (operator,))
    ]
    assert found, f"{operator} changes nothing in {config}"
    return found


def judged(config: str, count: int, seed: int) -> list[Row]:
    name = config.split("@", maxsplit=1)[0]
    file = File(name, library().text(name))
    chosen = sample(library(), config, count, seed)
    return [Row.of(mutant, judge(config).of(mutant.texts(file)), file) for mutant in chosen]


def holds(rows: list[Row]) -> None:
    wrong = [row.text() for row in rows if row.outcome in (SILENT, BUG)]
    assert not wrong, "\n\n".join(wrong)
    assert any(row.outcome != INVALID for row in rows), summary(rows)


def test_there_are_enough_operators():
    assert len(all_operators()) >= 40
    assert len({operator.family for operator in all_operators().values()}) >= 8


@cache
def hundred() -> dict[str, list[Mutant]]:
    return stratified(library(), QUICK, 5, seed=13)


@cache
def hundred_of(config: str) -> list[Row]:
    file = File(config, library().text(config))
    return [Row.of(m, judge(config).of(m.texts(file)), file) for m in hundred()[config]]


@pytest.mark.parametrize("config", QUICK)
def test_a_hundred(config):
    wrong = [row.text() for row in hundred_of(config) if row.outcome in (SILENT, BUG)]
    assert not wrong, "\n\n".join(wrong)


def test_a_hundred_are_of_every_family_and_mean_something():
    rows = [row for config in QUICK for row in hundred_of(config)]
    known = all_operators()
    counts = Counter(known[row.operator].family for row in rows if row.outcome != INVALID)
    assert len({row.operator for row in rows}) == len(rows) == 100
    assert counts.keys() == {operator.family for operator in known.values()}
    outcomes = Counter(row.outcome for row in rows)
    assert outcomes[INVALID] <= 25, summary(rows)
    assert min(outcomes[KEPT], outcomes[MODEL]) >= 10, summary(rows)


@pytest.mark.slow
@pytest.mark.parametrize("config", FILES)
def test_sample(config):
    holds(judged(config, EACH, seed=11))


@pytest.mark.slow
@pytest.mark.parametrize("config", [c for c in config_names() if c not in FILES][::4])
def test_more(config):
    holds(judged(config, 6, seed=12))


def test_an_unchanged_file_is_kept():
    name = "llama"
    assert judge(name).of({name: library().text(name)}).outcome == KEPT


def test_the_judge_sees_a_difference(monkeypatch):
    """The judge can fail: a rewritten model with another scale is told apart."""
    name = "llama"
    text = library().text(name)
    right = Judge._rewritten

    def wrong(self, rewritten, weights):
        everything, last = right(self, rewritten, weights)
        everything[0][-1, 0] += 0.01
        return everything, last

    monkeypatch.setattr(Judge, "_rewritten", wrong)
    assert judge(name).of({name: text}).outcome == SILENT


# ------------------------------------------------------------------ misses, each found by a run


def never_wrong(config: str, operator: str, *outcomes: str) -> None:
    """Every mutant of the file by the operator has one of the outcomes."""
    for verdict in verdicts(config, operator):
        assert verdict.outcome in (*outcomes, INVALID), verdict


@pytest.mark.parametrize("operator", ["values-cast", "keys-cast-brain", "everything-cast"])
def test_a_cast_to_fewer_bits_is_not_dropped(operator):
    never_wrong("llama", operator, MODEL)


@pytest.mark.parametrize("operator", ["mask-without-cache", "caches-none"])
def test_a_mask_without_a_cache_has_no_window(operator):
    never_wrong("gemma3_text", operator, KEPT, LOUD, MODEL)


def test_a_callee_bound_elsewhere_is_replaced_where_it_is_called():
    never_wrong("llama", "import-inside", KEPT)
    never_wrong("gpt2", "import-inside", KEPT)


def test_a_position_read_behind_the_fetch_is_refused():
    never_wrong("llama", "rope-query-after-fetch", MODEL)


def test_classes_changed_at_import_are_not_as_they_are_written():
    never_wrong("llama", "patched-setattr", MODEL, REFUSED)
    never_wrong("llama", "patched-forward-mixing", MODEL, REFUSED)


@pytest.mark.parametrize("operator", ["state-on-self-plain", "module-global"])
def test_state_outside_caches_runs_in_no_route(operator):
    never_wrong("llama", operator, REFUSED)


def test_a_loop_that_ends_with_the_length_of_a_chunk_is_refused():
    never_wrong("llama", "layers-early-exit", MODEL)


def test_one_cache_for_all_layers_is_refused():
    never_wrong("stablelm", "make-cache-one", LOUD, MODEL)


def test_a_method_defined_twice_is_refused():
    never_wrong("exaone", "overridden-twice", REFUSED)


def test_a_first_call_that_differs_is_refused():
    never_wrong("cohere2", "counter-on-self-used-once", REFUSED)


def test_a_mask_that_a_false_test_leaves_out_is_not_applied():
    never_wrong("gemma2", "slip-test-false", KEPT, MODEL)


def test_a_mixer_that_picks_a_sequence_of_the_batch_runs_alone():
    file = File("gear", library().text("gear"))
    found = [m for m in mutants(library(), "gear", ("batch-last-index",)) if m.number == 9]
    assert judge("gear").of(found[0].texts(file)).outcome == KEPT


def test_what_one_rounding_of_a_weight_does_is_no_difference():
    never_wrong("bailing_moe_linear", "residual-multiplied", KEPT, UNSTEADY)


def test_a_decorator_inside_a_mixer_may_join_sequences():
    never_wrong("qwen3_next", "decorator-batch", KEPT, MODEL, REFUSED)


def test_the_name_of_a_caches_class_is_not_asked():
    never_wrong("starcoder2", "read-isinstance-before", MODEL, REFUSED)


def test_a_norm_without_an_axis_joins_sequences():
    file = File("rwkv7", library().text("rwkv7"))
    found = [m for m in mutants(library(), "rwkv7", ("slip-keyword",)) if m.number == 2]
    assert judge("rwkv7").of(found[0].texts(file)).outcome in (KEPT, MODEL, LOUD)


def test_a_mask_wider_than_its_cache_is_told():
    """In a chunk upstream's rows then see more than one at a time: there is no right answer."""
    never_wrong("cohere2", "mask-window-changed", KEPT, LOUD, MODEL)


def test_a_cache_of_chunks_that_nobody_trims_is_refused():
    """Without `maybe_trim_front` upstream's cache of chunks keeps everything."""
    never_wrong("hunyuan", "make-cache-chunked", LOUD, MODEL, REFUSED)


def test_a_decorator_that_counts_calls_inside_a_mixer_is_refused():
    never_wrong("mamba2", "decorator-cached", REFUSED, LOUD)


def test_a_mask_without_a_window_for_a_cache_with_one_is_refused():
    """One mask for all layers, of which some keep a window only."""
    never_wrong("nanochat", "make-cache-rotating-some", LOUD, MODEL, REFUSED)


def test_a_count_of_calls_in_a_part_of_a_mixer_is_refused():
    """The mixer runs as it is, once per sequence; what it is made of counts the calls of all."""
    never_wrong("rwkv7", "subclass-counting", MODEL, REFUSED, LOUD)


@pytest.mark.parametrize(
    "operator", ["fetch-getattr", "fetch-indexed", "fetch-list", "fetch-starred"]
)
def test_a_fetch_spelled_otherwise_is_kept(operator):
    never_wrong("llama", operator, KEPT)


def test_a_pair_taken_apart_the_wrong_way_is_told():
    never_wrong("llama", "fetch-indexed-swapped", LOUD, MODEL, REFUSED)


def test_keys_read_by_getattr_are_read():
    never_wrong("llama", "read-getattr", MODEL, REFUSED, LOUD)


@pytest.mark.parametrize(
    ("groups", "outcome"),
    [("config.num_attention_heads // config.num_key_value_heads", KEPT), ("1", LOUD)],
)
def test_sinks_go_with_their_heads(groups, outcome):
    """Tiled keys are read by queries in another order, and so are the sinks; keys tiled to fewer
    heads than the queries have are read in a third order, and told."""
    file = File("gpt_oss", library().text("gpt_oss"))
    (tiled,) = mutants(library(), "gpt_oss", ("keys-tiled",))
    text = tiled.texts(file)["gpt_oss"]
    for name in "kv":
        text = text.replace(f"q.shape[1] // {name}.shape[1]", "self.groups")
    sinks = "        self.sinks ="
    text = text.replace(sinks, f"        self.groups = {groups}\n{sinks}")
    assert text.count("self.groups") == 3
    assert judge("gpt_oss").of({"gpt_oss": text}).outcome == outcome


def test_an_embedding_read_past_its_end_is_no_reference():
    """Token ids are added up: what lies behind the table is nobody's logits."""
    verdict = verdicts("baichuan_m1", "subclass-last")[-1]
    assert verdict.outcome == INVALID
    assert "embedding" in verdict.reason


def test_a_small_difference_that_is_none_of_rounding_is_told(monkeypatch):
    """Less than ten times the tolerance, in one row of a model that rounding does not move."""
    name = "llama"
    right = Judge._rewritten

    def wrong(self, rewritten, weights):
        everything, last = right(self, rewritten, weights)
        everything[0][-1, 0] += 2 * TOLERANCE * everything[0].std()
        return everything, last

    monkeypatch.setattr(Judge, "_rewritten", wrong)
    assert judge(name).of({name: library().text(name)}).outcome == SILENT


def test_a_row_that_rounding_does_not_move_is_not_excused_by_others(monkeypatch):
    """The first row of a model whose later rows rounding moves by more than it is changed."""
    name = "bailing_moe_linear"
    right = Judge._rewritten

    def wrong(self, rewritten, weights):
        everything, last = right(self, rewritten, weights)
        everything[0][0, 0] += 1.6 * TOLERANCE * everything[0].std()
        return everything, last

    monkeypatch.setattr(Judge, "_rewritten", wrong)
    file = File(name, library().text(name))
    (changed,) = mutants(library(), name, ("residual-multiplied",), 1)
    assert judge(name).of(changed.texts(file)).outcome == SILENT


def test_a_few_processes_judge_as_one_does():
    """Each gets its mutants and hands back its rows; none waits for ever."""
    words = ["stablelm", "starcoder2", "--operator", "mask-none", "--jobs", "2"]
    run = [sys.executable, "-m", "tests.mutation", *words]
    root = Path(__file__).parent.parent
    done = subprocess.run(run, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 mutants of 2 files" in done.stdout


def test_a_process_that_dies_is_told():
    """A job whose config has no file: its process raises, and so does the run."""
    jobs = [Job("no-such-config", (), 1, 0, 1), Job("no-such-file", (), 1, 0, 1)]
    with pytest.raises(Died, match="no-such"):
        list(rows_of(jobs, 2))


def test_an_element_of_another_sequence_is_not_taken():
    """A helper of a mixer that reads the first entry of all sequences' rows together."""
    file = File("kimi_linear", library().text("kimi_linear"))
    found = list(mutants(library(), "kimi_linear", ("tokens-flat-index",)))
    for mutant in (m for m in found if m.number in (5, 7)):
        assert judge("kimi_linear").of(mutant.texts(file)).outcome in (KEPT, MODEL), mutant.where


def changed(name: str, *pairs: tuple[str, str]) -> Verdict:
    """What becomes of a file in which each first text stands as the second."""
    text = library().text(name)
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new, 1)
    return judge(name).of({name: text})


def test_positions_of_caches_that_no_layer_writes_stay_where_they_are():
    """Blocks return before their attention: the original's positions are those of an empty cache,
    whatever came before."""
    never_wrong("gpt2", "early-return", MODEL)


_GPT2 = """\
        for layer, c in zip(self.h, cache):
            hidden_states = layer(hidden_states, mask, cache=c)
"""
_GPT2_BUT = """\
        for i, (layer, c) in enumerate(zip(self.h, cache)):
            if i == {}:
                {}
            hidden_states = layer(hidden_states, mask, cache=c)
"""


@pytest.mark.parametrize(
    ("layer", "way", "outcome"),
    [(0, "continue", LOUD), (0, "break", LOUD), (1, "continue", KEPT), (1, "break", KEPT)],
)
def test_a_layer_that_is_left_out_keeps_its_positions(layer, way, outcome):
    """The first layer's cache tells the positions; the others may have any."""
    verdict = changed("gpt2", (_GPT2, _GPT2_BUT.format(layer, way)))
    assert verdict.outcome == outcome, verdict
    assert outcome == KEPT or "cache entry 0" in verdict.reason


def test_a_mixer_that_returns_early_by_its_config_keeps_its_positions():
    """Which way a config goes is not known when the file is compiled: the run tells."""
    start = "        B, L, D = x.shape\n"
    leaves = "        if self.n_embd == 64:\n            return x\n"
    verdict = changed("gpt2", (start, start + leaves))
    assert verdict.outcome == LOUD, verdict
    assert "cache entry 0" in verdict.reason


def test_positions_read_behind_the_layers_are_not_those_before():
    """The original's cache counts this chunk by then."""
    late = """\
        offset = mx.array(cache[0].offset)
        hidden_states = hidden_states + self.wpe(mx.arange(L) + offset[..., None])
"""
    verdict = changed("gpt2", (_GPT2, _GPT2 + late))
    assert verdict.outcome == MODEL, verdict
    within = _GPT2.replace("cache=c)", "cache=c)\n            offset = cache[0].offset")
    second = within + late.replace("mx.array(cache[0].offset)", "mx.array(offset)")
    verdict = changed("gpt2", (_GPT2, second))
    assert verdict.outcome in (MODEL, LOUD), verdict


def test_a_mixer_without_its_cache_is_refused():
    """Each piece of a prompt begins anew, in the original; rows alone would each begin anew."""
    never_wrong("mamba", "layer-cache-missing", MODEL)


_MAMBA = """\
        for layer, c in zip(self.layers, cache):
            x = layer(x, c)
"""


@pytest.mark.parametrize(
    ("given", "outcome"),
    [
        ("c if layer is self.layers[0] else None", LOUD),
        ("[None, None]", MODEL),
        ("ArraysCache(2)", MODEL),
        ("[c[0], c[1]]", LOUD),
        ("cache[0]", KEPT),
    ],
)
def test_what_stands_in_for_a_mixers_cache_is_it_or_told(given, outcome):
    verdict = changed("mamba", (_MAMBA, _MAMBA.replace("(x, c)", f"(x, {given})")))
    assert verdict.outcome == outcome, verdict


def test_a_cast_of_latents_is_no_difference_but_rounding():
    """Float32 differs in its last place from one way of computing to another; next to the border
    between two values of float16 that is a whole unit of float16, in the original as well."""
    never_wrong("deepseek_v3", "fetch-half", KEPT, UNSTEADY)


def test_a_cast_of_latents_that_is_dropped_is_told(monkeypatch):
    name = "deepseek_v3"
    file = File(name, library().text(name))
    (mutant,) = mutants(library(), name, ("fetch-half",))
    right = Judge._rewritten

    def wrong(self, rewritten, weights):
        return right(self, Rewritten(library(), name, {name: file.text}), weights)

    monkeypatch.setattr(Judge, "_rewritten", wrong)
    assert judge(name).of(mutant.texts(file)).outcome == SILENT


def test_a_wrapper_in_a_decorator_is_followed():
    """`functools.wraps(method)` names a name of the decorator's own call, and changes nothing."""
    never_wrong("phi3", "decorator-scaled", KEPT)
    never_wrong("phi3", "decorator-mixing", MODEL, REFUSED)


def test_what_ranks_features_is_no_selection_of_keys():
    """The largest of a token's own features are looked for behind the attention."""
    file = File("exaone4", library().text("exaone4"))
    first = next(m for m in mutants(library(), "exaone4", ("alone-top",)))
    assert judge("exaone4").of(first.texts(file)).outcome == KEPT


def test_a_softmax_along_another_axis_is_no_attention():
    never_wrong("gemma2", "slip-axis", KEPT, MODEL, LOUD, REFUSED)
