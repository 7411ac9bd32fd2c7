"""Triton's interpreter, without what it does again and again: a third to four fifths of the time of a small launch."""

import contextlib
from dataclasses import replace

_prepared = set()


def hasten() -> None:
    """At each call of a kernel function by another Triton looks through its whole language; from now on once."""
    from triton.runtime import interpreter

    def call(function, *args, **options):
        names = id(function.fn.__globals__)
        if names not in _prepared:
            _prepared.add(names)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **options)

    interpreter.InterpretedFunction.__call__ = call


@contextlib.contextmanager
def without_overflow_checks():
    """For sizes at which no address overflows: sums of integers are computed once, not twice."""
    from triton.runtime.interpreter import interpreter_builder as builder

    kept, builder.options = builder.options, replace(builder.options, sanitize_overflow=False)
    try:
        yield
    finally:
        builder.options = kept
