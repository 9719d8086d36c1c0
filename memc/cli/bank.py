"""``memc bank``: build, train, inspect and fuse a bank of blocks that are fetched by the text of a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from memc.cli import completing
from memc.cli.console import Console
from memc.cli.options import (
    POSITIVE,
    Command,
    Numbers,
    Whole,
    declare,
    invocation,
    out_argument,
    remote_code_option,
    seed_option,
    threads_option,
)
from memc.errors import MemcError

LEVELS, BRANCH = 4, 16
RANKS = [256, 64, 16, 0]


class BankGroup(Command, click.Group):
    """The commands of a bank."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Ask for a command, in one line, where none is given."""
        if not args:
            raise click.UsageError(f"which of {', '.join(self.commands)}?", ctx)
        return super().parse_args(ctx, args)


@click.group(
    "bank",
    cls=BankGroup,
    examples=(
        "memc bank build --model model.gguf --data notes.jsonl -o bank",
        "memc bank inspect bank",
        "memc bank inspect bank --cluster 0.3",
    ),
)
def command() -> None:
    """Banks of feed-forward units, of which a prompt fetches those of its own cluster of text.

    build cuts text into passages, embeds them with a sentence encoder and clusters them into a tree; inspect shows it;
    train gives the blocks what they add to the model.
    """


@declare(
    "build",
    "memc bank build --model model.gguf --data notes.jsonl -o bank",
    "memc bank build --model m.gguf --data a.txt --levels 2 --ranks 64,16 -o bank",
    "memc bank build --model m.gguf --data crawl.jsonl --ray auto -o /shared/bank",
)
@click.option(
    "--model",
    required=True,
    metavar="MODEL",
    help="Model that the blocks are for.",
    shell_complete=completing.files,
)
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="TEXT",
    help="Text to cluster; may come several times.",
    shell_complete=completing.files,
)
@click.option("-o", "--out", required=True, metavar="BANK", help="Folder to make.", shell_complete=completing.folders)
@click.option("--levels", type=POSITIVE, default=LEVELS, show_default=True, help="Levels of the tree.")
@click.option("--branch", type=Whole(2), default=BRANCH, show_default=True, help="Children of a cluster.")
@click.option(
    "--ranks",
    type=Numbers(0, ordered=True, example="64,16,0"),
    help="Hidden units of each level.  [default: 256,64,16,0]",
)
@click.option(
    "--layers",
    type=Numbers(0, ordered=True, example="0,5,7"),
    help="Layers that get blocks, like 0,5,7.  [default: all]",
)
@click.option(
    "--encoder",
    default="sentence-transformers/all-MiniLM-L6-v2",
    show_default=True,
    metavar="MODEL",
    help="Sentence encoder: hub id, folder, or an artifact of one.",
    shell_complete=completing.files,
)
@click.option("--passage", type=Whole(100), default=1000, show_default=True, help="Characters of a passage.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of the blocks in the file.",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Work on a Ray cluster: its address, auto, or local. Needs pip install 'memc[ray]'.",
)
@click.option("--fresh", is_flag=True, help="Start over what was not finished.")
@click.option("--force", is_flag=True, help="Replace what is in BANK.")
@seed_option
@threads_option
@remote_code_option
def build(
    console: Console,
    model: str,
    data: tuple[str, ...],
    out: str,
    levels: int,
    branch: int,
    ranks: list[int] | None,
    layers: list[int] | None,
    encoder: str,
    passage: int,
    dtype: Any,
    ray: str | None,
    fresh: bool,
    force: bool,
    seed: int | None,
    threads: int | None,
    remote_code: bool,
) -> None:
    """Build a bank for a model from text. Its blocks are zero until they are trained.

    When it is interrupted the same command goes on.
    """
    chosen = RANKS if ranks is None else ranks
    if len(chosen) != levels:
        reason = f"{len(chosen)} ranks for {levels} levels"
        raise MemcError("E200", reason, "--ranks", f"give one a level, like {','.join(['16'] * levels)}")
    from memc.bank.build import BankModel, BuildOptions, build_bank
    from memc.bank.workers import RayWorkers, Workers

    workers = Workers() if ray is None else RayWorkers(ray, threads=threads)
    options = BuildOptions(
        ranks=tuple(chosen),
        branch=branch,
        encoder=encoder,
        characters=passage,
        dtype=dtype,
        seed=seed or 0,
        threads=threads,
    )
    with console.step(f"inspect {model}"):
        owner = BankModel.of(model, remote_code=remote_code)
    if layers is not None:
        owner = owner.only(layers)
    build_bank(owner, data, Path(out), options, fresh=fresh, force=force, progress=console, workers=workers)
    _show(console, out, None)


@declare(
    "inspect",
    "memc bank inspect bank",
    "memc bank inspect bank --cluster 0.3.1",
    "memc bank inspect bank --verify --json",
)
@click.argument("bank", metavar="BANK", shell_complete=completing.folders)
@click.option("--cluster", metavar="N.N...", help="Show a cluster: its children and its nearest passages.")
@click.option("--verify", is_flag=True, help="Check the digest of every file and record.")
def inspect(console: Console, bank: str, cluster: str | None, verify: bool) -> None:
    """Show a bank: its tree, how many passages the clusters have, what is trained, and what fetching takes."""
    _show(console, bank, cluster, verify=verify)


