"""One file per method: from a recorded case to strategy and signals, and back to its outputs."""
