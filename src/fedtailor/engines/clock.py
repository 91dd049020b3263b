"""The virtual clock: what a letter to a device costs in simulated seconds, so that network claims are repeatable."""

from __future__ import annotations

import math

from fedtailor.core import ClientId, Device, stream

PACKET = 1448
"""Bytes of a message in a packet of 1500."""


def seconds(device: Device, down: int, flops: float, up: int) -> float:
    """Simulated seconds from sending a letter of `down` bytes to having the reply of `up` bytes, after `flops` of work."""
    total = 2 * device.latency
    total += down / device.downlink if device.downlink else 0.0
    total += up / device.uplink if device.uplink else 0.0
    if device.packet_loss:
        total += sent_again(device, down, device.downlink) + sent_again(device, up, device.uplink)
    return total + (flops / device.flops if device.flops else 0.0)


def sent_again(device: Device, size: int, rate: float) -> float:
    """Seconds that lost packets add to a message, as expected: they take the line again, and the message is whole when the last is there,
    of those of its last round trip: earlier ones come again while the rest is on its way. n packets, each lost with probability p
    whenever it is sent, are all there after sum over k >= 1 of 1 - (1 - p^k)^n round trips more."""
    p, trip = device.packet_loss, 2 * device.latency
    packets = math.ceil(size / PACKET)
    if rate and trip:
        packets = min(packets, math.ceil(rate * trip / PACKET))
    trips, lost = 0.0, p
    while packets * lost > 1e-6:
        trips += 1 - (1 - lost) ** packets
        lost *= p
    return trip * trips + (size / rate * p / (1 - p) if rate else 0.0)


def is_lost(device: Device, seed: int, client: ClientId, round: int, step: int) -> bool:
    """Whether this letter is lost: drawn from a stream of its own, so no other draw changes with it."""
    if not device.dropout:
        return False
    import torch

    return bool(torch.rand((), generator=stream(seed, "lost", client, round, step)) < device.dropout)
