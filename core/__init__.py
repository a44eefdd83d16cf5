"""The contract: one denoiser, its noise schedule, conditions, adapter roles and recipes. Imports torch and kernels only."""
