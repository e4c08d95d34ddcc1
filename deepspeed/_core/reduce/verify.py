"""The verify mode (``"verify_gradients": N``): reduced gradients against a plain all-reduce, for the first N steps.

Independent of the reducer by construction: tensor hooks see each gradient before autograd stores it, sums are kept a
parameter at a time in fp32, and a plain all-reduce makes the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from deepspeed import comm as dist
from deepspeed._core.reduce.bucket import Bucket
from deepspeed._core.reduce.reducer import ReducePolicy
from deepspeed._core.reduce.transport import Transport
from deepspeed.utils.logging import log_dist

__all__ = ["GradientCheck"]

# Relative to the largest element of a parameter's gradient; 16-bit wire formats keep 8 (bf16) or 11 (fp16) bits.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class GradientCheck:
    """Records local gradients through tensor hooks and compares after the reduction; off when ``steps`` is 0."""

    def __init__(self, buckets: Sequence[Bucket], transport: Transport, steps: int) -> None:
        self._buckets = buckets
        self._transport = transport
        self._left = steps
        self._sums: dict[tuple[int, int], torch.Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        if steps > 0:
            self._handles = [
                slot.param.register_hook(self._recorder((bucket.index, position)))
                for bucket in buckets
                for position, slot in enumerate(bucket.slots)
            ]

    def _recorder(self, key: tuple[int, int]) -> Callable[[torch.Tensor], None]:
        def record(grad: torch.Tensor) -> None:
            value = (grad.to_dense() if grad.is_sparse else grad).detach().float()
            self._sums[key] = self._sums[key] + value if key in self._sums else value.clone()

        return record

    def reset(self) -> None:
        """Forgets the recorded gradients, with the window they belong to."""
        self._sums.clear()

    def detach(self) -> None:
        """Removes the hooks. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.reset()

    def compare(self, policy: ReducePolicy, loss_scale: float) -> None:
        """Raises on every rank if any differs, naming the first parameter that does. Collective while checking."""
        if self._left <= 0:
            return
        wrong = ""
        scale = policy.pre_scale * policy.post_scale
        for bucket in self._buckets:
            for position, slot in enumerate(bucket.slots):
                expected = self._sums.get((bucket.index, position))
                mean = torch.zeros(slot.numel, device=bucket.device) if expected is None else expected.reshape(-1)
                if self._transport.world_size > 1:
                    dist.all_reduce(mean, group=self._transport.group)
                mean.mul_(scale)
                begin, at, numel = slot.overlap(self._transport.rank)
                ours, theirs = bucket.grad_shard[at : at + numel].float(), mean[begin : begin + numel]
                bad = self._differs(ours, theirs, mean, bucket)
                if self._transport.sum_scalars(torch.tensor([float(bad)], device=bucket.device)).item() and not wrong:
                    wrong = slot.name
        self.reset()
        if wrong:
            raise AssertionError(
                f"verify_gradients: the reduced gradient of {wrong} differs from a plain all-reduce of the local "
                f"gradients (loss scale {loss_scale:g}); please report this"
            )
        self._left -= 1
        if self._left == 0:
            self.detach()
            log_dist("verify_gradients: all checked steps agree with a plain all-reduce")

    @staticmethod
    def _differs(ours: torch.Tensor, theirs: torch.Tensor, whole: torch.Tensor, bucket: Bucket) -> bool:
        if not ours.numel() or not bool(whole.isfinite().all()):
            return False
        limit = _TOLERANCE.get(bucket.comm_dtype, 1e-5) * max(float(whole.abs().max()), 1e-30) * bucket.world_size
        return bool(((ours - theirs).abs() > limit).any())
