"""Which versions of PEFT the face on it needs."""

import re

LEAST = (0, 21)


def require_peft(version: str) -> None:
    """Raises ImportError for a version of PEFT that asks no tuner for the keys of its files."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < LEAST:
        raise ImportError(
            f"loradrop.integrations.peft needs peft>={LEAST[0]}.{LEAST[1]}, and peft {version} is "
            "installed: pip install -U peft. loradrop.inject, and loradrop.load of a folder that "
            "PEFT wrote, need no PEFT"
        )
