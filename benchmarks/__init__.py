"""Benchmarks: inputs as data, one module per operation, and a number only after that input's results agree.

`benchmarks/<operation>.py` holds

    CASES: dict[str, dict]                     plain data, by the case's name
    contenders(case, device, dtype)            (functions by name, inputs that need gradients, gradient of the output)
    useful_flops(case) -> (int, int)           optional: FLOPs that the formula needs, forward and forward + backward

Functions take nothing and return the output, a tensor of the output gradient's shape. "ours" and "reference" must be
among them; every other one is a peer: "dense" (scaled_dot_product_attention over all tokens), "flex" (compiled: on a
CPU only when asked for), "natten", "authors" (the plain PyTorch of the method's authors), ... A peer may lack a
backward pass on a device: then it raises, and its reason is reported.

    python -m benchmarks.ops       every operation on this CPU: ratios                         (make bench)
    python -m benchmarks.gpu       absolute times, a tuned table of tiles, a plot              (make bench-gpu)
"""
