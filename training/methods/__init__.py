"""One file a method: its settings, its equation, its row; shared equations in files named after them."""
