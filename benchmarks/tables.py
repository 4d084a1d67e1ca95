"""What is made from the committed result files: the tables in README.md and docs/results.md, and
the points by which the dispatcher chooses, loradrop/assets/measured.json.

    python benchmarks/tables.py            writes each table between its markers, and the points
    python benchmarks/tables.py --check    writes nothing; ends with 1 and a diff where they differ

The markers of a table are <!-- table:NAME --> and <!-- /table:NAME -->.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lib import RESULTS, ROOT, measured
from lib.cpu_tables import CPU_TABLES
from lib.gpu_tables import GPU_TABLES
from lib.markdown import MISSING
from lib.method_tables import METHOD_TABLES
from lib.size_tables import SIZE_TABLES
from loradrop.files import write_text

TABLES = CPU_TABLES | SIZE_TABLES | METHOD_TABLES | GPU_TABLES
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md")
_BLOCK = re.compile(r"(<!-- table:(\w+) -->\n)(.*?)(<!-- /table:\2 -->)", re.S)


def fill(text: str, results: Path) -> str:
    """The text with every table made again. Raises ValueError for a marker that names no table."""
    marked = re.findall(r"<!-- (/?)table:(\w+) -->", text)
    for name in {name for _, name in marked}:
        if name not in TABLES:
            raise ValueError(f"table:{name} is unknown; there are {', '.join(TABLES)}")
        if [slash for slash, of in marked if of == name] != ["", "/"]:
            raise ValueError(f"table:{name} needs its marker once, then its end marker, once")

    def table(match: re.Match[str]) -> str:
        made = TABLES[match[2]](results) or MISSING
        return f"{match[1]}{made}\n{match[4]}"

    return _BLOCK.sub(table, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Ends with 1 where `--check` finds a difference."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--check", action="store_true", help="write nothing, show what differs")
    parser.add_argument("--documents", nargs="*", type=Path, default=DOCUMENTS)
    parser.add_argument("--measured", type=Path, default=measured.ASSET)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        texts = {path: path.read_text(encoding="utf-8") for path in args.documents}
        made = {path: fill(text, args.results) for path, text in texts.items()}
        made[args.measured] = measured.text(measured.points(args.results))
    except ValueError as error:
        sys.exit(str(error))
    texts[args.measured] = args.measured.read_text(encoding="utf-8")
    stale = [path for path, text in texts.items() if text != made[path]]
    for path in stale:
        if not args.check:
            write_text(path, made[path])
            continue
        names = f"{path.name} as it is", f"{path.name} from the result files"
        lines = texts[path].splitlines(), made[path].splitlines()
        print(*difflib.unified_diff(*lines, *names, lineterm=""), sep="\n")
    if stale and args.check:
        print("Write them: python benchmarks/tables.py")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
