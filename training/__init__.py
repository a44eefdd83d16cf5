"""Distillation: objectives, the trainer, its run directory and its measures. Imports core and kernels; knows no
host."""
