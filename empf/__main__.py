"""The commands of the package: the files, flags and code of a clone, for those without one.

python -m empf train --dataset photos/                   train.py
python -m empf eval runs/photos-resnet18                 eval.py
python -m empf bench deploy --threads 2                  bench/deploy.py; writes deploy.json, or where --json says
accelerate launch -m empf train --dataset photos/        train.py with Accelerate's launcher
"""

import runpy
import sys
from pathlib import Path

BENCHES = ("data", "deploy", "events", "kernels", "runtimes", "scaling", "train")
HERE = Path(__file__).parent
SCRIPTS = HERE / "scripts" if (HERE / "scripts").is_dir() else HERE.parent  # installed, or a checkout


def script(command: list[str]) -> list[str]:
    """The file behind a command and its flags; exits with one sentence where there is none."""
    match command:
        case [("train" | "eval") as name, *flags]:
            return [str(SCRIPTS / f"{name}.py"), *flags]
        case ["bench", name, *flags] if name in BENCHES:
            named = any(flag.split("=")[0] == "--json" for flag in flags)
            return [str(SCRIPTS / "bench" / f"{name}.py"), *flags, *([] if named else ["--json", f"{name}.json"])]
        case ["-h" | "--help"] | ["bench", "-h" | "--help"]:
            print(f"{__doc__}\nbenchmarks: {', '.join(BENCHES)}; each command has --help")
            sys.exit()
    sys.exit(f"error: give a command: python -m empf train, eval, or bench with one of {', '.join(BENCHES)}")


if __name__ == "__main__":
    sys.argv = script(sys.argv[1:])
    runpy.run_path(sys.argv[0], run_name="__main__")
