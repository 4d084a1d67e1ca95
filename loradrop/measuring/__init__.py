"""How a layer is measured: its operands, the check of its values, clocks, and processes."""
