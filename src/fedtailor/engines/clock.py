"""The virtual clock: what a letter to a device costs in simulated seconds, so that network claims are repeatable."""

from __future__ import annotations

from fedtailor.core import ClientId, Device, stream


def seconds(device: Device, down: int, flops: float, up: int) -> float:
    """Simulated seconds from sending a letter of `down` bytes to having the reply of `up` bytes, after `flops` of work."""
    total = 2 * device.latency
    total += down / device.downlink if device.downlink else 0.0
    total += up / device.uplink if device.uplink else 0.0
    return total + (flops / device.flops if device.flops else 0.0)


def is_lost(device: Device, seed: int, client: ClientId, round: int, step: int) -> bool:
    """Whether this letter is lost: drawn from a stream of its own, so no other draw changes with it."""
    if not device.dropout:
        return False
    import torch

    return bool(torch.rand((), generator=stream(seed, "lost", client, round, step)) < device.dropout)
