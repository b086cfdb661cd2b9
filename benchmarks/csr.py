"""From which sparsity on a Linear layer multiplies faster in CSR than dense, on this machine.

usage: python benchmarks/csr.py [--repeats 30] [--threads 2]
"""

from __future__ import annotations

import math

import pandas as pd
import timing
import torch
from torch import nn

from prunelab.structure.export import SparseLinear, break_even

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
SIZES = {"784 to 300": (300, 784), "1000 to 1000": (1000, 1000), "4096 to 4096": (4096, 4096)}
BATCHES = (1, 64)
PASSES = 10  # in what is timed as one


def main() -> None:
    options = timing.options(__doc__, repeats=30)
    torch.manual_seed(0)
    cases, found = {}, {}
    for words, size in SIZES.items():
        for batch in BATCHES:
            x, layers = torch.randn(batch, size[1]), {}
            for sparsity in SPARSITIES:
                layer = nn.Linear(size[1], size[0])
                layers.setdefault("dense", layer)
                with torch.no_grad():
                    layer.weight *= torch.rand(size) >= sparsity
                layers[f"CSR, {sparsity:.0%} zeros"] = SparseLinear(layer)
            case = f"Linear, {words}, batch {batch}, {PASSES} passes"
            with torch.inference_mode():
                rivals = {name: lambda f=layer, x=x: [f(x) for _ in range(PASSES)] for name, layer in layers.items()}
                results = timing.compare(rivals, options.repeats)
            ratios = [row["ratio"] for name, row in results.items() if name != "dense"]
            level = break_even(pd.DataFrame({"sparsity": SPARSITIES, "speedup": ratios}))
            cases[case], found[case] = {"results": results}, None if math.isinf(level) else round(level, 3)
            print(f"{case}: even at {found[case]}\n{timing.table(results)}\n")
    timing.write("csr", {"break_even": found, "cases": cases})


if __name__ == "__main__":
    main()
