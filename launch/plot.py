"""The loss curve of a run as PNG: `launch/plot.py runs/NAME`."""
from __future__ import annotations

import argparse
from pathlib import Path

from serpent_scale.errors import UserError, exit_on_user_error
from serpent_scale.evaluation.plots import loss_curve


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, help="PNG to write (default: RUN/loss.png)")
    parser.add_argument("--baseline", action="append", default=[], metavar="NAME=LOSS", help="horizontal line, in nats")
    args = parser.parse_args()
    out = args.out or args.run / "loss.png"
    try:
        baselines = {name: float(loss) for name, _, loss in (item.rpartition("=") for item in args.baseline)}
    except ValueError:
        raise UserError(f"--baseline {' '.join(args.baseline)}: must be NAME=LOSS, for example unigram=6.5") from None
    loss_curve(args.run / "metrics.jsonl", out, baselines)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
