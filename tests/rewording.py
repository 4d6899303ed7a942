"""Other words for the same program: names, imports, arguments, layout, classes, files.

Each way takes libcst's tree (or the text) and a source of chance and gives another text that does
the same. What mlx_lm's loader and mlx fix (`Model`, `layers`, `cache`, ...) keeps its name.
`split_over_files` gives two texts: that of the model, and of the file it imports its bases from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

import libcst as cst
from libcst import matchers as m

FIXED = frozenset(
    (
        "Model ModelArgs layers model_type weight bias shape dtype ndim T offset keys values state "
        "lengths advance update_and_fetch keys_and_values make_cache size start_position args "
        "config scales biases group_size bits mode training sanitize shard quant_predicate "
        "cast_predicate self cls"
    ).split()
)
Way = Callable[[str, Random], str]


def some_name(chance: Random) -> str:
    return f"{chance.choice('abcdefgh')}{chance.choice(['', '_', 'Q'])}{chance.randrange(10**6)}"


# --------------------------------------------------------------------------- names


def _fields(tree: cst.Module) -> set[str]:
    """Names of fields: they come from the config, and are asked for as attributes."""
    return {
        line.target.value
        for cls in m.findall(tree, m.ClassDef())
        for line in m.findall(cls, m.AnnAssign(target=m.Name()))
    }


class _Renaming(cst.CSTTransformer):
    def __init__(self, names: dict[str, str], attributes: dict[str, str], imported: set[str]):
        self.names, self.attributes, self.imported = names, attributes, imported
        self.local: list[dict[str, str]] = []
        self.chance: Random | None = None

    def visit_Arg(self, node: cst.Arg) -> None:
        pass

    def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> cst.Arg:
        return updated_node.with_changes(keyword=original_node.keyword)

    def leave_Param(self, original_node: cst.Param, updated_node: cst.Param) -> cst.Param:
        return updated_node.with_changes(name=original_node.name)

    def leave_ImportFrom(
        self, original_node: cst.ImportFrom, updated_node: cst.ImportFrom
    ) -> cst.ImportFrom:
        return original_node

    def leave_Import(self, original_node: cst.Import, updated_node: cst.Import) -> cst.Import:
        return original_node

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.Attribute:
        root: cst.BaseExpression = original_node
        while isinstance(root, cst.Attribute):
            root = root.value
        name = original_node.attr.value
        if isinstance(root, cst.Name) and root.value in self.imported:
            return updated_node.with_changes(attr=original_node.attr)
        return updated_node.with_changes(attr=cst.Name(self.attributes.get(name, name)))

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.Name:
        for names in (*reversed(self.local), self.names):
            if updated_node.value in names:
                return updated_node.with_changes(value=names[updated_node.value])
        return updated_node

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        assert self.chance is not None
        self.local.append({name: some_name(self.chance) for name in sorted(_locals(node))})

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef:
        self.local.pop()
        name = original_node.name.value
        return updated_node.with_changes(
            name=cst.Name(self.attributes.get(name, self.names.get(name, name)))
        )


def _locals(function: cst.FunctionDef) -> set[str]:
    """Names that are bound in the function only."""
    inner = m.findall(function.body, m.FunctionDef() | m.Lambda() | m.Global() | m.Nonlocal())
    if inner:
        return set()
    targets = [
        *(t.target for t in m.findall(function.body, m.AssignTarget())),
        *(t.target for t in m.findall(function.body, m.For() | m.CompFor())),
    ]
    bound = {
        name.value
        for target in targets
        if isinstance(target, (cst.Name, cst.Tuple))
        for name in m.findall(target, m.Name())
    }
    parameters = {p.name.value for p in m.findall(function.params, m.Param())}
    return bound - parameters - FIXED


def _imported(tree: cst.Module) -> set[str]:
    """Names that imports bind: of `import a.b` without another name, `a`."""
    bound = set()
    for statement in m.findall(tree, m.Import() | m.ImportFrom(names=[m.ZeroOrMore()])):
        for alias in statement.names:
            name = alias.asname.name if alias.asname else alias.name
            while isinstance(name, cst.Attribute):
                name = name.value
            bound.add(name.value)
    return bound


def renamed(text: str, chance: Random) -> str:
    tree = cst.parse_module(text)
    fields = _fields(tree)
    imported = _imported(tree)
    outer = [s for s in tree.body if isinstance(s, (cst.ClassDef, cst.FunctionDef))]
    names = {s.name.value: some_name(chance) for s in outer if s.name.value not in FIXED}
    found = {
        target.target.attr.value
        for target in m.findall(tree, m.AssignTarget(m.Attribute(value=m.Name("self"))))
    }
    methods = {
        f.name.value
        for cls in tree.body
        if isinstance(cls, cst.ClassDef)
        for f in cls.body.body
        if isinstance(f, cst.FunctionDef) and not f.name.value.startswith("__")
    }
    attributes = {
        name: some_name(chance) for name in sorted((found | methods) - FIXED - fields - imported)
    }
    renaming = _Renaming(names, attributes, imported)
    renaming.chance = chance
    return tree.visit(renaming).code


# --------------------------------------------------------------------------- imports


def _module_import(text: str, chance: Random, module: str, alias: str) -> str:
    """`import mlx.core as mx` in another form, and its uses with it."""
    line = f"import {module} as {alias}\n"
    if text.count(line) != 1:
        return text
    parent, _, last = module.rpartition(".")
    used = sorted(set(re.findall(rf"\b{alias}\.(\w+)", text)))
    new = some_name(chance)
    form = chance.randrange(5)
    if form == 0:
        made, prefix = f"import {module} as {new}\n", f"{new}."
    elif form == 1:
        made, prefix = f"from {parent} import {last}\n", f"{last}."
    elif form == 2:
        made, prefix = f"from {parent} import {last} as {new}\n", f"{new}."
    elif form == 3:
        made, prefix = f"import {module}\n", f"{module}."
    else:
        names = ", ".join(f"{name} as {name}_{new}" for name in used)
        text = text.replace(line, f"from {module} import {names}\n")
        return re.sub(rf"\b{alias}\.(\w+)", lambda found: f"{found[1]}_{new}", text)
    text = text.replace(line, made)
    return re.sub(rf"\b{alias}\.", prefix, text)


_NAMES = re.compile(r"from (mlx_lm\.models\.\w+) import ([\w, ]+)\n")


def _name_import(text: str, chance: Random) -> str:
    """`from mlx_lm.models.base import x` in another form."""
    for found in list(_NAMES.finditer(text)):
        module, names = found[1], [name.strip() for name in found[2].split(",")]
        new = some_name(chance)
        form = chance.randrange(4)
        if form == 0:
            continue
        if form == 1:
            made = f"from {module} import {', '.join(f'{n} as {n}_{new}' for n in names)}\n"
            uses = {n: f"{n}_{new}" for n in names}
        elif form == 2:
            made = f"import {module} as {new}\n"
            uses = {n: f"{new}.{n}" for n in names}
        else:
            parent, _, last = module.rpartition(".")
            made = f"from {parent} import {last} as {new}\n"
            uses = {n: f"{new}.{n}" for n in names}
        before, after = text.split(found[0], 1)
        for name, use in uses.items():
            after = re.sub(rf"(?<![.\w]){name}\b(?!\s*=[^=])", use, after)
        text = before + made + after
    return text


def reimported(text: str, chance: Random) -> str:
    text = _module_import(text, chance, "mlx.core", "mx")
    return _name_import(_module_import(text, chance, "mlx.nn", "nn"), chance)


# --------------------------------------------------------------------------- arguments

# By the last name of the callee: parameters in order, and how many must be positional.
SIGNATURES: dict[str, tuple[str, int]] = {
    "scaled_dot_product_attention": ("queries keys values cache scale mask sinks", 0),
    "create_attention_mask": ("h cache window_size return_array", 0),
    "update_and_fetch": ("keys values", 0),
    "Linear": ("input_dims output_dims bias", 0),
    "Embedding": ("num_embeddings dims", 0),
    "RMSNorm": ("dims eps", 0),
    "RoPE": ("dims traditional base scale", 0),
    "split": ("a indices_or_sections axis", 1),
    "softmax": ("a axis", 1),
    "rope": ("x offset", 1),
}


class _Arguments(cst.CSTTransformer):
    def __init__(self, chance: Random) -> None:
        self.chance = chance

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        func = updated_node.func
        name = func.value if isinstance(func, cst.Name) else ""
        if isinstance(func, cst.Attribute):
            name = func.attr.value
            if m.matches(func.value, m.Attribute(attr=m.Name("fast"))):
                return updated_node  # keyword-only there
        if name not in SIGNATURES or any(a.star for a in updated_node.args):
            return updated_node
        words, least = SIGNATURES[name]
        order = words.split()
        given: dict[str, cst.BaseExpression] = {}
        for i, arg in enumerate(updated_node.args):
            key = arg.keyword.value if arg.keyword is not None else order[i]
            if key not in order:
                return updated_node
            given[key] = arg.value
        run = 0
        while run < len(order) and order[run] in given:
            run += 1
        kept = self.chance.randint(min(least, run), run)
        rest = [key for key in given if key not in order[:kept]]
        self.chance.shuffle(rest)
        args = [cst.Arg(given[key]) for key in order[:kept]]
        args += [cst.Arg(given[key], keyword=cst.Name(key)) for key in rest]
        return updated_node.with_changes(
            args=[
                a.with_changes(
                    comma=cst.MaybeSentinel.DEFAULT,
                    equal=cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
                    if a.keyword
                    else cst.MaybeSentinel.DEFAULT,
                )
                for a in args
            ]
        )


def reargued(text: str, chance: Random) -> str:
    return cst.parse_module(text).visit(_Arguments(chance)).code


# --------------------------------------------------------------------------- layout


class _Layout(cst.CSTTransformer):
    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.quiet = 0  # inside of what may not be parenthesised

    def maybe(self) -> bool:
        return self.chance.random() < 0.3

    def visit_AssignTarget(self, node: cst.AssignTarget) -> None:
        self.quiet += 1

    def leave_AssignTarget(
        self, original_node: cst.AssignTarget, updated_node: cst.AssignTarget
    ) -> cst.AssignTarget:
        self.quiet -= 1
        return updated_node

    def visit_FormattedString(self, node: cst.FormattedString) -> None:
        self.quiet += 1

    def leave_FormattedString(
        self, original_node: cst.FormattedString, updated_node: cst.FormattedString
    ) -> cst.FormattedString:
        self.quiet -= 1
        return updated_node

    def visit_Decorator(self, node: cst.Decorator) -> None:
        self.quiet += 1

    def leave_Decorator(
        self, original_node: cst.Decorator, updated_node: cst.Decorator
    ) -> cst.Decorator:
        self.quiet -= 1
        return updated_node

    def wrapped(self, node: cst.BaseExpression) -> cst.BaseExpression:
        if self.quiet or not self.maybe():
            return node
        left, right = cst.LeftParen(), cst.RightParen()
        if self.maybe():
            left = cst.LeftParen(whitespace_after=_break(self.chance))
        return node.with_changes(lpar=[left, *node.lpar], rpar=[*node.rpar, right])

    def leave_BinaryOperation(
        self, original_node: cst.BinaryOperation, updated_node: cst.BinaryOperation
    ) -> cst.BaseExpression:
        return self.wrapped(updated_node)

    def leave_Subscript(
        self, original_node: cst.Subscript, updated_node: cst.Subscript
    ) -> cst.BaseExpression:
        return self.wrapped(updated_node)

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        if updated_node.args and self.maybe() and not self.quiet:
            updated_node = updated_node.with_changes(whitespace_before_args=_break(self.chance))
        return self.wrapped(updated_node)

    def leave_Comparison(
        self, original_node: cst.Comparison, updated_node: cst.Comparison
    ) -> cst.BaseExpression:
        return self.wrapped(updated_node)

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine:
        if self.maybe():
            lines = [cst.EmptyLine(comment=cst.Comment("# x = mx.cumsum(x)")), cst.EmptyLine()]
            return updated_node.with_changes(leading_lines=[*updated_node.leading_lines, *lines])
        return updated_node

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        if not self.maybe():
            return updated_node
        body = list(updated_node.body)
        nothing = cst.SimpleStatementLine([cst.Pass()])
        body.insert(self.chance.randint(min(1, len(body)), len(body)), nothing)
        return updated_node.with_changes(body=body)


def _break(chance: Random) -> cst.ParenthesizedWhitespace:
    comment = cst.Comment("# noise (") if chance.random() < 0.5 else None
    first = cst.TrailingWhitespace(cst.SimpleWhitespace("  "), comment)
    return cst.ParenthesizedWhitespace(
        first, indent=True, last_line=cst.SimpleWhitespace(" " * chance.randrange(12))
    )


def relaid(text: str, chance: Random) -> str:
    return cst.parse_module(text).visit(_Layout(chance)).code


# --------------------------------------------------------------------------- classes


def _is_module(cls: cst.ClassDef) -> bool:
    return len(cls.bases) == 1 and m.matches(cls.bases[0].value, m.Attribute(attr=m.Name("Module")))


def with_bases(text: str, chance: Random) -> str:
    """A base between a class and nn.Module, empty or with the class's `__init__`."""
    tree = cst.parse_module(text)
    body: list[cst.BaseStatement] = []
    for statement in tree.body:
        if not isinstance(statement, cst.ClassDef) or not _is_module(statement):
            body.append(statement)
            continue
        if chance.random() < 0.4:
            body.append(statement)
            continue
        base = some_name(chance).title()
        methods = list(statement.body.body)
        made = next((f for f in methods if m.matches(f, m.FunctionDef(m.Name("__init__")))), None)
        moved: Sequence[cst.BaseStatement] = [cst.SimpleStatementLine([cst.Pass()])]
        if made is not None and len(methods) > 1 and chance.random() < 0.5:
            moved = [made]
            methods.remove(made)
        body.append(
            statement.with_changes(name=cst.Name(base), body=cst.IndentedBlock(list(moved)))
        )
        body.append(
            statement.with_changes(
                bases=[cst.Arg(cst.Name(base))],
                body=statement.body.with_changes(body=methods),
                lpar=cst.LeftParen(),
                rpar=cst.RightParen(),
            )
        )
    return tree.with_changes(body=body).code


