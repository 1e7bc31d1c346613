"""Ranks, and how they hold a model: replicated (DDP) or sharded (FSDP2)."""
