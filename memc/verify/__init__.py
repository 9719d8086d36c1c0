"""Checks of programs: well-formed, finite, split-invariant, and related to the original as a pass declared."""

from memc.verify.execute import layer_of, logits, pieces, run, run_nodes, streams, whole
from memc.verify.inputs import inputs_of, token_limit
from memc.verify.relations import (
    CheckResult,
    check_relation,
    check_text,
    finite,
    kl_mean,
    noise_floor,
    perplexity,
)
from memc.verify.sites import BadSite, first_bad_site
from memc.verify.splits import split_invariance
from memc.verify.structure import Problem, require_well_formed, well_formed
from memc.verify.text import VerificationText, past, sample_text, take

__all__ = [
    "BadSite",
    "CheckResult",
    "Problem",
    "VerificationText",
    "check_relation",
    "check_text",
    "finite",
    "first_bad_site",
    "inputs_of",
    "kl_mean",
    "layer_of",
    "logits",
    "noise_floor",
    "past",
    "perplexity",
    "pieces",
    "require_well_formed",
    "run",
    "run_nodes",
    "sample_text",
    "split_invariance",
    "streams",
    "take",
    "token_limit",
    "well_formed",
    "whole",
]
