"""Links that have a name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """How many devices with which links; ``link`` as in :mod:`bench.net.spec`."""

    devices: int
    link: str
    about: str


PROFILES = {
    "tpi-llm-klonet": Profile(
        8, "1ms/300mbit", "the emulated edge network of TPI-LLM (arXiv 2410.00531)"
    ),
    "home-wifi": Profile(
        4,
        "0:5ms±1ms/510mbit;1:7ms±1.5ms/320mbit;2:3ms±0.5ms/610mbit;3:3ms±0.5ms/610mbit",
        "the four laptops of the same paper",
    ),
    "ethernet": Profile(4, "0.2ms/1gbit", "devices on one switch"),
    "wan": Profile(4, "20ms/100mbit", "devices in several homes"),
}
