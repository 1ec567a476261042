"""Look at data, and at what SeRpEnt does: `launch/show.py data DATA`, `launch/show.py proposition1`,
`launch/show.py clock --checkpoint RUN --text FILE --out FOLDER`, `launch/show.py sizes --config FILE [key=value ...]`.

data: documents, tokens, tokens per byte, lengths of documents and some of them, as text and with --out as a picture.
proposition1: that an element's trace in the state is linear in its interval (Proposition 1 of arXiv 2501.11729), and, with
--checkpoint and --text, whether the intervals a model has learned tell how much elements matter.
clock: a page (clock.html, nothing beside it needed) and a picture (clock.png) of a text with the interval of each token, or with
a routed clock's probabilities.
sizes: parameters and FLOPs per token of a configuration's model, and of one of its size for each place compression may sit.
"""
from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch

from data_pipeline import summary, verification
from data_pipeline.index import load_split
from data_pipeline.places import Cache, is_remote
from data_pipeline.shards import left_out
from serpent_scale.config import ModelConfig, load_config
from serpent_scale.errors import UserError, exit_on_user_error
from serpent_scale.evaluation import clock, plots, proposition
from serpent_scale.evaluation.loading import Loaded, load_checkpoint, pick_device
from serpent_scale.model.accounting import flops_per_token, parameter_counts
from serpent_scale.model.placements import placements


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    views = parser.add_subparsers(dest="view", required=True)
    first = views.add_parser("proposition1", help="slopes, coefficients, and with a checkpoint correlations")
    first.add_argument("--out", type=Path, metavar="PNG", help="draw them too")
    second = views.add_parser("clock", help="a text with each token's interval, per layer and branch")
    second.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="gets clock.html and clock.png")
    for view in (first, second):
        wanted = view is second
        view.add_argument("--checkpoint", required=wanted, help="checkpoint folder, or a run's folder for its newest")
        view.add_argument("--text", required=wanted, type=Path, metavar="FILE", help="UTF-8 text to run it on")
        view.add_argument("--max-tokens", type=int, default=1000, help="read at most this many tokens of it (default 1000)")
        view.add_argument("--device", default="auto", help="auto, cpu or cuda[:N]")
    third = views.add_parser("data", help="documents, tokens, lengths and samples of a data folder")
    third.add_argument("data", metavar="DATA", help="folder written by prepare_data.py, or its URL")
    third.add_argument("--split", action="append", help="only this split; repeatable (default: all; at a URL train)")
    third.add_argument("--samples", type=int, default=3, help="documents of each split to print (default 3)")
    third.add_argument("--tokens", type=int, default=60, help="tokens to print of each (default 60)")
    third.add_argument("--seed", type=int, default=0, help="which documents these are (default 0)")
    third.add_argument("--cache", type=Path, metavar="FOLDER", help="where data from a URL is kept, data.cache of a run")
    third.add_argument("--cache-gib", type=float, default=100.0, help="largest size of the cache (default 100)")
    third.add_argument("--out", type=Path, metavar="PNG", help="draw the lengths")
    fourth = views.add_parser("sizes", help="parameters and FLOPs per token, by where compression sits")
    fourth.add_argument("--config", required=True, help="YAML file; configs/ holds the ones shipped")
    fourth.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.d_model=512")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.view in ("data", "sizes"):
        (show_data if args.view == "data" else show_sizes)(args)
        return
    if (args.checkpoint is None) != (args.text is None):
        raise UserError("--checkpoint and --text go together; give both or neither")
    (show_proposition if args.view == "proposition1" else show_clock)(args)


def show_data(args: argparse.Namespace) -> None:
    if args.samples < 0 or args.tokens < 1 or args.cache_gib <= 0:
        raise UserError(f"--samples {args.samples} --tokens {args.tokens} --cache-gib {args.cache_gib}: need samples >= 0, "
                        "tokens >= 1 and cache-gib > 0")  # fmt: skip
    remote = is_remote(args.data)
    names = args.split or (["train"] if remote else verification.Place(args.data).splits())
    if not names:
        raise UserError(f"{args.data}: holds no data; prepare it with launch/prepare_data.py")
    cache = Cache(args.cache, int(args.cache_gib * 2**30)) if args.cache else None
    indexes = [load_split(args.data, name, cache) for name in names]
    drawn = {}
    print(f"{'split':<14}{'documents':>14}{'tokens':>18}{'shards':>8}{'tokens/byte':>13}{'tokens/word':>13}")
    for i in indexes:
        print(f"{i.split:<14}{i.n_documents:>14,}{i.tokens:>18,}{len(i.shards):>8}{i.tokens / i.bytes:>13.4f}"
              f"{i.tokens / i.words:>13.4f}")
    for i in indexes:
        lengths = drawn[i.split] = summary.Lengths.of(i)
        gone = left_out(i.folder)
        print(f"\n{i.split}: identity {i.sha256[:16]}, {i.vocab_size:,} tokens in the vocabulary, {i.dtype.name}\n"
              f"documents of {lengths.shortest:,} to {lengths.longest:,} tokens, {i.tokens / i.n_documents:,.1f} on average")
        if any(gone.values()):
            print(f"left out: {gone['duplicates']:,} duplicates, {gone['overlapping']:,} that overlap an evaluation set")
        print(f"{'tokens':>22}{'documents':>14}{'of all tokens':>15}")
        for b, (documents, tokens) in enumerate(zip(lengths.documents.tolist(), lengths.tokens.tolist())):
            if documents:
                bar = "#" * round(40 * documents / lengths.documents.max())
                print(f"{f'{1 << b:,} to {(2 << b) - 1:,}':>22}{documents:>14,}{tokens / i.tokens:>15.1%}  {bar}")
        for number, text in summary.samples(i, args.samples, args.tokens, args.seed):
            print(f"document {number:,}: {text!r}")
    if args.out:
        plots.document_lengths(drawn, args.out)
        print(f"\nwrote {args.out}")


