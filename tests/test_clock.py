"""The virtual clock against its closed form, and lost letters against their probability."""

from __future__ import annotations

import random

import pytest

from fedtailor.config import DeviceSection
from fedtailor.core import Device
from fedtailor.engines.clock import PACKET, is_lost, seconds
from fedtailor.equip import device_of

PHONE = Device("phone", flops=2e9, uplink=1e6, downlink=4e6, latency=0.25)


def test_seconds_are_two_ways_plus_bytes_over_bandwidth_plus_work_over_speed() -> None:
    # 2 x 0.25 s, 8 MB down at 4 MB/s, 6 GFLOP at 2 GFLOP/s, 3 MB up at 1 MB/s.
    assert seconds(PHONE, down=8_000_000, flops=6e9, up=3_000_000) == pytest.approx(0.5 + 2.0 + 3.0 + 3.0)


@pytest.mark.parametrize(
    ("unlimited", "rest"),
    [("flops", 0.5 + 2 + 3), ("uplink", 0.5 + 2 + 3), ("downlink", 0.5 + 3 + 3), ("latency", 8.0)],
)
def test_zero_is_not_limited(unlimited: str, rest: float) -> None:
    assert seconds(PHONE._replace(**{unlimited: 0.0}), 8_000_000, 6e9, 3_000_000) == pytest.approx(rest)


def test_a_device_without_limits_takes_no_time() -> None:
    assert seconds(Device(), down=10**12, flops=1e18, up=10**12) == 0.0


def drawn_trips(p: float, packets: int, repeats: int) -> float:
    """Round trips after the first until every packet has got through, in the mean of draws."""
    draw, total = random.Random(0), 0
    for _ in range(repeats):
        left = packets
        while left := sum(draw.random() < p for _ in range(left)):
            total += 1
    return total / repeats


@pytest.mark.parametrize(("p", "packets"), [(0.01, 220), (0.3, 5), (0.5, 1)])
def test_a_lost_packet_delays_its_message_by_round_trips(p: float, packets: int) -> None:
    far = device_of(DeviceSection(name="far", latency_ms=100, packet_loss=p))
    size = packets * PACKET
    wanted = 0.2 + 0.2 * drawn_trips(p, packets, 4_000)
    assert seconds(far, size, 0.0, 0) == pytest.approx(wanted, rel=0.03)
    assert seconds(far, 0, 0.0, size) == seconds(far, size, 0.0, 0)


def test_lost_packets_take_the_line_again_and_only_those_of_the_last_round_trip_delay() -> None:
    near = Device(uplink=1e6, packet_loss=0.2)
    assert seconds(near, 0, 0.0, 8_000_000) == pytest.approx(8 / 0.8)
    far = near._replace(latency=PACKET / 2e6)  # one packet a round trip: p / (1 - p) times sent again
    assert seconds(far, 0, 0.0, 8_000_000) == pytest.approx(8 / 0.8 + 2 * far.latency * 1.25)


def test_nothing_is_lost_at_zero_and_everything_at_one() -> None:
    letters = [(f"c{i}", round) for i in range(20) for round in range(20)]
    assert not any(is_lost(Device(dropout=0.0), 0, client, round, 1) for client, round in letters)
    assert all(is_lost(Device(dropout=1.0), 0, client, round, 1) for client, round in letters)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_letters_are_lost_at_the_rate_of_the_device(p: float) -> None:
    device, count = Device(dropout=p), 4_000
    lost = sum(is_lost(device, 7, f"c{i % 40}", i // 40, 1) for i in range(count))
    assert abs(lost / count - p) < 4 * (p * (1 - p) / count) ** 0.5


def test_a_loss_is_a_pure_function_of_seed_client_round_and_step() -> None:
    device = Device(dropout=0.5)

    def drawn(seed: int = 0, client: str = "c", start: int = 0, step: int = 1) -> list[bool]:
        return [is_lost(device, seed, client, start + i, step) for i in range(64)]

    assert drawn() == drawn()
    others = [drawn(seed=1), drawn(client="d"), drawn(start=1), drawn(step=2)]
    assert all(other != drawn() for other in others)


def test_a_letter_that_is_lost_stays_lost_on_a_worse_device() -> None:
    letters = [(f"c{i}", round) for i in range(20) for round in range(20)]
    lost = {p: {x for x in letters if is_lost(Device(dropout=p), 3, *x, 1)} for p in (0.2, 0.4, 0.8)}
    assert lost[0.2] < lost[0.4] < lost[0.8]
