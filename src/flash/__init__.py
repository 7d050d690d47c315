"""Flash: open, self-hostable LoRA post-training."""

__version__ = "0.1.0"
