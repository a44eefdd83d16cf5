"""What a run needs before it starts: the real training step on the meta device, under one mode that counts."""
