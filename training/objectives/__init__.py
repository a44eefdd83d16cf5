"""One method per file: its constants, its equation, its short call."""
