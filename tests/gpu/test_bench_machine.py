"""The benchmark's clock and ceilings on a GPU, where calls are replayed from a graph."""

from __future__ import annotations

import torch

from moespec.bench.machine import NUM_WARMUP_ROUNDS, measure_ceilings, time_in_rotation


def test_on_cuda_a_replay_does_the_work_of_the_whole_list():
    device = torch.device("cuda")
    counters = [torch.zeros(1, device=device) for _ in range(3)]
    timing = time_in_rotation({"a": [lambda c=c: c.add_(1) for c in counters]}, device, num_rounds=4)["a"]
    # Once while warming up; capture records without running.
    assert [int(counter) for counter in counters] == [1 + NUM_WARMUP_ROUNDS + 4] * 3
    assert 0 < timing.p20_us <= timing.median_us <= timing.p80_us


def test_on_cuda_the_ceilings_are_a_gpus():
    ceilings = measure_ceilings(torch.device("cuda"), 512 << 20)
    assert 5e10 < ceilings.read_bytes_per_s < 2e13 and 5e10 < ceilings.copy_bytes_per_s < 2e13
    assert ceilings.launch_gap_us is not None and 0.1 < ceilings.launch_gap_us < 100
