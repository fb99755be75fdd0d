"""Diffusion on tensors and callables: schedule, denoiser, loss, samplers, noise. No modules, no files."""
