"""What the passes of a model say of its adapters: of which rows, by which loss, and their sums."""
