"""The contract: one denoiser, its noise schedule, conditions, adapter roles, recipes. Imports torch and kernels."""
