"""Go through every causal language model that ``transformers`` has, at a tiny size, and write what of it works as a table.

    python recipes/families.py --output docs/families.md
    python recipes/families.py llama opt zamba
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch loads OpenMP
    from ds_decoupled.threads import share_cores

    share_cores()

import argparse
import datetime
from pathlib import Path

import torch.distributed as dist

from lm.families import COLUMNS, Outcome, names, try_family


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="TYPE", help="model types of transformers (default: all)")
    parser.add_argument("--output", type=Path, help="a Markdown file")
    parser.add_argument("--seconds", type=int, default=60, help="of the processor, for one family (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    outcomes = []
    for name in args.families or names():
        outcomes.append(try_family(name, args.seconds))
        print(outcomes[-1].line(), flush=True)
    if args.output is not None:
        args.output.write_text(page(outcomes))


def page(outcomes: list[Outcome]) -> str:
    """The whole Markdown page."""
    import transformers

    good = [o for o in outcomes if o.good]
    refused = [o for o in outcomes if o.refused]
    other = [o for o in outcomes if not o.good and not o.refused and o.found.get("model") == "yes"]
    untried = [o for o in outcomes if not o.refused and o.found.get("model") != "yes"]
    parts = [HEAD.format(version=transformers.__version__, date=datetime.date.today(), all=len(outcomes), good=len(good),
                         refused=len(refused))]
    parts.append("\n".join(["| " + " | ".join(("model type", *COLUMNS)) + " |", "|---" * (1 + len(COLUMNS)) + "|",
                            *(o.row() for o in [*good, *other])]))
    if refused:
        parts.append("## Refused\n\n| model type | the reason that is given |\n|---|---|\n"
                     + "\n".join(f"| `{o.name}` | {o.refused} |" for o in refused))
    if untried:
        parts.append("## Not tried\n\nOf these the script cannot make a tiny model, or not in the time that it has.\n\n"
                     "| model type | why |\n|---|---|\n"
                     + "\n".join(f"| `{o.name}` | {' '.join(o.found.values())} |" for o in untried))
    return "\n\n".join(parts) + "\n"


HEAD = """# Families of language models

Every configuration class that `AutoModelForCausalLM` of transformers {version} takes, at a tiny size with random weights:
{good} of {all} are right in all that was tried, {refused} are refused with a reason. Made, on {date}, by

```
python recipes/families.py --output docs/families.md
```

- **logits**, **gradients**: of the layers against those of the model as it is, relative to the largest one.
- **mask**: the same with a padded batch. **folder**: read from the folder that `save_pretrained` wrote.
- **round trip**: what we write, loaded by `from_pretrained`, and the names in it those of `save_pretrained`.
- **generation**: greedy text by `generate` of what was loaded again is that of the model as it was."""


if __name__ == "__main__":
    main()
