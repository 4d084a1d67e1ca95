"""Text to train on: files and hub data sets, what their columns mean, tokens."""
