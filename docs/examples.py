"""For the reference: the examples at the end of a docstring are a section of their own."""

import re
from textwrap import indent

import griffe


class Examples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            text = re.sub(
                r"^>>> .*\Z",
                lambda found: "Examples:\n" + indent(found[0], "    "),
                obj.docstring.value,
                flags=re.S | re.M,
            )
            obj.docstring.value = text
