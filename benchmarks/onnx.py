"""Exported graphs in onnxruntime beside the models in torch: CPU time on one thread, largest difference.

mambastyle export kaokore64 --out onnx && python benchmarks/onnx.py onnx --model kaokore64
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch

from mambastyle.api import Inverter, load
from mambastyle.export.onnx import graphs


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """The median CPU time of a call, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1000 * median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what `mambastyle export` wrote")
    parser.add_argument("--model", default="kaokore64")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures of a style network")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    loaded = load(arguments.model, device="cpu")
    model = loaded if isinstance(loaded, Inverter) else loaded.network
    print("| graph | inputs | torch, ms | onnxruntime, ms | largest difference |\n|---|---|---|---|---|")
    for graph in graphs(model, size=(arguments.size, arguments.size)):
        inputs = {name: tensor[:1] for name, tensor in graph.inputs.items()}
        session = onnxruntime.InferenceSession(arguments.folder / f"{graph.name}.onnx", options)
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        with torch.inference_mode():
            expected = graph.module(*inputs.values()).numpy()
            ours = milliseconds(lambda g=graph, i=inputs: g.module(*i.values()), arguments.repeats)
        theirs = milliseconds(lambda s=session, a=arrays: s.run(None, a), arguments.repeats)
        worst = np.abs(session.run(None, arrays)[0] - expected).max()
        shapes = ", ".join(" x ".join(map(str, tensor.shape)) for tensor in inputs.values())
        print(f"| {graph.name} | {shapes} | {ours:.1f} | {theirs:.1f} | {worst:.1e} |")


if __name__ == "__main__":
    main()
