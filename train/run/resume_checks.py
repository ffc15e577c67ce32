"""What a run that is taken up again must have in common with the one that saved its checkpoint."""

from pathlib import Path

from train.config import TrainConfig
from train.config_json import changed_fields
from train.data.corpus import CorpusIdentity
from train.data.tokenizer import Tokenizer
from train.errors import UserError

# What may differ between the run that saved and the run that resumes; everything else must be equal.
MAY_CHANGE = (
    "steps", "workdir", "optimizer", "checkpoint", "report", "parallel",
    "model.sparsity", "model.ffn", "model.remat", "model.dtype", "model.layer_loop",
    "refresh_order_every", "plan", "compilation_cache",
    # The corpus is compared by its content (`check_same_corpus`), not by the names of its files.
    "data.paths", "data.weights", "data.text_field", "data.accept_change", "data.require_paths",
)  # fmt: skip
_TOKENIZER_FIELD = "data.tokenizer"  # its content is compared, not its name


def check_same_run(saved: TrainConfig, given: TrainConfig, where: Path) -> None:
    """Raises UserError naming each field in which ``given`` cannot resume what ``saved`` began."""
    differing = [
        f"{name.replace('_', '-')} is {there!r} there and {here!r} here"
        for name, (there, here) in changed_fields(saved, given).items()
        if not name.startswith((*MAY_CHANGE, _TOKENIZER_FIELD))
    ]
    if differing:
        may_change = ", ".join(MAY_CHANGE).replace("_", "-")
        raise UserError(
            f"{where} was trained with another configuration: {'; '.join(differing)}. Only {may_change} may "
            "change on resume: restore the field or choose another workdir"
        )


def check_same_tokenizer(
    saved: Tokenizer, given: Tokenizer, where: Path, *, remedy: str = "choose another workdir"
) -> None:
    """Raises UserError unless both tokenizers have the same content; ``remedy`` is what else one can do."""
    if saved.fingerprint != given.fingerprint:
        raise UserError(
            f"{where} was trained with another tokenizer: data.tokenizer has {saved.vocab_size} ids and "
            f"fingerprint {saved.fingerprint[:12]} there, {given.vocab_size} and {given.fingerprint[:12]} "
            f"here: pass the tokenizer it was trained with, or {remedy}"
        )


def check_same_corpus(saved: CorpusIdentity, given: CorpusIdentity, where: Path) -> None:
    """Raises UserError unless both corpora have the same content."""
    if saved.fingerprint != given.fingerprint:
        raise UserError(
            f"{where} was trained on another corpus: {saved} there, {given} here. Pass the documents that it "
            "was trained on, choose another workdir, or go on with these from where the run stands with "
            "--data.accept-change"
        )


def check_same_split(saved: CorpusIdentity, given: CorpusIdentity, where: Path) -> None:
    """Raises UserError unless both corpora hold out a document by the same rule."""
    if saved.threshold != given.threshold:
        raise UserError(
            f"{where} was trained with another rule of which documents are held out than these token shards "
            "have, and text that it was trained on would count as held out: pass the documents themselves"
        )