class _Order(cst.CSTTransformer):
    def __init__(self, chance: Random) -> None:
        self.chance = chance

    def leave_ClassDef(
        self, original_node: cst.ClassDef, updated_node: cst.ClassDef
    ) -> cst.ClassDef:
        body = list(updated_node.body.body)
        places = [i for i, part in enumerate(body) if isinstance(part, cst.FunctionDef)]
        if any(m.findall(body[i], m.Decorator(m.Attribute())) for i in places):
            return updated_node  # a setter comes after its getter
        methods = [body[i] for i in places]
        self.chance.shuffle(methods)
        for place, method in zip(places, methods, strict=True):
            body[place] = method
        return updated_node.with_changes(body=updated_node.body.with_changes(body=body))


def reordered(text: str, chance: Random) -> str:
    return cst.parse_module(text).visit(_Order(chance)).code


WAYS: dict[str, Way] = {  # in the order in which they are applied
    "arguments": reargued,
    "bases": with_bases,
    "order": reordered,
    "imports": reimported,
    "names": renamed,
    "layout": relaid,
}


def reworded(text: str, ways: Sequence[str], chance: Random) -> str:
    for name, way in WAYS.items():
        if name in ways:
            text = way(text, chance)
    return text


# --------------------------------------------------------------------------- files


