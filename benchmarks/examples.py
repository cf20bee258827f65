"""Runs every example in full: its figures and seconds in one file, its pictures in one folder.

python benchmarks/examples.py [names ...] [--pictures docs/images]
    [--out benchmarks/results/examples_cpu.json]
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

import harness
import jax
from PIL import Image

ROOT = Path(__file__).parents[1]
NAMES = ["tune_ridge", "clean_labels", "meta_sinusoid", "learn_schedule", "online_rates"]
NAMES += ["distill_digits", "choose_data"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, help="the others keep their old entries")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "images")
    default = ROOT / "benchmarks" / "results" / f"examples_{jax.default_backend()}.json"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "examples"))
    args.pictures.mkdir(parents=True, exist_ok=True)
    found = json.loads(args.out.read_text())["results"] if args.out.exists() else {}
    for name in args.names:
        start, cpu_start = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            figures = importlib.import_module(name).main(["--out", folder])
            with Image.open(Path(folder, f"{name}.png")) as picture:
                small = picture.convert("RGB").quantize(64)  # a third of the bytes, looks the same
        seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu_start}
        small.save(args.pictures / f"{name}.png", optimize=True)
        found[name] = {"seconds": seconds, **figures}
        harness.write(args.out, {"results": found})


if __name__ == "__main__":
    main()
