#!/usr/bin/env python3
"""PyTorch's products (cuBLAS, and its grouped products) at the sizes of bench_cuda_gemm: bfloat16, medians of
event times. Its gradients of weights are bfloat16, ours float32, but for the last two columns of grouped
products. Of grouped products: forward, input, weight; forward and weight of gathered rows; cuBLAS on one dense
product of equal work, forward, input, weight."""

import statistics

import torch


def median_us(run, repeats=9):
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / 3)
    return statistics.median(times)


def draw(*shape):
    return torch.rand(*shape, device="cuda", dtype=torch.bfloat16) * 4 - 2


print(torch.cuda.get_device_name(), "PyTorch", torch.__version__)
for t, n, k in [(8192, 8192, 8192), (16384, 384, 768), (16384, 1152, 384), (16384, 224, 768), (16384, 1536, 192),
                (16384, 768, 768), (16384, 2048, 768), (16384, 768, 2048), (16384, 768, 384), (16384, 8192, 768),
                (16384, 3072, 2048), (16384, 576, 2048), (16384, 4096, 512), (16384, 2048, 2048),
                (16384, 10944, 2048), (16384, 2048, 10944)]:
    x, w, y = draw(t, k), draw(n, k), draw(t, n)
    times = [median_us(run) for run in (lambda: x @ w.T, lambda: y @ w, lambda: y.T @ x)]
    print(f"{f'{t} x {n} x {k}':<24}", *(f"{us:>11.1f} {2e-6 * t * n * k / us:>9.1f}" for us in times))
for experts, rows, n, k in [(32, 65536, 384, 768), (32, 65536, 768, 384), (32, 65536, 768, 768),
                            (64, 49152, 2816, 2048), (64, 49152, 2048, 1408), (128, 65536, 1408, 2048),
                            (256, 65536, 1024, 2048)]:
    for skewed in (False, True):
        share = torch.tensor([1 / (e + 1) if skewed else 1.0 for e in range(experts)], dtype=torch.float64)
        offsets = (rows * share.cumsum(0) / share.sum() + 0.5).int().cuda()
        x, y, w = draw(rows, k), draw(rows, n), draw(experts, n, k)
        grouped = torch._grouped_mm
        tokens = rows // 4
        order, chosen = (torch.arange(rows) * 7919 % tokens).cuda(), x[:tokens]
        times = [median_us(run) for run in (lambda: grouped(x, w.transpose(1, 2), offs=offsets),
                                            lambda: grouped(y, w, offs=offsets),
                                            lambda: grouped(y.T, x, offs=offsets),
                                            lambda: grouped(chosen[order], w.transpose(1, 2), offs=offsets),
                                            lambda: grouped(y.T, chosen[order], offs=offsets))]
        dense_x, dense_y, dense_w = draw(rows, k), draw(rows, n), draw(n, k)
        times += [median_us(run) for run in (lambda: dense_x @ dense_w.T, lambda: dense_y @ dense_w,
                                             lambda: dense_y.T @ dense_x)] if not skewed else []
        name = f"{experts}, {rows}, {n} x {k}{' skewed' if skewed else ''}"
        print(f"{name:<32}", *(f"{us:>11.1f} {2e-6 * rows * n * k / us:>9.1f}" for us in times))
for n, k in [(2048, 2048), (10944, 2048), (7168, 16384), (102400, 2048)]:
    for rows in (1, 8, 32, 33, 64, 128, 256):
        pairs = [(draw(rows, k), draw(n, k)) for _ in range(max(2, min(30, int(2e8) // (n * k))))]
        graph = torch.cuda.CUDAGraph()
        for x, w in pairs:
            x @ w.T
        with torch.cuda.graph(graph):
            for x, w in pairs:
                x @ w.T
        us = median_us(graph.replay) / len(pairs)
        print(f"{f'{n} x {k}':<16} {rows:>6} {us:>9.1f} {2e-6 * n * k / us:>7.2f}")
