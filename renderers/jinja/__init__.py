"""Rendering by a model's own Jinja chat template, with exact masks. README.md explains how."""
