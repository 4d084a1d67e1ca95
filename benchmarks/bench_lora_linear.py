"""What LoRA costs over the frozen product alone: PEFT, the schemes of others, and loradrop.

Every provider gets the same x, W, A and B, and is compared with the float64 reference before it is
timed: a wrong one gets no number, and the script ends with 1. Several processes measure every cell,
its providers interleaved; ratios are formed within a process. A second run adds what is missing;
a provider that ends or hangs its process is named, and costs the others nothing.

    python benchmarks/bench_lora_linear.py                                  the CPU, one thread
    python benchmarks/bench_lora_linear.py --device cuda                    one CUDA device, all
    python benchmarks/bench_lora_linear.py --device cuda --grid quick       a minute of it
    python benchmarks/bench_lora_linear.py --device cuda --grid compiled    PEFT under torch.compile

Adapters have x's dtype, but for `peft_fp32` beside an x of half precision. There is a bias on a
CPU (encoders) and none on CUDA (Llama). `forward` runs under `no_grad`; in `forward_backward` x, A
and B need gradients. On CUDA, a forward pass of up to 32 tokens is one of decoding: it runs in a
CUDA graph. `frozen` is the product without an adapter; its r is 0.
"""

import sys

from lib import harness
from lib.providers import providers

BENCH = harness.Bench(
    __file__, providers, {"cpu": "encoders_all", "cuda": "llama,llama_1b,lorafusion,gqa,decode"}
)


if __name__ == "__main__":
    sys.exit(harness.main(BENCH, harness.arguments(__doc__)))