def _names_used(function: cst.FunctionDef) -> set[str]:
    """Names that the function's code asks for; those of annotations are never looked up."""
    bare = function.visit(_Unannotated())
    assert isinstance(bare, cst.FunctionDef)
    attributes = {id(a.attr) for a in m.findall(bare, m.Attribute())}
    keywords = {id(a.keyword) for a in m.findall(bare, m.Arg()) if a.keyword is not None}
    return {
        name.value
        for name in m.findall(bare, m.Name())
        if id(name) not in attributes and id(name) not in keywords
    }


class _Unannotated(cst.CSTTransformer):
    def leave_Param(self, original_node: cst.Param, updated_node: cst.Param) -> cst.Param:
        return updated_node.with_changes(annotation=None)

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef:
        return updated_node.with_changes(returns=None)


def _is_import(statement: cst.CSTNode) -> bool:
    return m.matches(
        statement, m.SimpleStatementLine([m.OneOf(m.Import(), m.ImportFrom()), m.ZeroOrMore()])
    )


def split_over_files(
    text: str, chance: Random, sibling: str, only: Sequence[str] = ()
) -> tuple[str, str]:
    """Some methods of the modules go to bases in a file of their own, named by `sibling`.

    Only methods go whose names are those of imports. With `only`, others than these stay. Raises
    ValueError where none can go.
    """
    tree = cst.parse_module(text)
    own = {s.name.value for s in tree.body if isinstance(s, (cst.ClassDef, cst.FunctionDef))}
    own |= {
        name.value
        for s in tree.body
        if isinstance(s, cst.SimpleStatementLine)
        for target in m.findall(s, m.AssignTarget())
        for name in m.findall(target, m.Name())
    }
    imports = [s for s in tree.body if _is_import(s)]
    bases: list[cst.BaseStatement] = []
    body: list[cst.BaseStatement] = []
    for cls in tree.body:
        if not isinstance(cls, cst.ClassDef) or not _is_module(cls):
            body.append(cls)
            continue
        methods = [f for f in cls.body.body if isinstance(f, cst.FunctionDef)]
        free = [f for f in methods if not (_names_used(f) & own)]
        free = [f for f in free if not only or f.name.value in only]
        setters = m.findall(cls, m.Decorator(m.Attribute()))
        gone = [f for f in free if chance.random() < 0.5] if not setters else []
        if not gone:
            body.append(cls)
            continue
        base = f"{some_name(chance).title()}{cls.name.value}"
        bases.append(
            cls.with_changes(name=cst.Name(base), body=cst.IndentedBlock(gone), decorators=[])
        )
        left = [part for part in cls.body.body if part not in gone]
        left = left or [cst.SimpleStatementLine([cst.Pass()])]
        body.append(
            cls.with_changes(bases=[cst.Arg(cst.Name(base))], body=cls.body.with_changes(body=left))
        )
    if not bases:
        raise ValueError("no method can go to another file")
    names = [cls.name.value for cls in bases if isinstance(cls, cst.ClassDef)]
    line = f"from {sibling} import {', '.join(names)}\n"
    place = max(i for i, s in enumerate(body) if _is_import(s)) + 1
    body.insert(place, cst.parse_statement(line))
    future = cst.parse_statement("from __future__ import annotations\n")
    plain = [s for s in imports if "__future__" not in cst.Module([s]).code]
    return (
        tree.with_changes(body=body).code,
        cst.Module([future, *plain, *bases]).code,
    )
