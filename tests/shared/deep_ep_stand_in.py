"""DeepEP's `Buffer` for tests: its signatures and layouts, over gloo between real processes on a CPU.

The package needs NVLink, so this takes its place. It refuses what its kernels would refuse (dtypes, shapes, order of
calls) and computes in the plainest way: every rank gathers everything and picks its own part. Signatures, return values
and handles are those of deepseek-ai/DeepEP, deep_ep/buffers/legacy.py at commit dd758ca (2.1.0).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

topk_idx_t = torch.int64


class Config:
    def __init__(self, num_sms, nvl_send, nvl_recv, rdma_send, rdma_recv):
        assert num_sms % 2 == 0 and nvl_send < nvl_recv and rdma_send <= rdma_recv // 2
        self.num_sms = num_sms

    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        assert num_ranks < 8 or num_ranks % 8 == 0
        return 128 * -(-hidden_bytes * num_ranks * self.num_sms // 128)

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        return 0 if num_ranks <= Buffer.nvl_peers else self.get_nvl_buffer_size_hint(2 * hidden_bytes, num_ranks)


class EventOverlap:
    def __init__(self, event=None, extra_tensors=None):
        self.event, self.extra_tensors = event, extra_tensors


class Buffer:
    num_sms: int = 20
    nvl_peers = 8
    """Ranks in a node: 8 for the kernels, fewer in tests."""

    def __init__(
        self, group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=24,
        allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=False, enable_shrink=False,
        comm=None,
    ):  # fmt: skip
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        ids = self._gather("set up")
        assert ids == ["set up"] * self.group_size
        assert num_nvl_bytes % 128 == num_rdma_bytes % 128 == 0 and num_nvl_bytes > 0
        assert (num_rdma_bytes > 0) == (self.group_size > self.nvl_peers)
        self.num_nvl_bytes, self.num_rdma_bytes, self.explicitly_destroy = (
            num_nvl_bytes,
            num_rdma_bytes,
            explicitly_destroy,
        )
        self.nodes = max(1, self.group_size // self.nvl_peers)
        self.calls = []
        """Names of the calls, and the handles that they took or returned."""

    def destroy(self):
        assert self.explicitly_destroy and self._gather("destroy") == ["destroy"] * self.group_size
        self.group = None

    @staticmethod
    def is_sm90_compiled():
        return True

    @staticmethod
    def set_num_sms(new_num_sms):
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks):
        assert num_ranks in (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
        return Config(Buffer.num_sms, 6, 256, 6, 128)

    @staticmethod
    def get_combine_config(num_ranks):
        assert num_ranks in (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
        return Config(Buffer.num_sms, 4, 256, 6, 128)

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):
        assert topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype == topk_idx_t
        assert num_experts % self.group_size == 0
        self.calls.append(("layout", None))
        owner = torch.where(topk_idx < 0, -1, topk_idx // (num_experts // self.group_size))
        goes_NP = torch.stack([(owner == rank).any(1) for rank in range(self.group_size)], 1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        goes_NN = goes_NP.unflatten(1, (self.nodes, -1)).any(2)
        to_nodes = goes_NN.sum(0).int() if self.nodes > 1 else None
        return goes_NP.sum(0).int(), to_nodes, per_expert, goes_NP, EventOverlap()

    def dispatch(
        self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None,
        num_tokens_per_expert=None, topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0,
        config=None, previous_event=None, async_finish=False, allocate_on_comm_stream=False,
    ):  # fmt: skip
        assert num_worst_tokens == 0 or (self.nodes == 1 and handle is None and topk_idx is not None)
        scaled = isinstance(x, tuple)
        value, scale = x if scaled else (x, None)
        assert value.dim() == 2 and value.is_contiguous() and value.shape[1] * value.element_size() % 16 == 0
        if scaled:
            assert value.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
            assert scale.shape == (len(value), value.shape[1] // 128) and value.shape[1] % 128 == 0
        else:
            assert value.dtype == torch.bfloat16
        value = value.view(torch.uint8)
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            self.calls.append(("dispatch again", id(handle)))
            goes_NP = handle[4] if self.nodes == 1 else handle[0]
            assert len(goes_NP) == len(value)
            parts = self._gather(("again", value[:], scale, goes_NP))
            assert [part[0] for part in parts] == ["again"] * self.group_size, "ranks are in different calls"
            room = len(handle[3] if self.nodes == 1 else handle[7])
            spare = room - sum(int(part[3][:, self.rank].sum()) for part in parts)
            return self._mine(parts, x, spare), None, None, None, None, EventOverlap()
        goes_NP = is_token_in_rank
        assert goes_NP.dtype == torch.bool and goes_NP.shape == (len(value), self.group_size)
        for count in (num_tokens_per_rank, num_tokens_per_expert):
            assert count.dtype == torch.int32 and count.is_contiguous()
        assert torch.equal(num_tokens_per_rank, goes_NP.sum(0).int())
        assert (num_tokens_per_rdma_rank is None) == (self.nodes == 1)
        assert topk_idx.is_contiguous() and topk_weights.is_contiguous() and topk_weights.dtype == torch.float32
        assert topk_idx.shape == topk_weights.shape and len(topk_idx) == len(value)
        parts = self._gather(("dispatch", value, scale, goes_NP, topk_idx, topk_weights))
        assert [part[0] for part in parts] == ["dispatch"] * self.group_size, "ranks are in different calls"
        local = len(num_tokens_per_expert) // self.group_size
        picked = [part[3][:, self.rank].nonzero().squeeze(1) for part in parts]
        idx = torch.cat([part[4][rows] for part, rows in zip(parts, picked, strict=True)]) - self.rank * local
        is_local = (idx >= 0) & (idx < local)
        weights = torch.cat([part[5][rows] for part, rows in zip(parts, picked, strict=True)]).where(is_local, 0.0)
        idx = idx.where(is_local, -1)
        counts = torch.bincount(idx[is_local], minlength=local).tolist()
        counts = [-(-count // expert_alignment) * expert_alignment for count in counts]
        spare = max(0, num_worst_tokens - len(idx))
        if num_worst_tokens:
            assert len(idx) <= num_worst_tokens, "more tokens than there is room for"
            counts, idx = [], torch.cat((idx, idx.new_full((spare, idx.shape[1]), -1)))
            weights = torch.cat((weights, weights.new_full((spare, idx.shape[1]), float("nan"))))
        # [i, r]: rows that ranks 0 to i have for rank r
        prefix = torch.stack([part[3].sum(0) for part in parts]).cumsum(0).int()
        source = torch.cat((*picked, torch.full((spare,), -1))).int()
        channels = torch.zeros(self.group_size, self.num_sms // 2, dtype=torch.int32)
        if self.nodes == 1:
            handle = (prefix, channels, channels.clone(), source, goes_NP, goes_NP.int())
        else:
            handle = (goes_NP, channels, channels, channels, prefix, channels, prefix, source, goes_NP.int(), channels)
        self.calls.append(("dispatch" if num_worst_tokens else "dispatch and wait", id(handle)))
        return self._mine(parts, x, spare), idx, weights, counts, handle, EventOverlap()

    def combine(
        self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None, async_finish=False,
        allocate_on_comm_stream=False,
    ):  # fmt: skip
        self.calls.append(("combine", id(handle)))
        prefix, source = (handle[0], handle[3]) if self.nodes == 1 else (handle[4], handle[7])
        assert x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16 and len(x) == len(source)
        if topk_weights is not None:
            assert topk_weights.is_contiguous() and topk_weights.dtype == torch.float32 and len(topk_weights) == len(x)
        n_tokens = len(handle[4] if self.nodes == 1 else handle[0])
        parts = self._gather(("combine", x, topk_weights, source))
        assert [part[0] for part in parts] == ["combine"] * self.group_size, "ranks are in different calls"
        nodes, total_w = [torch.zeros(n_tokens, x.shape[1]) for _ in range(self.nodes)], None
        if topk_weights is not None:
            total_w = torch.zeros(n_tokens, topk_weights.shape[1])
        for rank, (_, rows, weights, sources) in enumerate(parts):
            begin = int(prefix[self.rank - 1, rank]) if self.rank else 0
            window = slice(begin, int(prefix[self.rank, rank]))
            token = sources[window].long()
            nodes[rank * self.nodes // self.group_size][token] += rows[window].float()
            if total_w is not None:
                total_w[token] += weights[window]
        total = (
            sum((node.bfloat16().float() for node in nodes), torch.zeros_like(nodes[0])) if self.nodes > 1 else nodes[0]
        )
        return total.bfloat16(), total_w, EventOverlap()

    def _mine(self, parts, x, spare):
        """This rank's rows from all ranks; spare rows keep whatever memory held."""
        rows = [part[3][:, self.rank] for part in parts]
        value = [part[1][own_rows] for part, own_rows in zip(parts, rows, strict=True)]
        value = torch.cat((*value, value[0].new_full((spare, value[0].shape[1]), 255)))
        if not isinstance(x, tuple):
            return value.view(x.dtype)
        scale = [part[2][own_rows] for part, own_rows in zip(parts, rows, strict=True)]
        scale = torch.cat((*scale, scale[0].new_full((spare, scale[0].shape[1]), float("nan"))))
        return value.view(x[0].dtype), scale

    def _gather(self, value):
        parts = [None] * self.group_size
        dist.all_gather_object(parts, value, self.group)
        return parts
