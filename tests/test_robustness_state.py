"""A model that runs whole keeps nothing outside its caches; what does is refused with a place."""

from __future__ import annotations

import pytest
from compiling import EXAMPLES, compile_text

# The runtime has no spec for this class of cache, so the model runs whole, once per sequence.
WHOLE = (
    (EXAMPLES / "gqa.py")
    .read_text()
    .replace(
        "    @property\n    def layers",
        "    def make_cache(self):\n        return [Own() for _ in self.layers]\n\n"
        "    @property\n    def layers",
    )
    + "\n\nclass Own:\n    offset = 0\n\n    def update_and_fetch(self, k, v):\n"
    "        self.kept = (k, v)\n        return k, v\n"
)
HEAD = "        q = self.q_proj(x)"
assert WHOLE.count(HEAD) == 1

KEEPS = {
    "attribute": "self.last = x",
    "attribute of a part": "self.rope.last = x",
    "counter": "self.calls = getattr(self, 'calls', 0) + 1",
    "counter that is clipped": "self.n = mx.clip(self.n + 1, 0, 1000)",
    "counter of another type": "self.n = (self.n + 1).astype(mx.int32)",
    "clipped by itself": "self.n = mx.clip(self.n, self.n + 1, 1000)",
    "counter in place": "self.calls += 1",
    "flag": "self.seen = True",
    "flag that decides": "if not hasattr(self, 'w'):\n            self.w = self.scale\n"
    "            x = 2 * x",
    "item": "self.table['x'] = x",
    "list": "self.seen.append(x)",
    "alias of self": "me = self\n        me.last = x",
    "alias of a part": "table = self.table\n        table['x'] = x",
    "global name": "global LAST\n        LAST = x",
    "global container": "SEEN[0] += 1",
    "global list": "SEEN.append(x)",
    "alias of a global": "seen = SEEN\n        seen[0] = x",
    "class attribute": "Attention.last = x",
    "class of self": "type(self).last = x",
    "module dictionary": "globals()['LAST'] = x",
    "setattr": "setattr(self, 'last', x)",
    "dictionary of self": "self.__dict__['last'] = x",
    "iterator": "x = x * next(COUNT)",
    "walk of targets": "a, self.last = x, x",
    "loop target": "for self.last in (1, 2):\n            pass",
    "nested function": "def keep():\n            self.last = x\n        keep()",
    "deletion": "del self.last",
}
FINE = {
    "nothing": "pass",
    "local": "last = x",
    "local list": "seen = []\n        seen.append(x)\n        seen[0] = x",
    "item of an array": "x[0] = 0",
    "of the cache": "cache.last = x",
    "weights, computed once": "self.w = self.scale * 2",
    "weights, computed once if missing": "if self.w is None:\n            self.w = self.scale * 2",
    "weights, clipped": "self.w = mx.clip(self.w, -1, 1)",
    "weights of another type": "self.p.w = self.p.w.astype(mx.float32)",
    "weights of another type, clipped": "self.p.w = self.p.w.astype(mx.float32)\n"
    "        if self.most is not None:\n"
    "            self.p.w = mx.clip(self.p.w, -self.most, self.most)",
    "comprehension": "seen = {i: x for i in range(2)}\n        seen[3] = x",
    "walrus": "y = [z := x]\n        z[0] = 0",
}
GLOBALS = "SEEN = [0]\nLAST = None\nCOUNT = iter(range(100))\n\n\n@dataclass"


def compiled(tmp_path, line: str):
    text = WHOLE.replace(HEAD, f"        {line}\n{HEAD}").replace("@dataclass", GLOBALS, 1)
    result = compile_text(tmp_path, text)
    assert not result.errors, result.errors
    return result.emitted


@pytest.mark.parametrize("what", sorted(KEEPS))
def test_state_outside_caches_is_refused(tmp_path, what):
    emitted = compiled(tmp_path, KEEPS[what])
    assert emitted.plan.route == "refused" and emitted.code is None
    told = [d for refusal in emitted.plan.refusals for d in refusal.diagnostics]
    kept = [d for d in told if d.slug == "state-on-self"]
    assert kept and all(d.act == "source" and d.place is not None for d in kept)


@pytest.mark.parametrize("what", sorted(FINE))
def test_what_stays_in_the_call_or_the_cache_is_not(tmp_path, what):
    assert compiled(tmp_path, FINE[what]).plan.route == "model"


def test_closures_and_default_arguments(tmp_path):
    for text in (
        "def wrap(f):\n    seen = {}\n    def g(self, *a):\n        seen[0] = a\n"
        "        return f(self, *a)\n    return g\n\n\n",
        "def wrap(f, seen=[]):\n    seen.append(f)\n    return f\n\n\n",
    ):
        changed = WHOLE.replace("class MLP", f"{text}class MLP", 1)
        changed = changed.replace(
            "    def __call__(self, x: mx.array) ->",
            "    @wrap\n    def __call__(self, x: mx.array) ->",
        )
        emitted = compile_text(tmp_path, changed).emitted
        assert emitted is not None and emitted.plan.route == "refused"


RESTORE = """
    def restore(self):
        for name, value in self.q_proj.parameters().items():
            if name not in self:
                setattr(self, name, value)

"""
STORE = "setattr(self, name, value)"
RESTORED = {  # how: what of the method, put how instead, a line of the forward method, route
    "by a loader": ("", "", "pass", "model"),
    "by the forward method": ("", "", "self.restore()", "refused"),
    "of something given": ("(self)", "(self, more)", "pass", "refused"),
    "without a test": ("if name not in self", "if True", "pass", "refused"),
    "of another object": (STORE, "setattr(self, name, LAST)", "pass", "refused"),
    "under another name": (STORE, "setattr(self, 'last', value)", "pass", "refused"),
    "with something more": (STORE, f"{STORE}; self.last = name", "pass", "refused"),
    "of what it is told": (".parameters()", ".told()", "pass", "refused"),
}


@pytest.mark.parametrize("how", sorted(RESTORED))
def test_weights_that_a_loader_puts_back_hold_nothing_of_a_sequence(tmp_path, how):
    old, new, line, route = RESTORED[how]
    method = RESTORE.replace(old, new) if old else RESTORE
    assert (method != RESTORE) == bool(old)
    start = "class Attention(nn.Module):\n"
    text = WHOLE.replace(HEAD, f"        {line}\n{HEAD}").replace("@dataclass", GLOBALS, 1)
    assert text.count(start) == 1
    emitted = compile_text(tmp_path, text.replace(start, start + method)).emitted
    assert emitted is not None and emitted.plan.route == route
