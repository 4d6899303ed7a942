"""Whether a mixer treats each sequence of an unpadded batch [N, L, ...] on its own.

Mixers of mlx_lm are written for batches, and what they do along the first axis is nothing, as a
rule. What would join sequences, or make Python depend on their values, is looked for here; a mixer
that has any of it runs once per sequence instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .axes.layers import ACTIVATIONS, LAYERS
from .axes.rules import ELEMENTWISE
from .edits import names_before
from .ir import Expr, For, Method, ModuleFacts, Value
from .match import CACHE_ATTRIBUTES, Mixer, callee_name, every_value
from .outliving import below
from .program import Program
from .softmax import number
from .states import Reach, appended_to

_REDUCTIONS = frozenset(
    {
        *("sum", "mean", "max", "min", "prod", "var", "std", "any", "all", "logsumexp", "softmax"),
        *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"),
        *("sort", "argsort", "argmax", "argmin", "argpartition", "partition", "topk"),
    }
)
_TO_PYTHON = frozenset({"item", "tolist"})
# Where the axes stand of what moves, joins or picks entries; without one it is the first, or all.
_MOVES = {
    **{f"mlx.core.{name}": 1 for name in ("concatenate", "stack", "expand_dims")},
    **{f"mlx.core.{name}": 2 for name in ("split", "roll", "repeat", "take", "take_along_axis")},
    **{
        "mlx.core.flatten": 1,
        "mlx.core.tile": 2,
        "mlx.core.put_along_axis": 3,
        "mlx.core.linalg.norm": 2,
    },
}
_TURNS = frozenset({"transpose", "swapaxes", "moveaxis"})
# Shared functions, read by many models.
_SHARED = ("mlx_lm.", "mlx_vlm.")
_LAYERS = frozenset(
    name for name, (rule, _) in LAYERS.items() if rule is not LAYERS["BatchNorm"][0]
)
# Each entry, or each row of the last axes, from the same one; windows along the middle axes.
_ALONE = frozenset(
    "zeros_like ones_like full_like contiguous stop_gradient arange array zeros ones full eye "
    "linspace default_device metal.is_available fast.rms_norm fast.layer_norm fast.rope conv1d "
    "conv2d conv_general matmul addmm quantized_matmul fast.scaled_dot_product_attention depends "
    "eval async_eval distributed.all_sum".split()
)
_ARRAY_ALONE = frozenset(
    "astype square sqrt rsqrt exp log log2 log10 log1p abs sin cos reciprocal round".split()
)
_ARRAY_METHODS = (
    _ARRAY_ALONE
    | _REDUCTIONS
    | _TURNS
    | frozenset("reshape view flatten unflatten squeeze expand_dims split".split())
)
_PYTHON_METHODS = frozenset("append extend is_integer get items".split())
_BUILTINS = frozenset(
    "range slice int float bool isinstance hasattr getattr print type str".split()
)
# These keep the axis that they go along.
_KEEPING = frozenset(
    "softmax cumsum cumprod cummax cummin logcumsumexp sort argsort argpartition partition "
    "topk".split()
)
_LAUNCHED = frozenset(("inputs", "grid", "threadgroup", "output_shapes", "output_dtypes"))
_LAUNCHING = ("grid", "threadgroup", "output_shapes")  # of a kernel
_CONTAINERS = ("tuple", "list", "comp", "dict")
_INSIDE = frozenset((*ELEMENTWISE, *ACTIVATIONS, "astype"))
# Which argument of the call is a shape.
_SHAPED = {"zeros": 1, "ones": 1, "full": 1, "reshape": 2, "broadcast_to": 2}
_DECORATING = (
    *("mlx.core", "functools", "builtins.property"),
    *("builtins.staticmethod", "builtins.classmethod"),
)


def joins_sequences(mixer: Mixer) -> Value | None:
    """A value, in what the class's forward may run, that depends on several sequences at once.

    The author's own code may do only what is known to leave sequences apart. Shared functions of
    mlx_lm and mlx_vlm are read for what is known to join them.
    """
    reach = Reach(mixer)
    files = [m for name, m in mixer.program.modules.items() if not name.startswith(_SHARED)]
    own = {
        id(method)
        for file in (mixer.program.modules[mixer.cls.module], *files)
        for method in file.methods()
    }
    calls = Calls(mixer.program, reach.methods)
    for method in reach.methods:
        values = calls.values[id(method)]
        called = (v for v in values if v.op == "call")
        joining = next((v for v in called if _joins(mixer, v) or _turns(mixer, v)), None)
        if joining is None and id(method) in own:
            home = _home(mixer, method)
            if _wrapped(home, method):
                joining = next(iter(values), None)
            given = len(method.params) > (_this(method) is not None)
            if joining is None and given:
                joining = Apart(mixer, reach, calls, method).broken()
        if joining is not None:
            return joining
    return None


def _home(mixer: Mixer, method: Method) -> ModuleFacts:
    """The file that a method or function stands in."""
    for file in mixer.program.modules.values():
        if any(method is known for known in file.methods()):
            return file
    return mixer.program.modules[mixer.cls.module]


class Apart:
    """One method: whether each value in it is made by what leaves sequences apart."""

    def __init__(self, mixer: Mixer, reach: Reach, calls: Calls, method: Method) -> None:
        self.mixer, self.reach, self.calls, self.method = mixer, reach, calls, method
        self.program = mixer.program
        self.values = calls.values[id(method)]
        self.this = _this(method)
        owner = self.program.class_of(method.owner) if method.owner is not None else None
        self.owner = owner or mixer.cls
        self.launches = {id(size) for value in self.values for size in _launch_sizes(value)}

    def broken(self) -> Value | None:
        """The first value that is not."""
        for value in self.values:
            if not self.apart(value):
                return value
        leaving = [e.value for e in self.method.effects if e.kind in ("return", "store", "augment")]
        return next((value for value in leaving if self.counted(value)), None)

    def apart(self, value: Value) -> bool:
        if id(value) not in self.launches and not self.counts_well(value):
            return False
        match value.op:
            case "call":
                return self.called(value)
            case "index" | "setitem":
                return self.picked(value)
            case "elem":
                return self.walked(value.args[0])
            case "attr" if value.data in ("T", "at", "mT", "real", "imag"):
                return self.of_mixer(value.args[0])
            case "attr" if value.data in ("size", "nbytes"):
                return self.of_mixer(value.args[0])
            case "closure":
                return not self.may_join(value)
            case "unknown":
                return False
        return True

    # ----------------------------------------------------------------- how many sequences

    def is_count(self, value: Value) -> bool:
        """The length of the first axis, or one that may be."""
        if not value.args or self.of_mixer(value.args[0].args[0] if value.args[0].args else value):
            return False
        if value.op == "item" and _is_shape_of(value.args[0]):
            return bool(value.data == 0)
        if value.op == "index" and _is_shape_of(value.args[0]) and value.args[1].op != "slice":
            got = number(value.args[1])
            return not isinstance(got, int) or got == 0 or got < -2
        return False

    def is_first(self, value: Value) -> bool:
        """The length of the first axis, of something of single sequences."""
        return self.is_count(value) and (
            value.data == 0 if value.op == "item" else number(value.args[1]) == 0
        )

    def is_shape(self, value: Value) -> bool:
        """A shape, or part of one, that the number of sequences stands in."""
        match value.op:
            case "attr":
                return _is_shape_of(value) and not self.of_mixer(value.args[0])
            case "index" if value.args[1].op == "slice" and self.is_shape(value.args[0]):
                return number(value.args[1].args[0]) in (None, 0)
            case "tuple" | "list" | "star":
                return any(map(self.counted, value.args))
            case "binary" if value.data == "+":
                return any(map(self.is_shape, value.args))
        return False

    def counted(self, value: Value) -> bool:
        return self.is_count(value) or self.is_shape(value)

    def counts_well(self, value: Value) -> bool:
        """Sizes of the first axis are used as such: first in a shape, and for nothing else."""
        counted = [i for i, part in enumerate(value.args) if self.counted(part)]
        if not counted:
            return True
        match value.op:
            case "tuple" | "list":
                return counted == [0]
            case "star":
                return True
            case "binary":
                return value.data == "+" and counted == [0] and self.is_shape(value.args[0])
            case "index" | "item":
                return counted == [0] and bool(value.args[0].data == "shape")
            case "compare":
                # Each is the number of sequences times something: equal for one if for any.
                firsts = all(map(self.is_first, value.args))
                return value.data in (("==",), ("!=",)) and firsts
            case "call":
                counted = [i for i in counted if value.data[i - 1] not in _LAUNCHING]
                place = self.shape_place(value)
                return not counted or (place is not None and counted == [place])
        return False

    def shape_place(self, call: Value) -> int | None:
        """Which argument of a call is a shape, or begins one."""
        name = callee_name(self.program, call)
        if name is not None:
            return _SHAPED.get(name.removeprefix("mlx.core."))
        callee = call.args[0]
        return 1 if callee.op == "attr" and callee.data in ("reshape", "view") else None

    # ----------------------------------------------------------------- calls

    def called(self, call: Value) -> bool:
        name = callee_name(self.program, call)
        written = name is not None and self.program.function_of(name) is not None
        if not written and set(call.data) >= _LAUNCHED:
            return True  # a launch of a custom kernel: what it does is taken on trust
        if name is not None:
            return self.named(call, name)
        callee = call.args[0]
        if callee.op == "phi":
            return all(self.known(option, call) for option in callee.args[1:])
        if callee.op == "param":
            return self.handed(callee)
        if callee.op == "call":
            inner = callee_name(self.program, callee) or ""
            return inner == "mlx.nn.layers.distributed.sum_gradients"
        if callee.op in ("index", "elem"):
            return self.layer_at(callee.args[0], self.method)
        return callee.op == "closure" or self.known(callee, call)

    def handed(self, parameter: Value) -> bool:
        """A parameter that is called: every call of the method hands a layer to it."""
        given = self.given(parameter, self.method)
        return bool(given) and all(self.layer_at(value, at) for value, at in given or ())

    def layer_at(self, value: Value, method: Method) -> bool:
        """`self.x`, where __init__ left layers."""
        if value.op == "phi":
            return all(self.layer_at(option, method) for option in value.args[1:])
        if value.op != "attr" or value.args[0] is not _this(method):
            return False
        made = self.left(value.data)
        return bool(made) and all(map(self.is_layer, made))

    def known(self, callee: Value, call: Value) -> bool:
        """A callee that is no global name: a layer or method of the class, or of an array."""
        if callee.op == "global":
            return self.named(call, self.program.resolve(callee.data))
        if callee.op != "attr":
            return False
        if self.program.callees(call, self.owner, self.method) or callee.data in CACHE_ATTRIBUTES:
            return True
        if self.of_mixer(callee):
            made = self.left(callee.data)
            mine = callee.args[0] is self.this
            methods = any(callee.data in cls.methods for cls in self.reach.classes)
            if mine and (made or methods):
                return all(map(self.is_layer, made))
        if callee.data in _ARRAY_METHODS:
            return self.along(call, callee.data, 0)
        return callee.data in _PYTHON_METHODS

    def is_layer(self, made: Value) -> bool:
        """What __init__ left: layers that compute each sequence alone, or classes that are read."""
        if made.op == "global":
            return self.program.resolve(made.data).removeprefix("mlx.nn.") in ACTIVATIONS
        if made.op == "phi":
            return all(self.is_layer(option) for option in made.args[1:])
        if made.op == "const":
            return made.data is None
        if made.op in ("list", "tuple"):
            return all(map(self.is_layer, made.args))
        if made.op == "attr":
            inits = (c.methods["__init__"] for c in self.reach.classes if "__init__" in c.methods)
            own = any(made.args[0] is _this(init) for init in inits)
            left = self.left(made.data) if own else []
            return bool(left) and all(v.op != "attr" and self.is_layer(v) for v in left)
        if made.op == "comp":
            return self.is_layer(made.args[0])
        if made.op != "call":
            return False
        if self.compiles(made):
            return True
        name = callee_name(self.program, made) or ""
        if name.startswith("mlx.nn."):
            return name.removeprefix("mlx.nn.") in _LAYERS
        return bool(self.program.classes_in(made)) or name.startswith(_SHARED)

    def compiles(self, call: Value) -> bool:
        """`mx.compile(self.method)`, of a method that is looked at."""
        if callee_name(self.program, call) != "mlx.core.compile" or len(call.args) != 2:
            return False
        given = call.args[1]
        return given.op == "attr" and any(given.data in c.methods for c in self.reach.classes)

    def left(self, name: str) -> list[Value]:
        """All that is left in an attribute, by __init__ or by what is reached."""
        made = [cls.attributes[name] for cls in self.reach.classes if name in cls.attributes]
        effects = (e for method in self.reach.methods for e in method.effects)
        stored = (
            e.value
            for e in effects
            if e.target is not None
            and e.target.op == "attr"
            and e.target.data == name
            and e.kind == "store"
        )
        appended = (v for cls in self.reach.classes for v in appended_to(cls, name))
        found = [*made, *stored, *appended]
        return [value for value in found if value.op != "list" or value.args]

    def named(self, call: Value, name: str) -> bool:
        if self.compiles(call):
            return True
        module, _, function = name.rpartition(".")
        if name.startswith("mlx.core."):
            short = name.removeprefix("mlx.core.")
            return short in ELEMENTWISE or short in _ALONE or self.along(call, short, 1)
        if name.startswith("mlx.nn."):
            return (
                function in ACTIVATIONS
                or (
                    function in ("softmax", "log_softmax", "glu")
                    and (len(call.args) < 3 or self.other_axis(call, 1))
                )
                or function == "sum_gradients"
            )
        if module == "builtins":
            if function in ("zip", "enumerate", "list", "tuple", "reversed"):
                return all(map(self.walked, call.args[1:]))
            if function == "len":
                return call.args[1].op in ("list", "tuple", "comp", "loop", "const")
            if function in ("min", "max"):
                return len(call.args) > 2
            if function == "id":
                return self.of_mixer(call.args[1])
            return function in _BUILTINS or function.endswith(("Error", "Warning"))
        if module == "math" or name.startswith(_SHARED):
            return True
        return self.program.function_of(name) is not None

    def along(self, call: Value, function: str, first: int) -> bool:
        """Something with axes, or a shape: the first axis stays what it is."""
        if function in _ARRAY_ALONE or (first and function in _ALONE):
            return True
        if function in ("reshape", "view", "broadcast_to"):
            if not self.rows_in(call, first):
                return True
            given = call.args[1 + first :]
            shape = given[0] if given else None
            named = [v for k, v in zip(call.data, call.args[1:], strict=True) if k == "shape"]
            shape = named[0] if named else shape
            if shape is not None and shape.op == "tuple" and shape.args:
                shape = shape.args[0]
            # A size that is left open: one sequence alone must be cut evenly by the others.
            return shape is not None and (number(shape) == -1 or self.counted(shape))
        if function == "pad":
            width = call.args[2] if len(call.args) > 2 else None
            begins = width.args[0] if width is not None and width.args else None
            zero = begins is not None and all(number(part) == 0 for part in begins.args)
            return bool(zero and begins is not None and begins.op in ("tuple", "list"))
        if function in ("tril", "triu"):
            table = call.args[first] if len(call.args) > first else call
            product = (
                table.op == "binary" and table.data == "@" and not thinned(self.program, table)
            )
            return product or not self.rows_in(call, first)
        if function in ("outer", "inner"):
            return not self.rows_in(call, first)
        if function in _TURNS:
            axes = [part for given in call.args[1 + first :] for part in (given, *given.args)]
            negative = any(isinstance(n := number(axis), int) and n < 0 for axis in axes)
            return not (
                negative and thinned(self.program, call.args[first] if first else callee_of(call))
            )
        places = {name.removeprefix("mlx.core."): at for name, at in _MOVES.items()}
        if function in places or function in ("unflatten", "squeeze"):
            return self.other_axis(call, places.get(function, 1) - 1 + first)
        return function in _REDUCTIONS and self.other_axis(call, first)

    def rows_in(self, call: Value, first: int) -> bool:
        looked = call.args[1] if first and len(call.args) > 1 else call.args[0]
        return not self.of_mixer(looked)

    def other_axis(self, call: Value, position: int) -> bool:
        """The axes are numbers, and none of them the first, counted from either end."""
        parts = _axes(call, position)
        if parts is None:
            return False
        numbers = [number(part) for part in parts]
        if -2 in numbers and function_of(self.program, call) != "expand_dims":
            held = call.args[1] if callee_name(self.program, call) else callee_of(call)
            if thinned(self.program, held):
                return False
        return all(isinstance(got, int) and got != 0 and got >= -2 for got in numbers)

    def may_join(self, closure: Value) -> bool:
        """A function inside the method that does anything but compute with single numbers, or with
        entries of arrays where they stand."""
        outer = names_before(self.method, closure)
        for part in below(closure.data):
            if isinstance(part, For):
                return True
            if not isinstance(part, Expr):
                continue
            if part.op in ("subscript", "comp", "lambda", "star", "await", "yield"):
                return True
            if part.op == "attr" and part.data in ("T", "at", "shape", "size", *_TO_PYTHON):
                return True
            if part.op == "call" and not self.plain_inside(part, outer):
                return True
        return False

    def plain_inside(self, call: Expr, outer: dict[str, Value]) -> bool:
        callee = call.args[0]
        if callee.op not in ("attr", "name"):
            return False
        if callee.data == "reshape" and callee.op == "attr":
            first = call.args[1] if len(call.args) > 1 else callee
            if first.op == "tuple" and first.args:
                first = first.args[0]
            return first.op == "name" and first.data in outer and self.is_count(outer[first.data])
        return callee.data in _INSIDE or (
            callee.data in ("swapaxes", "flatten") and _other_axes(call)
        )

    # ----------------------------------------------------------------- entries

    def picked(self, value: Value) -> bool:
        base, key = _begun(value.args[0]), value.args[1]
        if self.mixer.is_cache(base) or self.of_mixer(base):
            return True
        if base.op == "attr" and base.data in ("shape", "at"):
            return base.data == "shape" or self.plain_key(key)
        if base.op == "call" and self.gives_tuple(base):
            return True
        if base.op in _CONTAINERS or _gives_list(self.program, base):
            return True
        given = self.given(base, self.method) if base.op == "param" else None
        if given and all(_begun(value).op in _CONTAINERS for value, _ in given):
            return True
        return self.plain_key(key)

    def gives_tuple(self, call: Value) -> bool:
        """A method of the class, or a function, all of whose results are tuples."""
        name = callee_name(self.program, call)
        own = self.program.function_of(name) if name is not None else None
        found = [m for _, m in self.program.callees(call, self.owner, self.method)]
        results = [e.value for m in (*found, *([own] if own else [])) for e in m.returns]
        return bool(results) and all(value.op == "tuple" for value in results)

    def plain_key(self, key: Value) -> bool:
        """All of the first axis, where it is."""
        parts = key.args if key.op == "tuple" and key.args else (key,)
        first = parts[0]
        if first.op == "slice":
            return all(part.op == "const" and part.data is None for part in first.args)
        if first.op == "const" and first.data is Ellipsis:
            return sum(not (p.op == "const" and p.data is None) for p in parts[1:]) <= 2
        return False

    def walked(self, iterable: Value) -> bool:
        """What is looped over is no array whose first axis are sequences."""
        if iterable.op in ("list", "tuple", "comp", "dict"):
            return True
        if iterable.op == "loop":
            return all(map(self.walked, iterable.args))
        if iterable.op == "call":
            name = callee_name(self.program, iterable) or ""
            if name == "builtins.range":
                return True
            if name.startswith("builtins."):
                return all(map(self.walked, iterable.args[1:]))
            return _gives_list(self.program, iterable)
        return self.of_mixer(iterable)

    def of_mixer(self, value: Value) -> bool:
        """Nothing of single sequences is in it."""
        return not self.holds(value, self.method, ())

    def holds(self, value: Value, method: Method, asked: tuple[int, ...]) -> bool:
        """Something of single sequences may be in it: not in shapes, nor in what the mixer itself
        holds, nor in parameters that every call gives such things to."""
        this, stack = _this(method), [value]
        while stack:
            current = stack.pop()
            if current.op == "attr" and current.data in ("shape", "ndim", "dtype"):
                continue
            if current.op == "call" and callee_name(self.program, current) == "mlx.core.arange":
                continue
            if current.op in ("closure", "unknown"):
                return True
            if current.op == "param" and current is not this:
                if id(current) in asked:
                    continue
                given = self.given(current, method)
                if given is None or len(asked) > 8:
                    return True
                if any(self.holds(v, caller, (*asked, id(current))) for v, caller in given):
                    return True
            stack.extend(current.args)
        return False

    def given(self, parameter: Value, method: Method) -> list[tuple[Value, Method]] | None:
        """What the reached calls of a function or method give to a parameter, and where; None if
        that is not known of each call."""
        if id(parameter) not in self.calls.given:
            self.calls.given[id(parameter)] = self._given(parameter, method)
        return self.calls.given[id(parameter)]

    def _given(self, parameter: Value, method: Method) -> list[tuple[Value, Method]] | None:
        places = [i for i, p in enumerate(method.params) if p is parameter]
        if method.name == "__call__" or not places or method.name in self.calls.handed_on:
            return None
        at = places[0] + 1 - (_this(method) is not None)
        found: list[tuple[Value, Method]] = []
        calls = self.calls.of(method)
        for call, caller in calls:
            if "*" in call.data or "**" in call.data:
                return None
            named = dict(zip(call.data, call.args[1:], strict=True))
            positional = len(call.args) > at and call.data[at - 1] is None
            value = named.get(parameter.data[1]) or (call.args[at] if positional else None)
            if value is not None:  # otherwise a default, which is of the file
                found.append((value, caller))
        return found if calls else None


class Calls:
    """All calls in what is reached, by what they may call.

    `values` are those of each method, by its identity; `handed_on` the names of attributes that are
    read without being called; `given` remembers what parameters are given.
    """

    def __init__(self, program: Program, methods: Iterable[Method]) -> None:
        self.values: dict[int, list[Value]] = {}
        self.handed_on: set[str] = set()
        self.given: dict[int, list[tuple[Value, Method]] | None] = {}
        self._calls: dict[int | str, list[tuple[Value, Method]]] = {}
        for method in methods:
            values = self.values[id(method)] = list(every_value(method))
            called = {id(value.args[0]) for value in values if value.op == "call"}
            for value in values:
                if value.op == "attr" and id(value) not in called:
                    self.handed_on.add(value.data)
                elif value.op == "call":
                    name = callee_name(program, value)
                    if name is not None:
                        function = program.function_of(name)
                        key: int | str | None = None if function is None else id(function)
                    else:
                        key = value.args[0].data if value.args[0].op == "attr" else None
                    if key is not None:
                        self._calls.setdefault(key, []).append((value, method))

    def of(self, method: Method) -> list[tuple[Value, Method]]:
        """The calls that may be of a method or function, and where they stand."""
        return self._calls.get(id(method), []) + self._calls.get(method.name, [])


def _begun(value: Value) -> Value:
    """What a value was before entries of it were set, here or in a loop."""
    while value.op in ("setitem", "loop", "carried"):
        value = value.args[0]
    return value


def _other_axes(call: Expr) -> bool:
    """The arguments are numbers, and no first axis."""
    given = [part.data if part.op == "const" else None for part in call.args[1:]]
    return bool(given) and all(isinstance(got, int) and got > 0 for got in given)


def function_of(program: Program, call: Value) -> str:
    """The last name of what is called."""
    name = callee_name(program, call) or str(call.args[0].data)
    return name.rpartition(".")[2]


def callee_of(call: Value) -> Value:
    """`x` of `x.method(...)`."""
    return call.args[0].args[0] if call.args[0].args else call.args[0]


def thinned(program: Program, value: Value) -> bool:
    """An axis may be gone from it: its last axis but one may then be the first."""
    stack, seen = [value], set()
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if current.op == "index":
            keys = current.args[1].args if current.args[1].op == "tuple" else (current.args[1],)
            plain = [
                k
                for k in keys
                if k.op != "slice" and not (k.op == "const" and k.data in (None, Ellipsis))
            ]
            added = any(k.op == "const" and k.data is None for k in keys)
            if plain and not added and len(keys) > 1:
                return True
            stack += [] if added else [current.args[0]]
        elif current.op in ("binary", "unary", "phi", "setitem"):
            stack += current.args
        elif current.op == "call":
            name = callee_name(program, current)
            short = (name or "").removeprefix("mlx.core.")
            method = current.args[0].data if current.args[0].op == "attr" else ""
            if short == "squeeze" or method == "squeeze":
                return True
            if (short in _REDUCTIONS or method in _REDUCTIONS) and "keepdims" not in current.data:
                if {short, method} & _KEEPING:
                    continue
                return True
            if short in ELEMENTWISE or method == "astype":
                stack += current.args[1:] if name else current.args[0].args
    return False


def _gives_list(program: Program, value: Value) -> bool:
    """Pieces of an array along another axis than the first, as `_joins` has seen."""
    if value.op != "call":
        return False
    callee = value.args[0]
    name = callee_name(program, value)
    return name == "mlx.core.split" or (callee.op == "attr" and callee.data == "split")


def _is_shape_of(value: Value) -> bool:
    return bool(value.op == "attr" and value.data == "shape")


def _launch_sizes(value: Value) -> Iterator[Value]:
    """What the grid of a kernel's launch is made of."""
    if value.op == "call":
        for keyword, given in zip(value.data, value.args[1:], strict=True):
            if keyword in _LAUNCHING:
                yield from given.walk()


