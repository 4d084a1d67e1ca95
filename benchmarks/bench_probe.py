"""What the squared norm of the LoRA output costs: loradrop with it and without, and forward hooks.

Hooks as people write them: `peft_hook` computes the delta once more on the layer's input,
`peft_hook_b` reads it from the output of `lora_B`. The norm must change no bit of y: a backend
whose y differs gets no number.

    python benchmarks/bench_probe.py                     the CPU, one thread
    python benchmarks/bench_probe.py --device cuda       one CUDA device

Files, options and protocol are those of `bench_lora_linear.py`.
"""

import sys

from lib import harness
from lib.providers import probing

BENCH = harness.Bench(__file__, probing, {"cpu": "encoders", "cuda": "probe"})


if __name__ == "__main__":
    sys.exit(harness.main(BENCH, harness.arguments(__doc__)))
