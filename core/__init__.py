"""The contract: schedule, denoiser, targets, roles, recipe, LoRA files. Imports torch alone, never a host."""
