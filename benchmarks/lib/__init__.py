"""What the scripts in `benchmarks/` share. They run from a checkout, whether or not loradrop is
installed: this is the one place that puts the checkout on Python's path.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))
