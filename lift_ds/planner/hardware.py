"""Hardware: what the times of a plan are computed from; every figure can be given by the user."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One kind of device, and the links between devices.

    Args:
        name: what to call it.
        memory_gb: of a device, in 10^9 bytes.
        tflops: of products in bf16, without sparsity, in 10^12 operations a second.
        fp32_tflops: of products in fp32, in which refreshes are computed.
        bandwidth_gb: of its memory, 10^9 bytes a second.
        intra_gb: of a device to the others of its node, one direction, 10^9 bytes a second.
        inter_gb: of a node to the other nodes, one direction, 10^9 bytes a second.
        host_gb: of the host's memory for each device, 10^9 bytes a second, at which an offloaded optimizer works. An
            assumption.
        reserve_gb: of the memory that is not to be planned with: the driver's context, the buffers of the collectives,
            what the allocator loses between blocks. An assumption.
        efficiency: share of the operations that a real training reaches. An assumption; 0.3 to 0.5 is usual for large
            models (Megatron-LM reports 0.44 to 0.52 for full training on A100, arXiv 2104.04473).
        refresh_efficiency: the same for refreshes. An assumption.
        overlap: whether collectives run beside computation.
    """

    name: str
    memory_gb: float
    tflops: float
    fp32_tflops: float
    bandwidth_gb: float
    intra_gb: float
    inter_gb: float = 50.0
    host_gb: float = 20.0
    reserve_gb: float = 4.0
    efficiency: float = 0.4
    refresh_efficiency: float = 0.3
    overlap: bool = True

    @property
    def usable_bytes(self) -> float:
        """Bytes of a device to plan with."""
        return 1e9 * (self.memory_gb - self.reserve_gb)

    def link_bytes(self, nodes: int) -> float:
        """Bytes a second of the slowest link of a ring through all devices, one direction."""
        return 1e9 * (self.intra_gb if nodes == 1 else min(self.intra_gb, self.inter_gb))


#: From NVIDIA's data sheets of the SXM modules. NVLink is stated there for both directions together, halved here.
DEVICES = {
    "a100": Hardware("A100 80 GB SXM", 80, 312, 19.5, 2039, 300),
    "h100": Hardware("H100 80 GB SXM", 80, 989, 67, 3350, 450),
    "h200": Hardware("H200 141 GB SXM", 141, 989, 67, 4800, 450),
}


def device_for(memory_gb: float) -> Hardware:
    """Return the device whose speeds are assumed for a memory: the smallest that has it, H100 before A100."""
    fitting = [DEVICES[name] for name in ("h100", "h200") if DEVICES[name].memory_gb >= memory_gb]
    return fitting[0] if fitting else DEVICES["h200"]
