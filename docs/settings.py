"""Write the table of settings in README.md from `IADAConfig`.

python docs/settings.py
"""

from __future__ import annotations

import re
from pathlib import Path

from iada_plugin import IADAConfig

BLOCK = re.compile(r"(?<=<!-- settings -->\n).*(?=<!-- /settings -->)", re.DOTALL)


def table() -> str:
    """The Markdown table."""
    rows = [
        f"| `{name}` | `{field.default!r}` | {field.metadata['help']} |"
        for name, field in IADAConfig.__dataclass_fields__.items()
    ]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    readme = Path(__file__).parents[1] / "README.md"
    readme.write_text(BLOCK.sub(lambda _: table(), readme.read_text()))