def _wrapped(file: ModuleFacts, method: Method) -> bool:
    """A decorator of the file's own, or of somebody else's, may do anything with what is given."""
    for decorator in method.function.decorators:
        stack = [decorator]
        while stack:
            expr = stack.pop()
            stack.extend(expr.args)
            if expr.op != "name":
                continue
            bound = file.names.get(expr.data)
            name = bound.data if bound is not None else f"builtins.{expr.data}"
            if not str(name).startswith(_DECORATING):
                return True
    return False


def _this(method: Method) -> Value | None:
    """The mixer itself, as a method knows it."""
    bound = method.owner is not None and not method.function.decorators
    return method.params[0] if bound and method.params else None


def _turns(mixer: Mixer, call: Value) -> bool:
    """The first axis goes elsewhere."""
    callee = call.args[0]
    name = callee_name(mixer.program, call)
    if name is not None:
        module, _, function = name.rpartition(".")
        axes = call.args[2:]
        if module != "mlx.core" or function not in _TURNS:
            return False
    elif callee.op == "attr" and callee.data in _TURNS:
        function, axes = callee.data, call.args[1:]
    else:
        return False
    if len(axes) == 1 and axes[0].op in ("tuple", "list"):
        axes = axes[0].args
    numbers = [number(axis) for axis in axes]
    if function == "transpose":
        return numbers[:1] != [0]
    return 0 in numbers or None in numbers


def _joins(mixer: Mixer, call: Value) -> bool:
    callee = call.args[0]
    name = callee_name(mixer.program, call)
    if name in _MOVES:
        return _over_first_axis(call, _MOVES[name])
    if name is not None:
        module, _, function = name.rpartition(".")
        return module == "mlx.core" and function in _REDUCTIONS and _over_first_axis(call, 1)
    if callee.op != "attr":
        return False
    if callee.data in _TO_PYTHON:
        return True
    return callee.data in _REDUCTIONS and _over_first_axis(call, 0)


def _over_first_axis(call: Value, position: int) -> bool:
    """The axis is 0, or there is none: then all axes are reduced."""
    axes = _axes(call, position)
    return axes is None or any(axis.op == "const" and axis.data == 0 for axis in axes)


def _axes(call: Value, position: int) -> tuple[Value, ...] | None:
    """The axes that a call names, by keyword or as its argument at `position`; None without."""
    axis, place = None, 0
    for keyword, value in zip(call.data, call.args[1:], strict=True):
        if keyword in ("axis", "start_axis") or (keyword is None and place == position):
            axis = value
        place += keyword is None
    if axis is None:
        return None
    return axis.args if axis.op in ("tuple", "list") else (axis,)
