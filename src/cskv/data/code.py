"""Functions of Python's standard library whose docstrings have examples, to be completed by a model.

The source is this Python's own, as in `cskv.data.offline`, and the examples of a docstring (`doctest`) say whether a
body is right. A case's context is what stands before the function: the end of its module so far and, where that is
shorter than wanted, held-out sources of other modules before it. The question is the function up to the end of its
docstring. Few functions of held-out modules have examples, so those of all modules are asked for.
"""

from __future__ import annotations

import ast
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from cskv.data import offline
from cskv.data.cases import Case
from cskv.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE = "code"
SKIPPED = ("turtle", "antigravity")  # they want a screen
MOST_LINES = 20  # of a body that is asked for
ANSWER_TOKENS = 320
PARTS = 2
PROMPT = ">>>"

RUN_EXAMPLES = """
import doctest, sys, types

name, is_package, source, examples = {module!r}, {is_package!r}, {source!r}, {examples!r}
module = types.ModuleType(name)
module.__package__ = name if is_package else name.rpartition(".")[0]
module.__file__ = {file!r}
if is_package:
    module.__path__ = [module.__file__.rpartition("/")[0]]
sys.modules[name] = module
exec(compile(source, name, "exec"), module.__dict__)
test = doctest.DocTestParser().get_doctest(examples, {{**module.__dict__, name: module}}, name, None, 0)
results = doctest.DocTestRunner(verbose=False).run(test)
if results.failed or not results.attempted:
    raise SystemExit(f"{{results.failed}} of {{results.attempted}} examples failed")
"""


@dataclass(frozen=True)
class Function:
    """A function or method of a module.

    Attributes:
        document: the module's name in `cskv.data.offline`: "stdlib/json/decoder.py".
        name: within the module, with its class.
        before, head, body, after: the module's text: up to the function, up to the end of its docstring, the rest of
            the function, and what follows. Each is of whole lines.
        examples: the docstring.
        indent: columns that the body is indented by.
    """

    document: str
    name: str
    before: str
    head: str
    body: str
    after: str
    examples: str
    indent: int

    @property
    def module(self) -> str:
        """Return the dotted name that the module is imported by."""
        parts = PurePosixPath(self.document).with_suffix("").parts[1:]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def program(self, body: str) -> str:
        """Return a program that comes to its end if the examples hold of the function with this body.

        The body begins where the docstring has ended, and so with a newline.
        """
        return RUN_EXAMPLES.format(
            module=self.module,
            is_package=self.document.endswith("/__init__.py"),
            source=f"{self.before}{self.head.rstrip()}{body.rstrip()}\n{self.after}",
            examples=self.examples,
            file=str(offline.root() / PurePosixPath(self.document).relative_to("stdlib")),
        )

    def body_in(self, output: str) -> tuple[str, bool]:
        """Return an output up to the line that leaves the function, and whether there is one.

        The output begins where the docstring has ended, so its first line goes on with that line.
        """
        first, newline, rest = output.partition("\n")
        lines = rest.splitlines(keepends=True)
        inside = next((i for i, line in enumerate(lines) if line[: self.indent].strip()), len(lines))
        return first + newline + "".join(lines[:inside]), inside < len(lines)


@dataclass(frozen=True, kw_only=True)
class FunctionCase(Case):
    """A function to be completed; `answers` has its name.

    Attributes:
        function: what is to be completed.
        passes: runs a program, and tells whether it came to its end.
    """

    function: Function
    passes: Callable[[str], bool]

    def is_over(self, output: str) -> bool:
        """Tell whether the output has left the function."""
        return self._body(output)[1]

    def score(self, output: str) -> float:
        """Run the examples on the function as the output completes it: 1 where all hold, else 0."""
        return float(self.passes(self.function.program(self._body(output)[0])))

    def _body(self, output: str) -> tuple[str, bool]:
        return self.function.body_in(("\n" if self.question.endswith("\n") else "") + output)


