"""What local parallelism gains in fine-tuning a language model, as a share of what backpropagation gains, by stages.

    python recipes/finetune_study.py --model FOLDER --data shakespeare.txt
    python recipes/finetune_study.py --model FOLDER --data shakespeare.txt --methods dgl --stages 2 --seeds 0 1 2

Without ``--block`` the methods are as ``ds_configs/dgl_lm.json`` and ``ds_configs/overlapping_lm.json`` have them. Every run
trains with the engine on one rank, where the numbers are those of any number of ranks. Results are written as they come, and a
run that the output file holds already is not repeated.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch loads OpenMP
    from ds_decoupled.threads import share_cores

    share_cores(tell=False)

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

from data.text import read_text
from data.tokens import tokenizer_of
from data.windows import Corpus
from ds_decoupled.errors import ConfigError
from ds_decoupled.models import from_hugging_face
from ds_decoupled.settings import read_json
from ds_decoupled.threads import usable_cores
from run.options import COUNT, SEEDS, number, whole
from run.places import check_file, check_picture
from run.tables import environment, headline
from studies.finetune_report import draw, tables
from studies.finetune_run import train_alone
from studies.finetune_settings import BARE, FinetuneSetting, FinetuneStudy, check, settings_of
from studies.results import Kind, Results

METHODS = ("dgl", "overlapping", "delayed", "dsp")
CONFIGS = Path(__file__).parent.parent / "ds_configs"
SIZES = {"updates": "in all, teaching of heads counted", "evaluate_every": "updates", "sequence": "tokens",
         "micro_batch": "sequences of an update", "eval_micro_batches": "to validate on"}

FINETUNING = Kind("fine-tuning study", FinetuneStudy, lambda held: FinetuneSetting(**held), train_alone, "validation_loss",
                  lambda run: f"{run['validation_loss']:.3f} nats", unit="update")


def shipped_block(method: str) -> str:
    """What the shipped file of ``method`` says beside the method and its stages."""
    block = read_json(str(CONFIGS / f"{method}_lm.json"))["decoupled"]
    return json.dumps({name: value for name, value in block.items() if name not in ("method", "stages", "partition")})


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["dgl", "overlapping"], choices=METHODS)
    parser.add_argument("--stages", type=whole(2), nargs="+", default=[2, 4], metavar="J", help="(default: 2 4)")
    parser.add_argument("--block", nargs="+", help="further settings of the decoupled block, as JSON (default: as shipped)")
    parser.add_argument("--bare", action="store_true", help="a loop of transformers and torch alone too, which backpropagation "
                        "by the engine should equal")
    parser.add_argument("--seeds", type=whole(0, SEEDS), nargs="+", default=[0])
    parser.add_argument("--model", required=True, help="a folder that save_pretrained wrote, or a hub name")
    parser.add_argument("--data", required=True, help="a text file or a folder of them")
    for name, what in SIZES.items():
        parser.add_argument(f"--{name}", type=whole(1, COUNT), default=getattr(FinetuneStudy, name),
                            help=f"{what} (default: %(default)s)")
    parser.add_argument("--lr", type=number(0, above=True), default=FinetuneStudy.lr, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_study.json"), help="results (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="picture (default: beside the output)")
    parser.add_argument("--jobs", type=whole(1, 10_000), default=1, help="runs side by side (default: 1)")
    return parser.parse_args(arguments)


def all_settings(args: argparse.Namespace) -> list[FinetuneSetting]:
    """Every run."""
    for text in args.block or ():
        try:
            if not isinstance(json.loads(text), dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise ConfigError("--block", text, f"a JSON object is needed ({error})", 'For example {"head": "lens"}') from error
    found = [setting for method in args.methods
             for setting in settings_of([method], args.stages, args.block or [shipped_block(method)], args.seeds)]
    found += [FinetuneSetting(BARE, seed=seed) for seed in args.seeds if args.bare]
    return sorted(dict.fromkeys(found), key=lambda setting: setting.method != "backprop")


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then print and draw all that the output file holds."""
    args = parse_arguments(arguments)
    study = FinetuneStudy(**{f.name: getattr(args, f.name) for f in fields(FinetuneStudy)})
    plot = args.plot or args.output.with_suffix(".png")
    try:
        wanted = all_settings(args)
        check(wanted, study)
        from_hugging_face(study.model, untie_embeddings=True)  # what cannot be read is told before anything runs
        Corpus.of(read_text(study.data), tokenizer_of(None, study.model), study.sequence)
        check_file("--output", args.output)
        check_picture("--plot", plot)
        results = Results(args.output, study, FINETUNING)
        missing = results.missing(wanted)
        results.execute(missing, study.updates, args.jobs, max(1, usable_cores() // args.jobs))
    except ConfigError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    about = (f"{Path(study.model).name} on {Path(study.data).name}: AdamW {study.lr:g}, {study.micro_batch} × {study.sequence} "
             f"tokens an update, {study.updates} updates, teaching of heads counted.")
    print(f"\n{headline(environment(), about)}\n{tables(results.runs)}")
    draw(results.runs, plot)
    print(f"\nnumbers: {args.output}\npicture: {plot}")
    if any("error" in results.runs[setting] for setting in wanted):
        sys.exit(1)


if __name__ == "__main__":
    main()
