"""A text that shows the health of blocks in color, where color can be shown."""

import html
import re

from dartax._health import RULES, TROUBLE

# The words of healthy blocks; those in trouble are red.
COLORS = {"growing": "green", "shrinking": "olive", "settled": "gray", "not started": "gray"}
ANSI = {"red": "31", "green": "32", "olive": "33", "gray": "90"}
# A word is the last cell of its row, behind two spaces.
WORD = re.compile(rf"(?<=  )({'|'.join(RULES)})$", re.MULTILINE)


def _color(word: str) -> str:
    return "red" if word in TROUBLE else COLORS[word]


class Description(str):
    """Plain text; a notebook shows it in color, and so does a terminal with :meth:`in_color`."""

    def in_color(self) -> str:
        """The text with ANSI colors, for a terminal."""
        return WORD.sub(lambda found: f"\x1b[{ANSI[_color(found[1])]}m{found[1]}\x1b[0m", self)

    def _repr_html_(self) -> str:
        """The text in color, for a notebook."""
        colored = WORD.sub(
            lambda found: f'<span style="color: {_color(found[1])}">{found[1]}</span>',
            html.escape(self),
        )
        return f'<pre style="line-height: 1.3">{colored}</pre>'
