"""Docstrings with parameters, for `help()`, editors and the site: the comments beside a signature, in numpy's style.

In the notebooks a parameter is explained by the comment beside it. Python forgets comments, so the package gets them
as a section of the docstring too. Nothing else of a module changes.
"""
import ast
import io
import re
import tokenize


def with_parameters(source: str) -> str:
    "A module's source whose public functions and classes say in their docstrings what their comments say."
    lines, comments = source.splitlines(keepends=True), _comments(source)
    for node in reversed(_documented(ast.parse(source))):
        text = node.body[0]
        sections = _sections(node, lines, comments)
        if sections:
            lines[text.lineno - 1:text.end_lineno] = [_docstring(text, sections)]
    return "".join(lines)


def _comments(source: str) -> dict[int, tuple[int, str]]:
    "Line -> column and words of its comment; a marker of a notebook's cell is none."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = {t.start[0]: (t.start[1], t.string.lstrip("# ").rstrip()) for t in tokens if t.type == tokenize.COMMENT}
    return {line: (column, text) for line, (column, text) in found.items() if not text.startswith("%%")}


def _documented(tree: ast.Module) -> list[ast.AST]:
    "Public functions, classes and their methods that have a docstring, in the order of their lines."
    kinds = ast.FunctionDef | ast.ClassDef
    top = [n for n in tree.body if isinstance(n, kinds)]
    inside = [n for c in top if isinstance(c, ast.ClassDef) for n in c.body if isinstance(n, ast.FunctionDef)]
    public = [n for n in top + inside if not n.name.startswith("_")]
    return sorted([n for n in public if ast.get_docstring(n)], key=lambda n: n.lineno)


def _sections(node: ast.AST, lines: list[str], comments: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    "Title and entries of each section that a docstring gets."
    if isinstance(node, ast.FunctionDef):
        asked = _parameters(node, comments)
        return [s for s in (("Parameters", asked), ("Returns", _returns(node, comments))) if s[1]]
    made = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    entries = _parameters(made, comments) if made else _fields(node, comments)
    return [("Parameters", entries)] if entries else []


def _parameters(f: ast.FunctionDef, comments: dict) -> list[tuple[str, str]]:
    "Names of parameters (those of one line together) and what stands beside them."
    args = [*f.args.posonlyargs, *f.args.args, *filter(None, [f.args.vararg]), *f.args.kwonlyargs,
            *filter(None, [f.args.kwarg])]
    stars = {id(f.args.vararg): "*", id(f.args.kwarg): "**"}
    last = f.body[0].lineno - 1
    ends = f.returns.lineno if f.returns else last + 1
    names = [(a.lineno, stars.get(id(a), "") + a.arg, a.annotation and ast.unparse(a.annotation)) for a in args]
    return _beside(names, comments, ends, last)


def _fields(c: ast.ClassDef, comments: dict) -> list[tuple[str, str]]:
    "The same of a dataclass's fields."
    fields = [n for n in c.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    if not fields:
        return []
    end = min((n.lineno for n in c.body if n.lineno > fields[-1].lineno), default=c.end_lineno + 1)
    return _beside([(n.lineno, n.target.id, None) for n in fields], comments, 0, end - 1)


def _beside(names: list[tuple], comments: dict, returns: int, last: int) -> list[tuple[str, str]]:
    """Comments from the first name's line to `last`; a line with a comment alone goes on with the one before.

    A comment is about the last name of its line, and about those before it that are of the same type."""
    entries, here, column = [], [], 0
    starts = {line: [] for line, *_ in names}
    for line, name, kind in names:
        if name not in ("self", "cls"):
            starts[line] = [*(n for n in starts[line] if n[1] == kind), (name, kind)]
    starts = {line: [name for name, _ in found] for line, found in starts.items()}
    for line in range(names[0][0], last + 1) if names else ():
        if line in starts:
            here = starts[line]
            if here and line in comments and line != returns:
                column = comments[line][0]
                entries.append((", ".join(here), comments[line][1]))
        elif line in comments and entries and comments[line][0] >= column > 0 and line < (returns or last + 1):
            entries[-1] = (entries[-1][0], f"{entries[-1][1]} {comments[line][1]}")
    return entries


def _returns(f: ast.FunctionDef, comments: dict) -> list[tuple[str, str]]:
    "The annotation of what comes back, and what stands beside it."
    if f.returns is None or f.returns.end_lineno not in comments:
        return []
    beside = comments[f.returns.end_lineno][1]
    return [(ast.unparse(f.returns).strip("'\""), beside)] if f.returns.end_lineno < f.body[0].lineno else []


def _docstring(text: ast.Expr, sections: list) -> str:
    "The docstring's lines, with the sections under its own words."
    indent, words = " " * text.col_offset, text.value.value.rstrip().replace("\\", "\\\\").replace('"""', "'''")
    out = [f'{indent}"""{words}', ""]
    for title, entries in sections:
        out += [f"{indent}{title}", indent + "-" * len(title)]
        for name, beside in entries:
            out += [f"{indent}{name}", f"{indent}    {re.sub(chr(92) * 2, chr(92) * 4, beside)}"]
        out.append("")
    return "\n".join(out).rstrip() + f'\n{indent}"""\n'
