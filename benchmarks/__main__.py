"""All of it in one command: check and time every kernel, then time the training steps behind the headline figures.

    python benchmarks --append
"""
import subprocess
import sys
from pathlib import Path

RUNS = [
    ["ops.py"],
    ["step.py", "--size", "370M", "--batch", "8", "--pattern", "mamba", "serpent", "alternating", "--peer", "--profile"],
    ["step.py", "--size", "130M", "--batch", "16", "--pattern", "mamba", "--peer"],
    ["step.py", "--size", "1.4B", "--batch", "4", "--pattern", "mamba", "--peer"],
]

if __name__ == "__main__":
    codes = [
        subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *arguments, *sys.argv[1:]]).returncode
        for script, *arguments in RUNS
    ]
    sys.exit(max(codes))
