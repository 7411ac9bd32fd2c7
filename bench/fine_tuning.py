"""What it is worth to start from a network that knows other classes: the digits 0-4, then 5-9.

python bench/fine_tuning.py                            3 seeds, about two minutes on one thread

For each seed a network learns the digits 0 to 4; then, for a few epochs and with the same flags, the digits 5 to 9 are
learned from scratch, with `--init-from` that network, with `--init-from` its packed file (its signs), and
with `--init-from` and all but the head frozen. The images are class folders that this script writes; train.py does the
rest. Accuracy: % of the test images after the last time step, at the end of each epoch.
"""

import json
import os
import shlex
import statistics
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench.*, where this file is run as a script

import empf
import train
from bench.machine import machine
from empf.data.load import load_data
from empf.files import write_result
from empf.runs import read_metrics
from empf.training.config import Parser

OUT = Path(__file__).parent / "results" / "fine-tuning.json"
FLAGS = shlex.split("--width 0.25 --lr 0.05 --warmup-epochs 0 --mixup 0 --cutmix 0 --label-smoothing 0 --no-flip")
FLAGS += ["--threads", "1", "--no-health"]


def write_images(folder: Path) -> None:
    """`low` and `high` with train/CLASS/*.png and test/CLASS/*.png: the digits 0-4 and 5-9."""
    for split, data in zip(("train", "test"), load_data("digits"), strict=True):
        for number, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
            file = folder / ("low" if label < 5 else "high") / split / str(label) / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(file)


def trained(run: Path, data: Path, *flags: str) -> list[float]:
    """Test accuracy after each epoch of `train.py --dataset data flags`."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        train.main(["--dataset", str(data), *FLAGS, *flags, "--output-dir", str(run)])
    return [round(record["accuracy"][-1], 2) for record in read_metrics(run)]


def compare(folder: Path, seed: int, first_epochs: int, epochs: int) -> dict[str, list[float]]:
    """Accuracy on the digits 5-9 by epoch, for each start; and on 0-4, where the starts come from."""
    source, packed = folder / f"source-{seed}", folder / f"signs-{seed}.safetensors"
    found = {"digits 0-4": trained(source, folder / "low", "--epochs", str(first_epochs), "--seed", str(seed))}
    empf.pack(empf.load(source)).save(packed)
    starts = {
        "from scratch": [],
        "--init-from RUN": ["--init-from", str(source)],
        "--init-from PACKED": ["--init-from", str(packed)],
        "--init-from RUN, all but the head frozen": ["--init-from", str(source), "--freeze", "stem*,blocks*"],
    }
    for at, (name, flags) in enumerate(starts.items()):
        run = folder / f"run-{seed}-{at}"
        found[name] = trained(run, folder / "high", "--epochs", str(epochs), "--seed", str(seed), *flags)
    return found


def main(argv: list[str] | None = None) -> None:
    p = Parser(description="Fine-tuning on the digits 5-9, from networks that know 0-4.", allow_abbrev=False)
    p.add_argument("--first-epochs", type=int, default=6, help="on the digits 0-4 (default: 6)")
    p.add_argument("--epochs", type=int, default=3, help="on the digits 5-9 (default: 3)")
    p.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    p.add_argument("--json", type=Path, default=OUT, help="where the result is written")
    args = p.parse_args(argv)
    with TemporaryDirectory() as folder:
        write_images(Path(folder))
        runs = [compare(Path(folder), seed, args.first_epochs, args.epochs) for seed in range(args.seeds)]
    accuracy = {name: [found[name] for found in runs] for name in runs[0]}
    command = f"python bench/fine_tuning.py --first-epochs {args.first_epochs} --epochs {args.epochs}"
    result = {"command": f"{command} --seeds {args.seeds}", "flags": shlex.join(FLAGS), "accuracy": accuracy}
    write_result(args.json, json.dumps(result | machine(), indent=1) + "\n")
    for name, by_seed in accuracy.items():
        last = [epochs[-1] for epochs in by_seed]
        print(f"{name:42s} {statistics.mean(last):6.2f} %  ({', '.join(map(str, last))})")


if __name__ == "__main__":
    main()
