#!/bin/sh
# Two processes on this machine, by gloo on a CPU: examples/two_processes.sh --tiny
# On two GPUs leave the variables out. accelerate launch --num_processes 2 should do the same.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m torch.distributed.run --standalone --nproc_per_node 2 \
  "$(dirname "$0")/two_processes.py" "$@"
