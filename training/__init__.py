"""The distillation trainer: objectives, run directory, watch, evaluation. Knows no host."""
