"""How anything is learnt: trainer, optimiser, batches, noise levels, the student. No method's name stands here."""
