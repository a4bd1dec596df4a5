"""GPUs and the links between them, as a plan counts with them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of GPU, the nodes that they are in, and what is reached of each link.

    Bandwidths are in 10^9 bytes per second, in one direction. The defaults are those of a DGX H100:
    its data sheet's peak, memory bandwidth and GPUs of a node, and of the links what is reached.
    """

    memory_gb: float = 80.0  # available to the run, in 10^9 bytes
    tflops: float = 989.0  # peak of bf16 matrix products, in 10^12 operations per second
    bandwidth: float = 3350.0  # of memory
    mfu: float = 0.4  # share of the peak in the models' passes while a GPU computes
    gpus_per_node: int = 8
    host_memory_gb: float = 2000.0  # of a node, for what is offloaded and for checkpoints
    # Of a GPU to the others of its node. NCCL's developers give 370 for rings over NVLink 4, whose
    # line rate is 450 (NVIDIA/nccl-tests, issue 212).
    node_bandwidth: float = 370.0
    # Of a GPU's own network card to other nodes. The same developers give 46 to 48 for NDR
    # InfiniBand of 400 Gb/s (NVIDIA/nccl-tests, issue 290).
    network_bandwidth: float = 46.0
    # Of a GPU to its host's memory: an assumption, 85% of the 64 of PCIe 5.0 x16.
    host_bandwidth: float = 55.0
    # Of a node to the disk that checkpoints go to: an assumption, as file systems differ widely.
    disk_bandwidth: float = 2.0

    def seconds_for_flops(self, flops: float) -> float:
        """Time of one GPU for computing, in seconds."""
        return flops / (self.tflops * 1e12 * self.mfu)

    def seconds_for_bytes(self, num_bytes: float) -> float:
        """Time of one GPU for reading or writing memory, in seconds."""
        return num_bytes / (self.bandwidth * 1e9)

    def seconds_of_copy(self, num_bytes: float) -> float:
        """Time of one GPU for copying to or from its host's memory, in seconds."""
        return num_bytes / (self.host_bandwidth * 1e9)

    def seconds_of_ring(self, num_bytes: float, group: "Group") -> float:
        """Time of a gather, scatter or reduction in which each rank sends ``num_bytes``.

        A ring passes every byte over each of its links. Within a node that is the node's
        bandwidth. Between nodes, the m ranks that the group has on a node have m network cards for
        it, as all groups of a layout communicate at the same time: min(node, m * network).
        """
        bandwidth = self.node_bandwidth
        if group.crosses_nodes(self):
            bandwidth = min(bandwidth, group.ranks_on_node(self) * self.network_bandwidth)
        return num_bytes / (bandwidth * 1e9)

    def seconds_of_all_to_all(self, num_bytes: float, group: "Group") -> float:
        """Time in which each rank sends ``num_bytes`` in equal parts to the group's other ranks.

        Of n ranks, m of them on a node, the share (n - m) / (n - 1) leaves it, over each GPU's own
        network card: max(all / node, leaving / network).
        """
        inside = num_bytes / (self.node_bandwidth * 1e9)
        if not group.crosses_nodes(self):
            return inside
        leaving = num_bytes * (group.size - group.ranks_on_node(self)) / (group.size - 1)
        return max(inside, leaving / (self.network_bandwidth * 1e9))

    def seconds_of_send(self, num_bytes: float, *, between_nodes: bool) -> float:
        """Time of a message to one other rank, in seconds."""
        bandwidth = self.network_bandwidth if between_nodes else self.node_bandwidth
        return num_bytes / (bandwidth * 1e9)


@dataclass(frozen=True, kw_only=True)
class Group:
    """A process group of ``size`` ranks, of which neighbours are ``stride`` ranks apart.

    Ranks are numbered in Megatron's order tp-cp-ep-dp-pp, and nodes have consecutive ranks.
    """

    size: int
    stride: int

    def crosses_nodes(self, hardware: Hardware) -> bool:
        """Whether a group of this kind has ranks on several nodes."""
        return self.size > 1 and hardware.gpus_per_node % (self.size * self.stride) != 0

    def ranks_on_node(self, hardware: Hardware) -> int:
        """Ranks of the group that share a node, at least one."""
        return min(self.size, max(hardware.gpus_per_node // self.stride, 1))
