"""A hash of a network's weights: two networks with the same one compute the same."""

import hashlib

import torch


def checksum(module: torch.nn.Module, leave_out: tuple[str, ...] = ()) -> str:
    """
    A hash of a network's weights.

    Args:
        module (`torch.nn.Module`): The network.
        leave_out (`tuple[str, ...]`): Beginnings of parameter names that do not count.

    Returns:
        `str`: SHA-256 of the names and values of all parameters and persistent buffers, hexadecimal.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.startswith(leave_out):
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()
