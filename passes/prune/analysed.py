"""What ``memc analyse`` found in a model, as what stays when it is pruned or as what goes last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from memc.blocks import AttentionBlock, Block
from memc.errors import MemcError
from memc.passes.prune.groups import Group
from memc.report.models import AnalysisDocument, UnitFacts

HINT = "write it with memc analyse MODEL --method heads -o FILE"


@dataclass(frozen=True)
class Analysed:
    """The units of a document, which are kept, or scored where they are to be chosen by; ``where`` names the file."""

    units: dict[tuple[int, str, str], UnitFacts]
    where: str
    scores: bool

    @classmethod
    def read(cls, path: str, blocks: Sequence[Block], *, scores: bool) -> Analysed:
        """Read a file for the blocks of a program.

        Raises ``MemcError`` E203 for a file that cannot be read or is no analysis, or that is of another model: it
        names a block that is not there, or more or fewer units than that has.
        """
        try:
            document = AnalysisDocument.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise MemcError("E203", f"the analysis cannot be read: {reason}", path, HINT) from None
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise MemcError("E203", f"the file is no analysis: {where} is not right", path, HINT) from None
        sizes = {_key(block): _size(block) for block in blocks}
        for one in document.units:
            count = sizes.get(_key(one))
            if count != len(one.scores) or not {*one.kept} <= {*range(count)}:
                reason = f"the analysis is of another model: layer {one.layer} {one.kind} of {len(one.scores)} units"
                raise MemcError("E203", reason, path, f"the model has {count} there" if count else "analyse this model")
        return cls({_key(one): one for one in document.units}, path, scores)

    def applied(self, group: Group) -> Group:
        """Return a group of which the kept units are fixed, or all have scores.

        A key-value head is kept with any query head that reads it, and has their scores summed. Raises ``MemcError``
        E203 where scores are asked for that the document does not have.
        """
        found = self.units.get(_key(group.block))
        if found is None:
            if self.scores:
                reason = f"the analysis has no scores of layer {group.block.layer} {group.block.path}".strip()
                hint = "unit=heads" if any(one.kind == "attention" for one in self.units.values()) else "another score"
                raise MemcError("E203", reason, self.where, hint)
            return group
        size = len(found.scores) // group.units
        if self.scores:
            parts = (found.scores[start : start + size] for start in range(0, len(found.scores), size))
            return replace(group, given=tuple(map(sum, parts)))
        return replace(group, fixed=tuple(sorted({*group.fixed, *(unit // size for unit in found.kept)})))

    def keeps(self, block: Block) -> bool:
        """Tell whether a block has kept units, so that it cannot go as a whole."""
        found = self.units.get(_key(block))
        return found is not None and bool(found.kept) and not self.scores


def _key(block: Block | UnitFacts) -> tuple[int, str, str]:
    """Name a block as both a model and a document do: paths may be empty."""
    return block.layer, block.path, block.kind


def _size(block: Block) -> int:
    return block.num_heads if isinstance(block, AttentionBlock) else block.hidden
