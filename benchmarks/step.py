"""Time and saved activations of a training step, as ratios within one run.

The official MAE trains under half-precision autocast, so what is saved is shown with and without.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.arms import ARMS, build, inputs, machine
from benchmarks.plan import microseconds
from prmim_torch import make_plan


def saved_bytes(forward: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, each storage once, parameters not."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    # The graph must live until here: freed storages would be counted again at the same address, or not at all.
    del output
    return sum(kept.values())


def saved_per_image(loss: Callable[[int], torch.Tensor], method: torch.nn.Module, batch: int) -> float:
    """Return the bytes that one more image in the batch keeps; half-precision copies of weights are no image's."""
    parameters, half = list(method.parameters()), batch // 2
    whole, part = (saved_bytes(partial(loss, size), parameters) for size in (batch, half))
    return (whole - part) / (batch - half)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    images, noise = inputs(options.batch)
    print(
        f"Training step, {options.model}, patch 16, 224 px, mask 0.75, float32, batch {options.batch}, "
        f"median of {options.repeats}  [{machine()}]"
    )
    names = ("official layout", *ARMS)
    methods = {name: build(name, options.model) for name in names}
    optimizers = {name: torch.optim.AdamW(method.parameters(), fused=True) for name, method in methods.items()}

    def loss(name: str, batch: int = options.batch) -> torch.Tensor:
        output = methods[name](images[:batch], noise[:batch])
        return output if isinstance(output, torch.Tensor) else output.loss

    def step(name: str) -> float:
        start = time.perf_counter()
        loss(name).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        return time.perf_counter() - start

    memory = {}
    for precision in ("float32", "bfloat16"):
        for name in names:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                memory[name, precision] = saved_per_image(partial(loss, name), methods[name], options.batch)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.repeats + 1):  # arms take turns, so that a slow moment hits them all
        for name in names:
            seconds = step(name)
            if turn:
                times[name].append(seconds)
    print(f"{'':18}{'ms per image':>14}{'to dense':>10}")
    for name in names:
        per_image = 1e3 * statistics.median(times[name]) / options.batch
        to_dense = statistics.median(own / dense for own, dense in zip(times[name], times["dense"], strict=True))
        print(f"{name:18}{per_image:>14.1f}{to_dense:>10.3f}")
    plan = microseconds(partial(make_plan, methods["PR-MIM 0.5"].schedule, noise), options.batch, options.repeats)
    share = plan / (1e6 * statistics.median(times["PR-MIM 0.5"]) / options.batch)
    print(f"plan of PR-MIM 0.5 {plan / 1e3:>13.3f}   {share:.3%} of its step")
    for precision in ("float32", "bfloat16"):
        print(f"{'saved, ' + precision:18}{'MB per image':>14}{'to dense':>10}{'to official':>13}")
        for name in names:
            saved = memory[name, precision]
            to_dense, to_official = (saved / memory[other, precision] for other in ("dense", "official layout"))
            print(f"{name:18}{saved / 1e6:>14.1f}{to_dense:>10.3f}{to_official:>13.3f}")


if __name__ == "__main__":
    main()
