"""Runs of train_lm.py or finetune_lm.py side by side: a table of their summaries, and one picture of validation loss.

    python recipes/compare_runs.py runs/finetune_*.json --plot docs/finetuning.png
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import common


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summaries", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path, default=Path("runs/compared.png"), help="(default: %(default)s)")
    parser.add_argument("--title", default="")
    return parser.parse_args()


def label(run: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """The method, and with it whatever else differs between runs."""
    parts = [run["method"]]
    for name, text in (("stages", "{} stages"), ("pipe_ranks", "{} ranks"), ("lora_rank", "LoRA {}"), ("seed", "seed {}")):
        if len({str(other.get(name)) for other in runs}) > 1:
            parts.append(text.format(run.get(name)))
    return ", ".join(parts)


def row(run: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """One line of the table."""
    before = run.get("validation_loss_before", math.nan)
    sent = run["bytes_sent_per_sample"]
    cells = [label(run, runs), f"{before:.3f}", f"{run['validation_loss']:.3f}", f"{run['perplexity']:.2f}",
             f"{run['tokens_per_second']:.0f}", f"{run['peak_memory_bytes'] / 2**20:.0f}",
             "not counted" if sent is None else f"{sent / 1024:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    args = parse_arguments()
    runs = [json.loads(path.read_text()) for path in args.summaries]
    head = ["method", "loss before", "loss after, nats", "perplexity", "tokens/s", "peak memory of a process, MiB",
            "sent per sequence, KiB"]
    print(f"| {' | '.join(head)} |\n| --- |{' ---: |' * (len(head) - 1)}")
    for run in runs:
        print(row(run, runs))
    curves = {label(run, runs): [(tokens / 1000, math.nan if loss is None else loss)
                                 for tokens, loss in zip(run["curves"]["tokens"], run["curves"]["validation_loss"])]
              for run in runs}
    common.plot_curves(args.plot, args.title, "thousands of tokens", {"validation loss, nats per token": curves})
    print(f"picture: {args.plot}")


if __name__ == "__main__":
    main()