@lru_cache(maxsize=1)
def functions() -> tuple[Function, ...]:
    """Return all functions with examples and a body that is short enough, in the order of their documents."""
    documents = (document for split in ("train", "heldout") for document in offline.documents(split))
    sources = [(name, text) for name, text in documents if name.startswith("stdlib/") and PROMPT in text]
    found = (function for name, text in sorted(sources) for function in _functions_of(name, text))
    return tuple(function for function in found if function.module not in SKIPPED)


def _functions_of(document: str, text: str) -> Iterator[Function]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines(keepends=True)
    classes = [(f"{node.name}.", node.body) for node in tree.body if isinstance(node, ast.ClassDef)]
    for prefix, nodes in [("", tree.body), *classes]:
        for node in nodes:
            if isinstance(node, ast.FunctionDef) and PROMPT in (examples := ast.get_docstring(node) or ""):
                start, said, end = node.lineno - 1, node.body[0].end_lineno or 0, node.end_lineno or 0
                body = "".join(lines[said:end])
                if len(node.body) > 1 and body.strip() and node.body[1].lineno > said and end - said <= MOST_LINES:
                    parts = "".join(lines[:start]), "".join(lines[start:said]), body, "".join(lines[end:])
                    yield Function(document, prefix + node.name, *parts, examples, node.body[1].col_offset)


def part(found: Sequence[Function], seed: int) -> list[Function]:
    """Return the functions of a seed, shuffled, one of each module before the next of any.

    Seeds below `PARTS` share none, so that their questions can be pooled.
    """
    rng = random.Random(CODE)
    modules: dict[str, list[Function]] = defaultdict(list)
    for function in found:
        modules[function.document].append(function)
    groups = list(modules.values())
    rng.shuffle(groups)
    for group in groups:
        rng.shuffle(group)
    longest = max(map(len, groups), default=0)
    return [group[turn] for turn in range(longest) for group in groups if turn < len(group)][seed::PARTS]


def make(
    function: Function, tokenizer: PreTrainedTokenizerBase, passes: Callable[[str], bool], tokens: int, seed: int
) -> FunctionCase:
    """Make a case whose prompt has at most `tokens` tokens, its context cut at a line end.

    Args:
        function: what is to be completed.
        tokenizer: the model's.
        passes: runs a program, and tells whether it came to its end.
        tokens: of the whole prompt, special tokens included.
        seed: of the order of the held-out sources.

    Raises:
        DataError: the function's own head is longer, or there are no sources for a context that long.
    """
    name, question = f"{function.module}.{function.name}", _asked(function, tokenizer)

    def count(text: str, special: bool = False) -> int:
        return len(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    room = tokens - (least := count(question, special=True))
    if room < 0:
        raise DataError(f"{name} takes {least} tokens without any context; expected room for it in {tokens}")
    lines: list[str] = []
    for line in _lines_before(function, seed):
        room -= count(line)
        if room < 0:
            break
        lines.append(line)
    else:
        raise DataError(f"the held-out sources have {tokens - room} tokens; expected at least {tokens}")
    while lines and count("".join(reversed(lines)) + question, special=True) > tokens:
        lines.pop()
    context = "".join(reversed(lines))
    return FunctionCase(CODE, tokens, context, question, (name,), function=function, passes=passes)


def _asked(function: Function, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the function's head, without its last newline where a tokenizer joins that with the spaces after it.

    A prompt that ends within what is one token of a whole text is followed by something else than that text.
    """
    whole, head = (
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for text in (f"{function.head}{' ' * function.indent}return", function.head)
    )
    return function.head if whole[: len(head)] == head else function.head.rstrip()


def _lines_before(function: Function, seed: int) -> Iterator[str]:
    """Yield what stands before a function, the nearest line first."""
    yield from reversed(function.before.splitlines(keepends=True))
    yield f"# {function.document}\n"
    for name, text in _heldout(seed):
        if name != function.document:
            yield from reversed([f"# {name}\n", *text.splitlines(keepends=True), "\n"])


@lru_cache(maxsize=1)
def _heldout(seed: int) -> list[tuple[str, str]]:
    found = [(name, text) for name, text in offline.documents("heldout") if text.strip()]
    random.Random(f"{CODE}-{seed}").shuffle(found)
    return found