def _show(console: Console, folder: str, cluster: str | None, *, verify: bool = False) -> None:
    from memc.bank import Bank
    from memc.bank.describe import describe
    from memc.bank.layout import parse_cluster
    from memc.report.bank import bank_view

    bank = Bank.open(folder, verify=verify)
    document = describe(bank, None if cluster is None else parse_cluster(cluster, bank.shape))
    console.show(document, lambda: bank_view(document))


@declare(
    "train",
    "memc bank train bank --model model.gguf",
    "memc bank train bank --model model.gguf --only 0,generic --epochs 3",
    "memc bank train bank --model model.gguf --rate 0.003 --length 512 --fresh",
)
@click.argument("bank", metavar="BANK", shell_complete=completing.folders)
@click.option(
    "--model",
    required=True,
    metavar="MODEL",
    help="The model that the bank is for; it stays as it is.",
    shell_complete=completing.files,
)
@click.option("--epochs", type=POSITIVE, default=1, show_default=True, help="Times that each passage comes.")
@click.option("--length", type=Whole(2), default=256, show_default=True, help="Tokens of a sequence.")
@click.option(
    "--rate", type=click.FloatRange(0, 1, min_open=True), default=0.01, show_default=True, help="Peak learning rate."
)
@click.option(
    "--held-out",
    type=click.FloatRange(0, 0.5),
    default=0.05,
    show_default=True,
    help="Share of each file's passages that nothing learns, and that the result is measured on.",
)
@click.option(
    "--start",
    type=click.Choice(["random", "generic"]),
    default="random",
    show_default=True,
    help="What a cluster's blocks are at first: random, or the trained generic block.",
)
@click.option("--only", metavar="JOB,...", help="Clusters of the first level, or generic.  [default: all of them]")
@click.option("--fresh", is_flag=True, help="Train anew what is trained already or was begun.")
@seed_option
@remote_code_option
def train(
    console: Console,
    bank: str,
    model: str,
    epochs: int,
    length: int,
    rate: float,
    held_out: float,
    start: Any,
    only: str | None,
    fresh: bool,
    seed: int | None,
    remote_code: bool,
) -> None:
    """Train the blocks of a bank on the passages of their own cluster, beside the frozen model.

    Each cluster of the first level is a job, with all below it; so is the generic block, which learns all passages.
    When it is interrupted the same command goes on; torchrun shares the jobs among its processes.
    """
    from memc.bank import Bank
    from memc.bank.learner import Learner
    from memc.bank.measure import measure_bank
    from memc.bank.train import TrainOptions, parse_job, train_bank
    from memc.report.bank import bank_train_view
    from memc.train.device import accelerator, products_on
    from memc.train.parallel import joined

    options = TrainOptions(epochs=epochs, length=length, rate=rate, held_out=held_out, seed=seed or 0, start=start)
    opened = Bank.open(bank)
    jobs = None if only is None else [parse_job(text, opened) for text in only.split(",")]
    with console.step(f"load {model}"):
        learner = Learner.load(model, opened.manifest, remote_code=remote_code)
    with joined() as processes:
        device = accelerator(processes.rank)
        done = train_bank(
            opened,
            learner,
            options,
            console,
            only=jobs,
            fresh=fresh,
            processes=processes,
            device=device,
            products=products_on(device),
        )
    if processes.leads:
        document = measure_bank(opened, learner, options, done, console)
        console.show(document, lambda: bank_train_view(document))


@declare(
    "fuse",
    "memc bank fuse bank out --cluster 0.3 -o out-novels",
    'memc bank fuse bank out --text "a chapter of a novel" -o out-novels',
    "memc bank fuse bank out --generic -o out-generic --force",
)
@click.argument("bank", metavar="BANK", shell_complete=completing.folders)
@out_argument
@click.option("--cluster", metavar="N.N...", help="The cluster whose blocks become part of the model.")
@click.option("--text", help="Those of the cluster that this text belongs to.")
@click.option("--generic", is_flag=True, help="The generic block.")
@click.option("-o", "--out", "output", metavar="OUT2", help="Folder of the new artifact. [default: OUT-fused]")
@click.option("--force", is_flag=True, help="Replace an artifact that exists.")
@threads_option
def fuse(
    console: Console,
    bank: str,
    out: str,
    cluster: str | None,
    text: str | None,
    generic: bool,
    output: str | None,
    force: bool,
    threads: int | None,
) -> None:
    """Make a block of a bank part of a model, for good: wider feed-forward networks, and nothing to fetch.

    OUT was converted with --pass memory_bank. Logits agree with those of the fetched block but for rounding; where
    every bit is to stay, fetch it.
    """
    if sum((cluster is not None, text is not None, generic)) != 1:
        raise MemcError("E200", "one of --cluster, --text and --generic says what is fused", next="--cluster 0")
    from memc.bank import Bank
    from memc.bank.layout import parse_cluster
    from memc.conversion.fusing import chosen_path, fuse_artifact
    from memc.report.bank import bank_fuse_view

    made = Path(output or f"{out.rstrip('/')}-fused")
    invocation().out = made
    opened = Bank.open(bank, threads=threads)
    path = chosen_path(opened, cluster=None if cluster is None else parse_cluster(cluster, opened.shape), text=text)
    document = fuse_artifact(Path(out), made, opened, path, threads=threads, force=force, progress=console)
    console.show(document, lambda: bank_fuse_view(document))


command.add_command(build)
command.add_command(fuse)
command.add_command(train)
command.add_command(inspect)
