#!/usr/bin/env python3
"""PyTorch's scaled_dot_product_attention (cuDNN and flash) at the sizes of bench_cuda_attention expanded:
causal, bfloat16, forward and backward, medians of event times. Keys carry the shared rotary part a head."""

import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# heads, key width, value width, sequences, length
SIZES = [(128, 192, 128, 1, 2048), (128, 192, 128, 1, 4096), (128, 192, 128, 1, 8192), (128, 192, 128, 1, 16384),
         (16, 192, 128, 1, 4096), (16, 192, 128, 4, 4096), (16, 192, 128, 1, 32768), (12, 96, 64, 16, 1024),
         (12, 96, 64, 1, 8192), (16, 128, 64, 4, 4096), (16, 128, 128, 4, 4096)]


def median_us(run, repeats=10):
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times)


print(torch.cuda.get_device_name(), "PyTorch", torch.__version__, "cuDNN", torch.backends.cudnn.version())
print(f"{'heads, widths':<16} {'batch':>5} {'length':>6} {'backend':>8} {'forward us':>11} {'TFLOP/s':>8} "
      f"{'backward us':>11} {'TFLOP/s':>8}")
for heads, key, value, sequences, length in SIZES:
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        def draw(width):
            x = torch.randn(sequences, length, heads, width, device="cuda", dtype=torch.bfloat16)
            return x.transpose(1, 2).requires_grad_()
        q, k, v = draw(key), draw(key), draw(value)
        try:
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(q, k, v, is_causal=True)
                d_out = torch.randn_like(out)
                forward = median_us(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
                backward = median_us(lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True))
        except RuntimeError as error:
            print(f"{heads}, {key}/{value}: {name}: {str(error).splitlines()[0][:80]}")
            continue
        pairs = 0.5 * sequences * length * heads * (length + 1)
        print(f"{f'{heads}, {key}/{value}':<16} {sequences:>5} {length:>6} {name:>8} {forward:>11.1f} "
              f"{2 * pairs * (key + value) / forward * 1e-6:>8.0f} {backward:>11.1f} "
              f"{2 * pairs * (3 * key + 2 * value) / backward * 1e-6:>8.0f}", flush=True)
