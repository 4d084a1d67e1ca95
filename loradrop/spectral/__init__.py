"""Which directions of an adapter matter, and how a budget is spent on them: pure functions."""
