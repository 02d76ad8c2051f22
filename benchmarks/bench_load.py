"""Time and memory of loading a checkpoint of V4-Flash's width in the release's layout, against a plain read of its files.

The checkpoint is random, written to a temporary directory that is deleted afterwards. Each load runs in a process of its own, whose peak
resident memory the kernel tells; the file cache is emptied of the checkpoint before each round and each side goes first in turn. Two whole
layers are 7 GB of FP4 and FP8, with embedding and head 9 GB, and take 28 GB in bf16: with less memory, take fewer layers or experts.

    python benchmarks/bench_load.py [--layers 2] [--experts 256] [--rounds 3] [--dtype bfloat16] [--directory DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from model import weights
from model.checkpoints import files, settings, writing
from model.checkpoints.formats import scale_shape, stored_shape
from model.checkpoints.layouts import FAMILIES, Slot, slots
from model.config import ModelConfig
from model.transformer import Transformer

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}


def flash(layers: int, experts: int) -> ModelConfig:
    """V4-Flash with fewer layers or experts: CSA, HCA and window layers in turn, the first routed by table, no MTP block."""
    ratios = ([4, 128, 0] * layers)[:layers]
    return ModelConfig(
        num_hidden_layers=layers, compress_ratios=ratios, n_routed_experts=experts, num_hash_layers=1, num_nextn_predict_layers=0
    )


def write(path: Path, config: ModelConfig) -> int:
    """Write a random checkpoint; returns the bytes of its model in bf16, fp32 where the release keeps fp32."""
    family = FAMILIES[config.model_type]
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    placed = slots(family.layouts["official"], {name: tuple(value.shape) for name, value in state.items()})
    generator = torch.Generator().manual_seed(0)

    def kind(slot: Slot) -> str:
        target = slot.parts[0].target
        return family.format(target) if state[target].dtype.is_floating_point else "int"

    def make(name: str) -> dict[str, Tensor]:
        slot = placed[name]
        if kind(slot) == "int":
            return {name: torch.randint(config.n_routed_experts, slot.shape, generator=generator)}
        if kind(slot) in PLAIN:
            return {name: torch.randn(slot.shape, generator=generator).mul_(0.02).to(PLAIN[kind(slot)])}
        codes = torch.randint(0, 256, stored_shape(kind(slot), slot.shape), dtype=torch.uint8, generator=generator)
        codes = (codes & 0xF7).view(torch.float8_e4m3fn) if kind(slot) == "fp8" else codes.view(torch.int8)  # 0x7F and 0xFF are NaN
        scales = torch.randint(112, 120, scale_shape(kind(slot), slot.shape), dtype=torch.uint8, generator=generator)
        return {name: codes, name.removesuffix(".weight") + family.scale: scales.view(torch.float8_e8m0fnu)}

    sizes = [files.Sized(name, writing.stored_bytes(slot, kind(slot))) for name, slot in placed.items()]
    files.write(path, sizes, make=make)
    settings.write_config(path, config, layout="official", formats={"fp4", "fp8", "bf16", "fp32"})
    widths = {name: 4 if family.format(name) == "fp32" else 2 for name in state}
    return sum(v.numel() * (widths[n] if v.dtype.is_floating_point else 8) for n, v in state.items())


def forget(path: Path) -> None:
    """Drop the files of a directory from the file cache."""
    for file in path.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(path: Path) -> float:
    """Read all files through one buffer; returns seconds."""
    buffer, started = bytearray(2**24), time.perf_counter()
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - started


def child(path: Path, dtype: str) -> None:
    """Load in this process and print what it took."""
    before, started = peak_bytes(), time.perf_counter()
    model = weights.load(path, dtype=getattr(torch, dtype))
    elapsed, peak = time.perf_counter() - started, peak_bytes()
    held = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    print(json.dumps({"load_s": elapsed, "peak_bytes": peak, "before_bytes": before, "model_bytes": held}))


def peak_bytes() -> int:
    """Most memory this process has had resident; `getrusage` would count what its parent had, too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def load(path: Path, dtype: str) -> dict[str, float]:
    """Run `child` in a process of its own."""
    command = [sys.executable, __file__, "--child", str(path), "--dtype", dtype]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    """Measure and print a row for RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--child", type=Path)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.dtype)
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="bench-load-") as name:
        path, config = Path(name), flash(options.layers, options.experts)
        started = time.perf_counter()
        size = write(path, config)
        stored = sum(file.stat().st_size for file in path.iterdir())
        wrote = time.perf_counter() - started
        print(f"wrote {stored / 1e9:.2f} GB in {wrote:.0f} s; in bf16 {size / 1e9:.2f} GB", flush=True)
        reads, loads = [], []
        for number in range(options.rounds):
            for side in ("read", "load") if number % 2 == 0 else ("load", "read"):
                forget(path)
                if side == "read":
                    reads.append(plain_read(path))
                else:
                    loads.append(load(path, options.dtype))
            print(f"round {number + 1}: read {reads[-1]:.1f} s, load {loads[-1]['load_s']:.1f} s", flush=True)
        took, read = median(each["load_s"] for each in loads), median(reads)
        peak, held = max(each["peak_bytes"] for each in loads), loads[0]["model_bytes"]
        print(
            f"| {options.layers} layers, {options.experts} experts | {options.dtype} | {stored / 1e9:.2f} GB | {held / 1e9:.2f} GB | "
            f"{peak / 1e9:.2f} GB | {peak / held:.3f} | {read:.1f} s | {took:.1f} s | {took / read:.2f} | load {os.getloadavg()[0]:.1f} |"
        )


if __name__ == "__main__":
    main()
