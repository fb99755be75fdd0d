"""Dreamix: text-driven video editing with a cascade of video diffusion models."""

__version__ = "0.1.0"