def show_sizes(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    model, length = config.model, config.data.seq_len
    models = {"as configured": model, **placements(model)}
    costs = {name: (sum(parameter_counts(m).values()), flops_per_token(m, length).training) for name, m in models.items()}
    inner = model.serpent.inner
    print(f"d_model {model.d_model}, {model.n_layers} layers around {inner}, rows of {length:,} tokens; FLOPs forward and "
          f"backward, ratios to {inner} alone\n{'':<18}{'parameters':>16}{'ratio':>8}{'MFLOP/token':>14}{'ratio':>8}  layers")
    for name, (parameters, flops) in costs.items():
        ratios = parameters / costs[inner][0], flops / costs[inner][1]
        print(f"{name:<18}{parameters:>16,}{ratios[0]:>8.4f}{flops / 1e6:>14,.1f}{ratios[1]:>8.3f}  {described(models[name])}")


def described(model: ModelConfig) -> str:
    """Its layers and what its SeRpEnt layers are made of."""
    text = ", ".join(f"{n} {name}" for name, n in Counter(model.layers).items())
    if "serpent" not in model.pattern:
        return text
    settings = {key: getattr(model.serpent, key) for key in ("rates", "shares", "depth")}
    return f"{text}: {', '.join(f'{key} {value}' for key, value in settings.items() if value not in ([], 1))}"


def show_proposition(args: argparse.Namespace) -> None:
    sequence, element = proposition.Sequence.random(), 40
    fits = [proposition.fit(sequence, element, rule, removal) for rule in proposition.RULES for removal in proposition.REMOVALS]
    steps = proposition.STEPS
    print(f"element {element + 1} of {len(sequence.x)}, {len(sequence.A)} states, float64, intervals {steps[0]:.0e} to "
          f"{steps[-1]:.0e}\n{'discretised by':<16}{'element':<10}{'slope':>12}{'coefficient':>16}{'predicted':>16}")
    for f in fits:
        print(f"{f.rule:<16}{f.removal:<10}{f.slope:>12.8f}{f.found:>16.9g}{f.predicted:>16.9g}")
    found = []
    if args.checkpoint:
        loaded, tokens, _ = read_text(args)
        found = proposition.correlations(loaded.model, tokens)
        print(f"\n{loaded.path}: interval and effect of deleting, {len(found[0].effects)} elements each\n"
              f"{'':<36}{'rank correlation':>18}{'of logarithms':>16}{'intervals':>20}")
        for c in found:
            spread = f"{c.intervals.min():.4f} to {c.intervals.max():.4f}"
            print(f"{c.what:<36}{c.rank:>18.3f}{c.linear:>16.3f}{spread:>20}")
    if args.out:
        plots.proposition(fits, found, args.out)
        print(f"wrote {args.out}")


def show_clock(args: argparse.Namespace) -> None:
    loaded, tokens, pieces = read_text(args)
    branches, places = clock.clocks(loaded.model, tokens), clock.places_in_words(pieces)
    page = clock.page(f"{loaded.config.run.name}, {loaded.path.name}", args.text.name, pieces, places, branches)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "clock.html").write_text(page)
    except OSError as error:
        raise UserError(f"{args.out}: cannot be written ({error.strerror}); name another with --out") from None
    plots.clock(branches, pieces, places, args.out / "clock.png")
    print(f"{'':<22}{'target':>8}{'realised':>10}{'cut by band':>13}")
    for b in branches:
        cut = "routed" if b.routed else f"{b.saturation:.1%}"
        print(f"layer {b.layer:<3} rate {b.rate:<8g}{b.rate:>8.3f}{b.realised:>10.3f}{cut:>13}")
    print(f"wrote {args.out / 'clock.html'} and {args.out / 'clock.png'}")


def read_text(args: argparse.Namespace) -> tuple[Loaded, torch.Tensor, list[str]]:
    """(model, tokens (L,) with the mark that begins a document first, the characters of each token after it)."""
    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.reason
        raise UserError(f"{args.text}: cannot be read as UTF-8 text ({reason})") from None
    device = pick_device(args.device)
    loaded = load_checkpoint(args.checkpoint, device)
    ids, pieces = clock.encode(loaded.tokenizer, text, args.max_tokens)
    if len(ids) < 100:
        raise UserError(f"{args.text}: {len(ids)} tokens are too few to show; give a text of 100 or more, --max-tokens too")
    return loaded, torch.tensor([loaded.end_of_text, *ids], device=device), pieces


if __name__ == "__main__":
    main()
