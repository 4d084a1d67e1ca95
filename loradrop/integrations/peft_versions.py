"""Which versions of PEFT the face on it needs."""

import re
from importlib import metadata

LEAST = (0, 21)


def require_peft(package: str = "peft") -> None:
    """Raises ImportError where PEFT is not installed, or is a version that asks no tuner for the
    keys of its files.
    """
    need = f"loradrop.integrations.peft needs peft>={LEAST[0]}.{LEAST[1]}"
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"{need}, which is not installed: pip install peft") from error
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < LEAST:
        raise ImportError(
            f"{need}, and peft {version} is installed: pip install -U peft. loradrop.inject, and "
            "loradrop.load of a folder that PEFT wrote, need no PEFT"
        )
