"""What the workers of a group tell each other: one's error is an error of all."""

from __future__ import annotations

import torch.distributed as dist

from calumma.platform import storage


def gather_messages(message: str) -> list[str]:
    """The messages of all workers, by rank; every worker calls it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [message]
    messages = [""] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return messages


def raise_on_all(error: Exception | None) -> None:
    """Raises on every worker when one of them met an error: Damaged when one of them did, else StorageError."""
    told = "" if error is None else f"{'D' if isinstance(error, storage.Damaged) else '-'}{error}"
    if failed := sorted((message for message in gather_messages(told) if message), reverse=True):
        kind = storage.Damaged if failed[0][0] == "D" else storage.StorageError
        raise kind(failed[0][1:])
